//! README.md and docs/ as a reader uses them: the workflows that are marked for it under act, the shell snippets of each
//! page one after the other in a folder of the page's own, and GitLab's template as GitLab would run it.

#[path = "../it/docs/fences.rs"]
#[expect(dead_code, reason = "the fast suite uses more of it")]
mod fences;

mod gitlab;
mod migration;
mod shell;
mod workflows;

use std::path::{Path, PathBuf};

use fences::{Fence, fences};

use crate::world::flake::FLAKE;
use crate::world::root;

/// How the pages name this repository, and how the tests do.
const OURS: (&str, &str) = ("OWNER/flywheel", "octo-org/flywheel");

/// The flake that the readers of the pages have: the suite's own, with two checks.
fn flake() -> String {
    let checks = "checks.${system} = { inherit lib app; };\n    packages.";
    FLAKE.replacen("packages.", checks, 1)
}

/// The snippets of every page, page by page, in order.
fn pages() -> Vec<(String, Vec<Fence>)> {
    let mut files = vec![root().join("README.md")];
    collect(&root().join("docs"), &mut files);
    files.sort();
    let pages = files.iter().map(|file| {
        let name = file.strip_prefix(root()).unwrap().display().to_string();
        let text = std::fs::read_to_string(file).unwrap();
        let fences = fences(&name, &text);
        (name, fences)
    });
    pages.collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|ending| ending == "md") {
            files.push(path);
        }
    }
}
