//! The dimensions of the matrix, and which cells of it are run.

use std::fmt;

/// Debian's versions of Nix, as `scripts/nix-versions.sh` unpacks them.
pub(crate) const VERSIONS: [&str; 3] = ["2.8.0", "2.26.3", "2.34.8"];

/// Kinds of stores, as `guest/kinds.sh` makes them.
pub(crate) const KINDS: [&str; 8] = [
    "root",
    "owner",
    "bare",
    "trusted",
    "untrusted",
    "pidns",
    "rootless",
    "chroot",
];

/// Shapes of jobs, as `guest/run.sh` and `guest/job.sh` have them.
pub(crate) const SHAPES: [&str; 8] = [
    "one", "twelve", "no-link", "run", "added", "ca", "gc", "two",
];

/// One combination of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Cell {
    pub(crate) version: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) shape: &'static str,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.version, self.kind, self.shape)
    }
}

impl Cell {
    /// Whether a pattern of three parts names this cell; `*` stands for any value.
    pub(crate) fn matches(&self, pattern: &str) -> bool {
        let mine = [self.version, self.kind, self.shape];
        let parts: Vec<&str> = pattern.split('/').collect();
        parts.len() == mine.len()
            && mine
                .iter()
                .zip(parts)
                .all(|(value, part)| part == "*" || part == *value)
    }
}

/// Every cell.
pub(crate) fn all() -> Vec<Cell> {
    let mut cells = Vec::new();
    for version in VERSIONS {
        for kind in KINDS {
            for shape in SHAPES {
                cells.push(Cell {
                    version,
                    kind,
                    shape,
                });
            }
        }
    }
    cells
}

/// Cells in which each pair of values of two dimensions meets: every kind with every shape, and the versions in turn
/// along both, so that each of them meets every kind and every shape as well.
pub(crate) fn sample() -> Vec<Cell> {
    let mut cells = Vec::new();
    for (row, kind) in KINDS.into_iter().enumerate() {
        for (column, shape) in SHAPES.into_iter().enumerate() {
            let version = VERSIONS[(row + column) % VERSIONS.len()];
            cells.push(Cell {
                version,
                kind,
                shape,
            });
        }
    }
    cells
}
