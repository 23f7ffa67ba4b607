//! Keeps store paths from every garbage collection, Nix's own at `min-free` included, for as long as this program
//! runs: as temporary roots of a Nix process that is started for this alone.
//!
//! The process is `nix-daemon --stdio`, which opens the store of the settings that it gets, whatever kind it is; where
//! that is a daemon's, it passes the connection on, and the daemon's worker holds the roots. It ends with its input,
//! so that no root outlives this program, not even one that was killed. A path need not be valid when it is kept: one
//! that is looked for after it was kept stays as it was found.
//!
//! Speaks the part of the worker protocol that this takes (`worker-protocol.hh`, `daemon.cc` of Nix); never another
//! operation.

use std::io;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Mutex;

use crate::store_path::StorePath;
use crate::tool::Nix;
use flywheel_core::progress::Sink;
use flywheel_sys::process::capture::CaptureError;
use flywheel_sys::process::piped::PipedTool;

/// The name by which `nix` knows that it is to be the daemon: no version has `nix daemon --stdio` before 2.15.
const PROGRAM: &str = "nix-daemon";
const CLIENT_MAGIC: u64 = 0x6e69_7863;
const SERVER_MAGIC: u64 = 0x6478_696f;
/// Protocol 1.35: the newest that is spoken here, and the oldest that Lix speaks. The first byte is the major number.
const PROTOCOL: u64 = 0x123;
/// From here on a server gives its version, and whether it trusts the client.
const WITH_VERSION: u64 = 0x121;
const WITH_TRUST: u64 = 0x123;
const ADD_TEMP_ROOT: u64 = 11;
/// What precedes an answer: a line of the log, an error, or nothing more.
const FRAME_LOG: u64 = 0x6f6c_6d67;
const FRAME_LAST: u64 = 0x616c_7473;
/// No text that a server sends is longer. In bytes.
const TEXT_LIMIT: u64 = 1 << 20;
/// Requests that are sent before their answers are read. They fit a pipe, so neither side waits for the other.
const BATCH: usize = 100;
/// Opening the store is quick, unless another process repairs or upgrades it.
const START_LIMIT: Duration = Duration::from_secs(20);
/// While a collection runs, a root waits until the collector has finished the path at hand.
const KEEP_LIMIT: Duration = Duration::from_secs(30);
/// The process has nothing to do at its end.
const END_GRACE: Duration = Duration::from_secs(1);

#[derive(Debug, Error)]
enum Error {
    #[error(transparent)]
    Start(#[from] CaptureError),
    #[error("`nix-daemon --stdio` ended, or did not take a request")]
    Pipe(#[from] io::Error),
    #[error("`nix-daemon --stdio` answered something unexpected")]
    Protocol,
    #[error("`nix-daemon --stdio` did not answer within {} s", .0.as_secs())]
    Deadline(Duration),
}

/// Keeps paths once it was asked to, and until `end`. Where it cannot, it reports that once and keeps none.
pub struct KeptPaths {
    nix: Nix,
    sink: Sink,
    keeper: Mutex<Keeper>,
}

enum Keeper {
    NotStarted,
    Running(Box<PipedTool>),
    /// It failed, or it has ended.
    Gone,
}

impl KeptPaths {
    /// Starts nothing yet.
    pub fn new(nix: &Nix, sink: &Sink) -> Self {
        Self {
            nix: nix.clone(),
            sink: sink.clone(),
            keeper: Mutex::new(Keeper::NotStarted),
        }
    }

    /// Keeps these paths, valid or not. When this returns, no collection takes one that is still there.
    pub async fn keep(&self, paths: &[StorePath]) {
        if paths.is_empty() {
            return;
        }
        let mut keeper = self.keeper.lock().await;
        // Whoever cancels this call leaves no process that is in the middle of an answer.
        let running = match std::mem::replace(&mut *keeper, Keeper::Gone) {
            Keeper::Gone => return,
            Keeper::Running(tool) => Ok(tool),
            Keeper::NotStarted => start(&self.nix).await,
        };
        let kept = match running {
            Ok(tool) => keep(tool, paths).await,
            Err(error) => Err(error),
        };
        match kept {
            Ok(tool) => *keeper = Keeper::Running(tool),
            Err(error) => self.sink.degraded(
                "garbage collection",
                format!(
                    "a garbage collection that runs beside this job may take what it needs: {error}"
                ),
            ),
        }
    }

    /// Lets all paths go.
    pub async fn end(&self) {
        let keeper = std::mem::replace(&mut *self.keeper.lock().await, Keeper::Gone);
        if let Keeper::Running(tool) = keeper {
            tool.end(END_GRACE).await;
        }
    }
}

async fn start(nix: &Nix) -> Result<Box<PipedTool>, Error> {
    let mut tool = Box::new(nix.tool().arg("--stdio").pipe(PROGRAM)?);
    within(START_LIMIT, greet(&mut tool)).await?;
    Ok(tool)
}

async fn keep(mut tool: Box<PipedTool>, paths: &[StorePath]) -> Result<Box<PipedTool>, Error> {
    for batch in paths.chunks(BATCH) {
        let adding = async {
            let requests: Vec<u8> = batch.iter().flat_map(add_temp_root).collect();
            tool.input.write_all(&requests).await?;
            for _ in batch {
                read_frames(&mut tool).await?;
                // It is 1, always.
                read_number(&mut tool).await?;
            }
            Ok(())
        };
        within(KEEP_LIMIT, adding).await?;
    }
    Ok(tool)
}

async fn within(
    limit: Duration,
    work: impl Future<Output = Result<(), Error>>,
) -> Result<(), Error> {
    tokio::time::timeout(limit, work)
        .await
        .unwrap_or(Err(Error::Deadline(limit)))
}

async fn greet(tool: &mut PipedTool) -> Result<(), Error> {
    tool.input.write_all(&CLIENT_MAGIC.to_le_bytes()).await?;
    if read_number(tool).await? != SERVER_MAGIC {
        return Err(Error::Protocol);
    }
    let version = read_number(tool).await?.min(PROTOCOL);
    // After the version come two settings of old protocols, both off.
    let hello: Vec<u8> = [version, 0, 0]
        .into_iter()
        .flat_map(u64::to_le_bytes)
        .collect();
    tool.input.write_all(&hello).await?;
    if version >= WITH_VERSION {
        skip_text(tool).await?;
    }
    if version >= WITH_TRUST {
        read_number(tool).await?;
    }
    read_frames(tool).await
}

/// A request: the operation, and the path as a text, which is its length, its bytes, and zeros up to a multiple of eight.
fn add_temp_root(path: &StorePath) -> Vec<u8> {
    let text = path.to_string();
    let mut request = ADD_TEMP_ROOT.to_le_bytes().to_vec();
    request.extend((text.len() as u64).to_le_bytes());
    request.extend(text.bytes());
    request.resize(request.len().next_multiple_of(8), 0);
    request
}

/// Reads what precedes an answer. An error is unexpected: adding a root has no reason to fail.
async fn read_frames(tool: &mut PipedTool) -> Result<(), Error> {
    loop {
        match read_number(tool).await? {
            FRAME_LAST => return Ok(()),
            FRAME_LOG => skip_text(tool).await?,
            _ => return Err(Error::Protocol),
        }
    }
}

async fn read_number(tool: &mut PipedTool) -> Result<u64, Error> {
    Ok(tool.output.read_u64_le().await?)
}

async fn skip_text(tool: &mut PipedTool) -> Result<(), Error> {
    let length = read_number(tool).await?;
    if length > TEXT_LIMIT {
        return Err(Error::Protocol);
    }
    let mut rest = length.next_multiple_of(8);
    let mut bytes = [0; 512];
    while rest > 0 {
        let part = usize::try_from(rest)
            .unwrap_or(bytes.len())
            .min(bytes.len());
        tool.output.read_exact(&mut bytes[..part]).await?;
        rest -= part as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex as SyncMutex};

    use flywheel_core::progress::Progress;
    use flywheel_sys::runner::env::Env;
    use flywheel_testing::script;

    use super::*;

    /// What `keep` warns of when `nix` is this script; it is called twice.
    async fn warnings(text: &str) -> Vec<String> {
        let folder = tempfile::tempdir().expect("temporary folder");
        script(folder.path(), "nix", text).await;
        let nix = Nix::unversioned(&folder.path().join("nix"), &Env::default());
        let warnings = Arc::new(SyncMutex::new(Vec::new()));
        let sent = Arc::clone(&warnings);
        let sink = Sink::new(move |event| {
            if let Progress::Degraded { text, .. } = event {
                sent.lock().expect("no panic").push(text);
            }
        });
        let path: StorePath = "/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-a"
            .parse()
            .expect("a path");
        let kept = KeptPaths::new(&nix, &sink);
        kept.keep(std::slice::from_ref(&path)).await;
        kept.keep(&[path]).await;
        kept.end().await;
        warnings.lock().expect("no panic").clone()
    }

    #[tokio::test]
    async fn where_paths_cannot_be_kept_that_is_said_once() {
        let ends = warnings("exit 1").await;
        assert!(ends.len() == 1 && ends[0].contains("ended"), "{ends:?}");
        let strange = warnings("echo 'this is no daemon at all'; exec /bin/cat >/dev/null").await;
        assert!(
            strange.len() == 1 && strange[0].contains("unexpected"),
            "{strange:?}"
        );
    }

    #[test]
    fn a_request_is_what_the_daemon_reads() {
        let path: StorePath = "/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-a"
            .parse()
            .expect("a path");
        let request = add_temp_root(&path);
        assert_eq!(
            request[..16],
            [11, 0, 0, 0, 0, 0, 0, 0, 45, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(&request[16..61], path.to_string().as_bytes());
        assert_eq!(request[61..], [0, 0, 0]);
    }
}
