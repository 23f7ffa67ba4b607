//! A list of checks: runs each within its own limit, all within one deadline, and records the results. A check that
//! hangs costs the others nothing but its time.

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::report::canary::{Check, Severity, Verdict};
use flywheel_core::text::{duration, nearest, one_line};

/// A check that stops itself at its limit has this much longer to return its own error.
const GRACE: Duration = Duration::from_millis(300);
/// The name of every layer, and of the families that stand for several (`cache` for `cache-tls` and the like).
pub(super) const LAYERS: [&str; 33] = [
    "disk",
    "inodes",
    "temporary-space",
    "memory",
    "clock",
    "hints",
    "tools",
    "toolchain",
    "daemon",
    "store",
    "user-trust",
    "sandbox",
    "evaluation",
    "build",
    "package",
    "docker",
    "image-build",
    "headers",
    "module",
    "cache",
    "cache-name",
    "cache-connect",
    "cache-tls",
    "cache-answer",
    "cache-authorised",
    "cache-exists",
    "cache-narinfo",
    "cache-nar",
    "cache-signature",
    "cache-write",
    "cache-read-back",
    "bazel-cache",
    "bazel-executor",
];

/// What a check is called, and how much it counts.
#[derive(Clone, Copy, Debug)]
pub(super) struct CheckSpec {
    pub(crate) name: &'static str,
    pub(crate) layer: &'static str,
    pub(crate) severity: Severity,
    pub(crate) limit: Duration,
}

impl CheckSpec {
    pub(crate) const fn required(name: &'static str, layer: &'static str, seconds: u64) -> Self {
        Self {
            name,
            layer,
            severity: Severity::Required,
            limit: Duration::from_secs(seconds),
        }
    }

    pub(crate) const fn advisory(name: &'static str, layer: &'static str, seconds: u64) -> Self {
        Self {
            name,
            layer,
            severity: Severity::Advisory,
            limit: Duration::from_secs(seconds),
        }
    }
}

/// Why a check fails.
#[derive(Clone, Debug)]
pub(super) struct CheckFailure {
    /// The layer at fault, where it is another than the check's own.
    pub(crate) layer: Option<&'static str>,
    pub(crate) text: String,
    pub(crate) hint: String,
}

impl CheckFailure {
    pub(crate) fn new(text: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            layer: None,
            text: text.into(),
            hint: hint.into(),
        }
    }

    pub(crate) fn at(self, layer: &'static str) -> Self {
        Self {
            layer: Some(layer),
            ..self
        }
    }
}

/// What a check found: a value for later checks, and a text for the report.
pub(super) type Found<T> = Result<(T, String), CheckFailure>;

/// Layers that the caller gives another severity.
#[derive(Clone, Debug, Default)]
pub(super) struct Weights {
    pub(crate) required: Vec<String>,
    pub(crate) advisory: Vec<String>,
}

impl Weights {
    /// Parses a list of layers. The error is the first word that is no layer, with the nearest layer.
    pub(crate) fn layers(
        text: Option<&str>,
    ) -> Result<Vec<String>, (String, Option<&'static str>)> {
        let parts = text
            .unwrap_or_default()
            .split(|c: char| c.is_whitespace() || c == ',');
        let layers: Vec<String> = parts
            .filter(|part| !part.is_empty())
            .map(str::to_owned)
            .collect();
        match layers.iter().find(|part| !LAYERS.contains(&part.as_str())) {
            Some(part) => Err((one_line(part, 80), nearest(part, LAYERS))),
            None => Ok(layers),
        }
    }

    fn severity(&self, layer: &str, own: Severity) -> Severity {
        let holds = |layers: &[String]| {
            layers.iter().any(|known| {
                layer == known
                    || layer
                        .strip_prefix(known.as_str())
                        .is_some_and(|rest| rest.starts_with('-'))
            })
        };
        // A layer in both lists is required: failing too often is safer than missing a broken builder.
        if holds(&self.required) {
            Severity::Required
        } else if holds(&self.advisory) {
            Severity::Advisory
        } else {
            own
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct CheckList {
    weights: Weights,
    deadline: Instant,
    pub(crate) checks: Vec<Check>,
}

impl CheckList {
    pub(crate) fn new(weights: Weights, deadline: Instant) -> Self {
        Self {
            weights,
            deadline,
            checks: Vec::new(),
        }
    }

    /// An empty list with the same rules, for checks that run beside these.
    pub(crate) fn beside(&self) -> Self {
        Self {
            checks: Vec::new(),
            ..self.clone()
        }
    }

    /// Runs a check, which is given its time limit, and cuts it off if it does not end by then.
    pub(crate) async fn check<T, F: Future<Output = Found<T>>>(
        &mut self,
        spec: CheckSpec,
        run: impl FnOnce(Duration) -> F,
    ) -> Option<T> {
        let limit = spec
            .limit
            // The deadline of all checks cuts the last ones short, so that the canary itself ends in time.
            .min(self.deadline.saturating_duration_since(Instant::now()));
        let begun = Instant::now();
        if limit.is_zero() {
            let broken = CheckFailure::new(
                "the time for all checks was over before it began",
                "Look at the checks before it, or raise the input `timeout`.",
            );
            self.put(spec, limit, Duration::ZERO, Err(broken));
            return None;
        }
        let found = timeout(limit + GRACE, run(limit))
            .await
            .unwrap_or_else(|_| {
                let text = format!("it did not end within {}", duration(limit));
                Err(CheckFailure::new(
                    text,
                    "Something behind it hangs; look at the runner's processes and mounts.",
                ))
            });
        let (value, result) = match found {
            Ok((value, text)) => (Some(value), Ok(text)),
            Err(broken) => (None, Err(broken)),
        };
        self.put(spec, limit, begun.elapsed(), result);
        value
    }

    /// Records a check that ran as part of another.
    pub(crate) fn put(
        &mut self,
        spec: CheckSpec,
        limit: Duration,
        took: Duration,
        result: Result<String, CheckFailure>,
    ) {
        let (layer, verdict, text) = match result {
            Ok(text) => (spec.layer, Verdict::Passed, text),
            Err(broken) => (
                broken.layer.unwrap_or(spec.layer),
                Verdict::Failed { hint: broken.hint },
                broken.text,
            ),
        };
        let severity = self.weights.severity(layer, spec.severity);
        self.checks.push(Check {
            name: spec.name.to_owned(),
            layer,
            severity,
            limit,
            took,
            verdict,
            text: one_line(&text, 600),
        });
    }

    /// Records that there was nothing to check, and why.
    pub(crate) fn skip(&mut self, spec: CheckSpec, why: impl Into<String>) {
        let severity = self.weights.severity(spec.layer, spec.severity);
        self.checks.push(Check {
            name: spec.name.to_owned(),
            layer: spec.layer,
            severity,
            limit: spec.limit,
            took: Duration::ZERO,
            verdict: Verdict::Skipped,
            text: why.into(),
        });
    }

    /// Skips all of these for one reason.
    pub(crate) fn skip_all(&mut self, specs: &[CheckSpec], why: &str) {
        specs.iter().for_each(|spec| self.skip(*spec, why));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IT: CheckSpec = CheckSpec::required("it", "cache-nar", 1);

    fn list(left: Duration) -> CheckList {
        CheckList::new(Weights::default(), Instant::now() + left)
    }

    #[tokio::test]
    async fn a_check_that_hangs_is_cut_off_and_the_whole_too() {
        let mut list = list(Duration::from_millis(500));
        let hanging = CheckSpec {
            limit: Duration::from_millis(40),
            ..IT
        };
        for _ in 0..3 {
            let value: Option<()> = list.check(hanging, |_| std::future::pending()).await;
            assert!(value.is_none());
        }
        let texts: Vec<&str> = list
            .checks
            .iter()
            .map(|check| check.text.as_str())
            .collect();
        assert_eq!(texts[0], "it did not end within 0.0 s");
        assert_eq!(texts[2], "the time for all checks was over before it began");
    }

    #[tokio::test]
    async fn a_fault_may_lie_at_another_layer_and_the_caller_weighs_it() {
        let mut list = list(Duration::from_secs(2));
        list.weights = Weights {
            required: vec!["disk".into()],
            advisory: vec!["cache".into()],
        };
        let run = |layer: Option<&'static str>| async move {
            Found::<()>::Err(CheckFailure {
                layer,
                text: String::new(),
                hint: String::new(),
            })
        };
        list.check(IT, |_| run(None)).await;
        list.check(IT, |_| run(Some("disk"))).await;
        let found: Vec<_> = list
            .checks
            .iter()
            .map(|check| (check.layer, check.severity))
            .collect();
        assert_eq!(
            found,
            [
                ("cache-nar", Severity::Advisory),
                ("disk", Severity::Required)
            ]
        );
        assert_eq!(
            Weights::layers(Some("cahce")),
            Err(("cahce".into(), Some("cache")))
        );
    }
}
