//! The side of a process on a folder that another one serves: it joins that server, forwards its own clients'
//! connections to it, and notices when it ends or freezes. Knows no client's protocol.

use std::io;
use std::pin::pin;
use std::time::Duration;

use tokio::io::{
    AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader, copy_buf,
};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::server::connection_limit::ConnectionSlot;
use crate::server::folder::Layout;
use crate::server::terms::Terms;
use crate::server::wire::{self, Hello, Reply, VERSION};

/// Time limit for the server's answer to a first line. A job waits for it before its command starts.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval between two pings.
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// A server that answers no ping for this long is frozen. A busy machine needs far less.
const PING_TIMEOUT: Duration = Duration::from_secs(8);
/// How long what a client still sends is taken after the server has ended its connection.
const LINGER: Duration = Duration::from_secs(2);
/// Buffer for each direction of a forwarded connection.
const BUFFER: usize = 32 * 1024;

/// Why the folder's server cannot be joined.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum JoinError {
    /// No process listens: it is starting or ending.
    Absent,
    /// It cannot be used; the text continues "in use by another process, ".
    Unusable(String),
}

/// A place at the server of the folder.
#[derive(Debug)]
pub(crate) struct Guest {
    watch: UnixStream,
    seat: Seat,
}

/// Why a guest has no server any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// It has ended, or must be joined again: another one can be found at once.
    Ended,
    /// It holds the folder and answers nothing.
    Frozen,
}

/// What forwarding needs.
#[derive(Clone, Debug)]
pub(crate) struct Seat {
    layout: Layout,
    number: u64,
    /// Cancelled when the server is frozen, which ends what is forwarded.
    frozen: CancellationToken,
    /// Cancelled when the server does not know this process any more.
    forgotten: CancellationToken,
}

/// Joins the folder's server.
///
/// # Errors
/// When there is none, or it does not answer, refuses, or belongs to another user.
pub(crate) async fn join(layout: &Layout, terms: &Terms) -> Result<Guest, JoinError> {
    let mut watch = match wire::dial(layout).await {
        Ok(watch) => watch,
        Err(error) => return Err(undialled(&error)),
    };
    let own = rustix::process::geteuid().as_raw();
    match wire::peer(&watch) {
        // The server gets hashes of tokens and signs what Nix then trusts.
        Ok(uid) if uid != own => {
            return Err(JoinError::Unusable(format!(
                "which runs as another user (uid {uid})"
            )));
        }
        Ok(_) => (),
        Err(_) => return Err(JoinError::Absent),
    }
    let hello = Hello::Join {
        version: VERSION,
        terms: terms.to_wire(),
    };
    match timeout(ANSWER_TIMEOUT, converse(&mut watch, &hello)).await {
        Ok(Ok(Reply::Joined { guest })) => Ok(Guest {
            watch,
            seat: Seat {
                layout: layout.clone(),
                number: guest,
                frozen: CancellationToken::new(),
                forgotten: CancellationToken::new(),
            },
        }),
        Ok(Ok(Reply::Refused { reason })) => {
            Err(JoinError::Unusable(format!("which refuses: {reason}")))
        }
        Ok(Ok(Reply::Ready)) => Err(JoinError::Unusable(
            "which answers something else than was asked".to_owned(),
        )),
        // It has just ended.
        Ok(Err(_)) => Err(JoinError::Absent),
        Err(_) => Err(silent()),
    }
}

fn undialled(error: &io::Error) -> JoinError {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => JoinError::Absent,
        // Its queue is full, because it accepts nothing.
        io::ErrorKind::WouldBlock => silent(),
        _ => JoinError::Unusable(format!("and its socket cannot be used: {error}")),
    }
}

fn silent() -> JoinError {
    let limit = ANSWER_TIMEOUT.as_secs();
    JoinError::Unusable(format!(
        "which has not answered within {limit} s (it may be stopped)"
    ))
}

async fn converse(stream: &mut UnixStream, hello: &Hello) -> io::Result<Reply> {
    wire::send(stream, hello).await?;
    wire::receive(stream).await
}

impl Guest {
    pub(crate) fn seat(&self) -> Seat {
        self.seat.clone()
    }

    /// Returns when the server has ended, is frozen, or has forgotten this process. Dropping the future leaves the
    /// server, which then ends this process's idle connections.
    pub(crate) async fn follow(mut self) -> Left {
        let mut pong = [0; 16];
        loop {
            tokio::select! {
                () = self.seat.forgotten.cancelled() => return Left::Ended,
                // Between two pings nothing comes but the end.
                _ = self.watch.read(&mut pong) => return Left::Ended,
                () = sleep(PING_INTERVAL) => (),
            }
            let ping = async {
                self.watch.write_all(b".").await?;
                self.watch.read(&mut pong).await
            };
            match timeout(PING_TIMEOUT, ping).await {
                Ok(Ok(1..)) => (),
                Ok(_) => return Left::Ended,
                Err(_) => {
                    // Clients get an error now instead of waiting for their own, longer time limits.
                    self.seat.frozen.cancel();
                    return Left::Frozen;
                }
            }
        }
    }
}

impl Seat {
    /// Forwards one client's connection until either side ends it. The server closes what is idle, and knows what is; so
    /// `slot` is kept until then.
    ///
    /// # Errors
    /// Gives the connection back, untouched, if the server does not take it.
    pub(crate) async fn forward(
        &self,
        client: TcpStream,
        slot: &ConnectionSlot,
    ) -> Result<(), TcpStream> {
        let hello = Hello::Client { guest: self.number };
        let connect = async {
            let mut server = wire::dial(&self.layout).await?;
            let reply = converse(&mut server, &hello).await?;
            Ok::<_, io::Error>((server, reply))
        };
        let server = match timeout(ANSWER_TIMEOUT, connect).await {
            Ok(Ok((server, Reply::Ready))) => server,
            Ok(Ok(_)) => {
                self.forgotten.cancel();
                return Err(client);
            }
            Ok(Err(_)) | Err(_) => return Err(client),
        };
        // Time limits are the server's, and a frozen server ends everything.
        let copy = copy_both(client, server, slot);
        let _ = self.frozen.run_until_cancelled(copy).await;
        Ok(())
    }
}

async fn copy_both(mut client: TcpStream, mut server: UnixStream, slot: &ConnectionSlot) {
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let mut requests = pin!(copy(from_client, to_server));
    let mut responses = pin!(copy(from_server, to_client));
    slot.keep(true);
    tokio::select! {
        () = responses.as_mut() => (),
        // A client that has sent its last request may still wait for the response.
        () = requests.as_mut() => return responses.await,
    }
    // The server has ended the connection. What the client still sends is taken for a moment, or it would see a reset
    // instead of the response.
    slot.keep(false);
    tokio::select! {
        _ = timeout(LINGER, requests) => (),
        () = slot.evicted() => (),
    }
}

/// Copies until the end, and passes the end on.
async fn copy(from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    let mut from = BufReader::with_capacity(BUFFER, from);
    let _ = copy_buf(&mut from, &mut to).await;
    let _ = to.shutdown().await;
}
