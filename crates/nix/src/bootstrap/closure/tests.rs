//! Installing from a server of plain files, with a script for Nix. Real caches and a real Nix are in `tests/real/install`.

mod server;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use flywheel_testing::nar_strings;
use sha2::{Digest as _, Sha256 as Hasher};
use tempfile::TempDir;

use self::server::{Answer, Server};
use super::manifest::Manifest;
use super::*;
use crate::db::Db;
use crate::hash::Sha256;
use crate::key::SecretKey;
use crate::path_info::fingerprint;

const LIMIT: Duration = Duration::from_secs(60);
const NIX: &str = "3zc6lr3rxv7sljj2gsxigvkpkm3d9dmr-nix-2.99";
const LIBRARY: &str = "0g1fw1hyk0jjcfi1cjbxvh6g1s6m3r7k-library";
const DATA: &str = "9zc6lr3rxv7sljj2gsxigvkpkm3d9dma-data";
/// Keeps what it is given; the folder of the database is what the real one makes.
const LOAD: &str = "mkdir -p $NIX_STATE_DIR/db && cat > $NIX_STATE_DIR/loaded";

fn store_path(name: &str) -> StorePath {
    StorePath::from_base_name(name).expect("valid")
}

fn text_nar(text: &str) -> Vec<u8> {
    nar_strings(&[
        "nix-archive-1",
        "(",
        "type",
        "regular",
        "contents",
        text,
        ")",
    ])
}

/// A folder `bin` with `nix`, and `nix-store` that runs `load`.
fn nix_nar(load: &str) -> Vec<u8> {
    let script = format!("#!/bin/sh\n{load}\n");
    let mut words = vec!["nix-archive-1", "(", "type", "directory", "entry", "("];
    words.extend(["name", "bin", "node", "(", "type", "directory"]);
    for (name, text) in [("nix", "#!/bin/sh\n"), ("nix-store", &script)] {
        words.extend(["entry", "(", "name", name, "node", "(", "type", "regular"]);
        words.extend(["executable", "", "contents", text, ")", ")"]);
    }
    words.extend([")", ")", ")"]);
    nar_strings(&words)
}

fn pack(nar: &[u8], compression: &str) -> Vec<u8> {
    match compression {
        "zstd" => zstd::encode_all(nar, 3).expect("memory"),
        "xz" => {
            let mut packed = Vec::new();
            let mut encoder = liblzma::read::XzEncoder::new(nar, 1);
            encoder.read_to_end(&mut packed).expect("memory");
            packed
        }
        _ => nar.to_vec(),
    }
}

/// A cache with a closure of three paths, and a folder to install below.
struct World {
    key: SecretKey,
    answers: BTreeMap<String, Answer>,
    folder: TempDir,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            key: SecretKey::generate("test-1").expect("random"),
            answers: BTreeMap::new(),
            folder: tempfile::tempdir().expect("temporary folder"),
        };
        world.add(NIX, &nix_nar(LOAD), &[LIBRARY, NIX], "zstd");
        world.add(LIBRARY, &text_nar(&"library".repeat(9000)), &[DATA], "xz");
        world.add(DATA, &text_nar("data"), &[], "none");
        world
    }

    fn add(&mut self, name: &str, nar: &[u8], references: &[&str], compression: &str) {
        let body = pack(nar, compression);
        let digest = |bytes: &[u8]| Sha256(Hasher::digest(bytes).into());
        let mut info = NarInfo {
            path: store_path(name),
            url: format!("nar/{name}?hash=x"),
            compression: compression.to_owned(),
            file_hash: Some(digest(&body)),
            file_size: Some(body.len() as u64),
            nar_hash: digest(nar),
            nar_size: nar.len() as u64,
            references: references.iter().map(|name| store_path(name)).collect(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
        };
        self.sign(&mut info);
        self.answers
            .insert(format!("/cache/{}", info.url), Answer::Body(body));
        self.answers.insert(Self::info_url(name), info.into());
    }

    fn sign(&self, info: &mut NarInfo) {
        let text = fingerprint(&info.path, &info.nar_hash, info.nar_size, &info.references);
        info.signatures = vec![self.key.sign(&text)];
    }

    fn info_url(name: &str) -> String {
        format!("/cache/{}.narinfo", store_path(name).hash())
    }

    fn body_url(name: &str) -> String {
        format!("/cache/nar/{name}?hash=x")
    }

    /// Changes a narinfo, which is signed anew.
    fn change(&mut self, name: &str, change: impl FnOnce(&mut NarInfo)) {
        let text = self.answers[&Self::info_url(name)].text();
        let mut info = NarInfo::parse(&text).expect("valid");
        change(&mut info);
        self.sign(&mut info);
        self.answers.insert(Self::info_url(name), info.into());
    }

    fn nix(&self) -> PathBuf {
        self.folder.path().join("nix")
    }

    fn store(&self, name: &str) -> PathBuf {
        self.nix().join("store").join(name)
    }

    fn source(&self, server: &Server) -> ClosureSource {
        ClosureSource {
            address: format!("{}/cache?priority=10", server.url)
                .parse()
                .expect("URL"),
            keys: vec![self.key.public()],
            path: store_path(NIX),
            roots: Roots::default(),
        }
    }

    async fn install(&self, server: &Server) -> Result<Installed, Error> {
        let deadline = Instant::now() + LIMIT;
        install(&self.source(server), &self.nix(), &Sink::silent(), deadline).await
    }

    /// Installs, which has to fail; the message with its causes.
    async fn fail(&self) -> String {
        let server = Server::start(self.answers.clone());
        let error = self.install(&server).await.expect_err("it cannot succeed");
        let source = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", source.unwrap_or_default())
    }

    /// All that is below a folder, with the modes.
    fn tree(&self) -> Vec<(PathBuf, u32)> {
        fn walk(folder: &Path, found: &mut Vec<(PathBuf, u32)>) {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let facts = entry.metadata().expect("it is there");
                found.push((entry.path(), facts.mode()));
                if facts.is_dir() {
                    walk(&entry.path(), found);
                }
            }
        }
        let mut found = Vec::new();
        walk(self.folder.path(), &mut found);
        found.sort();
        found
    }
}

#[tokio::test]
async fn a_closure_is_fetched_put_in_its_place_and_registered() {
    let world = World::new();
    let server = Server::start(world.answers.clone());
    let installed = world.install(&server).await.expect("all is well");
    assert_eq!(installed.program, world.store(NIX).join("bin/nix"));
    let parts: Vec<_> = installed.parts.iter().map(|(name, _)| *name).collect();
    assert_eq!(parts, ["fetch", "unpack", "register"]);
    assert_eq!(
        fs::read_to_string(world.store(DATA)).expect("there"),
        "data"
    );
    for (name, mode) in [
        (NIX, 0o40555),
        (LIBRARY, 0o100_444),
        (&format!("{NIX}/bin/nix"), 0o100_555),
    ] {
        let facts = fs::symlink_metadata(world.store(name)).expect("there");
        assert_eq!((facts.mode(), facts.mtime()), (mode, 1), "{name}");
    }
    let loaded = fs::read_to_string(world.nix().join("var/nix/loaded")).expect("loaded");
    let nar = text_nar("data");
    let hash = Sha256(Hasher::digest(&nar).into()).base16();
    let data = format!("/nix/store/{DATA}\n{hash}\n{}\n\n0\n", nar.len());
    assert!(loaded.contains(&data), "{loaded}");
    let references = format!("\n2\n/nix/store/{LIBRARY}\n/nix/store/{NIX}\n");
    assert!(loaded.contains(&references), "{loaded}");
    let manifest = Manifest::read(&world.nix()).expect("valid").expect("there");
    assert!(manifest.complete);
    assert_eq!(manifest.paths.len(), 3);
    for link in ["default", "flywheel"] {
        let link = world.nix().join("var/nix/profiles").join(link);
        assert!(manifest.links.contains(&link));
        assert_eq!(fs::read_link(link).expect("a link"), world.store(NIX));
    }
    assert!(manifest.folders.contains(&world.nix().join("store")));
    let names = |folder: &str| {
        let entries = fs::read_dir(world.nix().join(folder)).expect("there");
        entries.flatten().count()
    };
    assert_eq!(
        (names(""), names("store"), names("var/flywheel")),
        (2, 3, 1)
    );
    // What is there is neither fetched nor touched again.
    let (before, asked) = (world.tree(), server.requests().len());
    let again = world.install(&server).await.expect("all is well");
    assert_eq!((again.program, again.parts), (installed.program, vec![]));
    assert!(world.tree() == before && server.requests().len() <= asked + 1);
}

type Change = Box<dyn Fn(&mut World)>;

/// Another answer to a URL.
fn set(url: String, answer: Answer) -> Change {
    Box::new(move |world| {
        world.answers.insert(url.clone(), answer.clone());
    })
}

/// Another narinfo, with a good signature.
fn change(name: &'static str, change: fn(&mut NarInfo)) -> Change {
    Box::new(move |world| world.change(name, change))
}

/// What a server can answer, with words of the error.
fn wrong_answers() -> Vec<(&'static str, Change)> {
    let (info, body) = (World::info_url, World::body_url);
    let other = World::new().answers[&info(DATA)].clone();
    vec![
        ("does not have", set(info(NIX), Answer::Status(404))),
        ("does not have", set(info(DATA), Answer::Status(403))),
        ("HTTP status 404", set(body(DATA), Answer::Status(404))),
        (
            "no usable description",
            set(info(NIX), Answer::Body(b"<html>".to_vec())),
        ),
        (
            "more than 262144 bytes",
            set(info(DATA), Answer::Body(vec![b'x'; 300_000])),
        ),
        (
            "is not what was signed: its hash is",
            set(body(DATA), Answer::Body(text_nar("dbta"))),
        ),
        (
            "it ends after",
            set(body(LIBRARY), Answer::Body(pack(b"x", "xz"))),
        ),
        (
            "it is served with more than",
            set(body(DATA), Answer::Body(text_nar("data and more"))),
        ),
        ("the description of", set(info(NIX), other)),
    ]
}

/// What a cache can have signed, with words of the error.
fn wrong_descriptions() -> Vec<(&'static str, Change)> {
    vec![
        (
            "cannot be unpacked",
            change(DATA, |info| info.compression = "zstd".into()),
        ),
        (
            "`bzip2`, which is not unpacked",
            change(DATA, |info| info.compression = "bzip2".into()),
        ),
        (
            "instead of sha256:",
            change(DATA, |info| info.nar_hash = Sha256([7; 32])),
        ),
        ("bytes instead of", change(DATA, |info| info.nar_size += 8)),
        ("has more than", change(DATA, |info| info.nar_size -= 8)),
        ("larger than", change(DATA, |info| info.nar_size = 1 << 40)),
        (
            "of the kind `file`",
            change(DATA, |info| info.url = "file:///etc/passwd".into()),
        ),
    ]
}

/// What takes more than one change.
fn wrong_contents() -> Vec<(&'static str, Change)> {
    let forged: Change = Box::new(|world| {
        let text = world.answers[&World::info_url(DATA)].text();
        let mut info = NarInfo::parse(&text).expect("valid");
        let signed = fingerprint(&info.path, &info.nar_hash, info.nar_size, &info.references);
        let other = SecretKey::generate("test-1").expect("random");
        info.signatures = vec![other.sign(&signed)];
        world.answers.insert(World::info_url(DATA), info.into());
    });
    let no_nar: Change = Box::new(|world| {
        let words = [
            "nix-archive-1",
            "(",
            "type",
            "directory",
            "entry",
            "(",
            "name",
            "..",
        ];
        world.add(DATA, &nar_strings(&words), &[], "none");
    });
    let no_nix: Change = Box::new(|world| {
        let load = "mkdir -p $NIX_STATE_DIR/db; echo error: broken >&2; exit 3";
        world.add(NIX, &nix_nar(load), &[LIBRARY, NIX], "zstd");
    });
    vec![
        ("no valid signature by `test-1`", forged),
        ("it is no NAR", no_nar),
        (
            "`nix-store --load-db` ended with exit status: 3: broken",
            no_nix,
        ),
    ]
}

#[tokio::test]
async fn whatever_is_wrong_is_named_and_nothing_is_left() {
    let cases = [wrong_answers(), wrong_descriptions(), wrong_contents()];
    for (words, change) in cases.into_iter().flatten() {
        let mut world = World::new();
        change(&mut world);
        let message = world.fail().await;
        assert!(message.contains(words), "{words}: {message}");
        assert_eq!(world.tree(), [], "{words}");
    }
}

#[tokio::test]
async fn a_server_that_is_busy_or_redirects_is_borne_with() {
    let mut world = World::new();
    let (info, body) = (World::info_url(DATA), World::body_url(DATA));
    for (url, moved) in [(info, "/elsewhere/info?a=b"), (body, "/elsewhere/nar?a=b")] {
        let answer = world.answers[&url].clone();
        world
            .answers
            .insert(moved.to_owned(), Answer::Busy(1, answer.into()));
        world.answers.insert(url, Answer::Moved(moved.to_owned()));
    }
    let body = World::body_url(LIBRARY);
    let answer = world.answers[&body].clone();
    world.answers.insert(body, Answer::Cut(1, answer.into()));
    let server = Server::start(world.answers.clone());
    world.install(&server).await.expect("the second try");
    // A loop of redirects ends.
    let mut world = World::new();
    let body = World::body_url(DATA);
    world.answers.insert(body.clone(), Answer::Moved(body));
    let message = world.fail().await;
    assert!(message.contains("redirects more than 5 times"), "{message}");
}

#[tokio::test]
async fn a_cache_that_does_not_answer_is_given_up_soon() {
    let mut world = World::new();
    world.answers.insert(World::info_url(NIX), Answer::Silence);
    let began = Instant::now();
    let message = world.fail().await;
    assert!(message.contains("nothing came for 3 s"), "{message}");
    assert!(began.elapsed() < fetch::FIRST_CONTACT * 2);
    assert_eq!(world.tree(), []);
}

#[tokio::test]
async fn a_deadline_ends_it() {
    let mut world = World::new();
    world.answers.insert(World::body_url(DATA), Answer::Silence);
    let server = Server::start(world.answers.clone());
    let deadline = Instant::now() + Duration::from_millis(500);
    let ended = install(
        &world.source(&server),
        &world.nix(),
        &Sink::silent(),
        deadline,
    )
    .await;
    assert!(matches!(ended, Err(Error::Deadline { .. })), "{ended:?}");
    assert_eq!(world.tree(), []);
}

#[tokio::test]
async fn of_two_jobs_at_once_the_second_finds_what_the_first_has_installed() {
    let world = World::new();
    let server = Server::start(world.answers.clone());
    let (one, other) = tokio::join!(world.install(&server), world.install(&server));
    let (one, other) = (one.expect("installed"), other.expect("found"));
    assert_eq!(one.program, other.program);
    assert_ne!(one.parts.is_empty(), other.parts.is_empty());
    let bodies = server.requests();
    let bodies = bodies.iter().filter(|url| url.contains("/nar/"));
    assert_eq!(bodies.count(), 3, "each once");
}

#[tokio::test]
async fn what_is_in_the_store_is_respected() {
    let world = World::new();
    let server = Server::start(world.answers.clone());
    // There without a database: of the same content it is kept, of another one it is somebody's.
    fs::create_dir_all(world.nix().join("store")).expect("made");
    fs::write(world.store(DATA), "data").expect("written");
    fs::write(world.store(LIBRARY), "mine").expect("written");
    let before = world.tree();
    let error = world.install(&server).await.expect_err("occupied");
    assert!(
        error.is_of_host() && error.to_string().contains(LIBRARY),
        "{error}"
    );
    assert_eq!(world.tree(), before);
    // Valid: it is kept whatever it is. Not valid: it is garbage.
    fs::create_dir_all(world.nix().join("var/nix/db")).expect("made");
    let database = rusqlite::Connection::open(Db::file(&world.nix().join("var/nix")));
    let database = database.expect("opened");
    let tables = "create table ValidPaths (id integer primary key autoincrement not null, path text unique not null)";
    database.execute_batch(tables).expect("made");
    let insert = "insert into ValidPaths (path) values (?1)";
    let path = format!("/nix/store/{DATA}");
    database.execute(insert, [path]).expect("added");
    fs::write(world.store(DATA), "its own").expect("written");
    // Unless another user can have written it.
    let mode = |mode| {
        let mode = fs::Permissions::from_mode(mode);
        fs::set_permissions(world.store(DATA), mode).expect("ours");
    };
    mode(0o666);
    let error = world.install(&server).await.expect_err("anybody's");
    assert!(error.to_string().contains("another user"), "{error}");
    mode(0o444);
    world.install(&server).await.expect("there is room");
    assert_eq!(
        fs::read_to_string(world.store(DATA)).expect("there"),
        "its own"
    );
    assert!(
        fs::read_to_string(world.store(LIBRARY))
            .expect("there")
            .starts_with("library")
    );
    let loaded = fs::read_to_string(world.nix().join("var/nix/loaded")).expect("loaded");
    let hash = Sha256(Hasher::digest(text_nar("data")).into()).base16();
    assert!(!loaded.contains(&hash), "it is registered already");
    let manifest = Manifest::read(&world.nix()).expect("valid").expect("there");
    assert_eq!(manifest.paths, [store_path(LIBRARY), store_path(NIX)]);
    assert!(!manifest.folders.contains(&world.nix().join("store")));
}

#[tokio::test]
async fn what_a_killed_installation_left_goes() {
    let world = World::new();
    let server = Server::start(world.answers.clone());
    let nix = world.nix();
    let old = "8zc6lr3rxv7sljj2gsxigvkpkm3d9dmx-nix-1.0";
    for folder in [
        "store.partial/x",
        "store/.flywheel-partial/y",
        "var/flywheel",
    ] {
        fs::create_dir_all(nix.join(folder)).expect("made");
    }
    fs::create_dir_all(world.store(old).join("bin")).expect("made");
    fs::write(world.store(DATA), "half").expect("written");
    fs::set_permissions(world.store(old), fs::Permissions::from_mode(0o555)).expect("ours");
    fs::write(nix.join("var/flywheel/registration"), "x").expect("written");
    let mut manifest = Manifest::new();
    manifest.paths = vec![store_path(old), store_path(DATA)];
    manifest.folders = vec![nix.clone(), nix.join("store")];
    manifest.write(&nix).expect("written");
    world.install(&server).await.expect("it starts clean");
    assert_eq!(
        fs::read_to_string(world.store(DATA)).expect("there"),
        "data"
    );
    let names = |folder: &str| fs::read_dir(nix.join(folder)).expect("there").count();
    assert_eq!(
        (names(""), names("store"), names("var/flywheel")),
        (2, 3, 1)
    );
    let manifest = Manifest::read(&nix).expect("valid").expect("there");
    assert!(manifest.folders.contains(&nix));
    assert!(manifest.folders.contains(&nix.join("store")), "still ours");
}

#[tokio::test]
async fn what_another_user_could_have_written_is_not_believed() {
    let world = World::new();
    let server = Server::start(world.answers.clone());
    let own = world.nix().join("var/flywheel");
    fs::create_dir_all(&own).expect("made");
    fs::write(own.join("installed.json"), "{}").expect("written");
    fs::set_permissions(
        own.join("installed.json"),
        fs::Permissions::from_mode(0o666),
    )
    .expect("ours");
    let error = world
        .install(&server)
        .await
        .expect_err("a foreign manifest");
    assert!(
        error.to_string().contains("can be written by other users"),
        "{error}"
    );
    // A folder of another place is not used as the lock.
    fs::remove_dir_all(&own).expect("ours");
    std::os::unix::fs::symlink("/tmp", &own).expect("made");
    let error = world.install(&server).await.expect_err("a link");
    assert!(error.is_of_host(), "{error}");
}
