//! The proxy in front of the daemon, with real clients of an ordinary user: what they name is known, and no end of a
//! process, of the proxy or of the job, costs more than the command that was connected.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use flywheel_core::progress::{Progress, Sink};
use flywheel_nix::daemon_proxy::{DaemonProxy, ProxyError};
use flywheel_nix::tool::Nix;
use rustix::process::{Pid, Signal, kill_process};

use super::{
    FOLDER, Inside, LIMIT, ROLE, SOCKET, UnixStream, in_private_nix, isolate, need, passed,
    printed, until, wait_for,
};
use crate::world::{binary, processes};

/// An ordinary user, and another one.
const USER: &str = "65534";
const STRANGER: &str = "65533";
/// A derivation with a source, a text and a name of its own, as twelve quick builds have.
const QUICK: &str = r#"{ n }: derivation {
  name = "quick-${n}"; system = builtins.currentSystem; builder = "/bin/sh";
  source = builtins.path { path = ./source; name = "source-${n}"; };
  text = builtins.toFile "text-${n}" n;
  args = [ "-ec" "echo $source $text > $out" ];
}"#;
/// A build that lasts until a file is there.
const SLOW: &str = r#"{ folder, n }: derivation {
  name = "slow-${n}"; system = builtins.currentSystem; builder = "/bin/sh";
  args = [ "-ec" "echo > ${folder}/begun; until [ -e ${folder}/go ]; do /bin/sleep 0.01; done; echo slow > $out" ];
}"#;

/// A daemon of root's, started in one of the two ways that people start it.
struct RootDaemon(Child);

impl RootDaemon {
    fn start(nix: &Nix, arguments: &[&str]) -> Self {
        let mut command = Command::new(nix.folder().join("nix-daemon"));
        let daemon = isolate(&mut command)
            .args(arguments)
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env(
                "NIX_CONFIG",
                "substituters =\nsandbox = false\nbuild-users-group =\n",
            )
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let daemon = Self(daemon.unwrap());
        until(|| UnixStream::connect(SOCKET).is_ok());
        daemon
    }
}

impl Drop for RootDaemon {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Inside {
    /// Another part of this test, to be run as a user without any rights.
    fn part(&self, user: &str, role: &str) -> Command {
        let mut command = Command::new(need("setpriv", "apt-get install util-linux"));
        command
            .args(["--reuid", user, "--regid", user, "--clear-groups"])
            .arg(self.folder.join("test"))
            .args(["--nocapture", "--exact", self.test])
            .env(ROLE, role);
        command
    }

    /// Runs the parts that need a daemon, once for each way to start one.
    async fn with_daemons(&self, mut body: impl AsyncFnMut(&Nix)) {
        copy_binary(&self.folder);
        std::fs::write(self.folder.join("work/quick.nix"), QUICK).unwrap();
        std::fs::write(self.folder.join("work/slow.nix"), SLOW).unwrap();
        let nix = self.nix(&[]).await;
        printed(&nix, "nix-store", &["--init"]);
        for arguments in [&["--daemon"][..], &[]] {
            let daemon = RootDaemon::start(&nix, arguments);
            body(&nix).await;
            drop(daemon);
            let private = self.folder.join("nobody/proxy");
            std::fs::remove_dir_all(private).unwrap();
        }
    }

    /// A proxy of this user's, and the warnings about it.
    fn proxy(&self) -> (DaemonProxy, Arc<Mutex<Vec<String>>>) {
        let warnings = Arc::<Mutex<Vec<String>>>::default();
        let received = Arc::clone(&warnings);
        let sink = Sink::new(move |event| {
            if let Progress::Degraded { text, .. } = event {
                received.lock().unwrap().push(text);
            }
        });
        let env = self.env(&[("RUNNER_TRACKING_ID", "kept"), ("ATTIC_TOKEN", "secret")]);
        let folder = self.private("proxy");
        let proxy = DaemonProxy::prepare(Path::new(SOCKET), &folder, &env, sink).unwrap();
        (proxy.with_program(self.folder.join("flywheel")), warnings)
    }

    /// A command of the job's, in the folder with the expressions.
    fn client(&self, link: &Path, tool: &str, arguments: &[&str]) -> Command {
        let folder = need("nix", "apt-get install nix-bin").with_file_name(tool);
        let mut command = Command::new(folder);
        isolate(&mut command)
            .args(arguments)
            .env("HOME", self.folder.join("nobody"))
            .env("NIX_CONFIG", "substituters =\nsandbox = false\n")
            .env("NIX_REMOTE", "daemon")
            .env("NIX_DAEMON_SOCKET_PATH", link)
            .current_dir(self.folder.join("work"))
            .stdin(Stdio::null());
        command
    }

    fn quick(&self, link: &Path, n: &str) -> Output {
        let arguments = ["--no-out-link", "quick.nix", "--argstr", "n", n];
        self.client(link, "nix-build", &arguments).output().unwrap()
    }

    /// Starts the build that lasts until `end_slow`.
    fn begin_slow(&self, link: &Path) -> Child {
        let folder = self.folder.join("nobody");
        for file in ["begun", "go"] {
            let _ = std::fs::remove_file(folder.join(file));
        }
        let folder = folder.display().to_string();
        // Another one each time, as one that was built would not be built again.
        let n = std::process::id().to_string();
        let arguments = ["--no-out-link", "slow.nix", "--argstr", "folder", &folder];
        let mut command = self.client(link, "nix-build", &arguments);
        command.args(["--argstr", "n", &n]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        until(|| self.folder.join("nobody/begun").exists());
        child.unwrap()
    }

    fn end_slow(&self) {
        std::fs::write(self.folder.join("nobody/go"), "").unwrap();
    }
}

/// The proxy's process has to be run by a user who cannot look into the folder of the build.
fn copy_binary(folder: &Path) {
    let mut copy = Command::new(need("cp", "apt-get install coreutils"));
    copy.arg(binary()).arg(folder.join("flywheel"));
    assert!(copy.status().unwrap().success());
}

fn succeeded(output: &Output) {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn kill(process: u32) {
    let pid = Pid::from_raw(i32::try_from(process).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

/// Waits, and lets the tasks of this thread's runtime go on.
async fn until_async(condition: impl Fn() -> bool) {
    let waited = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(LIMIT, waited).await.expect("in time");
}

fn valid_paths(nix: &Nix) -> BTreeSet<String> {
    let dump = printed(nix, "nix-store", &["--dump-db"]);
    let paths = dump.lines().filter(|line| line.starts_with("/nix/store/"));
    paths.map(str::to_owned).collect()
}

#[test]
fn everything_that_the_jobs_clients_name_passes_the_proxy() {
    in_private_nix(
        "nix_floor::daemon_proxy::everything_that_the_jobs_clients_name_passes_the_proxy",
        |inside| wait_for(names(inside)),
    );
}

async fn names(inside: &Inside) {
    if !inside.role.is_empty() {
        return name_all(inside).await;
    }
    let mut round = 0;
    inside
        .with_daemons(async |nix| {
            round += 1;
            let before = valid_paths(nix);
            passed(
                &inside
                    .part(USER, &format!("round-{round}"))
                    .output()
                    .unwrap(),
            );
            let named = std::fs::read_to_string(inside.folder.join("nobody/named")).unwrap();
            let named: BTreeSet<&str> = named.lines().collect();
            let rows: BTreeSet<String> = valid_paths(nix).difference(&before).cloned().collect();
            // Twelve builds of a source, a text, a derivation and an output; a file; a derivation with its inputs.
            assert_eq!(rows.len(), 12 * 4 + 1 + 3, "{rows:?}");
            let missed: Vec<&String> = rows
                .iter()
                .filter(|row| !named.contains(row.as_str()))
                .collect();
            assert!(missed.is_empty(), "{missed:?}");
        })
        .await;
}

async fn name_all(inside: &Inside) {
    let (mut proxy, warnings) = inside.proxy();
    let link = proxy.link().to_owned();
    assert!(!proxy.is_complete() && !proxy.flush().await);
    proxy.activate().await.unwrap();
    check_process(&proxy, &inside.folder);
    for n in 0..12 {
        succeeded(&inside.quick(&link, &format!("{}-{n}", inside.role)));
    }
    let file = inside.folder.join("nobody/added");
    std::fs::write(&file, &inside.role).unwrap();
    let file = file.display().to_string();
    let added = inside
        .client(&link, "nix-store", &["--add", &file])
        .output()
        .unwrap();
    succeeded(&added);
    let n = format!("{}-drv", inside.role);
    let arguments = ["quick.nix", "--argstr", "n", &n];
    succeeded(
        &inside
            .client(&link, "nix-instantiate", &arguments)
            .output()
            .unwrap(),
    );

    assert!(proxy.flush().await && proxy.is_complete());
    let path = String::from_utf8(added.stdout).unwrap();
    assert!(proxy.has_named(&path.trim().parse().unwrap()));
    let named: Vec<String> = proxy.named().iter().map(ToString::to_string).collect();
    std::fs::write(inside.folder.join("nobody/named"), named.join("\n")).unwrap();

    let process = proxy.process().unwrap();
    proxy.stop().await;
    assert!(proxy.is_complete(), "{:?}", warnings.lock().unwrap());
    assert!(warnings.lock().unwrap().is_empty(), "{warnings:?}");
    assert!(!runs(process), "it has ended");
    assert_eq!(std::fs::read_link(&link).unwrap(), Path::new(SOCKET));
    succeeded(&inside.quick(&link, &format!("{}-0", inside.role)));
}

fn runs(process: u32) -> bool {
    std::fs::read(format!("/proc/{process}/cmdline")).is_ok_and(|line| !line.is_empty())
}

/// The process keeps the runner's mark and no token, and its socket is this user's alone.
fn check_process(proxy: &DaemonProxy, folder: &Path) {
    let process = proxy.process().unwrap();
    let environment = std::fs::read_to_string(format!("/proc/{process}/environ")).unwrap();
    let names: Vec<&str> = environment
        .split('\0')
        .filter_map(|pair| Some(pair.split_once('=')?.0))
        .filter(|name| !["PWD", "OLDPWD"].contains(name))
        .collect();
    assert_eq!(names, ["RUNNER_TRACKING_ID"]);
    let socket = proxy_socket(&folder.join("nobody/proxy"));
    let mode = std::fs::metadata(socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

/// The socket that the link leads to.
fn proxy_socket(folder: &Path) -> PathBuf {
    std::fs::read_link(folder.join("nix-daemon")).unwrap()
}

#[test]
fn a_killed_proxy_costs_the_connected_command_and_no_other() {
    in_private_nix(
        "nix_floor::daemon_proxy::a_killed_proxy_costs_the_connected_command_and_no_other",
        |inside| {
            wait_for(async {
                if !inside.role.is_empty() {
                    return kill_proxies(inside).await;
                }
                inside
                    .with_daemons(async |_| {
                        passed(&inside.part(USER, "kills").output().unwrap());
                    })
                    .await;
            });
        },
    );
}

async fn kill_proxies(inside: &Inside) {
    // Before, in and after a build; the next command comes at once, too soon for the link to be back.
    for (n, moment) in ["before", "in", "after"].into_iter().enumerate() {
        let (mut proxy, warnings) = inside.proxy();
        let link = proxy.link().to_owned();
        proxy.activate().await.unwrap();
        let through = proxy_socket(&inside.folder.join("nobody/proxy"));
        assert_ne!(through, Path::new(SOCKET));
        if moment == "after" {
            succeeded(&inside.quick(&link, &format!("{moment}-first")));
        }
        let slow = (moment == "in").then(|| inside.begin_slow(&link));
        kill(proxy.process().unwrap());
        succeeded(&inside.quick(&link, &format!("{moment}-{n}")));
        if let Some(mut slow) = slow {
            let ended = processes::ended(&mut slow, LIMIT).unwrap();
            assert!(!ended.success(), "its connection is gone");
        }
        until_async(|| !warnings.lock().unwrap().is_empty()).await;
        assert_eq!(std::fs::read_link(&link).unwrap(), Path::new(SOCKET));
        // A client that had followed the link before is served by the process that watched the proxy.
        succeeded(&inside.quick(&through, &format!("{moment}-late")));
        assert!(!proxy.is_complete() && !proxy.flush().await);
        assert!(matches!(proxy.activate().await, Err(ProxyError::Ended)));
        assert_eq!(warnings.lock().unwrap().len(), 1, "{warnings:?}");
        proxy.stop().await;
        std::fs::remove_dir_all(inside.folder.join("nobody/proxy")).unwrap();
    }
    // The daemon stops a build whose client is gone, behind the proxy, too.
    let (mut proxy, _) = inside.proxy();
    proxy.activate().await.unwrap();
    let mut slow = inside.begin_slow(proxy.link());
    slow.kill().unwrap();
    slow.wait().unwrap();
    until_async(|| builders().is_empty()).await;
    proxy.stop().await;
}

#[test]
fn a_proxy_that_hangs_holds_no_command_up_for_ever() {
    in_private_nix(
        "nix_floor::daemon_proxy::a_proxy_that_hangs_holds_no_command_up_for_ever",
        |inside| {
            wait_for(async {
                if !inside.role.is_empty() {
                    return hang_proxy(inside).await;
                }
                let mut is_first = true;
                inside
                    .with_daemons(async |_| {
                        // It takes half a minute, and does not depend on the daemon.
                        if std::mem::take(&mut is_first) {
                            passed(&inside.part(USER, "hangs").output().unwrap());
                        } else {
                            std::fs::create_dir(inside.folder.join("nobody/proxy")).unwrap();
                        }
                    })
                    .await;
            });
        },
    );
}

async fn hang_proxy(inside: &Inside) {
    let (mut proxy, warnings) = inside.proxy();
    let link = proxy.link().to_owned();
    proxy.activate().await.unwrap();
    let process = proxy.process().unwrap();
    processes::signal(i32::try_from(process).unwrap(), Signal::STOP);
    // It waits in the socket of the proxy, until this process finds that the proxy does not take it.
    succeeded(&inside.quick(&link, "waits"));
    assert!(!proxy.is_complete());
    until_async(|| !warnings.lock().unwrap().is_empty()).await;
    assert!(
        warnings.lock().unwrap()[0].contains("hangs"),
        "{warnings:?}"
    );
    assert_eq!(std::fs::read_link(&link).unwrap(), Path::new(SOCKET));
    kill(process);
}

/// The processes that wait for the end of the slow build.
fn builders() -> Vec<PathBuf> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.retain(|path| {
        let line = std::fs::read_to_string(path.join("cmdline")).unwrap_or_default();
        line.contains("until [ -e") && line.starts_with("/bin/sh")
    });
    paths
}

#[test]
fn a_job_that_is_killed_leaves_a_way_to_the_daemon() {
    in_private_nix(
        "nix_floor::daemon_proxy::a_job_that_is_killed_leaves_a_way_to_the_daemon",
        |inside| {
            wait_for(async {
                match inside.role.as_str() {
                    "" => {}
                    "job" => return hold(inside).await,
                    _ => return kill_job(inside).await,
                }
                inside
                    .with_daemons(async |_| {
                        passed(&inside.part(USER, "kills").output().unwrap());
                    })
                    .await;
            });
        },
    );
}

/// The job: activates a proxy, says so, and waits until it is killed.
async fn hold(inside: &Inside) {
    let (mut proxy, _) = inside.proxy();
    proxy.activate().await.unwrap();
    let process = proxy.process().unwrap().to_string();
    let ready = inside.folder.join("nobody/ready");
    std::fs::write(ready.with_extension("new"), process).unwrap();
    std::fs::rename(ready.with_extension("new"), &ready).unwrap();
    tokio::time::sleep(LIMIT).await;
}

async fn kill_job(inside: &Inside) {
    let ready = inside.folder.join("nobody/ready");
    let _ = std::fs::remove_file(&ready);
    let mut job = Command::new(inside.folder.join("test"));
    let mut job = isolate(&mut job)
        .args(["--nocapture", "--exact", inside.test])
        .env(ROLE, "job")
        .env(FOLDER, &inside.folder)
        .env("PATH", std::env::var_os("PATH").unwrap())
        .spawn()
        .unwrap();
    until(|| ready.exists());
    let process: u32 = std::fs::read_to_string(&ready).unwrap().parse().unwrap();
    let folder = inside.folder.join("nobody/proxy");
    let (link, socket) = (folder.join("nix-daemon"), proxy_socket(&folder));
    assert_ne!(socket, Path::new(SOCKET));
    let mut slow = inside.begin_slow(&link);
    job.kill().unwrap();
    job.wait().unwrap();
    // At once, and again when the link is back.
    succeeded(&inside.quick(&link, "at-once"));
    until_async(|| std::fs::read_link(&link).unwrap() == Path::new(SOCKET)).await;
    succeeded(&inside.quick(&link, "later"));
    assert!(runs(process), "its client is still building");
    inside.end_slow();
    let ended = processes::ended(&mut slow, LIMIT).unwrap();
    assert!(ended.success(), "the build goes on to its end");
    until_async(|| !runs(process) && !socket.exists()).await;
}

#[test]
fn root_gets_no_proxy_and_another_user_no_connection() {
    in_private_nix(
        "nix_floor::daemon_proxy::root_gets_no_proxy_and_another_user_no_connection",
        |inside| {
            wait_for(async {
                match inside.role.as_str() {
                    "" => refusals(inside).await,
                    "job" => hold(inside).await,
                    _ => intrude(inside),
                }
            });
        },
    );
}

async fn refusals(inside: &Inside) {
    inside
        .with_daemons(async |_| {
            let ready = inside.folder.join("nobody/ready");
            let _ = std::fs::remove_file(&ready);
            let mut job = inside.part(USER, "job").spawn().unwrap();
            until(|| ready.exists());
            let folder = inside.folder.join("nobody/proxy");
            let socket = proxy_socket(&folder);
            passed(&inside.part(STRANGER, "kept-out").output().unwrap());
            // Whatever becomes of the modes, the proxy itself looks at who has come.
            let open = |path: &Path, mode| {
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
            };
            open(&folder, 0o755);
            open(&socket, 0o666);
            passed(&inside.part(STRANGER, "let-in").output().unwrap());
            job.kill().unwrap();
            job.wait().unwrap();
            until(|| !socket.exists());
        })
        .await;

    let folder = inside.private("as-root");
    let daemon = Path::new(SOCKET);
    let env = inside.env(&[]);
    let proxy = DaemonProxy::prepare(daemon, &folder, &env, Sink::silent()).unwrap();
    let mut proxy = proxy.with_program(inside.folder.join("flywheel"));
    assert!(matches!(proxy.activate().await, Err(ProxyError::Root)));
    assert_eq!(std::fs::read_link(proxy.link()).unwrap(), daemon);
    drop(proxy);
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o750)).unwrap();
    let refused = DaemonProxy::prepare(daemon, &folder, &env, Sink::silent());
    assert!(matches!(refused, Err(ProxyError::Untrusted(_))));
    // The process looks for itself.
    let mut command = Command::new(inside.folder.join("flywheel"));
    let refused = isolate(&mut command)
        .args(["daemon-proxy", "/link", "/daemon", "/socket"])
        .output();
    let refused = refused.unwrap();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned()
        + &String::from_utf8_lossy(&refused.stdout);
    assert!(
        !refused.status.success() && text.contains("must not run as root"),
        "{text}"
    );
}

/// Another user at the proxy's socket.
fn intrude(inside: &Inside) {
    let folder = inside.folder.join("nobody/proxy");
    let socket = std::fs::read_dir(&folder).map(|_| proxy_socket(&folder));
    if inside.role == "kept-out" {
        assert!(socket.is_err(), "the folder is private");
        return;
    }
    let mut stream = UnixStream::connect(socket.unwrap()).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    // The daemon would wait for the first word of the client.
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}
