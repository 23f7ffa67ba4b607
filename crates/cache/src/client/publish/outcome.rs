//! What became of each path, and the sums.

use std::fmt;
use std::time::Duration;

use flywheel_nix::path_info::PathInfo;
use flywheel_nix::scan::Finding;
use flywheel_nix::store_path::StorePath;

/// Why a path is not published on purpose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Skip {
    /// A cache upstream has signed it with the key of this name.
    Upstream(String),
    /// It is a store derivation that no published path refers to.
    Derivation,
    /// It was deleted from the store before it was sent.
    Vanished,
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Upstream(key) => write!(f, "signed by `{key}`"),
            Self::Derivation => f.write_str("a store derivation"),
            Self::Vanished => f.write_str("deleted from the store meanwhile"),
        }
    }
}

/// Why the publication policy keeps a path back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Withheld {
    /// It breaks rules, here.
    Found(Vec<Finding>),
    /// It refers to this one, which does.
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

/// What became of a path in the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Final {
    /// It was sent, and the cache took it.
    Published,
    /// The cache had it already.
    AlreadyThere,
    /// It is not published on purpose.
    Skipped(Skip),
    /// The policy keeps it back.
    Withheld(Withheld),
    /// It could not be published.
    Failed {
        /// Why, one line.
        reason: String,
        /// Tries in all; none if something it refers to has failed.
        attempts: u32,
    },
    /// It was not settled in time.
    Left {
        /// Why, one line.
        reason: String,
    },
}

impl Final {
    /// Whether what refers to this path may be published.
    pub(super) fn is_good(&self) -> bool {
        matches!(
            self,
            Self::Published | Self::AlreadyThere | Self::Skipped(Skip::Upstream(_))
        )
    }

    /// Whether the cache should now serve it.
    pub fn is_served(&self) -> bool {
        matches!(self, Self::Published | Self::AlreadyThere)
    }

    /// Whether it should have been published and was not, and why.
    pub fn lost(&self) -> Option<&str> {
        match self {
            Self::Failed { reason, .. } | Self::Left { reason } => Some(reason),
            _ => None,
        }
    }

    /// Why the policy keeps it back, if it does.
    pub fn withheld(&self) -> Option<&Withheld> {
        match self {
            Self::Withheld(why) => Some(why),
            _ => None,
        }
    }
}

/// A path and what became of it.
#[derive(Clone, Debug)]
pub struct Settled {
    /// The path's facts.
    pub info: PathInfo,
    /// What became of it.
    pub end: Final,
}

/// What became of all paths, in the order in which they were offered.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Each path that was offered.
    pub paths: Vec<Settled>,
    /// Why publishing as a whole was given up, if it was.
    pub stopped: Option<String>,
    /// NAR bytes sent, repetitions included.
    pub bytes: u64,
    /// Requests that were tried again.
    pub retries: u64,
    /// From the start to the end of the drain.
    pub elapsed: Duration,
}

/// The sums of an outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Sent and taken.
    pub published: u64,
    /// There before.
    pub already_there: u64,
    /// Not published on purpose.
    pub skipped: u64,
    /// Kept back by the policy.
    pub withheld: u64,
    /// Not published though tried.
    pub failed: u64,
    /// Not settled in time.
    pub left: u64,
}

impl Outcome {
    /// The sums.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for path in &self.paths {
            *match path.end {
                Final::Published => &mut counts.published,
                Final::AlreadyThere => &mut counts.already_there,
                Final::Skipped(_) => &mut counts.skipped,
                Final::Withheld(_) => &mut counts.withheld,
                Final::Failed { .. } => &mut counts.failed,
                Final::Left { .. } => &mut counts.left,
            } += 1;
        }
        counts
    }

    /// The paths that the cache should now serve.
    pub fn served(&self) -> impl Iterator<Item = &PathInfo> {
        self.paths
            .iter()
            .filter(|path| path.end.is_served())
            .map(|path| &path.info)
    }

    /// The paths that the policy keeps back, and why.
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
