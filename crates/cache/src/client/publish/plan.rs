//! The graph of paths: which must be queried, which may be sent now, which wait for others, and the final state of
//! each. Pure: no clock, no I/O.
//!
//! A path is sent only when everything that it refers to is in the cache, signed upstream, or sent. So the cache never
//! holds a path with an incomplete closure.

use std::collections::{BTreeSet, HashMap, VecDeque};

use crate::client::publish::outcome::{Final, PathOutcome, Served, Skip, Withheld};
use crate::client::publish::upstream::Upstream;
use crate::client::verify::Verdict;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::StorePath;

/// A path's number in the plan, by order of appearance.
pub(super) type Id = usize;

/// From this NAR size on, in bytes, a path is large: few of them are sent at once, so that small ones are not held up.
pub(super) const LARGE: u64 = 16 * 1024 * 1024;

#[derive(Clone, Debug, PartialEq, Eq)]
enum PathState {
    Unqueried,
    /// A query for the path is under way.
    Querying,
    /// The cache lacks the path, and a path that it refers to is not settled.
    Waiting,
    /// The path may be sent.
    Ready,
    Sending,
    /// A try failed, and the next one has to wait.
    BackingOff,
    /// Other paths refer to the path, the cache lacks it, and it was never offered.
    NotOffered,
    Settled(Final),
}

#[derive(Debug)]
struct Node {
    path: StorePath,
    /// `None` until the path is offered.
    info: Option<PathInfo>,
    state: PathState,
    /// References that are not settled well yet.
    waits: usize,
    /// The paths that refer to this one.
    dependents: Vec<Id>,
    /// The path's end, once a reference has failed for good.
    blocked: Option<Final>,
    attempts: u32,
    /// An upload's response was lost. If the cache then has the path, this upload counts as having published it.
    response_lost: bool,
    /// The path has been read from disk a second time.
    reread: bool,
    /// Whether its references are in the graph.
    is_linked: bool,
    /// What a check of the path found that the cache had already.
    checked: Option<Verdict>,
    /// What is wrong with the cache's own copy, if it is sent anew for that.
    damage: Option<String>,
    /// The dependents that were released before the damage was found.
    released: usize,
}

#[derive(Debug, Default)]
pub(super) struct UploadPlan {
    nodes: Vec<Node>,
    index: HashMap<StorePath, Id>,
    /// `None` where everything is sent.
    upstream: Option<Upstream>,
    unqueried: VecDeque<Id>,
    small: BTreeSet<(u64, Id)>,
    large: BTreeSet<(u64, Id)>,
    offered: u64,
    settled: u64,
}

impl UploadPlan {
    /// Skips what upstream has signed.
    pub(super) fn omit(&mut self, upstream: Upstream) {
        self.upstream = Some(upstream);
    }

    /// Adds names of upstream's keys, also for paths that are offered already.
    pub(super) fn omit_names(&mut self, names: impl IntoIterator<Item = String>) {
        let Some(upstream) = &mut self.upstream else {
            return;
        };
        upstream.add_names(names);
        for id in 0..self.nodes.len() {
            let info = self.nodes[id].info.as_ref();
            if let Some(key) = info.and_then(|info| self.upstream_key(info)) {
                self.settle(id, Final::Skipped(Skip::Upstream(key)));
            }
        }
    }

    fn upstream_key(&self, info: &PathInfo) -> Option<String> {
        let upstream = self.upstream.as_ref()?;
        upstream.signer(info).map(str::to_owned)
    }

    /// Adds a path. Offering it again changes nothing. Returns it if it is known already that the cache has it.
    pub(super) fn offer(&mut self, info: PathInfo) -> Option<Id> {
        let id = self.node(&info.path);
        if self.nodes[id].info.is_some() {
            return None;
        }
        self.offered += 1;
        let upstream = self.upstream_key(&info);
        let node = &mut self.nodes[id];
        let derivation = info.path.is_derivation();
        node.info = Some(info);
        // Settled before its offer: a dependent had it queried, and the cache has it.
        if matches!(node.state, PathState::Settled(_)) {
            self.settled += 1;
        } else if let Some(key) = upstream {
            self.settle(id, Final::Skipped(Skip::Upstream(key)));
        } else if derivation && node.dependents.is_empty() {
            self.settle(id, Final::Skipped(Skip::Derivation));
        } else {
            self.add_references(id);
        }
        self.is_already_there(id).then_some(id)
    }

    /// Adds the path's references to the graph; the cache is queried for those that are new.
    fn add_references(&mut self, id: Id) {
        let Some(info) = &self.nodes[id].info else {
            return;
        };
        let own = info.path.clone();
        let references: BTreeSet<StorePath> = info
            .references
            .iter()
            // A path may refer to itself, which is no dependency.
            .filter(|path| **path != own)
            .cloned()
            .collect();
        self.nodes[id].is_linked = true;
        for path in references {
            let reference = self.node(&path);
            self.nodes[reference].dependents.push(id);
            match &self.nodes[reference].state {
                // Nothing has to wait for a path that is there.
                PathState::Settled(end) if end.is_good() => continue,
                // A store derivation is skipped until a path refers to it; now it is needed.
                PathState::Settled(Final::Skipped(Skip::Derivation)) => {
                    self.settled -= 1;
                    self.nodes[reference].state = PathState::Unqueried;
                    self.unqueried.push_back(reference);
                    self.add_references(reference);
                }
                // The path can never be sent, but the cache may already have it, so it is queried all the same.
                PathState::Settled(end) => {
                    let end = blocked_by(&path, end);
                    self.nodes[id].blocked.get_or_insert(end);
                }
                _ => (),
            }
            self.nodes[id].waits += 1;
        }
        // The query for it came back before the offer.
        if self.nodes[id].state == PathState::NotOffered {
            self.on_missing(id);
        }
    }

    fn node(&mut self, path: &StorePath) -> Id {
        if let Some(id) = self.index.get(path) {
            return *id;
        }
        let id = self.nodes.len();
        self.nodes.push(Node {
            path: path.clone(),
            info: None,
            state: PathState::Unqueried,
            waits: 0,
            dependents: Vec::new(),
            blocked: None,
            attempts: 0,
            response_lost: false,
            reread: false,
            is_linked: false,
            checked: None,
            damage: None,
            released: 0,
        });
        self.index.insert(path.clone(), id);
        // Paths that are only referred to are queried, too: what refers to them waits until it is known to be there.
        self.unqueried.push_back(id);
        id
    }

    pub(super) fn path(&self, id: Id) -> &StorePath {
        &self.nodes[id].path
    }

    pub(super) fn unqueried(&self) -> usize {
        self.unqueried.len()
    }

    /// The next paths to query, at most `limit`.
    pub(super) fn next_query(&mut self, limit: usize) -> Vec<(Id, StorePath)> {
        let mut batch = Vec::new();
        while batch.len() < limit {
            let Some(id) = self.unqueried.pop_front() else {
                break;
            };
            // Others were skipped or settled while they were queued.
            if self.nodes[id].state == PathState::Unqueried {
                self.nodes[id].state = PathState::Querying;
                batch.push((id, self.nodes[id].path.clone()));
            }
        }
        batch
    }

    /// Queries a path again: its query failed, or its wait is over.
    pub(super) fn requery(&mut self, id: Id) {
        if matches!(
            self.nodes[id].state,
            PathState::Querying | PathState::BackingOff
        ) {
            self.nodes[id].state = PathState::Unqueried;
            self.unqueried.push_back(id);
        }
    }

    pub(super) fn on_query_result(&mut self, id: Id, is_missing: bool) {
        // The path was settled while the query was under way, for example as signed upstream.
        if self.nodes[id].state != PathState::Querying {
            return;
        }
        if is_missing {
            self.on_missing(id);
        } else if self.is_repair(id) {
            // The damaged copy is what is there.
            self.ready(id);
        } else {
            let end = if self.nodes[id].response_lost {
                Final::Published
            } else {
                Final::AlreadyThere
            };
            self.settle(id, end);
        }
    }

    /// The cache lacks the path. A blocked path ends only here: until the cache has been queried, the path may still
    /// be there.
    fn on_missing(&mut self, id: Id) {
        let node = &mut self.nodes[id];
        if node.info.is_none() {
            node.state = PathState::NotOffered;
        } else if let Some(end) = node.blocked.clone() {
            self.settle(id, end);
        } else if node.waits == 0 {
            self.ready(id);
        } else {
            node.state = PathState::Waiting;
        }
    }

    /// Queues a path to be sent.
    pub(super) fn ready(&mut self, id: Id) {
        let size = self.size(id);
        self.nodes[id].state = PathState::Ready;
        let queue = if size >= LARGE {
            &mut self.large
        } else {
            &mut self.small
        };
        queue.insert((size, id));
    }

    /// Whether a small and whether a large path is ready to be sent.
    pub(super) fn ready_sizes(&self) -> (bool, bool) {
        (!self.small.is_empty(), !self.large.is_empty())
    }

    /// Takes the smallest ready path, of the small or of the large ones.
    pub(super) fn take(&mut self, large: bool) -> Option<(Id, PathInfo)> {
        let queue = if large {
            &mut self.large
        } else {
            &mut self.small
        };
        let (_, id) = queue.pop_first()?;
        self.nodes[id].state = PathState::Sending;
        self.nodes[id].attempts += 1;
        self.nodes[id].info.clone().map(|info| (id, info))
    }

    /// Whether the path was offered, so that what the cache serves can be compared with the store.
    pub(super) fn offered(&self, id: Id) -> Option<&PathInfo> {
        self.nodes[id].info.as_ref()
    }

    /// The offered paths that are settled well: sent, there already, or signed upstream.
    pub(super) fn served(&self) -> Vec<Served> {
        let nodes = self.nodes.iter();
        nodes
            .filter_map(|node| match (&node.state, &node.info) {
                (PathState::Settled(end), Some(info)) if end.is_good() => Some(Served {
                    info: info.clone(),
                    is_upstream: matches!(end, Final::Skipped(_)),
                }),
                _ => None,
            })
            .collect()
    }

    /// Whether the cache had the path already, as far as is known.
    pub(super) fn is_already_there(&self, id: Id) -> bool {
        self.nodes[id].state == PathState::Settled(Final::AlreadyThere)
    }

    /// Whether the path is sent anew because the cache's own copy is damaged.
    pub(super) fn is_repair(&self, id: Id) -> bool {
        self.nodes[id].damage.is_some()
    }

    /// Records what a check of a path found that the cache had already. What is damaged is sent anew.
    pub(super) fn on_checked(&mut self, id: Id, verdict: Verdict) {
        if !self.is_already_there(id) || self.nodes[id].info.is_none() {
            return;
        }
        if let Verdict::Bad(reason) = &verdict {
            self.settled -= 1;
            let node = &mut self.nodes[id];
            node.damage = Some(reason.clone());
            node.released = node.dependents.len();
            node.state = PathState::NotOffered;
            // What it refers to goes first here, too: that the path is there does not mean that its closure is. A path that
            // was there before it was offered has not waited for anything so far.
            if self.nodes[id].is_linked {
                self.on_missing(id);
            } else {
                self.add_references(id);
            }
        }
        self.nodes[id].checked = Some(verdict);
    }

    /// Settles a path that the cache has taken.
    pub(super) fn on_sent(&mut self, id: Id) {
        let end = match &self.nodes[id].damage {
            Some(reason) => Final::Repaired {
                reason: reason.clone(),
            },
            None => Final::Published,
        };
        self.settle(id, end);
    }

    pub(super) fn attempts(&self, id: Id) -> u32 {
        self.nodes[id].attempts
    }

    /// Lets a path wait for its next try. `counts`: whether the failed try counts against the path; `response_lost`:
    /// whether the cache may have stored the path.
    pub(super) fn back_off(&mut self, id: Id, counts: bool, response_lost: bool) {
        let node = &mut self.nodes[id];
        // A query sends nothing, so only an upload can have lost a response.
        node.response_lost |= response_lost && node.state == PathState::Sending;
        // `take` has already counted the try.
        node.attempts -= u32::from(!counts && node.state == PathState::Sending);
        node.state = PathState::BackingOff;
    }

    /// Whether the path may be read from disk again. It may once.
    pub(super) fn reread(&mut self, id: Id) -> bool {
        !std::mem::replace(&mut self.nodes[id].reread, true)
    }

    pub(super) fn is_backing_off(&self, id: Id) -> bool {
        self.nodes[id].state == PathState::BackingOff
    }

    fn size(&self, id: Id) -> u64 {
        self.nodes[id].info.as_ref().map_or(0, |info| info.nar_size)
    }

    /// Settles a path, which may settle or release the paths that refer to it.
    pub(super) fn settle(&mut self, id: Id, end: Final) {
        // A list instead of recursion, which would be as deep as the chain of references.
        let mut work = vec![(id, end)];
        while let Some((id, end)) = work.pop() {
            if matches!(self.nodes[id].state, PathState::Settled(_)) {
                continue;
            }
            // A path that is settled while it is queued must not be sent.
            self.small.remove(&(self.size(id), id));
            self.large.remove(&(self.size(id), id));
            // Progress counts offered paths only, not mere references.
            self.settled += u64::from(self.nodes[id].info.is_some());
            let end = with_damage(end, self.nodes[id].damage.as_deref());
            self.nodes[id].state = PathState::Settled(end.clone());
            let released = self.nodes[id].released;
            for (n, dependent) in self.nodes[id].dependents.clone().into_iter().enumerate() {
                if end.is_good() {
                    // A path that was repaired had released these before, as one that was already there.
                    if n < released {
                        continue;
                    }
                    self.release(dependent);
                } else {
                    let end = blocked_by(&self.nodes[id].path, &end);
                    if self.block(dependent, &end) {
                        work.push((dependent, end));
                    }
                }
            }
        }
    }

    fn release(&mut self, id: Id) {
        let node = &mut self.nodes[id];
        node.waits = node.waits.saturating_sub(1);
        if node.waits == 0 && node.state == PathState::Waiting {
            self.ready(id);
        }
    }

    /// Records that a path can never be sent. Returns whether that settles it now: not before the cache has been
    /// queried, because the path may still be there.
    fn block(&mut self, id: Id, end: &Final) -> bool {
        let node = &mut self.nodes[id];
        node.blocked.get_or_insert_with(|| end.clone());
        node.state == PathState::Waiting
    }

    /// The number of settled paths and of offered paths.
    pub(super) fn progress(&self) -> (u64, u64) {
        (self.settled, self.offered)
    }

    /// Every offered path with its final state. Undecided paths are left for `reason`; those that still wait although
    /// there was enough time (`in_time`) have failed, because a reference was never offered.
    pub(super) fn finish(self, reason: &str, in_time: bool) -> Vec<PathOutcome> {
        let ends: Vec<Final> = self
            .nodes
            .iter()
            .map(|node| self.end(node, reason, in_time))
            .collect();
        let settled = self.nodes.into_iter().zip(ends);
        settled
            .filter_map(|(node, end)| {
                Some(PathOutcome {
                    info: node.info?,
                    end,
                    checked: node.checked,
                })
            })
            .collect()
    }

    fn end(&self, node: &Node, reason: &str, in_time: bool) -> Final {
        match &node.state {
            PathState::Settled(end) => end.clone(),
            PathState::Waiting if in_time => {
                let references = node.info.iter().flat_map(|info| &info.references);
                let foreign = references.filter(|path| {
                    self.index
                        .get(path)
                        .is_some_and(|id| self.nodes[*id].state == PathState::NotOffered)
                });
                let reason = match foreign.into_iter().next() {
                    Some(path) => format!(
                        "it refers to `{path}`, which is neither in the cache nor offered to it"
                    ),
                    None => "something in its closure is neither in the cache nor offered to it"
                        .to_owned(),
                };
                let end = Final::Failed {
                    reason,
                    attempts: 0,
                };
                with_damage(end, node.damage.as_deref())
            }
            _ => with_damage(
                Final::Left {
                    reason: reason.to_owned(),
                },
                node.damage.as_deref(),
            ),
        }
    }
}

/// The end of a path, which names the damage of the cache's own copy where it could not be mended.
fn with_damage(end: Final, damage: Option<&str>) -> Final {
    let Some(damage) = damage else { return end };
    let explain = |reason: String| {
        format!("the cache has it damaged ({damage}), and it was not sent anew: {reason}")
    };
    match end {
        Final::Failed { reason, attempts } => Final::Failed {
            reason: explain(reason),
            attempts,
        },
        Final::Left { reason } => Final::Left {
            reason: explain(reason),
        },
        // Nothing is left here that could mend what the cache serves.
        Final::Skipped(Skip::Vanished) => Final::Failed {
            reason: explain(Skip::Vanished.to_string()),
            attempts: 0,
        },
        end => end,
    }
}

/// The end of a path that refers to `path`, which ended with `end`.
fn blocked_by(path: &StorePath, end: &Final) -> Final {
    // A chain of failures keeps the reason of its first path, because that is the one to act on.
    let reason = match end {
        Final::Withheld(Withheld::Refers(first)) => {
            return Final::Withheld(Withheld::Refers(first.clone()));
        }
        Final::Withheld(Withheld::Found(_)) => {
            return Final::Withheld(Withheld::Refers(path.clone()));
        }
        Final::Failed {
            reason,
            attempts: 0,
        } if reason.starts_with("it refers to") => reason.clone(),
        Final::Skipped(skip) => format!("it refers to `{path}`, which is not published: {skip}"),
        _ => format!("it refers to `{path}`, which could not be published"),
    };
    Final::Failed {
        reason,
        attempts: 0,
    }
}

#[cfg(test)]
mod tests;
