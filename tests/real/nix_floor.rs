//! The Nix floor against real Nix: what the job added, which settings are in force, what is repaired.
//! Each test runs once more inside a mount namespace with a `/nix` of its own.

mod daemon_proxy;
mod repair;
mod settings;
mod store;

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::StorePath;
use flywheel_nix::tool::Nix;
use flywheel_sys::runner::env::Env;

use crate::world::{folders, need, with_private_nix};

/// Far longer than anything here takes, on a busy machine too.
const LIMIT: Duration = Duration::from_secs(60);
/// The variables by which the test outside of the namespace starts itself again inside.
const FOLDER: &str = "FLOOR_TEST_FOLDER";
const ROLE: &str = "FLOOR_TEST_ROLE";
/// Offline, and without a sandbox, so that `/bin/sh` builds.
const CONFIG: &str = "substituters =\nsandbox = false\n";

/// A source, a dependency, an output that refers to it, and one with two outputs.
const EXPRESSION: &str = r#"
let
  build = name: script: rest: derivation ({
    inherit name; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-ec" script ];
  } // rest);
in rec {
  source = builtins.path { path = ./source; name = "source"; };
  old = build "old" "echo old > $out" { };
  dependency = build "dependency" "echo ${source} ${old} > $out" { };
  app = build "app" "echo ${dependency} > $out" { };
  pair = build "pair" "echo $dev > $out; echo dev > $dev" { outputs = [ "out" "dev" ]; };
}
"#;

/// The inside of a test: its folder, and which part it plays.
struct Inside {
    test: &'static str,
    folder: PathBuf,
    role: String,
}

/// Runs `body` in a `/nix` of its own, by running this very test again inside a namespace.
fn in_private_nix(test: &'static str, body: impl FnOnce(&Inside)) {
    if let Some(folder) = std::env::var_os(FOLDER) {
        let role = std::env::var(ROLE).unwrap_or_default();
        return body(&Inside {
            test,
            folder: folder.into(),
            role,
        });
    }
    need("nix", "apt-get install nix-bin");
    let folder = tempfile::tempdir().unwrap();
    // Another user of the same test must be able to look inside.
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    for (below, mode) in [
        ("home", 0o755),
        ("tmp", 0o1777),
        ("nobody", 0o777),
        ("conf", 0o755),
        ("work/source", 0o755),
    ] {
        std::fs::create_dir_all(folder.path().join(below)).unwrap();
        std::fs::set_permissions(
            folder.path().join(below),
            std::fs::Permissions::from_mode(mode),
        )
        .unwrap();
    }
    std::fs::write(folder.path().join("work/default.nix"), EXPRESSION).unwrap();
    std::fs::write(folder.path().join("work/source/file"), "content").unwrap();
    let exe = folder.path().join("test");
    // Another process makes the copy. If this one did, a child that another thread forks at the moment could hold
    // the copy open for writing, and a file that is open for writing cannot be run (ETXTBSY).
    let mut copy = Command::new(need("cp", "apt-get install coreutils"));
    assert!(
        copy.arg(std::env::current_exe().unwrap())
            .arg(&exe)
            .status()
            .unwrap()
            .success()
    );
    let mut command = with_private_nix(
        &folder.path().join("nix"),
        &need("timeout", "apt-get install coreutils"),
    );
    command
        .args(["-k", "5", "240"])
        .arg(&exe)
        .args(["--nocapture", "--exact", test]);
    folders::isolate(&mut command, folder.path())
        .env("PATH", std::env::var_os("PATH").unwrap())
        .env(FOLDER, folder.path());
    passed(&command.stdin(Stdio::null()).output().unwrap());
}

/// Points a program that a test starts inside its namespace to the folders of that test.
fn isolate(command: &mut Command) -> &mut Command {
    let folder = std::env::var_os(FOLDER).expect("set by `in_private_nix`");
    folders::isolate(command, Path::new(&folder))
}

fn passed(output: &Output) {
    let text = [&output.stdout[..], &output.stderr]
        .map(String::from_utf8_lossy)
        .concat();
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

impl Inside {
    /// Plays another part of this test as a user without any rights.
    fn as_nobody(&self, role: &str) {
        let setpriv = need("setpriv", "apt-get install util-linux");
        let mut command = Command::new(setpriv);
        command
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
            .arg(self.folder.join("test"));
        command
            .args(["--nocapture", "--exact", self.test])
            .env(ROLE, role);
        passed(&command.output().unwrap());
    }

    fn env(&self, more: &[(&str, &str)]) -> Env {
        let home = self.folder.join(if self.role.is_empty() {
            "home"
        } else {
            "nobody"
        });
        let (home, conf) = (
            home.display().to_string(),
            self.folder.join("conf").display().to_string(),
        );
        let path = std::env::var("PATH").unwrap();
        let temporary = self.folder.join("tmp").display().to_string();
        let own = [
            ("PATH", path.as_str()),
            ("HOME", &home),
            ("TMPDIR", &temporary),
            ("NIX_CONF_DIR", &conf),
            ("NIX_CONFIG", CONFIG),
        ];
        Env::from_pairs(own.into_iter().chain(more.iter().copied()))
    }

    async fn nix(&self, more: &[(&str, &str)]) -> Nix {
        Nix::detect(&need("nix", "apt-get install nix-bin"), &self.env(more))
            .await
            .unwrap()
    }

    /// The settings of the machine, which a daemon has too.
    fn system_settings(&self, text: &str) {
        std::fs::write(self.folder.join("conf/nix.conf"), text).unwrap();
    }

    /// `nix-build` of attributes, as a user's command would; the out paths.
    fn build(&self, nix: &Nix, attributes: &[&str]) -> Vec<StorePath> {
        let work = self.folder.join("work").display().to_string();
        let mut arguments = vec!["--no-out-link", &work];
        arguments.extend(attributes.iter().flat_map(|attribute| ["-A", *attribute]));
        printed(nix, "nix-build", &arguments)
            .lines()
            .map(|line| line.parse().unwrap())
            .collect()
    }

    fn private(&self, name: &str) -> PathBuf {
        let folder = self
            .folder
            .join(if self.role.is_empty() {
                "home"
            } else {
                "nobody"
            })
            .join(name);
        std::fs::create_dir(&folder).unwrap();
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o700)).unwrap();
        folder
    }
}

/// A daemon started by hand, as a machine's owner would; killed when dropped.
struct Daemon(Child);

impl Daemon {
    fn start(nix: &Nix, socket: &Path) -> Self {
        let mut variables = nix.variables();
        variables.remove("NIX_REMOTE");
        variables.insert("NIX_DAEMON_SOCKET_PATH".to_owned(), socket.into());
        let mut command = Command::new(nix.folder().join("nix-daemon"));
        isolate(&mut command)
            .envs(variables)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let daemon = Self(command.spawn().unwrap());
        until(|| UnixStream::connect(socket).is_ok());
        daemon
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

const SOCKET: &str = "/nix/var/nix/daemon-socket/socket";
const SHARED_MEMORY: &str = "/nix/var/nix/db/db.sqlite-shm";

fn until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "it did not happen in time");
        std::thread::yield_now();
    }
}

fn wait_for<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}

/// What a tool beside `nix` prints; it must succeed.
fn printed(nix: &Nix, tool: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(nix.folder().join(tool));
    let output = isolate(&mut command)
        .args(arguments)
        .envs(nix.variables())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{tool} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn names(infos: &[PathInfo]) -> Vec<&str> {
    let mut names: Vec<&str> = infos.iter().map(|info| info.path.name()).collect();
    names.sort_unstable();
    names
}
