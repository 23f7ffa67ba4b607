//! The journal against random jobs that are killed at any byte.

use std::collections::BTreeMap;

use fastrand::Rng;

use super::line::{Entry, JournalContent, Step};
use super::*;

const CACHE: &str = "http://cache.example/main";

fn path(n: usize) -> StorePath {
    StorePath::from_base_name(&format!("fvchbymk0m4jvldpb9m5hy0bjy2lf30k-path-{n}")).expect("valid")
}

/// A folder that only we can write to.
fn folder() -> (tempfile::TempDir, Folder) {
    let outer = tempfile::tempdir().expect("temporary folder");
    let folder = Folder::open(&outer.path().join("a/journal")).expect("made");
    (outer, folder)
}

fn files(folder: &Folder) -> Vec<PathBuf> {
    let entries = fs::read_dir(&folder.0)
        .expect("there")
        .flatten()
        .map(|entry| entry.path());
    entries
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == EXTENSION)
        })
        .collect()
}

fn names(left: &Left) -> Vec<String> {
    left.seen
        .iter()
        .map(|(path, _)| path.name().to_owned())
        .collect()
}

/// Every path goes through its states in order; the paths are interleaved at random, the file is cut at a random byte,
/// and garbage may follow. What is left is exactly the content of the complete lines.
#[test]
fn whatever_the_order_and_wherever_it_is_cut_nothing_is_forgotten() {
    let steps = [
        Step::Expected,
        Step::Seen,
        Step::Planned,
        Step::Uploaded,
        Step::Settled,
    ];
    for seed in 0..400 {
        let mut rng = Rng::with_seed(seed);
        let mut text = Entry::begin(CACHE, Some(7), 1000).to_line();
        let header = text.len();
        // Each line's end in the file, its path and its state.
        let mut written: Vec<(usize, usize, Step)> = Vec::new();
        let mut walks: Vec<(usize, usize, usize)> = (0..rng.usize(1..12))
            .map(|n| (n, rng.usize(0..2), 0))
            .collect();
        for walk in &mut walks {
            walk.2 = rng.usize(walk.1..=steps.len());
        }
        while let Some(at) = (!walks.is_empty()).then(|| rng.usize(0..walks.len())) {
            let (n, next, last) = walks[at];
            if next >= last {
                walks.swap_remove(at);
                continue;
            }
            text.push_str(&Entry::paths(steps[next], &[path(n).base_name()]).to_line());
            written.push((text.len(), n, steps[next]));
            walks[at].1 += 1;
        }
        let cut = rng.usize(header..=text.len());
        let mut bytes = text.as_bytes()[..cut].to_vec();
        if rng.bool() {
            // A torn line begins with a line break, too.
            bytes.push(b'\n');
            bytes.extend((0..rng.usize(0..40)).map(|_| rng.u8(..)));
            // A line that is written after the torn one counts.
            bytes.extend(
                Entry::paths(Step::Seen, &[path(99).base_name()])
                    .to_line()
                    .bytes(),
            );
            written.push((cut, 99, Step::Seen));
        }
        let mut states: BTreeMap<usize, Step> = BTreeMap::new();
        for (_, n, step) in written.iter().filter(|(end, ..)| *end <= cut) {
            let state = states.entry(*n).or_insert(*step);
            *state = (*state).max(*step);
        }
        let of = |wanted: fn(Step) -> bool| {
            let mut paths: Vec<StorePath> = states
                .iter()
                .filter(|(_, step)| wanted(**step))
                .map(|(n, _)| path(*n))
                .collect();
            paths.sort();
            paths
        };
        let read = JournalContent::parse(&bytes);
        let seen: Vec<StorePath> = read.seen().map(|(path, _)| path).collect();
        assert_eq!(
            seen,
            of(|step| step > Step::Expected && step < Step::Settled),
            "seed {seed}"
        );
        assert_eq!(
            read.expected().collect::<Vec<_>>(),
            of(|step| step == Step::Expected),
            "seed {seed}"
        );
        assert_eq!(
            (read.cache.as_deref(), read.mark, read.begun),
            (Some(CACHE), Some(7), Some(1000))
        );
    }
}

#[test]
fn a_line_with_one_byte_changed_does_not_count() {
    let line = Entry::paths(Step::Seen, &[path(1).base_name()]).to_line();
    for at in 1..line.len() {
        let mut bytes = line.clone().into_bytes();
        bytes[at] ^= 1;
        assert_eq!(JournalContent::parse(&bytes).seen().count(), 0, "byte {at}");
    }
}

#[test]
fn the_next_job_takes_up_what_a_killed_one_left() {
    let (_outer, folder) = folder();
    let journal = folder.begin(CACHE, Some(41)).expect("begun");
    journal.expected([&path(0), &path(1), &path(2)]);
    journal.seen([&path(1), &path(2), &path(3)]);
    journal.planned([&path(2)]);
    journal.uploaded([&path(3)]);
    journal.settled([&path(1)]);
    assert!(
        folder.left(CACHE).expect("read").is_empty(),
        "its job is alive"
    );
    // As after a kill: the lock is released, and the file stays.
    drop(journal);
    assert!(
        folder
            .left("http://other.example/main")
            .expect("read")
            .is_empty(),
        "another cache's"
    );

    let left = folder.left(CACHE).expect("read");
    assert_eq!(names(&left), ["path-2", "path-3"]);
    assert_eq!(left.expected, [(41, vec![path(0)])]);
    assert!(
        folder.left(CACHE).expect("read").is_empty(),
        "two jobs do not take up the same"
    );
    let next = folder.begin(CACHE, Some(50)).expect("begun");
    next.carried(
        &left
            .seen
            .iter()
            .map(|(path, since)| (path, Some(*since)))
            .collect::<Vec<_>>(),
    );
    left.taken_up();
    assert_eq!(files(&folder).len(), 1);
    drop(next);
    assert_eq!(
        names(&folder.left(CACHE).expect("read")),
        ["path-2", "path-3"],
        "killed again"
    );
}

#[test]
fn a_job_that_ends_well_leaves_nothing_and_a_loss_is_kept() {
    let (_outer, folder) = folder();
    let journal = folder.begin(CACHE, Some(1)).expect("begun");
    journal.expected([&path(7)]);
    journal.seen([&path(1)]);
    journal.settled([&path(1)]);
    journal.close();
    assert_eq!(files(&folder), Vec::<PathBuf>::new());

    let journal = folder.begin(CACHE, Some(1)).expect("begun");
    journal.expected([&path(7)]);
    journal.seen([&path(1), &path(2)]);
    journal.settled([&path(1)]);
    journal.close();
    let left = folder.left(CACHE).expect("read");
    assert_eq!(
        (names(&left), left.expected.len()),
        (vec!["path-2".to_owned()], 0)
    );
}

#[test]
fn age_is_bounded_and_the_folder_private() {
    let (_outer, folder) = folder();
    let journal = folder.begin(CACHE, None).expect("begun");
    journal.seen([&path(1)]);
    let mode = |path: &Path| fs::metadata(path).expect("there").mode() & 0o777;
    assert_eq!((mode(&folder.0), mode(&files(&folder)[0])), (0o700, 0o600));
    drop(journal);
    let later = now() + AGE_LIMIT_SECONDS + 10;
    assert!(
        folder
            .left_at("http://other.example/x", later)
            .expect("read")
            .is_empty()
    );
    assert_eq!(files(&folder), Vec::<PathBuf>::new());

    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o770)).expect("set");
    assert!(matches!(Folder::open(&folder.0), Err(Error::Untrusted(_))));
}
