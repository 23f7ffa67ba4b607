//! Garbage collection: decides which paths to remove when a cache is too old or too large. The plan
//! is pure; carrying it out never leaves a path without its references.
//!
//! A path counts as used when anything that refers to it is used. So no path is older than its
//! referrers, and removing the least recently used paths, referrers first, breaks no closure.

use std::collections::{HashMap, HashSet};
use std::fs::Metadata;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use crate::server::folder::{entries, read_small};
use crate::server::records::Upload;
use crate::server::sealed::unseal;
use crate::server::store::{Store, TOUCH_INTERVAL};
use flywheel_core::text::{bytes, count};
use flywheel_nix::cache_name::CacheName;
use flywheel_nix::hash::Sha256;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::store_path::PathHash;

#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Paths not used for this long are removed.
    pub max_age: Option<Duration>,
    /// Maximum bytes of compressed NARs; beyond it, the least recently used paths are removed.
    pub max_size: Option<u64>,
    /// Paths used within this time are kept regardless of size, and unclaimed NARs are kept this
    /// long.
    pub grace: Duration,
}

/// One path of one cache, as input of the plan.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    pub(crate) cache: CacheName,
    pub(crate) hash: PathHash,
    /// The hashes it refers to, in the same cache.
    pub(crate) references: Vec<PathHash>,
    /// The modification time of its narinfo.
    pub(crate) modified: SystemTime,
    /// Time of the last use of the path or its NAR.
    pub(crate) used: SystemTime,
    pub(crate) nar: Sha256,
    /// Size of the compressed NAR in bytes.
    pub(crate) size: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Paths removed.
    pub(crate) paths: u64,
    /// NARs removed.
    pub(crate) nars: u64,
    /// Bytes of NARs removed.
    pub(crate) bytes: u64,
    pub(crate) kept_paths: u64,
    pub(crate) kept_bytes: u64,
    pub(crate) took: Duration,
}

impl std::fmt::Display for GcReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (paths, nars) = (count(self.paths, "path"), count(self.nars, "NAR"));
        let (gone, kept) = (bytes(self.bytes), bytes(self.kept_bytes));
        let (kept_paths, ms) = (count(self.kept_paths, "path"), self.took.as_millis());
        write!(
            f,
            "gc: {paths} and {nars} removed ({gone}), {kept_paths} kept ({kept}), {ms} ms"
        )
    }
}

/// Returns the indices of the objects to remove, referrers before what they refer to.
///
/// Objects used after `fresh` are not removed because of the size limit.
pub(crate) fn plan(
    objects: &[Object],
    limits: &Limits,
    now: SystemTime,
    fresh: SystemTime,
) -> Vec<usize> {
    let by_key = index(objects);
    let (order, used) = eviction_order(objects, &by_key);
    let mut users: HashMap<Sha256, usize> = HashMap::new();
    let mut total = 0;
    for object in objects {
        // Several paths may share one NAR, whose bytes count once.
        let users = users.entry(object.nar).or_default();
        total += if *users == 0 { object.size } else { 0 };
        *users += 1;
    }
    let oldest = limits.max_age.and_then(|age| now.checked_sub(age));
    let mut victims = Vec::new();
    for n in order {
        let too_old = oldest.is_some_and(|oldest| used[n] < oldest);
        let too_much = limits.max_size.is_some_and(|size| total > size) && used[n] <= fresh;
        // The order is by age, so nothing after this one has to go either.
        if !too_old && !too_much {
            break;
        }
        victims.push(n);
        let users = users.entry(objects[n].nar).or_default();
        *users -= 1;
        // A NAR is shared: its bytes are free only when its last path is gone.
        total -= if *users == 0 { objects[n].size } else { 0 };
    }
    close_cycles(objects, &by_key, &mut victims);
    victims
}

type Index<'a> = HashMap<(&'a CacheName, &'a PathHash), usize>;

fn index(objects: &[Object]) -> Index<'_> {
    objects
        .iter()
        .enumerate()
        .map(|(n, object)| ((&object.cache, &object.hash), n))
        .collect()
}

/// Returns all objects, the least recently used first and referrers before what they refer to, and
/// the time at which each was last used, by itself or by a referrer.
///
/// A depth-first walk starts at each object, the most recently used first: everything it reaches
/// that no earlier walk has reached counts as used at the same time. The reversed post-order of all
/// walks is the result.
fn eviction_order(objects: &[Object], by_key: &Index<'_>) -> (Vec<usize>, Vec<SystemTime>) {
    let mut newest: Vec<usize> = (0..objects.len()).collect();
    newest.sort_by_key(|n| std::cmp::Reverse(objects[*n].used));
    let mut used: Vec<SystemTime> = objects.iter().map(|object| object.used).collect();
    let mut seen = vec![false; objects.len()];
    let mut order = Vec::with_capacity(objects.len());
    for root in newest {
        if std::mem::replace(&mut seen[root], true) {
            continue;
        }
        // An explicit stack: a chain of references may be deeper than the thread's stack.
        let mut walk = vec![(root, 0)];
        while let Some((n, next)) = walk.pop() {
            used[n] = objects[root].used;
            let Some(reference) = objects[n].references.get(next) else {
                order.push(n);
                continue;
            };
            walk.push((n, next + 1));
            if let Some(&below) = by_key.get(&(&objects[n].cache, reference))
                && !std::mem::replace(&mut seen[below], true)
            {
                walk.push((below, 0));
            }
        }
    }
    // The post-order has references first, and the oldest walk last.
    order.reverse();
    (order, used)
}

/// Adds the objects that would lose a reference. Nix has no cycles of references, but a client can
/// upload one, and then no order is right.
fn close_cycles(objects: &[Object], by_key: &Index<'_>, victims: &mut Vec<usize>) {
    let mut gone: HashSet<usize> = victims.iter().copied().collect();
    loop {
        let broken: Vec<usize> = (0..objects.len())
            .filter(|n| !gone.contains(n))
            .filter(|n| references(objects, by_key, *n).any(|below| gone.contains(&below)))
            .collect();
        if broken.is_empty() {
            return;
        }
        gone.extend(&broken);
        // They go first, since they refer to the others.
        victims.splice(0..0, broken);
    }
}

fn references<'a>(
    objects: &'a [Object],
    by_key: &'a Index<'_>,
    n: usize,
) -> impl Iterator<Item = usize> + 'a {
    let object = &objects[n];
    object
        .references
        .iter()
        .filter_map(|hash| by_key.get(&(&object.cache, hash)).copied())
}

/// Removes what exceeds the limits, and NARs that no path claims.
///
/// `shared` is true while clients use the cache; recently used paths are then kept. Reading happens
/// while they work; only the removal makes them wait.
///
/// # Errors
/// When the disk fails; what has been removed by then leaves a consistent cache.
pub(crate) fn collect(store: &Store, limits: &Limits, shared: bool) -> io::Result<GcReport> {
    let begun = Instant::now();
    let now = SystemTime::now();
    // Uses are recorded at most once a minute, so anything within two minutes may be in use now.
    let grace = if shared {
        limits.grace.max(2 * TOUCH_INTERVAL)
    } else {
        Duration::ZERO
    };
    let fresh = now.checked_sub(grace).unwrap_or(SystemTime::UNIX_EPOCH);
    let objects = scan(store)?;
    let victims = plan(&objects, limits, now, fresh);
    // The plan was made without this lock; `remove_objects` skips what has been used since.
    let _closed = store.lock_for_removal();
    let mut report = GcReport::default();
    let gone = remove_objects(store, &objects, &victims)?;
    let kept = || {
        objects
            .iter()
            .enumerate()
            .filter(|(n, _)| !gone.contains(n))
            .map(|(_, object)| object)
    };
    // NARs go after the paths that name them, so no visible path ever lacks its NAR.
    let claimed: HashSet<Sha256> = kept().map(|object| object.nar).collect();
    (report.paths, report.kept_paths) = (gone.len() as u64, kept().count() as u64);
    for cache in store.folder().caches()? {
        let marked: HashSet<String> = kept()
            .filter(|object| object.cache == cache)
            .map(|object| object.nar.base32())
            .collect();
        sweep(&store.folder().markers(&cache), fresh, |name| {
            marked.contains(name)
        })?;
        // Whoever sent a NAR asks for it by the name that it gave it.
        let uploads = store.folder().uploads(&cache);
        sweep(&uploads, fresh, |name| {
            let record = read_small(&uploads.join(name)).ok();
            record
                .and_then(|record| Upload::from_record(&record))
                .is_some_and(|upload| marked.contains(&upload.nar_hash.base32()))
        })?;
    }
    let names: HashSet<String> = claimed
        .iter()
        .map(crate::server::folder::nar_name)
        .collect();
    (report.nars, report.bytes) =
        sweep(&store.folder().nars(), fresh, |name| names.contains(name))?;
    let mut counted = HashSet::new();
    report.kept_bytes = kept()
        .filter(|object| counted.insert(object.nar))
        .map(|object| object.size)
        .sum();
    report.took = begun.elapsed();
    Ok(report)
}

/// Reads every path of every cache, and takes the occasion to find damage that shows without reading the NARs. A path
/// without its NAR has size 0.
fn scan(store: &Store) -> io::Result<Vec<Object>> {
    let mut objects = Vec::new();
    for cache in store.folder().caches()? {
        for entry in entries(&store.folder().objects(&cache))? {
            let entry = entry?;
            let name = entry.file_name();
            let hash = name.to_str().and_then(|name| name.strip_suffix(".narinfo"));
            let Some(hash) = hash.and_then(|hash| PathHash::parse(hash).ok()) else {
                continue;
            };
            // A path that is being replaced exists before and after, so skipping it is safe.
            let (Ok(bytes), Ok(about)) = (read_small(&entry.path()), entry.metadata()) else {
                continue;
            };
            // A torn one already counts as missing, and is replaced when the path is sent again.
            let text = unseal(&bytes);
            let Some(info) = text.and_then(|text| NarInfo::parse(text).ok()) else {
                continue;
            };
            let nar = std::fs::metadata(store.folder().nar(&info.nar_hash)).ok();
            if nar
                .as_ref()
                .is_some_and(|nar| info.file_size != Some(nar.len()))
            {
                store.confirm(info.clone())?;
            }
            objects.push(object(&cache, hash, &info, &about, nar.as_ref())?);
        }
    }
    Ok(objects)
}

fn object(
    cache: &CacheName,
    hash: PathHash,
    info: &NarInfo,
    about: &Metadata,
    nar: Option<&Metadata>,
) -> io::Result<Object> {
    let modified = about.modified()?;
    let nar_used = nar.and_then(|nar| nar.modified().ok());
    Ok(Object {
        cache: cache.clone(),
        hash,
        references: info
            .references
            .iter()
            .map(flywheel_nix::store_path::StorePath::hash)
            .collect(),
        modified,
        // Reading the narinfo and downloading the NAR are recorded separately.
        used: nar_used.map_or(modified, |used| used.max(modified)),
        nar: info.nar_hash,
        size: nar.map_or(0, Metadata::len),
    })
}

/// Removes the victims, except those used since the plan was made and everything these refer to.
fn remove_objects(
    store: &Store,
    objects: &[Object],
    victims: &[usize],
) -> io::Result<HashSet<usize>> {
    let by_key = index(objects);
    let (mut gone, mut rescued) = (HashSet::new(), HashSet::new());
    for &n in victims {
        let object = &objects[n];
        let file = store.folder().object(&object.cache, &object.hash);
        let unused = std::fs::metadata(&file)
            .and_then(|about| about.modified())
            .is_ok_and(|modified| modified == object.modified);
        // A client may rely on a path it has just used.
        if rescued.contains(&n) || !unused {
            // Referrers come first, so the whole closure is rescued step by step.
            rescued.extend(references(objects, &by_key, n));
            continue;
        }
        std::fs::remove_file(&file)?;
        gone.insert(n);
    }
    Ok(gone)
}

/// Removes the files that are neither kept nor used since `fresh`; returns their number and bytes.
fn sweep(folder: &Path, fresh: SystemTime, keep: impl Fn(&str) -> bool) -> io::Result<(u64, u64)> {
    let (mut files, mut size) = (0, 0);
    for entry in entries(folder)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(&keep) {
            continue;
        }
        let about = entry.metadata()?;
        if about.is_file() && about.modified()? <= fresh {
            std::fs::remove_file(entry.path())?;
            files += 1;
            size += about.len();
        }
    }
    Ok((files, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn hash(letter: char) -> PathHash {
        PathHash::parse(&letter.to_string().repeat(32)).expect("base32")
    }

    /// An object named `letter` with these references and this size, used this many hours ago.
    fn object(letter: char, hours: u32, references: &str, size: u64) -> Object {
        let used = now() - HOUR * hours;
        Object {
            cache: CacheName::default(),
            hash: hash(letter),
            references: references.chars().map(hash).collect(),
            modified: used,
            used,
            nar: Sha256([letter as u8; 32]),
            size,
        }
    }

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + HOUR * 1000
    }

    /// The letters of the objects to remove, in order.
    fn check(objects: &[Object], max_age_hours: Option<u32>, max_size: Option<u64>) -> String {
        let limits = Limits {
            max_age: max_age_hours.map(|hours| HOUR * hours),
            max_size,
            grace: HOUR,
        };
        let victims = plan(objects, &limits, now(), now() - HOUR);
        victims
            .iter()
            .map(|n| {
                objects[*n]
                    .hash
                    .as_str()
                    .chars()
                    .next()
                    .expect("32 of them")
            })
            .collect()
    }

    #[test]
    fn age_counts_from_the_last_use_of_any_referrer() {
        let all = [
            object('a', 5, "b", 1),
            object('b', 90, "c", 1),
            object('c', 99, "", 1),
            object('d', 50, "", 1),
        ];
        assert_eq!(check(&all, Some(48), None), "d");
        assert_eq!(check(&all, Some(4), None), "dabc");
        assert_eq!(check(&all, None, None), "");
    }

    #[test]
    fn size_takes_the_least_recently_used_and_referrers_first() {
        let all = [
            object('a', 20, "b", 10),
            object('b', 90, "", 10),
            object('c', 10, "", 10),
            object('d', 0, "", 10),
        ];
        assert_eq!(check(&all, None, Some(40)), "");
        assert_eq!(check(&all, None, Some(39)), "a");
        assert_eq!(check(&all, None, Some(20)), "ab");
        assert_eq!(check(&all, None, Some(0)), "abc", "what is in use stays");
    }

    #[test]
    fn a_nar_frees_space_only_with_its_last_path() {
        let mut all = [
            object('a', 30, "", 10),
            object('b', 20, "", 10),
            object('c', 10, "", 10),
        ];
        all[1].nar = all[0].nar;
        assert_eq!(check(&all, None, Some(15)), "ab");
    }

    #[test]
    fn no_kept_path_refers_to_a_removed_one_even_in_a_circle() {
        let all = [
            object('a', 20, "ab", 10),
            object('b', 30, "a", 10),
            object('c', 10, "z", 10),
        ];
        assert_eq!(check(&all, None, Some(20)).len(), 2, "both of the circle");
        let chain: Vec<Object> = (0..20_u8)
            .map(|n| {
                let letters = "0123456789abcdfghijk";
                let letter = |n: u8| letters.as_bytes()[usize::from(n)] as char;
                let below = if n > 0 {
                    letter(n - 1).to_string()
                } else {
                    String::new()
                };
                object(letter(n), u32::from(n * 7 % 20) + 2, &below, 1)
            })
            .collect();
        for size in 0..20 {
            let victims = check(&chain, None, Some(size));
            let kept = |hash: &PathHash| !victims.contains(&hash.as_str()[..1]);
            for object in chain.iter().filter(|object| kept(&object.hash)) {
                assert!(object.references.iter().all(kept), "{size}: {victims}");
            }
        }
    }

    #[test]
    fn what_is_used_between_plan_and_removal_stays_with_its_closure() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let main = CacheName::default();
        let opened =
            crate::server::folder::Folder::open(folder.path(), std::slice::from_ref(&main));
        let (store, _) = Store::open(
            opened.expect("nobody has it"),
            flywheel_core::progress::Sink::silent(),
        )
        .expect("the disk works");
        let mut all = [
            object('a', 9, "b", 1),
            object('b', 9, "c", 1),
            object('c', 9, "", 1),
        ];
        for object in &mut all {
            let file = store.folder().object(&main, &object.hash);
            std::fs::write(&file, "").expect("written");
            object.modified = std::fs::metadata(&file)
                .and_then(|about| about.modified())
                .expect("there");
        }
        let victims = plan(
            &all,
            &Limits {
                max_size: Some(0),
                ..Limits::default()
            },
            now(),
            now(),
        );
        assert_eq!(victims, [0, 1, 2]);
        let used = std::fs::File::open(store.folder().object(&main, &all[1].hash)).expect("there");
        used.set_modified(SystemTime::now() + HOUR).expect("ours");
        let gone = remove_objects(&store, &all, &victims).expect("the disk works");
        assert_eq!(gone, HashSet::from([0]), "`b` was used, and needs `c`");
    }
}
