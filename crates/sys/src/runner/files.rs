//! The files for a step's outputs, environment, path and summary, which GitHub's runner reads.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use crate::runner::env::Env;
use crate::untrusted_file::{self, Owner};
use flywheel_core::text::{shorten, visible};

/// In bytes. GitHub drops a step's whole summary over 1 MiB; the difference is for text that others add.
const SUMMARY_LIMIT: usize = 1000 * 1024;

/// In bytes. A file that has grown beyond this was not written by the steps of a job: GitHub takes 1 MiB of outputs from
/// a step.
const SIZE_LIMIT: u64 = 64 * 1024 * 1024;

/// The runner's files; `None` for those that the environment does not name.
#[derive(Clone, Debug, Default)]
pub struct Files {
    output: Option<PathBuf>,
    env: Option<PathBuf>,
    path: Option<PathBuf>,
    summary: Option<PathBuf>,
}

impl Files {
    pub fn from_env(env: &Env) -> Self {
        Self {
            output: env.path("GITHUB_OUTPUT"),
            env: env.path("GITHUB_ENV"),
            path: env.path("GITHUB_PATH"),
            summary: env.path("GITHUB_STEP_SUMMARY"),
        }
    }

    /// Sets a step output. Does nothing without a runner.
    ///
    /// # Errors
    /// When the file cannot be appended to.
    pub fn set_output(&self, name: &str, value: &str) -> io::Result<()> {
        append_pair(self.output.as_deref(), name, value)
    }

    /// Sets a variable for the job's later steps. Never use it for a secret.
    ///
    /// # Errors
    /// When the file cannot be appended to.
    pub fn set_env(&self, name: &str, value: &str) -> io::Result<()> {
        append_pair(self.env.as_deref(), name, value)
    }

    /// Puts a folder in front of the later steps' `PATH`.
    ///
    /// # Errors
    /// When the file cannot be appended to, or the folder's name has a line break in it.
    pub fn add_path(&self, folder: &Path) -> io::Result<()> {
        // A line break would add a second folder.
        let name = folder.to_str().filter(|name| !name.contains(['\n', '\r']));
        let name = name.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "not a folder name for PATH")
        })?;
        append(self.path.as_deref(), &format!("{name}\n"))
    }

    /// Adds Markdown to the job summary, cut where GitHub would drop all of it. Characters that nobody would see are
    /// shown.
    ///
    /// # Errors
    /// When the file cannot be appended to.
    pub fn add_summary(&self, markdown: &str) -> io::Result<()> {
        let markdown = visible(markdown);
        let cut = if markdown.len() > SUMMARY_LIMIT {
            // `shorten` counts characters, which have four bytes at most.
            format!(
                "{}\n\n(cut: GitHub drops summaries over 1 MiB)\n",
                shorten(&markdown, SUMMARY_LIMIT / 4)
            )
        } else {
            markdown.into_owned()
        };
        append(self.summary.as_deref(), &cut)
    }
}

/// Writes `name<<delimiter`, the value, and the delimiter. The delimiter is random, so that a value cannot contain it
/// and set further outputs.
fn append_pair(file: Option<&Path>, name: &str, value: &str) -> io::Result<()> {
    let mut delimiter = format!("flywheel_{:032x}", fastrand::u128(..));
    while value.contains(&delimiter) {
        delimiter = format!("flywheel_{:032x}", fastrand::u128(..));
    }
    append(
        file,
        &format!("{name}<<{delimiter}\n{value}\n{delimiter}\n"),
    )
}

fn append(file: Option<&Path>, text: &str) -> io::Result<()> {
    // Outside of GitHub Actions there is no such file.
    let Some(file) = file else { return Ok(()) };
    // In a container the runner's files belong to another user than the job.
    untrusted_file::open_to_append(file, Owner::Any, SIZE_LIMIT)
        .map_err(io::Error::from)
        .and_then(|mut open| open.write_all(text.as_bytes()))
        .map_err(|error| io::Error::new(error.kind(), format!("`{}`: {error}", file.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_cannot_set_another_output() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = folder.path().join("out");
        let files = Files {
            output: Some(file.clone()),
            ..Files::default()
        };
        files.set_output("a", "x\nb=evil\nEOF").expect("written");
        let text = std::fs::read_to_string(file).expect("written");
        let delimiter = text
            .lines()
            .next()
            .and_then(|line| line.strip_prefix("a<<"))
            .expect("heredoc");
        assert_eq!(
            text,
            format!("a<<{delimiter}\nx\nb=evil\nEOF\n{delimiter}\n")
        );
        assert!(delimiter.len() > 30, "not guessable");
    }

    /// What stands in the file of the summary once `text` was added.
    fn summary_of(text: &str) -> String {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = folder.path().join("summary");
        let files = Files {
            summary: Some(file.clone()),
            ..Files::default()
        };
        files.add_summary(text).expect("written");
        std::fs::read_to_string(file).expect("written")
    }

    #[test]
    fn a_summary_never_reaches_the_size_that_drops_it() {
        assert!(summary_of(&"ä".repeat(SUMMARY_LIMIT)).len() < 1024 * 1024);
    }

    #[test]
    fn a_summary_shows_what_turns_the_direction_of_writing() {
        assert_eq!(
            summary_of("| `a\u{202e}b` |\n\u{2067}c\u{200b}\n"),
            "| `a\\u{202e}b` |\n\\u{2067}c\\u{200b}\n"
        );
    }
}
