//! The builds: which derivations go into which lane, what Nix reports of them, and what their failures mean for each
//! output.

use std::collections::BTreeSet;
use std::time::Instant;

use tokio::sync::mpsc;

use super::{Engine, EngineEvent, Lane, QUEUE};
use crate::command::flake_checks::lanes::{self, LaneState};
use crate::command::flake_checks::output::{Tail, build_cause};
use flywheel_github::checks::{Cause, OutputState};
use flywheel_nix::build::log::{BuildEvent, BuildFailure, FailureKind, is_download};
use flywheel_nix::build::{BuildRequest, BuildResult};
use flywheel_nix::store_path::StorePath;

/// Logs that are kept: those of what was begun last, and of all that failed.
const LOGS: usize = 500;

impl Engine<'_> {
    pub(super) fn start_lanes(&mut self) {
        for lane in 0..self.lanes.len() {
            if self.lanes[lane].is_some() {
                continue;
            }
            let other = self.lanes[1 - lane].as_ref();
            let state = LaneState {
                waiting: self.to_build.len(),
                all_known: self.evaluating == 0 && self.arrived.is_empty() && !self.is_querying,
                other: other.map(|lane| lane.jobs),
                running: other.map(|lane| lane.since.elapsed()).unwrap_or_default(),
                is_content_addressed: self.is_content_addressed,
            };
            let Some(jobs) = lanes::start(self.plan.max_jobs, &state) else {
                continue;
            };
            let ids = self.take_of_one_kind();
            self.start_lane(lane, ids, jobs);
        }
    }

    /// Takes what the next lane builds. Nix gives up a whole build when one derivation is for a system without a
    /// builder, so such derivations are built one by one, after the others.
    fn take_of_one_kind(&mut self) -> Vec<usize> {
        let is_native = |id: &usize| {
            let system = self.outs[*id]
                .facts
                .as_ref()
                .and_then(|facts| facts.system.as_ref());
            system
                .zip(self.settings.native.as_ref())
                .is_none_or(|(system, native)| native.contains(system))
        };
        let (native, foreign): (Vec<usize>, Vec<usize>) =
            self.to_build.iter().copied().partition(is_native);
        if native.is_empty() {
            self.to_build = foreign[1..].to_vec();
            return foreign[..1].to_vec();
        }
        let limits = native.iter().map(|id| self.outs[*id].lane_limit);
        let (now, later) = native.split_at(lanes::size(limits));
        self.to_build = later.iter().copied().chain(foreign).collect();
        now.to_vec()
    }

    fn start_lane(&mut self, lane: usize, ids: Vec<usize>, jobs: Option<usize>) {
        let derivations: BTreeSet<StorePath> = ids
            .iter()
            .filter_map(|id| self.outs[*id].drv.clone())
            .collect();
        // A failure of an earlier try must not count against this one.
        for name in derivations
            .iter()
            .flat_map(|drv| self.resolved.names_of(drv))
        {
            self.failures.remove(name);
        }
        let order = BuildRequest {
            derivations: derivations.into_iter().collect(),
            max_jobs: jobs,
            keep_going: self.plan.keep_going,
            arguments: self.plan.arguments.clone(),
        };
        let (nix, sender, cancel) = (self.nix.clone(), self.events.clone(), self.cancel.clone());
        self.jobs.spawn(async move {
            let (events, mut received) = mpsc::channel(QUEUE);
            let forward = async {
                while let Some(event) = received.recv().await {
                    // The receiver is gone only once the run has ended.
                    let _ = sender.send(EngineEvent::Building(lane, event)).await;
                }
            };
            let build = async {
                let ended = order
                    .build(&nix, &events, &cancel)
                    .await
                    .map_err(|error| error.to_string());
                drop(events);
                ended
            };
            let (ended, ()) = tokio::join!(build, forward);
            let _ = sender.send(EngineEvent::Built(lane, ended)).await;
        });
        self.lanes[lane] = Some(Lane {
            ids,
            jobs,
            since: Instant::now(),
            failed: Vec::new(),
        });
    }

    pub(super) fn on_build_event(&mut self, lane: usize, event: BuildEvent) {
        match event {
            BuildEvent::Started(drv) => {
                let built_for = self.resolved.built_for(&drv);
                let ids: Vec<usize> = built_for
                    .filter_map(|drv| self.by_drv.get(drv))
                    .flatten()
                    .copied()
                    .collect();
                for id in ids {
                    if self.outs[id].verdict.is_none() {
                        self.outs[id].begin_build();
                        self.reporter
                            .state(&self.outs[id].output, &OutputState::Building);
                    }
                }
                // A derivation that is built again begins a new log.
                self.begin_log(drv);
            }
            BuildEvent::Resolved { original, resolved } => {
                self.resolved.insert(original, resolved);
            }
            BuildEvent::Line(drv, line) => self.logs.entry(drv).or_default().push(line),
            BuildEvent::Stopped(_) => (),
            BuildEvent::Failed(failure) => {
                if let (Some(drv), false) =
                    (&failure.derivation, failure.kind == FailureKind::Dependency)
                {
                    self.failures
                        .entry(drv.clone())
                        .or_insert_with(|| failure.clone());
                }
                if let Some(lane) = &mut self.lanes[lane] {
                    lane.failed.push(failure);
                }
            }
        }
    }

    pub(super) async fn on_built(&mut self, lane: usize, ended: Result<BuildResult, String>) {
        let Some(lane) = self.lanes[lane].take() else {
            return;
        };
        // What became valid since the last query was built, even if others in the lane failed.
        self.end_valid(&lane.ids).await;
        let open: Vec<usize> = lane
            .ids
            .iter()
            .copied()
            .filter(|id| self.outs[*id].verdict.is_none())
            .collect();
        let whole = ended.as_ref().is_ok_and(|ended| ended.complete);
        let message = ended.map_or_else(|error| error, |ended| ended.output);
        let mut unexplained = Vec::new();
        let mut retried = BTreeSet::new();
        let mut failed = 0;
        for id in open {
            if whole {
                // A content-addressed output: which paths it has, only Nix knows.
                self.end(id, Cause::Built, Vec::new());
                continue;
            }
            match self.failure_of(id).await {
                Some((failure, _))
                    if self.is_transient(&failure) && self.outs[id].tries < self.plan.retries =>
                {
                    self.outs[id].tries += 1;
                    self.reporter
                        .again(&self.outs[id].output, &self.why(&failure));
                    self.to_build.push(id);
                    retried.extend(failure.derivation);
                }
                Some((failure, is_own)) => {
                    failed += 1;
                    self.fail(id, failure, is_own).await;
                }
                None => unexplained.push(id),
            }
        }
        // A failure that is tried again must not fail the outputs that depend on its derivation.
        self.failures.retain(|drv, _| !retried.contains(drv));
        for id in unexplained {
            failed += usize::from(self.end_unexplained(id, &lane, failed > 0, &message));
        }
        if failed > 0 && !self.plan.keep_going {
            self.is_given_up = true;
        }
        self.drop_logs();
    }

    /// Handles an output that has not been built, and for which Nix has reported no failure: it gets a verdict once it
    /// was built alone, and until then is built again beside fewer others. Returns whether it has failed.
    fn end_unexplained(
        &mut self,
        id: usize,
        lane: &Lane,
        is_any_failed: bool,
        message: &str,
    ) -> bool {
        let is_any_transient = lane
            .failed
            .iter()
            .any(|failure| failure.kind == FailureKind::Transient);
        let out = &mut self.outs[id];
        let may_retry = out.tries < self.plan.retries;
        // An outage is not narrowed down: each further call would wait for it anew.
        let is_outage = is_any_transient && !is_any_failed;
        if is_outage && may_retry {
            out.tries += 1;
        } else if lane.ids.len() > 1 && !is_outage {
            // One failure may have ended the whole lane, or Nix has built the output and only Nix knows its paths.
            out.lane_limit = lane.ids.len() / 2;
        } else if lane.failed.is_empty() && may_retry {
            // Without an error, Nix itself has crashed.
            out.tries += 1;
        } else {
            let tail = message.lines().map(str::to_owned).collect();
            self.end(id, Cause::Build, tail);
            return true;
        }
        self.to_build.push(id);
        false
    }

    /// Whether the build may succeed when it is tried again.
    fn is_transient(&self, failure: &BuildFailure) -> bool {
        failure.kind == FailureKind::Transient
            || failure.kind == FailureKind::Build && is_download(&self.log_of(failure))
    }

    fn log_of(&self, failure: &BuildFailure) -> Vec<String> {
        failure
            .derivation
            .as_ref()
            .and_then(|drv| self.logs.get(drv))
            .map(Tail::lines)
            .unwrap_or_default()
    }

    /// The last line of the failed build's log, else Nix's message.
    fn why(&self, failure: &BuildFailure) -> String {
        self.log_of(failure)
            .pop()
            .unwrap_or_else(|| failure.text.clone())
    }

    /// Begins a log. When there are too many, the oldest of a build that has not failed is dropped.
    fn begin_log(&mut self, drv: StorePath) {
        self.log_order.retain(|other| *other != drv);
        self.log_order.push_back(drv.clone());
        self.logs.insert(drv, Tail::default());
        let oldest = self
            .log_order
            .iter()
            .position(|drv| !self.failures.contains_key(drv));
        if let Some(at) = oldest.filter(|_| self.logs.len() > LOGS)
            && let Some(drv) = self.log_order.remove(at)
        {
            self.logs.remove(&drv);
        }
    }

    /// Drops all logs once no lane runs: a build that is tried again begins a new one.
    fn drop_logs(&mut self) {
        if self.lanes.iter().all(Option::is_none) {
            self.logs.clear();
            self.log_order.clear();
        }
    }

    /// The failure of a derivation, under whichever name Nix reported it.
    fn failure_under_any_name(&self, drv: &StorePath) -> Option<&BuildFailure> {
        let mut names = self.resolved.names_of(drv);
        names.find_map(|name| self.failures.get(name))
    }

    /// The failure that an output failed by, and whether it is of the output's own build.
    async fn failure_of(&self, id: usize) -> Option<(BuildFailure, bool)> {
        let drv = self.outs[id].drv.as_ref()?;
        if let Some(own) = self.failure_under_any_name(drv) {
            return Some((own.clone(), true));
        }
        if self.failures.is_empty() {
            return None;
        }
        let closure = self.store.closure(std::slice::from_ref(drv)).await.ok()?;
        let found = closure
            .infos
            .iter()
            .filter_map(|info| Some((&info.path, self.failure_under_any_name(&info.path)?)))
            // Of several failed dependencies, the same one is named in every run.
            .min_by_key(|(drv, _)| *drv);
        found.map(|(_, failure)| (failure.clone(), false))
    }

    async fn fail(&mut self, id: usize, failure: BuildFailure, is_own: bool) {
        let mut log = self.log_of(&failure);
        // The log of a build that was killed does not say so.
        if log.is_empty() || matches!(failure.kind, FailureKind::TimedOut { .. }) {
            log.extend(failure.text.lines().map(str::to_owned));
        }
        let tree = self.tree.clone();
        // Finding the line of a wrong hash reads the flake's files, which blocks.
        let cause = tokio::task::spawn_blocking(move || build_cause(&failure, is_own, &tree)).await;
        self.end(id, cause.unwrap_or(Cause::Build), log);
    }
}
