//! The slots for a server's connections: how many there are in all and for one peer, and which connection gives its
//! slot to a newcomer. Knows neither sockets nor HTTP.
//!
//! A connection without a request gives way: whoever only holds connections open locks nobody out. Of several, those go
//! first that have had their last response, then one of the peer with the most, and of those the one that has been
//! without a request for longest.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

/// Connections that have lost their places and are about to end, on top of those that have one.
const ENDING: usize = 64;
/// A client that has taken nothing of a response for this long gives way to one that asks for something.
const STALLED: Duration = Duration::from_secs(5);
/// Time to wait for a place before looking again: nothing signals that a client has stalled for long enough.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Whose connection it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Peer {
    Address(IpAddr),
    /// A process that has joined the folder's server, by its number.
    Guest(u64),
    /// A process that has not said which one it is.
    Unknown,
}

impl Peer {
    /// One network of IPv6 is one peer: its host may use any address in it.
    pub(crate) fn new(address: IpAddr) -> Self {
        Self::Address(match address.to_canonical() {
            IpAddr::V4(address) => address.into(),
            IpAddr::V6(address) => {
                Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into()
            }
        })
    }
}

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activity {
    /// It has had its last response since then, and is about to be closed.
    Ending(Instant),
    /// It has no request since then.
    Idle(Instant),
    /// Its request waits since then, because its peer has as many as it may.
    Waiting(Instant),
    /// A request is being answered.
    Busy,
    /// A request is being answered, and the client has taken nothing since then.
    Stalled(Instant),
}

#[derive(Debug)]
struct Entry {
    peer: Peer,
    activity: Activity,
    /// Whether it counts as busy whatever it does.
    kept: bool,
    evicted: CancellationToken,
}

#[derive(Debug, Default)]
struct Table {
    last: u64,
    entries: HashMap<u64, Entry>,
    /// The places for requests of each peer that has connections.
    turns: HashMap<Peer, Arc<Semaphore>>,
}

/// All places of one listener.
#[derive(Debug)]
pub(crate) struct ConnectionLimit {
    limit: usize,
    per_peer: usize,
    table: Mutex<Table>,
    /// One for each connection that has not ended, with or without a place.
    all: Arc<Semaphore>,
    /// Signalled when a connection ends or becomes idle.
    freed: Notify,
}

/// One connection's place. Dropping it frees the place.
#[derive(Debug)]
pub(crate) struct ConnectionSlot {
    owner: Arc<ConnectionLimit>,
    number: u64,
    evicted: CancellationToken,
    has_answered: AtomicBool,
    _one: OwnedSemaphorePermit,
}

impl ConnectionLimit {
    /// `limit` in all, `per_peer` with a request at a time for one peer.
    pub(crate) fn new(limit: usize, per_peer: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            per_peer,
            table: Mutex::default(),
            all: Arc::new(Semaphore::new(limit + ENDING)),
            freed: Notify::new(),
        })
    }

    /// Waits until a newcomer would get a place.
    pub(crate) async fn available(self: &Arc<Self>) -> OwnedSemaphorePermit {
        let all = Arc::clone(&self.all).acquire_owned();
        let one = all.await.expect("the semaphore is never closed");
        while !self.has_place() {
            // A signal that comes before the wait is kept for it.
            let _ = timeout(LOOK_AGAIN, self.freed.notified()).await;
        }
        one
    }

    fn has_place(&self) -> bool {
        let table = self.lock();
        table.entries.len() < self.limit || table.victim(None).is_some()
    }

    /// Gives a place to a newcomer, and takes it from another connection if it must.
    pub(crate) fn take(self: &Arc<Self>, one: OwnedSemaphorePermit, peer: Peer) -> ConnectionSlot {
        let mut table = self.lock();
        if table.entries.len() >= self.limit
            && let Some(victim) = table.victim(None)
        {
            table.evict(victim);
        }
        table.last += 1;
        let (number, evicted) = (table.last, CancellationToken::new());
        let entry = Entry {
            peer,
            activity: Activity::Idle(Instant::now()),
            kept: false,
            evicted: evicted.clone(),
        };
        table.entries.insert(number, entry);
        table.bound(peer, self.per_peer, number);
        drop(table);
        ConnectionSlot {
            owner: Arc::clone(self),
            number,
            evicted,
            has_answered: AtomicBool::new(false),
            _one: one,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        // A panic cannot leave the table half-changed.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// The connection that gives way first, of one peer or of all.
    fn victim(&self, of: Option<Peer>) -> Option<u64> {
        let mut counts: HashMap<Peer, usize> = HashMap::new();
        for entry in self.entries.values() {
            *counts.entry(entry.peer).or_default() += 1;
        }
        let now = Instant::now();
        let candidates = self.entries.iter().filter_map(|(number, entry)| {
            let (class, since) = match entry.activity {
                _ if entry.kept || of.is_some_and(|of| of != entry.peer) => return None,
                Activity::Ending(since) => (0, since),
                Activity::Idle(since) => (1, since),
                // Its peer's other connections are no better.
                Activity::Waiting(since) if of.is_none() => (2, since),
                Activity::Stalled(since) if now.duration_since(since) >= STALLED => (2, since),
                _ => return None,
            };
            let count = counts.get(&entry.peer).copied().unwrap_or_default();
            Some(((class, usize::MAX - count, since, *number), *number))
        });
        let first = candidates.min_by_key(|(rank, _)| *rank);
        first.map(|(_, number)| number)
    }

    fn evict(&mut self, number: u64) {
        if let Some(evicted) = self.remove(number) {
            evicted.cancel();
        }
    }

    fn remove(&mut self, number: u64) -> Option<CancellationToken> {
        let entry = self.entries.remove(&number)?;
        // A peer is forgotten with its last connection.
        if self.count(entry.peer) == 0 {
            self.turns.remove(&entry.peer);
        }
        Some(entry.evicted)
    }

    /// Evicts an idle connection of a peer that has more than its share, but not the newcomer.
    fn bound(&mut self, peer: Peer, limit: usize, newcomer: u64) {
        if self.count(peer) > limit
            && let Some(victim) = self.victim(Some(peer))
            && victim != newcomer
        {
            self.evict(victim);
        }
    }

    fn count(&self, peer: Peer) -> usize {
        let of_peer = |entry: &&Entry| entry.peer == peer;
        self.entries.values().filter(of_peer).count()
    }
}

impl ConnectionSlot {
    /// Resolves when the place is given to another connection.
    pub(crate) async fn evicted(&self) {
        self.evicted.cancelled().await;
    }

    /// The connection turned out to be this peer's.
    pub(crate) fn belongs_to(&self, peer: Peer) {
        let mut table = self.owner.lock();
        if let Some(entry) = table.entries.get_mut(&self.number) {
            entry.peer = peer;
        }
        table.bound(peer, self.owner.per_peer, self.number);
    }

    /// Whether another process judges if the connection is idle. If not, its time without a request begins now.
    pub(crate) fn keep(&self, kept: bool) {
        if let Some(entry) = self.owner.lock().entries.get_mut(&self.number) {
            entry.kept = kept;
            entry.activity = Activity::Idle(Instant::now());
        }
        if !kept {
            self.owner.freed.notify_one();
        }
    }

    /// Whether a request has been answered on this connection, or is being answered.
    pub(crate) fn has_answered(&self) -> bool {
        self.has_answered.load(Ordering::Relaxed)
    }

    /// A request has come: waits for one of the peer's places for requests. It ends when the value is dropped. `None` if
    /// the connection has just lost its slot; what has come by then may be answered all the same.
    pub(crate) async fn begin(self: &Arc<Self>) -> Option<Answering> {
        let turns = {
            let mut table = self.owner.lock();
            let peer = table.entries.get(&self.number)?.peer;
            let new = || Arc::new(Semaphore::new(self.owner.per_peer));
            Arc::clone(table.turns.entry(peer).or_insert_with(new))
        };
        let turn = match Arc::clone(&turns).try_acquire_owned() {
            Ok(turn) => turn,
            Err(_) => {
                self.set(Activity::Waiting(Instant::now()));
                turns.acquire_owned().await.ok()?
            }
        };
        self.has_answered.store(true, Ordering::Relaxed);
        self.set(Activity::Busy);
        Some(Answering {
            slot: Arc::clone(self),
            is_last: false,
            _turn: turn,
        })
    }

    /// The client takes nothing of the response, or goes on taking it.
    pub(crate) fn stalled(&self, since: Option<Instant>) {
        let mut table = self.owner.lock();
        if let Some(entry) = table.entries.get_mut(&self.number)
            && matches!(entry.activity, Activity::Busy | Activity::Stalled(_))
        {
            entry.activity = since.map_or(Activity::Busy, Activity::Stalled);
        }
    }

    fn set(&self, activity: Activity) {
        if let Some(entry) = self.owner.lock().entries.get_mut(&self.number) {
            entry.activity = activity;
        }
    }
}

/// A request that is being answered.
#[derive(Debug)]
pub(crate) struct Answering {
    slot: Arc<ConnectionSlot>,
    is_last: bool,
    _turn: OwnedSemaphorePermit,
}

impl Answering {
    /// The connection is closed after this request.
    pub(crate) fn mark_last(&mut self) {
        self.is_last = true;
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        let now = Instant::now();
        self.slot.set(if self.is_last {
            Activity::Ending(now)
        } else {
            Activity::Idle(now)
        });
        self.slot.owner.freed.notify_one();
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.owner.lock().remove(self.number);
        self.owner.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 4;

    fn peer(n: u8) -> Peer {
        Peer::Address([127, 0, 0, n].into())
    }

    async fn slot(all: &Arc<ConnectionLimit>, n: u8) -> Arc<ConnectionSlot> {
        let one = all.available().await;
        Arc::new(all.take(one, peer(n)))
    }

    /// Whether something does not come, for a short while.
    async fn is_pending<T>(what: impl Future<Output = T>) -> bool {
        timeout(Duration::from_millis(20), what).await.is_err()
    }

    fn evicted(all: &[Arc<ConnectionSlot>]) -> Vec<usize> {
        (0..all.len())
            .filter(|n| all[*n].evicted.is_cancelled())
            .collect()
    }

    #[test]
    fn the_addresses_of_one_host_are_one_peer() {
        let peer = |text: &str| Peer::new(text.parse().expect("an address"));
        assert_eq!(peer("2001:db8::1"), peer("2001:db8::ffff:1"));
        assert_ne!(peer("2001:db8::1"), peer("2001:db8:0:1::1"));
        assert_eq!(peer("::ffff:127.0.0.1"), peer("127.0.0.1"));
        assert_ne!(peer("127.0.0.2"), peer("127.0.0.1"));
    }

    #[tokio::test]
    async fn the_oldest_idle_connection_of_the_peer_with_the_most_gives_way() {
        let all = ConnectionLimit::new(LIMIT, LIMIT);
        let mut taken = Vec::new();
        for n in [1, 2, 2, 3] {
            taken.push(slot(&all, n).await);
        }
        assert_eq!(evicted(&taken), [0; 0]);
        taken.push(slot(&all, 4).await);
        assert_eq!(evicted(&taken), [1], "the peer with two, its older one");
        taken.push(slot(&all, 5).await);
        assert_eq!(evicted(&taken), [0, 1], "all have one, so the oldest");
        // One that is about to be closed goes before all others.
        let mut last = taken[5].begin().await.expect("it has its slot");
        last.mark_last();
        drop(last);
        taken.push(slot(&all, 5).await);
        assert_eq!(evicted(&taken), [0, 1, 5]);
        taken.remove(5);
        // Ended connections free places, so nobody else has to go.
        taken.drain(..3);
        taken.push(slot(&all, 6).await);
        assert_eq!(evicted(&taken), [0; 0]);
    }

    #[tokio::test]
    async fn a_connection_with_a_request_keeps_its_place() {
        let all = ConnectionLimit::new(LIMIT, LIMIT);
        let (mut taken, mut requests) = (Vec::new(), Vec::new());
        for _ in 0..LIMIT {
            let one = slot(&all, 1).await;
            requests.push(one.begin().await);
            taken.push(one);
        }
        assert!(is_pending(all.available()).await, "none is idle");
        drop(requests.remove(2));
        taken.push(slot(&all, 2).await);
        assert_eq!(evicted(&taken), [2]);
        // A client that reads nothing is no better than one that asks nothing.
        requests.push(taken[4].begin().await);
        let long_ago = Instant::now().checked_sub(STALLED);
        taken[3].stalled(long_ago);
        taken[1].stalled(Some(Instant::now()));
        taken.push(slot(&all, 2).await);
        assert_eq!(evicted(&taken), [2, 3]);
        taken[5].keep(true);
        assert!(
            is_pending(all.available()).await,
            "another process judges it"
        );
    }

    #[tokio::test]
    async fn a_peer_has_no_more_requests_than_its_share() {
        let all = ConnectionLimit::new(LIMIT, 2);
        let mut taken = Vec::new();
        for _ in 0..3 {
            taken.push(slot(&all, 1).await);
        }
        assert_eq!(evicted(&taken), [0], "idle beyond the share");
        let first = taken[1].begin().await.expect("the first");
        let _second = taken[2].begin().await.expect("the second");
        taken.push(slot(&all, 1).await);
        assert!(is_pending(taken[3].begin()).await, "its share is in use");
        taken.push(slot(&all, 1).await);
        assert_eq!(evicted(&taken), [0], "a request that waits is a request");
        let other = slot(&all, 2).await;
        assert!(other.begin().await.is_some(), "others have their own");
        drop(first);
        assert!(taken[3].begin().await.is_some());
    }
}
