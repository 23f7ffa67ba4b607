//! How the publisher reacts to the result of each job: which path is settled, which backs off, and whether the server
//! is available.

use std::time::Duration;

use tokio::time::Instant;

use crate::client::destination::{Action, CacheConfig, Error, Uploaded};
use crate::client::publish::outcome::{Final, Skip, Withheld};
use crate::client::publish::plan::{Id, LARGE};
use crate::client::publish::work::{Health, JobResult, Looked, Missing, PublisherTask};
use flywheel_nix::nar::DumpError;
use flywheel_nix::store_path::StorePath;

/// A query of this many paths or fewer is not too long for any server, so its failure has another cause.
const MIN_QUERY: usize = 16;
/// This many consecutive failures, of whatever paths, mean that the server is unavailable.
const MAX_FAILURE_STREAK: u32 = 3;
/// This many consecutive refusals, before any success, mean that the token may not push.
const MAX_REFUSALS: u32 = 3;
/// The wait before the first check of an unavailable server; it doubles from there.
const FIRST_CHECK: Duration = Duration::from_millis(250);
/// Up to this size, in bytes, the duration of an upload depends on the server, and above it on the bandwidth.
const SMALL: u64 = 1024 * 1024;

impl PublisherTask {
    pub(super) fn on_result(&mut self, result: JobResult) {
        match result {
            JobResult::Preflight { config, may_push } => {
                self.preflighting = false;
                if !matches!(may_push, Err(Error::Unreachable { .. })) {
                    self.stall.on_answer();
                }
                // Only a definite result counts. An unavailable server gets another preflight.
                self.probed = !matches!(&may_push, Err(error) if matches!(error.action(), Action::Retry { .. }));
                self.on_server_check(may_push, true);
                if self.probed {
                    self.apply_config(config);
                }
            }
            JobResult::ServerChecked(result) => {
                self.querying = false;
                self.on_server_check(result, false);
            }
            JobResult::Queried {
                ids,
                result,
                looked,
            } => {
                self.querying = false;
                self.on_query_result(ids, result, looked);
            }
            JobResult::Checked { id, verdict } => self.plan.on_checked(id, verdict),
            JobResult::Liveness(answers) => self.stall.on_liveness(answers),
            JobResult::Withheld { id, size, findings } => {
                self.stall.withdraw(id);
                self.sending -= 1;
                self.sending_large -= usize::from(size >= LARGE);
                self.plan
                    .settle(id, Final::Withheld(Withheld::Found(findings)));
            }
            JobResult::Sent {
                id,
                size,
                took,
                result,
            } => {
                let waited = took >= self.options.stall.idle;
                self.stall.end(id, result.as_ref().err(), waited);
                self.sending -= 1;
                self.sending_large -= usize::from(size >= LARGE);
                match result {
                    // With a known NAR the server still stores the path, so both count as published.
                    Ok(Uploaded::Stored | Uploaded::Deduplicated) => {
                        (self.failure_streak, self.refusals, self.any_sent) = (0, 0, true);
                        self.busy_since = None;
                        self.concurrency.on_success(took, size <= SMALL);
                        self.options.journal.uploaded([self.plan.path(id)]);
                        self.plan.on_sent(id);
                    }
                    Err(error) => self.on_upload_failed(id, &error),
                }
            }
        }
        self.report_progress(false);
    }

    /// Applies the cache's configuration. A token that may only push cannot read it, which is no error.
    fn apply_config(&mut self, config: Result<Option<CacheConfig>, Error>) {
        let Ok(Some(config)) = config else { return };
        self.learn_key(config.public_key.clone());
        if let Some(endpoint) = self.to.endpoint() {
            let server = flywheel_sys::http::redact(&endpoint.server);
            for host in config.foreign_hosts(endpoint) {
                self.sink.note(format!(
                    "the cache names `{host}` as its address; Flywheel stays with {server}"
                ));
            }
        }
        if self.to.omits_upstream_paths() {
            self.plan.omit_names(config.upstream_keys);
        }
    }

    /// Handles the preflight (`first`), or the check of a server that was unavailable.
    fn on_server_check(&mut self, result: Result<(), Error>, first: bool) {
        let (checks, refused) = match self.health {
            Health::Unavailable {
                checks, refused, ..
            } => (checks, refused),
            Health::Stopped(_) => return,
            _ => (0, 0),
        };
        match result {
            Ok(()) => {
                if checks > 0 {
                    self.sink.note("the cache is available again");
                }
                self.health = Health::Available;
                self.unavailable_since = None;
                self.failure_streak = 0;
            }
            Err(error) => match error.action() {
                // A refusal counts only in the preflight or twice in a row: while a server restarts, the proxy in
                // front of it responds with 404.
                Action::Stop if first || refused > 0 => self.stop(&error),
                Action::Stop => self.set_unavailable(checks + 1, refused + 1),
                Action::Retry { .. } if self.is_given_up() => self.stop(&error),
                Action::Retry { .. } => {
                    if checks == 0 {
                        self.sink.note(format!(
                            "the cache is unavailable, and paths wait for it: {error}"
                        ));
                    }
                    // Refusals count only in a row, and this was none.
                    self.set_unavailable(checks + 1, 0);
                }
                // The server rejects even an empty query, so no path can be published.
                Action::Never | Action::RereadOnce => self.stop(&error),
            },
        }
    }

    fn set_unavailable(&mut self, checks: u32, refused: u32) {
        // The exponent is limited only to keep the shift in range.
        let wait = FIRST_CHECK
            .saturating_mul(1 << checks.min(8))
            .min(self.options.max_check_interval);
        let now = Instant::now();
        // Further failures do not restart the time until publishing is given up.
        self.unavailable_since.get_or_insert(now);
        // A `Retry-After` that ends later has precedence.
        let next = self
            .hold_until
            .map_or(now + wait, |hold_until| hold_until.max(now + wait));
        self.health = Health::Unavailable {
            checks,
            next,
            refused,
        };
    }

    /// Whether the server has been unavailable for too long during the drain, when the job waits for nothing else.
    fn is_given_up(&self) -> bool {
        let waiting = self
            .unavailable_since
            .zip(self.drain_began)
            .map(|(unavailable, drain)| unavailable.max(drain));
        waiting.is_some_and(|since| since.elapsed() > self.options.give_up_after)
    }

    /// Gives up publishing, with one message that has the reason and a hint.
    fn stop(&mut self, error: &Error) {
        // A query that ran beside the preflight may be refused, too.
        if matches!(self.health, Health::Stopped(_)) {
            return;
        }
        let address = self.to.address();
        let advice = match error {
            Error::Token => {
                "Check `ATTIC_TOKEN`: it is one line of plain characters, or a line `write TOKEN` of a tokens file (one with `sha256:` has only the token's hash)"
            }
            Error::Refused {
                status: 401 | 403, ..
            } => {
                "The token in `ATTIC_TOKEN` may not push there: it is missing, has ended, lacks the right `push`, or is for another cache"
            }
            Error::Refused { status: 404, .. } => {
                "Check the name in `attic-cache`, and that the server in `attic-server` has Attic's protocol"
            }
            error if matches!(error.action(), Action::Retry { .. }) => {
                "The cache has been unavailable for too long"
            }
            _ => "Check that `attic-server` is the address of an Attic server itself",
        };
        let text = format!("nothing more is published to {address}: {error}. {advice}.");
        self.sink.degraded("publication", text.clone());
        self.health = Health::Stopped(text);
    }

    fn on_query_result(
        &mut self,
        ids: Vec<(Id, StorePath)>,
        result: Result<Missing, Error>,
        looked: Looked,
    ) {
        // The question whether a path has arrived after all is asked after each try, so that its answer is no news.
        let is_first = ids.iter().any(|(id, _)| self.plan.attempts(*id) == 0);
        if is_first && !matches!(result, Err(Error::Unreachable { .. })) {
            self.stall.on_answer();
        }
        match result {
            Ok(missing) => {
                (self.failure_streak, self.failed_queries) = (0, 0);
                // The journal comes first: whatever happens next, the following job knows these states.
                let (planned, there): (Vec<_>, Vec<_>) =
                    ids.iter().partition(|(_, path)| missing.contains(path));
                self.options
                    .journal
                    .planned(planned.into_iter().map(|(id, _)| self.plan.path(*id)));
                self.options
                    .journal
                    .uploaded(there.into_iter().map(|(id, _)| self.plan.path(*id)));
                let mut there = Vec::new();
                for (id, path) in ids {
                    let is_missing = missing.contains(&path);
                    self.plan.on_query_result(id, is_missing);
                    if !is_missing {
                        there.push(id);
                    }
                }
                self.draw_checks(&there, looked);
            }
            Err(error) => {
                self.retries += 1;
                let too_long = matches!(
                    error,
                    Error::Busy { status: 500, .. } | Error::TooLarge { .. }
                );
                if too_long && ids.len() > MIN_QUERY {
                    // The query may exceed a limit of this server. A shorter one does not count as a retry.
                    self.batch = ids.len() / 4;
                    for (id, _) in ids {
                        self.plan.requery(id);
                    }
                    self.note_arrival();
                    return;
                }
                self.on_query_failed(ids, &error);
                self.on_failure(&error);
            }
        }
    }

    /// Handles a failed query. It is no path's own fault, so paths fail only after many such failures in a row.
    fn on_query_failed(&mut self, ids: Vec<(Id, StorePath)>, error: &Error) {
        let Action::Retry { after, .. } = error.action() else {
            let wait = Instant::now() + self.options.policy.base;
            // After a refusal the next check of the server decides for all paths. Other failures are permanent.
            let stop = error.action() == Action::Stop;
            return ids.into_iter().for_each(|(id, _)| {
                if stop {
                    self.requery_later(id, wait);
                } else {
                    self.fail(id, error);
                }
            });
        };
        // A failed query would fail all its paths, so queries have more tries than uploads. Failures of an unavailable
        // server do not count at all: its checks decide.
        self.failed_queries += u32::from(!error.is_server_unavailable());
        if self.failed_queries > self.options.policy.attempts * 2 {
            return ids.into_iter().for_each(|(id, _)| self.fail(id, error));
        }
        let wait = self
            .options
            .policy
            .wait(self.failed_queries.max(1), after)
            // Beyond the policy's tries the longest wait applies.
            .unwrap_or(self.options.policy.cap);
        for (id, _) in ids {
            self.requery_later(id, Instant::now() + wait);
        }
    }

    /// Queries a path again at `until`.
    fn requery_later(&mut self, id: Id, until: Instant) {
        self.plan.back_off(id, false, false);
        self.backing_off.insert((until, id, true));
    }

    fn on_upload_failed(&mut self, id: Id, error: &Error) {
        self.retries += 1;
        match (error, error.action()) {
            (Error::Local(DumpError::Gone(_)), _) => {
                self.plan.settle(id, Final::Skipped(Skip::Vanished));
            }
            // The second try reads the path from disk again. If the server still receives another NAR, the path fails.
            (_, Action::RereadOnce) if self.plan.reread(id) => self.plan.ready(id),
            (_, Action::Never | Action::RereadOnce) => self.fail(id, error),
            (_, Action::Retry { .. } | Action::Stop) => {
                self.retry_later(id, error);
                self.on_failure(error);
            }
        }
    }

    /// Lets a path back off before its next try, or fails it when its tries are used up.
    fn retry_later(&mut self, id: Id, error: &Error) {
        let (after, recheck) = match error.action() {
            Action::Retry { after, recheck } => (after, recheck),
            Action::Stop => (None, true),
            Action::Never | Action::RereadOnce => return self.fail(id, error),
        };
        // A path that was repaired is known to be there, so that its presence proves nothing.
        let recheck = recheck && !self.plan.is_repair(id);
        // An unavailable server is no path's own fault, so the path keeps its tries.
        let counts = !error.is_server_unavailable();
        let attempts = self.plan.attempts(id).max(1);
        let wait = if counts {
            self.options.policy.wait(attempts, after)
        } else {
            Some(
                after
                    .unwrap_or(self.options.policy.base)
                    .min(self.options.policy.cap),
            )
        };
        match wait {
            None => self.fail(id, error),
            Some(wait) => {
                self.plan.back_off(id, counts, recheck);
                self.backing_off
                    .insert((Instant::now() + wait, id, recheck));
            }
        }
    }

    fn fail(&mut self, id: Id, error: &Error) {
        let attempts = self.plan.attempts(id).max(1);
        self.plan.settle(
            id,
            Final::Failed {
                reason: reason(error),
                attempts,
            },
        );
    }

    /// Whether the server has asked for nothing but pauses for too long during the drain: each one is an answer, and all of
    /// them together take a job as much time as a server that stands still.
    fn is_busy_for_too_long(&self) -> bool {
        let waiting = self.busy_since.zip(self.drain_began);
        waiting.is_some_and(|(busy, drain)| busy.max(drain).elapsed() > self.options.stall.idle)
    }

    /// Draws the conclusions from a failure for the server as a whole.
    fn on_failure(&mut self, error: &Error) {
        self.concurrency.on_error();
        if matches!(error, Error::Busy { .. }) {
            self.busy_since.get_or_insert_with(Instant::now);
            if self.is_busy_for_too_long() {
                return self.stop(error);
            }
        }
        match error {
            Error::Busy {
                retry_after: Some(wait),
                ..
            } => {
                // No server may stop the uploads for longer than the policy allows.
                let until = Instant::now() + (*wait).min(self.options.policy.cap);
                self.hold_until = Some(
                    self.hold_until
                        .map_or(until, |hold_until| hold_until.max(until)),
                );
            }
            // After one success the token is known to be good, so a refusal concerns the one path.
            Error::Refused { .. } | Error::Token => {
                self.refusals += 1;
                if self.refusals >= MAX_REFUSALS && !self.any_sent {
                    return self.stop(error);
                }
            }
            _ => (),
        }
        // These statuses come from a healthy server that is busy.
        let slow_down = matches!(
            error,
            Error::Busy {
                status: 408 | 425 | 429,
                ..
            }
        );
        self.failure_streak += u32::from(!slow_down);
        let unavailable = error.is_server_unavailable()
            || self.failure_streak >= MAX_FAILURE_STREAK
            || matches!(error.action(), Action::Stop);
        if unavailable && matches!(self.health, Health::Available) {
            self.set_unavailable(0, 0);
        }
    }
}

/// An error and its causes in one line.
fn reason(error: &Error) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
