//! The state shared by all request handlers: the store, the tokens, the caches and their keys. Also
//! decides who may do what.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::{HeaderMap, header};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, SemaphorePermit};

use crate::server::Options;
use crate::server::compress::CompressorPool;
use crate::server::error::ErrorResponse;
use crate::server::live_tokens::LiveTokens;
use crate::server::store::Store;
use crate::server::terms::Terms;
use crate::server::token::{Scope, presented};
use flywheel_core::secret::Secret;
use flywheel_nix::cache_name::CacheName;
use flywheel_nix::key::SecretKey;
use flywheel_nix::narinfo::NarInfo;
use flywheel_sys::host::inline_blocking::AdaptiveBlocking;

/// Slots for concurrent uploads; together they cost less than 48 MiB of memory.
const UPLOAD_SLOTS: usize = 32;
/// NARs below this size cost little memory, since their compressors are small too.
const SMALL_NAR: u64 = 1024 * 1024;

/// How long an upload waits for its slots.
const SLOT_LIMIT: Duration = Duration::from_secs(60);
/// NARs that are served in another compression than the stored one at a time. Each costs processor time and some MiB.
const REPACKED: usize = 4;
/// Memory for metadata that is being received, in KiB: the largest bodies of eight clients, or thousands of usual ones.
const METADATA_KIB: usize = 16 * 1024;

/// Maximum number of NARs that wait for a check in the background, some 10 MiB.
const UNCHECKED: usize = 10_000;

/// The memory cost of receiving a NAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cost {
    /// A few KiB.
    Small,
    /// A compressor with its full window, about 4 MiB.
    Large,
    /// A compressor and a decompressor, 9 MiB for the default level of `nix copy`.
    Compressed,
}

impl Cost {
    /// The cost of an uncompressed NAR.
    pub(crate) fn new(nar_size: u64) -> Self {
        if nar_size < SMALL_NAR {
            Self::Small
        } else {
            Self::Large
        }
    }

    fn slots(self) -> u32 {
        match self {
            Self::Small => 1,
            // Of 32 slots: at most five large uploads, or three compressed ones, run at once.
            Self::Large => 6,
            Self::Compressed => 10,
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Cache {
    pub(crate) name: CacheName,
    pub(crate) key: Arc<SecretKey>,
}

/// NARs that wait for a check in the background.
#[derive(Debug, Default)]
pub(crate) struct UncheckedNars {
    queue: Mutex<VecDeque<NarInfo>>,
    added: Notify,
}

impl UncheckedNars {
    /// Beyond `UNCHECKED`, the first are forgotten: they are checked when they are asked for again, or served.
    pub(crate) fn add(&self, paths: Vec<NarInfo>) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.extend(paths);
        let excess = queue.len().saturating_sub(UNCHECKED);
        queue.drain(..excess);
        self.added.notify_one();
    }

    /// Waits for the next one. For one task at a time.
    pub(crate) async fn next(&self) -> NarInfo {
        loop {
            let next = self
                .queue
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop_front();
            match next {
                Some(info) => return info,
                None => self.added.notified().await,
            }
        }
    }
}

/// The store, and the terms under which a process's clients use it.
#[derive(Debug)]
pub(crate) struct ServerState {
    pub(crate) store: Arc<Store>,
    pub(crate) tokens: LiveTokens,
    are_tokens_the_folders: bool,
    pub(crate) caches: BTreeMap<String, Cache>,
    pub(crate) options: Options,
    /// Compressors for NARs that fit into memory.
    pub(crate) compressors: Arc<CompressorPool>,
    /// NARs that were claimed by their size alone, to be checked in the background.
    pub(crate) unchecked: Arc<UncheckedNars>,
    slots: Arc<Semaphore>,
    metadata: Arc<Semaphore>,
    repacked: Arc<Semaphore>,
    brief: AdaptiveBlocking,
}

impl ServerState {
    pub(crate) fn new(store: Arc<Store>, terms: Terms) -> Self {
        let Terms {
            tokens,
            are_tokens_the_folders,
            caches,
            options,
        } = terms;
        let compressors = Arc::new(CompressorPool::new(options.level));
        Self {
            store,
            tokens,
            are_tokens_the_folders,
            caches,
            options,
            compressors,
            unchecked: Arc::default(),
            slots: Arc::new(Semaphore::new(UPLOAD_SLOTS)),
            metadata: Arc::new(Semaphore::new(METADATA_KIB)),
            repacked: Arc::new(Semaphore::new(REPACKED)),
            brief: AdaptiveBlocking::default(),
        }
    }

    /// The same store under the terms of another process. Both share what bounds memory.
    pub(crate) fn under(&self, terms: Terms) -> Self {
        let Terms {
            tokens,
            are_tokens_the_folders,
            caches,
            options,
        } = terms;
        // The folder's own file is read anew here, for all processes that use it.
        let tokens = if are_tokens_the_folders && self.are_tokens_the_folders {
            self.tokens.clone()
        } else {
            tokens
        };
        Self {
            store: Arc::clone(&self.store),
            tokens,
            are_tokens_the_folders,
            caches,
            options,
            compressors: Arc::clone(&self.compressors),
            unchecked: Arc::clone(&self.unchecked),
            slots: Arc::clone(&self.slots),
            metadata: Arc::clone(&self.metadata),
            repacked: Arc::clone(&self.repacked),
            brief: self.brief.clone(),
        }
    }

    /// Returns the cache if the request may read it (`Scope::Read`) or write to it
    /// (`Scope::Write`).
    ///
    /// # Errors
    /// 401 if the client may not even read the cache, 403 if it may only read, and 404 if its token
    /// covers the name but no such cache exists. Attic responds the same way, so clients learn no
    /// more here.
    pub(crate) fn authorise(
        &self,
        headers: &HeaderMap,
        cache: &str,
        scope: Scope,
    ) -> Result<&Cache, ErrorResponse> {
        let token = token(headers);
        let tokens = self.tokens.current();
        let granted = tokens.allow(token.as_ref(), cache, scope);
        match (self.caches.get(cache), granted) {
            (Some(cache), true) => Ok(cache),
            (None, true) => Err(ErrorResponse::no_cache()),
            // Without permission, a missing cache looks like a private one.
            (None, false) => Err(ErrorResponse::unauthorized()),
            (Some(found), false) => {
                let readable =
                    self.options.public || tokens.allow(token.as_ref(), cache, Scope::Read);
                match scope {
                    Scope::Read if readable => Ok(found),
                    // The client can see the cache, so it may learn that writing is forbidden.
                    Scope::Write if readable => Err(ErrorResponse::forbidden()),
                    _ => Err(ErrorResponse::unauthorized()),
                }
            }
        }
    }

    /// Rejects a client that may not write to any cache, before its body is read.
    ///
    /// # Errors
    /// 403 if it may read some cache, otherwise 401.
    pub(crate) fn authorise_some_write(&self, headers: &HeaderMap) -> Result<(), ErrorResponse> {
        let token = token(headers);
        let tokens = self.tokens.current();
        if tokens.allow_somewhere(token.as_ref(), Scope::Write) {
            Ok(())
        } else if self.options.public || tokens.allow_somewhere(token.as_ref(), Scope::Read) {
            Err(ErrorResponse::forbidden())
        } else {
            Err(ErrorResponse::unauthorized())
        }
    }

    /// Waits for upload slots.
    ///
    /// # Errors
    /// 503 if none becomes free in time.
    pub(crate) async fn upload_slot(
        &self,
        cost: Cost,
    ) -> Result<SemaphorePermit<'_>, ErrorResponse> {
        slots(&self.slots, cost.slots()).await
    }

    /// Waits for memory for a body of metadata of at most `limit` bytes.
    ///
    /// # Errors
    /// 503 if none becomes free in time.
    pub(crate) async fn metadata_slot(
        &self,
        headers: &HeaderMap,
        limit: usize,
    ) -> Result<SemaphorePermit<'_>, ErrorResponse> {
        let announced = headers
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        let bytes = announced.map_or(limit, |bytes: usize| bytes.min(limit));
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX);
        slots(&self.metadata, kib).await
    }

    /// Waits for a turn to serve a NAR in another compression.
    ///
    /// # Errors
    /// 503 if there is none in time.
    pub(crate) async fn repacking_turn(&self) -> Result<OwnedSemaphorePermit, ErrorResponse> {
        let turn = Arc::clone(&self.repacked).acquire_owned();
        match tokio::time::timeout(SLOT_LIMIT, turn).await {
            Ok(Ok(turn)) => Ok(turn),
            _ => Err(ErrorResponse::unavailable(
                "too many downloads in another compression than the stored one; try again",
            )),
        }
    }

    /// Runs a store call that takes a fraction of a millisecond on the current thread if possible,
    /// but not while garbage is being removed.
    ///
    /// # Errors
    /// Whatever the call fails with.
    pub(crate) async fn run_inline<T, E>(
        &self,
        call: impl FnOnce(&Store) -> Result<T, E> + Send + 'static,
    ) -> Result<T, ErrorResponse>
    where
        T: Send + 'static,
        E: Into<ErrorResponse> + Send + 'static,
    {
        let store = Arc::clone(&self.store);
        let ended = self
            .brief
            // While garbage is removed the call would wait for the lock, which must not block a
            // runtime thread.
            .run(self.store.is_removing(), move || call(&store))
            .await;
        ended
            .map_err(|error| ErrorResponse::internal(&std::io::Error::other(error)))?
            .map_err(Into::into)
    }

    /// Runs a call of the store on a thread that may block.
    ///
    /// # Errors
    /// Whatever the call fails with.
    pub(crate) async fn run_blocking<T, E>(
        &self,
        call: impl FnOnce(&Store) -> Result<T, E> + Send + 'static,
    ) -> Result<T, ErrorResponse>
    where
        T: Send + 'static,
        E: Into<ErrorResponse> + Send + 'static,
    {
        let store = Arc::clone(&self.store);
        let ended = tokio::task::spawn_blocking(move || call(&store)).await;
        ended
            .map_err(|error| ErrorResponse::internal(&std::io::Error::other(error)))?
            .map_err(Into::into)
    }
}

async fn slots(all: &Semaphore, count: u32) -> Result<SemaphorePermit<'_>, ErrorResponse> {
    match tokio::time::timeout(SLOT_LIMIT, all.acquire_many(count)).await {
        Ok(Ok(slots)) => Ok(slots),
        _ => Err(ErrorResponse::unavailable(
            "too many uploads at once; try again",
        )),
    }
}

fn token(headers: &HeaderMap) -> Option<Secret> {
    presented(headers.get(header::AUTHORIZATION)?.to_str().ok()?)
}
