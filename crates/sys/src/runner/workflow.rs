//! Workflow commands: lines on stdout that GitHub's runner interprets. Outside of GitHub Actions the same calls print
//! plain text to stderr.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::runner::guard::{StoppedCommands, print_command, print_line, print_mask, print_stderr};
use crate::runner::input_names::localized;
use flywheel_core::secret::{Secret, without_credentials};
use flywheel_core::text::{is_hidden, shorten, visible};

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
                print_mask(&format!("::add-mask::{}", escape_data(form.expose())));
            }
        }
    }

    /// Prints a plain line of the log, in which the runner finds no command.
    pub fn log(&self, line: &str) {
        if self.in_job {
            print_line(&without_commands(line));
        } else {
            print_stderr(&without_credentials(&visible(&localized(line))));
        }
    }

    /// Prints an annotation. GitHub shows only the first ten of a level, so the others become log lines.
    pub fn annotate(&self, level: Level, title: &str, message: &str) {
        let (title, message) = (visible(title), visible(message));
        let title = without_credentials(&title);
        let message = shorten(&without_credentials(&message), MESSAGE_LIMIT - 100);
        let word = level.as_str();
        if !self.in_job {
            return print_stderr(&localized(&format!("{word}: {title}: {message}")));
        }
        let properties = format!("title={}", escape_property(&title));
        self.annotate_or_log(level, &properties, &title, &message);
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
        let (title, message, file) = (visible(title), visible(message), visible(file));
        let message = shorten(&without_credentials(&message), MESSAGE_LIMIT - 100);
        let place = format!("{title}: {file}:{line}");
        if !self.in_job {
            let (word, message) = (level.as_str(), message.replace(['\r', '\n'], " "));
            return print_stderr(&localized(&format!("{word}: {place}: {message}")));
        }
        let column = column
            .map(|column| format!(",col={column}"))
            .unwrap_or_default();
        let (file, title) = (escape_property(&file), escape_property(&title));
        let properties = format!("file={file},line={line}{column},title={title}");
        self.annotate_or_log(level, &properties, &place, &message);
    }

    fn annotate_or_log(&self, level: Level, properties: &str, place: &str, message: &str) {
        let word = level.as_str();
        // As a plain line the message loses its line breaks: the next line could begin with a workflow command.
        let plain = format!("{word}: {place}: {}", message.replace(['\r', '\n'], " "));
        let plain = defused(&plain);
        if self.count(level) <= SHOWN_PER_LEVEL {
            let command = format!("::{word} {properties}::{}", escape_data(message));
            print_command(&command, Some(&plain));
        } else {
            print_line(&plain);
        }
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
        let title = visible(title);
        if self.in_job {
            print_command(
                &format!("::group::{}", escape_data(&title)),
                Some(&defused(&title)),
            );
        } else {
            print_stderr(&title);
        }
    }

    pub fn end_group(&self) {
        if self.in_job {
            print_command("::endgroup::", None);
        }
    }

    /// Has the runner ignore commands on both streams, so that the output of a foreign command cannot inject any. `None`
    /// where no runner reads them.
    pub async fn stop_commands(&self) -> Option<StoppedCommands> {
        if self.in_job {
            Some(StoppedCommands::begin().await)
        } else {
            None
        }
    }
}

/// Prints the command's result on stdout, in a job and elsewhere. The caller must make sure that no line of it is a
/// workflow command.
pub fn data(text: &str) {
    print_line(&without_credentials(&visible(text.trim_end_matches('\n'))));
}

/// Prints lines for a shell on stdout, as they are.
pub fn shell_data(lines: &str) {
    print_line(lines);
}

/// Prints a result in JSON on stdout, as `data` does. What nobody would see, and what the runner would take for a command,
/// is escaped as JSON has it.
pub fn json_data(json: &str) {
    // A `"` ends an address in JSON, too.
    print_line(&json_escaped(&without_credentials(json)));
}

fn json_escaped(json: &str) -> String {
    // Outside of strings, JSON has no such characters.
    let mut escaped = String::with_capacity(json.len());
    for character in json.chars() {
        if is_hidden(character) {
            let mut units = [0; 2];
            for unit in character.encode_utf16(&mut units) {
                escaped.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            escaped.push(character);
        }
    }
    escaped.replace("##[", r"#\u0023[")
}

/// A line for a log of its own, which a runner may read all the same: it holds no command, and nothing that is not seen.
pub fn without_commands(line: &str) -> String {
    defused(&without_credentials(&visible(line)))
}

/// Breaks up what the runner would take for a command in lines of the log: `::` at the beginning of a line, and the older
/// `##[` anywhere.
fn defused(text: &str) -> String {
    let broken = text.replace("##[", r"##\[");
    let lines = broken.split_inclusive(['\n', '\r']).map(|line| {
        let blank = line.len() - line.trim_start().len();
        let (blank, rest) = line.split_at(blank);
        match rest.strip_prefix("::") {
            Some(rest) => format!(r"{blank}:\:{rest}"),
            None => line.to_owned(),
        }
    });
    lines.collect()
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

    #[test]
    fn json_means_the_same_and_hides_nothing() {
        let value = serde_json::json!({ "a\u{202e}": ["##[error]x", "\u{e0041}\u{85}ü\u{7f}"] });
        let escaped = json_escaped(&value.to_string());
        assert_eq!(
            escaped,
            r##"{"a\u202e":["#\u0023[error]x","\udb40\udc41\u0085ü\u007f"]}"##
        );
        let read: serde_json::Value = serde_json::from_str(&escaped).expect("JSON");
        assert_eq!(read, value);
    }

    #[test]
    fn a_line_of_the_log_holds_no_command() {
        for (line, printed) in [
            ("::error::x", r":\:error::x"),
            ("\u{a0} ::error::x", "\u{a0} :\\:error::x"),
            (
                "a\n ::debug::x\r::group::y",
                "a\n :\\:debug::x\r:\\:group::y",
            ),
            ("a ##[add-mask]b", r"a ##\[add-mask]b"),
            ("store::path ##", "store::path ##"),
        ] {
            assert_eq!(defused(line), printed, "{line:?}");
        }
        // The runner compares by culture, and so does not see these.
        for hidden in [
            "\u{feff}::error::x",
            "\u{200d}::error::x",
            "#\u{ad}#[error]x",
        ] {
            assert!(!defused(&visible(hidden)).contains(hidden), "{hidden:?}");
        }
    }
}
