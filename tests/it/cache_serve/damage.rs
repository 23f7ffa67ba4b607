//! Files of the cache that were torn or altered: the cache claims none of them, serves none of them, and takes each
//! path anew.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{Served, TestPath, answer};
use crate::world::PLANTED_TOKEN;
use crate::world::cache_server::sha256;

/// Paths that are damaged, and as many that are not.
const PATHS: usize = 50;
const DIGITS: &[u8] = b"0123456789abcdfghijklmnpqrsvwxyz";

/// Path number `n`, of a size between nothing and 200 KB; every second one cannot be compressed.
fn path(n: usize) -> TestPath {
    let mut random = fastrand::Rng::with_seed(n as u64);
    let content: Vec<u8> = (0..n * n * 20)
        .map(|_| {
            if n.is_multiple_of(2) {
                b'a'
            } else {
                random.u8(..)
            }
        })
        .collect();
    let mut path = TestPath::new('a', &[format!("{n} ").as_bytes(), &content].concat());
    let (high, low) = (DIGITS[n / 32] as char, DIGITS[n % 32] as char);
    path.base = format!("{}{high}{low}-{n}", "b".repeat(30));
    path
}

fn nar_file(folder: &Path, path: &TestPath) -> PathBuf {
    folder
        .join("nars")
        .join(format!("{}.nar.zst", path.nar_hash().base32()))
}

/// Damages the file of a path in one of seven ways; returns a description.
fn damage(folder: &Path, path: &TestPath, n: usize, random: &mut fastrand::Rng) -> String {
    let narinfo = folder
        .join("caches/main")
        .join(format!("{}.narinfo", path.hash()));
    let file = if n % 7 < 4 {
        nar_file(folder, path)
    } else {
        narinfo
    };
    let whole = std::fs::read(&file).unwrap();
    let mut bytes = whole.clone();
    let how = match n % 7 {
        // A cut file.
        0 | 4 => {
            bytes.truncate(random.usize(..bytes.len()));
            format!("cut at {} of {}", bytes.len(), whole.len())
        }
        // A sector that was never written.
        1 => {
            let begin = random.usize(..bytes.len());
            bytes[begin..].fill(0);
            if bytes == whole {
                bytes[begin] = 1;
            }
            format!("zeros from {begin} of {}", whole.len())
        }
        // One bit, but not one that has no effect on the content.
        2 | 5 => loop {
            let (place, bit) = (random.usize(..bytes.len()), random.u32(..8));
            bytes[place] ^= 1 << bit;
            if n % 7 == 5 || zstd::decode_all(&*bytes).ok().as_ref() != Some(&path.nar) {
                break format!("bit {bit} of byte {place} of {}", whole.len());
            }
            bytes.clone_from(&whole);
        },
        3 => {
            bytes.clear();
            "emptied".to_owned()
        }
        // The last line is missing.
        _ => {
            let end = bytes[..bytes.len() - 1]
                .iter()
                .rposition(|byte| *byte == b'\n');
            bytes.truncate(end.unwrap() + 1);
            "without its last line".to_owned()
        }
    };
    std::fs::write(&file, bytes).unwrap();
    format!("{n}: {} {how}", file.display())
}

async fn missing(served: &Served, paths: &[TestPath]) -> Vec<String> {
    let hashes: Vec<&str> = paths.iter().map(TestPath::hash).collect();
    let request = served
        .client()
        .post(format!("{}/_api/v1/get-missing-paths", served.url))
        .bearer_auth(PLANTED_TOKEN)
        .json(&json!({"cache": "main", "store_path_hashes": hashes}));
    let (status, json) = answer(request).await;
    assert_eq!(status, 200, "{json}");
    let mut missing: Vec<String> = serde_json::from_value(json["missing_paths"].clone()).unwrap();
    missing.sort();
    missing
}

/// The NAR as a substituter gets it; `None` if it does not arrive whole.
async fn fetch(served: &Served, path: &TestPath) -> Option<Vec<u8>> {
    let url = format!(
        "{}/main/nar/{}.nar.zst",
        served.url,
        path.nar_hash().base32()
    );
    // A connection that ends before the headers were sent is a NAR that does not arrive whole, too.
    let response = served.client().get(url).send().await.ok()?;
    if response.status() != 200 {
        return None;
    }
    let body = response.bytes().await.ok()?;
    Some(zstd::decode_all(&*body).expect("a whole body is good"))
}

fn hashes(paths: &[TestPath]) -> Vec<String> {
    let mut hashes: Vec<String> = paths.iter().map(|path| path.hash().to_owned()).collect();
    hashes.sort();
    hashes
}

/// A folder with `PATHS` paths that were damaged, and the paths in it: these, then the sound ones.
async fn damaged_folder() -> (tempfile::TempDir, Vec<TestPath>, String) {
    let paths: Vec<TestPath> = (0..2 * PATHS).map(path).collect();
    let served = Served::start(&[]);
    for path in &paths {
        assert_eq!(served.upload(path).await.0, 200);
    }
    assert_eq!(missing(&served, &paths).await, [""; 0]);
    let (_, folder) = served.stop();
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut how = format!("seed {seed}\n");
    for (n, path) in paths[..PATHS].iter().enumerate() {
        how += &format!(
            "{}\n",
            damage(&folder.path().join("cache"), path, n, &mut random)
        );
    }
    (folder, paths, how)
}

#[tokio::test]
async fn what_was_damaged_is_missing_and_is_healed_by_the_next_publication() {
    let (folder, paths, how) = damaged_folder().await;
    let (damaged, sound) = paths.split_at(PATHS);
    let served = Served::in_folder(folder, &[]);
    assert_eq!(missing(&served, &paths).await, hashes(damaged), "{how}");
    for path in damaged {
        assert!(served.narinfo("main", path).await.is_none(), "{how}");
        assert_eq!(served.upload(path).await.0, 200, "{how}");
    }
    assert_eq!(missing(&served, &paths).await, [""; 0], "{how}");
    for path in damaged.iter().chain(sound) {
        let info = served.narinfo("main", path).await.expect("it is back");
        let stored = std::fs::read(nar_file(&served.path(""), path)).unwrap();
        assert_eq!(info.file_size, Some(stored.len() as u64), "{how}");
        assert_eq!(info.file_hash, Some(sha256(&stored)), "{how}");
        assert_eq!(
            fetch(&served, path).await.as_ref(),
            Some(&path.nar),
            "{how}"
        );
    }
    let (ran, _) = served.stop();
    assert!(
        ran.stderr
            .contains("warning: damage: the stored NAR sha256:"),
        "{}",
        ran.stderr
    );
}

#[tokio::test]
async fn an_upload_alone_heals_without_a_question_before() {
    let (folder, paths, how) = damaged_folder().await;
    let served = Served::in_folder(folder, &[]);
    for path in &paths {
        assert_eq!(served.upload(path).await.0, 200, "{how}");
    }
    for path in &paths {
        assert!(served.narinfo("main", path).await.is_some(), "{how}");
        assert_eq!(
            fetch(&served, path).await.as_ref(),
            Some(&path.nar),
            "{how}"
        );
    }
}

#[tokio::test]
async fn a_damaged_nar_is_never_served_whole_and_is_dropped() {
    let (folder, paths, how) = damaged_folder().await;
    let served = Served::in_folder(folder, &[]);
    let damaged_nars = (0..PATHS).filter(|n| n % 7 < 4);
    for path in damaged_nars.map(|n| &paths[n]) {
        assert_eq!(fetch(&served, path).await, None, "{how}");
        assert!(!nar_file(&served.path(""), path).exists(), "{how}");
        assert_eq!(
            missing(&served, std::slice::from_ref(path)).await,
            [path.hash()]
        );
    }
}

#[tokio::test]
async fn what_is_torn_while_the_server_runs_is_missing_too() {
    let served = Served::start(&[]);
    let paths: Vec<TestPath> = (10..20).map(path).collect();
    for path in &paths {
        assert_eq!(served.upload(path).await.0, 200);
        let file = nar_file(&served.path(""), path);
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    }
    assert_eq!(missing(&served, &paths).await, hashes(&paths));
}

#[tokio::test]
async fn without_a_record_of_what_is_synced_nothing_sound_is_lost() {
    for torn in ["", "Sum: 0123456789abcdef\nEpoch: 99\nBoot: x\nClean: no\n"] {
        let served = Served::start(&[]);
        let paths: Vec<TestPath> = (0..9).map(path).collect();
        for path in &paths {
            assert_eq!(served.upload(path).await.0, 200);
        }
        let (_, folder) = served.stop();
        std::fs::write(folder.path().join("cache/synced"), torn).unwrap();
        let served = Served::in_folder(folder, &[]);
        assert_eq!(missing(&served, &paths).await, [""; 0]);
    }
}

#[tokio::test]
async fn a_symbolic_link_is_no_nar() {
    let served = Served::start(&[]);
    let path = path(10);
    assert_eq!(served.upload(&path).await.0, 200);
    let file = nar_file(&served.path(""), &path);
    let elsewhere = served.path("elsewhere");
    std::fs::rename(&file, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &file).unwrap();
    assert!(served.narinfo("main", &path).await.is_none());
    assert_eq!(fetch(&served, &path).await, None);
    assert_eq!(
        missing(&served, std::slice::from_ref(&path)).await,
        [path.hash()]
    );
    assert_eq!(served.upload(&path).await.0, 200);
    assert_eq!(fetch(&served, &path).await.as_ref(), Some(&path.nar));
    assert!(file.symlink_metadata().unwrap().is_file());
}
