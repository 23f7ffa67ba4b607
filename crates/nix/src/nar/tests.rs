//! NARs of small trees, byte for byte, and the errors for paths that differ from their
//! registration.

use flywheel_testing::nar_strings;
use std::os::unix::fs::{PermissionsExt, symlink};

use futures_util::StreamExt as _;

use super::*;

fn dump(path: &Path) -> Vec<u8> {
    let mut nar = Vec::new();
    write(path, &mut nar).expect("readable");
    nar
}

fn hash(nar: &[u8]) -> Sha256 {
    Sha256(Hasher::digest(nar).into())
}

async fn collect(path: &Path, hash: Sha256, size: u64) -> (Vec<u8>, Option<DumpError>) {
    let mut stream = NarStream::open(path.to_owned(), hash, size);
    let fault = stream.fault();
    let mut nar = Vec::new();
    while let Some(block) = stream.next().await {
        match block {
            Ok(block) => nar.extend_from_slice(&block),
            Err(_) => return (nar, fault.take()),
        }
    }
    (nar, fault.take())
}

#[test]
fn a_tree_is_spelt_in_bytewise_order() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let root = folder.path().join("root");
    std::fs::create_dir_all(root.join("b")).expect("made");
    std::fs::write(root.join("b/run"), "#!").expect("made");
    std::fs::set_permissions(root.join("b/run"), PermissionsExt::from_mode(0o555)).expect("set");
    std::fs::write(root.join("B"), "").expect("made");
    symlink("b/run", root.join("a")).expect("made");
    #[rustfmt::skip]
    let expected = nar_strings(&[
        "nix-archive-1", "(", "type", "directory",
        "entry", "(", "name", "B", "node", "(", "type", "regular", "contents", "", ")", ")",
        "entry", "(", "name", "a", "node", "(", "type", "symlink", "target", "b/run", ")", ")",
        "entry", "(", "name", "b", "node", "(", "type", "directory",
        "entry", "(", "name", "run", "node",
        "(", "type", "regular", "executable", "", "contents", "#!", ")", ")",
        ")", ")", ")",
    ]);
    assert_eq!(dump(&root), expected);
}

#[test]
fn depth_beyond_path_max_is_no_obstacle() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let root = folder.path().join("deep");
    std::fs::create_dir(&root).expect("made");
    let name = CString::new("d".repeat(200)).expect("no zero");
    let mut at = openat(
        CWD,
        &root,
        OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .expect("open");
    for _ in 0..100 {
        rustix::fs::mkdirat(&at, &name, Mode::RWXU).expect("made");
        at = openat(
            &at,
            &name,
            OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .expect("open");
    }
    let nar = dump(&root);
    assert_eq!(
        nar.windows(200)
            .filter(|window| *window == name.as_bytes())
            .count(),
        100
    );
    assert!(nar.ends_with(&nar_strings(&[")", ")", ")"])));
}

#[tokio::test]
async fn a_stream_gives_the_same_bytes_at_every_size() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let file = folder.path().join("file");
    for size in [
        0,
        1,
        7,
        8,
        READ_SIZE - 1,
        BLOCK_SIZE - 112,
        BLOCK_SIZE - 104,
        BLOCK_SIZE,
        2 * BLOCK_SIZE - 112,
        5 * BLOCK_SIZE + 3,
    ] {
        std::fs::write(&file, vec![b'x'; size]).expect("written");
        let nar = dump(&file);
        let (streamed, fault) = collect(&file, hash(&nar), nar.len() as u64).await;
        assert!(fault.is_none(), "{size}: {fault:?}");
        assert!(streamed == nar, "{size}: the streamed NAR differs");
    }
}

#[tokio::test]
async fn a_corrupt_path_is_never_sent_whole() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let file = folder.path().join("file");
    for content in [10, BLOCK_SIZE - 112, 3 * BLOCK_SIZE] {
        std::fs::write(&file, vec![b'x'; content]).expect("written");
        let nar = dump(&file);
        let size = nar.len() as u64;
        for (hash, size) in [
            (hash(b"other"), size),
            (hash(&nar), size - 8),
            (hash(&nar), size + 8),
        ] {
            let (sent, fault) = collect(&file, hash, size).await;
            assert!(
                (sent.len() as u64) < size,
                "{content}: {} of {size} bytes were sent",
                sent.len()
            );
            assert!(
                matches!(fault, Some(DumpError::Corrupt { .. })),
                "{content}: {fault:?}"
            );
        }
    }
}

#[tokio::test]
async fn a_path_that_is_gone_is_told_from_one_that_is_corrupt() {
    let (_, fault) = collect(Path::new("/nonexistent/path"), hash(b""), 200).await;
    assert!(matches!(fault, Some(DumpError::Gone(_))), "{fault:?}");
}

#[test]
fn a_socket_is_named() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let _socket = std::os::unix::net::UnixListener::bind(folder.path().join("s")).expect("bound");
    let error = write(folder.path(), &mut Vec::new()).expect_err("no NAR of a socket");
    assert!(
        matches!(&error, DumpError::Special(path) if path.ends_with("s")),
        "{error}"
    );
}

#[test]
fn reading_leaves_no_trace_in_the_file_system() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let name = folder.path().join("file");
    std::fs::write(&name, "content").expect("written");
    let (then, file) = (
        std::time::UNIX_EPOCH,
        File::options().write(true).open(&name).expect("opened"),
    );
    file.set_times(std::fs::FileTimes::new().set_accessed(then))
        .expect("set");
    write(&name, &mut Vec::new()).expect("read");
    assert_eq!(
        file.metadata().expect("there").accessed().expect("known"),
        then
    );
}
