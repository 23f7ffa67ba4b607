//! The file of a history. Appends under a lock, and drops the oldest runs once there are too many. A line that a power
//! cut tore does not spoil the next one.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::{History, Line, to_text};
use flywheel_sys::untrusted_file::{self, FileError, Owner};

/// The largest file, in bytes. The lines that are kept take a quarter of a megabyte.
const FILE_LIMIT: u64 = 4 << 20;
/// Once a file has this many lines, it is shortened.
const MOST_LINES: usize = 2000;
/// The runs that a shortened file keeps: with a half-life of 25, older ones have no weight.
const KEPT_RUNS: usize = 1000;
/// How long another process may hold the lock. It appends one line under it.
const LOCK_LIMIT: Duration = Duration::from_secs(2);
/// How often the lock is tried.
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// Why a history cannot be read or written.
#[derive(Debug, Error)]
#[error("the history `{}` cannot {failed}", file.display())]
pub struct HistoryError {
    pub file: PathBuf,
    /// What could not be done: "be read", "be written".
    pub failed: &'static str,
    #[source]
    pub source: io::Error,
}

/// The file with the history of one workspace.
#[derive(Clone, Debug)]
pub struct HistoryFile {
    file: PathBuf,
}

impl HistoryFile {
    /// The file of a workspace, whose name has been checked to be a name (`document::Shape::Name`).
    pub fn new(folder: &Path, workspace: &str) -> Self {
        Self {
            file: folder.join(format!("{workspace}.jsonl")),
        }
    }

    pub fn path(&self) -> &Path {
        &self.file
    }

    /// The history; an empty one if there is no file.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn read(&self) -> Result<History, HistoryError> {
        let text = self
            .text()
            .map_err(|source| self.error("be read", source))?;
        Ok(History::parse(&text))
    }

    /// Adds a line.
    ///
    /// # Errors
    /// When the file cannot be written, or another process holds it.
    pub fn append(&self, line: &Line) -> Result<(), HistoryError> {
        self.append_locked(line)
            .map_err(|source| self.error("be written", source))
    }

    fn append_locked(&self, line: &Line) -> Result<(), FileError> {
        if let Some(folder) = self.file.parent() {
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(0o700).create(folder)?;
        }
        let _lock = self.lock()?;
        let text = self.text()?;
        if text.lines().count() >= MOST_LINES {
            self.replace(&History::parse(&text).shortened(KEPT_RUNS), line)?;
            return Ok(());
        }
        let mut file = untrusted_file::open_to_append(&self.file, Owner::Own, FILE_LIMIT)?;
        let is_torn = !text.is_empty() && !text.ends_with('\n');
        let torn_end = if is_torn { "\n" } else { "" };
        // One write, so that a kill leaves all of the line or a part at its end.
        file.write_all(format!("{torn_end}{}", to_text(line)).as_bytes())?;
        Ok(())
    }

    fn replace(&self, history: &History, line: &Line) -> Result<(), FileError> {
        let new = self.file.with_extension("new");
        let mut file = untrusted_file::open_to_write(&new, Owner::Own, FILE_LIMIT, true)?;
        file.write_all((history.to_lines() + &to_text(line)).as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, &self.file)?;
        Ok(())
    }

    /// The lock is a file of its own, because the history's is replaced.
    fn lock(&self) -> Result<File, FileError> {
        let lock = self.file.with_extension("lock");
        let lock = untrusted_file::open_to_write(&lock, Owner::Own, FILE_LIMIT, false)?;
        let begun = Instant::now();
        while lock.try_lock().is_err() {
            if begun.elapsed() > LOCK_LIMIT {
                return Err(io::Error::from(io::ErrorKind::TimedOut).into());
            }
            thread::sleep(LOCK_INTERVAL);
        }
        Ok(lock)
    }

    fn text(&self) -> Result<String, FileError> {
        match untrusted_file::read(&self.file, Owner::Own, FILE_LIMIT) {
            // A line that is no UTF-8 is unreadable by itself, and the others stay.
            Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Err(error) if error.is_absence() => Ok(String::new()),
            Err(error) => Err(error),
        }
    }

    fn error(&self, failed: &'static str, source: FileError) -> HistoryError {
        HistoryError {
            file: self.file.clone(),
            failed,
            source: source.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Approval, Dependencies, Run};
    use super::*;

    fn run(at: u64, target: &str) -> Line {
        Line::Run(Run {
            at,
            target: target.into(),
            dependencies: Dependencies::Hit,
            size: Some("cax21".into()),
            cpu_p95: 3.2,
            mem_p95: 6.1,
            ran_out_of_memory: false,
            minutes: 2.0,
        })
    }

    fn approved(at: u64, target: &str, cpu: u32) -> Line {
        Line::Approved(Approval {
            at,
            target: target.into(),
            cpu,
            memory_gb: 8,
        })
    }

    #[test]
    fn what_is_appended_is_read_again_and_the_last_approval_holds() {
        let folder = tempfile::tempdir().expect("the file can be used");
        let file = HistoryFile::new(&folder.path().join("a/b"), "web");
        assert_eq!(
            file.read().expect("the file can be used"),
            History::default()
        );
        for line in [
            run(1, "final"),
            approved(2, "final", 4),
            run(3, "cooker"),
            approved(4, "final", 8),
            approved(5, "cooker", 2),
        ] {
            file.append(&line).expect("the file can be used");
        }
        let history = file.read().expect("the file can be used");
        assert_eq!(history.alike("final", Dependencies::Hit).len(), 1);
        assert_eq!(history.alike("final", Dependencies::Miss).len(), 0);
        assert_eq!(
            history.approval("final").expect("the file can be used").cpu,
            8
        );
        assert_eq!(history.approval("other"), None);
        // Another workspace is another file.
        let other = HistoryFile::new(&folder.path().join("a/b"), "api");
        assert_eq!(
            other.read().expect("the file can be used"),
            History::default()
        );
    }

    #[test]
    fn a_torn_or_strange_line_costs_itself_alone() {
        let folder = tempfile::tempdir().expect("the file can be used");
        let file = HistoryFile::new(folder.path(), "web");
        file.append(&run(1, "final")).expect("the file can be used");
        let mut text = fs::read(file.path()).expect("the file can be used");
        text.extend(b"{\"later\":{}}\n\xff\xfe\n");
        let bad = to_text(&run(2, "final")).replace("6.1", "-1");
        text.extend(bad.as_bytes());
        text.extend(b"{\"run\":{\"at\":2,\"tar");
        fs::write(file.path(), text).expect("the file can be used");
        file.append(&run(3, "final")).expect("the file can be used");
        let history = file.read().expect("the file can be used");
        let read: Vec<u64> = history.runs.iter().map(|run| run.at).collect();
        assert_eq!((read, history.unreadable), (vec![1, 3], 4));
    }

    #[test]
    fn a_file_is_bounded_and_keeps_the_approvals_that_hold() {
        let folder = tempfile::tempdir().expect("the file can be used");
        let file = HistoryFile::new(folder.path(), "web");
        let mut text = to_text(&approved(0, "final", 2)) + &to_text(&approved(1, "final", 4));
        text.extend((2..2002).map(|at| to_text(&run(at, "final"))));
        fs::write(file.path(), text).expect("the file can be used");
        file.append(&run(9000, "final"))
            .expect("the file can be used");
        let history = file.read().expect("the file can be used");
        assert_eq!(history.runs.len(), KEPT_RUNS + 1);
        assert_eq!(history.runs.last().expect("the file can be used").at, 9000);
        assert_eq!(history.runs[0].at, 1002);
        assert_eq!(history.approvals.len(), 1);
        assert_eq!(
            history.approval("final").expect("the file can be used").cpu,
            4
        );
    }

    #[test]
    fn two_writers_lose_no_line() {
        let folder = tempfile::tempdir().expect("the file can be used");
        let file = HistoryFile::new(folder.path(), "web");
        thread::scope(|scope| {
            for writer in 0..4 {
                let file = &file;
                scope.spawn(move || {
                    for at in 0..50 {
                        file.append(&run(writer * 100 + at, "final"))
                            .expect("the file can be used");
                    }
                });
            }
        });
        let history = file.read().expect("the file can be used");
        assert_eq!((history.runs.len(), history.unreadable), (200, 0));
    }

    #[test]
    fn a_history_that_is_no_file_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().expect("the file can be used");
        let file = HistoryFile::new(folder.path(), "web");
        fs::create_dir(file.path()).expect("the file can be used");
        let error = file.read().expect_err("it is refused");
        assert!(error.to_string().contains("web.jsonl"), "{error}");
    }
}
