//! The journal against random jobs that are killed at any byte.

use std::collections::BTreeMap;

use fastrand::Rng;

use super::line::{Entry, JournalContent, Step};
use super::*;

const CACHE: &str = "http://cache.example/main";
const STORE: &str = "/nix/var/nix";

fn path(n: usize) -> StorePath {
    StorePath::from_base_name(&format!("fvchbymk0m4jvldpb9m5hy0bjy2lf30k-path-{n}")).expect("valid")
}

/// A folder that only we can write to.
fn folder() -> (tempfile::TempDir, Folder) {
    let outer = tempfile::tempdir().expect("temporary folder");
    let folder = Folder::open(
        &outer.path().join("a/journal"),
        Path::new(STORE),
        Some(path(7)),
    )
    .expect("made");
    (outer, folder)
}

fn files(folder: &Folder) -> Vec<PathBuf> {
    let entries = fs::read_dir(&folder.path)
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
        let mut text = Entry::begin(CACHE, STORE, (Some(7), None), 1000).to_line();
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
    let journal = folder
        .begin(Some(CACHE), Some(41), &Left::default())
        .expect("begun");
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
    let unaccounted = Unaccounted {
        marked: Some(path(7)),
        since: left.unaccounted[0].since,
        mark: 41,
        until: None,
    };
    assert_eq!(left.unaccounted, [unaccounted]);
    assert!(
        folder.left(CACHE).expect("read").is_empty(),
        "two jobs do not take up the same"
    );
    let next = folder.begin(Some(CACHE), Some(50), &left).expect("begun");
    let text = fs::read(&next.0.as_ref().expect("open").path).expect("there");
    assert_eq!(
        JournalContent::parse(&text).until,
        None,
        "no other job lives"
    );
    next.carried(
        &left
            .seen
            .iter()
            .map(|(path, since)| (path, Some(*since)))
            .collect::<Vec<_>>(),
    )
    .expect("written");
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
    let journal = folder
        .begin(Some(CACHE), Some(1), &Left::default())
        .expect("begun");
    journal.expected([&path(7)]);
    journal.seen([&path(1)]);
    journal.settled([&path(1)]);
    assert_eq!(journal.close().kept, BTreeSet::new());
    assert_eq!(files(&folder), Vec::<PathBuf>::new());

    let journal = folder
        .begin(Some(CACHE), Some(1), &Left::default())
        .expect("begun");
    journal.expected([&path(7)]);
    journal.seen([&path(1), &path(2)]);
    journal.settled([&path(1)]);
    let closed = journal.close();
    assert_eq!(
        (closed.kept, closed.problem),
        (BTreeSet::from([path(2)]), None)
    );
    let left = folder.left(CACHE).expect("read");
    assert_eq!(
        (names(&left), left.expected.len(), left.unaccounted.len()),
        (vec!["path-2".to_owned()], 0, 0)
    );
}

/// The range of ids for which the only dead job for `CACHE` left no account.
fn range(folder: &Folder) -> Option<(i64, Option<Until>)> {
    let left = folder.left(CACHE).expect("read");
    left.unaccounted.first().map(|job| (job.mark, job.until))
}

fn until(id: i64, heir: bool) -> Option<Until> {
    Some(Until { id, heir })
}

#[test]
fn a_job_that_could_not_read_the_store_leaves_it_to_the_next() {
    let (_outer, folder) = folder();
    let journal = folder
        .begin(Some(CACHE), Some(5), &Left::default())
        .expect("begun");
    assert_eq!(journal.leave().kept, BTreeSet::new());
    assert_eq!(range(&folder), Some((5, None)));
}

#[test]
fn the_account_of_a_dead_job_ends_where_another_one_begins() {
    let other = "http://other.example/main";
    for (cache, is_heir) in [(None, false), (Some(other), false), (Some(CACHE), true)] {
        let (_outer, folder) = folder();
        // As after a kill before the first path: only its first line is there.
        drop(
            folder
                .begin(Some(CACHE), Some(5), &Left::default())
                .expect("begun"),
        );
        assert_eq!(range(&folder), Some((5, None)));
        folder
            .begin(cache, Some(8), &Left::default())
            .expect("begun")
            .close();
        folder
            .begin(cache, Some(9), &Left::default())
            .expect("begun")
            .close();
        assert_eq!(range(&folder), Some((5, until(8, is_heir))), "{cache:?}");
        assert_eq!(files(&folder).len(), 1);
    }
}

#[test]
fn a_job_on_another_store_has_marks_of_another_database() {
    let (_outer, folder) = folder();
    let elsewhere = Folder {
        store: "/dir/nix/var/nix".into(),
        ..folder.clone()
    };
    let begin = |folder: &Folder, mark| {
        let begun = folder.begin(Some(CACHE), Some(mark), &Left::default());
        begun.expect("begun")
    };
    let killed = begin(&folder, 800);
    killed.seen([&path(1)]);
    drop(killed);
    // It begins beside a living job and after a dead one, and touches neither's account.
    let living = begin(&folder, 900);
    begin(&elsewhere, 5).close();
    assert!(elsewhere.left(CACHE).expect("read").is_empty());
    living.close();
    assert_eq!(range(&folder), Some((800, until(900, true))));
    assert_eq!(names(&folder.left(CACHE).expect("read")), ["path-1"]);
    // One that does not say which store it is of is taken up on each.
    assert!(JournalContent::default().is_of_store(STORE));
}

#[test]
fn of_jobs_at_the_same_time_none_accounts_for_what_it_did_not_name() {
    let other = "http://other.example/main";
    for (cache, is_heir) in [(None, false), (Some(other), false), (Some(CACHE), true)] {
        let (_outer, folder) = folder();
        let living = folder
            .begin(cache, Some(3), &Left::default())
            .expect("begun");
        drop(
            folder
                .begin(Some(CACHE), Some(5), &Left::default())
                .expect("begun"),
        );
        assert_eq!(range(&folder), Some((5, until(5, is_heir))), "{cache:?}");
        let text = fs::read(&living.0.as_ref().expect("open").path).expect("there");
        assert_eq!(JournalContent::parse(&text).until, until(5, is_heir));
        living.close();
    }
    // A job that publishes nothing and was killed is forgotten.
    let (_outer, folder) = folder();
    drop(
        folder
            .begin(None, Some(3), &Left::default())
            .expect("begun"),
    );
    assert_eq!(range(&folder), None);
    assert_eq!(files(&folder), Vec::<PathBuf>::new());
}

#[test]
fn what_is_no_journal_is_refused_at_once_and_named() {
    let (_outer, folder) = folder();
    let at = |name: &str| folder.path.join(name);
    let pipe = |name: &str| {
        rustix::fs::mkfifoat(rustix::fs::CWD, at(name), rustix::fs::Mode::from(0o600))
            .expect("made");
    };
    pipe("pipe.journal");
    std::os::unix::fs::symlink(at("pipe.journal"), at("link.journal")).expect("linked");
    File::create(at("large.journal"))
        .and_then(|file| file.set_len(10_000_000_000))
        .expect("a sparse file");
    // Earlier versions locked a file of this name; nothing waits for it any more.
    pipe("lock");
    let journal = folder
        .begin(Some(CACHE), Some(1), &Left::default())
        .expect("begun");
    journal.seen([&path(1)]);
    drop(journal);
    let began = std::time::Instant::now();
    let left = folder.left(CACHE).expect("read");
    assert!(began.elapsed() < SYNC, "{:?}", began.elapsed());
    assert_eq!(names(&left), ["path-1"]);
    let mut refused: Vec<String> = left
        .refused
        .iter()
        .map(|(path, why)| format!("{} {why}", path.file_name().expect("named").display()))
        .collect();
    refused.sort();
    assert_eq!(
        refused,
        [
            "large.journal is larger than 72.0 MiB",
            "link.journal is a symbolic link, not a regular file",
            "pipe.journal is a named pipe, not a regular file",
        ]
    );
}

#[test]
fn lines_that_could_not_be_written_are_a_problem() {
    let (_outer, folder) = folder();
    let journal = folder
        .begin(Some(CACHE), Some(1), &Left::default())
        .expect("begun");
    let open = journal.0.as_ref().expect("open");
    open.size.store(SIZE_LIMIT + 1, Ordering::Relaxed);
    journal.seen([&path(1)]);
    assert_eq!(
        journal.close().problem.as_deref(),
        Some("it could not be written: is larger than 64.0 MiB")
    );
}

#[test]
fn drafts_of_jobs_that_were_killed_at_once_are_swept() {
    let (_outer, folder) = folder();
    let draft = |name: &str, age: Duration| {
        let file = File::create(folder.path.join(name)).expect("made");
        file.set_modified(SystemTime::now() - age).expect("set");
        folder.path.join(name)
    };
    let (young, old) = (
        draft("young.draft", Duration::ZERO),
        draft("old.draft", DRAFT_LIMIT * 2),
    );
    folder.left(CACHE).expect("read");
    assert!(young.exists() && !old.exists());
}

#[test]
fn age_is_bounded_and_the_folder_private() {
    let (_outer, folder) = folder();
    let journal = folder
        .begin(Some(CACHE), None, &Left::default())
        .expect("begun");
    journal.seen([&path(1)]);
    let mode = |path: &Path| fs::metadata(path).expect("there").mode() & 0o777;
    assert_eq!(
        (mode(&folder.path), mode(&files(&folder)[0])),
        (0o700, 0o600)
    );
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
    fs::set_permissions(&folder.path, fs::Permissions::from_mode(0o770)).expect("set");
    assert!(matches!(
        Folder::open(&folder.path, Path::new(STORE), Some(path(7))),
        Err(Error::Untrusted(_))
    ));
}
