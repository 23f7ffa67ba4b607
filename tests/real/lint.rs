//! The linters over the repository: that a missing tool fails loudly. That the repository is clean is
//! `scripts/lint.sh` itself, which CI runs.

use std::os::unix::fs::symlink;
use std::process::Command;

use crate::world::{folders, need, root};

#[test]
fn a_missing_linter_is_a_failure_that_says_how_to_get_it() {
    // A copy of the script finds no tools of this checkout beside it.
    let folder = tempfile::tempdir().unwrap();
    let (scripts, bin) = (folder.path().join("scripts"), folder.path().join("bin"));
    std::fs::create_dir(&scripts).unwrap();
    std::fs::create_dir(&bin).unwrap();
    std::fs::copy(root().join("scripts/lint.sh"), scripts.join("lint.sh")).unwrap();
    for tool in ["bash", "dirname", "zizmor", "check-jsonschema"] {
        symlink(
            need(tool, "scripts/bootstrap.sh tools installs it"),
            bin.join(tool),
        )
        .unwrap();
    }
    let mut lint = Command::new(bin.join("bash"));
    let output = folders::isolate(&mut lint, folder.path())
        .arg(scripts.join("lint.sh"))
        .env("PATH", &bin)
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(69), "{printed}");
    assert_eq!(
        printed,
        "lint: `shellcheck` is missing; scripts/bootstrap.sh tools installs it\n"
    );
}
