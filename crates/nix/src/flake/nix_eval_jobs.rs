//! Runs `nix-eval-jobs` in place of our own workers: one process with workers of its own, which
//! prints a JSON object for each derivation (<https://github.com/nix-community/nix-eval-jobs>).

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::flake::Source;
use crate::flake::evaluate::{Derivation, EvalEvent, EvalFailure};
use crate::flake::expression::{AttributePath, installable};
use crate::flake::pool::EvalTask;
use crate::tool::Nix;
use flywheel_sys::process::capture::Tool;
use flywheel_sys::process::lines::PartialLine;

/// Time between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_millis(500);
/// Bytes to keep of its output besides the objects.
const OUTPUT_LIMIT: usize = 64 * 1024;
/// Merges its two streams into one; a line that parses as an object is a result, any other a
/// warning.
const MERGE_STREAMS: &str = "exec \"$0\" \"$@\" 1>&2";

pub struct NixEvalJobs {
    pub program: PathBuf,
    /// Nix, for its environment.
    pub nix: Nix,
    pub source: Source,
    pub attribute: AttributePath,
    /// The systems that are asked for; `None` for all.
    pub systems: Option<Vec<String>>,
    pub arguments: Vec<String>,
    pub workers: usize,
    /// The memory a worker may use before it is replaced, in bytes.
    pub share: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JobLine {
    attr_path: AttributePath,
    drv_path: Option<String>,
    #[serde(default)]
    outputs: BTreeMap<String, Option<String>>,
    system: Option<String>,
    error: Option<String>,
}

impl NixEvalJobs {
    /// Evaluates all tasks until the channel closes or `cancel` fires. A task without a result
    /// counts as failed.
    pub async fn run(
        self,
        mut tasks: mpsc::Receiver<Vec<EvalTask>>,
        events: mpsc::Sender<EvalEvent>,
        cancel: CancellationToken,
    ) {
        // Each batch starts the program anew.
        while let Some(tasks) = tokio::select! {
            biased;
            () = cancel.cancelled() => None,
            tasks = tasks.recv() => tasks,
        } {
            for (prefix, open) in self.by_system(tasks) {
                self.evaluate(&prefix, open, &events, &cancel).await;
            }
        }
    }

    /// Divides tasks by the system below the selected attribute, so that the program touches no other. The paths of the
    /// result are those below its prefix.
    fn by_system(
        &self,
        tasks: Vec<EvalTask>,
    ) -> BTreeMap<AttributePath, HashMap<AttributePath, usize>> {
        let mut groups: BTreeMap<AttributePath, HashMap<AttributePath, usize>> = BTreeMap::new();
        for task in tasks {
            let is_system = task.path.len() > 1
                && self
                    .systems
                    .as_ref()
                    .is_some_and(|systems| systems.contains(&task.path[0]));
            let (prefix, path) = task.path.split_at(usize::from(is_system));
            let group = groups.entry(prefix.to_vec()).or_default();
            group.insert(path.to_vec(), task.id);
        }
        groups
    }

    /// Evaluates everything below `prefix`; the program's objects are matched by their paths.
    async fn evaluate(
        &self,
        prefix: &[String],
        mut open: HashMap<AttributePath, usize>,
        events: &mpsc::Sender<EvalEvent>,
        cancel: &CancellationToken,
    ) {
        if cancel.is_cancelled() {
            return;
        }
        let output = match self.tool(prefix).stream_stderr() {
            Err(error) => format!("error: {error}"),
            Ok(mut tool) => {
                let (mut held, mut output) = (PartialLine::default(), String::new());
                loop {
                    let line = tokio::select! {
                        biased;
                        () = cancel.cancelled() => return tool.stop(GRACE).await,
                        line = tool.line(&mut held) => line,
                    };
                    let Ok(Some(line)) = line else { break };
                    match serde_json::from_str::<JobLine>(&line) {
                        Err(_) if output.len() < OUTPUT_LIMIT => {
                            output.push_str(&format!("{line}\n"));
                        }
                        Err(_) => (),
                        Ok(job) => {
                            if let Some(id) = open.remove(&job.attr_path) {
                                // A closed receiver has no use for the event.
                                let _ = events.send(self.event(id, job)).await;
                            }
                        }
                    }
                }
                // The exit status adds nothing: tasks without a result are reported below.
                let _ = tool.ended().await;
                output
            }
        };
        let output = if output.trim().is_empty() {
            "error: `nix-eval-jobs` printed nothing about it".to_owned()
        } else {
            output
        };
        for id in open.into_values() {
            let _ = events
                .send(EvalEvent::Failed(
                    id,
                    EvalFailure::from_stderr(&output, &self.source),
                ))
                .await;
        }
    }

    fn event(&self, id: usize, job: JobLine) -> EvalEvent {
        match (job.drv_path, job.error) {
            (Some(drv), None) => {
                let outs = job
                    .outputs
                    .into_iter()
                    .map(|(name, path)| (name, path.unwrap_or_default()))
                    .collect();
                EvalEvent::Known {
                    id,
                    facts: Derivation {
                        drv,
                        outs,
                        system: job.system,
                    },
                    independent: false,
                }
            }
            (_, error) => {
                let text = error.unwrap_or_else(|| "it is not a derivation".to_owned());
                let text = if text.contains("error:") {
                    text
                } else {
                    format!("error: {text}")
                };
                EvalEvent::Failed(id, EvalFailure::from_stderr(&text, &self.source))
            }
        }
    }

    fn tool(&self, prefix: &[String]) -> Tool {
        let attribute = [self.attribute.as_slice(), prefix].concat();
        let flake = installable(&self.source.reference, &attribute)
            .expect("neither `attribute_path` nor a system has other names");
        // The option is in MiB.
        let memory = (self.share >> 20).clamp(512, 1 << 20).to_string();
        let workers = self.workers.to_string();
        let args = [
            "--flake",
            &flake,
            "--workers",
            &workers,
            "--max-memory-size",
            &memory,
            "--force-recurse",
        ];
        let tool = Tool::new(std::path::Path::new("/bin/sh"))
            .args(["-c", MERGE_STREAMS])
            .arg(&self.program);
        tool.args(args)
            .args(&self.arguments)
            .envs(self.nix.variables())
    }
}
