//! The walls between the crates: an import that points up does not compile.

use std::path::Path;
use std::process::Command;

use crate::world::{need, root};

/// Each crate, a file of it, and a crate that stands above it or beside it.
const PLANTED: [(&str, &str, &str); 5] = [
    ("core", "text.rs", "flywheel_sys"),
    ("sys", "lib.rs", "flywheel_nix"),
    ("github", "lib.rs", "flywheel_nix"),
    ("nix", "lib.rs", "flywheel_github"),
    ("cache", "lib.rs", "flywheel_github"),
];

/// The errors of `cargo check`. With all members and targets their dependencies have the features that clippy had them
/// compiled with, in the checkout's own target folder.
fn errors(workspace: &Path) -> Vec<String> {
    let mut cargo = Command::new(need("cargo", "https://rustup.rs"));
    cargo
        .current_dir(workspace)
        .args([
            "check",
            "--offline",
            "--locked",
            "--workspace",
            "--all-targets",
        ])
        .args(["--quiet", "--message-format", "short"])
        .env("CARGO_TARGET_DIR", root().join("target"));
    let printed = String::from_utf8(cargo.output().unwrap().stderr).unwrap();
    let errors = printed.lines().filter(|line| line.contains("error[E"));
    errors.map(str::to_owned).collect()
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn an_import_that_points_up_does_not_compile() {
    let folder = tempfile::tempdir().unwrap();
    for part in ["src", "crates", "tests", "benches", ".cargo"] {
        copy(&root().join(part), &folder.path().join(part));
    }
    for part in [
        "Cargo.toml",
        "Cargo.lock",
        "clippy.toml",
        "rust-toolchain.toml",
    ] {
        std::fs::copy(root().join(part), folder.path().join(part)).unwrap();
    }
    for (name, file, above) in PLANTED {
        let file = folder.path().join(format!("crates/{name}/src/{file}"));
        let text = std::fs::read_to_string(&file).unwrap();
        let planted = text.replacen("\n\n", &format!("\n\nuse {above} as _;\n"), 1);
        assert_ne!(text, planted);
        std::fs::write(&file, planted).unwrap();
        let errors = errors(folder.path());
        let own = |error: &String| error.contains("E0432") && error.contains(above);
        assert!(
            !errors.is_empty() && errors.iter().all(own),
            "{name}: {errors:#?}"
        );
        std::fs::write(&file, text).unwrap();
    }
}
