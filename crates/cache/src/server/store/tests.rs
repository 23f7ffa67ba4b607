//! What damage does to the store's answers, where no request shows it.

use super::*;
use crate::server::folder::{FolderError, when_free};

const NAR: &[u8] = b"not really a NAR, but bytes are bytes to the store";

struct World {
    store: Store,
    cache: CacheName,
    path: PathInfo,
    _folder: tempfile::TempDir,
}

impl World {
    /// A store with one path, opened by a server that has not checked it.
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        let (cache, nar_hash) = (
            CacheName::default(),
            Sha256(sha2::Sha256::digest(NAR).into()),
        );
        let path = PathInfo {
            path: format!("/nix/store/{}-x", "a".repeat(32))
                .parse()
                .expect("a path"),
            nar_hash,
            nar_size: NAR.len() as u64,
            references: Vec::new(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
            ultimate: false,
        };
        let open = || {
            let open = || Folder::open(folder.path(), std::slice::from_ref(&cache));
            let opened = when_free(open, |error| matches!(error, FolderError::InUse(_)));
            Store::open(opened, Sink::silent())
                .expect("the disk works")
                .0
        };
        let compressed = zstd::encode_all(NAR, 3).expect("memory");
        let store = open();
        let nar = store
            .publish_compressed(&compressed, &nar_hash)
            .expect("the disk works");
        assert!(store.commit(&cache, &path, nar).expect("the disk works"));
        drop(store);
        let store = open();
        Self {
            store,
            cache,
            path,
            _folder: folder,
        }
    }

    fn nar(&self) -> std::path::PathBuf {
        self.store.folder().nar(&self.path.nar_hash)
    }

    fn missing(&self) -> (Vec<PathHash>, Vec<UncheckedPath>) {
        let hashes = vec![self.path.path.hash()];
        self.store
            .missing(&self.cache, hashes)
            .expect("the disk works")
    }
}

#[test]
fn beyond_the_budget_a_right_size_is_claimed_and_left_to_check() {
    let world = World::new();
    let mut bytes = std::fs::read(world.nar()).expect("there");
    *bytes.last_mut().expect("not empty") ^= 1;
    std::fs::write(world.nar(), &bytes).expect("written");
    let (missing, unchecked) = world.missing();
    assert_eq!((missing.len(), unchecked.len()), (0, 1));
    let (missing, left) = world
        .store
        .confirm_within(unchecked, 0)
        .expect("the disk works");
    assert_eq!((missing.len(), left.len()), (0, 1));
    // What the background does.
    for info in left {
        assert_eq!(world.store.confirm(info).expect("the disk works"), None);
    }
    assert_eq!(world.missing().0.len(), 1);
}

#[test]
fn a_wrong_size_is_looked_into_whatever_the_budget() {
    let world = World::new();
    std::fs::write(world.nar(), b"short").expect("written");
    let (_, unchecked) = world.missing();
    let (missing, left) = world
        .store
        .confirm_within(unchecked, 0)
        .expect("the disk works");
    assert_eq!((missing.len(), left.len()), (1, 0));
}

#[test]
fn a_nar_that_is_compressed_otherwise_stays_and_is_described_as_it_is() {
    let world = World::new();
    let compressed = zstd::encode_all(NAR, 19).expect("memory");
    let two_frames = [compressed, zstd::encode_all(&b""[..], 1).expect("memory")].concat();
    std::fs::write(world.nar(), &two_frames).expect("written");
    let (_, mut unchecked) = world.missing();
    let info = unchecked.pop().expect("it is there").info;
    let info = world.store.confirm(info).expect("the disk works");
    assert_eq!(
        info.and_then(|info| info.file_size),
        Some(two_frames.len() as u64)
    );
}

#[test]
fn a_torn_note_of_an_upload_is_none() {
    let world = World::new();
    let upload = Upload {
        nar_hash: world.path.nar_hash,
        nar_size: world.path.nar_size,
        received_hash: world.path.nar_hash,
        received_size: 1234,
    };
    let (store, cache) = (&world.store, &world.cache);
    store
        .note_upload(cache, "x", &upload)
        .expect("the disk works");
    let found = || store.upload(cache, "x").expect("the disk works");
    assert_eq!(found(), Some(upload));
    let file = store.folder().uploads(cache).join("x");
    let bytes = std::fs::read(&file).expect("there");
    std::fs::write(&file, &bytes[..bytes.len() - 3]).expect("written");
    assert_eq!(found(), None);
}
