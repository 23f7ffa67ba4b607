//! Workflow commands: lines on stdout that GitHub's runner interprets. Outside of GitHub Actions the same calls print
//! plain text to stderr.

use std::io::Write as _;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use flywheel_core::secret::Secret;
use flywheel_core::text::shorten;

/// GitHub shows at most ten annotations of each level per step.
const SHOWN_PER_LEVEL: usize = 10;
/// GitHub cuts off an annotation's text after this many characters.
const MESSAGE_LIMIT: usize = 4096;

/// The severity of an annotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Level {
    Notice,
    /// Something works less well than it should.
    Warning,
    Error,
}

impl Level {
    /// The command's name, which is also the prefix of the line outside of GitHub Actions.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Notice => "notice",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// Prints the log and the workflow commands.
#[derive(Clone)]
pub struct Workflow {
    in_job: bool,
    /// The number of annotations so far, by level.
    annotated: Arc<Mutex<[usize; 3]>>,
}

impl Workflow {
    /// `in_job`: whether GitHub's runner reads this program's stdout.
    pub fn new(in_job: bool) -> Self {
        Self {
            in_job,
            annotated: Arc::default(),
        }
    }

    /// Whether GitHub's runner reads this program's stdout.
    pub fn in_job(&self) -> bool {
        self.in_job
    }

    /// Makes the runner mask a secret in every form that a log could show. Must be called before anything else can
    /// print it. Outside of GitHub Actions nothing would mask the secret, so nothing is printed.
    pub fn mask(&self, secret: &Secret) {
        if self.in_job {
            for form in secret.forms() {
                print_line(&format!("::add-mask::{}", escape_data(form.expose())));
            }
        }
    }

    /// Prints a plain line of the log.
    pub fn log(&self, line: &str) {
        if self.in_job {
            print_line(line);
        } else {
            print_stderr(line);
        }
    }

    /// Prints an annotation. GitHub shows only the first ten of a level, so the others become log lines.
    pub fn annotate(&self, level: Level, title: &str, message: &str) {
        let message = shorten(message, MESSAGE_LIMIT - 100);
        let word = level.as_str();
        if !self.in_job {
            return print_stderr(&format!("{word}: {title}: {message}"));
        }
        // As a plain line the message loses its line breaks: the next line could begin with a workflow command.
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

    /// Prints an annotation on a line of a file in the repository. Lines and columns count from 1.
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
                print_stderr(&line);
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

    /// Begins a group of log lines, which GitHub folds.
    pub fn group(&self, title: &str) {
        if self.in_job {
            print_line(&format!("::group::{}", escape_data(title)));
        } else {
            print_stderr(title);
        }
    }

    pub fn end_group(&self) {
        if self.in_job {
            print_line("::endgroup::");
        }
    }

    /// Makes the runner ignore commands, so that a build log cannot inject any, until [`Self::resume_commands`] is
    /// called with the same token. The token must not be guessable.
    pub fn stop_commands(&self, token: &Secret) {
        if self.in_job {
            print_line(&format!("::stop-commands::{}", token.expose()));
        }
    }

    pub fn resume_commands(&self, token: &Secret) {
        if self.in_job {
            // The log before may lack its final line break, and a command has to begin a line.
            print_line(&format!("\n::{}::", token.expose()));
        }
    }
}

/// Prints the command's result on stdout, in a job and elsewhere. The caller must make sure that no line of it is a
/// workflow command.
pub fn data(text: &str) {
    print_line(text.trim_end_matches('\n'));
}

fn print_line(line: &str) {
    let mut out = std::io::stdout().lock();
    // Errors are ignored: when the reader has closed the pipe, the job goes on.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn print_stderr(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Escapes a command's data, as `command.ts` in actions/toolkit does.
pub(crate) fn escape_data(text: &str) -> String {
    text.replace('%', "%25")
        .replace('\r', "%0D")
        .replace('\n', "%0A")
}

/// Escapes a command's property, as `command.ts` in actions/toolkit does.
pub(crate) fn escape_property(text: &str) -> String {
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
