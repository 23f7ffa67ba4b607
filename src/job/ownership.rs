//! Which of the paths added to the store are this job's: the rule for each path, both while the job runs and at its
//! end. `added_paths` adds what the job's results need, whichever job made it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::StorePath;
use flywheel_nix::temp_roots::{Owner, TempRootWatcher};

/// How long an unclaimed path waits for another job to come to light.
const HOLD: Duration = Duration::from_secs(1);

/// How long a path has been valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Age {
    /// It has just become valid.
    New,
    /// It has waited for `HOLD`, or the job has ended.
    Waited,
}

/// What becomes of an added path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// It is the job's own.
    Publish,
    /// No process was seen to add it, and no other job was at work so far.
    Hold,
    /// No process was seen to add it, and another job was at work.
    Ambiguous,
    /// It is another job's, or a derivation.
    LeaveOut,
}

/// Decides which of these added paths are the job's own, in their order.
pub(super) fn decide(
    infos: Vec<PathInfo>,
    age: Age,
    temp_roots: &TempRootWatcher,
) -> Vec<(PathInfo, Decision)> {
    if infos.is_empty() {
        return Vec::new();
    }
    let paths: Vec<StorePath> = infos.iter().map(|info| info.path.clone()).collect();
    let owners = temp_roots.owners(&paths);
    let decided = infos.into_iter().zip(owners).map(|(info, owner)| {
        let decision = match (owner, age) {
            // A derivation's closure is its build-time sources, which nothing substitutes.
            _ if info.path.is_derivation() => Decision::LeaveOut,
            (Owner::ThisJob, _) => Decision::Publish,
            (Owner::OtherJob, _) => Decision::LeaveOut,
            (Owner::Ambiguous, _) => Decision::Ambiguous,
            // A process can be gone before its file is read. With no other job at work, the path is this job's;
            // another job's first file may be seen a moment later than its path.
            (Owner::Unclaimed, Age::New) => Decision::Hold,
            (Owner::Unclaimed, Age::Waited) => Decision::Publish,
        };
        (info, decision)
    });
    decided.collect()
}

/// Picks the job's own paths out of those that become valid, as early as their owner can be known.
#[derive(Debug)]
pub(super) struct OwnershipFilter {
    temp_roots: Arc<TempRootWatcher>,
    /// Unclaimed paths, and until when they wait; the oldest first.
    held: VecDeque<(Instant, PathInfo)>,
}

impl OwnershipFilter {
    pub(crate) fn new(temp_roots: Arc<TempRootWatcher>) -> Self {
        Self {
            temp_roots,
            held: VecDeque::new(),
        }
    }

    /// Gives the job's own of what has just become valid, and of what has waited long enough by `now`. A path that
    /// is never given here is decided on once more when the store is read at the job's end.
    pub(crate) fn accept(&mut self, new: Vec<PathInfo>, now: Instant) -> Vec<PathInfo> {
        let due = self
            .held
            .iter()
            .take_while(|(until, _)| *until <= now)
            .count();
        let waited = self.held.drain(..due).map(|(_, info)| info).collect();
        let mut accepted = Vec::new();
        let decided = decide(waited, Age::Waited, &self.temp_roots);
        for (info, decision) in decided
            .into_iter()
            .chain(decide(new, Age::New, &self.temp_roots))
        {
            match decision {
                Decision::Publish => accepted.push(info),
                Decision::Hold => self.held.push_back((now + HOLD, info)),
                Decision::Ambiguous | Decision::LeaveOut => (),
            }
        }
        accepted
    }

    /// Waits until the first of the held paths has waited long enough; for ever when none is held.
    pub(crate) async fn due(&self) {
        match self.held.front() {
            Some((until, _)) => tokio::time::sleep_until(*until).await,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use flywheel_nix::hash::Sha256;
    use flywheel_nix::temp_roots::JobScope;

    fn path(name: &str) -> StorePath {
        format!("/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-{name}")
            .parse()
            .expect("valid")
    }

    fn info(name: &str) -> PathInfo {
        PathInfo {
            path: path(name),
            nar_hash: Sha256([0; 32]),
            nar_size: 1,
            references: Vec::new(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
            ultimate: true,
        }
    }

    fn adds(state: &Path, pid: u32, path: &StorePath) {
        fs::write(
            state.join("temproots").join(pid.to_string()),
            format!("{path}\0"),
        )
        .expect("written");
    }

    fn watched() -> (tempfile::TempDir, OwnershipFilter) {
        let state = tempfile::tempdir().expect("temporary folder");
        fs::create_dir(state.path().join("temproots")).expect("made");
        let temp_roots = Arc::new(TempRootWatcher::start(state.path(), JobScope::Descendants));
        (state, OwnershipFilter::new(temp_roots))
    }

    #[test]
    fn what_our_process_adds_goes_at_once() {
        let (state, mut filter) = watched();
        adds(state.path(), std::process::id(), &path("ours"));
        assert_eq!(
            filter.accept(vec![info("ours")], Instant::now()),
            [info("ours")]
        );
    }

    #[test]
    fn an_unclaimed_path_goes_when_no_other_job_came_to_light() {
        let (_state, mut filter) = watched();
        let now = Instant::now();
        assert!(filter.accept(vec![info("quick")], now).is_empty());
        assert!(filter.accept(Vec::new(), now + HOLD / 2).is_empty());
        assert_eq!(filter.accept(Vec::new(), now + HOLD), [info("quick")]);
        assert!(filter.accept(Vec::new(), now + 2 * HOLD).is_empty(), "once");
    }

    #[test]
    fn an_unclaimed_path_stays_when_another_job_came_to_light() {
        let (state, mut filter) = watched();
        let now = Instant::now();
        assert!(filter.accept(vec![info("strangers")], now).is_empty());
        adds(state.path(), 1, &path("more"));
        assert!(filter.accept(vec![info("more")], now + HOLD).is_empty());
        assert!(filter.accept(Vec::new(), now + 2 * HOLD).is_empty());
    }
}
