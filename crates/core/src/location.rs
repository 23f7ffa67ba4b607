//! A place in a source file, as Nix names it in an error and GitHub shows it in an annotation.

use serde::Serialize;

/// A place in a source file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SourceLocation {
    /// The file, relative to the root of the flake's source tree, or of the repository once that is known.
    pub file: String,
    /// The line, from 1.
    pub line: u32,
    /// The column, from 1, where it is known.
    pub column: Option<u32>,
}
