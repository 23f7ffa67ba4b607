//! Takes Nix's error message apart. Since 2.20 or so Nix prints the trace before the message, so that whoever shows only
//! the beginning of it shows everything but the reason. Pure.

use std::fmt;

/// How far Nix indents what follows a line with `error:` alone.
const INDENT: &str = "       ";
/// Nix's hint to itself, which is of no use to the readers of a job.
const SHOW_TRACE: &str = "(use '--show-trace' to show detailed location information)";

/// An error of Nix, without colours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ErrorMessage {
    /// From `error:` on, with the location that Nix gives for it, if any.
    pub(crate) message: String,
    /// What was being evaluated, outermost first; empty where Nix prints none, or prints it after the message.
    pub(crate) trace: String,
}

impl ErrorMessage {
    /// Parses standard error, which must be free of colours. Without an `error:` at the beginning of a line, all of it is
    /// the message.
    pub(crate) fn parse(plain: &str) -> Self {
        let lines: Vec<&str> = plain.lines().collect();
        let begin = lines.iter().position(|line| line.starts_with("error:"));
        let lines = &lines[begin.unwrap_or(0)..];
        // The trace begins below a bare `error:`, and the message follows an empty line at the same indentation as the
        // trace. Lines of source code, and further lines of a message that has `error:` in it, are indented more.
        let is_message = |pair: &[&str]| {
            pair[0].trim().is_empty()
                && pair[1]
                    .strip_prefix(INDENT)
                    .is_some_and(|line| line.starts_with("error:"))
        };
        let is_traced = lines.first().is_some_and(|line| line.trim() == "error:");
        let split = lines.windows(2).position(is_message).filter(|_| is_traced);
        let (trace, message) = match split {
            Some(at) => (&lines[1..at], &lines[at + 1..]),
            None => (&lines[..0], lines),
        };
        let indent = if split.is_some() { INDENT } else { "" };
        Self {
            message: joined(message, indent),
            trace: joined(trace, INDENT),
        }
    }
}

/// The lines without this indentation, and without what Nix says about its own trace.
fn joined(lines: &[&str], indent: &str) -> String {
    let lines = lines
        .iter()
        .filter(|line| **line != SHOW_TRACE)
        .map(|line| line.strip_prefix(indent).unwrap_or(line));
    lines.collect::<Vec<_>>().join("\n").trim().to_owned()
}

/// The message, and then the trace.
impl fmt::Display for ErrorMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if !self.trace.is_empty() {
            write!(f, "\n\n{}", self.trace)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // As 2.8 prints it with `--show-trace`, and 2.26 and 2.34 without.
    const OLD: &str = "warning: dirty\nerror: attribute 'x' missing\n\n       at /s/sub.nix:1:1:\n\n            1| { }.x\n             | ^\n\n       … my context\n";
    const NEW: &str = "trace: error: traced\nerror:\n       … while calling the 'throw' builtin\n         at /s/flake.nix:2:7:\n            2|   a = throw \"error: x\";\n             |       ^\n\n       (stack trace truncated; use '--show-trace' to show the full, detailed trace)\n\n       error: error: nested\n\n              error: indented\n       at x\n";

    #[test]
    fn the_message_comes_before_the_trace() {
        let old = ErrorMessage::parse(OLD);
        assert!(
            old.message
                .starts_with("error: attribute 'x' missing\n\n       at /s/sub.nix:1:1:"),
            "{old}"
        );
        let new = ErrorMessage::parse(NEW);
        assert_eq!(
            new.message,
            "error: error: nested\n\n       error: indented\nat x"
        );
        assert!(
            new.to_string().starts_with(&format!(
                "{}\n\n… while calling the 'throw' builtin\n  at /s/flake.nix:2:7:",
                new.message
            )),
            "{new}"
        );
    }

    #[test]
    fn an_error_without_a_trace_is_the_message() {
        let message = |text: &str| {
            let found = ErrorMessage::parse(text);
            assert_eq!(found.trace, "");
            found.message
        };
        assert_eq!(
            message(&format!("error: no way\n{SHOW_TRACE}\n")),
            "error: no way"
        );
        assert_eq!(
            message("error: two\n       lines"),
            "error: two\n       lines"
        );
        assert_eq!(message("killed\n"), "killed");
        // A format that is not known stays as it is.
        assert_eq!(message("error:\n  what is this"), "error:\n  what is this");
        assert_eq!(message(""), "");
    }
}
