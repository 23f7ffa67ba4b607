//! A process's place at its folder: it holds the lock and serves the folder itself, or it is a guest of the process
//! that does, and takes the folder over when that one ends. The address that its clients know stays the same.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::header;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::server::connection;
use crate::server::connection_limit::ConnectionSlot;
use crate::server::error::ErrorResponse;
use crate::server::folder::{Folder, FolderError, Layout};
use crate::server::gc;
use crate::server::guest::{self, Guest, JoinError, Left, Seat};
use crate::server::host::{self, RouterOf};
use crate::server::live_tokens::{self, LiveTokens};
use crate::server::state::ServerState;
use crate::server::store::Store;
use crate::server::terms::Terms;
use crate::server::wire;
use flywheel_core::progress::Sink;

/// Interval between two syncs: uploads are on disk this long after their arrival, plus the time of
/// the sync itself.
const SYNC_INTERVAL: Duration = Duration::from_secs(5);
/// Time limit for the last sync when the server stops.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
/// Time that open requests get to finish after `stop`.
pub(crate) const STOP_GRACE: Duration = Duration::from_secs(3);
/// How long a start waits for a process that holds the lock and does not listen: it may be starting or ending.
const START_LIMIT: Duration = Duration::from_secs(5);
/// How long a client waits for a new server of the folder, counted from the end of the old one. An old one that is
/// stopped properly takes up to 5 s.
pub(crate) const CLIENT_WAIT: Duration = Duration::from_secs(10);
/// The pause before a connection is offered to the server again that did not take it.
const FORWARD_PAUSE: Duration = Duration::from_millis(50);
/// The pause between two attempts to find a place grows from the first to the second.
const RETRY_PAUSES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// How this process's clients are answered now.
#[derive(Clone, Debug)]
pub(crate) enum Role {
    Serving(Router),
    Forwarding(Seat),
    /// No process is known that serves the folder. Clients wait for one until then.
    Seeking(Instant),
}

/// A place that has been found.
#[derive(Debug)]
pub(crate) enum Place {
    Owned(Owned),
    Joined(Guest),
}

/// The folder is this process's, and others can join on the socket.
#[derive(Debug)]
pub(crate) struct Owned {
    state: Arc<ServerState>,
    socket: Option<UnixListener>,
}

/// Where a process stands, and what it needs to find another place.
#[derive(Clone, Debug)]
pub(crate) struct Seeker {
    pub(crate) layout: Layout,
    pub(crate) terms: Terms,
    pub(crate) router: RouterOf,
}

/// When to stop.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ends {
    pub(crate) stop: CancellationToken,
    /// The process's own clients are all answered.
    pub(crate) drained: CancellationToken,
}

impl Seeker {
    /// Finds the first place.
    ///
    /// # Errors
    /// When the folder cannot be used, or its server cannot be joined within `START_LIMIT`.
    pub(crate) async fn start(&self) -> Result<Place, FolderError> {
        let (until, mut pause) = (Instant::now() + START_LIMIT, RETRY_PAUSES.0);
        loop {
            match self.find().await {
                Err(FolderError::InUse(_)) if Instant::now() < until => sleep(pause).await,
                found => return found,
            }
            pause = (pause * 2).min(RETRY_PAUSES.1);
        }
    }

    /// Finds a place, however long it takes.
    async fn seek(&self) -> Place {
        let (mut pause, mut known) = (RETRY_PAUSES.0, String::new());
        loop {
            match self.find().await {
                Ok(place) => return place,
                Err(FolderError::InUse(_)) => (),
                Err(error) => {
                    let problem = error.to_string();
                    // Each reason once.
                    if problem != known {
                        self.terms.options.log.degraded("cache", &problem);
                        known = problem;
                    }
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(RETRY_PAUSES.1);
        }
    }

    /// Takes the folder, or joins the process that has it.
    async fn find(&self) -> Result<Place, FolderError> {
        let (layout, terms) = (self.layout.clone(), self.terms.clone());
        let owned = tokio::task::spawn_blocking(move || own(&layout, terms)).await;
        let owned = owned.unwrap_or_else(|error| Err(self.unusable(io::Error::other(error))));
        match owned {
            Err(FolderError::InUse(folder)) => match guest::join(&self.layout, &self.terms).await {
                Ok(guest) => Ok(Place::Joined(guest)),
                Err(JoinError::Absent) => Err(FolderError::InUse(folder)),
                Err(JoinError::Unusable(reason)) => Err(FolderError::NotJoined { folder, reason }),
            },
            owned => owned.map(Place::Owned),
        }
    }

    fn unusable(&self, source: io::Error) -> FolderError {
        FolderError::Unusable {
            folder: self.layout.root().to_owned(),
            source,
        }
    }

    /// Keeps a place, and finds another one when it is lost, until `ends.stop`.
    pub(crate) async fn hold(self, mut place: Place, roles: watch::Sender<Role>, ends: Ends) {
        loop {
            match place {
                Place::Owned(owned) => {
                    owned.run(&self.layout, self.router, &roles, &ends).await;
                    return;
                }
                Place::Joined(guest) => {
                    roles.send_replace(Role::Forwarding(guest.seat()));
                    let left = ends.stop.run_until_cancelled(guest.follow()).await;
                    // A frozen server may stay so for ever.
                    let wait = match left {
                        Some(Left::Ended) => CLIENT_WAIT,
                        Some(Left::Frozen) | None => Duration::ZERO,
                    };
                    roles.send_replace(Role::Seeking(Instant::now() + wait));
                }
            }
            let Some(found) = ends.stop.run_until_cancelled(self.seek()).await else {
                return;
            };
            place = found;
            if matches!(place, Place::Owned(_)) {
                let text = "the process that served this folder has ended; this one serves it now";
                self.terms.options.log.note(text);
            }
        }
    }
}

/// Locks the folder and recovers what a killed process left. Blocks on the disk.
fn own(layout: &Layout, terms: Terms) -> Result<Owned, FolderError> {
    // It may have changed since this process read it, while another one served the folder.
    report_refresh(&terms.tokens, &terms.options.log);
    let folder = Folder::open(layout.root(), &terms.options.caches)?;
    let log = terms.options.log.clone();
    // Recovery happens before the server listens, so no client sees a path that is then
    // removed.
    let (store, rolled_back) =
        Store::open(folder, log.clone()).map_err(|source| FolderError::Unusable {
            folder: layout.root().to_owned(),
            source,
        })?;
    if let Some(paths) = rolled_back {
        let paths = flywheel_core::text::count(paths, "path");
        let text = format!(
            "the machine stopped while the cache was running; removed, since the last uploads may be incomplete: {paths}"
        );
        log.degraded("crash", text);
    }
    let socket = match wire::bind(layout) {
        Ok(socket) => Some(socket),
        Err(error) => {
            let text = format!(
                "other processes cannot use this folder now, as it gets no socket: {error}"
            );
            log.degraded("cache", text);
            None
        }
    };
    Ok(Owned {
        state: Arc::new(ServerState::new(Arc::new(store), terms)),
        socket,
    })
}

impl Owned {
    async fn run(
        self,
        layout: &Layout,
        router: RouterOf,
        roles: &watch::Sender<Role>,
        ends: &Ends,
    ) {
        let Self { state, socket } = self;
        let stop = || ends.stop.clone();
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(collect_regularly(Arc::clone(&state), stop()));
        tasks.spawn(sync_regularly(Arc::clone(&state), stop()));
        tasks.spawn(check_in_background(Arc::clone(&state), stop()));
        tasks.spawn(refresh_tokens_regularly(Arc::clone(&state), stop()));
        if let Some(Ok(socket)) = socket.map(tokio::net::UnixListener::from_std) {
            let (state, layout) = (Arc::clone(&state), layout.clone());
            tasks.spawn(host::serve(
                socket,
                state,
                layout,
                router,
                stop(),
                STOP_GRACE,
            ));
        }
        roles.send_replace(Role::Serving(router(Arc::clone(&state))));
        ends.drained.cancelled().await;
        state.store.stop_checks();
        // They stop by the same token as the front.
        while tasks.join_next().await.is_some() {}
        // The role holds the state, and the state holds the lock.
        roles.send_replace(Role::Seeking(Instant::now()));
        // If the disk needs longer, nothing is lost: the system has all data, and the next server waits
        // for the disk instead.
        let _ = tokio::time::timeout(CLOSE_LIMIT, sync(&state, Store::close)).await;
        // While the lock is held, the socket is this process's own.
        let _ = std::fs::remove_file(layout.socket());
    }
}

/// Answers one client by what the process's role is now. A client that comes while the folder has no server waits for
/// the next one.
pub(crate) async fn answer(
    mut client: TcpStream,
    mut roles: watch::Receiver<Role>,
    stop: CancellationToken,
    slot: Arc<ConnectionSlot>,
) {
    // Send small responses at once instead of waiting for more data (Nagle's algorithm).
    let _ = client.set_nodelay(true);
    let mut until = Instant::now() + CLIENT_WAIT;
    loop {
        let role = roles.borrow_and_update().clone();
        let forwards = matches!(role, Role::Forwarding(_));
        match role {
            Role::Serving(router) => {
                return connection::answer(client, router, stop, slot).await;
            }
            Role::Forwarding(seat) => match seat.forward(client, &slot).await {
                Ok(()) => return,
                // The server has ended or is frozen, which this process notices soon.
                Err(back) => client = back,
            },
            Role::Seeking(end) => until = until.min(end),
        }
        let changed = tokio::select! {
            changed = timeout_at(until, roles.changed()) => changed.is_ok_and(|ended| ended.is_ok()),
            // The server may only have had too many callers at that moment.
            () = sleep(FORWARD_PAUSE), if forwards => Instant::now() < until,
            () = stop.cancelled() => false,
            () = slot.evicted() => return,
        };
        if !changed {
            let unavailable = async || {
                let text = "the process that serves the cache's folder does not answer";
                // The next request has to find out anew, on another connection.
                (
                    [(header::CONNECTION, "close")],
                    ErrorResponse::unavailable(text),
                )
            };
            let router = Router::new().fallback(unavailable);
            return connection::answer(client, router, stop, slot).await;
        }
    }
}

/// Checks what questions have left to check, one NAR at a time.
async fn check_in_background(state: Arc<ServerState>, stop: CancellationToken) {
    while let Some(info) = stop.run_until_cancelled(state.unchecked.next()).await {
        let (store, path) = (Arc::clone(&state.store), info.path.clone());
        let checked = tokio::task::spawn_blocking(move || store.confirm(info)).await;
        if let Ok(Err(error)) = checked
            && !stop.is_cancelled()
        {
            let text = format!("`{path}` could not be checked: {error}");
            state.options.log.degraded("damage", text);
        }
    }
}

async fn refresh_tokens_regularly(state: Arc<ServerState>, stop: CancellationToken) {
    while stop
        .run_until_cancelled(sleep(live_tokens::POLL_INTERVAL))
        .await
        .is_some()
    {
        let state = Arc::clone(&state);
        let refresh = move || report_refresh(&state.tokens, &state.options.log);
        // A panic has been reported where it happened.
        let _ = tokio::task::spawn_blocking(refresh).await;
    }
}

fn report_refresh(tokens: &LiveTokens, log: &Sink) {
    match tokens.refresh() {
        Ok(true) => log.note("the tokens were read anew"),
        Ok(false) => (),
        Err(error) => {
            let text = format!("{error}; the tokens that were read before stay in force");
            log.degraded("tokens", text);
        }
    }
}

async fn sync_regularly(state: Arc<ServerState>, stop: CancellationToken) {
    while stop
        .run_until_cancelled(sleep(SYNC_INTERVAL))
        .await
        .is_some()
    {
        sync(&state, Store::sync).await;
    }
}

async fn sync(state: &Arc<ServerState>, how: fn(&Store) -> io::Result<()>) {
    let store = Arc::clone(&state.store);
    let broken = match tokio::task::spawn_blocking(move || how(&store)).await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(error) if error.is_cancelled() => "the server had to stop at once".to_owned(),
        Err(error) => error.to_string(),
    };
    let text = format!(
        "recent uploads may not be on disk, and would be lost if the machine stopped:  {broken}"
    );
    state.options.log.degraded("disk", text);
}

async fn collect_regularly(state: Arc<ServerState>, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(state.options.gc_interval.max(Duration::from_secs(1)));
    // After a long collection, wait a full interval before the next one.
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => (),
        }
        let (store, limits) = (Arc::clone(&state.store), state.options.limits);
        match tokio::task::spawn_blocking(move || gc::collect(&store, &limits, true)).await {
            Ok(Ok(done)) => state.options.log.note(done.to_string()),
            Ok(Err(error)) => state
                .options
                .log
                .degraded("gc", format!("garbage collection stopped: {error}")),
            Err(error) => state
                .options
                .log
                .degraded("gc", format!("garbage collection panicked:  {error}")),
        }
    }
}
