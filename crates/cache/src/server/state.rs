//! What every request handler shares: the store, the tokens, the caches and their keys; who may do what.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::http::{HeaderMap, header};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::server::Options;
use crate::server::body::IDLE_TIMEOUT;
use crate::server::compress::CompressorPool;
use crate::server::error::ErrorResponse;
use crate::server::store::Store;
use crate::server::token::{Scope, Tokens, presented};
use flywheel_core::secret::Secret;
use flywheel_nix::cache_name::CacheName;
use flywheel_nix::key::SecretKey;
use flywheel_sys::host::inline_blocking::Brief;

/// Places for NARs that are being taken. What they cost in memory together stays below 48 MiB.
const UPLOAD_SLOTS: usize = 32;
/// A smaller NAR costs next to nothing, since its compressor is small too.
const SMALL_NAR: u64 = 1024 * 1024;

/// What taking a NAR costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cost {
    /// Some KiB.
    Small,
    /// A compressor with its full window, some 4 MiB.
    Large,
    /// That and an unpacker, 9 MiB for the default level of `nix copy`.
    Compressed,
}

impl Cost {
    /// Of a NAR that comes as it is.
    pub fn new(nar_size: u64) -> Self {
        if nar_size < SMALL_NAR {
            Self::Small
        } else {
            Self::Large
        }
    }

    fn slots(self) -> u32 {
        match self {
            Self::Small => 1,
            Self::Large => 6,
            Self::Compressed => 10,
        }
    }
}

/// One cache.
#[derive(Debug)]
pub struct Cache {
    /// Its name.
    pub name: CacheName,
    /// Its signing key.
    pub key: SecretKey,
}

/// The server behind all connections.
#[derive(Debug)]
pub struct ServerState {
    /// What the cache holds.
    pub store: Arc<Store>,
    /// Who may do what.
    pub tokens: Tokens,
    /// By name.
    pub caches: BTreeMap<String, Cache>,
    /// How the server was set up.
    pub options: Options,
    /// For NARs that are in memory.
    pub compressors: Arc<CompressorPool>,
    slots: Semaphore,
    brief: Brief,
}

impl ServerState {
    /// A server that has done nothing yet.
    pub fn new(store: Arc<Store>, tokens: Tokens, caches: Vec<Cache>, options: Options) -> Self {
        let caches = caches
            .into_iter()
            .map(|cache| (cache.name.to_string(), cache))
            .collect();
        let compressors = Arc::new(CompressorPool::new(options.level));
        Self {
            store,
            tokens,
            caches,
            options,
            compressors,
            slots: Semaphore::new(UPLOAD_SLOTS),
            brief: Brief::default(),
        }
    }

    /// The cache, if the request may read it (`Scope::Read`) or write to it.
    ///
    /// # Errors
    /// 401 when the cache is not there for this client, 403 when it may read it only, 404 when it
    /// may do anything and there is no such cache. As Attic answers, so that clients learn the same.
    pub fn authorise(
        &self,
        headers: &HeaderMap,
        cache: &str,
        scope: Scope,
    ) -> Result<&Cache, ErrorResponse> {
        let token = token(headers);
        let granted = self.tokens.allow(token.as_ref(), cache, scope);
        match (self.caches.get(cache), granted) {
            (Some(cache), true) => Ok(cache),
            (None, true) => Err(ErrorResponse::no_cache()),
            (None, false) => Err(ErrorResponse::unauthorized()),
            (Some(found), false) => {
                let readable =
                    self.options.public || self.tokens.allow(token.as_ref(), cache, Scope::Read);
                match scope {
                    Scope::Read if readable => Ok(found),
                    Scope::Write if readable => Err(ErrorResponse::forbidden()),
                    _ => Err(ErrorResponse::unauthorized()),
                }
            }
        }
    }

    /// Refuses a client that may write nowhere, before anything of its body is read.
    ///
    /// # Errors
    /// 403 when it may read, 401 when it may not even do that.
    pub fn authorise_some_write(&self, headers: &HeaderMap) -> Result<(), ErrorResponse> {
        let token = token(headers);
        if self.tokens.allow_somewhere(token.as_ref(), Scope::Write) {
            Ok(())
        } else if self.options.public || self.tokens.allow_somewhere(token.as_ref(), Scope::Read) {
            Err(ErrorResponse::forbidden())
        } else {
            Err(ErrorResponse::unauthorized())
        }
    }

    /// Waits for a place among the uploads.
    ///
    /// # Errors
    /// 503 when none is free for as long as a client waits.
    pub async fn upload_slot(&self, cost: Cost) -> Result<SemaphorePermit<'_>, ErrorResponse> {
        match tokio::time::timeout(IDLE_TIMEOUT, self.slots.acquire_many(cost.slots())).await {
            Ok(Ok(place)) => Ok(place),
            _ => Err(ErrorResponse::unavailable(
                "too many uploads at once; try again",
            )),
        }
    }

    /// Runs a call of the store that takes a fraction of a millisecond, here if it does; not while garbage is removed.
    ///
    /// # Errors
    /// Whatever the call fails with.
    pub async fn brief<T, E>(
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
    pub async fn blocking<T, E>(
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

fn token(headers: &HeaderMap) -> Option<Secret> {
    presented(headers.get(header::AUTHORIZATION)?.to_str().ok()?)
}
