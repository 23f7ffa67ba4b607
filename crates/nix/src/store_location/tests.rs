//! What Nix 2.8.0, 2.26.3 and 2.34.8 print for each kind of store, and where that store is. Recorded from these
//! programs; only the temporary folders are the tests' own.

use flywheel_sys::runner::env::Env;

use super::*;

/// A world with a store at each root that the tests name.
struct World(tempfile::TempDir);

impl World {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("temporary folder"))
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Makes a store's folder and its database.
    fn store(&self, folder: &str, state: &str) -> StoreLocation {
        let (folder, state) = (self.at(folder), self.at(state));
        fs::create_dir_all(&folder).expect("made");
        fs::create_dir_all(state.join("db")).expect("made");
        fs::write(Db::file(&state), "").expect("written");
        let state = Some(state);
        StoreLocation { folder, state }
    }
}

fn nix(variables: &[(&str, &Path)]) -> Nix {
    let pairs = variables
        .iter()
        .map(|(name, value)| (*name, value.to_str().expect("text")));
    Nix::unversioned(Path::new("/usr/bin/nix"), &Env::from_pairs(pairs))
}

fn find(world: &World, opened: &str, setting: &str) -> Result<StoreLocation, Unwatched> {
    let root = world.0.path().display().to_string();
    let own = |text: &str| text.replace("ROOT", &root);
    locate(&nix(&[]), &own(opened), &own(setting))
}

#[test]
fn a_root_is_found_however_it_is_named_and_printed() {
    let world = World::new();
    let store = world.store("r/nix/store", "r/nix/var/nix");
    for (opened, setting) in [
        // `NIX_REMOTE=ROOT/r` and `store = ROOT/r`, in 2.8 and 2.26.
        ("local", "ROOT/r"),
        // The same in 2.34; 2.26 takes it as well.
        ("local", "local://ROOT/r"),
        // `NIX_REMOTE=local?root=ROOT/r`, in 2.8 and 2.26, then in 2.34.
        ("local", "local?root=ROOT/r"),
        ("local://?root=ROOT/r", "local://?root=ROOT/r"),
        ("local", "local://?root=ROOT/r"),
        ("local", "auto?root=ROOT/r"),
    ] {
        assert_eq!(
            find(&world, opened, setting),
            Ok(store.clone()),
            "{setting}"
        );
    }
}

#[test]
fn a_root_with_a_blank_is_printed_in_two_ways() {
    let world = World::new();
    let store = world.store("a b/nix/store", "a b/nix/var/nix");
    assert_eq!(find(&world, "local", "ROOT/a b"), Ok(store.clone()));
    assert_eq!(find(&world, "local", "local://ROOT/a%20b"), Ok(store));
}

#[test]
fn folder_and_state_may_be_apart() {
    let world = World::new();
    let store = world.store("re", "st");
    let settings = [
        "local?root=ROOT/r&state=ROOT/st&real=ROOT/re",
        "local://?real=ROOT/re&root=ROOT/r&state=ROOT/st",
        "local?state=ROOT/st&real=ROOT/re",
    ];
    for setting in settings {
        assert_eq!(
            find(&world, "local", setting),
            Ok(store.clone()),
            "{setting}"
        );
    }
}

#[test]
fn a_state_folder_without_a_database_is_not_the_stores() {
    let world = World::new();
    fs::create_dir_all(world.at("r/nix/store")).expect("made");
    let found = find(&world, "local", "ROOT/r").expect("its folder is there");
    assert_eq!(found.state, None);
}

#[test]
fn a_store_without_files_here_is_named() {
    let world = World::new();
    for (opened, setting) in [
        ("ssh://user@host.example", "ssh://user@host.example"),
        // 2.26 leaves the host out of what it prints.
        ("ssh-ng://", "ssh-ng://host.example"),
        (
            "ssh-ng://host.example",
            "ssh-ng://host.example?remote-store=x",
        ),
        (
            "https://user:pw@host.example/a",
            "https://user:pw@host.example/a?token=secret",
        ),
    ] {
        let Err(Unwatched::Remote(named)) = find(&world, opened, setting) else {
            panic!("{setting}");
        };
        assert!(named.contains("host.example"), "{named}");
        assert!(
            !named.contains("pw") && !named.contains("secret"),
            "{named}"
        );
    }
    for setting in ["dummy://", "file:///tmp/cache", "local-overlay://?root=/x"] {
        let found = find(&world, setting, setting);
        assert!(matches!(found, Err(Unwatched::Remote(_))), "{setting}");
    }
    let missing = find(&world, "local", "ROOT/none");
    assert_eq!(missing, Err(Unwatched::Missing(world.at("none/nix/store"))));
}

#[test]
fn another_prefix_is_named() {
    let world = World::new();
    world.store("r/nix/store", "r/nix/var/nix");
    let prefix = Path::new("/home/u/nix/store");
    let setting = world.at("r").display().to_string();
    for name in ["NIX_STORE_DIR", "NIX_STORE"] {
        let found = locate(&nix(&[(name, prefix)]), "local", &setting);
        assert_eq!(found, Err(Unwatched::Prefix(prefix.into())));
    }
    // The usual folder in other words is no other prefix.
    let usual = nix(&[("NIX_STORE_DIR", Path::new("/nix//store/."))]);
    assert!(locate(&usual, "local", &setting).is_ok());
}

#[test]
fn the_usual_state_is_that_of_the_daemon_at_the_usual_socket() {
    let world = World::new();
    let (folder, state) = (world.at("re"), world.at("st"));
    world.store("re", "st");
    let real = format!("real={}", folder.display());
    let usual = socket_of(&state);
    fs::create_dir_all(usual.parent().expect("has one")).expect("made");
    fs::write(&usual, "").expect("written");
    std::os::unix::fs::symlink(&usual, world.at("link")).expect("linked");
    let socket = |path: &Path| format!("unix://{}?{real}", path.display());
    let own = nix(&[("NIX_STATE_DIR", &state)]);
    // 2.8 prints the URL as it was given, 2.26 and 2.34 `daemon`.
    for setting in [
        format!("daemon?{real}"),
        format!("unix://?{real}"),
        socket(&usual),
        socket(&world.at("link")),
    ] {
        let found = locate(&own, "daemon", &setting).expect("it is here");
        assert_eq!(found.state, Some(state.clone()), "{setting}");
    }
    // Any store may be behind another socket.
    let other = locate(&own, "unix:///x", &socket(&world.at("other"))).expect("it is here");
    assert_eq!(other.state, None);
    let elsewhere = nix(&[
        ("NIX_STATE_DIR", &state),
        ("NIX_DAEMON_SOCKET_PATH", &world.at("other")),
    ]);
    let setting = format!("daemon?{real}");
    assert_eq!(
        locate(&elsewhere, "daemon", &setting)
            .expect("it is here")
            .state,
        None
    );
    let linked = nix(&[
        ("NIX_STATE_DIR", &state),
        ("NIX_DAEMON_SOCKET_PATH", &world.at("link")),
    ]);
    let found = locate(&linked, "daemon", &setting).expect("it is here");
    assert_eq!(found.state, Some(state));
}

#[test]
fn a_daemon_may_say_where_its_root_is() {
    let world = World::new();
    let store = world.store("r/nix/store", "r/nix/var/nix");
    let setting = "unix://ROOT/socket?root=ROOT/r";
    assert_eq!(find(&world, "unix://ROOT/socket", setting), Ok(store));
}

#[test]
fn the_jobs_own_store_is_known_by_each_of_its_names() {
    let world = World::new();
    let own = world.store("r/nix/store", "r/nix/var/nix");
    let root = world.at("r").display().to_string();
    let is_same = |named: &str| is_same_store(&nix(&[]), &own, named, world.0.path());
    for named in [
        root.clone(),
        format!("{root}/"),
        format!("local?root={root}"),
        format!("local://{root}"),
        "./r".to_owned(),
        "./x/../r".to_owned(),
    ] {
        assert!(is_same(&named), "{named}");
    }
    for named in ["./other", "daemon", "local", "ssh-ng://host", "$PWD/r"] {
        assert!(!is_same(named), "{named}");
    }
    let usual = StoreLocation {
        folder: STORE_DIR.into(),
        state: Some(STATE_DIR.into()),
    };
    for named in [
        "",
        "auto",
        "daemon",
        "local",
        "unix:///nix/var/nix/daemon-socket/socket",
    ] {
        let is_same = is_same_store(&nix(&[]), &usual, named, Path::new("/x"));
        assert!(is_same, "{named}");
    }
}

#[test]
fn percent_signs_that_encode_nothing_stay() {
    for (text, plain) in [
        ("a%20b", "a b"),
        ("100%", "100%"),
        ("%zz%4", "%zz%4"),
        ("%2F", "/"),
    ] {
        assert_eq!(decoded(text), plain);
    }
}
