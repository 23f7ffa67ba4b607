//! The outcome of each path, and the sums over all of them.

use std::fmt;
use std::time::Duration;

use crate::client::verify::{Key, Verdict};
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::scan::Finding;
use flywheel_nix::store_path::StorePath;

/// Why a path is left out on purpose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Skip {
    /// An upstream cache has signed the path, with the key of this name.
    Upstream(String),
    /// The path is a store derivation that no published path refers to.
    Derivation,
    /// The path was deleted from the store before it was sent.
    Vanished,
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Upstream(key) => write!(f, "signed by `{key}`"),
            Self::Derivation => f.write_str("a store derivation"),
            Self::Vanished => f.write_str("deleted from the store before it was sent"),
        }
    }
}

/// Why the publication policy withholds a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Withheld {
    /// The path itself violates rules.
    Found(Vec<Finding>),
    /// The path refers to this one, which violates rules.
    Refers(StorePath),
}

impl fmt::Display for Withheld {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Found(findings) => {
                let Some(first) = findings.first() else {
                    return f.write_str("the policy forbids it");
                };
                write!(f, "{first}")?;
                match findings.len() {
                    1 => Ok(()),
                    number => write!(f, ", and {} more", number - 1),
                }
            }
            Self::Refers(path) => write!(f, "it refers to `{path}`, which is withheld"),
        }
    }
}

/// The final state of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Final {
    /// The path was sent, and the cache stored it.
    Published,
    /// The cache had the path before it was sent.
    AlreadyThere,
    /// The cache had the path damaged, and took it anew.
    Repaired {
        /// What was wrong with it, in one line.
        reason: String,
    },
    /// The path is left out on purpose.
    Skipped(Skip),
    Withheld(Withheld),
    Failed {
        /// One line.
        reason: String,
        /// All tries; 0 if a path that it refers to has failed.
        attempts: u32,
    },
    /// Publishing ended before the path was decided.
    Left {
        /// One line.
        reason: String,
    },
}

impl Final {
    /// Whether paths that refer to this one may be published.
    pub(super) fn is_good(&self) -> bool {
        // Readers of the cache have the upstream cache, too.
        matches!(
            self,
            Self::Published
                | Self::Repaired { .. }
                | Self::AlreadyThere
                | Self::Skipped(Skip::Upstream(_))
        )
    }

    /// Whether the path was sent, and taken.
    pub(crate) fn is_sent(&self) -> bool {
        matches!(self, Self::Published | Self::Repaired { .. })
    }

    /// The reason, for a path that should have been published and was not.
    pub(crate) fn lost(&self) -> Option<&str> {
        match self {
            Self::Failed { reason, .. } | Self::Left { reason } => Some(reason),
            _ => None,
        }
    }

    pub(crate) fn withheld(&self) -> Option<&Withheld> {
        match self {
            Self::Withheld(why) => Some(why),
            _ => None,
        }
    }
}

/// A path and its final state.
#[derive(Clone, Debug)]
pub struct PathOutcome {
    pub info: PathInfo,
    pub end: Final,
    /// What a check found that was made because the cache had the path already.
    pub checked: Option<Verdict>,
}

/// A path that is settled well while others are still published.
#[derive(Clone, Debug)]
pub struct Served {
    pub info: PathInfo,
    /// Whether an upstream cache has it, so that this one need not.
    pub is_upstream: bool,
}

/// The outcome of publishing.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Every path that was offered, in that order.
    pub paths: Vec<PathOutcome>,
    /// The reason, if publishing as a whole was given up.
    pub stopped: Option<String>,
    /// Whether that was because nothing moved any more.
    pub stalled: bool,
    /// The key for the cache's signatures, as far as it is known.
    pub key: Key,
    /// NAR bytes sent, retries included.
    pub bytes: u64,
    /// Requests that were retried.
    pub retries: u64,
    /// From the start to the end of the drain.
    pub elapsed: Duration,
}

/// The number of paths in each final state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub published: u64,
    pub already_there: u64,
    pub repaired: u64,
    pub skipped: u64,
    pub(crate) withheld: u64,
    pub(crate) failed: u64,
    pub(crate) left: u64,
}

impl Outcome {
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for path in &self.paths {
            *match path.end {
                Final::Published => &mut counts.published,
                Final::AlreadyThere => &mut counts.already_there,
                Final::Repaired { .. } => &mut counts.repaired,
                Final::Skipped(_) => &mut counts.skipped,
                Final::Withheld(_) => &mut counts.withheld,
                Final::Failed { .. } => &mut counts.failed,
                Final::Left { .. } => &mut counts.left,
            } += 1;
        }
        counts
    }

    /// The paths that were sent, and that the cache should now serve.
    pub fn sent(&self) -> impl Iterator<Item = &PathInfo> {
        self.paths
            .iter()
            .filter(|path| path.end.is_sent())
            .map(|path| &path.info)
    }

    /// The paths that the cache had already.
    pub fn already_there(&self) -> impl Iterator<Item = &PathOutcome> {
        self.paths
            .iter()
            .filter(|path| path.end == Final::AlreadyThere)
    }

    /// The paths that the cache had damaged, with what was wrong.
    pub fn repaired(&self) -> impl Iterator<Item = (&PathInfo, &str)> {
        self.paths.iter().filter_map(|path| match &path.end {
            Final::Repaired { reason } => Some((&path.info, reason.as_str())),
            _ => None,
        })
    }

    /// The paths that the policy withholds, with the reason.
    pub fn withheld(&self) -> impl Iterator<Item = (&PathInfo, &Withheld)> {
        self.paths
            .iter()
            .filter_map(|path| Some((&path.info, path.end.withheld()?)))
    }

    /// The paths that should have been published and were not, with the reason.
    pub fn lost(&self) -> impl Iterator<Item = (&PathInfo, &str)> {
        self.paths
            .iter()
            .filter_map(|path| Some((&path.info, path.end.lost()?)))
    }
}
