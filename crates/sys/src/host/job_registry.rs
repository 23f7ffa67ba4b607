//! The registry of the jobs that work on this host: who is at work now, who was, and which store paths each of them
//! named. It owns its files, holds no secret, and decides nothing.
//!
//! Each job has one file, which it locks while it lives. The first line describes the job; each further line is the
//! base name of a store path that a process of the job has named. A file outlives its job, because what the job left in
//! the store does, too: of the files that describe the same kind of job, one is kept.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::OFlags;
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};

const EXTENSION: &str = "job";
/// A first line that is longer was not written by us.
const RECORD_LIMIT: u64 = 16 * 1024;
/// The names of one job that are read, in bytes: half a million paths.
const CLAIMS_LIMIT: u64 = 64 * 1024 * 1024;
/// The files that are read; beyond that the oldest are removed.
const FILES_LIMIT: usize = 1000;
/// A job is over after this time, and so is every job that ran beside it: its file may be merged with others.
const KEPT: Duration = Duration::from_secs(2 * 24 * 60 * 60);

/// What is known of a job.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct JobRecord {
    /// `owner/name` in CI; `None` outside of it.
    pub repository: Option<String>,
    /// Whether the job runs code that may publish.
    pub trusted: bool,
    /// The state folder of the Nix store that it works on.
    pub store: String,
}

/// Another job on this host.
#[derive(Clone, Debug)]
pub struct OtherJob {
    pub record: JobRecord,
    /// Whether it lives, or ended after this job began.
    pub is_beside: bool,
    file: PathBuf,
}

/// This job's place in the registry. Its file is unlocked when this is dropped, and stays.
#[derive(Debug)]
pub struct JobRegistry {
    folder: PathBuf,
    path: PathBuf,
    began: SystemTime,
    file: Mutex<File>,
}

impl JobRegistry {
    /// Enters a job into the registry in `folder`, which is created (0700) if it is missing.
    ///
    /// # Errors
    /// When the folder cannot be used, or others can write in it.
    pub fn enter(folder: &Path, record: &JobRecord) -> io::Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
        let found = fs::symlink_metadata(folder)?;
        if !found.is_dir() || found.uid() != geteuid().as_raw() || found.mode() & 0o077 != 0 {
            let text = "it is not a folder that belongs to this user alone";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        let began = SystemTime::now();
        let since = began.duration_since(UNIX_EPOCH).unwrap_or_default();
        // The random part is for jobs that start in the same second.
        let name = format!("{}-{:016x}", since.as_secs(), fastrand::u64(..));
        let path = folder.join(format!("{name}.{EXTENSION}"));
        let unnamed = folder.join(format!("{name}.new"));
        let mut file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&unnamed)?;
        file.lock()?;
        file.write_all(format!("{}\n", serde_json::to_string(record)?).as_bytes())?;
        // What this job leaves in the store survives a crash, so its record must.
        file.sync_all()?;
        // Other jobs see the file only when it is locked and describes this job.
        fs::rename(&unnamed, &path)?;
        merge_ended(folder, &path, began);
        Ok(Self {
            folder: folder.to_owned(),
            path,
            began,
            file: Mutex::new(file),
        })
    }

    /// Records paths, by base name, that a process of this job has named.
    pub fn claim<'a>(&self, names: impl IntoIterator<Item = &'a str>) {
        let lines: String = names.into_iter().map(|name| format!("{name}\n")).collect();
        if !lines.is_empty() {
            let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            // Without its names, this job's paths are ambiguous to the jobs beside it, which they report.
            let _ = file.write_all(lines.as_bytes());
        }
    }

    /// All other jobs that are or were on this host, of whichever store.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn others(&self) -> io::Result<Vec<OtherJob>> {
        let files = job_files(&self.folder)?;
        let others = files.into_iter().filter(|path| *path != self.path);
        Ok(others.filter_map(|path| self.read(path)).collect())
    }

    fn read(&self, path: PathBuf) -> Option<OtherJob> {
        let file = open(&path)?;
        let ended = file.metadata().ok()?.modified().ok()?;
        let record = record(&file)?;
        let lives = file.try_lock_shared().is_err();
        Some(OtherJob {
            record,
            is_beside: lives || ended >= self.began,
            file: path,
        })
    }
}

/// The jobs that are or were on this host, of whichever store, for one that does not enter the registry. A folder that is
/// missing has none.
///
/// # Errors
/// When the folder cannot be read.
pub fn jobs_seen(folder: &Path) -> io::Result<Vec<JobRecord>> {
    let files = match job_files(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        files => files?,
    };
    let jobs = files.iter().filter_map(|path| record(&open(path)?));
    Ok(jobs.collect())
}

impl Drop for JobRegistry {
    fn drop(&mut self) {
        // The time of the file is when the job ended, from which others see whether it ran beside them.
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = file.write_all(b"\n");
    }
}

impl OtherJob {
    /// The base names of the store paths that it has named so far.
    pub fn claims(&self) -> BTreeSet<String> {
        let Some(file) = open(&self.file) else {
            return BTreeSet::new();
        };
        let lines = BufReader::new(file.take(CLAIMS_LIMIT)).lines().skip(1);
        lines
            .map_while(Result::ok)
            .filter(|line| !line.is_empty())
            .collect()
    }
}

/// The registry's files, the oldest first.
fn job_files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let paths = fs::read_dir(folder)?.flatten().map(|entry| entry.path());
    let is_job = |path: &PathBuf| path.extension().is_some_and(|found| found == EXTENSION);
    let mut files: Vec<PathBuf> = paths.filter(is_job).collect();
    files.sort_unstable();
    Ok(files)
}

/// Opens a job's file. Anything else of that name, such as a FIFO that would be waited for, is ignored.
fn open(path: &Path) -> Option<File> {
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(i32::try_from(flags.bits()).ok()?)
        .open(path)
        .ok()?;
    let found = file.metadata().ok()?;
    (found.is_file() && found.uid() == geteuid().as_raw()).then_some(file)
}

fn record(file: &File) -> Option<JobRecord> {
    let mut line = String::new();
    BufReader::new(file.take(RECORD_LIMIT))
        .read_line(&mut line)
        .ok()?;
    serde_json::from_str(&line).ok()
}

/// Removes the files of jobs that ended long ago, except for the newest of each kind of job.
fn merge_ended(folder: &Path, own: &Path, now: SystemTime) {
    let Ok(mut files) = job_files(folder) else {
        return;
    };
    // Registries of hosts with thousands of repositories lose their oldest kinds.
    let surplus = files.len().saturating_sub(FILES_LIMIT);
    let mut newest: BTreeMap<JobRecord, PathBuf> = BTreeMap::new();
    files.retain(|path| path != own);
    for (number, path) in files.into_iter().enumerate() {
        let Some(file) = open(&path) else { continue };
        let ended = file.metadata().ok().and_then(|found| found.modified().ok());
        let is_recent = ended.is_none_or(|at| now.duration_since(at).unwrap_or_default() < KEPT);
        if file.try_lock_shared().is_err() || (is_recent && number >= surplus) {
            continue;
        }
        let older = record(&file).and_then(|record| newest.insert(record, path.clone()));
        // A file that cannot be removed is only read again.
        if let Some(older) = older {
            let _ = fs::remove_file(older);
        } else if number < surplus {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(repository: &str, trusted: bool) -> JobRecord {
        JobRecord {
            repository: Some(repository.to_owned()),
            trusted,
            store: "/nix/var/nix".to_owned(),
        }
    }

    fn age(path: &Path) {
        let long_ago = SystemTime::now() - 2 * KEPT;
        let file = File::options().append(true).open(path).expect("opened");
        file.set_modified(long_ago).expect("set");
    }

    #[test]
    fn a_job_sees_those_before_and_beside_it_and_what_they_name() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let folder = folder.path().join("registry");
        let before = JobRegistry::enter(&folder, &job("o/before", true)).expect("entered");
        let path = before.path.clone();
        drop(before);
        age(&path);
        let own = JobRegistry::enter(&folder, &job("o/own", true)).expect("entered");
        let beside = JobRegistry::enter(&folder, &job("o/beside", false)).expect("entered");
        beside.claim(["a-one", "b-two"]);
        let mut seen = own.others().expect("read");
        seen.sort_by(|a, b| a.record.cmp(&b.record));
        let kinds: Vec<_> = seen
            .iter()
            .map(|job| (job.record.clone(), job.is_beside))
            .collect();
        let expected = [
            (job("o/before", true), false),
            (job("o/beside", false), true),
        ];
        assert_eq!(kinds, expected);
        let claims: Vec<_> = seen[1].claims().into_iter().collect();
        assert_eq!(claims, ["a-one", "b-two"]);
        drop(beside);
        let ended = own.others().expect("read");
        assert!(
            ended
                .iter()
                .any(|job| job.is_beside && job.claims().len() == 2),
            "it ended after ours began"
        );
    }

    #[test]
    fn of_jobs_of_a_kind_that_ended_long_ago_one_is_remembered() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let folder = folder.path().join("registry");
        for repository in ["o/a", "o/a", "o/b", "o/a"] {
            let entered = JobRegistry::enter(&folder, &job(repository, true));
            let path = entered
                .expect("the temporary folder is private")
                .path
                .clone();
            age(&path);
        }
        let own = JobRegistry::enter(&folder, &job("o/own", true)).expect("entered");
        let mut kinds: Vec<_> = own
            .others()
            .expect("read")
            .into_iter()
            .filter_map(|job| job.record.repository)
            .collect();
        kinds.sort_unstable();
        assert_eq!(kinds, ["o/a", "o/b"]);
    }

    #[test]
    fn what_is_no_file_of_ours_is_not_waited_for() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let folder = folder.path().join("registry");
        drop(JobRegistry::enter(&folder, &job("o/before", true)));
        let fifo = folder.join("1-x.job");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status();
        assert!(made.expect("coreutils").success());
        let own = JobRegistry::enter(&folder, &job("o/own", true)).expect("entered");
        assert_eq!(own.others().expect("read").len(), 1);
    }

    #[test]
    fn a_folder_that_others_can_write_in_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().expect("temporary folder");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).expect("set");
        assert!(JobRegistry::enter(folder.path(), &job("o/own", true)).is_err());
    }
}
