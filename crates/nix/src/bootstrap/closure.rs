//! Installs Nix as what it is: a closure in a binary cache. Every narinfo's signature is checked, NARs are unpacked
//! while they come, and only a whole closure gets its place in the store. The first program that is run is the Nix that
//! has just arrived, which registers it. Decides neither whether nor which Nix is installed.

mod fetch;
mod lock;
pub(crate) mod manifest;
mod present;
mod receive;
mod register;
mod staging;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use thiserror::Error;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};
use url::Url;

pub(crate) use self::manifest::Manifest;
pub(crate) use self::register::Registration;
pub(crate) use self::staging::{Entered, Staging, StagingError, StagingFolder};

use self::fetch::Cache;
use crate::key::PublicKey;
use crate::narinfo::{NarInfo, NarInfoError};
use crate::store_path::StorePath;
use flywheel_core::exit::{Exit, Explain};
use flywheel_core::progress::Sink;
use flywheel_core::text;
use flywheel_sys::http::{self, Roots};

/// Narinfos that are fetched at once.
const INFOS: usize = 16;
/// NARs that are fetched at once.
const BODIES: usize = 8;
/// The largest closure, in paths and in bytes: a released Nix has some 80 paths and 150 MB.
const PATHS_LIMIT: usize = 4096;
const SIZE_LIMIT: u64 = 4 * 1024 * 1024 * 1024;
/// How often the log says how far a slow installation is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// Where a closure is fetched from.
#[derive(Clone, Debug)]
pub(crate) struct ClosureSource {
    /// The binary cache, over HTTP.
    pub(crate) address: Url,
    /// One of them has to have signed each path.
    pub(crate) keys: Vec<PublicKey>,
    /// The store path of Nix.
    pub(crate) path: StorePath,
    /// The certificates that are trusted.
    pub(crate) roots: Roots,
}

/// A Nix that is there now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Installed {
    /// The program `nix`, in the store.
    pub(crate) program: PathBuf,
    /// How long the parts took: `fetch`, `unpack` for what was still to do when the last byte had come, and `register`.
    /// Nothing if another job had installed it.
    pub(crate) parts: Vec<(&'static str, Duration)>,
}

/// Why a closure was not installed. Nothing of it is left.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("{address} does not have `{path}` (HTTP status {status})")]
    Missing {
        address: String,
        path: StorePath,
        status: u16,
    },
    #[error("{address} could not be read: {problem}")]
    Fetch { address: String, problem: String },
    /// Nothing came within the time of a first contact, or in the middle for some seconds.
    #[error("{address} does not answer: nothing came for {} s", limit.as_secs())]
    Stalled { address: String, limit: Duration },
    #[error("{address} has no usable description of `{path}`")]
    NarInfo {
        address: String,
        path: StorePath,
        #[source]
        source: NarInfoError,
    },
    #[error("{address} answers with the description of `{found}` instead of `{path}`")]
    OtherPath {
        address: String,
        path: StorePath,
        found: StorePath,
    },
    #[error("`{path}` of {address} has no valid signature by {keys}")]
    Unsigned {
        address: String,
        path: StorePath,
        /// The names of the keys.
        keys: String,
    },
    #[error("the NAR of `{path}` is compressed with `{compression}`, which is not unpacked here")]
    Compression {
        path: StorePath,
        compression: String,
    },
    #[error("the NAR of `{path}` from {address} is not what was signed: {problem}")]
    Corrupt {
        address: String,
        path: StorePath,
        problem: String,
    },
    #[error(
        "the closure of `{path}` is larger than {PATHS_LIMIT} paths or {}",
        text::bytes(SIZE_LIMIT)
    )]
    TooLarge { path: StorePath },
    #[error("it did not end in time: {done} of {total} paths had come")]
    Deadline { done: usize, total: usize },
    #[error(transparent)]
    Client(#[from] http::Error),
    #[error(transparent)]
    Staging(#[from] StagingError),
}

impl Error {
    /// Whether the machine is at fault, so that another source would not help.
    pub(crate) fn is_of_host(&self) -> bool {
        matches!(self, Self::Staging(_) | Self::Client(_))
    }

    /// Whether what came is not what the keys have signed.
    pub(crate) fn is_tampering(&self) -> bool {
        matches!(
            self,
            Self::Unsigned { .. } | Self::Corrupt { .. } | Self::OtherPath { .. }
        )
    }
}

impl Explain for Error {
    fn exit(&self) -> Exit {
        Exit::Host
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Missing { .. } => {
                "Name a version that the cache has by `nix-version`, or a cache that has it by `nix-source`."
            }
            Self::Fetch { .. } | Self::Stalled { .. } | Self::Deadline { .. } => {
                "Look at the network of the runner, or name a cache that it reaches by `nix-source`."
            }
            Self::Unsigned { .. } => {
                "Name the key that signs the cache's paths behind its address in `nix-source`."
            }
            Self::NarInfo { .. }
            | Self::OtherPath { .. }
            | Self::Compression { .. }
            | Self::Corrupt { .. }
            | Self::TooLarge { .. } => "Repair the cache, or name another one by `nix-source`.",
            Self::Client(error) => return error.hint(),
            Self::Staging(error) => return error.hint(),
        };
        Some(hint.to_owned())
    }
}

/// Installs the closure below `nix`, which is `/nix` but for tests. Of two jobs that do so at once, the second waits and
/// finds it there.
///
/// # Errors
/// When the source does not have it as it was signed, the disk does not take it, or `deadline` passes.
pub(crate) async fn install(
    source: &ClosureSource,
    nix: &Path,
    sink: &Sink,
    deadline: Instant,
) -> Result<Installed, Error> {
    let client = http::client(&source.roots)?;
    let cache = Cache::new(client, source);
    // Before anything is touched: a cache that is away, or lacks it, costs the machine nothing.
    let first = timeout_at(deadline, cache.first_nar_info(&source.path));
    let first = first
        .await
        .unwrap_or(Err(Error::Deadline { done: 0, total: 1 }))?;
    let entered = Staging::enter(nix, sink, deadline).await?;
    let staging = match entered {
        Entered::Installed(program) => {
            let parts = Vec::new();
            return Ok(Installed { program, parts });
        }
        Entered::Staging(staging) => staging,
    };
    sink.note(format!(
        "Nix is not installed: fetching `{}` from {}",
        source.path,
        cache.address()
    ));
    let mut fetched = Fetched::default();
    let started = Instant::now();
    let filled = timeout_at(deadline, fill(&cache, first, &staging, sink, &mut fetched));
    let filled = filled.await.unwrap_or_else(|_| {
        Err(Error::Deadline {
            done: fetched.done,
            total: fetched.infos.len(),
        })
    });
    if let Err(error) = filled {
        staging.abandon().await;
        return Err(error);
    }
    let last_byte = fetched.last_byte.unwrap_or(started);
    let registrations = fetched
        .infos
        .into_values()
        .map(Registration::from)
        .collect();
    let address = cache.address();
    let (program, times) = staging
        .complete(&source.path, address, registrations, deadline)
        .await?;
    let parts = vec![
        ("fetch", last_byte.duration_since(started)),
        ("unpack", times.placed.duration_since(last_byte)),
        ("register", times.registered.duration_since(times.placed)),
    ];
    Ok(Installed { program, parts })
}

/// What has come so far.
#[derive(Default)]
struct Fetched {
    infos: BTreeMap<StorePath, NarInfo>,
    /// Paths that are unpacked, or were there.
    done: usize,
    /// When the last body had come.
    last_byte: Option<Instant>,
}

/// Fetches the closure of a path into the staging folder: narinfos by breadth, and NARs beside them, the largest first.
async fn fill(
    cache: &Cache,
    first: NarInfo,
    staging: &Staging,
    sink: &Sink,
    fetched: &mut Fetched,
) -> Result<(), Error> {
    let root = first.path.clone();
    let mut known: BTreeSet<StorePath> = BTreeSet::from([root.clone()]);
    let mut unasked: Vec<StorePath> = Vec::new();
    let mut unfetched: BTreeMap<(u64, StorePath), NarInfo> = BTreeMap::new();
    let (mut infos, mut bodies) = (FuturesUnordered::new(), FuturesUnordered::new());
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 4));
    let turns = Arc::new(Semaphore::new(threads));
    let mut size = 0_u64;
    let mut next_note = Instant::now() + PROGRESS_INTERVAL;
    let mut arrived = Some(first);
    loop {
        if let Some(info) = arrived.take() {
            size = size.saturating_add(info.nar_size);
            for reference in &info.references {
                if known.insert(reference.clone()) {
                    unasked.push(reference.clone());
                }
            }
            if known.len() > PATHS_LIMIT || size > SIZE_LIMIT {
                return Err(Error::TooLarge { path: root });
            }
            fetched.infos.insert(info.path.clone(), info.clone());
            if staging.has(&info).await? {
                fetched.done += 1;
            } else {
                staging.check_room(size)?;
                unfetched.insert((info.nar_size, info.path.clone()), info);
            }
        }
        while infos.len() < INFOS
            && let Some(path) = unasked.pop()
        {
            infos.push(async move { cache.nar_info(&path).await });
        }
        while bodies.len() < BODIES
            && let Some((_, info)) = unfetched.pop_last()
        {
            let turns = Arc::clone(&turns);
            bodies.push(async move { receive::receive(cache, &info, staging, &turns).await });
        }
        if infos.is_empty() && bodies.is_empty() {
            return Ok(());
        }
        tokio::select! {
            Some(info) = infos.next() => arrived = Some(info?),
            Some(body) = bodies.next() => {
                fetched.last_byte = fetched.last_byte.max(Some(body?));
                fetched.done += 1;
            }
            () = tokio::time::sleep_until(next_note) => {
                next_note += PROGRESS_INTERVAL;
                sink.note(format!("{} of {} paths of Nix have come", fetched.done, known.len()));
            }
        }
    }
}

#[cfg(test)]
mod tests;
