//! One table: shapes of builds that ran out of memory, and of builds that only look so.

use super::*;

const fn counter(before: u64, after: u64) -> Counter {
    Counter {
        before: Some(before),
        after: Some(after),
    }
}

const UNKNOWN: Counter = Counter {
    before: None,
    after: None,
};
const EXIT_137: &str = "process \"/bin/sh -c hog\" did not complete successfully: exit code: 137";
const EXIT_101: &str =
    "process \"/bin/sh -c cargo build\" did not complete successfully: exit code: 101";
const EXIT_1: &str = "process \"/bin/sh -c make\" did not complete successfully: exit code: 1";
const NO_MEMORY: &str = "ResourceExhausted: process \"/bin/sh -c hog\" did not complete successfully: cannot allocate memory";
const UNAVAILABLE: &str = "Unavailable: connection error: command [ssh]: exit status 255";

/// Group, whole group, machine.
type Counters = (Counter, Counter, Counter);

/// A guarded runner with version 2 on which this many processes were killed.
const fn v2(killed: u64) -> Counters {
    (
        counter(3, 3 + killed),
        counter(1, if killed == 0 { 1 } else { 2 }),
        counter(40, 40 + killed),
    )
}

/// A runner with version 1, where the machine's count is all there is.
const fn v1(killed: u64) -> Counters {
    (UNKNOWN, UNKNOWN, counter(40, 40 + killed))
}

const NO_COUNTERS: Counters = (UNKNOWN, UNKNOWN, UNKNOWN);

fn judge(succeeded: bool, counters: Counters, connection: Connection, error: &str) -> Verdict {
    Verdict::of(&Evidence {
        succeeded,
        group: counters.0,
        whole_group: counters.1,
        machine: counters.2,
        connection,
        errors: vec![error.to_owned()],
    })
}

/// A build: its shape, whether it succeeded, its counters, its connection, an error of BuildKit's, the verdict.
type Row = (
    &'static str,
    bool,
    Counters,
    Connection,
    &'static str,
    Verdict,
);

const fn group(killed: u64) -> Verdict {
    Verdict::OutOfMemory(Proof::Group(killed))
}

const fn machine(killed: u64) -> Verdict {
    Verdict::OutOfMemory(Proof::Machine(killed))
}

/// What ran out of memory, or may have.
const RAN_OUT: &[Row] = &[
    (
        "the step's own process",
        false,
        v1(1),
        Connection::Held,
        EXIT_137,
        machine(1),
    ),
    (
        "rustc under cargo",
        false,
        v1(1),
        Connection::Held,
        EXIT_101,
        machine(1),
    ),
    (
        "gcc under make",
        false,
        v1(2),
        Connection::Held,
        EXIT_1,
        machine(2),
    ),
    (
        "a pipeline that ends well",
        true,
        v1(1),
        Connection::Held,
        "",
        machine(1),
    ),
    ("`|| true`", true, v1(1), Connection::Held, "", machine(1)),
    (
        "in the background",
        true,
        v1(1),
        Connection::Held,
        "",
        machine(1),
    ),
    (
        "a guarded step, BuildKit 0.13",
        false,
        v2(4),
        Connection::Held,
        EXIT_137,
        group(4),
    ),
    (
        "a guarded step, BuildKit 0.32",
        false,
        v2(1),
        Connection::Held,
        NO_MEMORY,
        group(1),
    ),
    (
        "a guarded pipeline that ends well",
        true,
        v2(1),
        Connection::Held,
        "",
        group(1),
    ),
    (
        "the daemon was the victim",
        false,
        v1(1),
        Connection::Held,
        "error reading from server: EOF",
        machine(1),
    ),
    (
        "ssh was the victim",
        false,
        v1(1),
        Connection::Broken,
        UNAVAILABLE,
        machine(1),
    ),
    (
        "ssh was the victim, outside of the guard",
        false,
        (counter(0, 0), counter(0, 0), counter(0, 1)),
        Connection::Broken,
        UNAVAILABLE,
        machine(1),
    ),
    (
        "only the whole group is counted",
        false,
        (UNKNOWN, counter(0, 1), UNKNOWN),
        Connection::Held,
        EXIT_137,
        group(1),
    ),
    (
        "no counter, the kernel's text",
        false,
        NO_COUNTERS,
        Connection::Held,
        NO_MEMORY,
        Verdict::Suspected("ResourceExhausted"),
    ),
    (
        "no counter, the usual code",
        false,
        NO_COUNTERS,
        Connection::Held,
        EXIT_137,
        Verdict::Suspected("exit code: 137"),
    ),
    (
        "no counter, by the client",
        false,
        NO_COUNTERS,
        Connection::RunnerGone,
        "ERROR: failed to build: failed to solve: ResourceExhausted: process \"x\" did not complete successfully: cannot allocate memory",
        Verdict::Suspected("ResourceExhausted"),
    ),
    (
        "the runner is gone",
        false,
        NO_COUNTERS,
        Connection::RunnerGone,
        UNAVAILABLE,
        Verdict::RunnerLost,
    ),
    (
        "the runner is gone, one reading is all there is",
        false,
        (
            Counter {
                before: Some(0),
                after: None,
            },
            UNKNOWN,
            Counter {
                before: Some(0),
                after: None,
            },
        ),
        Connection::RunnerGone,
        UNAVAILABLE,
        Verdict::RunnerLost,
    ),
    (
        "the machine was started anew",
        false,
        (UNKNOWN, UNKNOWN, counter(40, 0)),
        Connection::RunnerGone,
        UNAVAILABLE,
        Verdict::RunnerLost,
    ),
    (
        "two steps at once",
        false,
        v2(2),
        Connection::Held,
        EXIT_137,
        group(2),
    ),
];

/// What only looks so.
const LOOKS_SO: &[(&str, bool, Counters, Connection, &str)] = &[
    ("it succeeded", true, v2(0), Connection::Held, ""),
    (
        "it succeeded, no counter",
        true,
        NO_COUNTERS,
        Connection::Held,
        "",
    ),
    ("it prints Killed", false, v1(0), Connection::Held, EXIT_1),
    (
        "it prints Killed, no counter",
        false,
        NO_COUNTERS,
        Connection::Held,
        "Killed",
    ),
    ("it ends with 137", false, v1(0), Connection::Held, EXIT_137),
    (
        "it ends with 137, guarded",
        false,
        v2(0),
        Connection::Held,
        EXIT_137,
    ),
    ("a test expects SIGKILL", true, v1(0), Connection::Held, ""),
    (
        "`ulimit -v`: malloc fails",
        false,
        v2(0),
        Connection::Held,
        EXIT_1,
    ),
    (
        "the kernel's text without a kill",
        false,
        v1(0),
        Connection::Held,
        NO_MEMORY,
    ),
    (
        "the connection broke, and nothing was killed",
        false,
        v1(0),
        Connection::Broken,
        UNAVAILABLE,
    ),
    // The words stand in the command, which BuildKit quotes.
    (
        "the command says so",
        false,
        NO_COUNTERS,
        Connection::Held,
        "process \"/bin/sh -c echo cannot allocate memory; exit 1\" did not complete successfully: exit code: 1",
    ),
    (
        "the command quotes BuildKit",
        false,
        NO_COUNTERS,
        Connection::Held,
        "process \"/bin/sh -c echo did not complete successfully: exit code: 137\" did not complete successfully: exit code: 2",
    ),
    (
        "the command names the code",
        false,
        NO_COUNTERS,
        Connection::Held,
        "process \"/bin/sh -c echo ResourceExhausted: ; false\" did not complete successfully: exit code: 1",
    ),
    (
        "another code that begins alike",
        false,
        NO_COUNTERS,
        Connection::Held,
        "process \"x\" did not complete successfully: exit code: 1370",
    ),
    (
        "a file's name says so",
        false,
        NO_COUNTERS,
        Connection::Held,
        "failed to compute cache key: \"/cannot allocate memory\": not found",
    ),
    (
        "a fault of the Dockerfile",
        false,
        NO_COUNTERS,
        Connection::Held,
        "dockerfile parse error on line 2: unknown instruction: ResourceExhausted:",
    ),
    (
        "another program on the machine, beside a guarded build that succeeded",
        true,
        (counter(2, 2), counter(0, 0), counter(7, 8)),
        Connection::Held,
        "",
    ),
    (
        "a time limit of the step's own",
        false,
        v1(0),
        Connection::Held,
        "process \"x\" did not complete successfully: exit code: 124",
    ),
    (
        "`kill -9` in a pipeline that ends well",
        true,
        v1(0),
        Connection::Held,
        "",
    ),
    (
        "the disk is full",
        false,
        v2(0),
        Connection::Held,
        "failed to copy: write /x: no space left on device",
    ),
];

#[test]
fn what_ran_out_of_memory() {
    for (shape, succeeded, counters, connection, error, expected) in RAN_OUT {
        let verdict = judge(*succeeded, *counters, *connection, error);
        assert_eq!(verdict, *expected, "{shape}");
    }
}

#[test]
fn what_only_looks_so() {
    for (shape, succeeded, counters, connection, error) in LOOKS_SO {
        let verdict = judge(*succeeded, *counters, *connection, error);
        assert_eq!(verdict, Verdict::Other, "{shape}");
    }
}

#[test]
fn only_proof_buys_a_larger_runner() {
    for (verdict, retry) in [
        (Verdict::OutOfMemory(Proof::Group(1)), Retry::NextSize),
        (Verdict::OutOfMemory(Proof::Machine(1)), Retry::NextSize),
        (Verdict::Suspected("exit code: 137"), Retry::No),
        (Verdict::RunnerLost, Retry::SameSize),
        (Verdict::Other, Retry::No),
    ] {
        assert_eq!(verdict.retry(), retry, "{verdict:?}");
    }
}

#[test]
fn the_evidence_is_shown_with_what_is_not_known() {
    let evidence = Evidence {
        machine: counter(23, 24),
        errors: vec![EXIT_137.into(), EXIT_1.into()],
        ..Evidence::default()
    };
    assert_eq!(
        evidence.lines(),
        [
            "processes killed in the build's group (memory.events, oom_kill): unknown before, unknown after",
            "kills of the whole group (memory.events, oom_group_kill): unknown before, unknown after",
            "processes killed on the runner (/proc/vmstat, oom_kill): 23 before, 24 after",
            "BuildKit's text, which proves nothing by itself: exit code: 137",
            "the connection held",
        ]
    );
}

/// What BuildKit 0.13.2 said of a step, from its recorded progress.
fn recorded_error(name: &str) -> String {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/buildkit");
    let stream = std::fs::read_to_string(format!("{folder}/0.13-{name}.rawjson"));
    let stream = stream.expect("it was recorded");
    let mut lines = stream.lines();
    let line = lines.find_map(|line| line.trim().strip_prefix("\"error\": "));
    serde_json::from_str(line.expect("an error")).expect("a text")
}

#[test]
fn of_two_recorded_builds_with_one_text_only_the_counters_tell_which_ran_out() {
    // A shell that outgrew its group's limit while the machine's counter rose from 23 to 24, and one that ended itself
    // with the same code.
    let (grew, ended) = (recorded_error("oom"), recorded_error("failed-137"));
    for error in [&grew, &ended] {
        assert!(error.ends_with("did not complete successfully: exit code: 137"));
        assert_eq!(
            judge(false, NO_COUNTERS, Connection::Held, error),
            Verdict::Suspected("exit code: 137")
        );
    }
    let counters = |machine| (UNKNOWN, UNKNOWN, machine);
    assert_eq!(
        judge(false, counters(counter(23, 24)), Connection::Held, &grew),
        Verdict::OutOfMemory(Proof::Machine(1))
    );
    assert_eq!(
        judge(false, counters(counter(23, 23)), Connection::Held, &ended),
        Verdict::Other
    );
    // A step that prints "Killed" and ends with another code is not even suspected.
    let other = recorded_error("failed-42");
    assert_eq!(
        judge(false, NO_COUNTERS, Connection::Held, &other),
        Verdict::Other
    );
}
