//! Frees room in the store while a job runs (`reclaim: true`): paths that the job itself has added, that the cache serves
//! if the job publishes, and that Nix calls dead. It never decides for Nix what is dead.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::ownership::Ownership;
use super::stream::Published;
use flywheel_cache::client::verify::{Mode, Options, Verdict, verify};
use flywheel_core::disk::Reclaimed;
use flywheel_nix::gc;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store::Store;
use flywheel_nix::store_path::StorePath;
use flywheel_nix::tool::Nix;

/// How long the cache may take to show that it serves what is to be deleted.
const VERIFY_LIMIT: Duration = Duration::from_secs(60);
/// How long Nix may take to delete it. Another collection may hold its lock.
const DELETE_LIMIT: Duration = Duration::from_secs(60);
/// A path that was alive is tried again after this time.
const ALIVE_FOR: Duration = Duration::from_secs(10);

/// The paths that were given to Nix to delete, whether or not it did.
#[derive(Clone, Debug, Default)]
pub(super) struct Attempted(Arc<Mutex<Vec<PathInfo>>>);

impl Attempted {
    fn paths(&self) -> MutexGuard<'_, Vec<PathInfo>> {
        self.0
            .lock()
            .expect("nothing panics while it holds this lock")
    }

    /// Those of the paths that are gone.
    pub(super) fn gone(&self, store: &Store) -> Vec<PathInfo> {
        gone(&self.paths(), store)
    }
}

/// Frees room on demand.
pub(super) struct Reclaimer {
    nix: Nix,
    ownership: Arc<Ownership>,
    /// `None` for a job that publishes nothing: nothing of it has to be in a cache first.
    published: Option<Published>,
    attempted: Attempted,
    /// Paths that the cache was seen to serve, or an upstream cache has signed.
    safe: HashSet<StorePath>,
    /// Paths that were alive, and when.
    alive: HashMap<StorePath, Instant>,
}

impl Reclaimer {
    pub(super) fn new(
        nix: Nix,
        ownership: Arc<Ownership>,
        published: Option<Published>,
        attempted: Attempted,
    ) -> Self {
        Self {
            nix,
            ownership,
            published,
            attempted,
            safe: HashSet::new(),
            alive: HashMap::new(),
        }
    }

    /// Frees about `needed` bytes, if there is so much to free.
    ///
    /// # Errors
    /// With the reason, in one line, when the store or Nix fails.
    pub(super) async fn free(&mut self, needed: u64) -> Result<Reclaimed, String> {
        let store = &self.ownership.store;
        let found = store.added_since(&self.ownership.mark).await;
        let found = found.map_err(|error| error.to_string())?;
        let evidence = self.ownership.evidence(&[]).await;
        let evidence = evidence.map_err(|error| error.to_string())?;
        self.alive.retain(|_, at| at.elapsed() < ALIVE_FOR);
        let mut own = found.infos;
        own.retain(|info| evidence.is_own_alone(info) && !self.alive.contains_key(&info.path));
        let settled = self.settled(own).await;
        let chosen = choose(settled, needed);
        let chosen = self.served(chosen).await;
        if chosen.is_empty() {
            return Ok(Reclaimed::default());
        }
        self.attempted.paths().extend(chosen.iter().cloned());
        let deleted = gc::delete_dead(&self.nix, &chosen, DELETE_LIMIT).await;
        let now = Instant::now();
        let alive = deleted.map_err(|error| error.to_string())?;
        self.alive.extend(alive.into_iter().map(|path| (path, now)));
        Ok(sum(&gone(&chosen, &self.ownership.store)))
    }

    /// Those of the paths that need not be sent any more.
    async fn settled(&mut self, mut own: Vec<PathInfo>) -> Vec<PathInfo> {
        let Some(published) = &self.published else {
            return own;
        };
        let served = match published.publisher.upgrade() {
            Some(publisher) => publisher.served().await,
            None => Vec::new(),
        };
        let upstream = served.iter().filter(|path| path.is_upstream);
        self.safe
            .extend(upstream.map(|path| path.info.path.clone()));
        let settled: HashSet<StorePath> = served.into_iter().map(|path| path.info.path).collect();
        own.retain(|info| settled.contains(&info.path));
        own
    }

    /// Those of the paths that the cache is seen to serve, each with its body: once they are gone, it has the only copy.
    async fn served(&mut self, chosen: Vec<PathInfo>) -> Vec<PathInfo> {
        let Some(published) = &self.published else {
            return chosen;
        };
        let (mut safe, unseen): (Vec<PathInfo>, Vec<PathInfo>) = chosen
            .into_iter()
            .partition(|info| self.safe.contains(&info.path));
        let options = Options {
            mode: Mode::Full,
            ..published.verify.clone()
        };
        let until = tokio::time::Instant::now() + VERIFY_LIMIT;
        let cancel = CancellationToken::new();
        let verification = verify(published.to.clone(), unseen, &options, until, &cancel).await;
        let good = verification.paths.into_iter();
        let good = good.filter(|(_, verdict)| matches!(verdict, Verdict::Good { body: true }));
        let good: Vec<PathInfo> = good.map(|(info, _)| info).collect();
        // A job that is killed from here on leaves nothing to be done for them.
        published
            .journal
            .settled(good.iter().map(|info| &info.path));
        self.safe.extend(good.iter().map(|info| info.path.clone()));
        safe.extend(good);
        safe
    }
}

fn gone(infos: &[PathInfo], store: &Store) -> Vec<PathInfo> {
    let is_gone = |info: &&PathInfo| store.file_of(&info.path).symlink_metadata().is_err();
    let mut gone: Vec<PathInfo> = infos.iter().filter(is_gone).cloned().collect();
    gone.sort_by(|a, b| a.path.cmp(&b.path));
    gone.dedup_by(|a, b| a.path == b.path);
    gone
}

/// The number and the size of these paths.
pub(super) fn sum(infos: &[PathInfo]) -> Reclaimed {
    Reclaimed {
        paths: infos.len() as u64,
        size: infos.iter().map(|info| info.nar_size).sum(),
    }
}

/// The largest of these paths, up to `needed` bytes, each with those among them that refer to it: Nix deletes no path that
/// another one needs.
fn choose(mut infos: Vec<PathInfo>, needed: u64) -> Vec<PathInfo> {
    infos.sort_by(|a, b| (b.nar_size, &a.path).cmp(&(a.nar_size, &b.path)));
    let mut referrers: HashMap<&StorePath, Vec<usize>> = HashMap::new();
    for (at, info) in infos.iter().enumerate() {
        for path in info.references.iter().filter(|path| **path != info.path) {
            referrers.entry(path).or_default().push(at);
        }
    }
    let mut chosen = HashSet::new();
    let mut size = 0_u64;
    for first in 0..infos.len() {
        if size >= needed {
            break;
        }
        let mut ahead = vec![first];
        while let Some(at) = ahead.pop() {
            if chosen.insert(at) {
                size = size.saturating_add(infos[at].nar_size);
                ahead.extend(referrers.get(&infos[at].path).into_iter().flatten());
            }
        }
    }
    let all = infos.into_iter().enumerate();
    all.filter(|(at, _)| chosen.contains(at))
        .map(|(_, info)| info)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use flywheel_nix::hash::Sha256;

    fn path(letter: char) -> StorePath {
        let base_name = format!("{}-x", letter.to_string().repeat(32));
        StorePath::from_base_name(&base_name).expect("base name")
    }

    fn info(letter: char, nar_size: u64, references: &str) -> PathInfo {
        PathInfo {
            path: path(letter),
            nar_hash: Sha256([0; 32]),
            nar_size,
            references: references.chars().map(path).collect(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
            ultimate: true,
        }
    }

    fn chosen(infos: Vec<PathInfo>, needed: u64) -> String {
        let mut letters: Vec<char> = choose(infos, needed)
            .iter()
            .map(|info| info.path.base_name().chars().next().expect("a hash"))
            .collect();
        letters.sort_unstable();
        letters.into_iter().collect()
    }

    #[test]
    fn the_largest_go_first_with_what_refers_to_them_and_no_more_than_is_needed() {
        let infos = || {
            vec![
                info('a', 10, ""),
                info('b', 1, "a"),
                info('c', 2, "bc"),
                info('d', 5, ""),
                info('f', 3, "z"),
            ]
        };
        assert_eq!(chosen(infos(), 0), "");
        assert_eq!(chosen(infos(), 1), "abc");
        assert_eq!(chosen(infos(), 14), "abcd");
        assert_eq!(chosen(infos(), u64::MAX), "abcdf");
    }
}
