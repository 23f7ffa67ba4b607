//! Keeps GitHub's runner from obeying what a foreign command prints. The command writes to this program's own stdout and
//! stderr, byte for byte; what is added are lines of this module before its first byte and after its last one.
//!
//! The runner (`ProcessInvoker.cs`, `ActionCommandManager.cs` in actions/runner) reads the two streams with one task each
//! into two queues. A third task empties the queue of stderr, then that of stdout, and obeys the lines in that order. So
//! the order of the lines of one stream is known, and nothing is known about the order between the two. Whether commands
//! are obeyed is one state for both. From this follows:
//!
//! - `::stop-commands::` begins both streams, with the same token: on each it precedes all that the command prints there,
//!   and the second one is without effect. Both have left their pipes before the command starts, which could open
//!   `/proc/self/fd/1` to read the token.
//! - The line on stderr can overtake whatever this program has printed on stdout. A mask that comes after it would be
//!   shown and not obeyed, so every mask is repeated on stderr.
//! - The resume line stands once, on stdout, behind all that the command has printed there. What the command has printed on
//!   stderr must be in the runner's queue before. It is when the reader has taken a *later* line with another read: the
//!   reader asks for more only once it has queued all lines that it has. Then the runner gets [`RESUME_MARGIN`] to
//!   take them over, as a round that has just emptied the queue of stderr still empties the one of stdout.
//! - Where the reader is too slow for that, commands stay stopped, and this program's own become plain lines. The state
//!   ends with the step.

use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, fstat};
use tokio::time::sleep;

use flywheel_core::secret::Secret;

/// How long a workflow command of this program gets to be obeyed before the stop line on stderr can overtake it.
const STOP_MARGIN: Duration = Duration::from_millis(50);
/// From the moment when all of stderr is in the runner's queue to the resume line. The runner needs microseconds.
const RESUME_MARGIN: Duration = Duration::from_millis(250);
/// How long the reader gets to empty the pipes before the command starts.
const START_LIMIT: Duration = Duration::from_secs(1);
/// How long the reader gets to empty the pipe of stderr after the command's end. Within the 6 s after a `SIGINT`.
const END_LIMIT: Duration = Duration::from_secs(3);
const POLL_INTERVAL: Duration = Duration::from_millis(1);
/// The number of own commands that wait for the resume line. GitHub shows thirty annotations of a step.
const WAITING_LIMIT: usize = 200;

/// One for the process, as the runner has one for the step.
static STATE: Mutex<State> = Mutex::new(State {
    obedience: Obedience::Obeyed,
    masks: Vec::new(),
    last_command: None,
});

struct State {
    obedience: Obedience,
    /// The lines of all masks so far.
    masks: Vec<Secret>,
    /// When the last command was printed.
    last_command: Option<Instant>,
}

/// What the runner does with a workflow command.
enum Obedience {
    Obeyed,
    /// It obeys none until the resume line; these wait for it.
    Stopped(Vec<Waiting>),
    /// It obeys none for the rest of the step.
    Refused,
}

struct Waiting {
    command: Secret,
    plain: Option<String>,
}

/// Prints a workflow command, once the runner obeys it. `plain` stands for it where the runner never will.
pub(super) fn print_command(command: &str, plain: Option<&str>) {
    let mut state = state();
    match &mut state.obedience {
        Obedience::Obeyed => {
            print_line(command);
            state.last_command = Some(Instant::now());
        }
        Obedience::Stopped(waiting) if waiting.len() < WAITING_LIMIT => {
            waiting.extend(Secret::new(command).map(|command| Waiting {
                command,
                plain: plain.map(ToOwned::to_owned),
            }));
        }
        Obedience::Stopped(_) | Obedience::Refused => plain.into_iter().for_each(print_line),
    }
}

/// Prints the command that masks a secret.
pub(super) fn print_mask(command: &str) {
    state().masks.extend(Secret::new(command));
    print_command(command, None);
}

/// Prints a line of the log.
pub(super) fn print_line(line: &str) {
    let mut out = io::stdout().lock();
    // Errors are ignored: when the reader has closed the pipe, the job goes on.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

pub(super) fn print_stderr(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

fn state() -> MutexGuard<'static, State> {
    STATE
        .lock()
        .expect("nothing panics while it holds this lock")
}

/// The time in which the runner obeys no workflow command. To be ended with [`Self::resume`].
#[must_use = "the runner obeys no command until `resume`"]
#[derive(Debug)]
pub struct StoppedCommands {
    token: Secret,
    streams: Streams,
}

impl StoppedCommands {
    /// Has the runner obey no command on either stream. Returns when a foreign command may start.
    pub(super) async fn begin() -> Self {
        let stopped = Self {
            // Unguessable: whoever prints it resumes.
            token: Secret::random(),
            streams: Streams::look(),
        };
        // Stopped for the rest of the step: the runner would take no further token.
        if matches!(state().obedience, Obedience::Refused) {
            return stopped;
        }
        let line = format!("::stop-commands::{}", stopped.token.expose());
        if stopped.streams.are_apart() {
            state()
                .masks
                .iter()
                .for_each(|mask| print_stderr(mask.expose()));
            let _ = drained(&[io_stdout(), io_stderr()], START_LIMIT).await;
            sleep(STOP_MARGIN).await;
        }
        {
            let mut state = state();
            print_line(&line);
            state.obedience = Obedience::Stopped(Vec::new());
        }
        if stopped.streams.are_apart() {
            print_stderr(&line);
        }
        // A reader that has stopped reading must not keep the command from running.
        let _ = drained(&[io_stdout(), io_stderr()], START_LIMIT).await;
        stopped
    }

    /// Has the runner obey commands again, once it cannot obey any of the foreign command, and prints those that have
    /// waited. `is_over`: every process that held the streams has ended. Where one has not, commands stay stopped.
    pub async fn resume(self, is_over: bool) {
        let is_safe = is_over
            && match self.streams {
                Streams::One => true,
                Streams::Two => stderr_is_queued().await,
                // The resume line would go where the runner does not read.
                Streams::StderrAlone => false,
            };
        let mut state = state();
        let Obedience::Stopped(waiting) = &mut state.obedience else {
            return;
        };
        let waiting = std::mem::take(waiting);
        state.obedience = if is_safe {
            Obedience::Obeyed
        } else {
            Obedience::Refused
        };
        if is_safe {
            // The foreign command's last line may lack its line break, and a command has to begin a line.
            print_line(&format!("\n::{}::", self.token.expose()));
            for own in waiting {
                print_line(own.command.expose());
            }
        } else {
            print_line(
                "\nflywheel: it is not certain that the runner has read all that the command prints on standard error, so \
                 that workflow commands stay stopped in this step",
            );
            waiting
                .into_iter()
                .filter_map(|own| own.plain)
                .for_each(|line| print_line(&line));
        }
    }
}

/// How the runner reads this program's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Streams {
    /// Both streams are the same pipe or terminal, or stderr goes to a file, which the runner does not read: the order
    /// of the lines is the order in which they are printed.
    One,
    Two,
    /// stdout goes to a file, so that the runner reads stderr and nothing else.
    StderrAlone,
}

impl Streams {
    fn look() -> Self {
        let read = |stream: BorrowedFd<'static>| {
            let found = fstat(stream).ok()?;
            let kind = FileType::from_raw_mode(found.st_mode);
            // Some runners hand out sockets, some a terminal.
            let is_read = matches!(kind, FileType::Fifo | FileType::Socket) || stream.is_terminal();
            is_read.then_some((found.st_dev, found.st_ino))
        };
        match (read(io_stdout()), read(io_stderr())) {
            (Some(out), Some(error)) if out != error => Self::Two,
            (None, Some(_)) => Self::StderrAlone,
            _ => Self::One,
        }
    }

    fn are_apart(self) -> bool {
        self != Self::One
    }
}

fn io_stdout() -> BorrowedFd<'static> {
    rustix::stdio::stdout()
}

fn io_stderr() -> BorrowedFd<'static> {
    rustix::stdio::stderr()
}

/// Whether all that was printed on stderr so far is in the runner's queue, and was for a while.
async fn stderr_is_queued() -> bool {
    let begun = Instant::now();
    // How far the reader of a socket or a terminal is, nobody can see.
    if !is_pipe(io_stderr()) {
        return false;
    }
    // The first line ends what the command may have left without a line break; the second one needs a read of its own.
    for line in ["", "flywheel: end of the command's standard error"] {
        // An empty pipe takes a line without waiting for its reader.
        for is_last in [false, true] {
            let left = END_LIMIT.saturating_sub(begun.elapsed());
            if !drained(&[io_stderr()], left).await {
                return false;
            }
            if !is_last {
                print_stderr(line);
            }
        }
    }
    sleep(RESUME_MARGIN).await;
    true
}

fn is_pipe(stream: BorrowedFd<'_>) -> bool {
    fstat(stream).is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Fifo)
}

/// Waits until the reader has taken everything out of these pipes. What is no pipe counts as taken.
async fn drained(pipes: &[BorrowedFd<'_>], limit: Duration) -> bool {
    let begun = Instant::now();
    let holds_bytes = |pipe: &BorrowedFd<'_>| {
        is_pipe(*pipe) && rustix::io::ioctl_fionread(pipe).is_ok_and(|bytes| bytes > 0)
    };
    while pipes.iter().any(holds_bytes) {
        if begun.elapsed() >= limit {
            return false;
        }
        sleep(POLL_INTERVAL).await;
    }
    true
}
