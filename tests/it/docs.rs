//! README.md and docs/: that every link leads somewhere, and that every snippet is one that works. What is run is run
//! in the real suite, `tests/real/docs.rs`.

mod commands;
pub mod fences;
mod links;
mod messages;
mod migration;
mod workflows;

use crate::house::source::{Source, file, files};

/// The pages for users.
pub fn pages() -> Vec<Source> {
    [vec![file("README.md")], files("docs", ".md")].concat()
}
