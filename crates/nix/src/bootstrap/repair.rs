//! Opens the store, and repairs what keeps it from opening: a dead daemon, or build users that do
//! not exist.

use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout_at};

use crate::bootstrap::machine::{Machine, Opening};
use crate::bootstrap::plan::{Plan, RepairStep, Wanted, does_not_open, plan};
use crate::bootstrap::{BuildUsers, Daemon, Error, Ready, Repair};
use crate::ping::{Opened, Ping, PingFailure, ping};
use crate::settings::Settings;
use crate::store_location::daemon_socket;
use crate::tool::{self, Nix};
use flywheel_core::progress::Sink;
use flywheel_core::text::one_line;
use flywheel_sys::process::capture::CaptureError;
use flywheel_sys::process::service::Service;
use flywheel_sys::runner::env::Env;

/// Opening the store is quick; a daemon that takes longer than this counts as dead.
const PING_LIMIT: Duration = Duration::from_secs(20);
/// Attempts at opening a store that fails for an unknown reason, since another process may be
/// creating it right now.
const OPEN_ATTEMPTS: usize = 10;
/// Pause between these attempts.
const OPEN_RETRY_DELAY: Duration = Duration::from_millis(100);
/// A daemon creates its socket right after it starts, so this is ample.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How often to check for the socket.
const START_POLL_INTERVAL: Duration = Duration::from_millis(20);
/// With this line, builds run as the user that runs Nix.
const NO_BUILD_USERS: &str = "build-users-group =";

/// The queries that do not depend on Nix's version.
pub(super) struct EarlyProbe {
    /// The result of opening the store.
    store: Result<Ping, Error>,
    /// `None` where this version names the command differently.
    settings: Option<Settings>,
}

impl EarlyProbe {
    pub(crate) async fn run(nix: &Nix, deadline: Instant) -> Self {
        let (store, settings) = tokio::join!(ping_with_retries(nix, deadline), Settings::read(nix));
        Self {
            store,
            settings: settings.ok(),
        }
    }
}

/// Opens the store, repairs it where needed, and reports whether builds have users of their own.
pub(super) async fn open_store(
    machine: &mut Machine,
    wanted: &Wanted,
    ready: &mut Ready,
    early: EarlyProbe,
    sink: &Sink,
    deadline: Instant,
) -> Result<BuildUsers, Error> {
    let opening = early.store?;
    let settings = match early.settings {
        Some(settings) => Some(settings),
        // Only root needs the settings here, to check the build users; otherwise they are read when
        // they are needed.
        None if machine.user.is_root() => Some(Settings::read(&ready.nix).await?),
        None => None,
    };
    ready.settings_before.clone_from(&settings);
    let group = build_group(settings.filter(|_| machine.user.is_root()));
    machine.opening = opening_of(&ready.nix, &opening, &group);
    if let Ping::Open(opened) = opening {
        ready.opened = Some(opened);
    }
    let planned = plan(machine, wanted);
    match planned {
        Plan::Repair(ref steps) => {
            sink.note(format!("plan: {}", planned.summary()));
            repair(ready, &machine.opening, steps, deadline).await
        }
        Plan::Impossible(impossible) => Err(impossible.into()),
        // A store that opens is not made anew.
        Plan::Ready | Plan::Install(_) | Plan::Rootless(_) => {
            Ok(users_of(&machine.opening, &group))
        }
    }
}

/// Opens the store, and gives what became of that as a fact.
///
/// # Errors
/// When Nix does not run, or does not print its settings.
pub(super) async fn opening(
    nix: &Nix,
    machine: &Machine,
    deadline: Instant,
) -> Result<Opening, Error> {
    let ping = ping_with_retries(nix, deadline).await?;
    let settings = if machine.user.is_root() {
        Some(Settings::read(nix).await?)
    } else {
        None
    };
    Ok(opening_of(nix, &ping, &build_group(settings)))
}

/// What opening a store that is not there yet will show, as far as it can be known without making it: whether root's builds
/// have users.
///
/// # Errors
/// When Nix does not print its settings.
pub(super) async fn foreseen(nix: &Nix, machine: &Machine) -> Result<Opening, Error> {
    if !machine.user.is_root() {
        return Ok(Opening::Untried);
    }
    let group = build_group(Some(Settings::read(nix).await?));
    let problem = match group.as_str() {
        "" => None,
        group => match members(&groups(), group) {
            None => Some(format!("the group `{group}` does not exist")),
            Some("") => Some(format!("the group `{group}` has no members")),
            Some(_) => None,
        },
    };
    Ok(match problem {
        None => Opening::Untried,
        no_build_users => Opening::Local { no_build_users },
    })
}

/// The group that builds take their users from; empty where they run as the current user on purpose. `settings` is `None`
/// for other users than root, who build as themselves.
fn build_group(settings: Option<Settings>) -> String {
    settings
        .and_then(|settings| settings.text("build-users-group"))
        .unwrap_or_default()
}

/// What became of opening the store, as a fact of the machine.
fn opening_of(nix: &Nix, ping: &Ping, group: &str) -> Opening {
    match ping {
        // Without a daemon, this process builds by itself and needs working build users.
        Ping::Open(opened) if opened.is_local() => Opening::Local {
            no_build_users: missing_build_users(opened, group),
        },
        // A daemon has settings of its own, which this process cannot repair.
        Ping::Open(_) => Opening::Remote,
        Ping::Failed(PingFailure::NoDaemon(problem)) if has_own_daemon(nix) => {
            Opening::DeadDaemon {
                socket: daemon_socket(nix),
                problem: problem.clone(),
            }
        }
        Ping::Failed(PingFailure::PermissionDenied(problem)) => Opening::Denied(problem.clone()),
        Ping::Failed(failure) => Opening::Closed(failure.text().to_owned()),
    }
}

/// Whether builds have users of their own in a store that opens.
fn users_of(opening: &Opening, group: &str) -> BuildUsers {
    match opening {
        Opening::Local { .. } if group.is_empty() => BuildUsers::None,
        _ => BuildUsers::InForce,
    }
}

/// Takes the steps that follow from the calls of Nix.
async fn repair(
    ready: &mut Ready,
    opening: &Opening,
    steps: &[RepairStep],
    deadline: Instant,
) -> Result<BuildUsers, Error> {
    let mut users = users_of(opening, "");
    for step in steps {
        match step {
            RepairStep::WithoutBuildUsers(problem) => {
                apply(ready, without_build_users(problem));
                users = BuildUsers::None;
            }
            RepairStep::StartDaemon(problem) => {
                users = restart_daemon(ready, problem, deadline).await?;
            }
            // Done before Nix was called.
            RepairStep::CompletePackages | RepairStep::MakeFolder(_) => {}
        }
    }
    Ok(users)
}

/// What a job does about a store that opens, for a canary that is to find what a job would find: Nix with the settings of
/// the repairs, and a sentence's part for each.
///
/// # Errors
/// When Nix does not print its settings.
pub async fn with_repairs(
    nix: &Nix,
    opened: &Opened,
    env: &Env,
) -> Result<(Nix, Vec<String>), tool::Error> {
    let mut machine = Machine::read(env);
    let settings = Settings::read(nix).await?;
    let group = build_group(Some(settings).filter(|_| machine.user.is_root()));
    machine.opening = opening_of(nix, &Ping::Open(opened.clone()), &group);
    let mut repaired = nix.clone();
    let mut texts = Vec::new();
    if let Plan::Repair(steps) = plan(&machine, &Wanted::default()) {
        for step in steps {
            if let RepairStep::WithoutBuildUsers(problem) = step {
                repaired = with_setting(repaired, NO_BUILD_USERS);
                texts.push(problem);
            }
        }
    }
    Ok((repaired, texts))
}

/// Opens the store, retrying failures of unknown kind. When two jobs open a new store at once, one
/// of them may fail on a link that exists already, an empty schema or a busy database.
async fn ping_with_retries(nix: &Nix, deadline: Instant) -> Result<Ping, Error> {
    for _ in 0..OPEN_ATTEMPTS {
        match ping_once(nix, deadline).await? {
            Ping::Failed(PingFailure::Other(_)) if Instant::now() < deadline => {
                sleep(OPEN_RETRY_DELAY).await;
            }
            answer => return Ok(answer),
        }
    }
    ping_once(nix, deadline).await
}

/// Opens the store once. A store that takes too long counts as having a dead daemon.
async fn ping_once(nix: &Nix, deadline: Instant) -> Result<Ping, Error> {
    let limit = PING_LIMIT.min(deadline.saturating_duration_since(Instant::now()));
    match ping(nix, limit).await {
        Err(tool::Error::Run {
            source: CaptureError::Deadline { limit, .. },
            ..
        }) => {
            let text = format!("no answer within {} s", limit.as_secs());
            Ok(Ping::Failed(PingFailure::NoDaemon(text)))
        }
        answer => Ok(answer?),
    }
}

/// Whether the store is local, so that Flywheel may start its daemon.
fn has_own_daemon(nix: &Nix) -> bool {
    let remote = nix.variable("NIX_REMOTE").unwrap_or("auto");
    matches!(remote, "auto" | "daemon") || remote.starts_with("unix://")
}

/// Why a store that is opened without a daemon has no build users. As root, Nix builds as these users and refuses to build
/// if there are none.
fn missing_build_users(opened: &Opened, group: &str) -> Option<String> {
    if group.is_empty() {
        return None;
    }
    match &opened.missing_group {
        Some(group) => Some(format!("the group `{group}` does not exist")),
        None if is_empty_group(group) => Some(format!("the group `{group}` has no members")),
        None => None,
    }
}

fn without_build_users(problem: &str) -> Repair {
    Repair {
        text: format!("{problem}, so builds run as root (`{NO_BUILD_USERS}`)"),
        setting: Some(NO_BUILD_USERS),
        variable: None,
    }
}

/// Whether the group is certainly empty: listed in `/etc/group` without members. A group from
/// another source (LDAP, say) is not judged.
fn is_empty_group(name: &str) -> bool {
    members(&groups(), name) == Some("")
}

fn groups() -> String {
    std::fs::read_to_string("/etc/group").unwrap_or_default()
}

/// The members of a group in the text of `/etc/group`.
fn members<'a>(groups: &'a str, name: &str) -> Option<&'a str> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(2).unwrap_or_default().trim())
    })
}

/// As root: starts the missing daemon, or falls back to using the store without one.
async fn restart_daemon(
    ready: &mut Ready,
    dead: &str,
    deadline: Instant,
) -> Result<BuildUsers, Error> {
    // First make sure that the store works without a daemon: starting one for a broken store is
    // pointless.
    let direct = ready.nix.clone().with_variable("NIX_REMOTE", Some("local"));
    let users = match ping_with_retries(&direct, deadline).await? {
        Ping::Open(opened) => {
            let group = build_group(Some(Settings::read(&direct).await?));
            match missing_build_users(&opened, &group) {
                Some(problem) => {
                    apply(ready, without_build_users(&problem));
                    BuildUsers::None
                }
                None if group.is_empty() => BuildUsers::None,
                None => BuildUsers::InForce,
            }
        }
        Ping::Failed(failure) => return Err(does_not_open(failure.text()).into()),
    };
    match start_daemon(&ready.nix, deadline).await {
        Ok(daemon) => {
            // `Ready` owns the daemon, so it ends with the job.
            ready.daemon = Some(daemon);
            let text = format!("the Nix daemon was dead ({dead}); one was started for this job");
            apply(
                ready,
                Repair {
                    text,
                    setting: None,
                    variable: None,
                },
            );
        }
        Err(problem) => {
            let text = format!(
                "the Nix daemon is dead ({dead}) and did not start ({problem}); the job uses the store directly"
            );
            apply(
                ready,
                Repair {
                    text,
                    setting: None,
                    variable: Some(("NIX_REMOTE", "local")),
                },
            );
        }
    }
    Ok(users)
}

/// Starts a daemon for the other users of a store that root has just installed. The job itself does not need it.
pub(super) async fn serve_others(ready: &mut Ready, sink: &Sink, deadline: Instant) {
    match start_daemon(&ready.nix, deadline).await {
        Ok(daemon) => ready.daemon = Some(daemon),
        Err(problem) => sink.degraded("nix", format!("the Nix daemon did not start: {problem}")),
    }
}

/// Starts the `nix-daemon` next to `nix`, and waits until the store opens through it.
async fn start_daemon(nix: &Nix, deadline: Instant) -> Result<Daemon, String> {
    // With `NIX_REMOTE=daemon` in its environment, the daemon would connect to itself.
    let own = nix.clone().with_variable("NIX_REMOTE", None);
    let socket = daemon_socket(nix);
    let created_socket = (!socket.exists()).then(|| socket.clone());
    let program = nix.folder().join("nix-daemon");
    let started = Service::start(&program, &["--daemon"], &own.variables());
    let mut daemon = started.map_err(|error| one_line(&error.to_string(), 200))?;
    // The socket appears before the daemon can serve, so the store is pinged through it as well.
    let limit = deadline.min(Instant::now() + START_LIMIT);
    let waited = timeout_at(limit, async {
        // A daemon that exits at once must not cost the whole limit.
        while daemon.is_alive() && UnixStream::connect(&socket).await.is_err() {
            sleep(START_POLL_INTERVAL).await;
        }
        daemon.is_alive() && matches!(ping_with_retries(nix, limit).await, Ok(Ping::Open(_)))
    });
    if waited.await == Ok(true) {
        return Ok(Daemon {
            service: daemon,
            created_socket,
        });
    }
    let output = one_line(&daemon.stop(super::DAEMON_GRACE).await, 200);
    Err(if output.is_empty() {
        "it printed nothing".to_owned()
    } else {
        output
    })
}

/// Records a repair and applies it to our own calls of Nix.
fn apply(ready: &mut Ready, repair: Repair) {
    if let Some(line) = repair.setting {
        ready.nix = with_setting(ready.nix.clone(), line);
    }
    if let Some((name, value)) = repair.variable {
        ready.nix = ready.nix.clone().with_variable(name, Some(value));
    }
    ready.repairs.push(repair);
}

/// The same Nix with one more line of settings.
fn with_setting(nix: Nix, line: &str) -> Nix {
    let config = format!("{}\n{line}\n", nix.config().trim_end());
    nix.with_config(config.trim_start())
}
