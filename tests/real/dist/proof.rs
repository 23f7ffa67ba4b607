//! What `scripts/dist-check.sh` calls proved, in a checkout of the tests' own where building takes no time: the scripts
//! that build are put in place, the one that judges is ours.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::process::Command;

use tempfile::TempDir;

use super::{Ended, ended};
use crate::world::{PATH, folders, root};

const PROCESSORS: [&str; 2] = ["x86_64", "aarch64"];
/// Gives back the committed binary, with a byte more where `other-bytes` says so.
const BUILD: &str = r#"root=$(cd "$(dirname "$0")/.." && pwd -P)
processor=${1:-x86_64}
mkdir -p "$FLYWHEEL_DIST_TARGET/$processor"
built=$FLYWHEEL_DIST_TARGET/$processor/flywheel
cp "$root/dist/flywheel-$processor-linux" "$built"
if grep -q "$processor" "$root/other-bytes"; then echo >>"$built"; fi
echo the-sources >"$built.sources"
echo "$built""#;
const TOOLCHAIN: &str = r#"cat "$(dirname "$0")/../compiler-$1""#;
const CROSS: &str = r#"cd "$(dirname "$0")/.."
[ $# = 0 ] || exec "$@""#;

struct Checkout(TempDir);

impl Checkout {
    /// Both binaries are what the sources build.
    fn new() -> Self {
        let checkout = Self(TempDir::new().unwrap());
        for folder in ["dist", "scripts", "bin", "target/tools"] {
            fs::create_dir_all(checkout.0.path().join(folder)).unwrap();
        }
        for file in PROCESSORS.map(|processor| format!("flywheel-{processor}-linux")) {
            let from = root().join("dist").join(&file);
            fs::copy(from, checkout.0.path().join("dist").join(&file)).unwrap();
        }
        fs::copy(
            root().join("dist/SHA256SUMS"),
            checkout.0.path().join("dist/SHA256SUMS"),
        )
        .unwrap();
        let judge = "scripts/dist-check.sh";
        fs::copy(root().join(judge), checkout.0.path().join(judge)).unwrap();
        for (script, lines) in [
            ("scripts/build-static.sh", BUILD),
            ("scripts/toolchain.sh", TOOLCHAIN),
            ("scripts/arm64-toolchain.sh", CROSS),
            ("bin/cargo", "exit 0"),
        ] {
            checkout.write(script, &format!("#!/bin/sh\nset -eu\n{lines}\n"));
        }
        let tools = root().join("target/tools/bin");
        symlink(tools, checkout.0.path().join("target/tools/bin")).unwrap();
        for processor in PROCESSORS {
            checkout.write(&format!("compiler-{processor}"), "rustc 1\nld 1\n");
        }
        checkout.write("other-bytes", "");
        checkout.record(["the-sources"; 2]);
        checkout
    }

    fn write(&self, name: &str, text: &str) {
        let file = self.0.path().join(name);
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Records the sources of each binary.
    fn record(&self, sources: [&str; 2]) {
        let blocks = PROCESSORS.iter().zip(sources).map(|(processor, sources)| {
            format!("# flywheel-{processor}-linux\nsources {sources}\nrustc 1\nld 1\n")
        });
        self.write("dist/BUILT-WITH", &blocks.collect::<String>());
    }

    fn check(&self, arm64: bool) -> Ended {
        let mut command = Command::new(self.0.path().join("scripts/dist-check.sh"));
        let own = TempDir::new().unwrap();
        folders::isolate(&mut command, own.path()).env(
            "PATH",
            format!("{}:{PATH}", self.0.path().join("bin").display()),
        );
        if arm64 {
            command.env("FLYWHEEL_PROVE_ARM64", "1");
        }
        ended(&mut command)
    }
}

/// Succeeds, and its first line is this one.
#[track_caller]
fn check_verdict(ended: &Ended, first: &str) {
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(ended.stdout.lines().next(), Some(first), "{ended:?}");
}

#[test]
fn both_are_proved_or_the_one_for_arm64_by_its_sources() {
    let checkout = Checkout::new();
    check_verdict(&checkout.check(true), "dist-check: proved: x86_64 aarch64");
    check_verdict(
        &checkout.check(false),
        "dist-check: proved: x86_64; aarch64 by the sum of its sources",
    );
}

#[test]
fn a_binary_that_is_older_than_the_sources_is_no_proof() {
    let checkout = Checkout::new();
    checkout.record(["the-sources", "older-sources"]);
    let ended = checkout.check(false);
    assert_eq!(ended.code, 1, "{ended:?}");
    let words = "the binary for aarch64 was built from other sources; `just dist` makes";
    assert!(ended.stderr.contains(words), "{ended:?}");
}

#[test]
fn another_compiler_is_named_first_and_the_same_one_must_give_the_same_bytes() {
    let checkout = Checkout::new();
    checkout.write("other-bytes", "aarch64\n");
    let failed = checkout.check(true);
    assert_eq!(failed.code, 1, "{failed:?}");
    let words = "the sources build another binary for aarch64 with the recorded toolchain";
    assert!(failed.stderr.contains(words), "{failed:?}");

    checkout.write("compiler-aarch64", "rustc 2\nld 1\n");
    let unproved = checkout.check(true);
    check_verdict(&unproved, "dist-check: NOT PROVED: aarch64");
    for words in ["-rustc 1\n", "+rustc 2\n", "the same version: flywheel "] {
        assert!(unproved.stdout.contains(words), "{unproved:?}");
    }
}
