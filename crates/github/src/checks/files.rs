//! A run's verdicts as files for other tools: JUnit XML, and JSON, a line for each output.

use std::fmt::Write as _;

use serde::Serialize;

use super::summary::Ended;
use super::text::title;
use super::{Cause, Conclusion};
use flywheel_core::text::without_ansi;

/// A line of the JSON file. The keys are kept stable.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line<'a> {
    label: &'a str,
    attribute: &'a str,
    system: Option<&'a str>,
    conclusion: Conclusion,
    cause: &'a Cause,
    title: String,
    derivation: Option<&'a str>,
    out_paths: &'a [String],
    started_at: u64,
    seconds: f64,
    reproduce: &'a str,
    log_tail: &'a [String],
}

/// One JSON object a line, in the order given.
pub fn json_lines(ended: &[Ended<'_>]) -> String {
    let mut text = String::new();
    for (output, verdict) in ended {
        let line = Line {
            label: &output.label,
            attribute: &output.attribute,
            system: output.system.as_deref(),
            conclusion: verdict.conclusion(),
            cause: &verdict.cause,
            title: title(verdict),
            derivation: verdict.derivation.as_deref(),
            out_paths: &verdict.out_paths,
            started_at: verdict.started_at_ms / 1000,
            seconds: verdict.took.as_secs_f64(),
            reproduce: &verdict.reproduce,
            log_tail: &verdict.log_tail,
        };
        // Plain data, for which serializing to JSON cannot fail.
        text.push_str(&serde_json::to_string(&line).unwrap_or_default());
        text.push('\n');
    }
    text
}

/// JUnit's XML. No standard defines it, so this keeps to what every tool reads: a suite, a case for each output,
/// `failure` and `skipped`.
pub fn junit(name: &str, ended: &[Ended<'_>]) -> String {
    let of = |conclusion: Conclusion| {
        ended
            .iter()
            .filter(|(_, verdict)| verdict.conclusion() == conclusion)
            .count()
    };
    let seconds: f64 = ended
        .iter()
        .map(|(_, verdict)| verdict.took.as_secs_f64())
        .sum();
    let counts = format!(
        "tests=\"{}\" failures=\"{}\" skipped=\"{}\" time=\"{seconds:.3}\"",
        ended.len(),
        of(Conclusion::Failure),
        of(Conclusion::Cancelled)
    );
    let mut text = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    // Writing to a `String` cannot fail.
    let _ = writeln!(
        text,
        "<testsuites {counts}>\n<testsuite name=\"{}\" {counts}>",
        escape(name)
    );
    for (output, verdict) in ended {
        let class = output.system.as_deref().unwrap_or(name);
        let _ = write!(
            text,
            "<testcase classname=\"{}\" name=\"{}\" time=\"{:.3}\">",
            escape(class),
            escape(&output.label),
            verdict.took.as_secs_f64()
        );
        match verdict.conclusion() {
            Conclusion::Failure => {
                let log = match &verdict.cause {
                    Cause::Evaluation { text, .. } => text.clone(),
                    _ => verdict.log_tail.join("\n"),
                };
                let _ = write!(
                    text,
                    "<failure message=\"{}\">{}</failure>",
                    escape(&title(verdict)),
                    escape(&without_ansi(&log))
                );
            }
            Conclusion::Cancelled => text.push_str("<skipped message=\"cancelled\"/>"),
            Conclusion::Success | Conclusion::Neutral => (),
        }
        text.push_str("</testcase>\n");
    }
    text.push_str("</testsuite>\n</testsuites>\n");
    text
}

/// Escapes a text for an attribute or an element. Characters that XML does not allow are left out.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            '\n' | '\t' => escaped.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => (),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Output, Verdict};
    use super::*;

    fn verdict(cause: Cause, log: &str) -> Verdict {
        Verdict {
            cause,
            derivation: Some("/nix/store/x-a.drv".into()),
            out_paths: vec!["/nix/store/x-a".into()],
            log_tail: vec![log.into()],
            started_at_ms: 7_000,
            took: Duration::from_millis(1500),
            reproduce: "nix build .#a".into(),
        }
    }

    #[test]
    fn both_files_hold_hostile_words() {
        let output = Output {
            label: "a<\"&".into(),
            attribute: "checks.a".into(),
            system: Some("x86_64-linux".into()),
        };
        let (bad, gone) = (
            verdict(Cause::Build, "\u{1b}[31m</failure>\u{0}"),
            verdict(Cause::Cancelled, ""),
        );
        let ended = [(&output, &bad), (&output, &gone)];
        let xml = junit("flake checks", &ended);
        assert!(
            xml.contains("tests=\"2\" failures=\"1\" skipped=\"1\" time=\"3.000\""),
            "{xml}"
        );
        assert!(xml.contains("name=\"a&lt;&quot;&amp;\" time=\"1.500\"><failure message=\"Build failed after 1.5 s\">&lt;/failure&gt;</failure>"), "{xml}");
        let lines: Vec<serde_json::Value> = json_lines(&ended)
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect();
        assert_eq!(lines[0]["conclusion"], "failure");
        assert_eq!(lines[0]["cause"]["kind"], "build");
        assert_eq!(
            (
                lines[0]["outPaths"][0].as_str(),
                lines[1]["seconds"].as_f64()
            ),
            (Some("/nix/store/x-a"), Some(1.5))
        );
    }
}
