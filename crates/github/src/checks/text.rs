//! Every sentence about an output's verdict that people read. Each is bounded in length, and nothing in a build's log
//! can act as markup. Pure; knows no API.

use super::{Cause, Output, Verdict};
use flywheel_core::markdown::{code, fenced, plain};
use flywheel_core::text::{bytes, duration, one_line, shorten, without_ansi};

/// GitHub takes 65,535 characters; counting in bytes as well keeps us under it however they are counted.
const MARKDOWN_LIMIT_BYTES: usize = 65_000;
/// GitHub takes 255 characters.
const TITLE_LIMIT: usize = 250;
/// The log's share of a text. The rest of the text is much shorter than what this leaves.
const LOG_LIMIT_BYTES: usize = 48_000;
/// The share of an evaluation error.
const ERROR_LIMIT: usize = 8_000;

/// One line about how the output ended.
pub fn title(verdict: &Verdict) -> String {
    let took = duration(verdict.took);
    let title = match &verdict.cause {
        Cause::Built => format!("Built in {took}"),
        Cause::Evaluated => format!("Evaluated in {took}"),
        Cause::AlreadyCached => "Already in the cache".to_owned(),
        Cause::AlreadyCachedUnsigned => {
            "Already in a cache that the settings trust without a signature".to_owned()
        }
        Cause::AlreadyInStore => "Already in this store".to_owned(),
        Cause::Evaluation { text, .. } => format!("Does not evaluate: {}", error_line(text)),
        Cause::OutOfMemory {
            needed_bytes,
            limit_bytes,
        } => {
            format!(
                "Evaluation needs more than {} of {}",
                bytes(*needed_bytes),
                bytes(*limit_bytes)
            )
        }
        Cause::Build => format!("Build failed after {took}"),
        Cause::TimedOut {
            seconds,
            of_silence,
        } => {
            let of_silence = if *of_silence { " of silence" } else { "" };
            format!("Build timed out after {seconds} s{of_silence}")
        }
        Cause::Dependency { derivation } => {
            format!("A dependency failed: {}", short_name(derivation))
        }
        Cause::HashMismatch { got, .. } => format!("Wrong hash; the right one is {got}"),
        Cause::Cancelled => "Cancelled".to_owned(),
    };
    one_line(&title, TITLE_LIMIT)
}

/// The Markdown of an output's Check Run.
pub(crate) fn summary(output: &Output, verdict: &Verdict) -> String {
    let mut parts = vec![format!(
        "{} ended: {}.",
        code(&output.attribute),
        plain(&title(verdict))
    )];
    match &verdict.cause {
        Cause::Evaluation { text, .. } => {
            parts.push(fenced(&shorten(&without_ansi(text), ERROR_LIMIT)));
        }
        Cause::HashMismatch { specified, got, .. } => {
            parts.push(format!(
                "The source says {}; what was fetched has {}.",
                code(specified),
                code(got)
            ));
        }
        Cause::Dependency { derivation } => parts.push(format!("Failed: {}.", code(derivation))),
        _ => {}
    }
    if let Some(derivation) = &verdict.derivation {
        parts.push(format!("Derivation: {}", code(derivation)));
    }
    parts.push(format!(
        "By hand:\n\n{}",
        fenced(&shorten(&verdict.reproduce, 2_000))
    ));
    if !verdict.log_tail.is_empty() {
        parts.push(format!(
            "The end of the log:\n\n{}",
            fenced(&log_tail(&verdict.log_tail))
        ));
    }
    bounded(&parts.join("\n\n"), MARKDOWN_LIMIT_BYTES)
}

/// The annotation on the source line, if the cause has one.
pub fn annotation(verdict: &Verdict) -> Option<String> {
    verdict.cause.location()?;
    Some(match &verdict.cause {
        Cause::HashMismatch { specified, got, .. } => {
            format!("The hash is wrong. Replace `{specified}` by `{got}`.")
        }
        _ => title(verdict),
    })
}

/// The last lines that fit, whole ones, oldest first.
pub(super) fn log_tail(lines: &[String]) -> String {
    let (mut kept, mut size) = (Vec::new(), 0);
    // From the end, because the cause of a failure is in the last lines.
    for line in lines.iter().rev() {
        let line = shorten(&without_ansi(line), 2_000);
        size += line.len() + 1;
        if size > LOG_LIMIT_BYTES {
            kept.push("…".to_owned());
            break;
        }
        kept.push(line);
    }
    kept.reverse();
    kept.join("\n")
}

/// The first line of Nix's error, whose message comes before the trace.
fn error_line(text: &str) -> String {
    let clean = without_ansi(text);
    let from = clean
        .find("error:")
        .map_or(clean.as_str(), |at| &clean[at + "error:".len()..]);
    let mut lines = from.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.next().unwrap_or("no reason was given").to_owned()
}

/// `/nix/store/<hash>-hello.drv` as `hello`.
fn short_name(path: &str) -> &str {
    let name = path.rsplit('/').next().unwrap_or(path);
    let name = name.strip_suffix(".drv").unwrap_or(name);
    name.split_once('-').map_or(name, |(_, rest)| rest)
}

fn bounded(text: &str, limit: usize) -> String {
    if text.len() <= limit {
        return text.to_owned();
    }
    format!("{}…", &text[..text.floor_char_boundary(limit - 3)])
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::checks::Conclusion;
    use flywheel_core::location::SourceLocation;

    fn verdict(cause: Cause) -> Verdict {
        Verdict {
            cause,
            derivation: Some("/nix/store/aaaa-hello.drv".into()),
            out_paths: Vec::new(),
            log_tail: Vec::new(),
            started_at_ms: 0,
            took: Duration::from_secs(3),
            reproduce: "nix build .#checks.x86_64-linux.hello".into(),
        }
    }

    fn output() -> Output {
        Output {
            label: "hello".into(),
            attribute: "checks.x86_64-linux.hello".into(),
            system: None,
        }
    }

    #[test]
    fn a_wrong_hash_is_told_with_the_right_one_on_its_line() {
        let location = Some(SourceLocation {
            file: "flake.nix".into(),
            line: 7,
            column: None,
        });
        let verdict = verdict(Cause::HashMismatch {
            specified: "sha256-A".into(),
            got: "sha256-B".into(),
            location,
        });
        assert_eq!(verdict.conclusion(), Conclusion::Failure);
        assert_eq!(
            verdict.cause.location().map(|location| location.line),
            Some(7)
        );
        assert_eq!(
            annotation(&verdict).as_deref(),
            Some("The hash is wrong. Replace `sha256-A` by `sha256-B`.")
        );
    }

    #[test]
    fn a_hostile_log_stays_inside_its_block_and_its_bound() {
        let mut verdict = verdict(Cause::Build);
        verdict.log_tail = vec!["x".repeat(1_000); 500];
        verdict
            .log_tail
            .push("\u{1b}[31m````\u{1b}[0m\r::error::x\u{1b}]0;title\u{7}end".into());
        let summary = summary(&output(), &verdict);
        assert!(summary.len() <= MARKDOWN_LIMIT_BYTES, "{}", summary.len());
        assert!(
            summary.ends_with("\n````::error::xend\n`````"),
            "{}",
            &summary[summary.len() - 60..]
        );
        assert!(
            summary.contains("`checks.x86_64-linux.hello` ended"),
            "{}",
            &summary[..80]
        );
        assert!(!summary.contains('\u{1b}'));
    }

    #[test]
    fn the_title_is_the_first_line_of_the_error() {
        let title_of = |text: &str| {
            title(&verdict(Cause::Evaluation {
                text: text.to_owned(),
                location: None,
            }))
        };
        let traced = "\u{1b}[31;1merror:\u{1b}[0m attribute 'x' missing\n  at /x:1:2\n\n… while calling\n  error: in a trace";
        assert_eq!(title_of(traced), "Does not evaluate: attribute 'x' missing");
        assert_eq!(title_of("error:\n  two\n  lines"), "Does not evaluate: two");
        assert_eq!(title_of("error:"), "Does not evaluate: no reason was given");
    }
}
