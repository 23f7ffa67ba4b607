//! Fits an evaluation to the machine: how many workers run, how much memory each may use, which one
//! is killed when memory runs short, and how idle workers steal work. Pure: other modules measure
//! and act.

/// Memory of a worker for a medium-sized flake, in bytes. If there is less per worker, fewer
/// workers run.
const WORKER_BYTES: u64 = 768 * 1024 * 1024;
/// The part of each limit that is left free, as a divisor, since the kernel kills before its count
/// is exact.
const RESERVE: u64 = 10;

/// The current memory situation, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryRoom {
    /// The lowest limit of the control groups, if any.
    pub limit: Option<u64>,
    /// Memory used by this program and its other children.
    pub others: u64,
    /// Memory the machine has available for new processes.
    pub available: Option<u64>,
    /// Memory used by the workers.
    pub workers: u64,
}

impl MemoryRoom {
    /// Memory that all workers together may use; `None` if nothing is known.
    pub fn for_workers(&self) -> Option<u64> {
        let of_group = self
            .limit
            .map(|limit| (limit - limit / RESERVE).saturating_sub(self.others));
        let of_machine = self.available.map(|available| {
            // The workers' own memory is not available any more, but it is theirs to use.
            let all = available + self.workers;
            all - all / RESERVE
        });
        // The tighter of the two limits decides.
        [of_group, of_machine].into_iter().flatten().min()
    }
}

/// The number of workers: as requested, otherwise as many as cores and memory allow.
pub fn workers(requested: Option<usize>, cores: usize, room: Option<u64>) -> usize {
    let fit = room.map_or(usize::MAX, |room| {
        usize::try_from(room / WORKER_BYTES).unwrap_or(usize::MAX)
    });
    requested.unwrap_or_else(|| cores.min(fit)).max(1)
}

/// Memory in bytes above which a worker is replaced before its next attribute.
pub fn share(room: Option<u64>, workers: usize) -> u64 {
    room.map_or(u64::MAX, |room| room / workers.max(1) as u64)
}

/// The worker to kill if all together use more than the available memory: the largest.
pub fn too_large(held: &[u64], room: Option<u64>) -> Option<usize> {
    let all: u64 = held.iter().sum();
    let over = room.is_some_and(|room| all > room);
    held.iter()
        .enumerate()
        .max_by_key(|(_, held)| **held)
        .map(|(worker, _)| worker)
        .filter(|_| over)
}

/// The number of waiting attributes that a new worker takes: its equal share.
pub fn chunk(requested: Option<usize>, waiting: usize, workers: usize) -> usize {
    requested
        .unwrap_or_else(|| waiting.div_ceil(workers.max(1)))
        .clamp(1, waiting.max(1))
}

/// The number of attributes to steal from a worker that has `left` to go, each taking `each`
/// seconds, when starting a worker takes `start` seconds. Both then end at the same time. Returns 0
/// if this saves less than it costs.
pub fn steal(left: usize, each: f64, start: f64) -> usize {
    let saved = (left as f64 * each - start) / 2.0;
    // Stealing must save more than the start of another worker costs.
    if saved > start {
        (saved / each) as usize
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_least_limit_holds_and_a_part_of_it_stays_free() {
        let room = MemoryRoom {
            limit: Some(2 * GIB),
            others: GIB / 4,
            available: Some(100 * GIB),
            workers: GIB,
        };
        assert_eq!(room.for_workers(), Some(2 * GIB - 2 * GIB / 10 - GIB / 4));
        let room = MemoryRoom {
            available: Some(GIB),
            workers: GIB,
            ..MemoryRoom::default()
        };
        assert_eq!(room.for_workers(), Some(2 * GIB - 2 * GIB / 10));
        assert_eq!(MemoryRoom::default().for_workers(), None);
        assert_eq!(
            MemoryRoom {
                limit: Some(GIB),
                others: 2 * GIB,
                ..MemoryRoom::default()
            }
            .for_workers(),
            Some(0)
        );
    }

    #[test]
    fn workers_fit_cores_and_memory() {
        for (requested, cores, room, fit) in [
            (None, 4, None, 4),
            (None, 16, Some(2 * GIB), 2),
            (None, 2, Some(64 * GIB), 2),
            (None, 4, Some(0), 1),
            (Some(3), 1, Some(0), 3),
        ] {
            assert_eq!(
                workers(requested, cores, room),
                fit,
                "{requested:?} {cores} {room:?}"
            );
        }
    }

    #[test]
    fn the_largest_goes_when_all_are_too_large() {
        assert_eq!(too_large(&[1, 5, 3], Some(8)), Some(1));
        assert_eq!(too_large(&[1, 5, 3], Some(9)), None);
        assert_eq!(too_large(&[1, 5, 3], None), None);
        assert_eq!(too_large(&[], Some(0)), None);
    }

    #[test]
    fn chunks_are_few_and_what_is_taken_over_is_worth_a_start() {
        assert_eq!(
            (
                chunk(None, 2000, 2),
                chunk(None, 3, 2),
                chunk(Some(4), 2000, 2),
                chunk(None, 0, 2)
            ),
            (1000, 2, 4, 1)
        );
        assert_eq!(
            (
                steal(100, 0.1, 0.1),
                steal(100, 0.001, 0.1),
                steal(1, 9.0, 0.1)
            ),
            (49, 0, 0)
        );
        assert_eq!(
            (steal(9, 0.0, 0.1), steal(0, 0.1, 0.0), steal(9, 1.0, 0.0)),
            (0, 0, 4)
        );
    }
}
