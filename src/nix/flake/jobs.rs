//! `nix-eval-jobs` in the place of our own workers: one process that has workers of its own, and says a JSON object
//! for each derivation as it comes (<https://github.com/nix-community/nix-eval-jobs>).

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::nix::flake::Source;
use crate::nix::flake::evaluate::{Event, Facts, Failure};
use crate::nix::flake::expression::{AttributePath, installable_name};
use crate::nix::flake::pool::Task;
use crate::nix::tool::Nix;
use crate::process::capture::Tool;
use crate::process::lines::PartialLine;

/// A process that is asked to end has this long before it is killed.
const GRACE: Duration = Duration::from_millis(500);
/// What is kept of what it says beside its objects, in bytes.
const SAID: usize = 64 * 1024;
/// Both of its streams are read as one: an object is told from a warning by being one.
const BOTH: &str = "exec \"$0\" \"$@\" 1>&2";

/// What it needs.
pub struct Jobs {
    /// The program.
    pub program: PathBuf,
    /// Nix, for its environment.
    pub nix: Nix,
    /// The flake.
    pub source: Source,
    /// The attribute.
    pub attribute: AttributePath,
    /// More words for it.
    pub arguments: Vec<String>,
    /// How many workers it has.
    pub workers: usize,
    /// What a worker may hold before it is replaced, in bytes.
    pub share: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Object {
    attr_path: AttributePath,
    drv_path: Option<String>,
    #[serde(default)]
    outputs: BTreeMap<String, Option<String>>,
    system: Option<String>,
    error: Option<String>,
}

impl Jobs {
    /// Evaluates everything that comes at first; `cancel` ends it. What it says nothing of has failed.
    pub async fn run(
        self,
        mut tasks: mpsc::Receiver<Vec<Task>>,
        events: mpsc::Sender<Event>,
        cancel: CancellationToken,
    ) {
        while let Some(tasks) = tokio::select! {
            biased;
            () = cancel.cancelled() => None,
            tasks = tasks.recv() => tasks,
        } {
            self.evaluate(tasks, &events, &cancel).await;
        }
    }

    async fn evaluate(
        &self,
        tasks: Vec<Task>,
        events: &mpsc::Sender<Event>,
        cancel: &CancellationToken,
    ) {
        let mut open: HashMap<AttributePath, usize> =
            tasks.into_iter().map(|task| (task.path, task.id)).collect();
        let said = match self.tool().stream_stderr() {
            Err(error) => format!("error: {error}"),
            Ok(mut tool) => {
                let (mut held, mut said) = (PartialLine::default(), String::new());
                loop {
                    let line = tokio::select! {
                        biased;
                        () = cancel.cancelled() => return tool.stop(GRACE).await,
                        line = tool.line(&mut held) => line,
                    };
                    let Ok(Some(line)) = line else { break };
                    match serde_json::from_str::<Object>(&line) {
                        Err(_) if said.len() < SAID => said.push_str(&format!("{line}\n")),
                        Err(_) => (),
                        Ok(object) => {
                            if let Some(id) = open.remove(&object.attr_path) {
                                // Whoever has stopped to listen has no use for it.
                                let _ = events.send(self.event(id, object)).await;
                            }
                        }
                    }
                }
                // How it ended is seen by what it has not said.
                let _ = tool.ended().await;
                said
            }
        };
        let said = if said.trim().is_empty() {
            "error: `nix-eval-jobs` said nothing of it".to_owned()
        } else {
            said
        };
        for id in open.into_values() {
            let _ = events
                .send(Event::Failed(id, Failure::said(&said, &self.source)))
                .await;
        }
    }

    fn event(&self, id: usize, object: Object) -> Event {
        match (object.drv_path, object.error) {
            (Some(drv), None) => {
                let outs = object
                    .outputs
                    .into_iter()
                    .map(|(name, path)| (name, path.unwrap_or_default()))
                    .collect();
                Event::Known {
                    id,
                    facts: Facts {
                        drv,
                        outs,
                        system: object.system,
                    },
                    independent: false,
                }
            }
            (_, error) => {
                let text = error.unwrap_or_else(|| "it is no derivation".to_owned());
                let text = if text.contains("error:") {
                    text
                } else {
                    format!("error: {text}")
                };
                Event::Failed(id, Failure::said(&text, &self.source))
            }
        }
    }

    fn tool(&self) -> Tool {
        let attribute: Vec<String> = self
            .attribute
            .iter()
            .map(|name| installable_name(name))
            .collect();
        let flake = format!("{}#{}", self.source.reference, attribute.join("."));
        let memory = (self.share >> 20).clamp(512, 1 << 20).to_string();
        let workers = self.workers.to_string();
        let words = [
            "--flake",
            &flake,
            "--workers",
            &workers,
            "--max-memory-size",
            &memory,
            "--force-recurse",
        ];
        let tool = Tool::new(std::path::Path::new("/bin/sh"))
            .args(["-c", BOTH])
            .arg(&self.program);
        tool.args(words)
            .args(&self.arguments)
            .envs(self.nix.variables())
    }
}
