//! The graph of paths: what must be asked about, what may be sent now, what waits for what, and
//! what became of each. Pure: no clock, no I/O.
//!
//! A path is sent only when everything it refers to is in the cache, signed upstream, or sent;
//! so the cache never holds a path whose closure it cannot serve.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use crate::client::publish::outcome::{Final, Settled, Skip, Withheld};
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::StorePath;

/// A path's number in the plan, by order of appearance.
pub(super) type Id = usize;

/// From this NAR size on, in bytes, a path is large: few of them go at once, so that small ones flow.
pub(super) const LARGE: u64 = 16 * 1024 * 1024;

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// The cache is to be asked about it.
    Unasked,
    /// The cache is being asked.
    Asking,
    /// The cache does not have it, and something that it refers to is not settled.
    Waiting,
    /// It may be sent.
    Ready,
    /// It is being sent.
    Sending,
    /// It failed, and rests before the next try.
    Resting,
    /// Only referred to; the cache does not have it, and nobody has offered it.
    Foreign,
    /// It is decided.
    Settled(Final),
}

#[derive(Debug)]
struct Node {
    path: StorePath,
    /// Its facts, once it was offered.
    info: Option<PathInfo>,
    state: State,
    /// References that are not good yet.
    waits: usize,
    dependents: Vec<Id>,
    /// Set when a reference can never be good.
    blocked: Option<Final>,
    attempts: u32,
    /// An attempt ended in the dark, so that "the cache has it" would mean that we have published it.
    in_the_dark: bool,
    reread: bool,
}

#[derive(Debug, Default)]
pub(super) struct Plan {
    nodes: Vec<Node>,
    index: HashMap<StorePath, Id>,
    upstream: HashSet<String>,
    unasked: VecDeque<Id>,
    small: BTreeSet<(u64, Id)>,
    large: BTreeSet<(u64, Id)>,
    offered: u64,
    settled: u64,
}

impl Plan {
    /// Names of keys whose signature makes a path an upstream cache's business.
    pub(super) fn trust_upstream(&mut self, keys: impl IntoIterator<Item = String>) {
        self.upstream.extend(keys);
    }

    /// Takes a path in. Offering it again changes nothing.
    pub(super) fn offer(&mut self, info: PathInfo) {
        let id = self.node(&info.path);
        if self.nodes[id].info.is_some() {
            return;
        }
        self.offered += 1;
        let node = &mut self.nodes[id];
        let upstream = info
            .signatures
            .iter()
            .filter_map(|signature| signature.split(':').next());
        let upstream = upstream
            .map(str::to_owned)
            .find(|key| self.upstream.contains(key));
        let derivation = info.path.is_derivation();
        node.info = Some(info);
        if matches!(node.state, State::Settled(_)) {
            self.settled += 1;
        } else if let Some(key) = upstream {
            self.settle(id, Final::Skipped(Skip::Upstream(key)));
        } else if derivation && node.dependents.is_empty() {
            self.settle(id, Final::Skipped(Skip::Derivation));
        } else {
            self.want(id);
        }
    }

    /// Has the cache asked about a path, and its references taken in.
    fn want(&mut self, id: Id) {
        let Some(info) = &self.nodes[id].info else {
            return;
        };
        let own = info.path.clone();
        let references: BTreeSet<StorePath> = info
            .references
            .iter()
            .filter(|path| **path != own)
            .cloned()
            .collect();
        for path in references {
            let reference = self.node(&path);
            self.nodes[reference].dependents.push(id);
            match &self.nodes[reference].state {
                State::Settled(end) if end.is_good() => continue,
                State::Settled(Final::Skipped(Skip::Derivation)) => {
                    // It is needed after all.
                    self.settled -= 1;
                    self.nodes[reference].state = State::Unasked;
                    self.unasked.push_back(reference);
                    self.want(reference);
                }
                State::Settled(end) => {
                    let end = blocked_by(&path, end);
                    self.nodes[id].blocked.get_or_insert(end);
                }
                _ => (),
            }
            self.nodes[id].waits += 1;
        }
        if self.nodes[id].state == State::Foreign {
            self.missing(id);
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
            state: State::Unasked,
            waits: 0,
            dependents: Vec::new(),
            blocked: None,
            attempts: 0,
            in_the_dark: false,
            reread: false,
        });
        self.index.insert(path.clone(), id);
        self.unasked.push_back(id);
        id
    }

    /// The path of this number.
    pub(super) fn path(&self, id: Id) -> &StorePath {
        &self.nodes[id].path
    }

    /// How many paths the cache is to be asked about.
    pub(super) fn unasked(&self) -> usize {
        self.unasked.len()
    }

    /// The next paths to ask about, at most `most`.
    pub(super) fn ask(&mut self, most: usize) -> Vec<(Id, StorePath)> {
        let mut batch = Vec::new();
        while batch.len() < most {
            let Some(id) = self.unasked.pop_front() else {
                break;
            };
            // Skipped or settled meanwhile.
            if self.nodes[id].state == State::Unasked {
                self.nodes[id].state = State::Asking;
                batch.push((id, self.nodes[id].path.clone()));
            }
        }
        batch
    }

    /// Asks again about a path: an answer did not come, or a rest is over.
    pub(super) fn ask_again(&mut self, id: Id) {
        if matches!(self.nodes[id].state, State::Asking | State::Resting) {
            self.nodes[id].state = State::Unasked;
            self.unasked.push_back(id);
        }
    }

    /// The cache's answer about a path.
    pub(super) fn answered(&mut self, id: Id, is_missing: bool) {
        if self.nodes[id].state != State::Asking {
            return;
        }
        if is_missing {
            self.missing(id);
        } else {
            let end = if self.nodes[id].in_the_dark {
                Final::Published
            } else {
                Final::AlreadyThere
            };
            self.settle(id, end);
        }
    }

    fn missing(&mut self, id: Id) {
        let node = &mut self.nodes[id];
        if node.info.is_none() {
            node.state = State::Foreign;
        } else if let Some(end) = node.blocked.clone() {
            self.settle(id, end);
        } else if node.waits == 0 {
            self.ready(id);
        } else {
            node.state = State::Waiting;
        }
    }

    /// Puts a path where it can be picked.
    pub(super) fn ready(&mut self, id: Id) {
        let size = self.size(id);
        self.nodes[id].state = State::Ready;
        let queue = if size >= LARGE {
            &mut self.large
        } else {
            &mut self.small
        };
        queue.insert((size, id));
    }

    /// Whether a path is waiting to be sent, small and large.
    pub(super) fn ready_sizes(&self) -> (bool, bool) {
        (!self.small.is_empty(), !self.large.is_empty())
    }

    /// Takes the smallest of the small or of the large paths, to be sent.
    pub(super) fn take(&mut self, large: bool) -> Option<(Id, PathInfo)> {
        let queue = if large {
            &mut self.large
        } else {
            &mut self.small
        };
        let (_, id) = queue.pop_first()?;
        self.nodes[id].state = State::Sending;
        self.nodes[id].attempts += 1;
        self.nodes[id].info.clone().map(|info| (id, info))
    }

    /// Tries so far.
    pub(super) fn attempts(&self, id: Id) -> u32 {
        self.nodes[id].attempts
    }

    /// Lets a path rest. `counts`: whether the try was its own fault; `in_the_dark`: whether the
    /// cache may have taken it.
    pub(super) fn rest(&mut self, id: Id, counts: bool, in_the_dark: bool) {
        let node = &mut self.nodes[id];
        node.in_the_dark |= in_the_dark && node.state == State::Sending;
        node.attempts -= u32::from(!counts && node.state == State::Sending);
        node.state = State::Resting;
    }

    /// Whether a path's fresh reading is still to be had; it is had once.
    pub(super) fn reread(&mut self, id: Id) -> bool {
        !std::mem::replace(&mut self.nodes[id].reread, true)
    }

    /// Whether it rests.
    pub(super) fn is_resting(&self, id: Id) -> bool {
        self.nodes[id].state == State::Resting
    }

    fn size(&self, id: Id) -> u64 {
        self.nodes[id].info.as_ref().map_or(0, |info| info.nar_size)
    }

    /// Decides a path, and with it what refers to it.
    pub(super) fn settle(&mut self, id: Id, end: Final) {
        let mut work = vec![(id, end)];
        while let Some((id, end)) = work.pop() {
            if matches!(self.nodes[id].state, State::Settled(_)) {
                continue;
            }
            self.small.remove(&(self.size(id), id));
            self.large.remove(&(self.size(id), id));
            self.settled += u64::from(self.nodes[id].info.is_some());
            self.nodes[id].state = State::Settled(end.clone());
            for dependent in self.nodes[id].dependents.clone() {
                if end.is_good() {
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
        if node.waits == 0 && node.state == State::Waiting {
            self.ready(id);
        }
    }

    /// Notes that a path can never be sent; says whether that decides it now. While the cache has
    /// not been asked it may still turn out to be there.
    fn block(&mut self, id: Id, end: &Final) -> bool {
        let node = &mut self.nodes[id];
        node.blocked.get_or_insert_with(|| end.clone());
        node.state == State::Waiting
    }

    /// Paths settled, and paths offered.
    pub(super) fn progress(&self) -> (u64, u64) {
        (self.settled, self.offered)
    }

    /// Every offered path with what became of it. What is undecided is left for `reason`, or
    /// failed for want of a reference that nobody offered.
    pub(super) fn finish(self, reason: &str, in_time: bool) -> Vec<Settled> {
        let ends: Vec<Final> = self
            .nodes
            .iter()
            .map(|node| self.end(node, reason, in_time))
            .collect();
        let settled = self.nodes.into_iter().zip(ends);
        settled
            .filter_map(|(node, end)| node.info.map(|info| Settled { info, end }))
            .collect()
    }

    fn end(&self, node: &Node, reason: &str, in_time: bool) -> Final {
        match &node.state {
            State::Settled(end) => end.clone(),
            State::Waiting if in_time => {
                let references = node.info.iter().flat_map(|info| &info.references);
                let foreign = references.filter(|path| {
                    self.index
                        .get(path)
                        .is_some_and(|id| self.nodes[*id].state == State::Foreign)
                });
                let reason = match foreign.into_iter().next() {
                    Some(path) => format!(
                        "it refers to `{path}`, which is neither in the cache nor offered to it"
                    ),
                    None => "something in its closure is neither in the cache nor offered to it"
                        .to_owned(),
                };
                Final::Failed {
                    reason,
                    attempts: 0,
                }
            }
            _ => Final::Left {
                reason: reason.to_owned(),
            },
        }
    }
}

/// How a path ends that refers to this one, which ended so.
fn blocked_by(path: &StorePath, end: &Final) -> Final {
    // The reason of a whole chain is the first one: it is the one to act on.
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
