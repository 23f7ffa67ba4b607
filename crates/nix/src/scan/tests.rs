//! Scans files of every kind, split at every position.

use std::os::unix::fs::symlink;

use super::secret_formats::tests::pem;
use super::*;

const VALUE: &str = "x7Rk2Lm9Qs4Tv6Wz";

fn scanner() -> Scanner {
    let secret = Secret::new(VALUE).expect("not empty");
    Scanner::new(
        &[("MY_TOKEN".to_owned(), secret)],
        &[("the workspace", Path::new("/home/runner/work/app"))],
    )
}

/// Bytes without anything to find.
fn filler(length: usize) -> Vec<u8> {
    (0..length)
        .map(|n| b"lorem ipsum dolor sit amet "[n % 27])
        .collect()
}

fn fed(scanner: &Scanner, parts: &[&[u8]]) -> Vec<Finding> {
    let mut look = scanner.begin();
    let fed = look.enter(b"bin").and_then(|()| look.enter(b"tool"));
    fed.and_then(|()| parts.iter().try_for_each(|part| look.content(part)))
        .and_then(|()| look.end())
        .expect("few finds");
    look.leave();
    look.leave();
    look.result.findings
}

#[test]
fn a_secret_is_found_across_every_boundary() {
    let scanner = scanner();
    // Before, across and after the places at which blocks end, whole and in pieces of every size.
    for around in [
        BLOCK_SIZE - LOOKAHEAD,
        BLOCK_SIZE,
        2 * BLOCK_SIZE - LOOKAHEAD,
    ] {
        for before in around - VALUE.len() - 2..around + 2 {
            let text = [
                filler(before),
                VALUE.as_bytes().to_vec(),
                filler(BLOCK_SIZE),
            ]
            .concat();
            let parts: Vec<&[u8]> = text.chunks(BLOCK_SIZE / 2).collect();
            let found = fed(&scanner, &parts);
            assert_eq!(found.len(), 1, "{before}");
            assert_eq!(
                (found[0].offset, found[0].file.as_str()),
                (before as u64, "bin/tool")
            );
        }
    }
    let text = [filler(100), VALUE.as_bytes().to_vec(), filler(100)].concat();
    for cut in 0..=text.len() {
        let (one, other) = text.split_at(cut);
        assert_eq!(fed(&scanner, &[one, other]).len(), 1, "{cut}");
    }
    for size in 1..=VALUE.len() + 1 {
        let parts: Vec<&[u8]> = text.chunks(size).collect();
        assert_eq!(fed(&scanner, &parts).len(), 1, "{size}");
    }
}

#[test]
fn a_shape_that_is_longer_than_the_rest_of_a_block_is_judged_whole() {
    let scanner = scanner();
    for before in [
        BLOCK_SIZE - LOOKAHEAD - 1,
        BLOCK_SIZE - 100,
        BLOCK_SIZE - 10,
    ] {
        let text = [filler(before), pem().into_bytes(), filler(10)].concat();
        let parts: Vec<&[u8]> = text.chunks(4096).collect();
        let found = fed(&scanner, &parts);
        assert_eq!(found.len(), 1, "{before}: {found:?}");
        assert!(found[0].what.ends_with("a private key"), "{found:?}");
    }
}

#[test]
fn two_files_are_not_one_text() {
    let scanner = scanner();
    let (one, other) = VALUE.as_bytes().split_at(7);
    let mut look = scanner.begin();
    for part in [one, other] {
        look.enter(b"part")
            .and_then(|()| look.content(part))
            .and_then(|()| look.end())
            .expect("few finds");
        look.leave();
    }
    assert_eq!(look.result.findings, []);
}

#[test]
fn places_end_where_they_end() {
    let scanner = scanner();
    for (text, count) in [
        ("cd /home/runner/work/app && make", 1),
        ("/home/runner/work/app/src/main.c", 1),
        ("/home/runner/work/app", 1),
        ("/home/runner/work/app2", 0),
        ("/home/runner/work/apple", 0),
        ("at /tmp/nix-build-hello-2.12.drv-0/src/x.c", 1),
        ("at /tmp/nix-build-hello-2.12.drv", 0),
        ("nix-build-hello.drv-0", 0),
        ("see /nix-build-hello for more .drv-7", 0),
    ] {
        let found = fed(&scanner, &[text.as_bytes()]);
        assert_eq!(found.len(), count, "{text}: {found:?}");
        assert!(
            found
                .iter()
                .all(|finding| finding.rule == Rule::MachinePath)
        );
    }
}

#[test]
fn a_place_that_begins_with_another_hides_it_not() {
    let places = [
        ("the workspace", Path::new("/srv/builder/app")),
        ("the home folder", Path::new("/srv/builder")),
    ];
    let scanner = Scanner::new(&[], &places);
    for (text, what) in [
        ("/srv/builder/app/x.c", "the workspace of this machine"),
        ("/srv/builder/app2/x.c", "the home folder of this machine"),
        ("/srv/builder/.cache", "the home folder of this machine"),
    ] {
        let found = fed(&scanner, &[text.as_bytes()]);
        assert_eq!(
            found
                .iter()
                .map(|one| one.what.as_str())
                .collect::<Vec<_>>(),
            [what],
            "{text}"
        );
    }
    assert_eq!(fed(&scanner, &[b"/srv/builders/x"]), []);
}

/// A documented limit of the scan.
#[test]
fn a_secret_in_a_compressed_file_is_not_found() {
    use std::io::Write as _;

    let text = [filler(5000), VALUE.as_bytes().to_vec(), filler(5000)].concat();
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 6);
    xz.write_all(&text).expect("in memory");
    let packed = xz.finish().expect("in memory");
    assert!(packed.len() < text.len() / 10, "it is really compressed");
    let scanner = scanner();
    assert_eq!(fed(&scanner, &[&packed]), []);
    assert_eq!(fed(&scanner, &[&text]).len(), 1);
}

#[test]
fn a_real_path_is_looked_into_with_its_names_and_links() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path().join("out");
    std::fs::create_dir_all(path.join("etc/tests")).expect("made");
    std::fs::write(path.join("etc/config"), format!("token = {VALUE}\n")).expect("written");
    std::fs::write(path.join(format!("etc/{VALUE}")), "").expect("written");
    symlink(format!("/somewhere/{VALUE}"), path.join("link")).expect("linked");
    let store =
        "/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-hello/bin/hello and /nix/store/short-x";
    std::fs::write(path.join("etc/script"), store).expect("written");
    // A key in a test suite opens nothing; this job's own secret is a secret everywhere.
    let key = pem();
    std::fs::write(path.join("etc/tests/key.pem"), format!("{key}{VALUE}")).expect("written");
    let looked = scanner().scan(&path).expect("readable");
    let files: Vec<(&str, u64)> = looked
        .findings
        .iter()
        .map(|found| (found.file.as_str(), found.offset))
        .collect();
    let length = key.len() as u64;
    assert_eq!(
        files,
        [
            ("etc/config", 8),
            ("etc/tests/key.pem", length),
            ("etc/…", 0),
            ("link", 11)
        ]
    );
    assert!(
        looked
            .findings
            .iter()
            .all(|found| !format!("{found} {found:?}").contains(VALUE))
    );
    let mentioned: Vec<&str> = looked.mentions.keys().map(PathHash::as_str).collect();
    assert_eq!(mentioned, ["fvchbymk0m4jvldpb9m5hy0bjy2lf30k"]);
}

#[test]
fn a_path_full_of_finds_ends_the_look() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path().join("out");
    std::fs::write(&path, format!("{VALUE}\n").repeat(100_000)).expect("written");
    let looked = scanner().scan(&path).expect("readable");
    assert_eq!(looked.findings.len(), MAX_FINDINGS);
    assert!(looked.bytes < 1_000_000, "{}", looked.bytes);
    assert_eq!(
        looked.findings[1].to_string(),
        "secret: the value of `MY_TOKEN` as it is in the file itself, at byte 17"
    );
}
