//! Archives as upstream makes them, and damaged ones, with a script for Nix.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use sha2::{Digest as _, Sha256 as Hasher};
use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

use super::*;
use crate::bootstrap::closure::Manifest;
use crate::hash::Sha256;

const LIMIT: Duration = Duration::from_secs(60);
const NIX: &str = "3zc6lr3rxv7sljj2gsxigvkpkm3d9dmr-nix-2.99.1";
const LIBRARY: &str = "0g1fw1hyk0jjcfi1cjbxvh6g1s6m3r7k-library";
/// Keeps what it is given; the folder of the database is what the real one makes.
const LOAD: &str = "#!/bin/sh\nmkdir -p $NIX_STATE_DIR/db && cat > $NIX_STATE_DIR/loaded\n";

/// An archive in the making. Every name begins in the archive's own folder.
struct Tar(Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    /// One with all that a release has.
    fn whole() -> Self {
        let mut tar = Self::new();
        let script = format!("store/{NIX}/bin/nix-store");
        tar.file("install", 0o755, "#!/bin/sh\n")
            .reginfo(&[NIX, LIBRARY]);
        tar.folder(&format!("store/{LIBRARY}")).file(
            &format!("store/{LIBRARY}/lib.so"),
            0o644,
            "library",
        );
        tar.folder(&format!("store/{NIX}"))
            .folder(&format!("store/{NIX}/bin"));
        tar.file(&script, 0o755, LOAD)
            .link(&format!("store/{NIX}/bin/nix"), "nix-store");
        tar
    }

    fn entry(&mut self, kind: EntryType, name: &str, mode: u32, text: &str) -> &mut Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(if kind == EntryType::Regular {
            text.len() as u64
        } else {
            0
        });
        // `set_path` would refuse what a hostile archive has.
        let name = format!("nix-2.99.1/{name}");
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        if kind == EntryType::Symlink {
            header.set_link_name(text).expect("short");
        }
        header.set_cksum();
        let content = if kind == EntryType::Regular { text } else { "" };
        self.0.append(&header, content.as_bytes()).expect("memory");
        self
    }

    fn file(&mut self, name: &str, mode: u32, text: &str) -> &mut Self {
        self.entry(EntryType::Regular, name, mode, text)
    }

    fn folder(&mut self, name: &str) -> &mut Self {
        self.entry(EntryType::Directory, name, 0o755, "")
    }

    /// A folder whose name is too long for the header.
    fn long_folder(&mut self, name: &str) -> &mut Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Directory);
        header.set_mode(0o755);
        header.set_size(0);
        let name = format!("nix-2.99.1/{name}");
        let added = self.0.append_data(&mut header, name, &[][..]);
        added.expect("memory");
        self
    }

    fn link(&mut self, name: &str, target: &str) -> &mut Self {
        self.entry(EntryType::Symlink, name, 0o777, target)
    }

    fn reginfo(&mut self, names: &[&str]) -> &mut Self {
        let hash = Sha256(Hasher::digest(b"").into()).base32();
        let lines = names
            .iter()
            .map(|name| format!("/nix/store/{name}\nsha256:{hash}\n7\n\n0\n"));
        let text: String = lines.collect();
        self.file(".reginfo", 0o644, &text)
    }

    fn packed(self) -> Vec<u8> {
        let tar = self.0.into_inner().expect("memory");
        let mut packed = Vec::new();
        let mut encoder = liblzma::read::XzEncoder::new(tar.as_slice(), 1);
        encoder.read_to_end(&mut packed).expect("memory");
        packed
    }
}

/// A folder with an archive, and a `nix` to install below.
struct World {
    folder: TempDir,
}

impl World {
    fn new(archive: &[u8]) -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        let world = Self { folder };
        fs::write(world.archive(), archive).expect("written");
        world
    }

    fn archive(&self) -> PathBuf {
        self.folder.path().join(archive_name("2.99.1"))
    }

    fn nix(&self) -> PathBuf {
        self.folder.path().join("nix")
    }

    /// Writes the sum beside the archive, as upstream does.
    fn sum(&self, sum: &str) {
        let Place::File(file) = Place::File(self.archive()).sum() else {
            panic!("beside a file");
        };
        fs::write(file, format!("{sum}\n")).expect("written");
    }

    async fn install(&self, mirror: Mirror) -> Result<Parts, Error> {
        self.install_version("2.99.1", mirror).await
    }

    async fn install_version(&self, version: &str, mirror: Mirror) -> Result<Parts, Error> {
        let source = ArchiveSource {
            takes_unknown: true,
            mirror: Some(&mirror),
            version: Some(version),
            roots: &Roots::default(),
        };
        let deadline = Instant::now() + LIMIT;
        install(&source, &self.nix(), &Sink::silent(), deadline).await
    }

    /// Fails, and leaves nothing.
    async fn fails(&self) -> String {
        let error = self
            .install(Mirror::Path(self.archive()))
            .await
            .expect_err("damaged");
        assert!(!self.nix().exists(), "{error}");
        error.to_string()
    }
}

fn sum(bytes: &[u8]) -> String {
    Sha256(Hasher::digest(bytes).into()).base16()
}

#[tokio::test]
async fn an_archive_of_a_folder_gets_its_place_and_is_registered() {
    let packed = Tar::whole().packed();
    let world = World::new(&packed);
    world.sum(&sum(&packed).to_uppercase());
    let parts = world
        .install(Mirror::Path(world.folder.path().to_owned()))
        .await
        .expect("whole");
    assert_eq!(parts.len(), 2);
    let file = |name: &str| world.nix().join("store").join(name);
    for (name, mode) in [
        (LIBRARY.to_owned(), 0o555),
        (format!("{LIBRARY}/lib.so"), 0o444),
        (format!("{NIX}/bin"), 0o555),
        (format!("{NIX}/bin/nix-store"), 0o555),
    ] {
        let facts = fs::symlink_metadata(file(&name)).expect("there");
        assert_eq!(
            (facts.permissions().mode() & 0o777, facts.mtime()),
            (mode, 1),
            "{name}"
        );
    }
    let loaded = fs::read_to_string(world.nix().join("var/nix/loaded")).expect("registered");
    assert!(loaded.contains(NIX) && loaded.contains(LIBRARY), "{loaded}");
    let profile = fs::canonicalize(world.nix().join("var/nix/profiles/default")).expect("linked");
    assert_eq!(profile, file(NIX));
    let manifest = Manifest::read(&world.nix())
        .expect("readable")
        .expect("there");
    assert_eq!((manifest.complete, manifest.paths.len()), (true, 2));
}

#[tokio::test]
async fn an_archive_that_is_not_what_its_sum_says_leaves_nothing() {
    let world = World::new(&Tar::whole().packed());
    world.sum(&sum(b"another"));
    assert!(world.fails().await.contains("instead of"));
    world.sum("no sum");
    assert!(world.fails().await.contains("no sum"));
}

#[tokio::test]
async fn a_named_archive_of_another_version_leaves_nothing() {
    let world = World::new(&Tar::whole().packed());
    let named = || Mirror::Path(world.archive());
    let error = world.install_version("2.98.0", named()).await;
    let error = error.expect_err("2.99.1").to_string();
    assert!(
        error.contains("is Nix 2.99.1, and `nix-version` asks for 2.98.0"),
        "{error}"
    );
    assert!(!world.nix().exists());
    world
        .install_version("2.99", named())
        .await
        .expect("of that series");
}

#[tokio::test]
async fn a_damaged_archive_leaves_nothing() {
    let whole = Tar::whole().packed();
    let cut = World::new(&whole[..whole.len() / 2]);
    cut.fails().await;
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    World::new(&damaged).fails().await;
    assert!(
        World::new(b"<html>")
            .fails()
            .await
            .contains("no release archive")
    );
    let mut without = Tar::new();
    without.folder(&format!("store/{LIBRARY}"));
    assert!(
        World::new(&without.packed())
            .fails()
            .await
            .contains(".reginfo")
    );
    let mut deep = Tar::new();
    let mut name = format!("store/{LIBRARY}");
    for _ in 0..300 {
        deep.long_folder(&name);
        name += "/d";
    }
    assert!(World::new(&deep.packed()).fails().await.contains("nested"));
    let mut undescribed = Tar::whole();
    undescribed.folder("store/9zc6lr3rxv7sljj2gsxigvkpkm3d9dma-data");
    assert!(
        World::new(&undescribed.packed())
            .fails()
            .await
            .contains("other paths")
    );
}

/// Nothing is written outside of the staging folder. The names are of this test's own folder.
#[tokio::test]
async fn an_entry_that_leads_elsewhere_is_refused() {
    type Change = fn(&mut Tar, &str);
    let changes: [(Change, &str); 5] = [
        (
            |tar, _| {
                tar.file("store/../../leak", 0o644, "x");
            },
            "leads out",
        ),
        (
            |tar, outside| {
                tar.folder(&format!("store/{LIBRARY}"))
                    .link(&format!("store/{LIBRARY}/way"), outside)
                    .file(&format!("store/{LIBRARY}/way/leak"), 0o644, "x");
            },
            "before its folder",
        ),
        (
            |tar, _| {
                tar.file("store/name/leak", 0o644, "x");
            },
            "no store path",
        ),
        (
            |tar, _| {
                tar.folder(&format!("store/{LIBRARY}"))
                    .folder(&format!("store/{LIBRARY}"));
            },
            "twice",
        ),
        (
            |tar, _| {
                tar.folder(&format!("store/{LIBRARY}")).entry(
                    EntryType::Fifo,
                    &format!("store/{LIBRARY}/pipe"),
                    0o644,
                    "",
                );
            },
            "of the kind",
        ),
    ];
    for (change, expected) in changes {
        let outside = tempfile::tempdir().expect("temporary folder");
        let mut tar = Tar::new();
        change(&mut tar, &outside.path().display().to_string());
        let world = World::new(&tar.packed());
        let problem = world.fails().await;
        assert!(problem.contains(expected), "{problem}");
        assert_eq!(fs::read_dir(outside.path()).expect("there").count(), 0);
        assert!(!world.folder.path().join("leak").exists());
    }
}

#[tokio::test]
async fn what_cannot_be_had_is_named_within_seconds() {
    let world = World::new(b"");
    let begun = Instant::now();
    let missing = world
        .install(Mirror::Path("/nonexistent/nix".into()))
        .await
        .expect_err("no file");
    assert!(
        missing.to_string().contains("/nonexistent/nix"),
        "{missing}"
    );
    // Once this listener is dropped, connections to its port are refused.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    drop(listener);
    let mirror = |text: String| Mirror::Url(text.parse().expect("a URL"));
    let dead = world
        .install(mirror(format!("http://{address}/nix/")))
        .await
        .expect_err("nobody");
    assert!(
        dead.to_string().contains("/nix/nix-2.99.1/nix-2.99.1-"),
        "{dead}"
    );
    let plain = world
        .install(mirror("http://mirror.example/nix/".into()))
        .await
        .expect_err("no TLS");
    assert!(matches!(plain, Error::Unverified(_)), "{plain}");
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    assert!(!world.nix().exists());
}

#[tokio::test]
async fn an_archive_comes_over_http_as_well() {
    let packed = Tar::whole().packed();
    let sum = sum(&packed);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let serving = std::thread::spawn(move || {
        for body in [sum.into_bytes(), packed] {
            let (mut connection, _) = listener.accept().expect("a client");
            let mut head = [0; 4096];
            let _ = connection.read(&mut head).expect("a request");
            let answer = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            connection.write_all(answer.as_bytes()).expect("taken");
            connection.write_all(&body).expect("taken");
        }
    });
    let world = World::new(b"");
    let mirror = Mirror::Url(format!("http://{address}/nix/").parse().expect("a URL"));
    world.install(mirror).await.expect("whole");
    serving.join().expect("no panic");
    assert!(world.nix().join("store").join(NIX).exists());
}

#[tokio::test]
async fn a_missing_sum_is_named_with_its_place_and_the_versions_that_need_none() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let serving = std::thread::spawn(move || {
        let (mut connection, _) = listener.accept().expect("a client");
        let mut head = [0; 4096];
        let _ = connection.read(&mut head).expect("a request");
        let answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        connection.write_all(answer).expect("taken");
    });
    let world = World::new(b"");
    let mirror = Mirror::Url(format!("http://{address}/nix/").parse().expect("a URL"));
    let error = world.install(mirror).await.expect_err("no sum").to_string();
    serving.join().expect("no panic");
    for word in [
        ".tar.xz.sha256` could not be read: HTTP status 404",
        "beside the archive",
        "2.34.7",
    ] {
        assert!(error.contains(word), "{error}");
    }
    assert!(!world.nix().exists());
}

#[tokio::test]
async fn what_nobody_asked_for_has_to_be_known() {
    let world = World::new(b"");
    let mirror = Mirror::Path(world.archive());
    let source = ArchiveSource {
        mirror: Some(&mirror),
        version: Some("2.99.1"),
        takes_unknown: false,
        roots: &Roots::default(),
    };
    let deadline = Instant::now() + LIMIT;
    let refused = install(&source, &world.nix(), &Sink::silent(), deadline).await;
    let error = refused.expect_err("its sum is not known").to_string();
    assert!(
        error.starts_with("nothing that can be trusted has the sum of"),
        "{error}"
    );
    assert!(!world.nix().exists());
}

#[test]
fn a_version_is_known_by_the_name_of_its_archive() {
    assert_eq!(version_in(&archive_name("2.34.7")), Some("2.34.7"));
    assert_eq!(version_in("nix.tar.xz"), None);
    let source = ArchiveSource {
        takes_unknown: true,
        mirror: None,
        version: None,
        roots: &Roots::default(),
    };
    let place = place(&source).expect("the default");
    let version = releases::ARCHIVE_VERSION;
    let name = archive_name(version);
    assert_eq!(
        place.shown(),
        format!("https://releases.nixos.org/nix/nix-{version}/{name}")
    );
}
