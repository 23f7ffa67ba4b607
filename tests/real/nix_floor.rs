//! The Nix floor against real Nix: what the job added, which settings are in force, what is repaired.
//! Each test runs once more inside a mount namespace with a `/nix` of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};

use flywheel::nix::bootstrap::{self, ready};
use flywheel::nix::db::Db;
use flywheel::nix::effective_settings::{IgnoredReason, IgnoredSetting, read_effective};
use flywheel::nix::netrc;
use flywheel::nix::path_info::{Origin, PathInfo};
use flywheel::nix::ping::{Ping, PingFailure, ping};
use flywheel::nix::settings::{CacheSettings, Settings, WantedSettings, compose, malformed};
use flywheel::nix::store::{STATE_DIR, Store, open_db};
use flywheel::nix::store_path::StorePath;
use flywheel::nix::tool::Nix;
use flywheel::progress::Sink;
use flywheel::runner::env::Env;
use flywheel::secret::Secret;

use crate::world::{need, with_private_nix};

/// Ample for a machine under load; nothing here waits for it.
const LIMIT: Duration = Duration::from_secs(60);
/// What the test inside learns from the one outside.
const FOLDER: &str = "FLOOR_TEST_FOLDER";
const ROLE: &str = "FLOOR_TEST_ROLE";
/// Offline, and without a sandbox, so that `/bin/sh` builds.
const CONFIG: &str = "substituters =\nsandbox = false\n";
const KEY: &str = "main:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=";
/// Nothing listens there, and nothing asks it.
const CACHE: &str = "http://127.0.0.1:9/main";

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
    // Another process copies it: a file that a fork of ours still holds open for writing cannot be run.
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
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap())
        .env(FOLDER, folder.path());
    passed(&command.stdin(Stdio::null()).output().unwrap());
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
        let own = [
            ("PATH", path.as_str()),
            ("HOME", &home),
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
        said(nix, "nix-build", &arguments)
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
        command
            .env_clear()
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
fn said(nix: &Nix, tool: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(nix.folder().join(tool));
    let output = command
        .args(arguments)
        .env_clear()
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

/// All valid paths as `nix` itself lists them, read without our parser: path → (size, references).
fn listed(nix: &Nix) -> BTreeMap<String, (u64, BTreeSet<String>)> {
    let whole = serde_json::from_str(&said(nix, "nix", &["path-info", "--all", "--json"])).unwrap();
    let entries: Vec<(String, serde_json::Value)> = match whole {
        serde_json::Value::Array(list) => list
            .into_iter()
            .map(|facts| (facts["path"].as_str().unwrap().to_owned(), facts))
            .collect(),
        serde_json::Value::Object(object) => object.into_iter().collect(),
        other => panic!("{other}"),
    };
    let references = |facts: &serde_json::Value| {
        facts["references"]
            .as_array()
            .unwrap()
            .iter()
            .map(|name| name.as_str().unwrap().to_owned())
            .collect()
    };
    entries
        .into_iter()
        .map(|(path, facts)| {
            (
                path,
                (facts["narSize"].as_u64().unwrap(), references(&facts)),
            )
        })
        .collect()
}

fn names(infos: &[PathInfo]) -> Vec<&str> {
    let mut names: Vec<&str> = infos.iter().map(|info| info.path.name()).collect();
    names.sort_unstable();
    names
}

fn sorted(mut infos: Vec<PathInfo>) -> Vec<PathInfo> {
    infos.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    infos
}

#[test]
fn the_store_tells_exactly_what_the_job_added() {
    in_private_nix(
        "nix_floor::the_store_tells_exactly_what_the_job_added",
        |inside| {
            wait_for(async {
                let nix = inside
                    .nix(&[("NIX_CONFIG", &format!("{CONFIG}build-users-group =\n"))])
                    .await;
                inside.build(&nix, &["old"]);
                let before = listed(&nix);
                let store = Store::open(&nix).await.unwrap();
                assert_eq!(store.database_error(), None);
                // The same store behind a socket of another place: no database, so Nix is asked.
                let socket = inside.folder.join("elsewhere");
                let _daemon = Daemon::start(&nix, &socket);
                let remote = nix
                    .clone()
                    .with_variable("NIX_REMOTE", Some(&format!("unix://{}", socket.display())));
                let by_command = Store::open(&remote).await.unwrap();
                assert!(by_command.database_error().is_some());
                let (mark, other_mark) = (
                    store.mark().await.unwrap(),
                    by_command.mark().await.unwrap(),
                );

                let app = inside.build(&nix, &["app"]);
                let pair = inside.build(&nix, &["pair"]);
                let added = store.added_since(&mark).await.unwrap();

                let mut expected = listed(&nix);
                expected.retain(|path, _| !before.contains_key(path));
                let told: BTreeMap<String, (u64, BTreeSet<String>)> = added
                    .infos
                    .iter()
                    .map(|info| {
                        let references = info.references.iter().map(ToString::to_string).collect();
                        (info.path.to_string(), (info.nar_size, references))
                    })
                    .collect();
                assert_eq!(told, expected);
                assert_eq!(added.unreadable, []);
                let all = [
                    "app",
                    "app.drv",
                    "dependency",
                    "dependency.drv",
                    "pair",
                    "pair-dev",
                    "pair.drv",
                    "source",
                ];
                assert_eq!(names(&added.infos), all);
                for info in &added.infos {
                    let origin = match info.path.name() {
                        "source" => Origin::Added,
                        name if name.ends_with(".drv") => Origin::Added,
                        _ => Origin::Built,
                    };
                    assert_eq!(info.origin(), origin, "{:?}", info.path);
                    let hash = said(
                        &nix,
                        "nix-hash",
                        &["--type", "sha256", "--base32", &info.path.to_string()],
                    );
                    assert_eq!(hash.trim(), info.nar_hash.base32());
                }

                let again = by_command.added_since(&other_mark).await.unwrap();
                assert_eq!(
                    sorted(again.infos),
                    sorted(added.infos.clone()),
                    "both ways say the same"
                );

                let closure = store.closure(&app).await.unwrap();
                let listed = said(&nix, "nix-store", &["-q", "-R", &app[0].to_string()]);
                let mut listed: Vec<StorePath> =
                    listed.lines().map(|line| line.parse().unwrap()).collect();
                listed.sort_unstable();
                assert_eq!(
                    closure
                        .infos
                        .iter()
                        .map(|info| info.path.clone())
                        .collect::<Vec<_>>(),
                    listed
                );
                assert_eq!(by_command.closure(&app).await.unwrap(), closure);

                said(&nix, "nix-store", &["--delete", &pair[0].to_string()]);
                let asked = [app[0].clone(), pair[0].clone()];
                assert_eq!(names(&store.infos(&asked).await.unwrap().infos), ["app"]);
                assert_eq!(
                    store.infos(&asked).await.unwrap(),
                    by_command.infos(&asked).await.unwrap()
                );
                assert!(
                    !names(&store.added_since(&mark).await.unwrap().infos).contains(&"pair"),
                    "it is gone again"
                );
            });
        },
    );
}

#[test]
fn result_links_are_results_even_if_nothing_is_built() {
    in_private_nix(
        "nix_floor::result_links_are_results_even_if_nothing_is_built",
        |inside| {
            wait_for(async {
                let nix = inside
                    .nix(&[("NIX_CONFIG", &format!("{CONFIG}build-users-group =\n"))])
                    .await;
                let app = inside.build(&nix, &["app"]);
                let store = Store::open(&nix).await.unwrap();
                let (mark, started) = (store.mark().await.unwrap(), SystemTime::now());
                let job = inside.folder.join("job");
                std::fs::create_dir_all(job.join("deep")).unwrap();
                for (folder, link) in [
                    (job.join("deep"), "out"),
                    (inside.folder.join("home"), "result"),
                ] {
                    let mut build = Command::new(&nix.program);
                    build
                        .args(["build", "-f"])
                        .arg(inside.folder.join("work/default.nix"))
                        .args(["app", "-o", link]);
                    assert!(
                        build
                            .current_dir(folder)
                            .env_clear()
                            .envs(nix.variables())
                            .status()
                            .unwrap()
                            .success()
                    );
                }
                assert_eq!(store.added_since(&mark).await.unwrap().infos, []);
                assert_eq!(store.result_links(&job, started).await.unwrap(), app);
                let later = SystemTime::now() + Duration::from_secs(60);
                assert_eq!(store.result_links(&job, later).await.unwrap(), []);
            });
        },
    );
}

fn wanted(cache: CacheSettings) -> WantedSettings {
    WantedSettings {
        cache: Some(cache),
        ..WantedSettings::default()
    }
}

fn cache(netrc: Option<PathBuf>) -> CacheSettings {
    CacheSettings {
        substituter: CACHE.to_owned(),
        public_key: Some(KEY.parse().unwrap()),
        netrc,
    }
}

async fn ignored(nix: &Nix, config: &str, wanted: &WantedSettings) -> Vec<IgnoredSetting> {
    let found = read_effective(
        &nix.clone().with_config(config),
        wanted.cache.as_ref(),
        None,
    )
    .await
    .unwrap();
    assert!(
        found.opened.is_some_and(|opened| !opened.url.is_empty()),
        "the store opens"
    );
    found.ignored
}

#[test]
fn a_single_user_store_follows_the_settings() {
    in_private_nix(
        "nix_floor::a_single_user_store_follows_the_settings",
        |inside| {
            wait_for(async {
                let nix = inside.nix(&[("SOME_TOKEN", "tok-a")]).await;
                let folder = inside.private("secrets");
                inside
                    .system_settings("download-attempts = 7\naccess-tokens = example.org=tok-c\n");
                let token = Secret::new("tok-b").unwrap();
                let file = netrc::write(&folder, "127.0.0.1", &token, None).unwrap();
                let access_tokens =
                    Some(netrc::write_access_token(&folder, "github.com", &token).unwrap());
                let before = Settings::read(&nix).await.unwrap();
                let base = format!(
                    "# the runner's\n{CONFIG}extra-substituters = http://runner.example\r\ncores = 3"
                );
                let wanted = WantedSettings {
                    access_tokens,
                    before,
                    ..wanted(cache(Some(file.clone())))
                };
                let config = compose(&base, &wanted);
                assert_eq!(ignored(&nix, &config, &wanted).await, []);

                let inside_job = nix.clone().with_config(&config);
                let settings = Settings::read(&inside_job).await.unwrap();
                assert_eq!(
                    settings.list("substituters"),
                    ["http://runner.example", CACHE]
                );
                assert_eq!(settings.text("cores").as_deref(), Some("3"));
                assert_eq!(settings.text("fallback").as_deref(), Some("true"));
                assert_eq!(settings.text("connect-timeout").as_deref(), Some("5"));
                assert_eq!(
                    settings.text("download-attempts").as_deref(),
                    Some("7"),
                    "the machine's owner set it"
                );
                assert_eq!(settings.netrc_file(), Some(file.clone()));
                let tokens = settings.text("access-tokens").unwrap();
                assert!(
                    tokens.contains("tok-b") && tokens.contains("tok-c"),
                    "{tokens}"
                );
                let environment = format!("{:?}", inside_job.variables());
                assert!(!environment.contains("tok-"), "{environment}");

                let extra = "substituters = http://mine.example\nnetrc-file = /mine".to_owned();
                let wanted = WantedSettings { extra, ..wanted };
                let ignored = ignored(&nix, &compose(&base, &wanted), &wanted).await;
                let expected = [
                    (
                        "extra-substituters",
                        format!("extra-substituters = {CACHE}"),
                    ),
                    ("netrc-file", format!("netrc-file = {}", file.display())),
                ];
                let expected = expected.map(|(setting, line_to_add)| IgnoredSetting {
                    setting,
                    reason: IgnoredReason::Overridden,
                    line_to_add,
                    file: None,
                });
                assert_eq!(ignored, expected);
            });
        },
    );
}

#[test]
fn lines_that_nix_refuses_are_the_ones_we_name() {
    in_private_nix(
        "nix_floor::lines_that_nix_refuses_are_the_ones_we_name",
        |inside| {
            wait_for(async {
                let nix = inside.nix(&[]).await;
                for (line, is_good) in [
                    ("cores = 2", true),
                    ("extra-substituters =", true),
                    ("no-such-setting = 3", true),
                    ("\tcores\t=\t2 # comment", true),
                    ("!include /nonexistent", true),
                    ("garbage", false),
                    ("cores=2", false),
                    ("cores =2", false),
                    ("= 2", false),
                    ("include", false),
                    ("include /a /b", false),
                    ("extra-substituters http://x", false),
                ] {
                    assert_eq!(malformed(line).is_empty(), is_good, "we on `{line}`");
                    let answer = Settings::read(&nix.clone().with_config(line)).await;
                    assert_eq!(answer.is_ok(), is_good, "Nix on `{line}`");
                    if let Err(error) = answer {
                        assert!(
                            !error.to_string().contains(line),
                            "it may be a secret: {error}"
                        );
                    }
                }
            });
        },
    );
}

#[test]
fn a_daemon_ignores_what_an_untrusted_user_wants() {
    let test = "nix_floor::a_daemon_ignores_what_an_untrusted_user_wants";
    in_private_nix(test, |inside| {
        wait_for(async {
            let more: &[(&str, &str)] = if inside.role.is_empty() {
                &[]
            } else {
                &[("NIX_REMOTE", "daemon")]
            };
            let nix = inside.nix(more).await;
            let conf = inside.folder.join("conf/nix.conf");
            let reported = async || {
                let folder = inside.private(&format!("secrets-{}", inside.role));
                let file =
                    netrc::write(&folder, "127.0.0.1", &Secret::new("tok").unwrap(), None).unwrap();
                let wanted = wanted(cache(Some(file)));
                let ignored = ignored(&nix, &compose(CONFIG, &wanted), &wanted).await;
                assert!(
                    ignored
                        .iter()
                        .all(|one| one.reason == IgnoredReason::Untrusted
                            && one.file.as_ref() == Some(&conf))
                );
                ignored
                    .into_iter()
                    .map(|one| one.line_to_add)
                    .collect::<Vec<_>>()
            };
            let substituter = format!("extra-trusted-substituters = {CACHE}");
            let key = format!("extra-trusted-public-keys = {KEY}");
            let user = "extra-trusted-users = nobody".to_owned();
            match inside.role.as_str() {
                "stranger" => assert_eq!(reported().await, [substituter, key, user]),
                "known-cache" => assert_eq!(reported().await, [user]),
                "trusted" => assert_eq!(reported().await, Vec::<String>::new()),
                "" => {
                    for (role, lines) in [
                        ("stranger", String::new()),
                        ("known-cache", format!("{substituter}\n{key}\n")),
                        ("trusted", format!("{user}\n")),
                    ] {
                        inside.system_settings(&lines);
                        let _daemon = Daemon::start(&nix, Path::new(SOCKET));
                        inside.as_nobody(role);
                    }
                }
                other => panic!("no such role: {other}"),
            }
        });
    });
}

#[test]
fn a_user_of_a_daemon_reads_the_database() {
    in_private_nix(
        "nix_floor::a_user_of_a_daemon_reads_the_database",
        |inside| {
            wait_for(async {
                if inside.role.is_empty() {
                    inside.system_settings("build-users-group =\nsandbox = false\n");
                    let nix = inside.nix(&[]).await;
                    inside.build(&nix, &["old"]);
                    let _daemon = Daemon::start(&nix, Path::new(SOCKET));
                    // Newer versions keep the database open, or leave its shared memory behind.
                    until(|| nix.version.at_least(2, 9) || !Path::new(SHARED_MEMORY).exists());
                    return inside.as_nobody("user");
                }
                let nix = inside.nix(&[("NIX_REMOTE", "daemon")]).await;
                if !Path::new(SHARED_MEMORY).exists() {
                    assert!(
                        Db::open(&Db::file(Path::new(STATE_DIR))).is_err(),
                        "nobody has it open"
                    );
                }
                let opened = open_db(Path::new(STATE_DIR)).unwrap();
                assert!(opened.last_id().unwrap() > 0);
                drop(opened);
                let store = Store::open(&nix).await.unwrap();
                assert_eq!(store.database_error(), None);
                let mark = store.mark().await.unwrap();
                inside.build(&nix, &["dependency"]);
                let added = store.added_since(&mark).await.unwrap();
                assert_eq!(
                    names(&added.infos),
                    ["dependency", "dependency.drv", "source"]
                );
            });
        },
    );
}

#[test]
fn a_dead_daemon_is_revived_by_root_and_named_to_others() {
    let test = "nix_floor::a_dead_daemon_is_revived_by_root_and_named_to_others";
    in_private_nix(test, |inside| {
        wait_for(async {
            let env = inside.env(&[("NIX_REMOTE", "daemon")]);
            if inside.role == "without daemon" {
                let env = inside.env(&[]);
                let error = ready(&env, &Sink::silent(), LIMIT).await.err().unwrap();
                assert!(matches!(error, bootstrap::Error::NoRights(_)), "{error}");
                return;
            }
            if inside.role == "dead daemon" {
                let error = ready(&env, &Sink::silent(), LIMIT).await.err().unwrap();
                assert!(
                    matches!(error, bootstrap::Error::DeadDaemon { .. }),
                    "{error}"
                );
                assert!(error.to_string().contains(SOCKET), "{error}");
                return;
            }
            inside.system_settings("build-users-group =\n");
            let alone = inside.nix(&[]).await;
            inside.build(&alone, &["old"]);
            inside.as_nobody("without daemon");
            // What a daemon that died leaves: a socket at which nobody answers.
            drop(Daemon::start(&alone, Path::new(SOCKET)));
            assert!(Path::new(SOCKET).exists());
            inside.as_nobody("dead daemon");

            for socket_was_there in [true, false] {
                revived(inside, &env, socket_was_there).await;
            }
        });
    });
}

/// Root gets a daemon for the job, which is gone afterwards; so is its socket, if none was there.
async fn revived(inside: &Inside, env: &Env, socket_was_there: bool) {
    if !socket_was_there {
        std::fs::remove_file(SOCKET).unwrap();
    }
    let ready = ready(env, &Sink::silent(), LIMIT).await.unwrap();
    assert_eq!(
        (ready.repairs.len(), ready.variables(), ready.settings()),
        (1, vec![], vec![])
    );
    let Ping::Open(opened) = ping(&ready.nix, LIMIT).await.unwrap() else {
        panic!("it does not open")
    };
    assert_eq!(opened.url, "daemon");
    inside.build(&ready.nix, &["app"]);
    let nix = ready.nix.clone();
    ready.stop().await;
    let answer = ping(&nix, LIMIT).await.unwrap();
    assert!(
        matches!(answer, Ping::Failed(PingFailure::NoDaemon(_))),
        "{answer:?}"
    );
    assert_eq!(Path::new(SOCKET).exists(), socket_was_there);
}

#[test]
fn build_users_that_do_not_exist_are_done_without() {
    in_private_nix(
        "nix_floor::build_users_that_do_not_exist_are_done_without",
        |inside| {
            wait_for(async {
                for (group, attribute) in [("no-such-group", "old"), ("nogroup", "app")] {
                    inside.system_settings(&format!("build-users-group = {group}\n"));
                    let ready = ready(&inside.env(&[]), &Sink::silent(), LIMIT)
                        .await
                        .unwrap();
                    assert_eq!(ready.settings(), ["build-users-group ="], "{group}");
                    assert!(!ready.installed && ready.folder.is_none());
                    let wanted = WantedSettings {
                        repairs: ready.settings(),
                        ..WantedSettings::default()
                    };
                    let nix = ready.nix.clone().with_config(&compose(CONFIG, &wanted));
                    inside.build(&nix, &[attribute]);
                }
            });
        },
    );
}

#[test]
fn jobs_that_open_a_new_store_at_once_all_get_it() {
    in_private_nix(
        "nix_floor::jobs_that_open_a_new_store_at_once_all_get_it",
        |inside| {
            wait_for(async {
                for round in 0..6 {
                    let state = format!("/nix/new-{round}");
                    let env = inside.env(&[("NIX_STATE_DIR", &state)]);
                    let sink = Sink::silent();
                    let jobs = (0..6).map(|_| ready(&env, &sink, LIMIT));
                    for opened in futures_util::future::join_all(jobs).await {
                        opened.map(drop).unwrap();
                    }
                }
            });
        },
    );
}

#[test]
fn nix_sends_the_token_to_the_caches_host_alone() {
    in_private_nix(
        "nix_floor::nix_sends_the_token_to_the_caches_host_alone",
        |inside| {
            wait_for(async {
                let nix = inside.nix(&[]).await;
                let folder = inside.private("secrets");
                let existing = folder.join("existing");
                std::fs::write(&existing, "machine localhost login other password theirs").unwrap();
                let token = Secret::new("eyJ.a+b/c=~_-!$").unwrap();
                let file = netrc::write(&folder, "127.0.0.1", &token, Some(&existing)).unwrap();
                let basic = |user: &str, secret: &Secret| {
                    Some(format!("Basic {}", secret.basic(user).expose()))
                };
                let theirs = basic("other", &Secret::new("theirs").unwrap());
                for (host, expected) in [
                    ("127.0.0.1", basic("attic", &token)),
                    ("localhost", theirs),
                    ("127.0.0.2", None),
                ] {
                    assert_eq!(authorization(&nix, &file, host), expected, "{host}");
                }
            });
        },
    );
}

/// What Nix sends as `Authorization` to a cache on this host.
fn authorization(nix: &Nix, netrc: &Path, host: &str) -> Option<String> {
    let listener = TcpListener::bind((
        if host == "localhost" {
            "127.0.0.1"
        } else {
            host
        },
        0,
    ))
    .unwrap();
    let url = format!("http://{host}:{}", listener.local_addr().unwrap().port());
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap())
            .lines()
            .map_while(Result::ok);
        let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
        stream
            .write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            .unwrap();
        headers
            .iter()
            .find_map(|line| line.strip_prefix("Authorization: ").map(str::to_owned))
    });
    let mut ask = Command::new(&nix.program);
    ask.args([
        "store",
        "ping",
        "--store",
        &url,
        "--option",
        "download-attempts",
        "1",
        "--option",
        "netrc-file",
    ])
    .arg(netrc);
    ask.env_clear().envs(nix.variables()).output().unwrap();
    server.join().unwrap()
}
