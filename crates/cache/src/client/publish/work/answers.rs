//! What the publisher makes of each answer: what is settled, what rests, and whether the server is away.

use std::time::Duration;

use tokio::time::Instant;

use crate::client::attic::{Action, CacheConfig, Error, Uploaded};
use crate::client::publish::outcome::{Final, Skip, Withheld};
use crate::client::publish::plan::{Id, LARGE};
use crate::client::publish::work::{Done, Health, Missing, Work};
use flywheel_nix::nar::DumpError;
use flywheel_nix::store_path::StorePath;

/// A question of fewer paths that still fails is not too long for the server.
const SHORTEST: usize = 16;
/// So many failures in a row, of whatever paths, mean that the server is away.
const STREAK: u32 = 3;
/// So many refusals one after the other mean it.
const REFUSALS: u32 = 3;
/// The first look at a server that went away.
const FIRST_VISIT: Duration = Duration::from_millis(250);
/// The time of an upload up to this size, in bytes, says something of the server and not of the line.
const SMALL: u64 = 1024 * 1024;

impl Work {
    pub(super) fn done(&mut self, done: Done) {
        match done {
            Done::Preflight { config, may_push } => {
                self.asking = false;
                self.greeted = !matches!(&may_push, Err(error) if matches!(error.action(), Action::Again { .. }));
                self.visited(may_push, true);
                if self.greeted {
                    self.greet(config);
                    let early = std::mem::take(&mut self.early);
                    self.take_in(early);
                }
            }
            Done::Visited(answer) => {
                self.asking = false;
                self.visited(answer, false);
            }
            Done::Asked { ids, answer } => {
                self.asking = false;
                self.asked(ids, answer);
            }
            Done::Kept { id, size, findings } => {
                self.sending -= 1;
                self.sending_large -= usize::from(size >= LARGE);
                self.plan
                    .settle(id, Final::Withheld(Withheld::Found(findings)));
            }
            Done::Sent {
                id,
                size,
                took,
                answer,
            } => {
                self.sending -= 1;
                self.sending_large -= usize::from(size >= LARGE);
                match answer {
                    Ok(Uploaded::Stored | Uploaded::Deduplicated) => {
                        (self.streak, self.refusals, self.any_sent) = (0, 0, true);
                        self.pace.went_well(took, size <= SMALL);
                        self.options.journal.uploaded([self.plan.path(id)]);
                        self.plan.settle(id, Final::Published);
                    }
                    Err(error) => self.unsent(id, &error),
                }
            }
        }
        self.tell(false);
    }

    /// What the cache says of itself. A token that may only push is not told: that is no matter.
    fn greet(&mut self, config: Result<Option<CacheConfig>, Error>) {
        let Ok(Some(config)) = config else { return };
        if let Some(endpoint) = self.to.endpoint() {
            let server = flywheel_sys::http::redact(&endpoint.server);
            for host in config.strangers(endpoint) {
                self.sink.note(format!(
                    "the cache names `{host}` as its address; Flywheel stays with {server}"
                ));
            }
        }
        if self.to.leaves_upstream_out() {
            self.plan.trust_upstream(config.upstream_keys);
        }
    }

    /// A look at the server that was away, or the first one.
    fn visited(&mut self, answer: Result<(), Error>, first: bool) {
        let (visits, refused) = match self.health {
            Health::Away {
                visits, refused, ..
            } => (visits, refused),
            Health::Stopped(_) => return,
            _ => (0, 0),
        };
        match answer {
            Ok(()) => {
                if visits > 0 {
                    self.sink.note("the cache answers again");
                }
                self.health = Health::Well;
                self.away_since = None;
                self.streak = 0;
            }
            Err(error) => match error.action() {
                // Once more, unless it is the first word: a proxy answers 404 while the server behind it starts.
                Action::Stop if first || refused > 0 => self.stop(&error),
                Action::Stop => self.away(visits + 1, refused + 1),
                Action::Again { .. } if self.is_given_up() => self.stop(&error),
                Action::Again { .. } => {
                    if visits == 0 {
                        self.sink
                            .note(format!("the cache is away, paths wait for it: {error}"));
                    }
                    self.away(visits + 1, 0);
                }
                Action::Never | Action::RereadOnce => self.stop(&error),
            },
        }
    }

    fn away(&mut self, visits: u32, refused: u32) {
        let wait = FIRST_VISIT
            .saturating_mul(1 << visits.min(8))
            .min(self.options.revisit);
        let now = Instant::now();
        self.away_since.get_or_insert(now);
        let next = self.hold.map_or(now + wait, |hold| hold.max(now + wait));
        self.health = Health::Away {
            visits,
            next,
            refused,
        };
    }

    /// Whether the server has been away too long for a job that waits for nothing else.
    fn is_given_up(&self) -> bool {
        let waiting = self
            .away_since
            .zip(self.drain_began)
            .map(|(away, drain)| away.max(drain));
        waiting.is_some_and(|since| since.elapsed() > self.options.give_up)
    }

    /// Gives publishing up, with one message that says why and what to do.
    fn stop(&mut self, error: &Error) {
        let address = self.to.address();
        let advice = match error {
            Error::Token => "Check `ATTIC_TOKEN`: it is one line of plain characters",
            Error::Refused {
                status: 401 | 403, ..
            } => {
                "The token in `ATTIC_TOKEN` may not push there: it is missing, has ended, lacks the right `push`, or is for another cache"
            }
            Error::Refused { status: 404, .. } => {
                "Check the name in `attic-cache`, and that `attic-server` speaks Attic's protocol"
            }
            error if matches!(error.action(), Action::Again { .. }) => {
                "The cache has been away for too long"
            }
            _ => "Check that `attic-server` is the address of an Attic server itself",
        };
        let text = format!("nothing more is published to {address}: {error}. {advice}.");
        self.sink.degraded("publication", text.clone());
        self.health = Health::Stopped(text);
    }

    fn asked(&mut self, ids: Vec<(Id, StorePath)>, answer: Result<Missing, Error>) {
        match answer {
            Ok(missing) => {
                (self.streak, self.unanswered) = (0, 0);
                let (planned, there): (Vec<_>, Vec<_>) =
                    ids.iter().partition(|(_, path)| missing.contains(path));
                self.options
                    .journal
                    .planned(planned.into_iter().map(|(id, _)| self.plan.path(*id)));
                self.options
                    .journal
                    .uploaded(there.into_iter().map(|(id, _)| self.plan.path(*id)));
                for (id, path) in ids {
                    self.plan.answered(id, missing.contains(&path));
                }
            }
            Err(error) => {
                self.retries += 1;
                let too_long = matches!(
                    error,
                    Error::Busy { status: 500, .. } | Error::TooLarge { .. }
                );
                if too_long && ids.len() > SHORTEST {
                    // Servers have limits of their own; a shorter question is no second try.
                    self.batch = ids.len() / 4;
                    for (id, _) in ids {
                        self.plan.ask_again(id);
                    }
                    self.came_now();
                    return;
                }
                self.unanswered(ids, &error);
                self.trouble(&error);
            }
        }
    }

    /// A question has failed, which is no path's own fault; but not for ever.
    fn unanswered(&mut self, ids: Vec<(Id, StorePath)>, error: &Error) {
        let Action::Again { after, .. } = error.action() else {
            let wait = Instant::now() + self.options.policy.base;
            // Refused: the next visit decides for all of them. Anything else will not get better.
            let stop = error.action() == Action::Stop;
            return ids.into_iter().for_each(|(id, _)| {
                if stop {
                    self.rest(id, wait);
                } else {
                    self.fail(id, error);
                }
            });
        };
        self.unanswered += u32::from(!error.server_is_away());
        if self.unanswered > self.options.policy.attempts * 2 {
            return ids.into_iter().for_each(|(id, _)| self.fail(id, error));
        }
        let wait = self
            .options
            .policy
            .wait(self.unanswered.max(1), after)
            .unwrap_or(self.options.policy.cap);
        for (id, _) in ids {
            self.rest(id, Instant::now() + wait);
        }
    }

    /// Lets a path be asked about again, then.
    fn rest(&mut self, id: Id, until: Instant) {
        self.plan.rest(id, false, false);
        self.resting.insert((until, id, true));
    }

    /// An upload has failed.
    fn unsent(&mut self, id: Id, error: &Error) {
        self.retries += 1;
        match (error, error.action()) {
            (Error::Local(DumpError::Gone(_)), _) => {
                self.plan.settle(id, Final::Skipped(Skip::Vanished));
            }
            (_, Action::RereadOnce) if self.plan.reread(id) => self.plan.ready(id),
            (_, Action::Never | Action::RereadOnce) => self.fail(id, error),
            (_, Action::Again { .. } | Action::Stop) => {
                self.unsure(id, error);
                self.trouble(error);
            }
        }
    }

    /// Lets a path rest that may fare better later, or fails it when its tries are used up.
    fn unsure(&mut self, id: Id, error: &Error) {
        let (after, ask_first) = match error.action() {
            Action::Again { after, ask_first } => (after, ask_first),
            Action::Stop => (None, true),
            Action::Never | Action::RereadOnce => return self.fail(id, error),
        };
        // A server that is away is no path's own fault: its tries are kept for when it is back.
        let counts = !error.server_is_away();
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
                self.plan.rest(id, counts, ask_first);
                self.resting.insert((Instant::now() + wait, id, ask_first));
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

    /// What a failure says of the server as a whole.
    fn trouble(&mut self, error: &Error) {
        self.pace.trouble();
        match error {
            Error::Busy {
                retry_after: Some(wait),
                ..
            } => {
                let until = Instant::now() + (*wait).min(self.options.policy.cap);
                self.hold = Some(self.hold.map_or(until, |hold| hold.max(until)));
            }
            Error::Refused { .. } | Error::Token => {
                self.refusals += 1;
                if self.refusals >= REFUSALS && !self.any_sent {
                    return self.stop(error);
                }
            }
            _ => (),
        }
        let slow_down = matches!(
            error,
            Error::Busy {
                status: 408 | 425 | 429,
                ..
            }
        );
        self.streak += u32::from(!slow_down);
        let away = error.server_is_away()
            || self.streak >= STREAK
            || matches!(error.action(), Action::Stop);
        if away && matches!(self.health, Health::Well) {
            self.away(0, 0);
        }
    }
}

/// An error with its causes, in one line.
fn reason(error: &Error) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
