//! `setup` through the front door, and its action.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_norway::Value;

use crate::world::port::Port;
use crate::world::{Flywheel, PLANTED_TOKEN, Ran, binary, folders};

const KEY: &str = "main:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=";

/// A socket that accepts connections into its backlog, and its address without a scheme.
fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

fn setup() -> Flywheel {
    Flywheel::in_job(&["setup"]).env("ATTIC_TOKEN", PLANTED_TOKEN)
}

/// A runner's file of `name<<delimiter` entries.
pub fn entries(text: &str) -> BTreeMap<String, String> {
    let mut lines = text.lines();
    let mut entries = BTreeMap::new();
    while let Some(line) = lines.next() {
        let (name, delimiter) = line.split_once("<<").unwrap();
        let value: Vec<&str> = lines
            .by_ref()
            .take_while(|line| *line != delimiter)
            .collect();
        entries.insert(name.to_owned(), value.join("\n"));
    }
    entries
}

fn exported(run: &Flywheel) -> (BTreeMap<String, String>, Ran) {
    let ran = run.run();
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    (entries(&run.read("GITHUB_ENV")), ran)
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

#[test]
fn what_is_valid_and_answers_is_exported() {
    let (_attic, attic) = listener();
    let (_bazel, bazel) = listener();
    let (server, cache) = (format!("http://{attic}"), format!("grpc://{bazel}"));
    let run = setup()
        .env("ATTIC_SERVER", &server)
        .env("ATTIC_CACHE", "team")
        .env("ATTIC_PUBLIC_KEY", KEY)
        .env("BAZEL_REMOTE_CACHE", &cache);
    let expected = map(&[
        ("ATTIC_SERVER", &server),
        ("ATTIC_CACHE", "team"),
        ("ATTIC_PUBLIC_KEY", KEY),
        ("BAZEL_REMOTE_CACHE", &cache),
        ("GF_BAZEL_SUBSTRATE_MODE", "shared-cache-backed"),
    ]);
    let (exports, ran) = exported(&run);
    assert_eq!(exports, expected);
    assert!(!ran.stdout.contains("::warning"), "{}", ran.stdout);
}

#[test]
fn an_input_goes_before_the_hint() {
    let (_attic, attic) = listener();
    let server = format!("http://{attic}/attic/");
    let run = setup()
        .env("ATTIC_SERVER", "http://hint.invalid/")
        .env("ATTIC_CACHE", "hint")
        .env("FLYWHEEL_ATTIC_SERVER", &server)
        .env("FLYWHEEL_ATTIC_CACHE", "input")
        .env("FLYWHEEL_ATTIC_PUBLIC_KEY", "");
    let mode = ("GF_BAZEL_SUBSTRATE_MODE", "compatibility-local-only");
    assert_eq!(
        exported(&run).0,
        map(&[("ATTIC_SERVER", &server), ("ATTIC_CACHE", "input"), mode])
    );
}

#[test]
fn the_mode_is_what_answers_and_not_what_is_said() {
    let (_bazel, bazel) = listener();
    let (_executor, executor) = listener();
    let mode = |run: Flywheel| exported(&run).0["GF_BAZEL_SUBSTRATE_MODE"].clone();
    let cache = format!("grpc://{bazel}");
    let with_cache = || setup().env("FLYWHEEL_BAZEL_REMOTE_CACHE", &cache);
    let executor = format!("grpc://{executor}");
    assert_eq!(
        mode(with_cache().env("BAZEL_REMOTE_EXECUTOR", &executor)),
        "executor-backed"
    );
    let closed = Port::reserve();
    assert_eq!(
        mode(with_cache().env(
            "BAZEL_REMOTE_EXECUTOR",
            &format!("grpc://{}", closed.address())
        )),
        "shared-cache-backed"
    );
    assert_eq!(
        mode(setup().env("BAZEL_REMOTE_EXECUTOR", &executor)),
        "compatibility-local-only"
    );
    assert_eq!(
        mode(setup().env("GF_BAZEL_SUBSTRATE_MODE", "executor-backed")),
        "compatibility-local-only"
    );
}

#[test]
fn what_does_not_answer_is_left_out_soon_and_told() {
    let closed = Port::reserve();
    let server = format!("http://{}/", closed.address());
    // An address that no host has (RFC 5737): packets are dropped, or the network refuses at once. Neither is an answer.
    let run = setup()
        .env("ATTIC_SERVER", &server)
        .env("BAZEL_REMOTE_CACHE", "grpc://192.0.2.1:9092");
    let begun = Instant::now();
    let (exports, ran) = exported(&run);
    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(
        exports,
        map(&[("GF_BAZEL_SUBSTRATE_MODE", "compatibility-local-only")])
    );
    for named in [
        format!("`ATTIC_SERVER` is not exported: `{server}`"),
        "`BAZEL_REMOTE_CACHE` is not exported".into(),
    ] {
        assert!(ran.stdout.contains(&named), "{}", ran.stdout);
    }
}

#[test]
fn a_malformed_hint_is_a_warning_that_names_it() {
    for (name, value) in [
        ("ATTIC_SERVER", "cache.example"),
        ("ATTIC_SERVER", "https://user:sesame-3141@cache.example/"),
        ("ATTIC_SERVER", "http://x/\n::error::sesame-3141"),
        ("ATTIC_CACHE", "a/b"),
        ("ATTIC_PUBLIC_KEY", "main:sesame-3141"),
        ("BAZEL_REMOTE_CACHE", "grpc://${BAZEL_HOST}:9092"),
        ("BAZEL_REMOTE_EXECUTOR", "ftp://x/"),
        ("GF_BAZEL_SUBSTRATE_MODE", "turbo"),
    ] {
        let (exports, ran) = exported(&setup().env(name, value));
        assert_eq!(
            exports,
            map(&[("GF_BAZEL_SUBSTRATE_MODE", "compatibility-local-only")]),
            "{name}"
        );
        let warned = format!("::warning title=flywheel::the runner's hint `{name}` is not used");
        assert!(ran.stdout.contains(&warned), "{}", ran.stdout);
        assert!(!ran.stdout.contains("sesame"), "{}", ran.stdout);
    }
}

/// Its server answers, but a path that goes into the cache `main` there would go into somebody else's.
#[test]
fn a_malformed_hint_for_the_caches_name_exports_no_cache() {
    let (_attic, attic) = listener();
    let server = format!("http://{attic}/attic/");
    let run = setup()
        .env("ATTIC_SERVER", &server)
        .env("ATTIC_CACHE", "no/such");
    let (exports, ran) = exported(&run);
    let mode = ("GF_BAZEL_SUBSTRATE_MODE", "compatibility-local-only");
    assert_eq!(exports, map(&[mode]), "{}", ran.stdout);
    assert!(ran.stdout.contains("so no cache is used"), "{}", ran.stdout);
    let named = run.env("FLYWHEEL_ATTIC_CACHE", "team");
    assert_eq!(exported(&named).0["ATTIC_CACHE"], "team");
}

/// The runner's files as a pipe, a device, a folder, a link to a pipe, and one of ten gigabytes.
#[test]
fn files_of_the_runner_that_are_none_are_refused_at_once() {
    let (_attic, attic) = listener();
    for kind in ["pipe", "device", "folder", "link", "large"] {
        let run = setup().env("ATTIC_SERVER", &format!("http://{attic}/"));
        let file = run.path("foreign");
        let pipe = |file: &std::path::Path| {
            rustix::fs::mkfifoat(rustix::fs::CWD, file, rustix::fs::Mode::from(0o600)).unwrap();
        };
        let said = match kind {
            "pipe" => {
                pipe(&file);
                "is a named pipe"
            }
            "device" => {
                std::os::unix::fs::symlink("/dev/full", &file).unwrap();
                "is a device"
            }
            "folder" => {
                std::fs::create_dir(&file).unwrap();
                "is a folder"
            }
            "link" => {
                pipe(&run.path("pipe"));
                std::os::unix::fs::symlink(run.path("pipe"), &file).unwrap();
                "is a named pipe"
            }
            _ => {
                let large = std::fs::File::create(&file).unwrap();
                large.set_len(10_000_000_000).unwrap();
                "is larger than"
            }
        };
        let run = run.env("GITHUB_ENV", file.to_str().unwrap());
        let began = std::time::Instant::now();
        let output = run.command().output().unwrap();
        assert!(
            began.elapsed().as_secs() < 5,
            "{kind}: {:?}",
            began.elapsed()
        );
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains(said), "{kind}: {text}");
        // What the planted secret is looked for in must not be read to its end.
        std::fs::remove_file(&file)
            .or_else(|_| std::fs::remove_dir(&file))
            .unwrap();
    }
}

#[test]
fn a_malformed_input_is_64_and_touches_nothing() {
    for (input, value) in [
        ("attic-server", "cache.example"),
        ("attic-cache", "a/b"),
        ("attic-public-key", "main"),
        ("bazel-remote-cache", "unix:/run/x"),
        ("push-cache", "yes"),
        ("trusted-refs", "main"),
    ] {
        let run = setup().env(
            &format!("FLYWHEEL_{}", input.replace('-', "_").to_uppercase()),
            value,
        );
        let ran = run.run();
        assert_eq!(ran.code, 64, "{input}");
        assert!(
            ran.stdout.contains(&format!("input `{input}`")),
            "{}",
            ran.stdout
        );
        for file in ["GITHUB_ENV", "GITHUB_PATH", "GITHUB_OUTPUT"] {
            assert_eq!(run.read(file), "", "{input}: {file}");
        }
    }
}

#[test]
fn the_actions_own_folder_goes_on_path() {
    let run = setup();
    let dist = run.path("action").join("dist");
    std::fs::create_dir_all(&dist).unwrap();
    std::fs::write(dist.join("flywheel"), "#!/bin/sh\n").unwrap();
    let action = run.path("action").to_str().unwrap().to_owned();
    let run = run.env("GITHUB_ACTION_PATH", &action);
    assert_eq!(run.run().code, 0);
    assert_eq!(run.read("GITHUB_PATH"), format!("{}\n", dist.display()));
}

#[test]
fn without_an_actions_folder_the_programs_own_is_taken() {
    let run = setup();
    assert_eq!(run.run().code, 0);
    let program = binary();
    let own = program.parent().unwrap();
    assert_eq!(run.read("GITHUB_PATH"), format!("{}\n", own.display()));
}

#[test]
fn outputs_tell_the_gates_answer() {
    let run = crate::explain::job_of_a_push(&["setup"]);
    assert_eq!(run.run().code, 0);
    let expected = map(&[
        ("trust", "may-publish"),
        ("publishes", "true"),
        ("reason", "`push` on the default branch `main`"),
        ("attic", "all"),
        ("flakehub", "rolling"),
        ("version", env!("CARGO_PKG_VERSION")),
    ]);
    assert_eq!(entries(&run.read("GITHUB_OUTPUT")), expected);
}

#[test]
fn a_laptop_gets_lines_for_its_shell() {
    let (_attic, attic) = listener();
    let server = format!("http://{attic}/it's;$(x)");
    let run = Flywheel::new(&[
        "setup",
        "--attic-server",
        &server,
        "--attic-public-key",
        KEY,
    ]);
    let run = run.env("ATTIC_TOKEN", PLANTED_TOKEN);
    let ran = run.run();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let script = format!(
        "{}\nprintf '%s\\n' \"$ATTIC_SERVER\" \"$ATTIC_CACHE\" \"$ATTIC_PUBLIC_KEY\"",
        ran.stdout
    );
    let mut shell = std::process::Command::new("/bin/sh");
    let shell = folders::isolate(&mut shell, run.folder.path())
        .args(["-eu", "-c", &script])
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&shell.stdout),
        format!("{server}\nmain\n{KEY}\n")
    );
}

#[test]
fn the_action_maps_each_input_to_its_variable_and_does_nothing_else() {
    let text =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("action.yml")).unwrap();
    let action: Value = serde_norway::from_str(&text).unwrap();
    let steps = action["runs"]["steps"].as_sequence().unwrap();
    assert_eq!(steps.len(), 1);
    assert_eq!(
        steps[0]["run"].as_str().unwrap(),
        "exec \"$GITHUB_ACTION_PATH/dist/flywheel\" setup"
    );
    let mapped: BTreeMap<&str, &str> = steps[0]["env"]
        .as_mapping()
        .unwrap()
        .iter()
        .map(|(name, value)| (name.as_str().unwrap(), value.as_str().unwrap()))
        .collect();
    let inputs: Vec<&str> = action["inputs"]
        .as_mapping()
        .unwrap()
        .keys()
        .map(|name| name.as_str().unwrap())
        .collect();
    let help = Flywheel::new(&["setup", "--help"]).run().stdout;
    // The help is wrapped to the width of a terminal.
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(mapped.len(), inputs.len());
    for input in inputs {
        let variable = format!("FLYWHEEL_{}", input.replace('-', "_").to_uppercase());
        assert_eq!(
            mapped[variable.as_str()],
            format!("${{{{ inputs.{input} }}}}")
        );
        assert!(
            help.contains(&format!("--{input} ")) && help.contains(&format!("[env: {variable}]")),
            "{input}"
        );
    }
    let outputs = setup();
    assert_eq!(outputs.run().code, 0);
    let set: Vec<String> = entries(&outputs.read("GITHUB_OUTPUT"))
        .into_keys()
        .collect();
    let mut declared: Vec<&str> = action["outputs"]
        .as_mapping()
        .unwrap()
        .keys()
        .map(|name| name.as_str().unwrap())
        .collect();
    declared.sort_unstable();
    assert_eq!(set, declared);
}

#[test]
fn the_plan_names_a_nix_that_nixpkgs_refuses() {
    for (version, is_old) in [("2.8.0", true), ("2.34.8", false)] {
        let run = Flywheel::new(&["setup", "--plan"]);
        let bin = run.path("bin");
        std::fs::create_dir(&bin).unwrap();
        let nix = bin.join("nix");
        std::fs::write(&nix, format!("#!/bin/sh\necho 'nix (Nix) {version}'\n")).unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&nix, executable).unwrap();
        let run = run.env("PATH", &format!("{}:/usr/bin:/bin", bin.display()));
        let printed = run.run().stdout;
        let line = printed
            .lines()
            .find(|line| line.starts_with("Nix version "));
        let line = line.unwrap_or_else(|| panic!("{printed}"));
        assert!(line.contains(version), "{line}");
        assert_eq!(line.contains("older than 2.18"), is_old, "{line}");
    }
}

/// A run with a `nix` of its own, whose store opens by this script.
fn with_nix(arguments: &[&str], ping: &str) -> Flywheel {
    let run = Flywheel::in_job(arguments);
    let nix = run.path("nix");
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in\n--version) echo 'nix (Nix) 2.31.2';;\n*--json) echo '{{}}';;\n*) {ping};;\nesac\n"
    );
    std::fs::write(&nix, script).unwrap();
    std::fs::set_permissions(&nix, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/bin:/bin", nix.parent().unwrap().display());
    // Another store than the machine's own.
    run.env("PATH", &path)
        .env("NIX_REMOTE", "unix:///nonexistent")
}

#[test]
fn the_plan_is_that_of_a_job_and_nothing_is_set_up() {
    let run = with_nix(
        &["setup", "--plan"],
        "echo 'Store URL: unix:///nonexistent'",
    );
    let ran = run.run();
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    let row = |name: &str| {
        let mut lines = ran.stdout.lines();
        let found = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix("  "));
        found
            .map(str::trim)
            .unwrap_or_else(|| panic!("no row `{name}`:\n{}", ran.stdout))
    };
    assert!(row("plan").starts_with("ready"), "{}", ran.stdout);
    assert_eq!(row("Nix version"), "nix (Nix) 2.31.2");
    assert!(row("Nix").contains("on `PATH`"), "{}", ran.stdout);
    for name in [
        "user",
        "sudo",
        "/nix",
        "daemon",
        "build users",
        "user namespaces",
        "container",
        "disk",
    ] {
        assert!(!row(name).is_empty());
    }
    assert!(run.read("GITHUB_ENV").is_empty() && run.read("GITHUB_PATH").is_empty());
}

#[test]
fn a_plan_that_is_impossible_names_obstacle_and_remedy() {
    let closed = "echo 'error: database disk image is malformed' >&2; exit 1";
    let ran = with_nix(&["setup", "--plan"], closed).run();
    assert_eq!(ran.code, 69, "{}{}", ran.stdout, ran.stderr);
    for part in ["impossible", "disk image is malformed", "remedy"] {
        assert!(ran.stdout.contains(part), "{part} in {}", ran.stdout);
    }
}

#[test]
fn a_wrong_wish_for_nix_is_64_in_every_verb_that_has_one() {
    for verb in ["setup", "nix-job", "flake-checks", "validate-builders"] {
        for (name, value) in [
            ("FLYWHEEL_NIX_INSTALLER", "curl"),
            ("FLYWHEEL_NIX_VERSION", "latest"),
            ("FLYWHEEL_NIX_SOURCE", "https://cache.example/"),
            ("FLYWHEEL_NIX_MIRROR", "relative"),
        ] {
            let run = Flywheel::in_job(&[verb])
                .env("FLYWHEEL_COMMAND", "true")
                .env(name, value);
            let ran = run.run();
            let input = name
                .trim_start_matches("FLYWHEEL_")
                .to_lowercase()
                .replace('_', "-");
            assert_eq!(ran.code, 64, "{verb} {name}: {}{}", ran.stdout, ran.stderr);
            assert!(ran.stdout.contains(&input), "{verb} {name}: {}", ran.stdout);
        }
    }
}

#[test]
fn a_plan_and_its_undoing_at_once_are_an_input_error() {
    let ran = Flywheel::new(&["setup", "--plan", "--undo"])
        .env("FLYWHEEL_NIX_INSTALLER", "none")
        .run();
    assert_eq!(ran.code, 64, "{}{}", ran.stdout, ran.stderr);
    let said = format!("{}{}", ran.stdout, ran.stderr);
    assert!(said.contains("`--undo` cannot go with `--plan`"), "{said}");
    assert!(said.contains("help: Leave one of the two out."), "{said}");
    assert!(!said.contains("--nix-installer"), "{said}");
}
