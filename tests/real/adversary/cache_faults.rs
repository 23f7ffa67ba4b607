//! A cache that fails in one of the ways of networks and servers, at a random request of a job that reads from it and
//! publishes to it. The job ends as its command did, in bounded time, and says what the cache does not have.

use std::time::{Duration, Instant};

use super::{Attack, Trial};
use crate::faults::{Fault, Front, Plan, When};
use crate::nix_job::{Job, left_nothing, output};
use crate::world::cache::Cache;
use crate::world::runner::Report;

/// What building the flake's default output adds.
const ADDED: [&str; 4] = ["app", "base", "bin", "lib"];
/// What a cache that hangs may cost, and the job itself on a busy machine.
const LIMIT: Duration = Duration::from_secs(35 + 15);
/// The same where the cache answers, always with an error: it is tried for a minute.
const LIMIT_WITH_ANSWERS: Duration = Duration::from_secs(60 + 15);

/// The requests of a job, by how they begin.
const PHASES: [&str; 6] = [
    "",
    "GET /main/nix-cache-info",
    "GET /main/",
    "POST /_api/v1/get-missing-paths",
    "PUT /_api/v1/upload-path",
    "GET /_api/",
];

fn fault(trial: &mut Trial) -> Fault {
    let quick = [
        Fault::Close,
        Fault::Status(500),
        Fault::Status(503),
        Fault::Status(401),
        Fault::Html(413),
        Fault::Html(502),
        Fault::RetryAfter(1),
        Fault::CutAnswer,
        Fault::CutBody,
        Fault::Slow(Duration::from_millis(700)),
        Fault::HoldAnswer(Duration::from_millis(700)),
    ];
    // A trial with a hang takes as long as all others together.
    if trial.random.u8(..) < 16 {
        Fault::Hang
    } else {
        trial.pick(&quick).clone()
    }
}

fn front(trial: &mut Trial, cache: &Cache) -> (Front, String, Duration) {
    let mut plan = Plan::new();
    let (mut words, mut limit) = (Vec::new(), LIMIT);
    for _ in 0..trial.random.usize(1..=3) {
        let (begins, fault) = (*trial.pick(&PHASES), fault(trial));
        let when = match trial.random.u8(0..4) {
            0 => When::Always,
            1 => When::First(trial.random.u32(1..4)),
            _ => When::Every(trial.random.u32(2..5)),
        };
        let answers = matches!(
            fault,
            Fault::Status(_) | Fault::Html(_) | Fault::RetryAfter(_)
        );
        if answers && when == When::Always {
            limit = LIMIT_WITH_ANSWERS;
        }
        words.push(format!("{fault:?} {when:?} of `{begins}`"));
        plan = plan.fault(begins, when, fault);
    }
    (plan.before(cache.address()), words.join(", "), limit)
}

#[test]
fn a_cache_that_fails_at_random_fails_and_stalls_no_job() {
    let mut attack = Attack::begin("cache faults");
    while let Some(mut trial) = attack.next() {
        let cache = Cache::start(&[]);
        let (front, words, limit) = front(&mut trial, &cache);
        let job = Job::new(&cache, "nix build --no-link path:.#default")
            .with_env("ATTIC_SERVER", &front.url());
        let begun = Instant::now();
        let report = job.step.run();
        let what = format!("{}: {words}\n{}", trial.seed, report.log);
        assert!(begun.elapsed() < limit, "{:?}: {what}", begun.elapsed());
        attack.count(check(&report, &cache, &what));
    }
    attack.report();
}

/// Holds a job against its promises, and says in a word what became of it.
fn check(report: &Report, cache: &Cache, what: &str) -> &'static str {
    assert_eq!(report.code, 0, "{what}");
    left_nothing(report);
    let written = report.files.values().chain([&report.log]);
    for text in written {
        assert!(
            !text.contains(&cache.token),
            "the token was written: {what}"
        );
    }
    let served = cache.names();
    let missing = ADDED
        .iter()
        .filter(|name| !served.iter().any(|one| one == *name));
    let missing = missing.count();
    let lost: usize = output(report, "lost").parse().unwrap();
    assert!(lost >= missing, "{lost} lost, {missing} missing: {what}");
    match (missing, lost) {
        (0, 0) => "whole",
        (0, _) => "called lost and there",
        _ => "lost and said",
    }
}
