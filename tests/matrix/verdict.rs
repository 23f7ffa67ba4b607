//! Compares what stock Nix could not have from a job's cache with what the job said about it.

use std::fs;
use std::path::Path;

/// What a job may call a path that its cache does not serve.
const STATES: [&str; 4] = ["lost", "withheld", "ambiguous", "not watched"];

/// What one job of a run came to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Job {
    /// The job's folder within the run's.
    pub(crate) name: String,
    /// Exit code of `flywheel nix-job`.
    pub(crate) exit: String,
    /// The closing line.
    pub(crate) line: String,
    /// How many results the job has.
    pub(crate) results: usize,
    /// Results that an empty store cannot have: store paths, or `-NAME-` of a floating output.
    pub(crate) missing: Vec<String>,
    /// Those of them that the job did not report.
    pub(crate) silent: Vec<String>,
    /// Results that the job called lost although an empty store can have them.
    pub(crate) overclaimed: Vec<String>,
    /// Paths that no honest job may publish, and that are in the cache.
    pub(crate) forged: Vec<String>,
    /// What another job put into the store, and what this one says of it.
    pub(crate) foreign: Vec<Foreign>,
}

/// A path that a job of less trust put into the store.
#[derive(Clone, Debug)]
pub(crate) struct Foreign {
    /// `import` of a forged output, `refused` where the store did not take it, or `file`.
    pub(crate) how: String,
    pub(crate) is_published: bool,
    /// The line in which the trusted job names it, if it does.
    pub(crate) reason: Option<String>,
}

/// What a run came to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Verdict {
    pub(crate) jobs: Vec<Job>,
    /// Why there is no verdict, if there is none: the rig failed, or a job hung.
    pub(crate) broken: Option<String>,
}

impl Verdict {
    pub(crate) fn read(folder: &Path, finished: Result<(), String>) -> Self {
        let text = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
        let mut verdict = Self::default();
        if let Err(reason) = finished {
            let log = text("run.log");
            verdict.broken = Some(format!("{reason}: {}", log.lines().last().unwrap_or("")));
            return verdict;
        }
        if text("done").trim() != "judged" {
            verdict.broken = Some("the judge did not come to its end".to_owned());
        }
        for name in ["a", "b"] {
            if folder.join(name).is_dir() {
                verdict.jobs.push(Job::read(&folder.join(name), name));
            }
        }
        verdict
    }

    pub(crate) fn holds(&self) -> bool {
        let mut jobs = self.jobs.iter();
        self.broken.is_none() && jobs.all(Job::holds)
    }
}

impl Job {
    fn read(folder: &Path, name: &str) -> Self {
        let text = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
        let lines = |name: &str| -> Vec<String> { text(name).lines().map(str::to_owned).collect() };
        let log = text("log");
        let line = closing_line(&log).unwrap_or_default();
        let reported = Reported::read(&log, &text("STEP_SUMMARY"), &line);
        let expected = lines("expected");
        let missing = lines("missing");
        let mut silent: Vec<String> = missing.clone();
        silent.retain(|path| !reported.calls(path));
        // A job that names every path, and whose line says less than that, says it nowhere that people look.
        if silent.is_empty() && reported.counted < missing.len() && !reported.unwatched {
            silent.clone_from(&missing);
        }
        let mut overclaimed = expected.clone();
        overclaimed.retain(|path| !missing.contains(path) && reported.calls_lost(path));
        Self {
            name: name.to_owned(),
            exit: text("exit").trim().to_owned(),
            line,
            results: expected.len() + lines("floating-attributes").len(),
            missing,
            silent,
            overclaimed,
            foreign: foreign(&lines("foreign"), &lines("forged"), &reported),
            forged: lines("forged"),
        }
    }

    pub(crate) fn holds(&self) -> bool {
        self.silent.is_empty()
            && self.forged.is_empty()
            && self.exit == "0"
            && !self.line.is_empty()
    }
}

/// Takes the list of `guest/trust.sh` apart: a word and a path a line.
fn foreign(list: &[String], forged: &[String], reported: &Reported) -> Vec<Foreign> {
    let entries = list.iter().filter_map(|line| line.split_once(' '));
    entries
        .map(|(how, path)| Foreign {
            how: how.to_owned(),
            is_published: forged.iter().any(|one| one == path),
            reason: reported.reason(path),
        })
        .collect()
}

/// `N built, N published, N verified, …`, the last line of the log that has this form.
fn closing_line(log: &str) -> Option<String> {
    let lines = log
        .lines()
        .rev()
        .filter_map(|line| line.strip_prefix("flywheel: "));
    lines
        .filter(|line| line.contains(" built, ") && line.contains(" verified"))
        .map(str::to_owned)
        .next()
}

/// What a job reported.
struct Reported {
    /// Lines that name paths in one of the states, with the state.
    named: Vec<(&'static str, String)>,
    /// How many paths the closing line counts in one of the states.
    counted: usize,
    /// Whether the closing line says that the store is not watched as a whole.
    unwatched: bool,
}

impl Reported {
    fn read(log: &str, summary: &str, line: &str) -> Self {
        let mut named = Vec::new();
        for line in own_lines(log) {
            named.extend(states(line).map(|state| (state, line.to_owned())));
        }
        // The summary lists paths below a heading.
        let mut heading = String::new();
        for line in summary.lines() {
            if line.starts_with("**") || line.starts_with('#') {
                line.clone_into(&mut heading);
            } else {
                let both = format!("{heading} {line}");
                named.extend(states(&both).map(|state| (state, line.to_owned())));
            }
        }
        let is_state = |words: &str| STATES.iter().any(|state| words.starts_with(state));
        Self {
            named,
            counted: counts(line)
                .filter(|(_, words)| is_state(words))
                .map(|(count, _)| count)
                .sum(),
            unwatched: line.contains("not watched") && !line.contains(" 0 not watched"),
        }
    }

    fn calls(&self, path: &str) -> bool {
        self.unwatched || self.named.iter().any(|(_, line)| is_about(line, path))
    }

    /// What is said of a path, behind its name.
    fn reason(&self, path: &str) -> Option<String> {
        let (state, line) = self.named.iter().find(|(_, line)| is_about(line, path))?;
        let (_, reason) = line.split_once(path)?;
        let reason = reason.trim_start_matches(['`', ':', ' ']);
        Some(format!("{state}: {reason}"))
    }

    fn calls_lost(&self, path: &str) -> bool {
        let mut lost = self.named.iter().filter(|(state, _)| *state == "lost");
        lost.any(|(_, line)| is_about(line, path))
    }
}

/// The annotations of a log, and the plain lines that stand for those beyond GitHub's limit, without what the job's
/// command has printed: it stands between `::stop-commands::TOKEN` and `::TOKEN::`.
fn own_lines(log: &str) -> Vec<&str> {
    let mut token: Option<String> = None;
    let mut lines = Vec::new();
    for line in log.lines() {
        if let Some(end) = &token {
            if line == end {
                token = None;
            }
        } else if let Some(stop) = line.strip_prefix("::stop-commands::") {
            token = Some(format!("::{stop}::"));
        } else if ["warning", "error", "notice"].iter().any(|level| {
            line.starts_with(&format!("::{level}")) || line.starts_with(&format!("{level}: "))
        }) {
            lines.push(line);
        }
    }
    lines
}

/// The states that a line speaks of.
fn states(line: &str) -> impl Iterator<Item = &'static str> {
    let lower = line.to_lowercase();
    STATES
        .into_iter()
        .filter(move |state| lower.contains(state))
}

/// Each number of a closing line with the words behind it.
fn counts(line: &str) -> impl Iterator<Item = (usize, &str)> {
    line.split([',', '(', ')']).filter_map(|part| {
        let (number, words) = part.trim().split_once(' ')?;
        Some((number.parse().ok()?, words))
    })
}

/// Whether the first store path that a line names is this one; further ones belong to the reason. `path` is a whole path,
/// or what a name has after its hash.
fn is_about(line: &str, path: &str) -> bool {
    let Some((_, rest)) = line.split_once("/nix/store/") else {
        return false;
    };
    let is_name = |c: char| c.is_ascii_alphanumeric() || "+-._?=".contains(c);
    let name = &rest[..rest.find(|c| !is_name(c)).unwrap_or(rest.len())];
    match path.strip_prefix("/nix/store/") {
        Some(whole) => name == whole,
        None => name.ends_with(path),
    }
}
