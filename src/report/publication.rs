//! The result of a publication: numbers, and every path that is lost or in doubt, by name. Plain data, the same for
//! every verb that publishes.

use flywheel_core::text::count;
use serde::Serialize;

use flywheel_cache::client::verify::Coverage;

/// A path that did not arrive, or is not known to have, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Missed {
    /// The full store path.
    pub(crate) path: String,
    /// Why, in one line.
    pub(crate) reason: String,
}

/// Counts and lists of a publication.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Publication {
    /// Paths sent, and taken by the cache.
    pub(crate) published: u64,
    /// Paths that the cache had already.
    pub(crate) already_there: u64,
    /// Paths that the cache had damaged, each with what was wrong; they were sent anew, and it now serves them.
    pub(crate) repaired: Vec<Missed>,
    /// Paths that were left out on purpose, for instance because an upstream cache has signed them.
    pub(crate) skipped: u64,
    /// Of what was published or repaired, the paths that the cache was then seen to serve, described as they are here and
    /// signed; `coverage` says of how many the body was read, too.
    pub(crate) verified: u64,
    /// What verification looked at.
    pub(crate) coverage: Coverage,
    /// NAR bytes sent.
    pub(crate) bytes: u64,
    /// Paths that should be in the cache and are not.
    pub(crate) lost: Vec<Missed>,
    /// Paths that this job may have added or not: another job can have forged them, or they are another's. They are not
    /// published.
    pub(crate) ambiguous: Vec<Missed>,
    /// Nix processes of which it is not known what they named. What they added is known all the same; a result that was
    /// in the store before may be missing.
    pub(crate) unread_processes: u64,
    /// Paths that were sent, but could not be looked up.
    pub(crate) unverified: Vec<Missed>,
    /// Paths that the policy keeps back, each with the rule and where it is broken.
    pub(crate) withheld: Vec<Missed>,
    /// Paths that went although they break a rule which only warns.
    pub(crate) warned: Vec<Missed>,
    /// The key that signatures were checked with.
    pub(crate) key: KeySource,
    /// Why publishing as a whole was given up, if it was.
    pub(crate) stopped: Option<String>,
}

/// The key that signatures were checked with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum KeySource {
    /// The one that the job's Nix trusts.
    Given,
    /// The key that the cache itself announces. It proves less: a false cache would announce its own.
    Announced,
    /// No key is known, so that no signature was checked.
    #[default]
    Unknown,
}

impl KeySource {
    /// The value in the JSON form.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Given => "given",
            Self::Announced => "announced",
            Self::Unknown => "unknown",
        }
    }
}

impl Publication {
    /// Whether everything that should be in the cache was seen there.
    pub(crate) fn is_whole(&self) -> bool {
        self.lost.is_empty() && self.unverified.is_empty() && self.ambiguous.is_empty()
    }

    /// What is not known of the paths that the job named, in a sentence; `None` if all is known.
    pub(crate) fn unread_sentence(&self) -> Option<String> {
        let unread = (self.unread_processes > 0).then_some(self.unread_processes)?;
        Some(format!(
            "{} named paths that could not be read. What they added to the store is known all the same; a result that was there before them may be missing from the cache",
            processes(unread)
        ))
    }

    /// What is missing from the cache: `2 lost, 1 ambiguous`. That nothing is lost is said only where it is known: of
    /// every path whose it is, and of every store what was added to it.
    pub(crate) fn losses(&self, not_watched: usize) -> String {
        let (lost, ambiguous) = (self.lost.len(), self.ambiguous.len());
        let mut parts = Vec::new();
        let unread = self.unread_processes;
        if lost > 0 || (ambiguous + not_watched == 0 && unread == 0) {
            parts.push(format!("{lost} lost"));
        }
        if ambiguous > 0 {
            parts.push(format!("{ambiguous} ambiguous"));
        }
        if not_watched > 0 {
            parts.push(format!(
                "{} not watched",
                count(not_watched as u64, "store")
            ));
        }
        if unread > 0 {
            parts.push(format!("{} not watched", processes(unread)));
        }
        parts.join(", ")
    }
}

fn processes(number: u64) -> String {
    match number {
        1 => "1 process".to_owned(),
        more => format!("{more} processes"),
    }
}

/// `3 published, 40 already there, 43 verified, 0 lost`; what is nought and no news is left out.
impl std::fmt::Display for Publication {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} published", self.published)?;
        if self.already_there > 0 {
            write!(
                f,
                ", {} already there{}",
                self.already_there,
                self.coverage.there_suffix()
            )?;
        }
        for (number, what) in [
            (self.repaired.len() as u64, "repaired"),
            (self.skipped, "skipped"),
        ] {
            if number > 0 {
                write!(f, ", {number} {what}")?;
            }
        }
        write!(f, ", {} verified{}", self.verified, self.coverage.suffix())?;
        if !self.unverified.is_empty() {
            write!(f, ", {} unverified", self.unverified.len())?;
        }
        if !self.withheld.is_empty() {
            write!(f, ", {} withheld", self.withheld.len())?;
        }
        write!(f, ", {}", self.losses(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_line_says_what_matters() {
        let publication = Publication {
            published: 3,
            verified: 3,
            ..Publication::default()
        };
        assert_eq!(publication.to_string(), "3 published, 3 verified, 0 lost");
        let missed = || Missed {
            path: "/nix/store/x".into(),
            reason: "why".into(),
        };
        let publication = Publication {
            already_there: 2,
            skipped: 1,
            unverified: vec![missed()],
            lost: vec![missed(), missed()],
            ..publication
        };
        let line = "3 published, 2 already there, 1 skipped, 3 verified, 1 unverified, 2 lost";
        assert_eq!(publication.to_string(), line);
        let doubtful = Publication {
            ambiguous: vec![missed()],
            ..Publication::default()
        };
        let line = "0 published, 0 verified, 1 ambiguous";
        assert_eq!(doubtful.to_string(), line, "that none is lost is not known");
        assert!(!doubtful.is_whole());
        let publication = Publication {
            published: 3,
            repaired: vec![missed()],
            verified: 4,
            coverage: Coverage {
                sent: 4,
                sent_read: 2,
                ..Coverage::default()
            },
            ..Publication::default()
        };
        let line = "3 published, 1 repaired, 4 verified (sample of 2 bodies), 0 lost";
        assert_eq!(publication.to_string(), line);
    }
}
