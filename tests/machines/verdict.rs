//! Compares what a machine left with what is expected of it.

use std::fmt;

use crate::machines::{End, Machine};
use crate::run::Left;

/// A machine on which Flywheel cannot work says so within this time.
const OBSTACLE_SECONDS: f64 = 5.0;
/// What has no cache to wait for is done within this time, on a busy machine too.
const PASSES_SECONDS: f64 = 60.0;
/// What a job that named its machine's obstacle never says.
const BLAMED_ON_INPUTS: &str = "invalid value";

pub(crate) struct Verdict {
    machine: &'static str,
    story: &'static str,
    /// What the job came to, in a few words.
    came_to: String,
    seconds: f64,
    complaints: Vec<String>,
}

impl Verdict {
    pub(crate) fn new(machine: &Machine, left: &Left) -> Self {
        let mut complaints: Vec<String> = left.broken.iter().cloned().collect();
        if complaints.is_empty() {
            complaints = complain(machine.end, left);
        }
        Self {
            machine: machine.name,
            story: machine.story.as_str(),
            came_to: came_to(left),
            seconds: left.seconds,
            complaints,
        }
    }

    pub(crate) fn holds(&self) -> bool {
        self.complaints.is_empty()
    }
}

fn complain(end: End, left: &Left) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut check = |holds: bool, complaint: String| {
        if !holds {
            complaints.push(complaint);
        }
    };
    let (code, phrases) = match end {
        End::NothingLost(phrases) | End::Passes(phrases) => ("0", phrases),
        End::Obstacle(phrases) => ("69", phrases),
        End::Refuses(code, phrases) => (code, phrases),
    };
    check(left.code == code, format!("exit {}, not {code}", left.code));
    for phrase in phrases {
        check(
            left.log.contains(phrase),
            format!("the log lacks {phrase:?}"),
        );
    }
    check(
        left.planted.is_empty(),
        format!("files of the host are in sight: {}", left.planted.trim()),
    );
    match end {
        End::NothingLost(_) => {
            for (name, value) in [("outcome", "success"), ("lost", "0"), ("built", "3")] {
                let found = left.output(name);
                check(
                    found == value,
                    format!("output {name} is {found:?}, not {value}"),
                );
            }
            for name in ["ambiguous", "withheld"] {
                let found = left.output(name);
                check(
                    matches!(found, "" | "0"),
                    format!("output {name} is {found:?}"),
                );
            }
            check(
                left.log.contains(" 0 lost"),
                "the log has no \"0 lost\"".to_owned(),
            );
            check(
                left.unserved.is_empty(),
                format!("the cache lacks {}", left.unserved.trim()),
            );
        }
        End::Obstacle(_) | End::Refuses(..) => {
            check(
                left.seconds <= OBSTACLE_SECONDS,
                format!("it took {} s to name the obstacle", left.seconds),
            );
            check(
                !left.log.contains(BLAMED_ON_INPUTS),
                "an input is blamed".to_owned(),
            );
        }
        End::Passes(_) => check(
            left.seconds <= PASSES_SECONDS,
            format!("it took {} s", left.seconds),
        ),
    }
    complaints.extend(complain_of_plan(end, left));
    complaints
}

/// The plan is what a job does: it comes to the same end, for the same reason.
fn complain_of_plan(end: End, left: &Left) -> Vec<String> {
    let (code, phrases) = match end {
        _ if left.plan_code.is_empty() => return Vec::new(),
        End::NothingLost(_) => ("0", &[][..]),
        End::Obstacle(phrases) => ("69", phrases),
        End::Passes(_) | End::Refuses(..) => return Vec::new(),
    };
    let mut wrong = Vec::new();
    if left.plan_code != code {
        wrong.push(format!("`setup --plan` exits with {}", left.plan_code));
    }
    if left.log.contains("plan: repair: ") != left.plan.contains("  repair: ") {
        wrong.push("job and plan differ in what is repaired".to_owned());
    }
    let missing = phrases
        .iter()
        .filter(|phrase| !left.plan.contains(**phrase));
    wrong.extend(missing.map(|phrase| format!("the plan lacks {phrase:?}")));
    if !wrong.is_empty() {
        wrong.push(left.plan.clone());
    }
    wrong
}

/// The closing line, or the error.
fn came_to(left: &Left) -> String {
    let lines = || left.log.lines().rev();
    let closing = lines().find_map(|line| {
        let line = line.strip_prefix("flywheel: ")?;
        line.contains(" lost").then_some(line)
    });
    let error = lines().find_map(|line| line.split_once("::error").map(|(_, rest)| rest));
    let line = match left.code.as_str() {
        "0" => closing.unwrap_or("passes"),
        _ => error
            .or_else(|| lines().next())
            .unwrap_or("nothing printed"),
    };
    line.chars().take(150).collect()
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.holds() { "ok" } else { "FAILED" };
        write!(
            f,
            "{word:<6} {:<34} {:<7} {:5.1} s  {}",
            self.machine, self.story, self.seconds, self.came_to
        )?;
        for complaint in &self.complaints {
            write!(f, "\n       {complaint}")?;
        }
        Ok(())
    }
}
