//! Bootstrap with scripted tools: what is found, repaired, installed or rejected, and the messages
//! for it.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::{Arc, Mutex};

use super::*;
use flywheel_core::progress::Progress;
use flywheel_testing::script;

/// Enough for a loaded machine; nothing here waits for it.
const LIMIT: Duration = Duration::from_secs(60);

/// Nix as the distribution's package: nothing in these tests may go to the network.
fn packaged() -> Wanted {
    Wanted {
        installer: plan::Installer::Distro,
        ..Wanted::default()
    }
}

/// A machine made of scripts: `nix` and other programs in `bin`. It records the messages to the
/// progress sink.
struct World {
    folder: tempfile::TempDir,
    host: Host,
    said: Arc<Mutex<Vec<String>>>,
}

impl World {
    fn new(root: bool) -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        std::fs::create_dir(folder.path().join("bin")).expect("made");
        std::fs::create_dir(folder.path().join("store")).expect("made");
        let store = folder.path().join("store");
        let host = Host {
            places: Vec::new(),
            system: Vec::new(),
            packages: folder.path().join("packages"),
            uid: if root { 0 } else { 1000 },
            // Nobody can make it.
            nix: folder.path().join("absent/nix"),
            conf: folder.path().join("nix.conf"),
            etc: folder.path().join("etc"),
            guarded: vec![store],
        };
        Self {
            folder,
            host,
            said: Arc::default(),
        }
    }

    async fn script(&self, name: &str, text: &str) {
        script(&self.folder.path().join("bin"), name, text).await;
    }

    /// Installs a `nix` of this version. `store ping` runs the given script, and
    /// `build-users-group` is `group`.
    async fn nix(&self, version: &str, group: &str, ping: &str) {
        self.script(
            "nix",
            &format!(
                "case \"$*\" in\n--version) echo 'nix (Nix) {version}';;\n*'--json') \
                 echo '{{\"build-users-group\":{{\"value\":\"{group}\",\"defaultValue\":\"\"}}}}';;\n*) {ping};;\nesac"
            ),
        )
        .await;
    }

    async fn ready(&self) -> Result<Ready, Error> {
        self.ready_for(&packaged()).await
    }

    async fn ready_for(&self, wanted: &Wanted) -> Result<Ready, Error> {
        let said = Arc::clone(&self.said);
        let sink = Sink::new(move |event| {
            if let Progress::Note(text) | Progress::Degraded { text, .. } = event {
                said.lock().expect("no panic").push(text);
            }
        });
        let path = format!("{}/bin:/usr/bin:/bin", self.folder.path().display());
        let state = self.folder.path().display().to_string();
        let env = Env::from_pairs([
            ("PATH", path.as_str()),
            ("NIX_STATE_DIR", &state),
            ("NIX_CONFIG", "cores = 1"),
        ]);
        self.host
            .ready(&env, wanted, &Roots::default(), &sink, LIMIT)
            .await
    }

    async fn fails(&self) -> Error {
        match self.ready().await {
            Ok(_) => panic!("there should be no working Nix"),
            Err(error) => error,
        }
    }
}

const OPEN: &str = "echo 'Store URL: local'";
const DEAD: &str =
    "echo \"error: cannot connect to socket at '/s': Connection refused\" >&2; exit 1";

#[tokio::test]
async fn a_working_nix_is_used_as_it_is() {
    let world = World::new(true);
    world.nix("2.8.0", "", OPEN).await;
    world.script("apt-get", "exit 99").await;
    let ready = world.ready().await.expect("works");
    assert!(!ready.installed && ready.folder.is_none() && ready.repairs.is_empty());
    assert_eq!(*world.said.lock().expect("no panic"), Vec::<String>::new());
}

#[tokio::test]
async fn nix_beside_path_is_reported_with_its_folder() {
    let mut world = World::new(false);
    world.nix("2.8.0", "nixbld", OPEN).await;
    let away = world.folder.path().join("away");
    std::fs::create_dir(&away).expect("made");
    std::fs::rename(world.folder.path().join("bin/nix"), away.join("nix")).expect("moved");
    world.host.places = vec![away.clone()];
    // The machine's own Nix, if it has one, must not be found first.
    let env = Env::from_pairs([("PATH", "/nonexistent")]);
    let ready = world
        .host
        .ready(&env, &packaged(), &Roots::default(), &Sink::silent(), LIMIT)
        .await
        .expect("works");
    assert_eq!(ready.folder, Some(away));
}

#[tokio::test]
async fn missing_build_users_are_a_setting() {
    let world = World::new(true);
    let warning =
        "echo \"warning: the group 'nixbld' specified in 'build-users-group' does not exist\" >&2";
    world
        .nix("2.8.0", "nixbld", &format!("{warning}; {OPEN}"))
        .await;
    let ready = world.ready().await.expect("works");
    assert_eq!(ready.settings(), ["build-users-group ="]);
    assert_eq!(ready.nix.config(), "cores = 1\nbuild-users-group =\n");
    assert!(world.said.lock().expect("no panic")[0].contains("`nixbld` does not exist"));
}

#[tokio::test]
async fn a_dead_daemon_is_named_to_a_user_without_rights() {
    let world = World::new(false);
    world.nix("2.8.0", "", DEAD).await;
    let error = world.fails().await;
    assert!(
        error.to_string().contains("daemon does not answer"),
        "{error}"
    );
    assert_eq!(
        (
            error.exit(),
            error.hint().is_some_and(|hint| hint.contains("systemctl"))
        ),
        (Exit::Host, true)
    );
}

#[tokio::test]
async fn root_does_without_a_daemon_that_does_not_start() {
    let world = World::new(true);
    world
        .nix(
            "2.8.0",
            "",
            &format!("if [ \"$NIX_REMOTE\" = local ]; then {OPEN}; else {DEAD}; fi"),
        )
        .await;
    world
        .script("nix-daemon", "echo 'error: no socket for you' >&2; exit 1")
        .await;
    let ready = world.ready().await.expect("works without");
    assert_eq!(ready.variables(), [("NIX_REMOTE", "local")]);
    assert!(
        ready.repairs[0].text.contains("no socket for you"),
        "{:?}",
        ready.repairs
    );
    assert_eq!(ready.nix.variable("NIX_REMOTE"), Some("local"));
}

#[tokio::test]
async fn a_store_of_another_user_without_a_daemon_is_said_so() {
    let world = World::new(false);
    world
        .nix("2.8.0", "", "echo \"error: opening lock file '/nix/var/nix/db/big-lock': Permission denied\" >&2; exit 1")
        .await;
    let error = world.fails().await;
    assert!(
        error.to_string().contains("another user") && error.to_string().contains("big-lock"),
        "{error}"
    );
}

#[tokio::test]
async fn a_world_writable_store_is_refused_where_nix_refuses_it() {
    let world = World::new(true);
    let open = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(world.folder.path().join("store"), open).expect("opened");
    world.nix("2.34.8", "nixbld-of-nobody", OPEN).await;
    let error = world.fails().await;
    assert!(
        error.to_string().contains("/store` is world-writable"),
        "{error}"
    );
    world.nix("2.8.0", "nixbld-of-nobody", OPEN).await;
    world.ready().await.expect("older versions build there");
    assert!(world.said.lock().expect("no panic")[0].contains("chmod o-w"));
}

/// A pod's volume is open to everybody, and its only user cannot change that.
#[tokio::test]
async fn a_world_writable_store_without_build_users_is_nobodys_fault() {
    let world = World::new(true);
    let open = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(world.folder.path().join("store"), open).expect("opened");
    for version in ["2.34.8", "2.8.0"] {
        world.nix(version, "", OPEN).await;
        world.ready().await.expect("it builds there");
    }
    let said = world.said.lock().expect("no panic");
    assert!(said.is_empty(), "{said:?}");
}

#[tokio::test]
async fn a_nix_that_is_there_is_used_whatever_version_is_named_and_the_log_says_so() {
    let world = World::new(false);
    world.nix("2.34.8", "", OPEN).await;
    for (version, expected) in [("2.34.8", 0), ("2.31.2", 1)] {
        let wanted = Wanted {
            version: Some(version.parse().expect("a version")),
            ..Wanted::default()
        };
        world.ready_for(&wanted).await.expect("it is there");
        let said = world.said.lock().expect("no panic");
        assert_eq!(said.len(), expected, "{said:?}");
        assert!(
            said.iter()
                .all(|line| line.contains("`nix-version` names Nix 2.31.2")),
            "{said:?}"
        );
    }
}

#[tokio::test]
async fn without_nix_root_installs_the_package() {
    let world = World::new(true);
    let bin = world.folder.path().join("bin");
    world.nix("2.8.0", "", OPEN).await;
    std::fs::rename(bin.join("nix"), bin.join("packaged")).expect("moved");
    world.script(
        "apt-get",
        "cd \"${0%/*}\"; echo \"$*\" >> ../calls; case \"$*\" in *update*) exit 100;; *install*) mv packaged nix;; esac",
    )
    .await;
    // Only the scripts' folder: the machine's own Nix must not be found.
    let path = bin.display().to_string();
    let env = Env::from_pairs([("PATH", path.as_str())]);
    let ready = world
        .host
        .ready(&env, &packaged(), &Roots::default(), &Sink::silent(), LIMIT)
        .await
        .expect("installed");
    assert!(ready.installed && ready.folder.is_none());
    let calls = std::fs::read_to_string(world.folder.path().join("calls")).expect("called");
    assert!(
        calls
            .lines()
            .last()
            .is_some_and(|line| line.ends_with("--no-install-recommends nix-bin")),
        "{calls}"
    );
}

/// What a job left that was cancelled while it installed Nix: `apt-get` refuses until `dpkg` has ended its run, which
/// another process still holds the lock of.
#[tokio::test]
async fn an_interrupted_installation_is_completed() {
    let world = World::new(true);
    let bin = world.folder.path().join("bin");
    std::fs::create_dir_all(world.folder.path().join("packages/updates")).expect("made");
    std::fs::write(world.folder.path().join("packages/updates/0001"), "").expect("written");
    world.nix("2.8.0", "", OPEN).await;
    std::fs::rename(bin.join("nix"), bin.join("packaged")).expect("moved");
    let log = "cd \"${0%/*}/..\"; echo \"${0##*/} $*\" >>calls";
    let refuses =
        "if [ -e packages/updates/0001 ]; then echo 'E: dpkg was interrupted' >&2; exit 100; fi";
    world
        .script(
            "apt-get",
            &format!(
                "{log}; {refuses}; case \"$*\" in *nix-bin) /bin/mv bin/packaged bin/nix;; esac"
            ),
        )
        .await;
    let locked = "if [ ! -e waited ]; then : >waited; echo 'dpkg: error: dpkg frontend lock was locked by another process' >&2; exit 2; fi";
    world
        .script(
            "dpkg",
            &format!("{log}; {locked}; /bin/rm packages/updates/0001"),
        )
        .await;
    let env = Env::from_pairs([("PATH", bin.display().to_string().as_str())]);
    let ready = world
        .host
        .ready(&env, &packaged(), &Roots::default(), &Sink::silent(), LIMIT)
        .await;
    let calls = std::fs::read_to_string(world.folder.path().join("calls")).expect("called");
    assert!(ready.is_ok_and(|ready| ready.installed), "{calls}");
    assert_eq!(calls.matches("dpkg --configure -a").count(), 2, "{calls}");
    assert_eq!(calls.matches("nix-bin").count(), 2, "{calls}");
}

/// What is half installed may be there, and not run.
#[tokio::test]
async fn a_half_installed_nix_is_completed() {
    let world = World::new(true);
    let packages = world.folder.path().join("packages");
    std::fs::create_dir(&packages).expect("made");
    let status = |state: &str| {
        let text = format!("Package: nix-bin\nStatus: install ok {state}\n");
        std::fs::write(packages.join("status"), text).expect("written");
    };
    status("unpacked");
    world.nix("2.8.0", "", OPEN).await;
    let bin = world.folder.path().join("bin");
    std::fs::rename(bin.join("nix"), bin.join("whole")).expect("moved");
    world
        .script(
            "nix",
            "echo 'error while loading shared libraries' >&2; exit 127",
        )
        .await;
    world.script("dpkg", "exit 1").await;
    world
        .script(
            "apt-get",
            "cd \"${0%/*}\"; case \"$*\" in *-f*) mv whole nix;; esac",
        )
        .await;
    let ready = world.ready().await.expect("repaired");
    assert!(!ready.installed);
    // Where nothing was interrupted, no installer is started.
    status("installed");
    world.script("nix", "exit 127").await;
    world.script("apt-get", ": >\"${0%/*}/../called\"").await;
    assert!(matches!(world.fails().await, Error::Nix(_)));
    assert!(!world.folder.path().join("called").exists());
}

#[tokio::test]
async fn an_installation_that_fails_says_what_apt_said() {
    let world = World::new(true);
    world
        .script(
            "apt-get",
            "echo 'W: noise' >&2; echo 'E: Unable to locate package nix-bin' >&2; exit 100",
        )
        .await;
    let path = world.folder.path().join("bin").display().to_string();
    let env = Env::from_pairs([("PATH", path.as_str())]);
    let said = Arc::new(std::sync::Mutex::new(String::new()));
    let heard = Arc::clone(&said);
    let sink = Sink::new(move |event| {
        if let Progress::Note(text) | Progress::Degraded { text, .. } = event {
            heard.lock().expect("no panic").push_str(&text);
        }
    });
    let failed = world
        .host
        .ready(&env, &packaged(), &Roots::default(), &sink, LIMIT)
        .await;
    let error = failed.err().expect("no package");
    // The error has the cause, and the log need not have it twice.
    let said = said.lock().expect("no panic");
    assert!(!said.contains("Nix is not installed by"), "{said}");
    assert_eq!(
        error.to_string(),
        "Nix could not be installed: distro: `apt-get install nix-bin` failed: E: Unable to locate package nix-bin"
    );
}

#[tokio::test]
async fn without_nix_and_rights_the_hint_names_the_folder() {
    let world = World::new(false);
    let failed = world
        .host
        .ready(
            &Env::default(),
            &Wanted::default(),
            &Roots::default(),
            &Sink::silent(),
            LIMIT,
        )
        .await;
    let error = failed.err().expect("no rights");
    assert!(
        error.hint().is_some_and(|hint| hint.contains("install -d")),
        "{error}"
    );
}
