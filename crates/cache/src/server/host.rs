//! The side of the process that holds a folder's lock: it answers the clients of other processes, which arrive on the
//! folder's socket, each under the terms of the process that it came by. Knows no client's protocol.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::server::connection::{self, CONNECTIONS};
use crate::server::connection_limit::{ConnectionLimit, ConnectionSlot, Peer};
use crate::server::folder::Layout;
use crate::server::state::ServerState;
use crate::server::terms::{Terms, WireTerms};
use crate::server::wire::{self, Hello, Reply, VERSION};

/// Maximum number of processes that join one folder's server; each needs a connection of its own.
const GUESTS: usize = 64;
/// Requests of one process's clients at a time. Fewer than the connections that it takes itself, so that idle ones are
/// closed here before it takes no more.
const PER_GUEST: usize = 128;
/// Time limit for the first line of a connection.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// A guest that sends no ping for this long has gone; it may join again. Many times its interval, because a guest may
/// be frozen for a while.
const GUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// Time limit for a ping's answer to leave.
const PONG_TIMEOUT: Duration = Duration::from_secs(5);

/// Makes the service that answers under some terms.
pub(crate) type RouterOf = fn(Arc<ServerState>) -> Router;

struct Host {
    state: Arc<ServerState>,
    layout: Layout,
    router: RouterOf,
    stop: CancellationToken,
    guests: Mutex<Guests>,
}

#[derive(Default)]
struct Guests {
    last: u64,
    by_number: HashMap<u64, Guest>,
}

/// What belongs to a process that has joined.
#[derive(Clone)]
struct Guest {
    router: Router,
    stop: CancellationToken,
}

/// Answers on the folder's socket until `stop`, then lets open requests finish for at most `grace`.
pub(crate) async fn serve(
    listener: UnixListener,
    state: Arc<ServerState>,
    layout: Layout,
    router: RouterOf,
    stop: CancellationToken,
    grace: Duration,
) {
    let host = Arc::new(Host {
        state,
        layout,
        router,
        stop: stop.clone(),
        guests: Mutex::default(),
    });
    // The places for guests come on top, so that these never wait for clients.
    let answer = move |stream, slot| receive(Arc::clone(&host), stream, slot);
    let limit = ConnectionLimit::new(CONNECTIONS + GUESTS, PER_GUEST);
    connection::serve(listener, limit, stop, grace, answer).await;
}

async fn receive(host: Arc<Host>, mut stream: UnixStream, slot: Arc<ConnectionSlot>) {
    let own = rustix::process::geteuid().as_raw();
    // Root may do anyway what it likes here.
    if !wire::peer(&stream).is_ok_and(|uid| uid == own || uid == 0) {
        return;
    }
    // Until it is known whose it is, the connection is another process's, which sends its first line at once.
    slot.keep(true);
    match timeout(HELLO_TIMEOUT, wire::receive(&mut stream)).await {
        Ok(Ok(Hello::Join { version, terms })) => host.welcome(stream, version, terms).await,
        Ok(Ok(Hello::Client { guest })) => {
            slot.belongs_to(Peer::Guest(guest));
            host.answer_client(stream, guest, slot).await;
        }
        // It broke off, or speaks another language.
        Ok(Err(_)) | Err(_) => (),
    }
}

impl Host {
    async fn answer_client(&self, mut stream: UnixStream, number: u64, slot: Arc<ConnectionSlot>) {
        let guest = self.lock().by_number.get(&number).cloned();
        let reply = match &guest {
            Some(_) => Reply::Ready,
            None => refused("this process has to join again"),
        };
        let sent = wire::send(&mut stream, &reply).await;
        slot.keep(false);
        if let (Some(guest), Ok(())) = (guest, sent) {
            connection::answer(stream, guest.router, guest.stop, slot).await;
        }
    }

    async fn welcome(self: Arc<Self>, mut stream: UnixStream, version: u32, terms: WireTerms) {
        let admitted = if version == VERSION {
            self.admit(terms).await
        } else {
            Err(format!(
                "it speaks version {VERSION} of the protocol between processes, not {version}"
            ))
        };
        match admitted {
            Err(reason) => {
                let _ = wire::send(&mut stream, &refused(&reason)).await;
            }
            Ok((number, gone)) => {
                let reply = Reply::Joined { guest: number };
                if wire::send(&mut stream, &reply).await.is_ok() {
                    let _ = gone.run_until_cancelled(answer_pings(stream)).await;
                }
                self.lock().by_number.remove(&number);
                // Its clients' requests under way finish; its idle connections end.
                gone.cancel();
            }
        }
    }

    async fn admit(&self, terms: WireTerms) -> Result<(u64, CancellationToken), String> {
        let (layout, options) = (self.layout.clone(), self.state.options.clone());
        let terms = tokio::task::spawn_blocking(move || Terms::from_wire(terms, &layout, &options))
            .await
            .map_err(|error| error.to_string())??;
        let guest = Guest {
            router: (self.router)(Arc::new(self.state.under(terms))),
            stop: self.stop.child_token(),
        };
        let mut guests = self.lock();
        if guests.by_number.len() >= GUESTS {
            return Err(format!("{GUESTS} processes use it already"));
        }
        guests.last += 1;
        let (number, gone) = (guests.last, guest.stop.clone());
        guests.by_number.insert(number, guest);
        Ok((number, gone))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Guests> {
        // A panic cannot leave the table half-changed.
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refused(reason: &str) -> Reply {
    Reply::Refused {
        reason: reason.to_owned(),
    }
}

/// Returns when the guest has ended or is silent.
async fn answer_pings(mut stream: UnixStream) {
    let mut pings = [0; 16];
    while let Ok(Ok(read @ 1..)) = timeout(GUEST_TIMEOUT, stream.read(&mut pings)).await {
        let pong = stream.write_all(&pings[..read]);
        if !matches!(timeout(PONG_TIMEOUT, pong).await, Ok(Ok(()))) {
            return;
        }
    }
}
