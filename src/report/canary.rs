//! What the canary found, for people and machines: the table of the log and of the summary, JSON, metrics, and the text
//! of the Check Run. Formats only; the checks are the verb's.

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};

use flywheel_core::disk::Room;
use flywheel_core::text::{count, one_line, shorten};

/// The metrics, each with its meaning, in the order in which they are written.
pub(crate) const METRICS: [(&str, &str); 7] = [
    (
        "flywheel_builder_healthy",
        "Whether every required check of the canary holds.",
    ),
    (
        "flywheel_builder_check_success",
        "Whether a check of the canary holds.",
    ),
    (
        "flywheel_builder_check_duration_seconds",
        "How long a check took.",
    ),
    (
        "flywheel_builder_cold_start_seconds",
        "From the start to the end of the first build.",
    ),
    (
        "flywheel_builder_disk_free_bytes",
        "What an ordinary user may still write to a disk that jobs write to.",
    ),
    (
        "flywheel_builder_disk_free_inodes",
        "How many files such a disk still takes, where the number is fixed.",
    ),
    (
        "flywheel_builder_last_run_timestamp_seconds",
        "When the canary last ended.",
    ),
];

/// GitHub refuses longer texts of a Check Run (65,535 characters).
const TEXT_LIMIT: usize = 60_000;

/// How much a check counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Severity {
    /// Without it the builder is broken.
    Required,
    /// Without it the builder is slower or poorer.
    Advisory,
}

impl Severity {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Required => "required",
            Self::Advisory => "advisory",
        }
    }
}

/// How a check ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Passed,
    Failed {
        /// What to do about it, as a sentence.
        hint: String,
    },
    /// There was nothing to check, or a check that this one depends on has failed.
    Skipped,
}

impl Verdict {
    pub(crate) fn as_str(&self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed { .. } => "failed",
            Self::Skipped => "skipped",
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Check {
    /// The name of the check, which never changes.
    pub(crate) name: String,
    /// The layer that is broken if it fails.
    pub(crate) layer: &'static str,
    pub(crate) severity: Severity,
    pub(crate) limit: Duration,
    pub(crate) took: Duration,
    pub(crate) verdict: Verdict,
    /// What was found, a fragment of one line, without secrets.
    pub(crate) text: String,
}

/// A file system that jobs of the class write to.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    /// Where it is mounted.
    pub(crate) mount: String,
    pub(crate) room: Room,
}

/// Everything that the canary found.
#[derive(Clone, Debug)]
pub(crate) struct Canary {
    /// The class of the builder.
    pub(crate) class: String,
    /// The lane of the builder, if it is known.
    pub(crate) lane: Option<String>,
    /// Every check, the lowest layer first.
    pub(crate) checks: Vec<Check>,
    pub(crate) disks: Vec<Disk>,
    /// From the start to the end of the first build, if there was one.
    pub(crate) cold_start: Option<Duration>,
    /// The time of all checks together.
    pub(crate) took: Duration,
    /// When it ended, in seconds since 1970.
    pub(crate) ended_at: u64,
}

impl Canary {
    /// Whether every required check holds.
    pub(crate) fn healthy(&self) -> bool {
        self.failed(Severity::Required).next().is_none()
    }

    fn failed(&self, severity: Severity) -> impl Iterator<Item = &Check> {
        let failed = self
            .checks
            .iter()
            .filter(|check| matches!(check.verdict, Verdict::Failed { .. }));
        failed.filter(move |check| check.severity == severity)
    }

    /// The layer to look at first: the lowest that is required and broken, else the lowest that is broken.
    pub(crate) fn broken_layer(&self) -> Option<&'static str> {
        self.broken().map(|check| check.layer)
    }

    fn broken(&self) -> Option<&Check> {
        self.failed(Severity::Required)
            .next()
            .or_else(|| self.failed(Severity::Advisory).next())
    }

    /// One line: `nix-builder is healthy (14 checks, 1.2 s)`.
    pub(crate) fn closing_line(&self) -> String {
        let ran = self
            .checks
            .iter()
            .filter(|check| check.verdict != Verdict::Skipped)
            .count();
        let seconds = self.took.as_secs_f64();
        match (self.healthy(), self.broken()) {
            (true, None) => format!(
                "{} is healthy ({}, {seconds:.1} s)",
                self.class,
                count(ran as u64, "check")
            ),
            (_, Some(check)) => format!("{}: {}", self.headline(), check.text),
            (false, None) => self.headline(),
        }
    }

    /// The closing line without what was found, which the summary has below.
    fn headline(&self) -> String {
        match (self.healthy(), self.broken_layer()) {
            (true, None) => self.closing_line(),
            (true, Some(layer)) => format!("{} is healthy, but `{layer}` is broken", self.class),
            (false, layer) => format!(
                "{} is broken at `{}`",
                self.class,
                layer.unwrap_or_default()
            ),
        }
    }

    /// The table of the log. Every line begins with a fixed word, so that none can be a workflow command.
    pub(crate) fn table(&self) -> String {
        let width = self
            .checks
            .iter()
            .map(|check| check.name.len())
            .max()
            .unwrap_or_default();
        let mut text = String::new();
        for check in &self.checks {
            let line = format!(
                "{:<7}  {:<width$}  {:<8}  {:>6.3} s  {}",
                check.verdict.as_str(),
                check.name,
                check.severity.as_str(),
                check.took.as_secs_f64(),
                one_line(&check.text, 400)
            );
            push(&mut text, format_args!("{}\n", line.trim_end()));
            if let Verdict::Failed { hint } = &check.verdict {
                push(
                    &mut text,
                    format_args!("help     {}\n", one_line(hint, 400)),
                );
            }
        }
        text
    }

    /// The job summary, which is also the text of the Check Run.
    pub(crate) fn summary(&self) -> String {
        let sign = if self.healthy() { "✅" } else { "❌" };
        let mut text = format!("### {sign} Builder health: {}\n\n", cell(&self.headline()));
        for check in self
            .failed(Severity::Required)
            .chain(self.failed(Severity::Advisory))
        {
            let Verdict::Failed { hint } = &check.verdict else {
                continue;
            };
            push(
                &mut text,
                format_args!(
                    "- **`{}`** ({}): {}. {}\n",
                    check.layer,
                    check.severity.as_str(),
                    cell(&check.text),
                    cell(hint)
                ),
            );
        }
        if self.broken().is_some() {
            text.push('\n');
        }
        // What holds is looked at on a bad day only.
        let checks = count(self.checks.len() as u64, "check");
        push(
            &mut text,
            format_args!("<details><summary>{checks}</summary>\n"),
        );
        text.push_str("\n| check | layer | severity | verdict | time | what was found |\n|---|---|---|---|---|---|\n");
        for check in &self.checks {
            push(
                &mut text,
                format_args!(
                    "| `{}` | `{}` | {} | {} | {} | {} |\n",
                    cell(&check.name),
                    check.layer,
                    check.severity.as_str(),
                    check.verdict.as_str(),
                    took(check),
                    cell(&check.text)
                ),
            );
        }
        text.push_str("\n</details>\n");
        if let Some(cold) = self.cold_start {
            push(
                &mut text,
                format_args!("\nCold start: {:.1} s.\n", cold.as_secs_f64()),
            );
        }
        shorten(&text, TEXT_LIMIT)
    }

    /// The JSON form. Its keys are kept stable.
    pub(crate) fn json(&self) -> Value {
        let checks = self.checks.iter().map(|check| {
            let hint = if let Verdict::Failed { hint } = &check.verdict {
                Some(hint)
            } else {
                None
            };
            json!({
                "name": check.name,
                "layer": check.layer,
                "severity": check.severity.as_str(),
                "verdict": check.verdict.as_str(),
                "limit-seconds": check.limit.as_secs_f64(),
                "seconds": check.took.as_secs_f64(),
                "text": check.text,
                "hint": hint,
            })
        });
        json!({
            "class": self.class,
            "lane": self.lane,
            "healthy": self.healthy(),
            "broken-layer": self.broken_layer(),
            "cold-start-seconds": self.cold_start.map(|cold| cold.as_secs_f64()),
            "seconds": self.took.as_secs_f64(),
            "ended-at": self.ended_at,
            "checks": checks.collect::<Vec<_>>(),
        })
    }

    /// The step's outputs, by name.
    pub(crate) fn outputs(&self) -> [(&'static str, String); 3] {
        [
            ("healthy", self.healthy().to_string()),
            (
                "broken-layer",
                self.broken_layer().unwrap_or_default().to_owned(),
            ),
            (
                "cold-start-seconds",
                self.cold_start
                    .map(|cold| format!("{:.3}", cold.as_secs_f64()))
                    .unwrap_or_default(),
            ),
        ]
    }

    /// Writes a metric with its samples, each as its own labels and a value.
    fn family(&self, text: &mut String, name: &str, help: &str, samples: &[(String, String)]) {
        if samples.is_empty() {
            return;
        }
        let class = label(&self.class);
        let lane = label(self.lane.as_deref().unwrap_or_default());
        push(
            text,
            format_args!("# HELP {name} {help}\n# TYPE {name} gauge\n"),
        );
        for (labels, value) in samples {
            push(
                text,
                format_args!("{name}{{class=\"{class}\",lane=\"{lane}\"{labels}}} {value}\n"),
            );
        }
    }

    /// A sample of each disk that has the number.
    fn of_disks(&self, number: impl Fn(&Room) -> Option<u64>) -> Vec<(String, String)> {
        let disks = self.disks.iter();
        let samples = disks.filter_map(|disk| {
            let labels = format!(",mount=\"{}\"", label(&disk.mount));
            Some((labels, number(&disk.room)?.to_string()))
        });
        samples.collect()
    }

    /// Metrics in Prometheus's text format. A check that was skipped has no sample.
    pub(crate) fn metrics(&self) -> String {
        let ran = self
            .checks
            .iter()
            .filter(|check| check.verdict != Verdict::Skipped);
        let single = |value: String| vec![(String::new(), value)];
        let passed = |check: &Check| i32::from(check.verdict == Verdict::Passed).to_string();
        let seconds = |time: Duration| format!("{:.6}", time.as_secs_f64());
        let samples = [
            single(i32::from(self.healthy()).to_string()),
            ran.clone()
                .map(|check| (labels(check), passed(check)))
                .collect(),
            ran.map(|check| (labels(check), seconds(check.took)))
                .collect(),
            self.cold_start
                .map(|cold| single(seconds(cold)))
                .unwrap_or_default(),
            self.of_disks(|room| Some(room.free)),
            self.of_disks(|room| Some(room.inodes?.free)),
            single(self.ended_at.to_string()),
        ];
        let mut text = String::new();
        for ((name, help), samples) in METRICS.iter().zip(&samples) {
            self.family(&mut text, name, help, samples);
        }
        text
    }
}

/// The labels of a check's samples, after those of the builder.
fn labels(check: &Check) -> String {
    format!(
        ",check=\"{}\",layer=\"{}\",severity=\"{}\"",
        label(&check.name),
        check.layer,
        check.severity.as_str()
    )
}

fn push(text: &mut String, line: std::fmt::Arguments<'_>) {
    text.write_fmt(line).expect("a `String` takes everything");
}

/// The time of a check; nothing for one that looked at what was known already.
fn took(check: &Check) -> String {
    if check.took < Duration::from_millis(1) {
        String::new()
    } else {
        format!("{:.3} s", check.took.as_secs_f64())
    }
}

/// Text for a table cell: one line, and nothing in it that Markdown or HTML would obey.
fn cell(text: &str) -> String {
    one_line(text, 600).replace('|', "\\|").replace('<', "&lt;")
}

/// Text for a label's value.
fn label(text: &str) -> String {
    one_line(text, 200)
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, layer: &'static str, severity: Severity, verdict: Verdict) -> Check {
        let limit = Duration::from_secs(5);
        Check {
            name: name.into(),
            layer,
            severity,
            limit,
            took: Duration::from_millis(20),
            verdict,
            text: "as it is".into(),
        }
    }

    fn failed() -> Verdict {
        Verdict::Failed {
            hint: "Mend it.".into(),
        }
    }

    fn canary(checks: Vec<Check>) -> Canary {
        let class = "nix-builder".to_owned();
        Canary {
            class,
            lane: None,
            checks,
            disks: Vec::new(),
            cold_start: None,
            took: Duration::from_secs(1),
            ended_at: 1_700_000_000,
        }
    }

    #[test]
    fn a_required_layer_is_named_before_an_advisory_one_below_it() {
        let advisory = check(
            "cache-connect",
            "cache-connect",
            Severity::Advisory,
            failed(),
        );
        let both = canary(vec![
            advisory.clone(),
            check("build", "build", Severity::Required, failed()),
        ]);
        assert_eq!(
            (both.healthy(), both.broken_layer()),
            (false, Some("build"))
        );
        let one = canary(vec![advisory]);
        assert_eq!(
            (one.healthy(), one.broken_layer()),
            (true, Some("cache-connect"))
        );
        assert_eq!(
            one.closing_line(),
            "nix-builder is healthy, but `cache-connect` is broken: as it is"
        );
        assert_eq!(canary(Vec::new()).broken_layer(), None);
    }

    #[test]
    fn broken() {
        let mut checks = vec![
            check("nix", "nix", Severity::Required, Verdict::Passed),
            check("daemon", "daemon", Severity::Required, failed()),
            check(
                "cache-connect",
                "cache-connect",
                Severity::Advisory,
                failed(),
            ),
            check("build", "build", Severity::Required, Verdict::Skipped),
        ];
        checks[0].took = Duration::ZERO;
        let found = [
            "Nix 2.8.0 at /usr/bin/nix",
            "the daemon's socket `/nix/var/nix/daemon-socket/socket` refuses connections",
            "https://cache.example/main: connection refused",
            "it depends on `daemon`",
        ];
        for (check, text) in checks.iter_mut().zip(found) {
            text.clone_into(&mut check.text);
        }
        let hints = [
            (
                1,
                "Start the daemon on the runner (`systemctl restart nix-daemon`, or `nix-daemon` as root).",
            ),
            (2, "Look at the network between the runner and the cache."),
        ];
        for (at, hint) in hints {
            checks[at].verdict = Verdict::Failed { hint: hint.into() };
        }
        flywheel_testing::golden("canary-broken", &canary(checks).summary());
    }

    #[test]
    fn healthy() {
        let mut found = canary(vec![check(
            "nix",
            "nix",
            Severity::Required,
            Verdict::Passed,
        )]);
        found.checks[0].text = "Nix 2.8.0 at /usr/bin/nix".into();
        found.cold_start = Some(Duration::from_millis(1_200));
        flywheel_testing::golden("canary-healthy", &found.summary());
    }

    #[test]
    fn a_skipped_check_has_no_sample_and_labels_are_escaped() {
        let mut canary = canary(vec![
            check("a", "a", Severity::Required, Verdict::Skipped),
            check("b", "b", Severity::Required, Verdict::Passed),
        ]);
        canary.class = "a\"b\\\n".into();
        let metrics = canary.metrics();
        assert!(
            !metrics.contains("check=\"a\"") && metrics.contains("check=\"b\""),
            "{metrics}"
        );
        assert!(metrics.contains(r#"class="a\"b\\""#), "{metrics}");
        assert!(!metrics.contains("cold_start"));
        assert!(!metrics.contains("disk"));
        let room = Room {
            total: 100,
            free: 7,
            inodes: None,
        };
        canary.class = "c".into();
        canary.disks = vec![Disk {
            mount: "/nix".into(),
            room,
        }];
        let metrics = canary.metrics();
        let sample = "flywheel_builder_disk_free_bytes{class=\"c\",lane=\"\",mount=\"/nix\"} 7\n";
        assert!(metrics.contains(sample), "{metrics}");
        assert!(!metrics.contains("inodes"), "{metrics}");
    }

    #[test]
    fn text_from_outside_stays_text() {
        let mut canary = canary(vec![check("a", "a", Severity::Required, failed())]);
        canary.checks[0].text = "<b>x</b>\n| y".into();
        assert!(
            canary.summary().contains("&lt;b>x&lt;/b> \\| y"),
            "{}",
            canary.summary()
        );
        assert!(
            canary
                .table()
                .lines()
                .all(|line| ["failed", "help"].iter().any(|word| line.starts_with(word)))
        );
    }
}
