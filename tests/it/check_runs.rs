//! The Check Runs of `flake-checks` against a GitHub that refuses what the real one refuses.

use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use flywheel_core::location::SourceLocation;
use flywheel_core::progress::{Progress, Sink};
use flywheel_core::secret::Secret;
use flywheel_github::check_run::{CheckRuns, Commit, Conclusion as Ended};
use flywheel_github::checks::board::{Aggregate, CheckRunReporter, ReportStats};
use flywheel_github::checks::options::Options;
use flywheel_github::checks::{Cause, Output, OutputState, Verdict};
use flywheel_sys::http::{Clients, Roots};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::world::PLANTED_TOKEN;
use crate::world::github::{GitHub, Manners};

const SHA: &str = "0123456789abcdef0123456789abcdef01234567";
/// What these tests use in the place of a minute.
const MINUTE: Duration = Duration::from_millis(400);

fn manners() -> Manners {
    Manners {
        token: PLANTED_TOKEN.to_owned(),
        ..Manners::default()
    }
}

fn options() -> Options {
    Options {
        minute: MINUTE,
        base: Duration::from_millis(5),
        request: Duration::from_secs(5),
        ..Options::default()
    }
}

fn board(github: &GitHub, options: Options) -> CheckRunReporter {
    board_at(&github.url, options, Sink::silent())
}

fn board_at(url: &str, options: Options, sink: Sink) -> CheckRunReporter {
    let commit = Commit {
        api: url.parse().unwrap(),
        repository: "octo-org/app".into(),
        sha: SHA.into(),
    };
    let client = Clients::new(&Roots::default()).unwrap().api;
    let runs =
        CheckRuns::for_commit(&commit, &Secret::new(PLANTED_TOKEN).unwrap(), client).unwrap();
    CheckRunReporter::start(runs, options, sink)
}

/// A sink, and the warnings that it was sent.
fn warnings() -> (Sink, Arc<Mutex<Vec<String>>>) {
    let warnings = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&warnings);
    let sink = Sink::new(move |event| {
        if let Progress::Degraded { text, .. } = event {
            kept.lock().unwrap().push(text);
        }
    });
    (sink, warnings)
}

fn output(n: usize) -> Output {
    Output {
        label: format!("x86_64-linux.{n}"),
        attribute: format!("checks.x86_64-linux.{n}"),
        system: None,
    }
}

fn ended(cause: Cause) -> OutputState {
    OutputState::Finished(Box::new(Verdict {
        cause,
        derivation: None,
        out_paths: Vec::new(),
        log_tail: vec!["\u{1b}[31m```</details>@everyone ::error::x".into(); 60],
        started_at_ms: 1_790_000_000_000,
        took: Duration::from_secs(2),
        reproduce: "nix build .#x".into(),
    }))
}

fn aggregate(conclusion: Ended) -> Aggregate {
    Aggregate {
        conclusion,
        title: "The whole".into(),
        summary: "x".repeat(70_000),
    }
}

async fn close(board: CheckRunReporter) -> ReportStats {
    board
        .close(
            aggregate(Ended::Success),
            Instant::now() + Duration::from_secs(30),
            &CancellationToken::new(),
        )
        .await
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(20), "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn each_output_goes_its_way_and_ends() {
    let github = GitHub::with(manners());
    let board = board(&github, options());
    board.announce((0..3).map(output).collect());
    until("announced", || github.names().len() == 4).await;
    board.update("x86_64-linux.0", OutputState::Building);
    until("begun", || {
        github.run("x86_64-linux.0")["status"] == "in_progress"
    })
    .await;
    let location = Some(SourceLocation {
        file: "nix/flake.nix".into(),
        line: 7,
        column: Some(3),
    });
    board.update("x86_64-linux.0", ended(Cause::Built));
    board.update("x86_64-linux.0", OutputState::Building);
    let wrong = Cause::HashMismatch {
        specified: "sha256-A".into(),
        got: "sha256-B".into(),
        location,
    };
    board.update("x86_64-linux.1", ended(wrong));
    board.update("x86_64-linux.2", ended(Cause::AlreadyCached));
    board.update("nobody", OutputState::Building);
    let told = close(board).await;
    assert_eq!((told.shown, told.missing.len()), (4, 0));
    let conclusion = |n: usize| github.run(&format!("x86_64-linux.{n}"))["conclusion"].clone();
    assert_eq!(
        [conclusion(0), conclusion(1), conclusion(2)],
        ["success", "failure", "neutral"]
    );
    let mark = &github.run("x86_64-linux.1")["output"]["annotations"];
    assert_eq!(mark.as_array().unwrap().len(), 1, "{mark}");
    assert_eq!(
        (mark[0]["path"].as_str(), mark[0]["start_line"].as_u64()),
        (Some("nix/flake.nix"), Some(7))
    );
    assert_eq!(
        mark[0]["message"],
        "The hash is wrong. Replace `sha256-A` by `sha256-B`."
    );
    assert_eq!(
        github.history("x86_64-linux.0"),
        ["queued", "in_progress", "completed"]
    );
    assert_eq!(github.history("flake checks"), ["in_progress", "completed"]);
    assert_eq!(github.run("flake checks")["conclusion"], "success");
    assert!(
        github
            .log()
            .iter()
            .all(|(_, status)| (200..300).contains(status)),
        "{:?}",
        github.log()
    );
}

#[tokio::test]
async fn what_happens_while_github_is_away_costs_one_request() {
    let github = GitHub::with(Manners {
        hangs: true,
        ..manners()
    });
    let board = board(&github, options());
    board.announce(vec![output(0)]);
    for state in [
        OutputState::Evaluating,
        OutputState::Building,
        ended(Cause::Build),
    ] {
        board.update("x86_64-linux.0", state);
    }
    github.behave(|manners| manners.hangs = false);
    close(board).await;
    assert_eq!(github.history("x86_64-linux.0"), ["completed"]);
}

/// The output keeps to GitHub's own limits, and every verdict stands in a Check Run.
#[tokio::test]
async fn two_thousand_outputs_keep_to_the_limits_and_none_is_lost() {
    // 80 writes a minute, as GitHub allows, and a secondary limit for no reason now and then.
    let limits = Some((40, 429, "Retry-After: 0\r\n"));
    let github = GitHub::with(Manners {
        most: Some((80, MINUTE)),
        limits,
        ..manners()
    });
    let board = board(&github, options());
    board.announce((0..2000).map(output).collect());
    for n in 0..2000 {
        board.update(&format!("x86_64-linux.{n}"), OutputState::Building);
        let cause = if n % 100 == 7 {
            Cause::Build
        } else {
            Cause::Built
        };
        board.update(&format!("x86_64-linux.{n}"), ended(cause));
    }
    let told = close(board).await;
    assert_eq!(told.missing, Vec::<String>::new());
    assert_eq!(github.open(), Vec::<String>::new());
    // The aggregate, a failure each, and twenty for all.
    assert_eq!(
        (told.shown, github.names().len()),
        (41, 41),
        "{:?}",
        github.names()
    );
    assert!(
        told.requests < 200 && github.writes() < 100,
        "{} {}",
        told.requests,
        github.writes()
    );
    let shared: Vec<_> = github
        .runs()
        .into_iter()
        .filter(|run| run["name"].as_str().unwrap().contains('–'))
        .collect();
    let texts: String = shared
        .iter()
        .map(|run| run["output"]["summary"].as_str().unwrap())
        .collect();
    for n in 0..2000 {
        assert!(texts.contains(&format!("`x86_64-linux.{n}: ")), "{n}");
    }
    assert!(shared.iter().all(|run| run["conclusion"] == "failure"));
    assert_eq!(github.run("x86_64-linux.107")["conclusion"], "failure");
}

#[tokio::test]
async fn limits_and_faults_lose_nothing_and_leave_nothing_twice() {
    let reset = "x-ratelimit-remaining: 0\r\nx-ratelimit-reset: 1\r\n";
    for (name, faults) in [
        (
            "403",
            Manners {
                limits: Some((3, 403, "Retry-After: 0\r\n")),
                ..manners()
            },
        ),
        (
            "primary",
            Manners {
                limits: Some((5, 403, reset)),
                ..manners()
            },
        ),
        (
            "502",
            Manners {
                fails: Some(3),
                ..manners()
            },
        ),
        (
            "cut after the write",
            Manners {
                cuts: Some(3),
                ..manners()
            },
        ),
    ] {
        let github = GitHub::with(faults);
        let board = board(&github, options());
        board.announce((0..12).map(output).collect());
        for n in 0..12 {
            board.update(&format!("x86_64-linux.{n}"), ended(Cause::Built));
        }
        let told = close(board).await;
        assert_eq!(
            (told.shown, told.missing.len(), github.names().len()),
            (13, 0, 13),
            "{name}: {:?}",
            github.names()
        );
        assert_eq!(github.open(), Vec::<String>::new(), "{name}");
    }
}

#[tokio::test]
async fn a_cancel_leaves_nothing_open() {
    let github = GitHub::with(manners());
    let board = board(&github, options());
    board.announce((0..40).map(output).collect());
    until("announced", || github.names().len() == 41).await;
    for n in 0..20 {
        board.update(&format!("x86_64-linux.{n}"), OutputState::Building);
    }
    board.update("x86_64-linux.0", ended(Cause::Built));
    let told = board
        .close(
            aggregate(Ended::Cancelled),
            Instant::now() + Duration::from_secs(4),
            &CancellationToken::new(),
        )
        .await;
    assert_eq!(
        (told.missing.len(), github.open().len()),
        (0, 0),
        "{told:?}"
    );
    assert_eq!(github.run("x86_64-linux.0")["conclusion"], "success");
    assert_eq!(github.run("x86_64-linux.39")["conclusion"], "cancelled");
    assert_eq!(github.run("flake checks")["conclusion"], "cancelled");
}

#[tokio::test]
async fn a_second_attempt_finds_the_runs_of_the_first() {
    let github = GitHub::with(manners());
    for _ in 0..2 {
        let board = board(&github, options());
        // More than fit on one page of GitHub's answer.
        board.announce((0..130).map(output).collect());
        for n in 0..130 {
            board.update(&format!("x86_64-linux.{n}"), ended(Cause::Built));
        }
        assert_eq!(close(board).await.shown, 131);
    }
    assert_eq!(github.names().len(), 131);
}

#[tokio::test]
async fn a_token_that_may_not_is_asked_once() {
    let github = GitHub::with(Manners {
        refuses: true,
        ..manners()
    });
    let board = board(
        &github,
        Options {
            at_once: 1,
            ..options()
        },
    );
    board.announce((0..50).map(output).collect());
    let began = Instant::now();
    let told = close(board).await;
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!((told.shown, told.missing.len()), (0, 51));
    assert_eq!(
        github.log().len(),
        2,
        "one look and one try: {:?}",
        github.log()
    );
}

#[tokio::test]
async fn a_github_that_never_answers_holds_nobody_up() {
    let github = GitHub::with(Manners {
        hangs: true,
        ..manners()
    });
    let board = board(&github, options());
    board.announce((0..5).map(output).collect());
    let began = Instant::now();
    let told = board
        .close(
            aggregate(Ended::Success),
            began + Duration::from_millis(300),
            &CancellationToken::new(),
        )
        .await;
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!((told.shown, told.missing.len()), (0, 6));
}

/// A board whose first request GitHub has refused for ten minutes.
async fn board_that_is_held_back() -> (GitHub, CheckRunReporter) {
    let github = GitHub::with(Manners {
        limits: Some((1, 403, "Retry-After: 600\r\n")),
        ..manners()
    });
    let board = board(&github, options());
    board.announce(vec![output(0)]);
    until("refused", || {
        github.log().iter().any(|(_, status)| *status == 403)
    })
    .await;
    (github, board)
}

#[tokio::test]
async fn a_request_to_stop_while_github_wants_to_be_left_alone_ends_it() {
    let (_github, board) = board_that_is_held_back().await;
    let (began, stop) = (Instant::now(), CancellationToken::new());
    stop.cancel();
    let told = board
        .close(
            aggregate(Ended::Success),
            began + Duration::from_secs(300),
            &stop,
        )
        .await;
    assert!(
        began.elapsed() < Duration::from_secs(6),
        "{:?}",
        began.elapsed()
    );
    assert_eq!((told.shown, told.missing.len()), (0, 2));
}

/// Nothing is shown, nobody waits for long, few requests are sent, and there is one warning.
async fn is_given_up(kind: &str, url: &str, said: &str) {
    let (sink, warnings) = warnings();
    let patience = Duration::from_millis(600);
    let board = board_at(
        url,
        Options {
            patience,
            request: patience,
            ..options()
        },
        sink,
    );
    board.announce((0..50).map(output).collect());
    let began = Instant::now();
    while warnings.lock().unwrap().is_empty() && began.elapsed() < 2 * patience {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // The run goes on for long after that.
    for n in 0..50 {
        board.update(&format!("x86_64-linux.{n}"), ended(Cause::Built));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let closing = Instant::now();
    let stats = close(board).await;
    assert!(
        closing.elapsed() < 3 * patience,
        "{kind}: {:?}",
        closing.elapsed()
    );
    assert_eq!((stats.shown, stats.missing.len()), (0, 51), "{kind}");
    assert!(
        stats.requests <= 40 && stats.is_explained,
        "{kind}: {stats:?}"
    );
    let warnings = warnings.lock().unwrap();
    assert!(
        warnings.len() == 1 && warnings[0].contains(said),
        "{kind}: {warnings:?}"
    );
}

#[tokio::test]
async fn a_github_that_is_away_is_given_up_and_that_is_said_once() {
    let away = "GitHub has not answered for";
    let closed = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    is_given_up("refused", &format!("http://{closed}"), away).await;
    // The kernel takes the connection, and nobody answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("http://{}", silent.local_addr().unwrap());
    let hangs = GitHub::with(Manners {
        hangs: true,
        ..manners()
    });
    is_given_up("silent", &hangs.url, away).await;
    is_given_up("silent before HTTP", &silent, away).await;
    let plain = GitHub::with(manners());
    is_given_up("no TLS", &plain.url.replace("http:", "https:"), away).await;
    let failing = GitHub::with(Manners {
        fails: Some(1),
        ..manners()
    });
    is_given_up("502", &failing.url, away).await;
    let stranger = GitHub::with(Manners {
        token: "another".into(),
        ..manners()
    });
    is_given_up("401", &stranger.url, "GitHub answered 401").await;
    let refusing = GitHub::with(Manners {
        refuses: true,
        ..manners()
    });
    is_given_up("403", &refusing.url, "GitHub answered 403").await;
}

/// What GitHub showed as open when it went away must not stay so.
#[tokio::test]
async fn a_github_that_is_back_at_the_end_shows_everything() {
    let github = GitHub::with(manners());
    let (sink, warnings) = warnings();
    let patience = Duration::from_millis(300);
    let board = board_at(
        &github.url,
        Options {
            patience,
            ..options()
        },
        sink,
    );
    board.announce((0..20).map(output).collect());
    until("announced", || github.names().len() == 21).await;
    github.behave(|manners| manners.fails = Some(1));
    board.update("x86_64-linux.0", OutputState::Building);
    until("given up", || !warnings.lock().unwrap().is_empty()).await;
    let requests = github.log().len();
    for n in 0..20 {
        board.update(&format!("x86_64-linux.{n}"), ended(Cause::Built));
    }
    github.behave(|manners| manners.fails = None);
    // A second is long beside the waits between requests, and nothing is sent.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(
        github.log().len(),
        requests,
        "it is asked no more before the end"
    );
    let stats = close(board).await;
    assert_eq!((stats.shown, stats.missing.len()), (21, 0), "{stats:?}");
    assert_eq!(github.open(), Vec::<String>::new());
    assert_eq!(warnings.lock().unwrap().len(), 1);
}

/// Where GitHub wants to be left alone for longer than there is time, nobody waits for the time to pass.
#[tokio::test]
async fn a_rate_limit_that_lasts_for_longer_ends_the_run_at_once() {
    let (_github, board) = board_that_is_held_back().await;
    let began = Instant::now();
    let stats = close(board).await;
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
    assert_eq!((stats.shown, stats.missing.len()), (0, 2));
}
