//! The side of the process that has started the proxy: takes in the names, sees to it that the proxy lives, and takes
//! its place for the clients that it leaves waiting.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::daemon_proxy::Shared;
use crate::daemon_proxy::protocol::{Lines, Order, Report};
use crate::daemon_proxy::relay::relay;
use crate::daemon_proxy::server::accept;
use flywheel_sys::process::companion::Companion;

/// How often the proxy is examined.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// A proxy that has left so many pings without an answer hangs.
const PING_LIMIT: u32 = 4;
/// What a proxy that hangs gets to recover. Its clients hang with it: an error is better than to hang for ever.
const HANG_LIMIT: Duration = Duration::from_secs(120);
/// An order is a few bytes: a proxy that does not take it hangs.
const ORDER_LIMIT: Duration = Duration::from_secs(1);
/// A process whose end of the connection is closed has ended or is about to.
const END_LIMIT: Duration = Duration::from_secs(1);

/// From the handle.
pub(super) enum Request {
    /// Answered with whether all names of before are there.
    Flush(oneshot::Sender<bool>),
    Stop,
}

pub(super) struct Supervisor {
    shared: Arc<Shared>,
    companion: Companion,
    reports: Lines,
    orders: OwnedWriteHalf,
    listener: UnixListener,
    flushes: BTreeMap<u64, oneshot::Sender<bool>>,
    last_flush: u64,
    pings: u32,
}

/// What the supervisor waits for.
enum Event {
    Report(Option<Report>),
    Request(Option<Request>),
    PingDue,
}

/// Why the proxy is no longer supervised.
enum End {
    /// It was asked to end, or the handle is gone.
    Wanted,
    /// It has ended by itself, or hangs.
    Failed(&'static str),
}

impl Supervisor {
    pub(super) fn new(
        shared: Arc<Shared>,
        companion: Companion,
        (reports, orders): (Lines, OwnedWriteHalf),
        listener: UnixListener,
    ) -> Self {
        Self {
            shared,
            companion,
            reports,
            orders,
            listener,
            flushes: BTreeMap::new(),
            last_flush: 0,
            pings: 0,
        }
    }

    pub(super) async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let end = self.attend(&mut requests).await;
        if let End::Failed(cause) = end {
            // In this order: whoever points the link to the proxy at the same time then finds the proxy failed.
            self.shared.failed.store(true, Ordering::SeqCst);
            self.shared.point_to_daemon();
            self.flushes.clear();
            self.shared.sink.degraded(
                "publication",
                format!(
                    "the proxy in front of Nix's daemon {cause}: the job's commands reach the daemon directly again, \
                     and a command that was connected may have failed with it. Which paths are the job's own is no \
                     longer known exactly"
                ),
            );
            tokio::select! {
                () = serve_waiting(&self.listener, &self.shared) => (),
                () = kill_if_hung(&mut self.reports, &mut self.companion) => (),
                () = refuse(&mut requests) => (),
            }
        }
        // It is reaped here if it has ended, and by the runtime later otherwise.
        let _ = timeout(END_LIMIT, self.companion.wait()).await;
    }

    async fn attend(&mut self, requests: &mut mpsc::Receiver<Request>) -> End {
        let mut pings = interval(PING_INTERVAL);
        // A machine that was asleep must not look like a proxy that is.
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut stopping = false;
        loop {
            let event = tokio::select! {
                biased;
                report = self.reports.report() => Event::Report(report),
                request = requests.recv(), if !stopping => Event::Request(request),
                _ = pings.tick() => Event::PingDue,
            };
            match event {
                Event::Report(Some(report)) => self.take(report),
                Event::Report(None) if stopping => return End::Wanted,
                Event::Report(None) => return End::Failed("has ended"),
                Event::Request(Some(Request::Flush(answer))) => {
                    self.last_flush += 1;
                    self.flushes.insert(self.last_flush, answer);
                    self.order(Order::Flush(self.last_flush)).await;
                }
                Event::Request(Some(Request::Stop)) => {
                    stopping = true;
                    self.order(Order::End).await;
                }
                Event::Request(None) => return End::Wanted,
                Event::PingDue if self.pings >= PING_LIMIT => return End::Failed("hangs"),
                Event::PingDue => {
                    self.pings += 1;
                    self.order(Order::Ping).await;
                }
            }
        }
    }

    fn take(&mut self, report: Report) {
        match report {
            Report::Named(name) => self.shared.add(&name),
            Report::Flushed(number) => self.answer(number, true),
            Report::Behind(number) => self.answer(number, false),
            Report::Pong => self.pings = 0,
            Report::Incomplete => self.shared.lossy.store(true, Ordering::SeqCst),
            Report::Ready => (),
        }
    }

    fn answer(&mut self, number: u64, flushed: bool) {
        if let Some(answer) = self.flushes.remove(&number) {
            // The receiver is gone once its deadline has passed.
            let _ = answer.send(flushed);
        }
    }

    /// What cannot be sent shows in the proxy's next report, or in its absence.
    async fn order(&mut self, order: Order) {
        let line = order.line();
        let _ = timeout(ORDER_LIMIT, self.orders.write_all(line.as_bytes())).await;
    }
}

/// Serves the clients that still come to the socket, by themselves few. Never ends.
async fn serve_waiting(listener: &UnixListener, shared: &Shared) {
    let found = |name: &[u8]| {
        if let Ok(name) = str::from_utf8(name) {
            shared.add(name);
        }
    };
    let serve = async |client: UnixStream| {
        let scanned = AtomicU64::new(0);
        relay(&client, &scanned, &shared.link.direct, &found).await;
    };
    let mut relays = FuturesUnordered::new();
    loop {
        tokio::select! {
            client = accept(listener) => relays.push(serve(client)),
            Some(()) = relays.next(), if !relays.is_empty() => (),
        }
    }
}

/// Ends a proxy that goes on hanging, and with it the commands that it holds up. Never ends.
async fn kill_if_hung(reports: &mut Lines, companion: &mut Companion) {
    // It gives a report, or its end.
    if timeout(HANG_LIMIT, reports.report()).await.is_err() {
        companion.kill();
    }
    std::future::pending::<()>().await;
}

/// Answers that nothing is complete any more, until the handle is gone or wants the end.
async fn refuse(requests: &mut mpsc::Receiver<Request>) {
    while let Some(Request::Flush(answer)) = requests.recv().await {
        let _ = answer.send(false);
    }
}
