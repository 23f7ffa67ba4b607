//! The progress of one output: what is known of it, and how it ended.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::command::flake_checks::lanes;
use flywheel_core::location::SourceLocation;
use flywheel_github::checks::{Cause, Output, Verdict};
use flywheel_nix::build::log::{BuildFailure, FailureKind};
use flywheel_nix::flake::evaluate::{Derivation, EvalFailure, OutputName};
use flywheel_nix::hash::Sha256;
use flywheel_nix::store_path::StorePath;

/// How many of the last lines of a build's log are kept.
const TAIL: usize = 200;
/// How many files are searched for a hash, and how large one may be in bytes: a flake's tree may hold a whole
/// repository.
const FILES: usize = 20_000;
const FILE_SIZE: u64 = 1 << 20;

#[derive(Debug)]
pub(super) struct OutputProgress {
    pub(crate) name: OutputName,
    pub(crate) output: Output,
    /// The command that builds it by hand.
    reproduce: String,
    /// What evaluation found, once it has.
    pub(crate) facts: Option<Derivation>,
    pub(crate) drv: Option<StorePath>,
    /// How many times its derivation was gone from the store, and it was evaluated again.
    pub(crate) evaluated_again: u32,
    /// Whether the output may be remembered: as far as is known it does not depend on the commit.
    pub(crate) is_remembered: bool,
    /// How many times its build was tried again.
    pub(crate) tries: u32,
    /// How many outputs may be in a lane with it: fewer each time when a lane failed and Nix did not say by which.
    pub(crate) lane_limit: usize,
    begun: Option<(SystemTime, Instant)>,
    pub(crate) verdict: Option<Verdict>,
}

impl OutputProgress {
    pub(crate) fn new(name: OutputName, output: Output, reproduce: String) -> Self {
        Self {
            name,
            output,
            reproduce,
            facts: None,
            drv: None,
            evaluated_again: 0,
            is_remembered: false,
            tries: 0,
            lane_limit: lanes::MAX_OUTPUTS,
            begun: None,
            verdict: None,
        }
    }

    /// Starts the clock, if it does not run yet.
    pub(crate) fn begin(&mut self) {
        self.begun
            .get_or_insert_with(|| (SystemTime::now(), Instant::now()));
    }

    /// Starts the clock anew: from here on the build is timed, and not the evaluation.
    pub(crate) fn begin_build(&mut self) {
        self.begun = Some((SystemTime::now(), Instant::now()));
    }

    /// The store paths that the output builds, where they are known before it is built.
    pub(crate) fn paths(&self) -> Option<Vec<StorePath>> {
        self.facts.as_ref()?.paths()
    }

    /// Gives the output its verdict.
    pub(crate) fn end(&mut self, cause: Cause, log_tail: Vec<String>) -> &Verdict {
        let (at, since) = self
            .begun
            .unwrap_or_else(|| (SystemTime::now(), Instant::now()));
        self.verdict.insert(Verdict {
            cause,
            derivation: self.facts.as_ref().map(|facts| facts.drv.clone()),
            out_paths: self
                .facts
                .iter()
                .flat_map(|facts| facts.outs.values().cloned())
                .collect(),
            log_tail,
            started_at_ms: u64::try_from(
                at.duration_since(UNIX_EPOCH)
                    .unwrap_or_default()
                    .as_millis(),
            )
            .unwrap_or(u64::MAX),
            took: since.elapsed(),
            reproduce: self.reproduce.clone(),
        })
    }
}

/// The last lines of a build's log.
#[derive(Debug, Default)]
pub(super) struct Tail(VecDeque<String>);

impl Tail {
    pub(crate) fn push(&mut self, line: String) {
        self.0.push_back(line);
        if self.0.len() > TAIL {
            self.0.pop_front();
        }
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.0.iter().cloned().collect()
    }
}

/// Where a flake's files are, as GitHub names them.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    /// The tree in the store.
    pub(crate) store: PathBuf,
    /// The folder of the repository that the tree is of; empty for its root.
    pub(crate) prefix: String,
}

impl Tree {
    /// A location in the tree, as a location in the repository.
    pub(crate) fn location(&self, at: &SourceLocation) -> SourceLocation {
        let file = if self.prefix.is_empty() {
            at.file.clone()
        } else {
            format!("{}/{}", self.prefix, at.file)
        };
        SourceLocation {
            file,
            line: at.line,
            column: at.column,
        }
    }

    /// Finds the line of a hash, in any of the ways to write it. Reads many files, so it is not for a thread of the
    /// runtime.
    pub(crate) fn find_hash(&self, hash: &str) -> Option<SourceLocation> {
        let mut forms = vec![hash.to_owned()];
        if let Ok(sum) = Sha256::parse(hash) {
            forms.extend([sum.base32(), sum.base16()]);
        }
        let mut folders = vec![self.store.clone()];
        let mut looked = 0;
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let Ok(kind) = entry.file_type() else {
                    continue;
                };
                if kind.is_dir() {
                    folders.push(entry.path());
                } else if kind.is_file() && looked < FILES {
                    looked += 1;
                    if let Some(at) = self.in_file(&entry.path(), &forms) {
                        return Some(self.location(&at));
                    }
                }
            }
        }
        None
    }

    fn in_file(&self, file: &Path, forms: &[String]) -> Option<SourceLocation> {
        if file.metadata().ok()?.len() > FILE_SIZE {
            return None;
        }
        // A file that is not UTF-8 is no source in which a person wrote a hash.
        let text = std::fs::read_to_string(file).ok()?;
        let (n, column) = text.lines().enumerate().find_map(|(n, line)| {
            let column = forms.iter().find_map(|form| line.find(form.as_str()))?;
            Some((n, column))
        })?;
        let name = file
            .strip_prefix(&self.store)
            .ok()?
            .to_string_lossy()
            .into_owned();
        Some(SourceLocation {
            file: name,
            line: u32::try_from(n + 1).ok()?,
            column: u32::try_from(column + 1).ok(),
        })
    }
}

/// The cause of a failed evaluation.
pub(super) fn evaluation_cause(failure: &EvalFailure, tree: &Tree) -> Cause {
    match failure {
        EvalFailure::Evaluation { text, location } => Cause::Evaluation {
            text: text.clone(),
            location: location.as_ref().map(|at| tree.location(at)),
        },
        EvalFailure::OutOfMemory { needed, limit } => Cause::OutOfMemory {
            needed_bytes: *needed,
            limit_bytes: *limit,
        },
    }
}

/// The cause of a failed build. `is_own`: the failed build is the output's own, and not one that it needs.
pub(super) fn build_cause(failure: &BuildFailure, is_own: bool, tree: &Tree) -> Cause {
    match (&failure.kind, &failure.derivation) {
        (FailureKind::HashMismatch { specified, got }, _) => Cause::HashMismatch {
            specified: specified.clone(),
            got: got.clone(),
            location: tree.find_hash(specified),
        },
        (_, Some(derivation)) if !is_own => Cause::Dependency {
            derivation: derivation.to_string(),
        },
        (
            FailureKind::TimedOut {
                seconds,
                of_silence,
            },
            _,
        ) => Cause::TimedOut {
            seconds: *seconds,
            of_silence: *of_silence,
        },
        _ => Cause::Build,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_found_in_each_way_of_writing_it() {
        let folder = tempfile::tempdir().expect("temporary folder");
        std::fs::create_dir(folder.path().join("sub")).expect("made");
        let sri = "sha256-WJG1tSLV3whtD/CxEPvZ0hu0/HFjrzTQgoai6Eb2vgM=";
        let hash = Sha256::parse(sri).expect("a hash");
        let tree = Tree {
            store: folder.path().into(),
            prefix: "nix".into(),
        };
        assert_eq!(tree.find_hash(sri), None);
        for form in [sri.to_owned(), hash.base32(), hash.base16()] {
            std::fs::write(
                folder.path().join("sub/a.nix"),
                format!("# x\n  hash = \"{form}\";\n"),
            )
            .expect("written");
            let expected = SourceLocation {
                file: "nix/sub/a.nix".into(),
                line: 2,
                column: Some(11),
            };
            assert_eq!(tree.find_hash(sri), Some(expected), "{form}");
        }
    }
}
