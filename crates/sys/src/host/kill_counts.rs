//! How many processes the kernel has killed because memory ran out, in a control group and on the machine. Two readings
//! and their difference are evidence; what follows from it is decided elsewhere.

use super::memory::{Cgroup, field, killed_on_machine};

/// The kernel's counters; one that cannot be read is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KillCounts {
    /// Processes of the group and of all groups below it (`oom_kill` in `memory.events`).
    pub in_group: Option<u64>,
    /// Times that the group was killed as a whole (`oom_group_kill`, since Linux 5.17).
    pub whole_groups: Option<u64>,
    /// Processes of the machine (`oom_kill` in `/proc/vmstat`, since Linux 4.13).
    pub on_machine: Option<u64>,
}

impl KillCounts {
    /// Reads the counters of a group and of the machine.
    pub fn read(group: Option<&Cgroup>) -> Self {
        // Version 1 counts for each group alone, and the count of a step's group goes with that group. Its parent's zero
        // would say that nothing was killed.
        let events = match group {
            Some(Cgroup::V2(folder)) => Some(folder.join("memory.events")),
            Some(Cgroup::V1(_)) | None => None,
        };
        let of_group = |name| events.as_deref().and_then(|file| field(file, name));
        Self {
            in_group: of_group("oom_kill"),
            whole_groups: of_group("oom_group_kill"),
            on_machine: killed_on_machine(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_group_of_version_2_has_both_counts_and_one_of_version_1_has_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let events = "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 1\n";
        fs::write(folder.path().join("memory.events"), events).expect("a file");
        let counts = |group: &Cgroup| KillCounts::read(Some(group));
        let of_v2 = counts(&Cgroup::V2(folder.path().to_owned()));
        assert_eq!((of_v2.in_group, of_v2.whole_groups), (Some(2), Some(1)));
        let of_v1 = counts(&Cgroup::V1(folder.path().to_owned()));
        assert_eq!((of_v1.in_group, of_v1.whole_groups), (None, None));
        // An older kernel has no count of groups.
        fs::write(folder.path().join("memory.events"), "oom_kill 4\n").expect("a file");
        let older = counts(&Cgroup::V2(folder.path().to_owned()));
        assert_eq!((older.in_group, older.whole_groups), (Some(4), None));
        assert_eq!(
            counts(&Cgroup::V2(folder.path().join("gone"))).in_group,
            None
        );
    }

    #[test]
    fn the_machines_count_is_that_of_the_kernel() {
        let text = fs::read_to_string("/proc/vmstat").expect("Linux has it");
        let line = text.lines().find(|line| line.starts_with("oom_kill "));
        let count = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
        // It may rise between the two readings.
        assert!(KillCounts::read(None).on_machine >= count);
        assert!(count.is_some());
    }
}
