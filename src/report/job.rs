//! The result of one job, as plain data that the verb fills in.

use std::time::Duration;

use crate::report::disk::DiskReport;
use crate::report::publication::{Missed, Publication};
use flywheel_core::budget::OutOfMemory;
use flywheel_core::text::{bytes, duration};

/// How a job ended, and what failed, if anything did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The command ended with 0, and what had to be published was.
    Success,
    /// The command failed.
    CommandFailed,
    /// The command failed, and the kernel killed a process for want of memory while it ran.
    OutOfMemory,
    /// The command failed, and a disk of the job was full.
    DiskFull,
    /// The job was cancelled while the command ran.
    Cancelled,
    /// The command ended with 0, but `require-publish` was not met.
    NotPublished,
    /// The command ended with 0, and the policy withholds a path (`on-finding: fail`).
    Withheld,
    /// The command was not run: Nix could not be made ready, or the command itself not started.
    NotStarted,
}

impl Outcome {
    /// Every outcome, in the order of the pages.
    pub(crate) const ALL: [Self; 8] = [
        Self::Success,
        Self::CommandFailed,
        Self::OutOfMemory,
        Self::DiskFull,
        Self::Cancelled,
        Self::NotPublished,
        Self::Withheld,
        Self::NotStarted,
    ];

    /// The word of the step output `outcome`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::CommandFailed => "command-failed",
            Self::OutOfMemory => "out-of-memory",
            Self::DiskFull => "disk-full",
            Self::Cancelled => "cancelled",
            Self::NotPublished => "not-published",
            Self::Withheld => "withheld",
            Self::NotStarted => "not-started",
        }
    }
}

/// Whether this job used its cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum CacheState {
    /// The cache is among Nix's substituters.
    Attached,
    /// `attic-enabled: false`.
    Off,
    /// No server was named by input or hint.
    NotNamed,
    /// The cache failed the probe at a layer, and was left out.
    LeftOut {
        /// The layer's name (`name`, `connect`, `tls`, `http`, `authorised`, `cache`).
        layer: &'static str,
        /// What was seen and what to do.
        text: String,
    },
}

impl CacheState {
    /// The value of the step output `cache-state`.
    pub(crate) fn as_str(&self) -> String {
        match self {
            Self::Attached => "attached".into(),
            Self::Off => "off".into(),
            Self::NotNamed => "not-named".into(),
            Self::LeftOut { layer, .. } => format!("left-out-{layer}"),
        }
    }
}

/// The verdict of the trust gate, as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trust {
    /// `may-publish` or `read-only`.
    pub(crate) verdict: &'static str,
    /// Whether this job publishes.
    pub(crate) publishes: bool,
    /// What goes to the cache, `all` or `none`.
    pub(crate) attic: &'static str,
    /// What goes to FlakeHub, `rolling`, `versioned` or `none`.
    pub(crate) flakehub: &'static str,
    pub(crate) reason: String,
}

/// What the job did, beside publishing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// It ran a command.
    Command,
    /// It built a flake's outputs, which have a report of their own.
    Outputs,
    /// It watched the store while other steps worked.
    OtherSteps,
}

/// A build of this job that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FailedBuild {
    /// The full path of the derivation.
    pub(crate) derivation: String,
    /// Its name, such as `hello-2.12`.
    pub(crate) name: String,
    /// The last lines of its log, for the first few builds that failed.
    pub(crate) log_tail: Vec<String>,
}

/// The result of one job.
#[derive(Clone, Debug)]
pub(crate) struct JobResult {
    pub(crate) work: Work,
    pub(crate) outcome: Outcome,
    /// The step's exit code.
    pub(crate) exit_code: u8,
    /// The Nix that was used, such as `Nix 2.8.0 at /usr/bin/nix`.
    pub(crate) nix: String,
    pub(crate) trust: Trust,
    /// The address at which Nix reads the cache, without credentials, if one was named.
    pub(crate) cache: Option<String>,
    pub(crate) cache_state: CacheState,
    /// What went worse than it should, one line each.
    pub(crate) degraded: Vec<String>,
    /// The builds that failed, as far as Nix keeps logs that this job may show; empty for a job that ended well.
    pub(crate) failed_builds: Vec<FailedBuild>,
    /// Paths built here by this job.
    pub(crate) built: u64,
    /// Paths that this job substituted from a cache.
    pub(crate) substituted: u64,
    /// Sources and other paths added by this job.
    pub(crate) added: u64,
    /// The stores that nothing could be published from, with the reasons.
    pub(crate) not_watched: Vec<Missed>,
    /// What was published; `None` if the job does not publish.
    pub(crate) publication: Option<Publication>,
    /// Which store it was, and who else can have written it, in one line; `None` where it could not be read.
    pub(crate) store: Option<String>,
    /// Why the job does not publish, which is reported where there is no publication.
    pub(crate) unpublished: String,
    /// Time until Nix was ready.
    pub(crate) bootstrap: Duration,
    /// The parts of it, where Nix was installed.
    pub(crate) bootstrap_parts: Vec<(&'static str, Duration)>,
    /// Time of the command itself.
    pub(crate) command: Duration,
    /// Time of publishing and verifying after the command.
    pub(crate) publish: Duration,
    /// Peak memory of the job in bytes.
    pub(crate) peak: Option<u64>,
    /// The job's memory limit in bytes.
    pub(crate) limit: Option<u64>,
    /// Set if the command failed and the kernel killed a process for want of memory while it ran.
    pub(crate) out_of_memory: Option<OutOfMemory>,
    /// The lane to move to when memory runs out.
    pub(crate) heavy_lane: Option<String>,
    /// What the disks had while the command ran.
    pub(crate) disk: DiskReport,
}

impl JobResult {
    /// The closing line, such as `412 built, 412 published, 412 verified, 0 lost (3 skipped)`. Other numbers than these
    /// four are left out where they are zero.
    pub(crate) fn closing_line(&self) -> String {
        let nothing = Publication::default();
        let publication = self.publication.as_ref().unwrap_or(&nothing);
        let mut extras = Vec::new();
        let mut extra = |number: u64, words: &str| {
            if number > 0 {
                extras.push(format!("{number} {words}"));
            }
        };
        extra(self.substituted, "substituted");
        extra(
            publication.already_there,
            &format!("already there{}", publication.coverage.there_suffix()),
        );
        extra(publication.repaired.len() as u64, "repaired");
        extra(publication.skipped, "skipped");
        extra(publication.unverified.len() as u64, "unverified");
        extra(publication.withheld.len() as u64, "withheld");
        if self.publication.is_none() {
            extras.push(format!("not publishing: {}", self.unpublished));
        }
        let extras = if extras.is_empty() {
            String::new()
        } else {
            format!(" ({})", extras.join(", "))
        };
        format!(
            "{} built, {} published, {} verified{}, {}{extras}",
            self.built,
            publication.published,
            publication.verified,
            publication.coverage.suffix(),
            publication.losses(self.not_watched.len())
        )
    }

    /// Whether something that should be in the cache is not known to be there.
    pub(crate) fn has_losses(&self) -> bool {
        let lacks = |publication: &Publication| !publication.is_whole();
        self.publication.as_ref().is_some_and(lacks) || !self.not_watched.is_empty()
    }

    /// The parts of making Nix ready in brackets, where it was installed.
    pub(super) fn parts_of_bootstrap(&self) -> String {
        let parts = self.bootstrap_parts.iter();
        let parts: Vec<String> = parts
            .map(|(name, time)| format!("{name} {}", duration(*time)))
            .collect();
        if parts.is_empty() {
            String::new()
        } else {
            format!(" ({})", parts.join(", "))
        }
    }

    /// The times in one line, and the memory.
    pub(crate) fn clocks(&self) -> String {
        let memory = match (self.peak, self.limit) {
            (Some(peak), Some(limit)) => {
                format!(", peak memory {} of {}", bytes(peak), bytes(limit))
            }
            (Some(peak), None) => format!(", peak memory {}", bytes(peak)),
            (None, _) => String::new(),
        };
        format!(
            "bootstrap {}{}, command {}, publication {}{memory}",
            duration(self.bootstrap),
            self.parts_of_bootstrap(),
            duration(self.command),
            duration(self.publish)
        )
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn example() -> JobResult {
        JobResult {
            work: Work::Command,
            outcome: Outcome::Success,
            exit_code: 0,
            nix: "Nix 2.8.0 at /usr/bin/nix".into(),
            trust: Trust {
                verdict: "may-publish",
                publishes: true,
                attic: "all",
                flakehub: "rolling",
                reason: "a push to the default branch".into(),
            },
            cache: Some("https://cache.example/main".into()),
            cache_state: CacheState::Attached,
            degraded: Vec::new(),
            failed_builds: Vec::new(),
            built: 3,
            substituted: 0,
            added: 1,
            store: Some("this repository's alone".into()),
            unpublished: String::new(),
            not_watched: Vec::new(),
            publication: Some(Publication {
                published: 3,
                verified: 3,
                bytes: 2048,
                coverage: flywheel_cache::client::verify::Coverage {
                    sent: 3,
                    sent_read: 3,
                    ..Default::default()
                },
                ..Publication::default()
            }),
            bootstrap: Duration::from_millis(100),
            bootstrap_parts: Vec::new(),
            command: Duration::from_secs(2),
            publish: Duration::from_millis(500),
            peak: Some(64 << 20),
            limit: None,
            out_of_memory: None,
            heavy_lane: None,
            disk: DiskReport::default(),
        }
    }

    #[test]
    fn the_closing_line_counts_and_explains() {
        let mut job = example();
        assert_eq!(
            job.closing_line(),
            "3 built, 3 published, 3 verified, 0 lost"
        );
        job.publication.as_mut().expect("publishes").already_there = 2;
        assert_eq!(
            job.closing_line(),
            "3 built, 3 published, 3 verified, 0 lost (2 already there)"
        );
        job.not_watched = vec![Missed {
            path: "ssh-ng://host".into(),
            reason: "why".into(),
        }];
        assert_eq!(
            job.closing_line(),
            "3 built, 3 published, 3 verified, 1 store not watched (2 already there)"
        );
        job.not_watched.clear();
        job.publication = None;
        job.unpublished = "pull requests only read".into();
        assert_eq!(
            job.closing_line(),
            "3 built, 0 published, 0 verified, 0 lost (not publishing: pull requests only read)"
        );
    }
}
