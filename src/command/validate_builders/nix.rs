//! Checks of a builder that builds with Nix: Nix is there, its store opens, it evaluates, and it builds what no cache
//! can have. What a job repairs by itself, from the same plan, passes and is named with what it takes; nothing is repaired
//! here.

use std::path::PathBuf;
use std::time::Duration;

use super::check_list::{CheckFailure, CheckList, CheckSpec, Found};
use super::inputs::Plan;
use crate::job::store_host::survey;
use crate::report::canary::Verdict;
use flywheel_core::text::{count, one_line};
use flywheel_nix::bootstrap::machine::Machine;
use flywheel_nix::bootstrap::plan::Impossible;
use flywheel_nix::bootstrap::{self, with_repairs};
use flywheel_nix::daemon_probe::probe;
use flywheel_nix::effective_settings::untrusted_store;
use flywheel_nix::ping::{Opened, Ping, PingFailure, ping};
use flywheel_nix::settings::Settings;
use flywheel_nix::store_location::{locate, shown};
use flywheel_nix::store_path::StorePath;
use flywheel_nix::tool::{Error, Nix, WELL_KNOWN, find};
use flywheel_sys::process::capture::Tool;
use flywheel_sys::runner::env::Env;

const PRESENT: CheckSpec = CheckSpec::required("nix-on-path", "toolchain", 10);
const VERSION: CheckSpec = CheckSpec::required("nix-version", "toolchain", 10);
const FEATURES: CheckSpec = CheckSpec::required("nix-features", "toolchain", 15);
const OPENS: CheckSpec = CheckSpec::required("store-opens", "store", 15);
const TAKES: CheckSpec = CheckSpec::required("store-takes-files", "store", 20);
const WRITERS: CheckSpec = CheckSpec::advisory("store-writers", "store", 25);
const TRUST: CheckSpec = CheckSpec::required("user-trusted", "user-trust", 20);
const SANDBOX: CheckSpec = CheckSpec::required("sandbox", "sandbox", 30);
const EVALUATION: CheckSpec = CheckSpec::required("evaluation", "evaluation", 60);
const BUILD: CheckSpec = CheckSpec::required("canary-build", "build", 30);
const PACKAGE: CheckSpec = CheckSpec::required("package", "package", 120);
/// A probe is built in a tenth of a second.
const PROBE_LIMIT: Duration = Duration::from_secs(5);
/// In the order in which they run. A check is skipped when one that it depends on has failed.
const ALL: [CheckSpec; 11] = [
    PRESENT, VERSION, OPENS, FEATURES, TAKES, WRITERS, TRUST, EVALUATION, BUILD, SANDBOX, PACKAGE,
];

/// A Nix that works, and what it has built.
pub(super) struct Built {
    pub(crate) nix: Nix,
    /// The output of the canary build, if it was built.
    pub(crate) path: Option<StorePath>,
}

/// Runs the checks. `None` if no Nix with a store that opens was found.
pub(super) async fn checks(
    list: &mut CheckList,
    plan: &Plan,
    env: &Env,
    publishes: bool,
) -> Option<Built> {
    let built = run(list, plan, env, publishes).await;
    // Where several fail, the others depend on the first.
    let failed = list
        .checks
        .iter()
        .find(|check| matches!(check.verdict, Verdict::Failed { .. }));
    let why = failed
        .map(|check| format!("it depends on `{}`", check.name))
        .unwrap_or_default();
    for spec in ALL {
        if !list.checks.iter().any(|check| check.name == spec.name) {
            list.skip(spec, why.clone());
        }
    }
    built
}

/// Runs the checks until one fails that all later ones depend on.
async fn run(list: &mut CheckList, plan: &Plan, env: &Env, publishes: bool) -> Option<Built> {
    let found = list.check(PRESENT, |_| present(plan, env)).await?;
    let Some(program) = found else {
        for spec in ALL.into_iter().skip(1) {
            list.skip(spec, "there is no Nix yet, and `nix-job` installs one");
        }
        return None;
    };
    let nix = list
        .check(VERSION, |limit| version(plan, &program, env, limit))
        .await?;
    // As a job would use it.
    let nix = list.check(OPENS, |limit| opens(nix, env, limit)).await?;
    list.check(FEATURES, |limit| features(&nix, env, limit))
        .await?;
    let taken = list.check(TAKES, |limit| takes(&nix, plan, limit)).await;
    // It tells which paths of a shared store can be published here, and fails nothing.
    list.check(WRITERS, |_| async {
        let survey = survey(&nix, &plan.host, publishes, env).await;
        Ok((
            (),
            format!("{survey}{}", Box::pin(daemon(&nix, plan)).await),
        ))
    })
    .await;
    list.check(TRUST, |_| trusted(&nix)).await;
    taken?;
    let settings = Settings::read(&nix).await.unwrap_or_default();
    let system = settings.text("system").unwrap_or_default();
    match &plan.flake {
        Some(flake) => drop(
            list.check(EVALUATION, |limit| evaluates(&nix, flake, &system, limit))
                .await,
        ),
        None => list.skip(
            EVALUATION,
            "there is no `flake.nix` here; the input `flake` names another place",
        ),
    }
    let path = list
        .check(BUILD, |limit| build(&nix, &settings, false, limit))
        .await;
    match (settings.text("sandbox").as_deref(), &path) {
        (_, None) => {}
        (Some("false"), _) => list.skip(SANDBOX, "`sandbox` is `false` in Nix's settings"),
        (_, Some(_)) => drop(
            list.check(SANDBOX, |limit| build(&nix, &settings, true, limit))
                .await,
        ),
    }
    match (&plan.package, path.is_some()) {
        (Some(package), true) => drop(
            list.check(PACKAGE, |limit| package_builds(&nix, package, limit))
                .await,
        ),
        (Some(_), false) => {}
        (None, _) => list.skip(PACKAGE, "no input `package` is given"),
    }
    Some(Built { nix, path })
}

/// Finds the program; none where a job installs it.
async fn present(plan: &Plan, env: &Env) -> Found<Option<PathBuf>> {
    let found = find(env, &WELL_KNOWN.map(PathBuf::from));
    match found {
        Some(found) => {
            let place = match found.on_path {
                true => "",
                // The job looks in the same places.
                false => " (not on `PATH`: `nix-job` repairs this)",
            };
            let text = format!("{}{place}", found.program.display());
            Ok((Some(found.program), text))
        }
        None => to_be_installed(plan, env).await,
    }
}

/// What a job does on a machine without Nix.
async fn to_be_installed(plan: &Plan, env: &Env) -> Found<Option<PathBuf>> {
    let mut machine = Machine::read(env);
    machine.try_sudo().await;
    machine.try_namespaces(env, &plan.install).await;
    match bootstrap::plan::plan(&machine, &plan.install) {
        bootstrap::plan::Plan::Impossible(Impossible { obstacle, remedy }) => {
            Err(CheckFailure::new(obstacle, remedy))
        }
        planned => Ok((
            None,
            format!(
                "there is no Nix yet: `nix-job` repairs this ({})",
                planned.summary()
            ),
        )),
    }
}

async fn version(plan: &Plan, program: &std::path::Path, env: &Env, limit: Duration) -> Found<Nix> {
    let hint = "Repair the installation, or take it off `PATH`.";
    // A program that hangs is killed here, with its children, so that no later call hangs.
    let path = env.path("PATH").unwrap_or_default();
    let ran = Tool::new(program)
        .arg("--version")
        .env("PATH", path)
        .run(limit)
        .await;
    ran.map_err(|error| CheckFailure::new(error.to_string(), hint))?;
    let nix = Nix::detect(program, env)
        .await
        .map_err(|error| CheckFailure::new(with_cause(&error), hint))?;
    let number = format!("{}.{}", nix.version.major, nix.version.minor);
    let line = nix.version.line.clone();
    match &plan.nix {
        Some(wanted) if !wanted.allows(&number) => Err(CheckFailure::new(
            format!("it is {line}, and the class wants {wanted}"),
            "Install a version that the contract allows.",
        )),
        // The contract says what is too old for this class.
        _ => {
            let line = nix.version.too_old().unwrap_or(line);
            Ok((nix, line))
        }
    }
}

/// Checks the experimental features without those that our own calls, and a job's settings, switch on.
async fn features(nix: &Nix, env: &Env, limit: Duration) -> Found<()> {
    let mut variables = nix.variables();
    variables.insert(
        "NIX_CONFIG".to_owned(),
        env.get("NIX_CONFIG").unwrap_or_default().into(),
    );
    let tool =
        Tool::new(&nix.program)
            .envs(variables)
            .args(["eval", "--expr", "builtins ? getFlake"]);
    let output = tool
        .run(limit)
        .await
        .map_err(|error| CheckFailure::new(error.to_string(), "Look at what Nix waits for."))?;
    match (output.status.success(), output.text().trim()) {
        (true, "true") => Ok(((), "`nix-command` and `flakes` are on".to_owned())),
        (true, _) => Ok(((), switched_on("flakes"))),
        (false, _) if output.stderr.contains("'nix-command' is disabled") => {
            Ok(((), switched_on("nix-command")))
        }
        (false, _) => Err(failure_of_call(
            "nix eval",
            &output.stderr,
            "Look at `NIX_CONFIG` and `/etc/nix/nix.conf` on the runner.",
        )),
    }
}

/// What a job does about a feature that the settings of the host leave off.
fn switched_on(feature: &str) -> String {
    format!(
        "`{feature}` is off in the host's settings: `nix-job` repairs this (a line in the `NIX_CONFIG` of the job's command)"
    )
}

/// Opens the store; gives Nix with what a job would repair.
async fn opens(nix: Nix, env: &Env, limit: Duration) -> Found<Nix> {
    match ping(&nix, limit).await {
        Ok(Ping::Open(opened)) => {
            let place = place(&nix, &opened).await;
            let mut text = format!("it is `{}`, {place}", shown(&opened.url));
            let (nix, problems) = with_repairs(&nix, &opened, env)
                .await
                .map_err(|error| classed(with_cause(&error), "Look at Nix's settings on the runner."))?;
            for problem in problems {
                text.push_str(&format!("; {problem}: `nix-job` repairs this (builds run as the job's user)"));
            }
            Ok((nix, text))
        }
        Ok(Ping::Failed(failure @ (PingFailure::NoDaemon(_) | PingFailure::PermissionDenied(_)))) => Err(CheckFailure::new(
            failure.text(),
            "Start the daemon on the runner (`systemctl restart nix-daemon`, or `nix-daemon` as root).",
        )
        .at("daemon")),
        Ok(Ping::Failed(failure)) => {
            Err(classed(failure.text().to_owned(), "Look at `NIX_REMOTE` and `/etc/nix/nix.conf` on the runner."))
        }
        // The socket accepts connections, but the daemon does not answer.
        Err(Error::Run { source, .. }) => Err(CheckFailure::new(
            source.to_string(),
            "Restart the daemon on the runner: something answers at its socket, but says nothing.",
        )
        .at("daemon")),
        Err(error) => Err(classed(with_cause(&error), "Look at the store on the runner.")),
    }
}

/// Where the store is, or why a job publishes nothing from it.
async fn place(nix: &Nix, opened: &Opened) -> String {
    let settings = Settings::read(nix).await.unwrap_or_default();
    let setting = settings.text("store").unwrap_or_default();
    match locate(nix, &opened.url, &setting) {
        Ok(location) => format!("in `{}`", location.folder.display()),
        Err(why) => format!("which a job cannot watch: {why}"),
    }
}

/// Adds a file with a new content to the store, which so cannot have it already.
async fn takes(nix: &Nix, plan: &Plan, limit: Duration) -> Found<()> {
    let hint = "Give the store room and rights on the runner.";
    let name = format!("flywheel-canary-{:032x}", fastrand::u128(..));
    let file = plan.temporary.join(&name);
    std::fs::write(&file, &name)
        .map_err(|error| CheckFailure::new(error.to_string(), hint).at("temporary-space"))?;
    let tool = Tool::new(&nix.folder().join("nix-store"))
        .envs(nix.variables())
        .arg("--add")
        .arg(&file);
    let ran = tool.run(limit).await;
    // What cannot be removed goes with the runner's temporary folder.
    let _ = std::fs::remove_file(&file);
    let output = ran.map_err(|error| CheckFailure::new(error.to_string(), hint))?;
    if output.status.success() {
        Ok(((), "a new file was added".to_owned()))
    } else {
        Err(failure_of_call("nix-store --add", &output.stderr, hint))
    }
}

/// What else a line about the store's writers says where they build through a daemon.
async fn daemon(nix: &Nix, plan: &Plan) -> String {
    let settings = Settings::read(nix).await.unwrap_or_default();
    let system = settings.text("system").unwrap_or_default();
    match ping(nix, PROBE_LIMIT).await {
        Ok(Ping::Open(opened)) if !opened.is_local() => (),
        _ => return String::new(),
    }
    let facts = match probe(nix, &system, &plan.temporary, PROBE_LIMIT).await {
        Ok(facts) => facts,
        Err(error) => return format!("; the daemon was not probed: {error}"),
    };
    let weaknesses = facts.weaknesses().into_iter();
    let weaknesses = weaknesses.map(|weakness| {
        format!("; the daemon {weakness}, against which no rule of this job's helps")
    });
    let unknown = facts.unknown();
    let unknown = (!unknown.is_empty())
        .then(|| format!("; probe builds did not show {}", unknown.join(" and ")));
    weaknesses.chain(unknown).collect()
}

async fn trusted(nix: &Nix) -> Found<()> {
    match untrusted_store(nix).await {
        Ok(None) => Ok(((), "the store obeys this user's settings".to_owned())),
        Ok(Some(_)) => Err(CheckFailure::new(
            "the daemon does not trust this user, so that a job's cache and keys are ignored",
            "Add the runner's user to `trusted-users` in `/etc/nix/nix.conf` and restart the daemon.",
        )),
        Err(error) => Err(CheckFailure::new(
            with_cause(&error),
            "Look at the daemon on the runner.",
        )),
    }
}

/// Evaluates every derivation of `packages.<system>`, without the evaluation cache.
async fn evaluates(nix: &Nix, flake: &str, system: &str, limit: Duration) -> Found<()> {
    let attribute = format!("{flake}#packages.{system}");
    let apply = "p: builtins.mapAttrs (n: d: d.drvPath) p";
    let arguments = [
        "eval",
        "--json",
        "--option",
        "eval-cache",
        "false",
        "--no-write-lock-file",
        "--apply",
        apply,
        &attribute,
    ];
    let output = nix.run(&arguments, limit).await.map_err(|error| {
        CheckFailure::new(with_cause(&error), "Look at what the flake waits for.")
    })?;
    let hint = format!(
        "Run `nix eval {attribute} --apply builtins.attrNames` by hand, and mend the flake."
    );
    if !output.status.success() {
        return Err(failure_of_call("nix eval", &output.stderr, &hint));
    }
    let packages: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&output.stdout).unwrap_or_default();
    match packages.len() {
        0 => Err(CheckFailure::new(
            format!("`packages.{system}` has nothing in it"),
            hint,
        )),
        number => Ok((
            (),
            format!(
                "{} of `packages.{system}` evaluate",
                count(number as u64, "attribute")
            ),
        )),
    }
}

/// Builds what no cache can have: its name and its content are a random number.
async fn build(
    nix: &Nix,
    settings: &Settings,
    in_sandbox: bool,
    limit: Duration,
) -> Found<StorePath> {
    let system = settings.text("system").unwrap_or_default();
    let expression = derivation(&system, has_shell(settings) && !in_sandbox);
    let mut arguments = vec![
        "build",
        "--no-link",
        "--json",
        "--option",
        "substitute",
        "false",
    ];
    if in_sandbox {
        // Older versions fall back to a build without a sandbox, and do not report it.
        arguments.extend(["--option", "sandbox-fallback", "false"]);
    }
    arguments.extend(["--expr", &expression]);
    let output = nix.run(&arguments, limit).await.map_err(|error| {
        CheckFailure::new(with_cause(&error), "Look at what the build waits for.")
    })?;
    if !output.status.success() {
        let hint = if in_sandbox {
            "Allow user namespaces and mounts to the runner's container, or set `sandbox = false` in Nix's settings."
        } else {
            "Build something small by hand on the runner: `nix build --expr …`."
        };
        return Err(failure_of_call("nix build", &output.stderr, hint));
    }
    let built: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let path = built
        .first()
        .and_then(|one| one["outputs"]["out"].as_str())
        .and_then(|path| path.parse().ok());
    let path: StorePath = path.ok_or_else(|| {
        CheckFailure::new(
            "Nix does not say what it has built",
            "This is a fault of Flywheel's.",
        )
    })?;
    let text = path.to_string();
    Ok((path, text))
}

/// Whether a build finds a shell: the host's, or the one that the sandbox is given.
fn has_shell(settings: &Settings) -> bool {
    let without_sandbox = settings.text("sandbox").as_deref() == Some("false");
    without_sandbox
        || settings
            .list("sandbox-paths")
            .iter()
            .any(|path| path.starts_with("/bin/sh"))
}

/// The expression of a derivation. Without a shell it uses a builder of Nix's own, which also runs in a process of
/// its own.
fn derivation(system: &str, shell: bool) -> String {
    let nonce = format!("{:032x}", fastrand::u128(..));
    let (system, builder) = if shell {
        (system, "/bin/sh")
    } else {
        ("builtin", "builtin:buildenv")
    };
    format!(
        r#"derivation {{ name = "flywheel-canary-{nonce}"; system = "{system}"; builder = "{builder}"; args = [ "-c" "echo $nonce > $out" ]; nonce = "{nonce}"; derivations = ""; manifest = "/{nonce}"; }}"#
    )
}

async fn package_builds(nix: &Nix, package: &str, limit: Duration) -> Found<()> {
    let arguments = ["build", "--no-link", "--no-write-lock-file", package];
    let output = nix.run(&arguments, limit).await.map_err(|error| {
        CheckFailure::new(
            with_cause(&error),
            "Raise the input `timeout`, or name a smaller input `package`.",
        )
    })?;
    if output.status.success() {
        return Ok(((), format!("`{}` is built", one_line(package, 100))));
    }
    Err(failure_of_call(
        "nix build",
        &output.stderr,
        "Build it by hand and mend it; the input `package` names it.",
    ))
}

/// The failure that Nix's standard error describes, at the layer that is at fault.
fn failure_of_call(call: &str, stderr: &str, hint: &str) -> CheckFailure {
    classed(
        format!(
            "`{call}` failed: {}",
            flywheel_nix::tool::error_summary(stderr)
        ),
        hint,
    )
}

/// Moves a failure to another layer where its text gives that layer away: a full disk fails whichever check writes
/// first.
fn classed(text: String, hint: &str) -> CheckFailure {
    let broken = CheckFailure::new(text, hint);
    if broken.text.contains("No space left on device") || broken.text.contains("disk is full") {
        return broken.at("disk");
    }
    if broken.text.contains("Read-only file system") || broken.text.contains("readonly database") {
        return broken.at("store");
    }
    // These come from a build that was not allowed to fall back to no sandbox.
    if broken.text.contains("cloning builder process") || broken.text.contains("sandboxed build") {
        return broken.at("sandbox");
    }
    broken
}

/// An error with its cause.
fn with_cause(error: &Error) -> String {
    let source = std::error::Error::source(error)
        .map(|source| format!(": {source}"))
        .unwrap_or_default();
    format!("{error}{source}")
}
