//! A run's verdicts for the job summary: a table with failures first, and a timeline of the builds. Pure, and bounded,
//! because GitHub drops summaries over 1 MiB.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::runs::as_str;
use super::text::{log_tail, title};
use super::{Cause, Conclusion, Output, Verdict};
use flywheel_core::markdown::{code, fenced, html, plain};
use flywheel_core::text::{count, duration, one_line};

/// Rows of the table at most; the log and the files have all outputs.
const ROWS: usize = 300;
/// Rows of the timeline at most: the builds that took longest.
const BARS: usize = 40;
/// So many failed outputs are shown with the end of their log.
const LOGS: usize = 20;
/// How many lines that are.
const LOG_LINES: usize = 25;
/// The logs' share of the summary.
const LOGS_LIMIT_BYTES: usize = 200_000;

/// An output and how it ended.
pub type Ended<'a> = (&'a Output, &'a Verdict);

/// One line about all: `12 outputs: 3 failure, 9 success`.
pub fn closing_line(ended: &[Ended<'_>]) -> String {
    let conclusions = [
        Conclusion::Failure,
        Conclusion::Cancelled,
        Conclusion::Success,
        Conclusion::Neutral,
    ]
    .map(|conclusion| {
        let number = ended
            .iter()
            .filter(|(_, verdict)| verdict.conclusion() == conclusion)
            .count();
        (number > 0).then(|| format!("{number} {}", as_str(conclusion)))
    });
    let counts: Vec<String> = conclusions.into_iter().flatten().collect();
    let all = count(ended.len() as u64, "output");
    if counts.is_empty() {
        all
    } else {
        format!("{all}: {}", counts.join(", "))
    }
}

/// One line about the systems that were left out.
pub fn not_looked_at(systems: &BTreeSet<String>) -> String {
    let systems: Vec<&str> = systems.iter().map(String::as_str).collect();
    let names = one_line(&systems.join(", "), 300);
    format!("not looked at, because `systems` does not ask for them: the outputs of {names}")
}

/// The Markdown of all verdicts. `others`: the systems that were left out.
pub fn render(ended: &[Ended<'_>], others: &BTreeSet<String>) -> String {
    let mut text = String::new();
    // Writing to a `String` cannot fail.
    let _ = write(&mut text, ended, others);
    text
}

fn write(text: &mut String, ended: &[Ended<'_>], others: &BTreeSet<String>) -> std::fmt::Result {
    let failed = ended
        .iter()
        .any(|(_, verdict)| verdict.conclusion() == Conclusion::Failure);
    writeln!(
        text,
        "### {} {}\n",
        if failed { "❌" } else { "✅" },
        closing_line(ended)
    )?;
    if !others.is_empty() {
        writeln!(text, "{}\n", plain(&not_looked_at(others)))?;
    }
    if ended.is_empty() {
        return Ok(());
    }
    writeln!(text, "| | Output | Verdict | Time |\n|---|---|---|---|")?;
    let mut rows: Vec<&Ended<'_>> = ended.iter().collect();
    rows.sort_by_key(|(_, verdict)| rank(verdict.conclusion()));
    for (output, verdict) in rows.iter().take(ROWS) {
        let label = plain(&one_line(&output.label, 100));
        let verdict_text = plain(&one_line(&title(verdict), 300));
        let took = if is_there_already(&verdict.cause) {
            String::new()
        } else {
            duration(verdict.took)
        };
        writeln!(
            text,
            "| {} | {label} | {verdict_text} | {took} |",
            sign(verdict.conclusion())
        )?;
    }
    if rows.len() > ROWS {
        writeln!(text, "\n… and {} more.", rows.len() - ROWS)?;
    }
    timeline(text, ended)
}

/// What failed, each output folded with the end of its log and the command that builds it by hand.
pub fn failures(ended: &[Ended<'_>]) -> String {
    let failed = ended
        .iter()
        .filter(|(_, verdict)| verdict.conclusion() == Conclusion::Failure);
    let mut text = String::new();
    for (output, verdict) in failed.take(LOGS) {
        let from = verdict.log_tail.len().saturating_sub(LOG_LINES);
        let log = match &verdict.cause {
            Cause::Evaluation { text, .. } => log_tail(
                &text
                    .lines()
                    .take(LOG_LINES)
                    .map(str::to_owned)
                    .collect::<Vec<_>>(),
            ),
            _ => log_tail(&verdict.log_tail[from..]),
        };
        if log.trim().is_empty() || text.len() + log.len() > LOGS_LIMIT_BYTES {
            continue;
        }
        let label = html(&one_line(&output.label, 100));
        let by_hand = code(&one_line(&verdict.reproduce, 500));
        // Writing to a `String` cannot fail.
        let _ = writeln!(
            text,
            "<details><summary><code>{label}</code>: {}</summary>\n\n{}\n\nBy hand: {by_hand}\n\n</details>\n",
            html(&one_line(&title(verdict), 200)),
            fenced(&log)
        );
    }
    text
}

fn rank(conclusion: Conclusion) -> u8 {
    match conclusion {
        Conclusion::Failure => 0,
        Conclusion::Cancelled => 1,
        Conclusion::Success => 2,
        Conclusion::Neutral => 3,
    }
}

/// The sign of a conclusion.
pub fn sign(conclusion: Conclusion) -> &'static str {
    match conclusion {
        Conclusion::Success | Conclusion::Neutral => "✅",
        Conclusion::Failure => "❌",
        Conclusion::Cancelled => "⚪",
    }
}

/// Whether nothing was done, so that it took no time.
fn is_there_already(cause: &Cause) -> bool {
    matches!(
        cause,
        Cause::AlreadyCached | Cause::AlreadyCachedUnsigned | Cause::AlreadyInStore
    )
}

/// Writes the builds over time, for Mermaid to draw.
fn timeline(text: &mut String, ended: &[Ended<'_>]) -> std::fmt::Result {
    let is_build = |cause: &Cause| {
        !is_there_already(cause) && !matches!(cause, Cause::Evaluated | Cause::Cancelled)
    };
    let mut bars: Vec<&Ended<'_>> = ended
        .iter()
        .filter(|(_, verdict)| is_build(&verdict.cause))
        .collect();
    if bars.is_empty() {
        return Ok(());
    }
    // The longest builds are chosen, and then drawn in the order in which they began.
    bars.sort_by_key(|(_, verdict)| std::cmp::Reverse(verdict.took));
    bars.truncate(BARS);
    bars.sort_by_key(|(_, verdict)| verdict.started_at_ms);
    let first = bars.first().map_or(0, |(_, verdict)| verdict.started_at_ms);
    writeln!(
        text,
        "\n```mermaid\ngantt\n  dateFormat x\n  axisFormat %M:%S"
    )?;
    for (output, verdict) in bars {
        let tag = if verdict.conclusion() == Conclusion::Failure {
            "crit"
        } else {
            "done"
        };
        let from = verdict.started_at_ms - first;
        let to = from
            + u64::try_from(verdict.took.as_millis())
                .unwrap_or(u64::MAX - from)
                .max(1);
        writeln!(text, "  {} :{tag}, {from}, {to}", bar(&output.label))?;
    }
    writeln!(text, "```")
}

/// A label without characters that Mermaid takes for syntax.
fn bar(label: &str) -> String {
    let label = one_line(label, 60);
    label
        .chars()
        .map(|c| {
            if c.is_alphanumeric() || "-_. ".contains(c) {
                c
            } else {
                '_'
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn ended(label: &str, cause: Cause, at: u64) -> (Output, Verdict) {
        let output = Output {
            label: label.into(),
            attribute: label.into(),
            system: None,
        };
        let verdict = Verdict {
            cause,
            derivation: None,
            out_paths: Vec::new(),
            log_tail: Vec::new(),
            started_at_ms: 1_000 + at * 1_000,
            took: Duration::from_millis(1500),
            reproduce: String::new(),
        };
        (output, verdict)
    }

    #[test]
    fn failures_with_their_logs() {
        let mut all = [
            ended("checks.good", Cause::Built, 1),
            ended("checks.bad", Cause::Build, 0),
            ended("checks.there", Cause::AlreadyCached, 0),
            ended(
                "checks.throws",
                Cause::Evaluation {
                    text: "error: attribute 'x' missing\n  at flake.nix:3:7".into(),
                    location: None,
                },
                0,
            ),
        ];
        all[1].1.log_tail = vec!["running tests".into(), "``` FAILED".into()];
        all[1].1.reproduce = "nix build .#checks.bad".into();
        all[3].1.reproduce = "nix eval .#checks.throws".into();
        let all: Vec<Ended<'_>> = all
            .iter()
            .map(|(output, verdict)| (output, verdict))
            .collect();
        let others = BTreeSet::from(["aarch64-darwin".to_owned()]);
        let text = [render(&all, &others), failures(&all)].join("\n");
        flywheel_testing::golden("flake-checks", &text);
    }

    #[test]
    fn failures_come_first_and_nothing_is_markup() {
        let all = [
            ended("good", Cause::Built, 1),
            ended("a|b`<c>: #", Cause::Build, 3),
            ended("there", Cause::AlreadyCached, 0),
        ];
        let all: Vec<Ended<'_>> = all
            .iter()
            .map(|(output, verdict)| (output, verdict))
            .collect();
        let text = render(&all, &BTreeSet::from(["aarch64-darwin".to_owned()]));
        assert!(
            text.starts_with("### ❌ 3 outputs: 1 failure, 1 success, 1 already there\n"),
            "{text}"
        );
        assert!(
            text.contains("does not ask for them: the outputs of aarch64-darwin\n"),
            "{text}"
        );
        assert!(
            text.find("| ❌ |").expect("failed") < text.find("| ✅ |").expect("built"),
            "{text}"
        );
        assert!(text.contains("a\\|b\\`&lt;c>: \\#"), "{text}");
        assert!(
            text.contains("\n  good :done, 0, 1500\n  a_b__c__ _ :crit, 2000, 3500\n```"),
            "{text}"
        );
    }

    #[test]
    fn thousands_fit() {
        let all: Vec<(Output, Verdict)> = (0..5000)
            .map(|n| {
                ended(
                    &format!("{n}{}", "x".repeat(300)),
                    Cause::Evaluation {
                        text: "e".repeat(900),
                        location: None,
                    },
                    n,
                )
            })
            .collect();
        let all: Vec<Ended<'_>> = all
            .iter()
            .map(|(output, verdict)| (output, verdict))
            .collect();
        let text = render(&all, &BTreeSet::new());
        assert!(
            text.len() < 900 * 1024 && text.contains("… and 4700 more."),
            "{}",
            text.len()
        );
    }
}
