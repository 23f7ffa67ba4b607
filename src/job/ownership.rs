//! Which of the paths that become valid are this job's, told as early as that can be known. Publishes nothing.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::StorePath;
use flywheel_nix::temp_roots::{Owner, TempRootWatcher};

/// How long a path that nobody was seen to add waits for another job to come to light.
const HOLD: Duration = Duration::from_secs(1);

/// Tells the job's own paths from others', as they become valid.
#[derive(Debug)]
pub struct OwnershipFilter {
    clients: Arc<TempRootWatcher>,
    /// Paths that nobody was seen to add, and until when they wait; the oldest first.
    held: VecDeque<(Instant, PathInfo)>,
}

impl OwnershipFilter {
    /// Tells them by what is seen of the store's clients.
    pub fn new(clients: Arc<TempRootWatcher>) -> Self {
        Self {
            clients,
            held: VecDeque::new(),
        }
    }

    /// The job's own of what has just become valid, and of what has waited long enough by `now`. What still waits
    /// when nobody asks any more is for whoever looks the store through at the end.
    pub fn of(&mut self, new: Vec<PathInfo>, now: Instant) -> Vec<PathInfo> {
        let due = self
            .held
            .iter()
            .take_while(|(until, _)| *until <= now)
            .count();
        let waited: Vec<PathInfo> = self.held.drain(..due).map(|(_, info)| info).collect();
        let mut ours = Vec::new();
        for (info, whose) in self.told(waited) {
            if matches!(whose, Owner::ThisJob | Owner::Unclaimed) {
                ours.push(info);
            }
        }
        for (info, whose) in self.told(new) {
            match whose {
                Owner::ThisJob => ours.push(info),
                Owner::Unclaimed => self.held.push_back((now + HOLD, info)),
                Owner::OtherJob | Owner::Ambiguous => (),
            }
        }
        ours
    }

    fn told(&self, infos: Vec<PathInfo>) -> Vec<(PathInfo, Owner)> {
        if infos.is_empty() {
            return Vec::new();
        }
        let paths: Vec<StorePath> = infos.iter().map(|info| info.path.clone()).collect();
        infos.into_iter().zip(self.clients.owners(&paths)).collect()
    }

    /// Waits until the first of the waiting paths has waited enough; for ever when none waits.
    pub async fn due(&self) {
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
        let clients = Arc::new(TempRootWatcher::start(state.path(), JobScope::Descendants));
        (state, OwnershipFilter::new(clients))
    }

    #[test]
    fn what_our_process_adds_goes_at_once() {
        let (state, mut ours) = watched();
        adds(state.path(), std::process::id(), &path("ours"));
        assert_eq!(ours.of(vec![info("ours")], Instant::now()), [info("ours")]);
    }

    #[test]
    fn what_nobody_was_seen_to_add_goes_when_no_other_job_came_to_light() {
        let (_state, mut ours) = watched();
        let now = Instant::now();
        assert!(ours.of(vec![info("quick")], now).is_empty());
        assert!(ours.of(Vec::new(), now + HOLD / 2).is_empty());
        assert_eq!(ours.of(Vec::new(), now + HOLD), [info("quick")]);
        assert!(ours.of(Vec::new(), now + 2 * HOLD).is_empty(), "once");
    }

    #[test]
    fn what_nobody_was_seen_to_add_stays_when_another_job_came_to_light() {
        let (state, mut ours) = watched();
        let now = Instant::now();
        assert!(ours.of(vec![info("strangers")], now).is_empty());
        adds(state.path(), 1, &path("more"));
        assert!(ours.of(vec![info("more")], now + HOLD).is_empty());
        assert!(ours.of(Vec::new(), now + 2 * HOLD).is_empty());
    }
}
