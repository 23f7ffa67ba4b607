//! The trait of all stores that paths can be published to, so that one queue, one order, one way to retry and one
//! verification serve all of them. Each store has a module of its own.

mod config;
mod error;
mod transfer;

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use futures_util::future::BoxFuture;

pub use self::config::CacheConfig;
pub use self::error::{Action, Error};
pub use self::transfer::{BodyCheck, ByteCounter, Uploaded};

use crate::client::endpoint::Endpoint;
use flywheel_nix::nar::NarSource;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::StorePath;

/// What the trait's asynchronous methods return.
pub(crate) type Pending<'a, T> = BoxFuture<'a, Result<T, Error>>;

/// A store that paths are published to and verified in. No implementation retries by itself.
pub trait Destination: Send + Sync + fmt::Debug {
    /// The address for messages, without credentials.
    fn address(&self) -> String;

    /// The address on a server that has Attic's protocol, for hints in messages; `None` for other stores.
    fn endpoint(&self) -> Option<&Endpoint> {
        None
    }

    /// Whether paths that an upstream cache has signed may be left out, because the readers use that cache, too.
    /// `false` for a store that must hold complete closures.
    fn omits_upstream_paths(&self) -> bool {
        true
    }

    /// How many uploads should run at once, where the store prescribes it: one that works in batches needs a whole
    /// batch under way.
    fn concurrency(&self) -> Option<usize> {
        None
    }

    /// The store's own description.
    fn describe(&self) -> Pending<'_, CacheConfig>;

    /// Which of these paths the store lacks. An empty query checks whether the store can be written to.
    fn missing<'a>(&'a self, paths: &'a [StorePath]) -> Pending<'a, HashSet<StorePath>>;

    /// Publishes one path; the store must already have its references. The caller may repeat it safely.
    fn send<'a>(
        &'a self,
        info: &'a PathInfo,
        source: NarSource,
        counter: &'a ByteCounter,
    ) -> Pending<'a, Uploaded>;

    /// The narinfo of a path; `None` if the store lacks it.
    fn look_up<'a>(&'a self, path: &'a StorePath) -> Pending<'a, Option<NarInfo>>;

    /// Fetches a path's NAR as the store serves it, and compares its size and its hash. `received` counts what comes.
    fn check_body<'a>(
        &'a self,
        info: &'a NarInfo,
        received: &'a ByteCounter,
    ) -> Pending<'a, BodyCheck>;

    /// Whether a transfer's counter rises while it goes on, so that one that stands still can be recognized. `false`
    /// where another program sends the bytes, which has limits of its own.
    fn shows_progress(&self) -> bool {
        true
    }

    /// Succeeds if the store answers at all. For one that cannot be asked cheaply that is assumed.
    fn answers(&self) -> Pending<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}

/// A destination, shared by publishing and verification.
pub type Target = Arc<dyn Destination>;
