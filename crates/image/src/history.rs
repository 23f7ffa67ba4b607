//! What earlier builds of a workspace used, and what an operator approved: one line of JSON each, in a file for each
//! workspace. Owns the lines and what they mean; [`HistoryFile`] keeps them.

mod file;

use serde::{Deserialize, Serialize};

pub use self::file::{HistoryError, HistoryFile};
use crate::size::Need;

/// Whether the layer with the dependencies came from the cache. Builds with it and without it are different builds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dependencies {
    Hit,
    Miss,
}

impl Dependencies {
    /// Both, by their names.
    pub const ALL: [(&str, Self); 2] = [("hit", Self::Hit), ("miss", Self::Miss)];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
        }
    }
}

/// What one run of a build used.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Run {
    /// When it ended, in seconds since 1970.
    pub at: u64,
    /// The stage of the Dockerfile that was built.
    pub target: String,
    pub dependencies: Dependencies,
    /// The size of its runner, if it was one of a table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// The processors that it kept busy: the 95th percentile over the run.
    pub cpu_p95: f64,
    /// Memory in GB that could not be reclaimed, without the page cache: the 95th percentile over the run. Of a run that
    /// ran out of memory it is the limit, and the run needed more.
    pub mem_p95: f64,
    /// Whether memory ran out.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ran_out_of_memory: bool,
    pub minutes: f64,
}

/// What history may ask for at most, by an operator's word.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Approval {
    /// When it was given, in seconds since 1970.
    pub at: u64,
    pub target: String,
    pub cpu: u32,
    pub memory_gb: u32,
}

impl Approval {
    pub fn need(&self) -> Need {
        Need {
            cpu: self.cpu,
            memory_gb: self.memory_gb,
        }
    }
}

/// One line of the file.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Line {
    Run(Run),
    Approved(Approval),
}

impl Run {
    /// Whether its numbers can be reckoned with.
    fn is_sane(&self) -> bool {
        let numbers = [self.cpu_p95, self.mem_p95, self.minutes];
        numbers.iter().all(|number| (0.0..1e6).contains(number))
    }
}

/// The history of one workspace, the oldest first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    pub runs: Vec<Run>,
    pub approvals: Vec<Approval>,
    /// Lines that could not be read: torn, damaged, or of another version.
    pub unreadable: usize,
}

impl History {
    /// The history that a file holds. What cannot be read of it is counted.
    pub fn parse(text: &str) -> Self {
        let mut history = Self::default();
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            match serde_json::from_str(line) {
                Ok(Line::Run(run)) if run.is_sane() => history.runs.push(run),
                Ok(Line::Approved(approval)) => history.approvals.push(approval),
                Ok(Line::Run(_)) | Err(_) => history.unreadable += 1,
            }
        }
        history
    }

    /// The runs of a target that are alike, the oldest first.
    pub fn alike(&self, target: &str, dependencies: Dependencies) -> Vec<&Run> {
        let runs = self.runs.iter();
        runs.filter(|run| run.target == target && run.dependencies == dependencies)
            .collect()
    }

    /// The last approval of a target.
    pub fn approval(&self, target: &str) -> Option<&Approval> {
        let mut latest = self.approvals.iter().rev();
        latest.find(|approval| approval.target == target)
    }

    /// The newest `runs` runs, and of each target the approval that holds.
    fn shortened(mut self, runs: usize) -> Self {
        let surplus = self.runs.len().saturating_sub(runs);
        self.runs.drain(..surplus);
        let mut latest: Vec<Approval> = Vec::new();
        for approval in self.approvals.into_iter().rev() {
            if latest.iter().all(|kept| kept.target != approval.target) {
                latest.push(approval);
            }
        }
        latest.reverse();
        self.approvals = latest;
        self
    }

    fn to_lines(&self) -> String {
        let approvals = self.approvals.iter().cloned().map(Line::Approved);
        let runs = self.runs.iter().cloned().map(Line::Run);
        approvals.chain(runs).map(|line| to_text(&line)).collect()
    }
}

fn to_text(line: &Line) -> String {
    let text = serde_json::to_string(line).expect("a line is made of texts and numbers");
    format!("{text}\n")
}
