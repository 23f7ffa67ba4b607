//! What every request handler shares: the store, the tokens, the caches and their keys; who may do what.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::http::{HeaderMap, header};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::cache_server::Options;
use crate::cache_server::body::IDLE_TIMEOUT;
use crate::cache_server::pack::Packers;
use crate::cache_server::refusal::Refusal;
use crate::cache_server::store::Store;
use crate::cache_server::token::{Scope, Tokens, presented};
use crate::host::inline_blocking::AdaptiveBlocking;
use crate::nix::cache_name::CacheName;
use crate::nix::key::SecretKey;
use crate::secret::Secret;

/// Places for NARs that are being taken. What they cost in memory together stays below 48 MiB.
const PLACES: usize = 32;
/// A smaller NAR costs next to nothing, since its compressor is small too.
const SMALL: u64 = 1024 * 1024;

/// What taking a NAR costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cost {
    /// Some KiB.
    Small,
    /// A compressor with its full window, some 4 MiB.
    Large,
    /// That and an unpacker, 9 MiB for the default level of `nix copy`.
    Packed,
}

impl Cost {
    /// Of a NAR that comes as it is.
    pub fn of(nar_size: u64) -> Self {
        if nar_size < SMALL {
            Self::Small
        } else {
            Self::Large
        }
    }

    fn places(self) -> u32 {
        match self {
            Self::Small => 1,
            Self::Large => 6,
            Self::Packed => 10,
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
pub struct State {
    /// What the cache holds.
    pub store: Arc<Store>,
    /// Who may do what.
    pub tokens: Tokens,
    /// By name.
    pub caches: BTreeMap<String, Cache>,
    /// How the server was set up.
    pub options: Options,
    /// For NARs that are in memory.
    pub packers: Arc<Packers>,
    places: Semaphore,
    brief: AdaptiveBlocking,
}

impl State {
    /// A server that has done nothing yet.
    pub fn new(store: Arc<Store>, tokens: Tokens, caches: Vec<Cache>, options: Options) -> Self {
        let caches = caches
            .into_iter()
            .map(|cache| (cache.name.to_string(), cache))
            .collect();
        let packers = Arc::new(Packers::new(options.level));
        Self {
            store,
            tokens,
            caches,
            options,
            packers,
            places: Semaphore::new(PLACES),
            brief: AdaptiveBlocking::default(),
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
    ) -> Result<&Cache, Refusal> {
        let token = token(headers);
        let granted = self.tokens.allow(token.as_ref(), cache, scope);
        match (self.caches.get(cache), granted) {
            (Some(cache), true) => Ok(cache),
            (None, true) => Err(Refusal::no_cache()),
            (None, false) => Err(Refusal::unauthorized()),
            (Some(found), false) => {
                let readable =
                    self.options.public || self.tokens.allow(token.as_ref(), cache, Scope::Read);
                match scope {
                    Scope::Read if readable => Ok(found),
                    Scope::Write if readable => Err(Refusal::forbidden()),
                    _ => Err(Refusal::unauthorized()),
                }
            }
        }
    }

    /// Refuses a client that may write nowhere, before anything of its body is read.
    ///
    /// # Errors
    /// 403 when it may read, 401 when it may not even do that.
    pub fn authorise_some_write(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let token = token(headers);
        if self.tokens.allow_somewhere(token.as_ref(), Scope::Write) {
            Ok(())
        } else if self.options.public || self.tokens.allow_somewhere(token.as_ref(), Scope::Read) {
            Err(Refusal::forbidden())
        } else {
            Err(Refusal::unauthorized())
        }
    }

    /// Waits for a place among the uploads.
    ///
    /// # Errors
    /// 503 when none is free for as long as a client waits.
    pub async fn upload_place(&self, cost: Cost) -> Result<SemaphorePermit<'_>, Refusal> {
        match tokio::time::timeout(IDLE_TIMEOUT, self.places.acquire_many(cost.places())).await {
            Ok(Ok(place)) => Ok(place),
            _ => Err(Refusal::busy("too many uploads at once; try again")),
        }
    }

    /// Runs a call of the store that takes a fraction of a millisecond, here if it does; not while garbage is removed.
    ///
    /// # Errors
    /// Whatever the call fails with.
    pub async fn brief<T, E>(
        &self,
        call: impl FnOnce(&Store) -> Result<T, E> + Send + 'static,
    ) -> Result<T, Refusal>
    where
        T: Send + 'static,
        E: Into<Refusal> + Send + 'static,
    {
        let store = Arc::clone(&self.store);
        let ended = self
            .brief
            .run(self.store.is_shut(), move || call(&store))
            .await;
        ended
            .map_err(|error| Refusal::internal(&std::io::Error::other(error)))?
            .map_err(Into::into)
    }

    /// Runs a call of the store on a thread that may block.
    ///
    /// # Errors
    /// Whatever the call fails with.
    pub async fn blocking<T, E>(
        &self,
        call: impl FnOnce(&Store) -> Result<T, E> + Send + 'static,
    ) -> Result<T, Refusal>
    where
        T: Send + 'static,
        E: Into<Refusal> + Send + 'static,
    {
        let store = Arc::clone(&self.store);
        let ended = tokio::task::spawn_blocking(move || call(&store)).await;
        ended
            .map_err(|error| Refusal::internal(&std::io::Error::other(error)))?
            .map_err(Into::into)
    }
}

fn token(headers: &HeaderMap) -> Option<Secret> {
    presented(headers.get(header::AUTHORIZATION)?.to_str().ok()?)
}
