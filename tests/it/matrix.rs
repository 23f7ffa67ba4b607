//! The matrix's own rules: what counts as reported, and that its sample has each pair of values. Its runs need root and
//! real Nix: `just matrix --sample`.

#[path = "../matrix/cells.rs"]
#[expect(dead_code, reason = "the matrix itself uses more of it")]
mod cells;
#[path = "../matrix/verdict.rs"]
#[expect(dead_code, reason = "the matrix itself uses more of it")]
mod verdict;

use std::collections::BTreeSet;
use std::fs;

use verdict::Verdict;

const PATH: &str = "/nix/store/w3zwdqlqyrigvvrvnksd5w4qkn3nyjan-warm-4e07408562be";

/// The verdict on a run with one job, which has the results `PATH` and `extra`, and lacks what `missing` says.
fn judge(missing: &str, log: &str, summary: &str) -> Verdict {
    let folder = tempfile::tempdir().unwrap();
    let job = folder.path().join("a");
    fs::create_dir(&job).unwrap();
    for (name, text) in [
        ("expected", PATH),
        ("missing", missing),
        ("log", log),
        ("STEP_SUMMARY", summary),
        ("exit", "0\n"),
    ] {
        fs::write(job.join(name), text).unwrap();
    }
    fs::write(folder.path().join("done"), "judged\n").unwrap();
    Verdict::read(folder.path(), Ok(()))
}

#[test]
fn a_path_that_is_missing_has_to_be_named_and_counted() {
    let none = "flywheel: 1 built, 0 published, 0 verified, 0 lost";
    let one = "flywheel: 1 built, 0 published, 0 verified, 1 lost";
    let named = format!("::warning title=lost::{PATH}: 500, five times");
    let holds = |log: &str, summary: &str| judge(PATH, log, summary).holds();

    assert!(judge("", none, "").holds(), "nothing is missing");
    assert!(!holds(none, ""), "silently");
    assert!(!holds(one, ""), "counted without a name");
    assert!(
        !holds(&format!("{named}\n{none}"), ""),
        "named without a count"
    );
    assert!(holds(&format!("{named}\n{one}"), ""));
    assert!(
        holds(&format!("warning: lost: {PATH}: 500\n{one}"), ""),
        "beyond GitHub's limit"
    );
    assert!(holds(one, &format!("**Lost**\n\n- `{PATH}`: 500\n")));
    assert!(!holds(
        one,
        &format!("**Published, although a rule warns**\n\n- `{PATH}`: x\n")
    ));
    let ambiguous = "flywheel: 1 built, 0 published, 0 verified, 1 ambiguous";
    assert!(holds(
        ambiguous,
        &format!("**Ambiguous, not published**\n\n- `{PATH}`: x\n")
    ));
    let unwatched = "flywheel: 0 built, 0 published, 0 verified, not watched";
    assert!(holds(unwatched, ""), "the store as a whole");
}

#[test]
fn what_another_path_is_lost_for_is_not_lost_itself() {
    let other = "/nix/store/0hhb8sczdrddv6lwj11q7n4c0k7v46qw-bb";
    let one = "flywheel: 1 built, 0 published, 0 verified, 1 lost";
    let log = format!("::warning title=lost::{other}: refers to `{PATH}`\n{one}");
    assert!(!judge(PATH, &log, "").holds());
    assert_eq!(judge(PATH, &log, "").jobs[0].silent, [PATH]);
}

#[test]
fn what_the_command_prints_is_no_report() {
    let one = "flywheel: 1 built, 0 published, 0 verified, 1 lost";
    let printed = format!("warning: lost: {PATH}");
    let log = format!("::stop-commands::abc\n{printed}\n::abc::\n{one}");
    assert!(!judge(PATH, &log, "").holds());
}

#[test]
fn a_path_that_is_called_lost_and_is_there_is_counted() {
    let log = format!(
        "::warning title=lost::{PATH}: x\nflywheel: 1 built, 0 published, 0 verified, 1 lost"
    );
    let verdict = judge("", &log, "");
    assert!(verdict.holds());
    assert_eq!(verdict.jobs[0].overclaimed, [PATH]);
}

#[test]
fn what_another_job_forged_may_not_be_published() {
    let folder = tempfile::tempdir().unwrap();
    let job = folder.path().join("a");
    fs::create_dir(&job).unwrap();
    fs::write(folder.path().join("done"), "judged\n").unwrap();
    fs::write(job.join("exit"), "0\n").unwrap();
    let line = "flywheel: 1 built, 1 published, 1 verified, 1 ambiguous";
    let named = format!("::warning title=ambiguous::{PATH}: the store is shared\n{line}\n");
    fs::write(job.join("log"), named).unwrap();
    fs::write(job.join("foreign"), format!("import {PATH}\n")).unwrap();
    let verdict = Verdict::read(folder.path(), Ok(()));
    assert!(verdict.holds());
    let reason = verdict.jobs[0].foreign[0].reason.as_deref();
    assert_eq!(reason, Some("ambiguous: the store is shared"));

    fs::write(job.join("forged"), format!("{PATH}\n")).unwrap();
    let verdict = Verdict::read(folder.path(), Ok(()));
    assert!(!verdict.holds() && verdict.jobs[0].foreign[0].is_published);
}

#[test]
fn a_run_without_an_end_has_no_good_verdict() {
    let folder = tempfile::tempdir().unwrap();
    assert!(!Verdict::read(folder.path(), Ok(())).holds());
    assert!(!Verdict::read(folder.path(), Err("exit status: 1".into())).holds());
    assert!(!judge("", "no closing line", "").holds());
}

#[test]
fn each_pair_of_values_meets_in_the_sample() {
    let sample = cells::sample();
    let pairs = |cells: &[cells::Cell]| -> BTreeSet<(&'static str, &'static str)> {
        let of_cell = |cell: &cells::Cell| {
            [
                (cell.version, cell.kind),
                (cell.version, cell.shape),
                (cell.kind, cell.shape),
            ]
        };
        let main = cells
            .iter()
            .filter(|cell| cells::SHAPES.contains(&cell.shape));
        main.flat_map(of_cell).collect()
    };
    assert_eq!(pairs(&sample), pairs(&cells::all()));
    assert!(sample.len() * 2 < cells::all().len());
}
