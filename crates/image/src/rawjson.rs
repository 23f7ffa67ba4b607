//! What BuildKit prints with `--progress=rawjson`: JSON objects, in older releases over many lines and in newer ones one
//! on a line, and then plain text. Reads it as it comes and keeps the steps, what they logged and why they failed.

mod split;
mod stage;

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use chrono::{DateTime, FixedOffset};
use serde::Deserialize;

use self::split::Splitter;
pub use self::stage::StageName;

/// A build with more steps is read on, and its further steps are left out.
const MOST_STEPS: usize = 10_000;
/// How much of the end of a step's log is kept, in bytes.
const LOG_LIMIT: usize = 64 * 1024;
/// How much of the end of the plain text is kept, in bytes.
const TAIL_LIMIT: usize = 64 * 1024;
/// The most times that one step runs in one build: it is begun anew where several stages need it.
const MOST_SPANS: usize = 16;

/// One object of the stream.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Message {
    // Go writes a list that is empty as null.
    vertexes: Option<Vec<Vertex>>,
    logs: Option<Vec<Log>>,
    warnings: Option<Vec<Warning>>,
}

#[derive(Debug, Deserialize)]
struct Vertex {
    digest: String,
    #[serde(default)]
    name: String,
    /// RFC 3339, to the nanosecond.
    started: Option<String>,
    completed: Option<String>,
    #[serde(default)]
    cached: bool,
    #[serde(default)]
    error: String,
}

#[derive(Debug, Deserialize)]
struct Log {
    vertex: String,
    /// Base64, which is how Go writes bytes.
    #[serde(default)]
    data: String,
}

#[derive(Debug, Deserialize)]
struct Warning {
    /// Base64.
    #[serde(default)]
    short: String,
}

/// A step of a build.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// As BuildKit names it, such as `[cooker 2/3] RUN cargo chef cook`.
    pub name: String,
    /// Whether its result came from a cache.
    pub is_cached: bool,
    /// Why it failed; BuildKit quotes its command in it.
    pub error: Option<String>,
    /// The end of what it printed, both streams together.
    pub log: Vec<u8>,
    /// When it ran, from and until; it may run several times.
    spans: Vec<(DateTime<FixedOffset>, Option<DateTime<FixedOffset>>)>,
}

impl Step {
    /// What its name says of its place in the build.
    pub fn stage(&self) -> StageName<'_> {
        StageName::of(&self.name)
    }

    /// How long it ran.
    pub fn duration(&self) -> Duration {
        let spans = self.spans.iter();
        let ended = spans.filter_map(|(from, until)| {
            (until.as_ref()?.signed_duration_since(from)).to_std().ok()
        });
        ended.sum()
    }

    /// Whether it ended, well or not.
    pub fn is_completed(&self) -> bool {
        self.spans.iter().any(|(_, until)| until.is_some())
    }

    fn merge(&mut self, vertex: Vertex) {
        if !vertex.name.is_empty() {
            self.name = vertex.name;
        }
        self.is_cached |= vertex.cached;
        if !vertex.error.is_empty() {
            self.error = Some(vertex.error);
        }
        let Some(started) = vertex.started.as_deref().and_then(time) else {
            return;
        };
        let completed = vertex.completed.as_deref().and_then(time);
        let known = self.spans.iter().position(|(from, _)| *from == started);
        if let Some(position) = known {
            let until = &mut self.spans[position].1;
            *until = until.or(completed);
        } else if self.spans.len() < MOST_SPANS {
            self.spans.push((started, completed));
        }
    }
}

/// What a stage of the Dockerfile took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Its name; empty for the one without a name.
    pub name: String,
    pub steps: usize,
    pub cached: usize,
    pub duration: Duration,
}

/// Reads the stream of one build.
#[derive(Debug, Default)]
pub struct Reader {
    splitter: Splitter,
    steps: Vec<Step>,
    /// The position of each step, by its digest.
    positions: HashMap<String, usize>,
    warnings: Vec<String>,
    /// The plain text after the objects.
    tail: VecDeque<u8>,
    /// Objects that were no message of BuildKit's.
    unreadable: usize,
    /// Steps beyond [`MOST_STEPS`].
    left_out: usize,
}

/// What a build printed.
#[derive(Debug)]
pub struct Build {
    /// In the order in which they were first named.
    pub steps: Vec<Step>,
    pub warnings: Vec<String>,
    /// The end of the plain text behind the objects, where BuildKit says why it failed.
    pub tail: String,
    /// Objects that could not be understood.
    pub unreadable: usize,
    /// Steps that were too many to be kept.
    pub left_out: usize,
    /// Whether the stream ended within an object, because whoever wrote it was killed.
    pub is_torn: bool,
}

impl Reader {
    /// Reads the next bytes of the stream, which may end anywhere. What follows the first text that is no object is
    /// plain text, whatever it looks like.
    pub fn feed(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let split = self.splitter.next(rest);
            rest = &rest[split.read..];
            if let Some(object) = split.object {
                self.take(&object);
            }
            if !split.plain.is_empty() {
                keep_end(&mut self.tail, &split.plain, TAIL_LIMIT);
            }
        }
    }

    /// The steps so far.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The whole, once the stream has ended.
    pub fn finish(mut self) -> Build {
        let cut_off = self.splitter.finish();
        let is_torn = !cut_off.is_empty();
        keep_end(&mut self.tail, &cut_off, TAIL_LIMIT);
        let tail: Vec<u8> = self.tail.into();
        Build {
            steps: self.steps,
            warnings: self.warnings,
            tail: String::from_utf8_lossy(&tail).into_owned(),
            unreadable: self.unreadable,
            left_out: self.left_out,
            is_torn,
        }
    }

    fn take(&mut self, object: &[u8]) {
        let Ok(message) = serde_json::from_slice::<Message>(object) else {
            self.unreadable += 1;
            return;
        };
        for vertex in message.vertexes.into_iter().flatten() {
            if let Some(step) = self.step(&vertex.digest) {
                step.merge(vertex);
            }
        }
        for log in message.logs.into_iter().flatten() {
            let bytes = decoded(&log.data);
            if let Some(step) = self.step(&log.vertex) {
                step.log.extend(bytes);
                let surplus = step.log.len().saturating_sub(LOG_LIMIT);
                step.log.drain(..surplus);
            }
        }
        for warning in message.warnings.into_iter().flatten() {
            if self.warnings.len() < MOST_STEPS {
                let text = decoded(&warning.short);
                let text = String::from_utf8_lossy(&text);
                self.warnings.push(text.into_owned());
            }
        }
    }

    fn step(&mut self, digest: &str) -> Option<&mut Step> {
        let position = match self.positions.get(digest) {
            Some(position) => *position,
            None if self.steps.len() >= MOST_STEPS => {
                self.left_out += 1;
                return None;
            }
            None => {
                self.positions.insert(digest.to_owned(), self.steps.len());
                self.steps.push(Step::default());
                self.steps.len() - 1
            }
        };
        self.steps.get_mut(position)
    }
}

impl Build {
    /// The steps that failed, with their reasons.
    pub fn errors(&self) -> impl Iterator<Item = (&Step, &str)> {
        self.steps
            .iter()
            .filter_map(|step| Some((step, step.error.as_deref()?)))
    }

    /// What BuildKit said of the failure: of each step, and then the last line of its client. It is evidence for
    /// `memory_verdict`.
    pub fn error_texts(&self) -> Vec<String> {
        let steps = self.errors().map(|(_, error)| error.to_owned());
        let mut lines = self.tail.lines().rev();
        let last = lines.find(|line| line.starts_with("ERROR: ") || line.starts_with("error: "));
        steps.chain(last.map(str::to_owned)).collect()
    }

    /// The stages of the Dockerfile, in the order in which their first steps were named.
    pub fn stages(&self) -> Vec<Stage> {
        let mut stages: Vec<Stage> = Vec::new();
        for step in &self.steps {
            let StageName::Step { stage, .. } = step.stage() else {
                continue;
            };
            let known = stages.iter().position(|known| known.name == stage);
            let position = known.unwrap_or_else(|| {
                stages.push(Stage {
                    name: stage.to_owned(),
                    steps: 0,
                    cached: 0,
                    duration: Duration::ZERO,
                });
                stages.len() - 1
            });
            let stage = &mut stages[position];
            stage.steps += 1;
            stage.cached += usize::from(step.is_cached);
            stage.duration += step.duration();
        }
        stages
    }
}

fn time(text: &str) -> Option<DateTime<FixedOffset>> {
    DateTime::parse_from_rfc3339(text).ok()
}

/// The bytes of base64; nothing if it is none.
fn decoded(text: &str) -> Vec<u8> {
    BASE64_STANDARD.decode(text).unwrap_or_default()
}

fn keep_end(kept: &mut VecDeque<u8>, bytes: &[u8], limit: usize) {
    kept.extend(bytes);
    let surplus = kept.len().saturating_sub(limit);
    kept.drain(..surplus);
}

#[cfg(test)]
mod tests;
