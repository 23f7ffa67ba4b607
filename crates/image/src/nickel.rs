//! Evaluates a Nickel document with the user's own `nickel`, within a deadline. Nickel is never a part of this program.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::document::DocumentError;
use flywheel_core::text::{one_line, without_ansi};
use flywheel_sys::process::capture::{CaptureError, Tool};

/// An evaluation takes milliseconds; a document may import others, and may not end.
const LIMIT: Duration = Duration::from_secs(20);
/// Characters of Nickel's message that are shown.
const MESSAGE_LIMIT: usize = 600;

/// What to do without Nickel.
const WITHOUT: &str = "Write the same as `.json`, `.toml` or `.yml`, which need no other program, or have `nickel` on `PATH` (`nix shell nixpkgs#nickel`).";

/// The value of a Nickel document. `program` is the user's `nickel`, if there is one.
///
/// # Errors
/// When there is no `nickel`, and when it refuses the document or does not end in time.
pub async fn evaluate(program: Option<&Path>, file: &Path) -> Result<Value, DocumentError> {
    evaluate_within(program, file, LIMIT).await
}

async fn evaluate_within(
    program: Option<&Path>,
    file: &Path,
    limit: Duration,
) -> Result<Value, DocumentError> {
    let error = |problem: String| DocumentError::of_document(&file.display().to_string(), problem);
    let Some(program) = program else {
        return Err(
            error("is Nickel, and there is no `nickel` on `PATH`".into()).with_hint(WITHOUT),
        );
    };
    let tool = Tool::new(program).args(["export", "--format", "json"]);
    // A name that begins with a dash must not become an option.
    let absolute: PathBuf = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
    let output = tool.arg(&absolute).run(limit).await.map_err(|failed| {
        let problem = match failed {
            CaptureError::Deadline { limit, .. } => {
                format!("was not evaluated within {} s", limit.as_secs())
            }
            other => format!("was not evaluated: {}", with_causes(&other)),
        };
        error(problem).with_hint(WITHOUT)
    })?;
    if !output.status.success() {
        let message = one_line(without_ansi(&output.stderr).trim(), MESSAGE_LIMIT);
        return Err(error(format!("was refused by `nickel`: {message}")));
    }
    serde_json::from_slice(&output.stdout).map_err(|wrong| {
        error(format!(
            "was evaluated to something that is no JSON: {wrong}"
        ))
    })
}

fn with_causes(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", with_causes(source)),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use serde_json::json;

    use super::*;

    /// A `nickel` that is this script.
    fn program(folder: &Path, script: &str) -> PathBuf {
        let file = folder.join("nickel");
        fs::write(&file, format!("#!/bin/sh\n{script}\n")).expect("a file");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("its mode");
        file
    }

    #[tokio::test]
    async fn what_nickel_prints_is_the_value_and_it_gets_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let nickel = program(folder.path(), "printf '{\"arguments\": \"%s\"}' \"$*\"");
        let value = evaluate(Some(&nickel), Path::new("/x/-a.ncl")).await;
        assert_eq!(
            value,
            Ok(json!({"arguments": "export --format json /x/-a.ncl"}))
        );
    }

    #[tokio::test]
    async fn without_nickel_and_with_one_that_fails_the_way_out_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = Path::new("a.ncl");
        let error = evaluate(None, file).await.expect_err("there is none");
        assert!(error.to_string().contains("no `nickel` on `PATH`"));
        assert!(error.hint.is_some_and(|hint| hint.contains("`.json`")));
        let nickel = program(
            folder.path(),
            "printf 'error: \\033[31mextra field `typ`\\033[0m\\n' >&2; exit 1",
        );
        let error = evaluate(Some(&nickel), file).await.expect_err("refused");
        assert_eq!(
            error.to_string(),
            "a.ncl: was refused by `nickel`: error: extra field `typ`"
        );
        let nickel = program(folder.path(), "echo hello");
        let error = evaluate(Some(&nickel), file).await.expect_err("no JSON");
        assert!(error.to_string().contains("no JSON"), "{error}");
    }

    #[tokio::test]
    async fn an_evaluation_that_does_not_end_is_ended() {
        let folder = tempfile::tempdir().expect("a folder");
        let nickel = program(folder.path(), "while :; do sleep 1; done");
        let limit = Duration::from_millis(200);
        let error = evaluate_within(Some(&nickel), Path::new("a.ncl"), limit).await;
        let error = error.expect_err("it does not end");
        assert!(
            error.to_string().contains("not evaluated within"),
            "{error}"
        );
    }
}
