//! Parses the output of `nix build --log-format internal-json` into events. Unknown lines are kept
//! as text and are never an error, because the format is internal to Nix and differs between
//! versions.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;

use crate::store_path::{STORE_DIR, StorePath};
use crate::tool::strip_ansi;
use flywheel_core::text::shorten;

/// Numbers of Nix's `logging.hh`.
const ACTIVITY_BUILD: u64 = 105;
/// A derivation waits for its resolved one: the same with the store paths of its content-addressed inputs filled in.
const ACTIVITY_BUILD_WAITING: u64 = 111;
const RESULT_LOG_LINE: u64 = 101;
/// The level of errors.
const ERROR: u64 = 0;
/// In what Nix prints of an error that it goes on after.
const IGNORED: &str = "(ignored)";
/// Lines at the end of a build log that may show why the build failed.
const LAST_LINES: usize = 6;
/// Lines to keep of the output besides events.
const OUTPUT_LINES: usize = 50;
/// Builds that have ended to keep, for a timeout that does not name its derivation.
const ENDED_BUILDS: usize = 4096;
/// How much sooner than its limit a build may seem to have ended, since its events are read later than they occur.
const TIMEOUT_TOLERANCE: Duration = Duration::from_secs(1);

/// An event of a build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildEvent {
    /// A derivation is being built.
    Started(StorePath),
    /// Nix builds another derivation in the place of this one, and names only that one in all that follows.
    Resolved {
        original: StorePath,
        resolved: StorePath,
    },
    /// A line of its log.
    Line(StorePath, String),
    /// Its build has ended, successfully or not. Some versions report this only when all builds
    /// have ended.
    Stopped(StorePath),
    /// An error message.
    Failed(BuildFailure),
}

/// Why something failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildFailure {
    /// The derivation mentioned in the error, if any.
    pub derivation: Option<StorePath>,
    pub kind: FailureKind,
    /// Nix's message, without colours.
    pub text: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The builder failed.
    Build,
    /// A fixed-output derivation produced content with another hash.
    HashMismatch {
        /// The hash that the derivation specifies.
        specified: String,
        /// The hash of the content.
        got: String,
    },
    /// The builder was killed at Nix's setting `timeout` or `max-silent-time`.
    TimedOut {
        seconds: u64,
        /// Whether it had printed nothing for so long, instead of having run for so long.
        of_silence: bool,
    },
    /// A dependency or the resolved derivation failed. Its error is reported separately.
    Dependency,
    /// Not the build's fault, for example an unreachable server or builder; another attempt may
    /// succeed.
    Transient,
    Other,
}

/// Turns lines into events.
#[derive(Debug, Default)]
pub(crate) struct LogReader {
    builds: HashMap<u64, RunningBuild>,
    /// The builds that have ended, and whose failure Nix has not reported (yet).
    ended: VecDeque<EndedBuild>,
    output: VecDeque<String>,
}

#[derive(Debug)]
struct RunningBuild {
    path: StorePath,
    since: Instant,
    last_line: Instant,
}

#[derive(Debug)]
struct EndedBuild {
    path: StorePath,
    ran: Duration,
    was_silent: Duration,
}

#[derive(Deserialize)]
struct Message {
    action: String,
    #[serde(default)]
    id: u64,
    #[serde(default, rename = "type")]
    kind: u64,
    #[serde(default)]
    level: u64,
    #[serde(default)]
    fields: Vec<Value>,
    #[serde(default)]
    msg: String,
}

impl LogReader {
    pub(crate) fn read(&mut self, line: &str) -> Option<BuildEvent> {
        self.read_at(line, Instant::now())
    }

    fn read_at(&mut self, line: &str, now: Instant) -> Option<BuildEvent> {
        let message: Option<Message> = line
            .strip_prefix("@nix ")
            .and_then(|json| serde_json::from_str(json).ok());
        let Some(message) = message else {
            self.keep_line(line);
            return None;
        };
        match (message.action.as_str(), message.kind) {
            ("start", ACTIVITY_BUILD) => {
                let path = message.path(0)?;
                let build = RunningBuild {
                    path: path.clone(),
                    since: now,
                    last_line: now,
                };
                self.builds.insert(message.id, build);
                Some(BuildEvent::Started(path))
            }
            ("start", ACTIVITY_BUILD_WAITING) => Some(BuildEvent::Resolved {
                original: message.path(0)?,
                resolved: message.path(1)?,
            }),
            // Other activities (downloads, say) stop too; only builds are in the map.
            ("stop", _) => {
                let build = self.builds.remove(&message.id)?;
                self.keep_ended(&build, now);
                Some(BuildEvent::Stopped(build.path))
            }
            ("result", RESULT_LOG_LINE) => {
                let build = self.builds.get_mut(&message.id)?;
                build.last_line = now;
                let line = message.fields.first()?.as_str()?.to_owned();
                Some(BuildEvent::Line(build.path.clone(), line))
            }
            ("msg", _) => {
                // Kept for the case that no event explains a failure.
                self.keep_line(&message.msg);
                // Below its first line, the message of a failure quotes what the build has printed.
                let begins = message.msg.lines().next().unwrap_or_default();
                let is_error = message.level == ERROR && !begins.contains(IGNORED);
                is_error.then(|| BuildEvent::Failed(self.named(failure(&message.msg))))
            }
            _ => None,
        }
    }

    fn keep_ended(&mut self, build: &RunningBuild, now: Instant) {
        self.ended.push_back(EndedBuild {
            path: build.path.clone(),
            ran: now - build.since,
            was_silent: now - build.last_line,
        });
        if self.ended.len() > ENDED_BUILDS {
            self.ended.pop_front();
        }
    }

    /// Adds the derivation to a timeout that does not name one, as those of Nix 2.34 do not: of the builds that ended
    /// without another error, it is the one that ran, or was silent, for a time closest to the limit.
    fn named(&mut self, mut failure: BuildFailure) -> BuildFailure {
        if let (None, FailureKind::TimedOut { seconds, .. }) = (&failure.derivation, &failure.kind)
        {
            let seconds = *seconds;
            let limit = Duration::from_secs(seconds);
            // A build that ended before the limit is the one only where none ran beyond it.
            let excess = |time: Duration| {
                let is_near = time + TIMEOUT_TOLERANCE >= limit;
                is_near.then_some((time < limit, time.abs_diff(limit)))
            };
            let fit = |build: &EndedBuild| {
                let fits = [(build.ran, false), (build.was_silent, true)];
                let fits = fits.map(|(time, of_silence)| Some((excess(time)?, of_silence)));
                fits.into_iter().flatten().min()
            };
            let closest = self
                .ended
                .iter()
                .filter_map(|build| Some((fit(build)?, &build.path)))
                .min();
            if let Some(((_, of_silence), path)) = closest {
                failure.derivation = Some(path.clone());
                failure.kind = FailureKind::TimedOut {
                    seconds,
                    of_silence,
                };
            }
        }
        if let Some(path) = &failure.derivation {
            self.ended.retain(|build| build.path != *path);
        }
        failure
    }

    fn keep_line(&mut self, line: &str) {
        self.output.push_back(shorten(&strip_ansi(line), 2000));
        // A failure is explained at the end of the output, so the oldest line goes.
        if self.output.len() > OUTPUT_LINES {
            self.output.pop_front();
        }
    }

    /// The end of the output besides events.
    pub(crate) fn output(&self) -> String {
        self.output
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join("\n")
    }
}

impl Message {
    fn path(&self, field: usize) -> Option<StorePath> {
        self.fields.get(field)?.as_str()?.parse().ok()
    }
}

pub(crate) fn failure(message: &str) -> BuildFailure {
    let text = strip_ansi(message);
    let text = text
        .trim()
        .strip_prefix("error:")
        .unwrap_or(&text)
        .trim()
        .to_owned();
    let own = without_log(&text);
    // The final error of a failed build lists everything that was requested, not the culprit.
    let derivation = if own.starts_with("build of '") {
        None
    } else {
        derivation(own)
    };
    let lower = own.to_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    // From the most specific to the most general, since messages may contain several of these
    // texts.
    let kind = if let Some(kind) = hash_mismatch(own).or_else(|| timed_out(own)) {
        kind
    } else if has(&[
        "build of resolved derivation",
        "dependencies of derivation",
        "dependency failed",
        "dependencies failed",
    ]) {
        FailureKind::Dependency
    } else if has(&TRANSIENT_MESSAGES) {
        FailureKind::Transient
    } else if has(&[
        "builder for",
        "builder failed",
        "failed with exit code",
        "failed to produce output",
    ]) {
        FailureKind::Build
    } else {
        FailureKind::Other
    };
    BuildFailure {
        derivation,
        kind,
        text,
    }
}

/// Messages of errors that the network or a builder caused.
const TRANSIENT_MESSAGES: [&str; 14] = [
    "unable to download",
    "couldn't connect",
    "could not connect",
    "connection refused",
    "connection reset",
    "connection timed out",
    "timed out while",
    "unexpected end-of-file",
    "failed to start ssh",
    "cannot build on 'ssh",
    "temporary failure in name resolution",
    "resolving timed out",
    "is busy",
    "some substitutes for the outputs of derivation",
];

/// Whether the last lines of a build log report a failed download. Programs that fetch sources
/// print that themselves; Nix only reports that the builder failed.
pub fn is_download(log: &[String]) -> bool {
    let last = &log[log.len().saturating_sub(LAST_LINES)..];
    let is_failed_download = |line: &String| {
        let line = strip_ansi(line).trim().to_lowercase();
        let rest = line
            .strip_prefix("error: unable to download")
            .or_else(|| line.strip_prefix("curl: ("));
        // A missing page will not appear on another attempt. curl's exit code 22 means an HTTP
        // error, and 37 a missing file.
        rest.is_some_and(|rest| {
            !["http error 4", "22)", "37)"]
                .iter()
                .any(|own| rest.contains(own))
        })
    };
    last.iter().any(is_failed_download)
}

fn derivation(text: &str) -> Option<StorePath> {
    let mut rest = text;
    while let Some(at) = rest.find(STORE_DIR) {
        let path = &rest[at..];
        let end = path.find(".drv").map(|end| end + ".drv".len());
        if let Some(path) = end.and_then(|end| path[..end].parse().ok()) {
            return Some(path);
        }
        rest = &rest[at + STORE_DIR.len()..];
    }
    None
}

/// The message without the end of the build's log, which some versions append: what a build prints decides nothing.
fn without_log(text: &str) -> &str {
    let is_heading = |line: &str| {
        let rest = line.trim_start().strip_prefix(['l', 'L']);
        rest.is_some_and(|rest| {
            rest.starts_with("ast ") && rest.trim_end().ends_with(" log lines:")
        })
    };
    let mut end = 0;
    for line in text.split_inclusive('\n') {
        if is_heading(line) {
            return text[..end].trim_end();
        }
        end += line.len();
    }
    text
}

fn timed_out(text: &str) -> Option<FailureKind> {
    let (_, rest) = text.rsplit_once("timed out after ")?;
    let (number, rest) = rest.split_once(" second")?;
    Some(FailureKind::TimedOut {
        seconds: number.parse().ok()?,
        of_silence: rest.contains("of silence"),
    })
}

fn hash_mismatch(text: &str) -> Option<FailureKind> {
    text.contains("hash mismatch").then_some(())?;
    let value = |name: &str| {
        let (_, rest) = text.split_once(name)?;
        rest.split_whitespace().next().map(str::to_owned)
    };
    Some(FailureKind::HashMismatch {
        // Older versions print `wanted:`.
        specified: value("specified:").or_else(|| value("wanted:"))?,
        got: value("got:")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BAD: &str = "/nix/store/k3ncy4z5yb0jw4z7xsz96l0vkv25blcx-bad.drv";

    #[test]
    fn a_build_is_followed_and_everything_else_kept() {
        let mut reader = LogReader::default();
        let bad: StorePath = BAD.parse().expect("a path");
        let start = format!(
            r#"@nix {{"action":"start","fields":["{BAD}","",1,1],"id":7,"level":3,"text":"building","type":105}}"#
        );
        assert_eq!(reader.read(&start), Some(BuildEvent::Started(bad.clone())));
        let line = r#"@nix {"action":"result","fields":["oops"],"id":7,"type":101}"#;
        assert_eq!(
            reader.read(line),
            Some(BuildEvent::Line(bad.clone(), "oops".into()))
        );
        assert_eq!(
            reader.read(r#"@nix {"action":"result","fields":[0,1,0,0],"id":7,"type":105}"#),
            None
        );
        assert_eq!(
            reader.read(r#"@nix {"action":"stop","id":7}"#),
            Some(BuildEvent::Stopped(bad))
        );
        assert_eq!(reader.read(line), None, "nobody's line");
        let ignored = r#"@nix {"action":"msg","level":0,"msg":"error (ignored): error: closing file descriptor 19"}"#;
        assert_eq!(reader.read(ignored), None);
        assert_eq!(reader.read("@nix {torn"), None);
        assert_eq!(reader.read("warning: x"), None);
        assert!(reader.output().ends_with("\n@nix {torn\nwarning: x"));
    }

    #[test]
    fn a_resolved_derivation_is_named_with_its_original() {
        let resolved = BAD.replace("k3nc", "wwiy");
        let line = format!(
            r#"@nix {{"action":"start","fields":["{BAD}","{resolved}"],"id":8,"level":3,"parent":0,"text":"x","type":111}}"#
        );
        assert_eq!(
            LogReader::default().read(&line),
            Some(BuildEvent::Resolved {
                original: BAD.parse().expect("a path"),
                resolved: resolved.parse().expect("a path"),
            })
        );
    }

    /// The names of the derivations that time out after two seconds, and whether it was for their silence. `builds`:
    /// the name, and at which seconds the build begins, prints and ends.
    fn timed_out_of(builds: &[(&str, u64, u64, u64)], timeouts: usize) -> Vec<(String, bool)> {
        let (mut reader, began) = (LogReader::default(), Instant::now());
        let mut events: Vec<(u64, String)> = Vec::new();
        for (id, (name, begins, prints, ends)) in builds.iter().enumerate() {
            let drv = BAD.replace("bad", name);
            events.push((
                *begins,
                format!(r#"@nix {{"action":"start","fields":["{drv}"],"id":{id},"type":105}}"#),
            ));
            events.push((
                *prints,
                format!(r#"@nix {{"action":"result","fields":["x"],"id":{id},"type":101}}"#),
            ));
            events.push((*ends, format!(r#"@nix {{"action":"stop","id":{id}}}"#)));
        }
        events.sort_by_key(|(at, _)| *at);
        for (at, line) in events {
            reader.read_at(&line, began + Duration::from_secs(at));
        }
        let message =
            r#"@nix {"action":"msg","level":0,"msg":"error: timed out after 20 seconds"}"#;
        let failed = (0..timeouts).filter_map(|_| match reader.read(message)? {
            BuildEvent::Failed(BuildFailure {
                derivation: Some(path),
                kind: FailureKind::TimedOut { of_silence, .. },
                ..
            }) => Some((path.name().to_owned(), of_silence)),
            _ => None,
        });
        failed.collect()
    }

    #[test]
    fn a_timeout_without_a_name_is_of_the_build_that_reached_the_limit() {
        let quick = ("quick", 0, 1, 3);
        let slow = ("slow", 3, 22, 23);
        let silent = ("silent", 0, 40, 61);
        // It printed all the time, so the limit is one of silence.
        let long = ("long", 0, 119, 120);
        let name = |name: &str, of_silence| (format!("{name}.drv"), of_silence);
        assert_eq!(timed_out_of(&[quick, slow], 1), [name("slow", false)]);
        assert_eq!(
            timed_out_of(&[long, silent, quick], 1),
            [name("silent", true)]
        );
        assert_eq!(
            timed_out_of(&[silent, quick, slow], 2),
            [name("slow", false), name("silent", true)]
        );
        assert_eq!(timed_out_of(&[quick], 1), []);
    }

    #[test]
    fn what_a_build_prints_does_not_change_the_kind_of_its_failure() {
        for heading in ["last 2 log lines:", "Last 2 log lines:"] {
            let text = format!(
                "error: builder for '{BAD}' failed with exit code 1;\n       {heading}\n       > hash mismatch specified: a got: b\n       > 1 dependency failed, connection refused, timed out after 3 seconds"
            );
            assert_eq!(failure(&text).kind, FailureKind::Build, "{heading}");
        }
    }

    #[test]
    fn what_a_build_prints_does_not_hide_its_failure() {
        let read = |msg: &str| {
            let line = serde_json::json!({ "action": "msg", "level": 0, "msg": msg });
            LogReader::default().read(&format!("@nix {line}"))
        };
        let failed = format!(
            "error: builder for '{BAD}' failed with exit code 2;\n       last 2 log lines:\n       > make: [Makefile:2: x] Error 1 (ignored)"
        );
        assert!(matches!(read(&failed), Some(BuildEvent::Failed(_))));
        assert_eq!(read("error (ignored): killed by signal"), None);
    }

    #[test]
    fn downloads_that_failed_are_told_by_their_logs() {
        let is = |line: &str| is_download(&["trying https://x".to_owned(), line.to_owned()]);
        assert!(is(
            "error: unable to download 'http://x/y': Couldn't connect to server (7)"
        ));
        assert!(is("curl: (28) Operation timed out"));
        assert!(!is("curl: (22) The requested URL returned error: 404"));
        assert!(!is(
            "error: unable to download 'http://x/y': HTTP error 404"
        ));
        assert!(!is("test connection_refused ... FAILED") && !is_download(&[]));
    }

    #[test]
    fn errors_are_told_apart() {
        let kind = |text: &str| failure(text).kind;
        let failed = failure(&format!(
            "\u{1b}[31;1merror:\u{1b}[0m builder for '\u{1b}[35;1m{BAD}\u{1b}[0m' failed with exit code 1"
        ));
        assert_eq!(
            (
                failed.derivation.map(|path| path.to_string()).as_deref(),
                failed.kind
            ),
            (Some(BAD), FailureKind::Build)
        );
        // 2.31 and later.
        assert_eq!(
            kind(&format!(
                "error: Cannot build '{BAD}'.\nReason: builder failed with exit code 1."
            )),
            FailureKind::Build
        );
        assert_eq!(
            kind(&format!(
                "error: Cannot build '{BAD}'.\nReason: 1 dependency failed."
            )),
            FailureKind::Dependency
        );
        assert_eq!(
            kind(&format!(
                "error: 1 dependencies of derivation '{BAD}' failed to build"
            )),
            FailureKind::Dependency
        );
        let whole = failure(&format!("error: build of '{BAD}^*', '{BAD}^*' failed"));
        assert_eq!((whole.derivation, whole.kind), (None, FailureKind::Other));
        assert_eq!(
            kind("error: unable to download 'https://x/y.nar': HTTP error 503"),
            FailureKind::Transient
        );
        assert_eq!(
            kind(&format!(
                "error: a 'aarch64-darwin' is required to build '{BAD}', but I am a 'x86_64-linux'"
            )),
            FailureKind::Other
        );
        let mismatch = format!(
            "error: hash mismatch in fixed-output derivation '{BAD}':\n  specified: sha256-A=\n     got:    sha256-B="
        );
        let expected = FailureKind::HashMismatch {
            specified: "sha256-A=".into(),
            got: "sha256-B=".into(),
        };
        assert_eq!(kind(&mismatch), expected);
        let timed_out = |of_silence| FailureKind::TimedOut {
            seconds: 3,
            of_silence,
        };
        let late = failure(&format!(
            "error: building of '{BAD}^*' from .drv file timed out after 3 seconds"
        ));
        assert_eq!(
            late.derivation.map(|path| path.to_string()).as_deref(),
            Some(BAD)
        );
        assert_eq!(late.kind, timed_out(false));
        let silent = format!(
            "error: building of '{BAD}!out' from .drv file timed out after 3 seconds of silence"
        );
        assert_eq!(kind(&silent), timed_out(true));
        assert_eq!(kind("error: timed out after 3 seconds"), timed_out(false));
        assert_eq!(
            kind(&format!(
                "error: build of resolved derivation '{BAD}' failed"
            )),
            FailureKind::Dependency
        );
    }
}
