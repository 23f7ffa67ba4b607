//! How an evaluation is fitted to the machine: how many workers, what each may take, who has to go when memory
//! runs short, and who takes over whose attributes. Pure: others measure and act.

/// An evaluation of a middling flake takes this much, in bytes; with less than this for each, fewer workers run.
const WORKER_BYTES: u64 = 768 * 1024 * 1024;
/// Of each limit this part is left free, as a divisor: the kernel kills before its count is exact.
const RESERVE: u64 = 10;

/// Memory as it is now, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryRoom {
    /// The least limit of the control group, if it has one.
    pub limit: Option<u64>,
    /// What this program and its other children hold of it.
    pub others: u64,
    /// What the machine has left for new processes.
    pub available: Option<u64>,
    /// What the workers hold already.
    pub workers: u64,
}

impl MemoryRoom {
    /// What all workers together may hold, in bytes; `None` where nothing is known.
    pub fn for_workers(&self) -> Option<u64> {
        let of_group = self
            .limit
            .map(|limit| (limit - limit / RESERVE).saturating_sub(self.others));
        let of_machine = self.available.map(|available| {
            let all = available + self.workers;
            all - all / RESERVE
        });
        [of_group, of_machine].into_iter().flatten().min()
    }
}

/// How many workers evaluate: as many as were requested, else as many as cores and memory allow.
pub fn workers(requested: Option<usize>, cores: usize, room: Option<u64>) -> usize {
    let fit = room.map_or(usize::MAX, |room| {
        usize::try_from(room / WORKER_BYTES).unwrap_or(usize::MAX)
    });
    requested.unwrap_or_else(|| cores.min(fit)).max(1)
}

/// What a worker may hold before it is retired at its next attribute, in bytes.
pub fn share(room: Option<u64>, workers: usize) -> u64 {
    room.map_or(u64::MAX, |room| room / workers.max(1) as u64)
}

/// Which worker has to go at once, as all together hold more than there is room for: the largest.
pub fn too_large(held: &[u64], room: Option<u64>) -> Option<usize> {
    let all: u64 = held.iter().sum();
    let over = room.is_some_and(|room| all > room);
    held.iter()
        .enumerate()
        .max_by_key(|(_, held)| **held)
        .map(|(worker, _)| worker)
        .filter(|_| over)
}

/// How many attributes a new worker takes of those that wait: all that is its share.
pub fn chunk(requested: Option<usize>, waiting: usize, workers: usize) -> usize {
    requested
        .unwrap_or_else(|| waiting.div_ceil(workers.max(1)))
        .clamp(1, waiting.max(1))
}

/// How many attributes a new worker takes over from the end of one that has `left` to go, each of `each`
/// seconds, where starting costs `start` seconds: as many as let both end at once, if that saves more than it costs.
pub fn steal(left: usize, each: f64, start: f64) -> usize {
    let saved = (left as f64 * each - start) / 2.0;
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
