//! Room on a job's file systems: when it is low, when it was full, how soon to look again, and the words for it. Pure:
//! `host/disk` reads the numbers.

use std::time::Duration;

use crate::text::{bytes, count, duration};

/// Below this much free room a file system is low …
const FLOOR: u64 = 1 << 30;
/// … or below this share of it, where that is less.
const FLOOR_SHARE: u64 = 10;
/// Below this many free inodes a file system is low: a copy of nixpkgs has about as many files …
const INODE_FLOOR: u64 = 50_000;
/// … or below this share of them, where that is less.
const INODE_FLOOR_SHARE: u64 = 20;
/// A file system counts as full with no more than this share of it free: what is written comes in pieces, and the last
/// one that does not fit leaves a rest.
const FULL_SHARE: u64 = 256;
const FULL_LEAST: u64 = 256 * 1024;
const FULL_MOST: u64 = 32 << 20;
/// The same for inodes, which are taken one by one.
const INODES_FULL_MOST: u64 = 16;
/// No job fills a file system faster than this, in bytes and in inodes a second. So the next look comes before it can be
/// full.
const FASTEST: u64 = 4 << 30;
const FASTEST_INODES: u64 = 400_000;
const POLL_LEAST: Duration = Duration::from_millis(5);
const POLL_MOST: Duration = Duration::from_secs(1);
/// A command that fails this long after the file system was full has failed of that.
const RECENT: Duration = Duration::from_secs(120);

/// So many folders of the job are named for one file system.
const SHOWN: usize = 2;

/// What a file system had and has at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Its size in bytes.
    pub total: u64,
    /// What an ordinary user may still write, in bytes.
    pub free: u64,
    /// `None` where inodes are made as they are needed, as on btrfs.
    pub inodes: Option<Inodes>,
}

/// The files and folders that a file system can hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inodes {
    pub total: u64,
    pub free: u64,
}

impl Room {
    /// Whether it will soon be full, or is.
    pub fn is_low(&self) -> bool {
        self.is_below(1) || self.is_full()
    }

    /// Whether a job that may free room should: before the room is low, as freeing it takes time.
    pub fn wants_more(&self) -> bool {
        self.is_below(2) || self.is_full()
    }

    fn is_below(&self, floors: u64) -> bool {
        self.free < floors * self.floor() || self.lacks_inodes(floors)
    }

    fn floor(&self) -> u64 {
        FLOOR.min(self.total / FLOOR_SHARE)
    }

    fn lacks_inodes(&self, floors: u64) -> bool {
        self.inodes.is_some_and(|Inodes { total, free }| {
            free < floors * INODE_FLOOR.min(total / INODE_FLOOR_SHARE)
        })
    }

    /// How many bytes a job that may free room should free at least: with inodes, their number decides and not their size.
    pub fn shortfall(&self) -> u64 {
        if self.lacks_inodes(2) {
            u64::MAX
        } else {
            (3 * self.floor()).saturating_sub(self.free)
        }
    }

    /// Whether nothing more can be written.
    pub fn is_full(&self) -> bool {
        let rest = (self.total / FULL_SHARE).clamp(FULL_LEAST, FULL_MOST);
        // Of a file system without a size, such as some network drives, nothing is known.
        (self.total > 0 && self.free <= rest.min(self.total / 2)) || self.has_no_inodes()
    }

    fn has_no_inodes(&self) -> bool {
        self.inodes.is_some_and(|Inodes { total, free }| {
            total > 0 && free <= (total / 1024).clamp(1, INODES_FULL_MOST)
        })
    }

    /// The least room of both, each number by itself.
    #[must_use]
    pub fn least(self, other: Self) -> Self {
        Self {
            total: other.total,
            free: self.free.min(other.free),
            inodes: match (self.inodes, other.inodes) {
                (Some(one), Some(two)) => Some(Inodes {
                    total: two.total,
                    free: one.free.min(two.free),
                }),
                (one, two) => two.or(one),
            },
        }
    }

    /// When to look again.
    pub fn next_look(&self) -> Duration {
        let until_full = Duration::from_secs_f64(self.free as f64 / FASTEST as f64);
        let inodes = self.inodes.map_or(POLL_MOST, |inodes| {
            Duration::from_secs_f64(inodes.free as f64 / FASTEST_INODES as f64)
        });
        until_full.min(inodes).clamp(POLL_LEAST, POLL_MOST)
    }

    /// What is left, such as `12.0 MiB of 64.0 MiB, and 3 of 100 inodes`; inodes only where they are what is short.
    pub fn left(&self) -> String {
        let room = format!("{} of {}", bytes(self.free), bytes(self.total));
        match self.inodes {
            Some(Inodes { total, free }) if self.lacks_inodes(1) => {
                format!("{room}, and {free} of {total} inodes")
            }
            _ => room,
        }
    }
}

/// What was seen of a file system while a command ran.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskUse {
    /// Where it is mounted, and what it is: `/nix (tmpfs)`.
    pub name: String,
    /// What of the job lies there: `the store /nix/store`.
    pub holds: Vec<String>,
    /// Whether the store is among that.
    pub has_store: bool,
    /// The least room that was seen.
    pub lowest: Room,
    /// The room at the end.
    pub last: Room,
    /// How long before the command's end it was seen to be full, if it was.
    pub full_before_end: Option<Duration>,
    /// At the end, a small file could not be written there for want of room, or because a quota was used up.
    pub refuses: bool,
}

impl DiskUse {
    /// Whether there is anything to report.
    pub fn was_low(&self) -> bool {
        self.lowest.is_low() || self.refuses
    }

    /// Whether a command that failed has failed of this. `reported`: whether the last lines of its log say so, which is
    /// believed where there was little room.
    fn is_cause(&self, reported: bool) -> bool {
        self.refuses
            || self.full_before_end.is_some_and(|before| before <= RECENT)
            || (reported && self.lowest.is_low())
    }

    fn subject(&self) -> String {
        let (shown, more) = self.holds.split_at(self.holds.len().min(SHOWN));
        let more = if more.is_empty() { "" } else { " and more" };
        format!("`{}`, with {}{more},", self.name, shown.join(" and "))
    }

    /// The warning of a file system that is low. `own`: the job's own paths there.
    pub fn warning(&self, own: &OwnPaths, may_reclaim: bool) -> String {
        format!(
            "{} is nearly full: {} are left. {}",
            self.subject(),
            self.lowest.left(),
            self.advice(own, may_reclaim)
        )
    }

    /// What to do, and what there is of the job's own: last, since a long list may be cut.
    fn advice(&self, own: &OwnPaths, may_reclaim: bool) -> String {
        let remedy = self.remedy(may_reclaim);
        if self.has_store {
            format!("{remedy} {}", own.sentence())
        } else {
            remedy.to_owned()
        }
    }

    fn remedy(&self, may_reclaim: bool) -> &'static str {
        match (self.has_store, may_reclaim) {
            (true, false) => {
                "Set `reclaim: true` to have this job's own garbage freed, or give the runner a larger volume there."
            }
            (true, true) => "Give the runner a larger volume there, or keep fewer results alive.",
            (false, _) => {
                "Give the runner a larger volume there, or move what the job keeps there to another one (`TMPDIR`, input `journal`, `embedded-cache`)."
            }
        }
    }
}

/// The finding that a command failed of a full disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFull(DiskUse);

/// Decides from what the file systems had, never from a command's words alone. A command that succeeded in spite of a full
/// disk did not fail of it.
pub fn disk_full(disks: &[DiskUse], failed: bool, reported: bool) -> Option<DiskFull> {
    let mut causes = disks.iter().filter(|disk| disk.is_cause(reported));
    // The store comes first: there the job can help itself.
    let first = causes.clone().find(|disk| disk.has_store);
    let found = first.or_else(|| causes.next());
    found.filter(|_| failed).cloned().map(DiskFull)
}

impl DiskFull {
    /// Describes what happened and what to do.
    pub fn text(&self, own: &OwnPaths, may_reclaim: bool) -> String {
        let disk = &self.0;
        let lowest = &disk.lowest;
        let what = match (lowest.has_no_inodes(), lowest.is_full()) {
            (true, _) => "ran out of inodes",
            (false, true) => "was full",
            (false, false) if disk.refuses => "took no more files, as at the end of a quota,",
            (false, false) => "had too little room",
        };
        let when = match disk.full_before_end {
            Some(before) if before > Duration::from_secs(1) => {
                format!(" {} before the command failed", duration(before))
            }
            _ => " when the command failed".to_owned(),
        };
        format!(
            "{} {what}{when} (lowest: {}). {}",
            disk.subject(),
            lowest.left(),
            disk.advice(own, may_reclaim)
        )
    }
}

/// The job's own paths in the store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnPaths {
    pub number: u64,
    /// The size of all of them, in bytes.
    pub size: u64,
    /// The largest, each with its size, largest first.
    pub largest: Vec<(String, u64)>,
}

impl OwnPaths {
    fn sentence(&self) -> String {
        if self.number == 0 {
            return "No valid path there is this job's own.".to_owned();
        }
        let largest = self.largest.iter();
        let largest: Vec<String> = largest
            .map(|(path, size)| format!("{path} ({})", bytes(*size)))
            .collect();
        format!(
            "This job's own there are {} of {}, the largest: {}.",
            count(self.number, "path"),
            bytes(self.size),
            largest.join(", ")
        )
    }
}

/// What a job freed in the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reclaimed {
    pub paths: u64,
    /// The size of their NARs, in bytes.
    pub size: u64,
}

impl Reclaimed {
    /// Such as `3 paths of this job's, of 120.0 MiB`.
    pub fn text(&self) -> String {
        format!(
            "{} of this job's own, of {}",
            count(self.paths, "path"),
            bytes(self.size)
        )
    }
}

/// Whether a log says that a disk or a quota is full, in the words of the system or of SQLite.
pub fn reports_full(log: &str) -> bool {
    [
        "No space left on device",
        "Disk quota exceeded",
        "database or disk is full",
    ]
    .iter()
    .any(|words| log.contains(words))
}

#[cfg(test)]
mod tests;
