//! Event payloads for the gate's tests: GitHub's published examples, and what they lack.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use flywheel_core::trust::Facts;
use flywheel_sys::runner::context::facts;
use flywheel_sys::runner::env::Env;
use serde_json::{Value, json};
use tempfile::TempDir;

/// An event as a job would see it: its name, its payload, the ref that the runner names.
#[derive(Clone, Debug)]
pub struct Event {
    /// `GITHUB_EVENT_NAME`.
    pub name: String,
    /// What stands in the file that `GITHUB_EVENT_PATH` names.
    pub payload: Value,
    /// `GITHUB_REF`.
    pub git_ref: String,
    /// `GITHUB_REF_PROTECTED`.
    pub protected: bool,
    /// `GITHUB_REPOSITORY`.
    pub repository: String,
}

/// Every published example, trimmed: event name and payload.
pub fn published() -> &'static [(String, Value)] {
    static EXAMPLES: OnceLock<Vec<(String, Value)>> = OnceLock::new();
    EXAMPLES.get_or_init(|| {
        let file =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/events/examples.jsonl");
        let text = std::fs::read_to_string(file).unwrap();
        text.lines()
            .map(|line| {
                let mut line: Value = serde_json::from_str(line).unwrap();
                (
                    line["event"].as_str().unwrap().to_owned(),
                    line["payload"].take(),
                )
            })
            .collect()
    })
}

/// A push of `main` in `octo-org/octo-repo`, with all that GitHub sends.
pub fn push() -> Event {
    let whole = |(name, payload): &&(String, Value)| name == "push" && payload["deleted"] == false;
    let (name, payload) = published().iter().find(whole).unwrap().clone();
    let event = Event {
        name,
        payload,
        git_ref: String::new(),
        protected: false,
        repository: "octo-org/octo-repo".into(),
    };
    event
        .change(|payload| payload["repository"] = repository())
        .on("refs/heads/main")
}

fn repository() -> Value {
    json!({ "full_name": "octo-org/octo-repo", "default_branch": "main", "fork": false })
}

/// An event of that name in the same repository, with the least that its payload has.
pub fn event(name: &str, fields: &Value) -> Event {
    let mut payload = fields.clone();
    payload["repository"] = repository();
    Event {
        name: name.into(),
        payload,
        ..push()
    }
}

/// Payloads in files, each written once, because writing takes longer than the gate does.
pub struct Files {
    folder: TempDir,
    written: HashMap<String, PathBuf>,
}

impl Files {
    pub fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            written: HashMap::new(),
        }
    }

    fn of(&mut self, payload: &Value) -> PathBuf {
        let next = self
            .folder
            .path()
            .join(format!("{}.json", self.written.len()));
        let text = payload.to_string();
        let file = self.written.entry(text).or_insert_with_key(|text| {
            std::fs::write(&next, text).unwrap();
            next
        });
        file.clone()
    }
}

impl Event {
    /// The same on this ref, which its payload names if an event of this kind names one.
    pub fn on(mut self, git_ref: &str) -> Self {
        if matches!(self.name.as_str(), "push" | "workflow_dispatch") {
            self.payload["ref"] = json!(git_ref);
        }
        self.git_ref = git_ref.to_owned();
        self
    }

    pub fn change(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.payload);
        self
    }

    /// Protected by a rule.
    pub fn protected(mut self) -> Self {
        self.protected = true;
        self
    }

    /// The variables of its job; the payload is in `file`.
    pub fn variables(&self, file: &Path) -> Vec<(&'static str, String)> {
        vec![
            ("GITHUB_ACTIONS", "true".into()),
            ("GITHUB_EVENT_NAME", self.name.clone()),
            ("GITHUB_EVENT_PATH", file.to_str().unwrap().into()),
            ("GITHUB_REF", self.git_ref.clone()),
            ("GITHUB_REF_PROTECTED", self.protected.to_string()),
            ("GITHUB_REPOSITORY", self.repository.clone()),
        ]
    }

    /// The facts that a job of it would have.
    pub fn facts(&self, files: &mut Files) -> Facts {
        let variables = self.variables(&files.of(&self.payload));
        facts(&Env::from_pairs(
            variables
                .iter()
                .map(|(name, value)| (*name, value.as_str())),
        ))
    }
}
