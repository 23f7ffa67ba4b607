//! Parses the output of `nix build --log-format internal-json` into events. Unknown lines are kept
//! as text and are never an error, because the format is internal to Nix and differs between
//! versions.

use std::collections::{HashMap, VecDeque};

use serde::Deserialize;
use serde_json::Value;

use crate::store_path::{STORE_DIR, StorePath};
use crate::tool::strip_ansi;
use flywheel_core::text::shorten;

/// Numbers of Nix's `logging.hh`.
const ACTIVITY_BUILD: u64 = 105;
const RESULT_LOG_LINE: u64 = 101;
/// The level of errors.
const ERROR: u64 = 0;
/// Lines at the end of a build log that may show why the build failed.
const LAST_LINES: usize = 6;
/// Lines to keep of the output besides events.
const OUTPUT_LINES: usize = 50;

/// An event of a build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildEvent {
    /// A derivation is being built.
    Started(StorePath),
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
    /// A dependency failed. Its error is reported separately.
    Dependency,
    /// Not the build's fault, for example an unreachable server or builder; another attempt may
    /// succeed.
    Transient,
    Other,
}

/// Turns lines into events.
#[derive(Debug, Default)]
pub(crate) struct LogReader {
    builds: HashMap<u64, StorePath>,
    output: VecDeque<String>,
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
        let message: Option<Message> = line
            .strip_prefix("@nix ")
            .and_then(|json| serde_json::from_str(json).ok());
        let Some(message) = message else {
            self.keep_line(line);
            return None;
        };
        match (message.action.as_str(), message.kind) {
            ("start", ACTIVITY_BUILD) => {
                let path: StorePath = message.fields.first()?.as_str()?.parse().ok()?;
                self.builds.insert(message.id, path.clone());
                Some(BuildEvent::Started(path))
            }
            // Other activities (downloads, say) stop too; only builds are in the map.
            ("stop", _) => self.builds.remove(&message.id).map(BuildEvent::Stopped),
            ("result", RESULT_LOG_LINE) => {
                let path = self.builds.get(&message.id)?;
                Some(BuildEvent::Line(
                    path.clone(),
                    message.fields.first()?.as_str()?.to_owned(),
                ))
            }
            ("msg", _) => {
                // Kept for the case that no event explains a failure.
                self.keep_line(&message.msg);
                (message.level == ERROR).then(|| BuildEvent::Failed(failure(&message.msg)))
            }
            _ => None,
        }
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

pub(crate) fn failure(message: &str) -> BuildFailure {
    let text = strip_ansi(message);
    let text = text
        .trim()
        .strip_prefix("error:")
        .unwrap_or(&text)
        .trim()
        .to_owned();
    // The final error of a failed build lists everything that was requested, not the culprit.
    let derivation = if text.starts_with("build of '") {
        None
    } else {
        derivation(&text)
    };
    let lower = text.to_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    // From the most specific to the most general, since messages may contain several of these
    // texts.
    let kind = if let Some(kind) = hash_mismatch(&text) {
        kind
    } else if has(&[
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
        assert_eq!(reader.read("@nix {torn"), None);
        assert_eq!(reader.read("warning: x"), None);
        assert_eq!(reader.output(), "@nix {torn\nwarning: x");
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
    }
}
