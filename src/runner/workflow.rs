//! Workflow commands: the lines on stdout by which a step talks to GitHub's runner.
//! On a laptop the same calls print plain text to stderr.

use std::io::Write as _;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::secret::Secret;
use crate::text::shorten;

/// GitHub shows at most ten annotations of each level per step.
const SHOWN_PER_LEVEL: usize = 10;
/// GitHub cuts an annotation's text here.
const MESSAGE_LIMIT: usize = 4096;

/// How loud an annotation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Level {
    /// Worth knowing.
    Notice,
    /// Something is worse than it should be.
    Warning,
    /// Something failed.
    Error,
}

impl Level {
    /// The command's name, which is also the word on a laptop.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Notice => "notice",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// Where the log goes and how it is spoken.
#[derive(Clone)]
pub struct Workflow {
    in_job: bool,
    annotated: Arc<Mutex<[usize; 3]>>,
}

impl Workflow {
    /// `in_job`: whether GitHub's runner reads our stdout.
    pub fn new(in_job: bool) -> Self {
        Self {
            in_job,
            annotated: Arc::default(),
        }
    }

    /// Whether GitHub's runner reads our stdout.
    pub fn in_job(&self) -> bool {
        self.in_job
    }

    /// Has the runner mask a secret in every form a log could show. To be called before anything
    /// else can print it. On a laptop nothing masks, so nothing is printed.
    pub fn mask(&self, secret: &Secret) {
        if self.in_job {
            for form in secret.forms() {
                print_line(&format!("::add-mask::{}", escape_data(form.expose())));
            }
        }
    }

    /// A plain line of the log.
    pub fn say(&self, line: &str) {
        if self.in_job {
            print_line(line);
        } else {
            complain(line);
        }
    }

    /// An annotation. After ten of a level GitHub shows no more, so the rest stay log lines.
    pub fn annotate(&self, level: Level, title: &str, message: &str) {
        let message = shorten(message, MESSAGE_LIMIT - 100);
        let word = level.as_str();
        if !self.in_job {
            return complain(&format!("{word}: {title}: {message}"));
        }
        if self.count(level) <= SHOWN_PER_LEVEL {
            print_line(&format!(
                "::{word} title={}::{}",
                escape_property(title),
                escape_data(&message)
            ));
        } else {
            print_line(&format!(
                "{word}: {title}: {}",
                message.replace(['\r', '\n'], " ")
            ));
        }
    }

    /// An annotation on a line of a file of the repository (lines and columns count from 1).
    pub fn annotate_line(
        &self,
        level: Level,
        title: &str,
        message: &str,
        file: &str,
        line: u32,
        column: Option<u32>,
    ) {
        let message = shorten(message, MESSAGE_LIMIT - 100);
        let word = level.as_str();
        if !self.in_job || self.count(level) > SHOWN_PER_LEVEL {
            let line = format!(
                "{word}: {title}: {file}:{line}: {}",
                message.replace(['\r', '\n'], " ")
            );
            return if self.in_job {
                print_line(&line);
            } else {
                complain(&line);
            };
        }
        let column = column
            .map(|column| format!(",col={column}"))
            .unwrap_or_default();
        let (file, title) = (escape_property(file), escape_property(title));
        print_line(&format!(
            "::{word} file={file},line={line}{column},title={title}::{}",
            escape_data(&message)
        ));
    }

    fn count(&self, level: Level) -> usize {
        let mut annotated = self
            .annotated
            .lock()
            .expect("nothing panics while it holds this lock");
        annotated[level as usize] += 1;
        annotated[level as usize]
    }

    /// Opens a group of log lines; they are folded away in a job.
    pub fn group(&self, title: &str) {
        if self.in_job {
            print_line(&format!("::group::{}", escape_data(title)));
        } else {
            complain(title);
        }
    }

    /// Closes the group.
    pub fn end_group(&self) {
        if self.in_job {
            print_line("::endgroup::");
        }
    }

    /// From here on the runner takes no commands, so that a build log cannot inject any,
    /// until `resume` is called with the same word. The word must not be guessable.
    pub fn stop_commands(&self, word: &Secret) {
        if self.in_job {
            print_line(&format!("::stop-commands::{}", word.expose()));
        }
    }

    /// Has the runner take commands again.
    pub fn resume_commands(&self, word: &Secret) {
        if self.in_job {
            // A log without a final newline would swallow the command.
            print_line(&format!("\n::{}::", word.expose()));
        }
    }
}

/// Data that was asked for, on stdout, in a job and on a laptop alike. The caller sees to it that no
/// line of it is a command.
pub fn data(text: &str) {
    print_line(text.trim_end_matches('\n'));
}

/// A broken pipe means that nobody listens any more; the job goes on.
fn print_line(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn complain(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Data of a command on one line (actions/toolkit, `command.ts`).
pub fn escape_data(text: &str) -> String {
    text.replace('%', "%25")
        .replace('\r', "%0D")
        .replace('\n', "%0A")
}

/// A property of a command on one line (actions/toolkit, `command.ts`).
pub fn escape_property(text: &str) -> String {
    escape_data(text).replace(':', "%3A").replace(',', "%2C")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_cannot_begin_a_command_of_its_own() {
        assert_eq!(escape_data("100%\r\n::error::x"), "100%25%0D%0A::error::x");
        assert_eq!(escape_property("a:b,c"), "a%3Ab%2Cc");
    }
}
