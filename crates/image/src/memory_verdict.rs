//! Decides from evidence whether a build ran out of memory: first from what the kernel counted in the build's own group,
//! then from what it counted on the machine, and only then from what BuildKit said. Never from a word in a log: a test may
//! print "Killed". Pure; the evidence is collected elsewhere, and each verdict carries it.

use std::fmt;

/// A counter of the kernel, before the build and after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    pub before: Option<u64>,
    pub after: Option<u64>,
}

impl Counter {
    /// By how much it rose; `None` if that is not known. One that fell belongs to another group or another start of the
    /// machine.
    pub(crate) fn rise(self) -> Option<u64> {
        self.after?.checked_sub(self.before?)
    }
}

impl fmt::Display for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown =
            |value: Option<u64>| value.map_or("unknown".to_owned(), |value| value.to_string());
        write!(
            f,
            "{} before, {} after",
            shown(self.before),
            shown(self.after)
        )
    }
}

/// Whether the connection to the runner held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Connection {
    /// It held, or the build was here.
    #[default]
    Held,
    /// It broke, and the runner answers again.
    Broken,
    /// It broke, and the runner does not answer any more.
    RunnerGone,
}

/// What is known of a build that has ended.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// Whether BuildKit's client ended with success.
    pub succeeded: bool,
    /// `oom_kill` in `memory.events` of the group around the build.
    pub group: Counter,
    /// `oom_group_kill` there.
    pub whole_group: Counter,
    /// `oom_kill` in `/proc/vmstat` of the runner.
    pub machine: Counter,
    pub connection: Connection,
    /// What BuildKit said of each step that failed, and the last line of its client.
    pub errors: Vec<String>,
}

/// What proves that memory ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// The kernel killed this many processes in the build's own group.
    Group(u64),
    /// The kernel killed this many processes on the runner. Another program's may be among them where the runner is
    /// shared.
    Machine(u64),
}

/// How a build stands with memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It ran out, by proof. A build that succeeded all the same has lost a part of what it ran.
    OutOfMemory(Proof),
    /// BuildKit's text looks like it, and no counter could be read.
    Suspected(&'static str),
    /// The runner is gone, and nothing says why.
    RunnerLost,
    /// It succeeded, or failed for another reason.
    Other,
}

/// What to do about a build that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Once, on the next size.
    NextSize,
    /// Once, on another runner of the same size.
    SameSize,
    No,
}

impl Verdict {
    /// Judges a build.
    pub fn of(evidence: &Evidence) -> Self {
        let group = [evidence.group, evidence.whole_group].map(Counter::rise);
        let killed = group.into_iter().flatten().max();
        if let Some(killed @ 1..) = killed {
            return Self::OutOfMemory(Proof::Group(killed));
        }
        let on_machine = evidence.machine.rise();
        match on_machine {
            // The group has counted every process of the build, so it was another program's.
            Some(1..) if killed.is_some() && evidence.succeeded => return Self::Other,
            // A step may end well although a part of its pipeline was killed.
            Some(killed @ 1..) => return Self::OutOfMemory(Proof::Machine(killed)),
            _ => {}
        }
        if evidence.succeeded {
            return Self::Other;
        }
        // A counter that stands still is proof of the contrary, whatever the text says.
        let is_refuted = killed.is_some() || on_machine.is_some();
        let suspicion = evidence.errors.iter().find_map(|error| suspicion(error));
        match suspicion {
            Some(text) if !is_refuted => Self::Suspected(text),
            _ if evidence.connection == Connection::RunnerGone => Self::RunnerLost,
            _ => Self::Other,
        }
    }

    /// What to do. Only proof buys a larger runner.
    pub fn retry(&self) -> Retry {
        match self {
            Self::OutOfMemory(_) => Retry::NextSize,
            Self::RunnerLost => Retry::SameSize,
            Self::Suspected(_) | Self::Other => Retry::No,
        }
    }

    /// The verdict in outputs and in `--format json`.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::OutOfMemory(_) => "out-of-memory",
            Self::Suspected(_) => "suspected",
            Self::RunnerLost => "lost",
            Self::Other => "other",
        }
    }
}

impl Evidence {
    /// The evidence, a line each, in the order in which it is weighed.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![
            format!(
                "processes killed in the build's group (memory.events, oom_kill): {}",
                self.group
            ),
            format!(
                "kills of the whole group (memory.events, oom_group_kill): {}",
                self.whole_group
            ),
            format!(
                "processes killed on the runner (/proc/vmstat, oom_kill): {}",
                self.machine
            ),
        ];
        let suspicions = self.errors.iter().filter_map(|error| suspicion(error));
        lines.extend(
            suspicions
                .map(|text| format!("BuildKit's text, which proves nothing by itself: {text}")),
        );
        lines.push(
            match self.connection {
                Connection::Held => "the connection held",
                Connection::Broken => "the connection broke, and the runner answers again",
                Connection::RunnerGone => "the connection broke, and the runner does not answer",
            }
            .into(),
        );
        lines
    }
}

/// What of an error looks like memory: BuildKit's own words alone. An error quotes the step's command, which may hold
/// the same words.
fn suspicion(error: &str) -> Option<&'static str> {
    // The client puts these before it.
    let own = [
        "ERROR: ",
        "error: ",
        "failed to build: ",
        "failed to solve: ",
    ];
    let mut error = error.trim();
    while let Some(rest) = own.iter().find_map(|prefix| error.strip_prefix(prefix)) {
        error = rest;
    }
    // gRPC's code, as BuildKit 0.16 and newer give it.
    if error.starts_with("ResourceExhausted: ") {
        return Some("ResourceExhausted");
    }
    let (_, reason) = error.rsplit_once("did not complete successfully: ")?;
    if reason.contains("cannot allocate memory") {
        Some("cannot allocate memory")
    } else if reason.trim() == "exit code: 137" {
        Some("exit code: 137")
    } else {
        None
    }
}

#[cfg(test)]
mod tests;
