//! The search's four outcomes with a scripted `nix` and `attic`, and the results of a batch.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use tempfile::TempDir;

use super::*;
use crate::client::fake::{Fake, GOOD};
use flywheel_testing::script;

/// A host with a scripted `nix`; each of its calls is a line of `calls`.
struct Host {
    folder: TempDir,
    env: Env,
    nix: Nix,
}

impl Host {
    /// `answers` is the body of a `case "$2"` on the reference to build.
    async fn new(answers: &str) -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let at = folder.path().display();
        for name in ["bin", "private", "flake", "store/bin"] {
            fs::create_dir_all(folder.path().join(name)).expect("made");
        }
        fs::set_permissions(
            folder.path().join("private"),
            fs::Permissions::from_mode(0o700),
        )
        .expect("private");
        let built = format!(r#"printf '[{{"drvPath":"x","outputs":{{"out":"{at}/store"}}}}]'"#);
        let text = format!(
            "[ \"$1\" = --version ] && {{ echo 'nix (Nix) 2.24.1'; exit; }}\necho \"$*\" >> {at}/calls\n\
             case $2 in\n{}\n*) echo 'error: unexpected' >&2; exit 9;;\nesac\n",
            answers.replace("BUILT", &built)
        );
        let program = script(&folder.path().join("bin"), "nix", &text).await;
        script(&folder.path().join("store/bin"), "attic", "exit 0").await;
        let path = folder.path().join("bin");
        let env = Env::from_pairs([("PATH", path.to_str().expect("text"))]);
        let nix = Nix::detect(&program, &env).await.expect("a nix");
        Self { folder, env, nix }
    }

    async fn find(&self) -> Result<Client, String> {
        let (folder, links) = (
            self.folder.path().join("flake"),
            self.folder.path().join("private"),
        );
        find(&Search {
            env: &self.env,
            nix: &self.nix,
            reference: REFERENCE,
            folder: &folder,
            links: &links,
        })
        .await
    }

    fn with_flake(self) -> Self {
        fs::write(self.folder.path().join("flake/flake.nix"), "{}").expect("written");
        self
    }

    /// The recorded calls of Nix, each of which must forbid building.
    fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.folder.path().join("calls")).unwrap_or_default();
        for call in text.lines() {
            assert!(call.starts_with("build "), "{call}");
            assert!(
                call.contains(" --max-jobs 0 --builders  "),
                "it could compile: {call}"
            );
        }
        text.lines()
            .map(|call| call.split(' ').nth(1).unwrap_or_default().to_owned())
            .collect()
    }
}

const NOTHING: &str = "*) echo 'error: no substituter has it, and max-jobs is 0' >&2; exit 1;;";

#[tokio::test]
async fn first_comes_the_one_on_the_path() {
    let host = Host::new(NOTHING).await;
    let program = script(&host.folder.path().join("bin"), "attic", "exit 0").await;
    assert_eq!(
        host.find().await,
        Ok(Client {
            program,
            origin: Origin::Path
        })
    );
    assert_eq!(host.calls(), [""; 0], "nix is not even asked");
}

#[tokio::test]
async fn then_the_reference_is_substituted() {
    let host = Host::new(&format!("{REFERENCE}) BUILT;;"))
        .await
        .with_flake();
    let program = host.folder.path().join("store/bin/attic");
    assert_eq!(
        host.find().await,
        Ok(Client {
            program,
            origin: Origin::Reference
        })
    );
    assert_eq!(host.calls(), [REFERENCE]);
}

#[tokio::test]
async fn then_the_flakes_own_is_substituted() {
    let host = Host::new(&format!(".#attic-client) BUILT;;\n{NOTHING}"))
        .await
        .with_flake();
    let program = host.folder.path().join("store/bin/attic");
    assert_eq!(
        host.find().await,
        Ok(Client {
            program,
            origin: Origin::OwnFlake
        })
    );
    assert_eq!(host.calls(), [REFERENCE, ".#attic-client"]);
}

#[tokio::test]
async fn else_there_is_none_and_each_reason_is_named() {
    let host = Host::new(NOTHING).await;
    let reason = host.find().await.expect_err("none");
    assert!(
        reason.contains("no `attic` is on `PATH`") && reason.contains("max-jobs is 0"),
        "{reason}"
    );
    assert!(reason.contains("there is no flake"), "{reason}");
    assert_eq!(host.calls(), [REFERENCE]);
    let host = host.with_flake();
    let reason = host.find().await.expect_err("none");
    assert!(
        reason.contains("`.#attic-client` cannot be substituted"),
        "{reason}"
    );
    assert_eq!(host.calls(), [REFERENCE, REFERENCE, ".#attic-client"]);
}

/// The destination whose client is this script.
async fn cli(host: &Host, fake: &Fake, client: &str) -> AtticCli {
    let program = script(&host.folder.path().join("bin"), "attic", client).await;
    let client = Client {
        program,
        origin: Origin::Path,
    };
    let token = Secret::new(GOOD).expect("token");
    AtticCli::new(
        &client,
        &host.nix,
        fake.attic(GOOD),
        &token,
        &host.folder.path().join("private"),
    )
    .expect("written")
}

#[tokio::test]
async fn the_token_travels_by_file_and_paths_come_in_one_call() {
    let (host, fake) = (Host::new(NOTHING).await, Fake::start().await);
    let at = host.folder.path().display().to_string();
    let client = format!(
        "echo \"$*\" >> {at}/pushes; env > {at}/env; while read -r line; do echo \"$line\"; done < \"$HOME/attic/config.toml\" > {at}/seen"
    );
    let cli = cli(&host, &fake, &client).await;
    let infos: Vec<PathInfo> = (0..3)
        .map(|n| fake.path(&format!("p{n}"), &[b'1' + n], &[]))
        .collect();
    let file = Path::new("/nonexistent");
    let counter = ByteCounter::default();
    let sent = futures_util::future::join_all(
        infos
            .iter()
            .map(|info| cli.send(info, file.into(), &counter)),
    )
    .await;
    assert!(sent.iter().all(Result::is_ok), "{sent:?}");
    assert_eq!(
        counter.total(),
        infos.iter().map(|info| info.nar_size).sum::<u64>()
    );
    let pushes = fs::read_to_string(host.folder.path().join("pushes")).expect("called");
    assert_eq!(pushes.lines().count(), 1, "{pushes}");
    assert!(
        pushes.starts_with(
            "push --no-closure --ignore-upstream-cache-filter flywheel:main /nix/store/"
        ),
        "{pushes}"
    );
    let environment = fs::read_to_string(host.folder.path().join("env")).expect("seen");
    assert!(
        !pushes.contains(GOOD) && !environment.contains(GOOD),
        "{pushes}{environment}"
    );
    assert!(
        fs::read_to_string(host.folder.path().join("seen"))
            .expect("seen")
            .contains(GOOD)
    );
}

#[tokio::test]
async fn a_call_that_fails_leaves_each_path_its_own_fate() {
    let (host, fake) = (Host::new(NOTHING).await, Fake::start().await);
    let infos: Vec<PathInfo> = (0..3)
        .map(|n| fake.path(&format!("p{n}"), &[b'1' + n], &[]))
        .collect();
    // Two of the paths arrive, the third does not.
    for info in &infos[..2] {
        fake.attic(GOOD)
            .upload(info, &fake.file(info), &ByteCounter::default())
            .await
            .expect("stored");
    }
    let bad = infos[2].path.base_name();
    let cli = cli(
        &host,
        &fake,
        &format!("echo 'x {bad}: 413 too large' >&2; echo 'Error: 1 failed' >&2; exit 1"),
    )
    .await;
    for plain in [false, true] {
        // A server without Attic's API is queried path by path.
        fake.server.faults().plain = plain;
        let (file, counter) = (Path::new("/nonexistent"), ByteCounter::default());
        let sent = futures_util::future::join_all(
            infos
                .iter()
                .map(|info| cli.send(info, file.into(), &counter)),
        )
        .await;
        assert!(sent[0].is_ok() && sent[1].is_ok(), "{sent:?}");
        let error = sent[2].as_ref().expect_err("missing").to_string();
        assert!(error.contains("413 too large"), "{error}");
        assert_eq!(has_attic_api(&fake.attic(GOOD)).await, !plain);
    }
}

#[tokio::test]
async fn a_client_that_hangs_ends_with_its_callers() {
    let (host, fake) = (Host::new(NOTHING).await, Fake::start().await);
    let at = host.folder.path().display().to_string();
    let cli = cli(
        &host,
        &fake,
        &format!("echo $$ > {at}/pid; exec /bin/sleep 600"),
    )
    .await;
    let info = fake.path("p", b"1", &[]);
    let counter = ByteCounter::default();
    let pid = host.folder.path().join("pid");
    let began = async {
        while fs::read_to_string(&pid)
            .unwrap_or_default()
            .trim()
            .is_empty()
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        sent = cli.send(&info, "/nonexistent".into(), &counter) => panic!("{sent:?}"),
        () = began => (),
    }
    let process = PathBuf::from("/proc")
        .join(fs::read_to_string(&pid).expect("written").trim())
        .join("cmdline");
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while fs::read(&process).is_ok_and(|line| !line.is_empty()) {
        assert!(tokio::time::Instant::now() < deadline, "it lives on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
