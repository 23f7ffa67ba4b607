//! The step outputs: what each verb sets, with its meaning, in one place; and the values of a job.

use serde::Serialize;

use crate::report::job::{JobResult, Outcome};

/// A step output.
#[derive(Debug, Serialize)]
pub(crate) struct Output {
    pub(crate) name: &'static str,
    pub(crate) about: String,
}

/// The outputs that a verb sets, in the order in which pages and actions name them; none for a verb that is
/// not an action.
pub(crate) fn of_verb(verb: &str) -> Vec<Output> {
    match verb {
        "nix-job" => list(&JOB),
        "flake-checks" => list(&[&FLAKE_CHECKS[..], &JOB].concat()),
        // It has no command of its own, so nothing of one.
        "watch-store" => {
            let of_command = |name| {
                [
                    "exit-code",
                    "bootstrap-seconds",
                    "command-seconds",
                    "peak-memory-mib",
                ]
                .contains(&name)
            };
            let outputs = list(&JOB).into_iter();
            outputs.filter(|output| !of_command(output.name)).collect()
        }
        "validate-builders" => list(&VALIDATE_BUILDERS),
        "cache-contract" => list(&CACHE_CONTRACT),
        "setup" => list(&SETUP),
        _ => Vec::new(),
    }
}

fn list(outputs: &[(&'static str, &str)]) -> Vec<Output> {
    let words = Outcome::ALL.map(|outcome| format!("`{}`", outcome.as_str()));
    let outcomes = words.join(", ");
    let outputs = outputs.iter();
    outputs
        .map(|&(name, about)| Output {
            name,
            about: about.replace("{outcomes}", &outcomes),
        })
        .collect()
}

/// What a job sets at its end; `{outcomes}` stands for the words of `Outcome`.
const JOB: [(&str, &str); 20] = [
    ("outcome", "What became of the job: {outcomes}."),
    ("exit-code", "The exit code of the step."),
    ("published", "How many store paths were published."),
    (
        "verified",
        "How many of the published and repaired store paths the cache was then seen to serve, with the right hash and a good signature.",
    ),
    (
        "verification",
        "Of how many of them the bodies were read, too, in words, with the seed of the sample if one was drawn.",
    ),
    (
        "repaired",
        "How many store paths the cache had damaged; they were sent anew.",
    ),
    (
        "lost",
        "How many store paths the cache does not serve although it should.",
    ),
    (
        "ambiguous",
        "How many store paths are not published because another job can have added or forged them.",
    ),
    (
        "withheld",
        "How many store paths the publication policy keeps back.",
    ),
    (
        "not-watched",
        "How many stores of the job could not be watched, so that nothing in them was published.",
    ),
    ("substituted", "How many store paths came from a cache."),
    ("built", "How many store paths were built by this job."),
    (
        "bootstrap-seconds",
        "How long it took until Nix and the cache were ready.",
    ),
    (
        "command-seconds",
        "How long the command ran, or evaluation and builds took.",
    ),
    (
        "publish-seconds",
        "How long publication and verification took after that.",
    ),
    (
        "peak-memory-mib",
        "The most memory that the job's processes held at once, in MiB; empty where the kernel does not count it.",
    ),
    (
        "cache-state",
        "What became of the cache: `attached`, `off`, `not-named`, or `left-out-` and the layer at which the probe failed.",
    ),
    (
        "trust",
        "The verdict of the trust gate: `may-publish` or `read-only`.",
    ),
    (
        "attic",
        "What the plan sends to the cache: `all` or `none`.",
    ),
    (
        "flakehub",
        "What a workflow with FlakeHub's action should publish: `rolling`, `versioned` or `none`.",
    ),
];

const FLAKE_CHECKS: [(&str, &str); 8] = [
    (
        "outputs",
        "How many outputs the flake has for the systems that are checked.",
    ),
    (
        "succeeded",
        "How many of them were built, or evaluated where nothing is built.",
    ),
    ("failed", "How many failed."),
    (
        "cached",
        "How many were in the cache or in the store already.",
    ),
    ("cancelled", "How many had no verdict when the run ended."),
    (
        "remembered",
        "How many were not evaluated, because the evaluation memory had them.",
    ),
    ("evaluation-seconds", "How long the evaluation took."),
    ("build-seconds", "How long builds went on after it."),
];

const VALIDATE_BUILDERS: [(&str, &str); 3] = [
    (
        "healthy",
        "Whether every required check holds, `true` or `false`.",
    ),
    (
        "broken-layer",
        "The layer to look at first; empty if all hold. A broken cache is named here too, and blocks nothing.",
    ),
    (
        "cold-start-seconds",
        "From the start to the end of the first build.",
    ),
];

const CACHE_CONTRACT: [(&str, &str); 4] = [
    ("holds", "Whether the contract holds, `true` or `false`."),
    ("mode", "The mode that the endpoints amount to."),
    (
        "uploads",
        "Whether the build may upload results, `true` or `false`.",
    ),
    (
        "bazelrc",
        "The file with the lines for a `.bazelrc`, if an input names one and it was written.",
    ),
];

const SETUP: [(&str, &str); 6] = [
    (
        "trust",
        "The verdict of the trust gate: `may-publish` or `read-only`.",
    ),
    (
        "publishes",
        "Whether a job with these inputs would publish, `true` or `false`.",
    ),
    ("reason", "Why, in one line."),
    (
        "attic",
        "What the plan sends to the cache: `all` or `none`.",
    ),
    (
        "flakehub",
        "What a workflow with FlakeHub's action should publish: `rolling`, `versioned` or `none`.",
    ),
    ("version", "The version of flywheel."),
];

/// The outputs of a job with their values.
pub(crate) fn values(job: &JobResult) -> Vec<(&'static str, String)> {
    let publication = job.publication.clone().unwrap_or_default();
    let seconds = |time: std::time::Duration| format!("{:.3}", time.as_secs_f64());
    vec![
        ("outcome", job.outcome.as_str().to_owned()),
        ("exit-code", job.exit_code.to_string()),
        ("published", publication.published.to_string()),
        ("verified", publication.verified.to_string()),
        ("verification", publication.coverage.sentence()),
        ("repaired", publication.repaired.len().to_string()),
        ("lost", publication.lost.len().to_string()),
        ("ambiguous", publication.ambiguous.len().to_string()),
        ("withheld", publication.withheld.len().to_string()),
        ("not-watched", job.not_watched.len().to_string()),
        ("substituted", job.substituted.to_string()),
        ("built", job.built.to_string()),
        ("bootstrap-seconds", seconds(job.bootstrap)),
        ("command-seconds", seconds(job.command)),
        ("publish-seconds", seconds(job.publish)),
        (
            "peak-memory-mib",
            job.peak
                .map(|peak| peak.div_ceil(1 << 20).to_string())
                .unwrap_or_default(),
        ),
        ("cache-state", job.cache_state.as_str()),
        ("trust", job.trust.verdict.to_owned()),
        ("attic", job.trust.attic.to_owned()),
        ("flakehub", job.trust.flakehub.to_owned()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::job::tests::example;

    #[test]
    fn each_value_has_a_meaning() {
        let values = values(&example());
        let set: Vec<&str> = values.iter().map(|(name, _)| *name).collect();
        let named: Vec<&str> = JOB.iter().map(|(name, _)| *name).collect();
        assert_eq!(set, named);
    }

    #[test]
    fn outputs_of_a_good_job() {
        let outputs = values(&example());
        let of = |name: &str| {
            outputs
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.as_str())
        };
        assert_eq!(of("outcome"), Some("success"));
        assert_eq!(of("command-seconds"), Some("2.000"));
        assert_eq!(of("peak-memory-mib"), Some("64"));
        assert_eq!(of("cache-state"), Some("attached"));
    }
}
