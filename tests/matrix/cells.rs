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

/// Two jobs that do not trust each other, as `guest/trust.sh` makes them.
pub(crate) const TRUST_SHAPES: [&str; 2] = ["trust-after", "trust-at-once"];

/// The kinds of stores that those are tried on: without a daemon, with one that trusts the user, with one that does not.
pub(crate) const TRUST_KINDS: [&str; 4] = ["root", "owner", "trusted", "untrusted"];

/// Jobs whose cache fails, as `guest/faults.sh` makes them.
pub(crate) const FAULTS: [&str; 3] = ["down", "dies", "torn"];

/// The kinds of stores that those are tried on.
pub(crate) const FAULT_KINDS: [&str; 3] = ["root", "untrusted", "chroot"];

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
        for (kind, shape) in stores_and_shapes() {
            cells.push(Cell {
                version,
                kind,
                shape,
            });
        }
    }
    cells
}

/// Cells in which each pair of values of two dimensions meets: every kind with every shape, and the versions in turn
/// along both, so that each of them meets every kind and every shape as well.
pub(crate) fn sample() -> Vec<Cell> {
    let mut cells = Vec::new();
    let position = |values: &[&str], value: &str| values.iter().position(|one| *one == value);
    for (kind, shape) in stores_and_shapes() {
        let row = position(&KINDS, kind).expect("a kind of the matrix");
        let columns = [&SHAPES[..], &TRUST_SHAPES, &FAULTS].concat();
        let turn = row + position(&columns, shape).expect("a shape of the matrix");
        cells.push(Cell {
            version: VERSIONS[turn % VERSIONS.len()],
            kind,
            shape,
        });
    }
    cells
}

/// Each kind of store with each shape of job that it is tried with.
fn stores_and_shapes() -> Vec<(&'static str, &'static str)> {
    let pairs = |kinds: &[&'static str], shapes: &[&'static str]| -> Vec<_> {
        let kinds = kinds.iter();
        kinds
            .flat_map(|kind| shapes.iter().map(move |shape| (*kind, *shape)))
            .collect()
    };
    [
        pairs(&KINDS, &SHAPES),
        pairs(&TRUST_KINDS, &TRUST_SHAPES),
        pairs(&FAULT_KINDS, &FAULTS),
    ]
    .concat()
}
