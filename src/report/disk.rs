//! What a job's disks had, as plain data that the verb fills in.

use flywheel_core::disk::{DiskFull, DiskUse, OwnPaths, Reclaimed, disk_full};

/// What a job's disks had, and what was done about it.
#[derive(Clone, Debug, Default)]
pub(crate) struct DiskReport {
    /// The file systems that had little room.
    pub(crate) low: Vec<DiskUse>,
    /// Set if the command failed because a disk was full.
    pub(crate) full: Option<DiskFull>,
    /// The job's own paths, if the store's disk had little room.
    pub(crate) own: OwnPaths,
    /// What the job freed.
    pub(crate) reclaimed: Reclaimed,
    /// The input `reclaim`.
    pub(crate) may_reclaim: bool,
}

impl DiskReport {
    /// Decides whether a command that failed has failed of a full disk. `reported`: whether the logs of what failed say so.
    #[must_use]
    pub(crate) fn judged(self, failed: bool, reported: bool) -> Self {
        Self {
            full: disk_full(&self.low, failed, reported),
            ..self
        }
    }

    /// What happened and what to do, if the command failed because a disk was full.
    pub(crate) fn full_text(&self) -> Option<String> {
        let full = self.full.as_ref()?;
        Some(full.text(&self.own, self.may_reclaim))
    }

    /// The least room of each file system that had little, for the table of the summary.
    pub(crate) fn lowest(&self) -> Option<String> {
        let low = self.low.iter();
        let low: Vec<String> = low
            .map(|disk| format!("{} on {}", disk.lowest.left(), disk.name))
            .collect();
        (!low.is_empty()).then(|| low.join("; "))
    }

    /// What was freed, if anything was.
    pub(crate) fn freed(&self) -> Option<String> {
        (self.reclaimed.paths > 0).then(|| self.reclaimed.text())
    }
}
