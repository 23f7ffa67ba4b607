//! Which settings are in force: what Nix takes from us, what it refuses, and what a daemon ignores.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use flywheel_core::secret::Secret;
use flywheel_nix::effective_settings::{IgnoredReason, IgnoredSetting, read_effective};
use flywheel_nix::netrc;
use flywheel_nix::settings::{CacheSettings, Settings, WantedSettings, compose, malformed};
use flywheel_nix::tool::Nix;

use super::{CONFIG, Daemon, SOCKET, in_private_nix, isolate, wait_for};

const KEY: &str = "main:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=";
/// Nothing listens there, and nothing asks it.
const CACHE: &str = "http://127.0.0.1:9/main";

fn wanted(cache: CacheSettings) -> WantedSettings {
    WantedSettings {
        cache: Some(cache),
        ..WantedSettings::default()
    }
}

fn cache(netrc: Option<PathBuf>) -> CacheSettings {
    CacheSettings {
        substituter: CACHE.to_owned(),
        address: CACHE.to_owned(),
        is_lasting: true,
        attempts: 2,
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
        "nix_floor::settings::a_single_user_store_follows_the_settings",
        |inside| {
            wait_for(async {
                let nix = inside.nix(&[("SOME_TOKEN", "tok-a")]).await;
                let folder = inside.private("secrets");
                inside
                    .system_settings("download-attempts = 7\naccess-tokens = example.org=tok-c\n");
                let token = Secret::new("tok-b").unwrap();
                let file = netrc::write(&folder, "127.0.0.1", &token, None).unwrap();
                let access_tokens = Some(
                    netrc::write_access_token(&folder, "github.com", &token, &Default::default())
                        .unwrap(),
                );
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
                check_settings(&inside_job, &file).await;

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

/// The settings of the runner, of the machine's owner and of ours are all in force.
async fn check_settings(nix: &Nix, netrc: &Path) {
    let settings = Settings::read(nix).await.unwrap();
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
    assert_eq!(settings.netrc_file().as_deref(), Some(netrc));
    let tokens = settings.text("access-tokens").unwrap();
    assert!(
        tokens.contains("tok-b") && tokens.contains("tok-c"),
        "{tokens}"
    );
    let environment = format!("{:?}", nix.variables());
    assert!(!environment.contains("tok-"), "{environment}");
}

#[test]
fn lines_that_nix_refuses_are_the_ones_we_name() {
    in_private_nix(
        "nix_floor::settings::lines_that_nix_refuses_are_the_ones_we_name",
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
    let test = "nix_floor::settings::a_daemon_ignores_what_an_untrusted_user_wants";
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
fn nix_sends_the_token_to_the_caches_host_alone() {
    in_private_nix(
        "nix_floor::settings::nix_sends_the_token_to_the_caches_host_alone",
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
    isolate(&mut ask)
        .args([
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
    ask.envs(nix.variables()).output().unwrap();
    server.join().unwrap()
}
