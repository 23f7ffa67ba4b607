//! What GitHub's runner obeys of a job's output: `nix-job` under a model of the runner's two readers, its two queues and
//! the state for both (`ProcessInvoker.cs`, `ActionCommandManager.cs` in actions/runner).

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, Command};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::nix_job::Job;
use crate::world::cache::Cache;

/// Every run ends before.
const LIMIT: Duration = Duration::from_secs(60);
/// The commands that the runner knows.
const KNOWN: [&str; 10] = [
    "add-mask",
    "add-matcher",
    "debug",
    "echo",
    "endgroup",
    "error",
    "group",
    "notice",
    "save-state",
    "warning",
];

/// Where the model is slow.
#[derive(Clone, Copy, Debug, Default)]
struct Lag {
    /// Before each read of stdout, of stderr.
    reads: [Duration; 2],
    /// Before the processor empties the queues.
    round: Duration,
}

/// What the runner did with the lines.
#[derive(Default)]
struct Seen {
    obeyed: Vec<String>,
    shown: Vec<String>,
    stopped_by: Option<String>,
}

impl Seen {
    /// Shows a line, with the masks so far.
    fn show(&mut self, line: &str) {
        let masks = self.obeyed.iter();
        let masks = masks.filter_map(|line| line.strip_prefix("::add-mask::"));
        let shown = masks.fold(line.to_owned(), |line, mask| line.replace(mask, "***"));
        self.shown.push(shown);
    }

    fn take(&mut self, line: &str) {
        let Some((name, data)) = command_of(line, self.stopped_by.as_deref()) else {
            return self.show(line);
        };
        match self.stopped_by.as_deref() {
            Some(token) if token == name => self.stopped_by = None,
            Some(_) => self.show(line),
            None if name == "stop-commands" => self.stopped_by = Some(data),
            None => self.obeyed.push(line.to_owned()),
        }
    }
}

/// The name and the data of a command that the runner has registered.
fn command_of(line: &str, token: Option<&str>) -> Option<(String, String)> {
    let parsed = |info: &str, data: &str| {
        let name = info.split(' ').next().unwrap_or_default().to_lowercase();
        let known = KNOWN.contains(&name.as_str())
            || name == "stop-commands"
            || token == Some(name.as_str());
        known.then(|| (name, data.to_owned()))
    };
    let new = line
        .trim_start()
        .strip_prefix("::")
        .and_then(|rest| rest.split_once("::"));
    let old = || {
        line.split_once("##[")
            .and_then(|(_, rest)| rest.split_once(']'))
    };
    new.and_then(|(info, data)| parsed(info, data))
        .or_else(|| old().and_then(|(info, data)| parsed(info, data)))
}

#[derive(Default)]
struct Queues {
    /// Of stdout, of stderr.
    lines: [VecDeque<String>; 2],
    /// `AsyncManualResetEvent`: set by a reader, reset by a round after it has emptied the queues.
    is_signalled: bool,
    open_streams: usize,
}

type Shared = Arc<(Mutex<Queues>, Condvar)>;

/// Reads a stream as `StreamReader` does: 4096 bytes at a time, and the next ones when all whole lines are in the queue.
fn read(
    stream: impl Read + Send + 'static,
    index: usize,
    shared: &Shared,
    lag: Lag,
) -> JoinHandle<Vec<u8>> {
    struct Slow<R>(R, Duration, Vec<u8>);
    impl<R: Read> Read for Slow<R> {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            std::thread::sleep(self.1);
            let read = self.0.read(into)?;
            self.2.extend_from_slice(&into[..read]);
            Ok(read)
        }
    }
    let shared = Arc::clone(shared);
    std::thread::spawn(move || {
        let mut stream = BufReader::with_capacity(4096, Slow(stream, lag.reads[index], Vec::new()));
        let mut line = Vec::new();
        while matches!(stream.read_until(b'\n', &mut line), Ok(read) if read > 0) {
            let text = String::from_utf8_lossy(&line)
                .trim_end_matches('\n')
                .to_owned();
            line.clear();
            let mut queues = shared.0.lock().unwrap();
            queues.lines[index].push_back(text);
            queues.is_signalled = true;
            shared.1.notify_all();
        }
        let mut queues = shared.0.lock().unwrap();
        queues.open_streams -= 1;
        shared.1.notify_all();
        drop(queues);
        stream.into_inner().2
    })
}

/// Runs a step under the model. Gives what the runner did, and the bytes of stdout and of stderr.
fn obey(command: &mut Command, lag: Lag) -> (Seen, [String; 2]) {
    let mut child: Child = command.spawn().unwrap();
    drop(child.stdin.take());
    let shared = Shared::default();
    shared.0.lock().unwrap().open_streams = 2;
    let out = read(child.stdout.take().unwrap(), 0, &shared, lag);
    let error = read(child.stderr.take().unwrap(), 1, &shared, lag);
    let mut seen = Seen::default();
    let deadline = Instant::now() + LIMIT;
    loop {
        let queues = shared.0.lock().unwrap();
        let (queues, waited) = shared
            .1
            .wait_timeout_while(
                queues,
                deadline.saturating_duration_since(Instant::now()),
                |queues| !queues.is_signalled && queues.open_streams > 0,
            )
            .unwrap();
        assert!(
            !waited.timed_out(),
            "the step did not end: {:?}",
            seen.shown
        );
        let is_last = queues.open_streams == 0;
        drop(queues);
        // Stderr first; lines that come between the two are the next round's.
        let mut round = Vec::new();
        for index in [1, 0] {
            std::thread::sleep(lag.round);
            let mut queues = shared.0.lock().unwrap();
            round.extend(queues.lines[index].drain(..));
            queues.is_signalled = index == 1 && queues.is_signalled;
        }
        round.iter().for_each(|line| seen.take(line));
        if is_last {
            break;
        }
    }
    child.wait().unwrap();
    let bytes = [out, error].map(|reader| String::from_utf8(reader.join().unwrap()).unwrap());
    (seen, bytes)
}

/// All forms that the runner would obey, on both streams, until the very end.
const SCRIPT: &str = r"
for stream in 1 2; do
  { echo 'first '$stream; echo '::error::job'; echo '  ::add-mask::job'; echo 'x ##[warning]job'; echo '::NOTICE::job'
    printf '\302\240::debug::job\r::group::job\n'; } >&$stream
done
for i in $(seq 300); do echo ::notice::job $i; echo ::notice::job $i >&2; done
printf '::error::job and no line break' >&2
printf '::error::job and no line break'
exit 3
";

#[test]
fn no_command_of_the_job_is_obeyed_on_either_stream() {
    let cache = Cache::start(&[]);
    // A summary that cannot be written makes an annotation at the end.
    let job = Job::new(&cache, SCRIPT).with_env("GITHUB_STEP_SUMMARY", "/nonexistent/summary");
    let ms = Duration::from_millis;
    let lags = [
        Lag::default(),
        Lag {
            reads: [ms(0), ms(40)],
            round: ms(0),
        },
        Lag {
            reads: [ms(40), ms(0)],
            round: ms(0),
        },
        Lag {
            reads: [ms(3), ms(7)],
            round: ms(30),
        },
        Lag {
            reads: [ms(0), ms(0)],
            round: ms(100),
        },
    ];
    let mut streams = Vec::new();
    for lag in lags.into_iter().cycle().take(10) {
        let (seen, bytes) = obey(&mut job.step.command_of_step(), lag);
        let of_job: Vec<&String> = seen
            .obeyed
            .iter()
            .filter(|line| line.contains("job"))
            .collect();
        assert!(of_job.is_empty(), "{lag:?}: {of_job:?}");
        let first = seen
            .shown
            .iter()
            .filter(|line| line.contains("::error::job"))
            .count();
        assert_eq!(first, 4, "{lag:?}: shown, not swallowed: {:?}", seen.shown);
        // The job's masks came before, and its report comes after.
        let ours = |name: &str| {
            seen.obeyed
                .iter()
                .filter(|line| line.starts_with(name))
                .count()
        };
        assert!(ours("::add-mask::") > 0, "{lag:?}: {:?}", seen.obeyed);
        assert_eq!(
            ours("::warning title=report::"),
            1,
            "{lag:?}: {:?}",
            seen.obeyed
        );
        // One on stdout may come after the stop line on stderr: by then the one on stderr has been obeyed.
        let masks_shown = seen.shown.iter().filter(|line| {
            line.contains("::add-mask::") && !line.contains("job") && !line.contains("***")
        });
        assert_eq!(masks_shown.count(), 0, "{lag:?}");
        streams.push(bytes);
    }
    streams.iter().for_each(has_each_stream_in_one_piece);
}

/// Each stream has what the command printed on it, between lines of the guard.
fn has_each_stream_in_one_piece([out, error]: &[String; 2]) {
    for (stream, other, text) in [("1", "2", out), ("2", "1", error)] {
        let from = text.find(&format!("first {stream}\n")).unwrap();
        let (before, rest) = text.split_at(from);
        assert!(
            before
                .lines()
                .last()
                .unwrap()
                .starts_with("::stop-commands::"),
            "{before}"
        );
        assert!(!text.contains(&format!("first {other}\n")));
        let last = "job and no line break";
        let end = rest.find(last).unwrap() + last.len();
        assert_eq!(rest[..end].matches("::notice::job ").count(), 300);
        assert_eq!(rest[..end].lines().count(), 7 + 300, "{rest}");
    }
}
