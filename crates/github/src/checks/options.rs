//! The limits that the Check Runs of a run keep to. Plain data.

use std::time::Duration;

/// The limits. The defaults are GitHub's ("Rate limits for the REST API", 2026: 1,000 requests an hour for a
/// repository's `GITHUB_TOKEN`, 80 content-generating requests a minute and 500 an hour), less a reserve for other
/// users of the token.
#[derive(Clone, Debug)]
pub struct Options {
    /// The aggregate's name.
    pub name: String,
    /// The prefix of our identifiers, so that two jobs of one commit do not take each other's Check Runs.
    pub scope: String,
    /// Up to this many outputs have a Check Run each; of more outputs only those that fail.
    pub alone: usize,
    /// How many outputs share a Check Run.
    pub shared: usize,
    /// How many failures have a Check Run each beside the shared ones.
    pub failures: usize,
    /// How many writes a minute may have.
    pub per_minute: usize,
    /// How many writes the whole run may have. The last ones are kept for Check Runs that must not stay open.
    pub in_all: usize,
    /// How many requests may be under way at once.
    pub at_once: usize,
    /// The length of a minute, which tests shorten.
    pub minute: Duration,
    /// The first wait after a request that failed; it doubles up to sixteen times this.
    pub base: Duration,
    /// How long one request may take.
    pub request: Duration,
    /// How long GitHub may leave every request without an answer. After that it is asked no more, but once at the end.
    pub patience: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: "flake checks".to_owned(),
            scope: "flywheel/flake-checks".to_owned(),
            alone: 150,
            shared: 100,
            failures: 100,
            per_minute: 75,
            in_all: 450,
            at_once: 6,
            minute: Duration::from_secs(60),
            base: Duration::from_secs(1),
            request: Duration::from_secs(15),
            patience: Duration::from_secs(30),
        }
    }
}
