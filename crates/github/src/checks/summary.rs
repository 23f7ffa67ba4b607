//! A run's verdicts for the job summary: a table with failures first, and a timeline of the builds. Pure, and bounded,
//! because GitHub drops summaries over 1 MiB.

use std::collections::BTreeSet;
use std::fmt::Write as _;

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

/// One line about all: `12 outputs: 3 failed, 9 successful`.
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
        let word = match conclusion {
            Conclusion::Failure => "failed",
            Conclusion::Cancelled => "cancelled",
            Conclusion::Success => "successful",
            Conclusion::Neutral => "already there",
        };
        (number > 0).then(|| format!("{number} {word}"))
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
    format!(
        "not looked at, because `systems` does not ask for them: the outputs of {}",
        names_of(systems)
    )
}

fn names_of(systems: &BTreeSet<String>) -> String {
    let systems: Vec<&str> = systems.iter().map(String::as_str).collect();
    one_line(&systems.join(", "), 300)
}

/// The Markdown of all verdicts, without logs: a Check Run has less room. `others`: the systems that were left out.
pub fn render(ended: &[Ended<'_>], others: &BTreeSet<String>) -> String {
    let mut text = String::new();
    // Writing to a `String` cannot fail.
    let _ = write(&mut text, ended, "", others);
    text
}

/// The same with the logs of what failed, which come first.
pub fn with_logs(ended: &[Ended<'_>], others: &BTreeSet<String>) -> String {
    let mut text = String::new();
    let _ = write(&mut text, ended, &failures(ended), others);
    text
}

fn write(
    text: &mut String,
    ended: &[Ended<'_>],
    logs: &str,
    others: &BTreeSet<String>,
) -> std::fmt::Result {
    let failed = ended
        .iter()
        .any(|(_, verdict)| verdict.conclusion() == Conclusion::Failure);
    writeln!(
        text,
        "### {} {}\n",
        if failed { "❌" } else { "✅" },
        closing_line(ended)
    )?;
    if !logs.is_empty() {
        write!(text, "{logs}")?;
    }
    if !ended.is_empty() {
        table(text, ended)?;
        timeline(text, ended)?;
    }
    if !others.is_empty() {
        writeln!(
            text,
            "\nNot looked at, because `systems` does not ask for them: the outputs of {}",
            plain(&names_of(others))
        )?;
    }
    Ok(())
}

fn table(text: &mut String, ended: &[Ended<'_>]) -> std::fmt::Result {
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
    Ok(())
}

/// What failed, each output with the end of its log and the command that builds it by hand, the first one unfolded.
fn failures(ended: &[Ended<'_>]) -> String {
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
        let open = if text.is_empty() { " open" } else { "" };
        // Writing to a `String` cannot fail.
        let _ = writeln!(
            text,
            "<details{open}><summary><code>{label}</code>: {}</summary>\n\n{}\n\nBy hand: {by_hand}\n\n</details>\n",
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

/// Writes the builds over time, for Mermaid to draw, folded.
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
    let end = |(_, verdict): &&Ended<'_>| end_ms(verdict, first);
    let step = tick_interval(bars.iter().map(end).max().unwrap_or_default());
    writeln!(
        text,
        "\n<details><summary>The builds over time</summary>\n\n```mermaid\ngantt\n  dateFormat x\n  axisFormat %M:%S\n  tickInterval {step}"
    )?;
    for (output, verdict) in bars {
        let tag = if verdict.conclusion() == Conclusion::Failure {
            "crit"
        } else {
            "done"
        };
        let from = verdict.started_at_ms - first;
        let to = end_ms(verdict, first);
        writeln!(text, "  {} :{tag}, {from}, {to}", bar(&output.label))?;
    }
    writeln!(text, "```\n\n</details>")
}

/// When a build ended, from the first one's begin.
fn end_ms(verdict: &Verdict, first: u64) -> u64 {
    let from = verdict.started_at_ms - first;
    let took = u64::try_from(verdict.took.as_millis()).unwrap_or(u64::MAX);
    from.saturating_add(took.max(1))
}

/// The distance of the marks on the axis: Mermaid's own would repeat the same second, or leave no room for its text.
fn tick_interval(span_ms: u64) -> String {
    const MARKS: u64 = 10;
    const STEPS: [u64; 5] = [1, 2, 5, 10, 30];
    let fits = |unit_ms: u64| {
        let mut steps = STEPS.into_iter();
        steps.find(|step| span_ms / (step * unit_ms) <= MARKS)
    };
    match (fits(1_000), fits(60_000)) {
        (Some(step), _) => format!("{step}second"),
        (None, Some(step)) => format!("{step}minute"),
        (None, None) => "1hour".to_owned(),
    }
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
            ended("checks.x86_64-linux.unit", Cause::Built, 1),
            ended("checks.x86_64-linux.parser", Cause::Build, 0),
            ended("packages.x86_64-linux.default", Cause::AlreadyCached, 0),
            ended(
                "checks.x86_64-linux.docs",
                Cause::Evaluation {
                    text: "error: attribute 'pandoc' missing\n  at flake.nix:31:7".into(),
                    location: None,
                },
                0,
            ),
        ];
        all[0].1.took = Duration::from_millis(9_400);
        all[1].1.took = Duration::from_millis(4_200);
        all[3].1.took = Duration::from_millis(300);
        let log = ["test ``` ... FAILED", "error: 1 of 214 tests failed"];
        all[1].1.log_tail = log.map(str::to_owned).into();
        all[1].1.reproduce = "nix build .#checks.x86_64-linux.parser".into();
        all[3].1.reproduce = "nix eval .#checks.x86_64-linux.docs".into();
        let all: Vec<Ended<'_>> = all
            .iter()
            .map(|(output, verdict)| (output, verdict))
            .collect();
        let others = BTreeSet::from(["aarch64-darwin".to_owned()]);
        flywheel_testing::golden("flake-checks", &with_logs(&all, &others));
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
            text.starts_with("### ❌ 3 outputs: 1 failed, 1 successful, 1 already there\n"),
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
    fn no_mark_of_the_axis_repeats_the_one_before() {
        for (seconds, step) in [
            (0, "1second"),
            (10, "1second"),
            (95, "10second"),
            (300, "30second"),
            (400, "1minute"),
            (3_600, "10minute"),
            (86_400, "1hour"),
        ] {
            assert_eq!(tick_interval(seconds * 1_000), step, "{seconds} s");
        }
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
