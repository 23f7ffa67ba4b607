//! The memory budget of a job: decides whether a command ran out of memory, and words the advice.
//! Pure: `host/memory` reads the counters.

use crate::text::bytes;

/// The kernel's counters around a command's run, and how the command ended.
#[derive(Clone, Copy, Debug, Default)]
pub struct Observed {
    /// Processes of our control group that the kernel killed for memory while the command ran.
    pub killed_in_group: u64,
    /// The same for the whole machine; they may belong to others.
    pub killed_on_machine: u64,
    pub failed: bool,
    /// The limit in bytes.
    pub limit: Option<u64>,
    /// The peak in bytes.
    pub peak: Option<u64>,
}

/// The finding that a command ran out of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutOfMemory {
    /// Whether the kill was counted in our own control group. Otherwise it was counted for the
    /// machine, while the command failed.
    pub(crate) certain: bool,
    /// The limit in bytes.
    pub(crate) limit: Option<u64>,
    /// The peak in bytes.
    pub(crate) peak: Option<u64>,
}

/// Decides from the kernel's counters, never from the command's output. A command that succeeded in
/// spite of a kill (by trying again, say) did not run out of memory.
pub fn out_of_memory(observed: &Observed) -> Option<OutOfMemory> {
    let certain = observed.killed_in_group > 0;
    // The machine's counter is weaker evidence: the kill may have hit another job.
    let killed = certain || observed.killed_on_machine > 0;
    (observed.failed && killed).then_some(OutOfMemory {
        certain,
        limit: observed.limit,
        peak: observed.peak,
    })
}

impl OutOfMemory {
    /// Describes what happened and what to do. `heavy_lane` names the runners to move to.
    pub fn text(&self, heavy_lane: Option<&str>) -> String {
        let who = if self.certain {
            "the kernel killed a process of this job because memory ran out"
        } else {
            "the kernel killed a process of this machine because memory ran out while the command failed"
        };
        let limit = self
            .limit
            .map_or("no limit of its own".to_owned(), |limit| {
                format!("a limit of {}", bytes(limit))
            });
        let peak = self
            .peak
            .map(|peak| format!(", peak {}", bytes(peak)))
            .unwrap_or_default();
        let advice = match heavy_lane {
            Some(lane) => format!("run it on `{lane}`"),
            None => "run it on a lane with more memory (name it in the input `heavy-lane`), or build with fewer jobs"
                .to_owned(),
        };
        format!("{who} ({limit}{peak}): {advice}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_failed_command_with_a_counted_kill_was_out_of_memory() {
        let base = Observed {
            failed: true,
            ..Observed::default()
        };
        assert_eq!(out_of_memory(&base), None);
        assert!(
            out_of_memory(&Observed {
                killed_in_group: 1,
                ..base
            })
            .is_some_and(|found| found.certain)
        );
        assert!(
            out_of_memory(&Observed {
                killed_on_machine: 1,
                ..base
            })
            .is_some_and(|found| !found.certain)
        );
        assert_eq!(
            out_of_memory(&Observed {
                killed_in_group: 1,
                failed: false,
                ..base
            }),
            None
        );
    }

    #[test]
    fn the_text_names_limit_peak_and_lane() {
        let found = OutOfMemory {
            certain: true,
            limit: Some(8 << 30),
            peak: Some(8 << 30),
        };
        let text = found.text(Some("nix-heavy"));
        assert!(
            text.contains("8.0 GiB") && text.contains("`nix-heavy`"),
            "{text}"
        );
        assert!(found.text(None).contains("`heavy-lane`"));
    }
}
