//! Recorded streams of BuildKit 0.13.2 (buildx 0.13.1), the same in the form of newer releases, and streams that end
//! where they should not.

use std::fs;

use serde_json::Value;

use super::*;

fn recorded(name: &str) -> Vec<u8> {
    let folder = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/fixtures/buildkit/0.13-"
    );
    fs::read(format!("{folder}{name}.rawjson")).expect("it was recorded")
}

/// The same stream with one object on a line, as BuildKit 0.29's client prints it.
fn one_on_a_line(stream: &[u8]) -> Vec<u8> {
    let mut values = serde_json::Deserializer::from_slice(stream).into_iter::<Value>();
    let mut lines = Vec::new();
    let mut end = 0;
    while let Some(Ok(value)) = values.next() {
        lines.extend(format!("{value}\n").into_bytes());
        end = values.byte_offset();
    }
    lines.extend(stream[end..].trim_ascii_start());
    lines
}

fn read(stream: &[u8], piece: usize) -> Build {
    let mut reader = Reader::default();
    stream.chunks(piece).for_each(|bytes| reader.feed(bytes));
    reader.finish()
}

/// What of a build does not depend on the form of its stream.
fn known(build: &Build) -> String {
    format!(
        "{:?} {:?} {}",
        build.steps,
        build.warnings,
        build.tail.trim()
    )
}

#[test]
fn both_forms_in_any_pieces_say_the_same() {
    for name in [
        "ok-cold",
        "ok-warm",
        "failed-42",
        "failed-137",
        "syntax",
        "oom",
    ] {
        let old = recorded(name);
        let new = one_on_a_line(&old);
        assert!(new.len() < old.len());
        let whole = read(&old, old.len());
        assert_eq!(
            (whole.unreadable, whole.left_out, whole.is_torn),
            (0, 0, false)
        );
        assert!(!whole.steps.is_empty(), "{name}");
        for piece in [1, 2, 7, 100, 4096] {
            assert_eq!(
                known(&read(&old, piece)),
                known(&whole),
                "{name} by {piece}"
            );
            assert_eq!(
                known(&read(&new, piece)),
                known(&whole),
                "{name} by {piece}"
            );
        }
    }
}

#[test]
fn stages_and_what_came_from_the_cache_are_known() {
    let of = |name| {
        let stages = read(&recorded(name), 512).stages();
        let mut stages: Vec<_> = stages
            .into_iter()
            .map(|stage| (stage.name, stage.steps, stage.cached, stage.duration))
            .collect();
        stages.sort();
        stages
    };
    let counts = |name| {
        let counts = of(name).into_iter();
        counts
            .map(|(name, steps, cached, _)| (name, steps, cached))
            .collect::<Vec<_>>()
    };
    let expected = |cached: [usize; 3]| {
        vec![
            ("base".to_owned(), 2, cached[0]),
            ("cooker".to_owned(), 1, cached[1]),
            ("final".to_owned(), 2, cached[2]),
        ]
    };
    assert_eq!(counts("ok-cold"), expected([0, 0, 0]));
    assert_eq!(counts("ok-warm"), expected([2, 1, 2]));
    // From the recorded times: 25.62… to 25.627…, and 25.628… to 26.039….
    let took: Vec<Duration> = of("ok-cold").into_iter().map(|stage| stage.3).collect();
    let within = |time: &Duration| (1..2000).contains(&time.as_millis());
    assert!(took.iter().all(within), "{took:?}");
}

#[test]
fn a_failed_step_has_its_error_and_log_and_the_text_behind_is_kept() {
    let build = read(&recorded("failed-42"), 64);
    let errors: Vec<_> = build.errors().collect();
    let [(step, error)] = errors.as_slice() else {
        panic!("{errors:?}");
    };
    assert!(error.ends_with("did not complete successfully: exit code: 42"));
    assert_eq!(step.log, b"Killed\n");
    assert!(step.is_completed() && !step.is_cached);
    assert!(
        build.tail.starts_with("Dockerfile:3\n")
            && build.tail.contains("ERROR: failed to solve: process"),
        "{}",
        build.tail
    );
    let [of_step, of_client] = &build.error_texts()[..] else {
        panic!("{:?}", build.error_texts());
    };
    assert_eq!(of_step, error);
    assert!(of_client.starts_with("ERROR: failed to solve: process"));
    // A fault of the Dockerfile fails no step.
    let build = read(&recorded("syntax"), 64);
    assert_eq!(build.errors().count(), 0);
    assert!(build.tail.contains("unknown instruction: COPI"));
}

#[test]
fn both_streams_of_a_step_are_one_log() {
    let build = read(&recorded("ok-cold"), 64);
    let mut steps = build.steps.iter();
    let cooker = steps.find(|step| step.name.starts_with("[cooker 1/1]"));
    let log =
        String::from_utf8(cooker.expect("it was recorded").log.clone()).expect("it was recorded");
    assert!(log.contains("Killed\n") && log.contains("warn\n"), "{log}");
}

#[test]
fn the_first_text_that_is_no_object_ends_the_objects() {
    let stream = b"{\"vertexes\":[{\"digest\":\"a\",\"name\":\"[1/1] RUN x\"}]}\nERROR: x\n{\"vertexes\":[{\"digest\":\"b\"}]}\n";
    for piece in 1..stream.len() {
        let build = read(stream, piece);
        assert_eq!(build.steps.len(), 1);
        assert_eq!(
            build.tail,
            "ERROR: x\n{\"vertexes\":[{\"digest\":\"b\"}]}\n"
        );
    }
    let build = read(b"docker: unknown flag\n", 5);
    assert_eq!(
        (build.steps.len(), build.tail.as_str()),
        (0, "docker: unknown flag\n")
    );
}

#[test]
fn a_stream_that_is_cut_off_is_torn_and_keeps_what_was_whole() {
    let stream = recorded("ok-cold");
    let mut torn = 0;
    for end in (0..stream.len()).step_by(97) {
        let build = read(&stream[..end], 300);
        torn += usize::from(build.is_torn);
        assert_eq!(build.unreadable, 0);
    }
    assert!(torn > 100, "{torn}");
}

#[test]
fn braces_within_texts_and_strange_objects_do_no_harm() {
    let stream = br#"{"vertexes":[{"digest":"a","name":"[x 1/2] RUN echo \"}{]\" \\"}]}{"later":1}{"vertexes":7}
        {"vertexes":null,"logs":[{"vertex":"a","data":"%%"},{"vertex":"a","data":"QQ=="}],"warnings":[{"vertex":"a","short":"b2xk"}]}"#;
    for piece in [1, 3, 1000] {
        let build = read(stream, piece);
        assert_eq!(build.steps[0].name, "[x 1/2] RUN echo \"}{]\" \\");
        assert_eq!(build.steps[0].log, b"A");
        assert_eq!(build.warnings, ["old"]);
        assert_eq!((build.steps.len(), build.unreadable), (1, 1));
        assert_eq!(build.tail, "");
    }
}

#[test]
fn logs_and_plain_text_are_bounded() {
    let mut reader = Reader::default();
    let data = BASE64_STANDARD.encode(vec![b'x'; 30_000]);
    for _ in 0..10 {
        let message = format!("{{\"logs\":[{{\"vertex\":\"a\",\"data\":\"{data}\"}}]}}\n");
        reader.feed(message.as_bytes());
    }
    assert_eq!(reader.steps()[0].log.len(), LOG_LIMIT);
    for _ in 0..10 {
        reader.feed(&[b'y'; 30_000]);
    }
    reader.feed(b"the end");
    let build = reader.finish();
    assert_eq!(build.tail.len(), TAIL_LIMIT);
    assert!(build.tail.ends_with("the end"));
}

#[test]
fn names_of_steps_are_understood() {
    let step = |stage, number, of, instruction| StageName::Step {
        stage,
        number,
        of,
        instruction,
    };
    for (name, expected) in [
        ("[cooker 2/3] RUN a", step("cooker", 2, 3, "RUN a")),
        ("[2/2] RUN [\"a\"] b", step("", 2, 2, "RUN [\"a\"] b")),
        (
            "[linux/arm64 final 1/4] COPY a b",
            step("final", 1, 4, "COPY a b"),
        ),
        ("[linux/amd64 1/4] FROM x", step("", 1, 4, "FROM x")),
        // BuildKit pads the number.
        ("[stage-1  2/10] RUN a", step("stage-1", 2, 10, "RUN a")),
        ("[internal] load .dockerignore", StageName::Internal),
        ("exporting to image", StageName::Other),
        ("[a/b] x", StageName::Other),
        ("[", StageName::Other),
    ] {
        assert_eq!(StageName::of(name), expected, "{name}");
    }
}
