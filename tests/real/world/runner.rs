//! One step under the rules of GitHub's own runner, for what act does not model: no terminal, closed
//! stdin, signals to the entry process alone (SIGINT, 7.5 s, SIGTERM, 2.5 s, SIGKILL), the wait for
//! streams that a child inherited, and the end of every process of the job.
//! Read in actions/runner, 2.336: `ProcessInvoker.cs`, `JobExtension.cs`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use super::{PATH, folders, need, processes, with_private_nix};

/// From SIGINT to SIGTERM.
const TO_TERM: Duration = Duration::from_millis(7500);
/// From SIGTERM to SIGKILL.
const TO_KILL: Duration = Duration::from_millis(2500);
/// How long the runner waits for stdout and stderr after the entry process has ended.
const FOR_STREAMS: Duration = Duration::from_secs(5);
/// The command files of a step.
const FILES: [&str; 5] = [
    "GITHUB_OUTPUT",
    "GITHUB_ENV",
    "GITHUB_PATH",
    "GITHUB_STATE",
    "GITHUB_STEP_SUMMARY",
];

/// A step that is still to run: a bash script, as `shell: bash` runs it.
pub struct Step {
    folder: TempDir,
    script: String,
    environment: BTreeMap<String, String>,
    nix: Option<PathBuf>,
    limit: Duration,
}

#[derive(Debug)]
pub struct Report {
    /// Its exit status, or 128 and the signal's number.
    pub code: i32,
    /// What it printed, without commands that mask, and with masks applied.
    pub log: String,
    /// The signals that the entry process was sent, and the time of each since the first.
    pub signals: Vec<(Signal, Duration)>,
    /// From the first signal to the entry process's end.
    pub to_end: Option<Duration>,
    /// Whether a child still held stdout or stderr five seconds after the entry process had ended.
    pub streams_held: bool,
    /// The command lines of the processes that were killed at the job's end.
    pub orphans: Vec<String>,
    /// The text of each command file.
    pub files: BTreeMap<String, String>,
    /// What lies in `RUNNER_TEMP`, by path below it.
    pub left_in_temp: Vec<String>,
}

/// What the two reading threads share with the step.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Step {
    /// A step with a runner host of its own.
    pub fn new(script: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["work", "home", "temp", "commands"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let script = script.to_owned();
        Self {
            folder,
            script,
            environment: BTreeMap::new(),
            nix: None,
            limit: Duration::from_secs(180),
        }
    }

    pub fn with_env(mut self, name: &str, value: &str) -> Self {
        self.environment.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Puts lines of shell before the script.
    pub fn after(mut self, lines: &str) -> Self {
        self.script = format!("{lines}\n{}", self.script);
        self
    }

    /// Runs it where `folder` is `/nix`.
    pub fn with_nix(mut self, folder: &Path) -> Self {
        self.nix = Some(folder.to_owned());
        self
    }

    /// How long it may take before the test fails; three minutes by default.
    pub fn with_limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    pub fn workspace(&self) -> PathBuf {
        self.folder.path().join("work")
    }

    /// `RUNNER_TEMP`.
    pub fn temp(&self) -> PathBuf {
        self.folder.path().join("temp")
    }

    /// The folder that everything the step may write to lies below.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The entry process, not yet started, for a test that reads its streams in another way.
    pub fn command_of_step(&self) -> Command {
        let tracking = format!("RUNNER_TRACKING_ID=github_{:032x}", fastrand::u128(..));
        self.command(&tracking)
    }

    pub fn run(&self) -> Report {
        self.run_and(|_, _| false)
    }

    /// Runs it, and cancels it as GitHub does once the log so far makes `now` true.
    pub fn cancel_when(&self, now: impl Fn(&str) -> bool) -> Report {
        let report = self.run_and(|log, _| now(log));
        assert!(
            !report.signals.is_empty(),
            "it ended before the moment to cancel came:\n{}",
            report.log
        );
        report
    }

    /// Runs it. `cancel` is polled with the log so far and the id of the entry process, until it is true or the step
    /// has ended.
    pub fn run_and(&self, mut cancel: impl FnMut(&str, u32) -> bool) -> Report {
        let tracking = format!("RUNNER_TRACKING_ID=github_{:032x}", fastrand::u128(..));
        let mut child = self.command(&tracking).spawn().unwrap();
        drop(child.stdin.take());
        // As GitHub's runner does, so that the kernel kills the step and not the runner when memory runs out.
        fs::write(format!("/proc/{}/oom_score_adj", child.id()), "500").unwrap();
        let log = Log::default();
        let (done, streams) = channel();
        log.read(child.stdout.take().unwrap(), done.clone());
        log.read(child.stderr.take().unwrap(), done);

        let mut status = None;
        let mut cancelled = false;
        let came = processes::wait_until(self.limit, || {
            status = child.try_wait().unwrap();
            cancelled = status.is_none() && cancel(&log.shown(), child.id());
            status.is_some() || cancelled
        });
        let mut signals = Vec::new();
        let began = Instant::now();
        if status.is_none() {
            status = Some(stop(&mut child, &mut signals));
        }
        let to_end = (!signals.is_empty()).then(|| began.elapsed());
        let streams_held = !streams_closed(&streams);
        let orphans = processes::kill_with_variable(&tracking)
            .into_iter()
            .map(|found| found.command_line)
            .collect();
        assert!(
            came,
            "the step did not end within {:?}:\n{}",
            self.limit,
            log.shown()
        );
        let status = status.unwrap();
        let code = status.code().unwrap_or_else(|| {
            128 + std::os::unix::process::ExitStatusExt::signal(&status).unwrap()
        });
        let text = |name: &&str| {
            (
                (*name).to_owned(),
                fs::read_to_string(self.command_file(name)).unwrap_or_default(),
            )
        };
        let files = FILES.iter().map(text).collect();
        let left_in_temp = below(&self.temp(), &self.temp());
        Report {
            code,
            log: log.shown(),
            signals,
            to_end,
            streams_held,
            orphans,
            files,
            left_in_temp,
        }
    }

    fn command_file(&self, name: &str) -> PathBuf {
        self.folder.path().join("commands").join(name)
    }

    fn command(&self, tracking: &str) -> Command {
        let script = self.folder.path().join("commands/step.sh");
        fs::write(&script, &self.script).unwrap();
        let bash = need("bash", "apt-get install bash");
        let mut command = match &self.nix {
            Some(nix) => with_private_nix(nix, &bash),
            None => Command::new(&bash),
        };
        command
            .args(["--noprofile", "--norc", "-e", "-o", "pipefail"])
            .arg(script);
        folders::isolate(&mut command, self.folder.path())
            .current_dir(self.workspace())
            .env("PATH", PATH)
            .env("RUNNER_TEMP", self.temp());
        command
            .env("GITHUB_WORKSPACE", self.workspace())
            .env("RUNNER_OS", "Linux")
            .env("RUNNER_ARCH", "X64");
        command.env("GITHUB_ACTIONS", "true").env("CI", "true");
        for name in FILES {
            fs::write(self.command_file(name), "").unwrap();
            command.env(name, self.command_file(name));
        }
        command.envs(&self.environment);
        let (name, value) = tracking.split_once('=').unwrap();
        command.env(name, value);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }
}

/// Signals the entry process, and no other one, until it has ended.
fn stop(child: &mut Child, signals: &mut Vec<(Signal, Duration)>) -> std::process::ExitStatus {
    let began = Instant::now();
    let id = i32::try_from(child.id()).unwrap();
    for (signal, patience) in [(Signal::INT, TO_TERM), (Signal::TERM, TO_KILL)] {
        signals.push((signal, began.elapsed()));
        processes::signal(id, signal);
        if let Some(status) = processes::ended(child, patience) {
            return status;
        }
    }
    signals.push((Signal::KILL, began.elapsed()));
    child.kill().unwrap();
    child.wait().unwrap()
}

/// Whether both streams came to their end in the time that the runner gives them.
fn streams_closed(streams: &std::sync::mpsc::Receiver<()>) -> bool {
    let deadline = Instant::now() + FOR_STREAMS;
    (0..2).all(|_| {
        streams
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            .is_ok()
    })
}

impl Log {
    /// Reads a stream to its end on a thread of its own; an orphan that holds it is killed later.
    fn read(&self, stream: impl Read + Send + 'static, done: Sender<()>) {
        let log = self.clone();
        std::thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while matches!(stream.read_until(b'\n', &mut line), Ok(read) if read > 0) {
                log.0
                    .lock()
                    .unwrap()
                    .push(String::from_utf8_lossy(&line).into_owned());
                line.clear();
            }
            let _ = done.send(());
        });
    }

    /// The log as GitHub shows it: a mask holds from the line that sets it.
    fn shown(&self) -> String {
        let mut masks: Vec<String> = Vec::new();
        let mut shown = String::new();
        for line in self.0.lock().unwrap().iter() {
            if let Some(value) = line.trim().strip_prefix("::add-mask::") {
                let value = value
                    .replace("%0D", "\r")
                    .replace("%0A", "\n")
                    .replace("%25", "%");
                masks.extend(
                    value
                        .lines()
                        .filter(|part| !part.trim().is_empty())
                        .map(str::to_owned),
                );
                masks.sort_by_key(|mask| std::cmp::Reverse(mask.len()));
                continue;
            }
            shown.push_str(
                &masks
                    .iter()
                    .fold(line.clone(), |line, mask| line.replace(mask, "***")),
            );
        }
        shown
    }
}

/// Every file and folder below `folder`, by its path below `top`.
fn below(folder: &Path, top: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        found.push(
            entry
                .path()
                .strip_prefix(top)
                .unwrap()
                .display()
                .to_string(),
        );
        if entry.file_type().unwrap().is_dir() {
            found.extend(below(&entry.path(), top));
        }
    }
    found.sort();
    found
}
