//! The step outputs of `nix-job`: the one place of their names, and their values.

use crate::report::job::JobResult;

/// Every output of `nix-job`, in the order of `actions/nix-job/action.yml`, with its value.
pub fn values(job: &JobResult) -> Vec<(&'static str, String)> {
    let publication = job.publication.clone().unwrap_or_default();
    let seconds = |time: std::time::Duration| format!("{:.3}", time.as_secs_f64());
    vec![
        ("outcome", job.outcome.as_str().to_owned()),
        ("exit-code", job.exit_code.to_string()),
        ("published", publication.published.to_string()),
        ("verified", publication.verified.to_string()),
        ("lost", publication.lost.len().to_string()),
        ("withheld", publication.withheld.len().to_string()),
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
