//! Runs the user's command: in a process group of its own, with its output untouched and signals forwarded to it. A
//! request to stop starts a schedule that ends it, and no process of it is left behind.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{self, IsTerminal as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use thiserror::Error;
use tokio::process::{Child, Command};

use crate::process::orphans;
use crate::process::own::{self, Registered};
use crate::process::signals::{Signals, Stop};
use flywheel_core::exit::{Exit, Explain};

/// From the first request to stop to `SIGTERM`, if the command has not ended by itself.
const TERMINATE_AFTER: Duration = Duration::from_secs(2);
/// From the first request to stop to `SIGKILL`. GitHub kills this program 10 s after its `SIGINT`. Flywheel ends within
/// 6 s of it, and the rest of that time belongs to publishing.
const KILL_AFTER: Duration = Duration::from_millis(3500);

/// Why the command could not be run.
#[derive(Debug, Error)]
pub enum SuperviseError {
    #[error("the command could not be started with `{program}`")]
    Start {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the command's exit status could not be read")]
    Wait(#[source] io::Error),
}

impl Explain for SuperviseError {
    fn exit(&self) -> Exit {
        match self {
            // A shell's exit code for a program that it cannot find.
            Self::Start { .. } => Exit::Command(127),
            Self::Wait(_) => Exit::Bug,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Start { .. } => {
                Some("Check the inputs `command` and `working-directory`, and that the program exists on this runner.".into())
            }
            Self::Wait(_) => None,
        }
    }
}

/// The shell that a script runs under.
#[derive(Clone, Debug)]
pub struct Shell {
    /// An absolute path.
    program: PathBuf,
    flags: &'static [&'static str],
}

impl Shell {
    /// The flags that GitHub starts bash with.
    const OF_BASH: &[&str] = &["--noprofile", "--norc", "-e", "-o", "pipefail"];
    /// POSIX's shell knows `pipefail` only of late.
    const OF_SH: &[&str] = &["-e"];

    /// Bash, if it is on `path`, and else `sh`: an image such as Alpine's has no bash.
    pub fn find(path: Option<&OsStr>, folder: &Path) -> Self {
        let on_path = |name: &str| which::which_in(name, Some(path?), folder).ok();
        match on_path("bash") {
            Some(program) => Self {
                program,
                flags: Self::OF_BASH,
            },
            None => Self {
                program: on_path("sh").unwrap_or_else(|| "/bin/sh".into()),
                flags: Self::OF_SH,
            },
        }
    }
}

/// How a script is run, as a fragment for the log.
impl fmt::Display for Shell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let program = self.program.display();
        if self.flags == Self::OF_BASH {
            write!(f, "`{program}` with `-e -o pipefail`")
        } else {
            write!(
                f,
                "`{program}` with `-e`, and without `pipefail`, because there is no bash on `PATH`"
            )
        }
    }
}

/// A command to supervise.
#[derive(Clone, Debug)]
pub struct Supervised {
    /// An absolute path, or a name to be found on the `PATH` of `environment`.
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<OsString>,
    /// The whole environment: nothing is inherited.
    pub environment: BTreeMap<OsString, OsString>,
    /// The working directory.
    pub(crate) folder: PathBuf,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandExit {
    /// The exit code; as in shells 128 + N for a command that signal N killed.
    pub code: u8,
    /// The signal that killed the command, if one did.
    pub(crate) signal: Option<i32>,
    /// The first request to stop that came while the command ran, and its time.
    pub stopped: Option<(Stop, Instant)>,
    pub lasted: Duration,
    /// The number of processes that the command left behind and that were ended.
    pub(crate) orphans: usize,
    /// Those of them that live on, such as another user's.
    pub orphans_alive: usize,
}

impl Supervised {
    /// A script in a file, for this shell.
    pub fn script(shell: &Shell, file: &Path, folder: &Path) -> Self {
        let mut arguments: Vec<OsString> = shell.flags.iter().map(OsString::from).collect();
        arguments.push(file.into());
        Self {
            program: shell.program.clone(),
            arguments,
            environment: BTreeMap::new(),
            folder: folder.to_owned(),
        }
    }

    /// A program and its arguments; the program is searched on `path`, as a shell does.
    pub fn program(words: &[OsString], path: Option<&OsStr>, folder: &Path) -> Self {
        let name = words.first().cloned().unwrap_or_default();
        let program = which::which_in(&name, path, folder).unwrap_or_else(|_| name.into());
        let arguments = words.iter().skip(1).cloned().collect();
        Self {
            program,
            arguments,
            environment: BTreeMap::new(),
            folder: folder.to_owned(),
        }
    }

    /// Runs the command to its end. Signals are forwarded to its whole group; the second one kills the group. Processes
    /// that the command leaves behind are ended.
    ///
    /// # Errors
    /// When the command cannot be started. The failure of the command itself is not an error.
    pub async fn run(self, signals: &mut Signals) -> Result<CommandExit, SuperviseError> {
        // Before the command starts, so that none of its orphans is missed.
        orphans::adopt();
        let begun = Instant::now();
        let (mut child, _registered) = self.start()?;
        let group = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw);
        let (status, stopped) = attend(&mut child, group, signals)
            .await
            .map_err(SuperviseError::Wait)?;
        // Measured here, because the time to end orphans does not belong to the command.
        let lasted = begun.elapsed();
        let left = orphans::end(group).await;
        let signal = status.signal();
        Ok(CommandExit {
            code: code_of(status),
            signal,
            stopped,
            lasted,
            orphans: left.found,
            orphans_alive: left.alive,
        })
    }

    fn start(&self) -> Result<(Child, Registered), SuperviseError> {
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .env_clear()
            .envs(&self.environment)
            .current_dir(&self.folder);
        // The command is in a background process group, which the system stops when it reads from the terminal.
        if io::stdin().is_terminal() {
            command.stdin(Stdio::null());
        }
        // In a group of its own, a signal reaches the command and all its children, but not this program.
        command.process_group(0);
        own::spawn(&mut command).map_err(|source| SuperviseError::Start {
            program: self.program.clone(),
            source,
        })
    }
}

fn code_of(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok())
        .unwrap_or(u8::MAX)
}

/// What the supervisor waits for.
enum SuperviseEvent {
    Exited(io::Result<ExitStatus>),
    StopRequested(Stop),
    StepDue,
}

/// Waits for the child's exit, forwards signals to its group, and follows the schedule after a request to stop.
async fn attend(
    child: &mut Child,
    group: Option<Pid>,
    signals: &mut Signals,
) -> io::Result<(ExitStatus, Option<(Stop, Instant)>)> {
    let mut stopped: Option<(Stop, Instant)> = None;
    let mut steps = [(TERMINATE_AFTER, Signal::TERM), (KILL_AFTER, Signal::KILL)]
        .into_iter()
        .peekable();
    loop {
        // The schedule starts with the first request to stop.
        let due = stopped.and_then(|(_, at)| steps.peek().map(|(after, _)| at + *after));
        let event = tokio::select! {
            status = child.wait() => SuperviseEvent::Exited(status),
            stop = signals.next() => SuperviseEvent::StopRequested(stop),
            () = sleep_until(due) => SuperviseEvent::StepDue,
        };
        match event {
            SuperviseEvent::Exited(status) => return Ok((status?, stopped)),
            SuperviseEvent::StopRequested(stop) if stopped.is_none() => {
                stopped = Some((stop, Instant::now()));
                send(group, stop.signal());
            }
            // A second request cuts the schedule short.
            SuperviseEvent::StopRequested(_) => send(group, Signal::KILL),
            SuperviseEvent::StepDue => {
                if let Some((_, signal)) = steps.next() {
                    send(group, signal);
                }
            }
        }
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

fn send(group: Option<Pid>, signal: Signal) {
    if let Some(group) = group {
        // It fails for a group that is already gone.
        let _ = kill_process_group(group, signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CHILDREN_OF_TESTS;

    async fn run(script: &str) -> CommandExit {
        let _alone = CHILDREN_OF_TESTS.lock().await;
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = folder.path().join("command");
        std::fs::write(&file, script).expect("written");
        let path = OsString::from("/usr/bin:/bin");
        let shell = Shell::find(Some(&path), folder.path());
        let mut command = Supervised::script(&shell, &file, folder.path());
        command.environment.insert("PATH".into(), path);
        let mut signals = Signals::listen().expect("handlers");
        command.run(&mut signals).await.expect("started")
    }

    #[tokio::test]
    async fn the_code_is_the_commands_own() {
        assert_eq!(run("exit 37").await.code, 37);
        assert_eq!(run("false | true\nexit 0").await.code, 1, "pipefail");
        let killed = run("kill -KILL $$").await;
        assert_eq!((killed.code, killed.signal), (137, Some(9)));
    }

    #[test]
    fn where_there_is_no_bash_it_is_sh_and_says_so() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let found = |names: &[&str]| {
            let bin = tempfile::tempdir_in(folder.path()).expect("temporary folder");
            for name in names {
                std::os::unix::fs::symlink("/bin/true", bin.path().join(name)).expect("linked");
            }
            let text = Shell::find(Some(bin.path().as_os_str()), Path::new("/")).to_string();
            text.replace(&bin.path().display().to_string(), "BIN")
        };
        assert_eq!(found(&["bash", "sh"]), "`BIN/bash` with `-e -o pipefail`");
        let no_bash = "with `-e`, and without `pipefail`, because there is no bash on `PATH`";
        assert_eq!(found(&["sh"]), format!("`BIN/sh` {no_bash}"));
        assert_eq!(found(&[]), format!("`/bin/sh` {no_bash}"));
        assert!(
            Shell::find(None, Path::new("/"))
                .to_string()
                .starts_with("`/bin/sh`")
        );
    }

    #[tokio::test]
    async fn what_a_command_leaves_behind_is_ended() {
        let ended =
            run("sleep 4321 >/dev/null 2>&1 &\nsetsid sleep 4321 >/dev/null 2>&1 &\nexit 0").await;
        assert_eq!(ended.code, 0);
        assert!(ended.orphans >= 1, "{ended:?}");
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let command = Supervised {
            program: "/nonexistent/program".into(),
            arguments: Vec::new(),
            environment: BTreeMap::new(),
            folder: "/".into(),
        };
        let mut signals = Signals::listen().expect("handlers");
        let error = command.run(&mut signals).await.expect_err("not there");
        assert!(error.to_string().contains("/nonexistent/program"));
        assert_eq!(error.exit(), Exit::Command(127));
    }
}
