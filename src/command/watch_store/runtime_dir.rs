//! The runtime folder of a job's watch, by which the job's later steps find it: it is private (0700), holds the
//! control socket, the log and a lock, and is named after the identifiers that the CI gives the job.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, timeout};

use crate::job::private_base;
use flywheel_nix::daemon_proxy::LastingLink;
use flywheel_nix::temp_roots::JobScope;
use flywheel_sys::host::private::{PrivateError, PrivateFolder};
use flywheel_sys::runner::env::Env;
use flywheel_sys::untrusted_file::{self, Owner};

/// A process on this machine accepts a connection at once, or never.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// A step that only looks for a watch holds the lock for milliseconds.
const BEGIN_LIMIT: Duration = Duration::from_secs(1);
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(10);
/// The log has a line for each event, and its bytes are printed at the end.
const LOG_LIMIT: u64 = 64 * 1024 * 1024;

/// Which processes are the job's: those that the CI has marked in their environment; outside of CI, the user's.
pub(super) fn job_processes(env: &Env) -> JobScope {
    let marks = ["RUNNER_TRACKING_ID", "CI_JOB_ID", "GITHUB_RUN_ID"];
    let found = marks
        .iter()
        .find_map(|name| env.get(name).map(|value| format!("{name}={value}")));
    found.map_or(JobScope::User, JobScope::Marked)
}

/// The name of an empty file.
const UNSET_CONFIG: &str = "no-nix-config";

/// The folder of one job's watch.
#[derive(Debug)]
pub(super) struct RuntimeDir(PathBuf);

impl RuntimeDir {
    /// The name of the file with Nix's settings about the cache.
    pub(crate) const CACHE: &str = "cache.conf";

    /// The folder of this job's watch, which is made if it is missing.
    pub(crate) fn from_env(env: &Env) -> Result<Self, PrivateError> {
        let folder = PrivateFolder::shared(&private_base(env))?.join(format!("watch-{}", key(env)));
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder);
        made.map_err(|source| PrivateError::Make {
            folder: folder.clone(),
            source,
        })?;
        Ok(Self(folder))
    }

    /// The link to Nix's daemon that the job's steps get. It lies beside this folder, because what a step has left running
    /// uses it after the watch has ended; the runner removes it with its temporary folder.
    pub(crate) fn lasting_link(&self) -> LastingLink {
        let name = self.0.file_name().unwrap_or_default().to_string_lossy();
        LastingLink::in_folder(self.0.with_file_name(name.replace("watch-", "nix-")))
    }

    /// The file that the background process writes its log to.
    pub(crate) fn log(&self) -> PathBuf {
        self.0.join("log")
    }

    /// Makes the folder this process's current one.
    pub(crate) fn make_current(&self) -> io::Result<()> {
        Ok(rustix::process::chdir(&self.0)?)
    }

    /// Writes the file with Nix's settings about the cache.
    pub(crate) fn write_cache(&self, text: &str) -> io::Result<()> {
        let file = self.0.join(Self::CACHE);
        let mut open = untrusted_file::open_to_write(&file, Owner::Own, u64::MAX, true)?;
        open.write_all(text.as_bytes())
    }

    /// Opens the log to read it with `log_text`, also after the folder has been removed.
    pub(crate) fn open_log(&self) -> io::Result<File> {
        Ok(untrusted_file::open(&self.log(), Owner::Own, LOG_LIMIT)?)
    }

    /// Opens the log, emptied.
    pub(crate) fn new_log(&self) -> io::Result<File> {
        Ok(untrusted_file::open_to_write(
            &self.log(),
            Owner::Own,
            u64::MAX,
            true,
        )?)
    }

    /// Locks the folder for as long as the file is kept; `None` if a living process has locked it.
    pub(crate) fn lock(&self) -> io::Result<Option<File>> {
        let lock = self.0.join("lock");
        let file = untrusted_file::open_to_write(&lock, Owner::Own, 0, false)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(fs::TryLockError::WouldBlock) => Ok(None),
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    }

    /// Locks the folder for a watch that begins; `None` if another one runs. A step that looks for a watch at this moment
    /// locks the folder, too, and removes it: that is waited for.
    pub(crate) async fn lock_to_begin(&self) -> io::Result<Option<File>> {
        let deadline = Instant::now() + BEGIN_LIMIT;
        loop {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&self.0)?;
            let locked = match self.lock() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                locked => locked?,
            };
            // A lock on a file that was removed in the meantime keeps no process out.
            let ids = |found: fs::Metadata| (found.dev(), found.ino());
            let there = fs::symlink_metadata(self.0.join("lock")).map(ids).ok();
            if let Some(file) = locked
                && there == Some(ids(file.metadata()?))
            {
                return Ok(Some(file));
            }
            if self.connect().await.is_some() || Instant::now() > deadline {
                return Ok(None);
            }
            tokio::time::sleep(LOCK_POLL_INTERVAL).await;
        }
    }

    /// Listens at the control socket. To be called with the lock held: a socket that is there is a dead process's.
    pub(crate) fn listen(&self) -> io::Result<UnixListener> {
        let _ = fs::remove_file(self.0.join("control"));
        let (_folder, short) = self.short()?;
        UnixListener::bind(short)
    }

    /// Connects to the watch of this job, if one runs.
    pub(crate) async fn connect(&self) -> Option<UnixStream> {
        let (_folder, short) = self.short().ok()?;
        timeout(CONNECT_LIMIT, UnixStream::connect(short))
            .await
            .ok()?
            .ok()
    }

    /// Whether a watch of this job has ended without removing its folder: it has listened, and no process has the lock.
    pub(crate) fn has_killed_watch(&self) -> bool {
        let has_listened = fs::symlink_metadata(self.0.join("control")).is_ok();
        has_listened && matches!(self.lock(), Ok(Some(_)))
    }

    /// Notes that `NIX_CONFIG` was not set before the watch, for a `finish` that gives it back in the watch's place. A
    /// value is not kept: it may hold credentials.
    pub(crate) fn note_unset_config(&self) -> io::Result<()> {
        let file = self.0.join(UNSET_CONFIG);
        untrusted_file::open_to_write(&file, Owner::Own, 0, true)?;
        Ok(())
    }

    pub(crate) fn had_unset_config(&self) -> bool {
        fs::symlink_metadata(self.0.join(UNSET_CONFIG)).is_ok()
    }

    pub(crate) fn remove(&self) {
        // What cannot be removed goes with the runner's temporary folder, or is used again.
        let _ = fs::remove_dir_all(&self.0);
    }

    /// Removes the folder if no living watch has locked it.
    pub(crate) fn remove_if_unused(&self) {
        if let Ok(Some(_held)) = self.lock() {
            self.remove();
        }
    }

    /// A short path to the control socket. A socket's path may have 107 bytes, and a runner's folders are deep, so the
    /// folder is named by its open file, which must be kept until the path has been used.
    fn short(&self) -> io::Result<(File, PathBuf)> {
        let folder = File::open(&self.0)?;
        let short = Path::new("/proc/self/fd")
            .join(folder.as_raw_fd().to_string())
            .join("control");
        Ok((folder, short))
    }
}

/// The text of a log; empty if it cannot be read.
pub(super) fn log_text(log: io::Result<File>) -> String {
    let bytes = log.and_then(|log| Ok(untrusted_file::read_open(&log, LOG_LIMIT)?));
    String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned()
}

/// A name that all steps of a job share, and no two jobs do.
fn key(env: &Env) -> String {
    let names = [
        "RUNNER_TRACKING_ID",
        "CI_JOB_ID",
        "GITHUB_RUN_ID",
        "GITHUB_RUN_ATTEMPT",
        "GITHUB_JOB",
        "RUNNER_NAME",
    ];
    // `{:?}` keeps a missing variable apart from an empty one.
    let text: Vec<String> = names
        .iter()
        .map(|name| format!("{:?}", env.get(name)))
        .collect();
    hex::encode(&Sha256::digest(text.join("\n"))[..8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_of_a_job_meet_and_jobs_do_not() {
        let base = tempfile::tempdir().expect("temporary folder");
        let base = base.path().to_str().expect("text");
        let runtime_dir = |id: &str, step: &str| {
            let env = [
                ("RUNNER_TEMP", base),
                ("RUNNER_TRACKING_ID", id),
                ("GITHUB_ACTION", step),
            ];
            RuntimeDir::from_env(&Env::from_pairs(env)).expect("made")
        };
        assert_eq!(
            runtime_dir("github_1", "a").0,
            runtime_dir("github_1", "b").0
        );
        assert_ne!(
            runtime_dir("github_1", "a").0,
            runtime_dir("github_2", "a").0
        );
        let held = runtime_dir("github_1", "a")
            .lock()
            .expect("asked")
            .expect("free");
        assert!(
            runtime_dir("github_1", "b")
                .lock()
                .expect("asked")
                .is_none()
        );
        drop(held);
        assert!(
            runtime_dir("github_1", "b")
                .lock()
                .expect("asked")
                .is_some()
        );
    }

    #[tokio::test]
    async fn a_step_that_looks_for_a_watch_keeps_none_from_beginning() {
        let base = tempfile::tempdir().expect("temporary folder");
        let env = Env::from_pairs([("RUNNER_TEMP", base.path().to_str().expect("text"))]);
        let runtime_dir = RuntimeDir::from_env(&env).expect("made");
        let looking = runtime_dir.lock().expect("asked").expect("free");
        let begin = async { runtime_dir.lock_to_begin().await.expect("asked") };
        let look = async {
            tokio::time::sleep(LOCK_POLL_INTERVAL * 3).await;
            runtime_dir.remove();
            drop(looking);
        };
        let (begun, ()) = tokio::join!(begin, look);
        assert!(begun.is_some());
        assert!(runtime_dir.0.join("lock").exists());
        assert!(runtime_dir.lock_to_begin().await.expect("asked").is_none());
    }

    #[test]
    fn a_ci_marks_its_processes_and_a_laptop_has_users() {
        let of = |pairs: &[(&str, &str)]| job_processes(&Env::from_pairs(pairs.iter().copied()));
        assert_eq!(
            of(&[("RUNNER_TRACKING_ID", "github_1")]),
            JobScope::Marked("RUNNER_TRACKING_ID=github_1".into())
        );
        assert_eq!(
            of(&[("CI_JOB_ID", "7")]),
            JobScope::Marked("CI_JOB_ID=7".into())
        );
        assert_eq!(of(&[]), JobScope::User);
    }
}
