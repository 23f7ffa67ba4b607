//! What a store that takes paths has to offer, so that one queue, one order, one way of retrying
//! and one verification serve all of them. Owns the trait; each store lives in a module of its own.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use futures_util::future::BoxFuture;

use crate::client::attic::{Attic, Body, CacheConfig, Error, Meter, Uploaded};
use crate::client::endpoint::Endpoint;
use flywheel_nix::nar::NarSource;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::StorePath;

/// An answer that takes a while.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, Error>>;

/// Where paths go, and where they are looked up again. Nothing here tries twice by itself.
pub trait Destination: Send + Sync + fmt::Debug {
    /// Its address as messages show it, without credentials.
    fn address(&self) -> String;

    /// Where it is on a server of Attic's kind, for advice; `None` for other stores.
    fn endpoint(&self) -> Option<&Endpoint> {
        None
    }

    /// Whether what an upstream cache has signed may be left out, because its readers have that
    /// cache too. A store that must hold whole closures says no.
    fn leaves_upstream_out(&self) -> bool {
        true
    }

    /// How many paths at once suit it, where it has a mind of its own: one that works in batches
    /// wants a whole batch under way.
    fn width(&self) -> Option<usize> {
        None
    }

    /// What it says of itself.
    fn describe(&self) -> Answer<'_, CacheConfig>;

    /// Which of these it does not have. None at all is a good question too: it tells whether it
    /// can be written to.
    fn missing<'a>(&'a self, paths: &'a [StorePath]) -> Answer<'a, HashSet<StorePath>>;

    /// Sends one path, whose references are all there already. It is safe to be repeated.
    fn send<'a>(
        &'a self,
        info: &'a PathInfo,
        source: NarSource,
        meter: &'a Meter,
    ) -> Answer<'a, Uploaded>;

    /// What it says of a path; `None` if it does not have it.
    fn look_up<'a>(&'a self, path: &'a StorePath) -> Answer<'a, Option<NarInfo>>;

    /// Fetches a path's body and compares its hash.
    fn check_body<'a>(&'a self, info: &'a NarInfo) -> Answer<'a, Body>;
}

/// Any of them, shared by those who write and those who look up.
pub type Target = Arc<dyn Destination>;

impl From<Attic> for Target {
    fn from(attic: Attic) -> Self {
        Arc::new(attic)
    }
}

impl Destination for Attic {
    fn address(&self) -> String {
        Self::endpoint(self).to_string()
    }

    fn endpoint(&self) -> Option<&Endpoint> {
        Some(Self::endpoint(self))
    }

    fn describe(&self) -> Answer<'_, CacheConfig> {
        Box::pin(self.cache_config())
    }

    fn missing<'a>(&'a self, paths: &'a [StorePath]) -> Answer<'a, HashSet<StorePath>> {
        Box::pin(async move {
            let hashes: Vec<_> = paths.iter().map(StorePath::hash).collect();
            let missing = self.missing_paths(&hashes).await?;
            Ok(paths
                .iter()
                .zip(&hashes)
                .filter(|(_, hash)| missing.contains(*hash))
                .map(|(path, _)| path.clone())
                .collect())
        })
    }

    fn send<'a>(
        &'a self,
        info: &'a PathInfo,
        source: NarSource,
        meter: &'a Meter,
    ) -> Answer<'a, Uploaded> {
        Box::pin(self.upload(info, source, meter))
    }

    fn look_up<'a>(&'a self, path: &'a StorePath) -> Answer<'a, Option<NarInfo>> {
        Box::pin(async move { self.nar_info(&path.hash()).await })
    }

    fn check_body<'a>(&'a self, info: &'a NarInfo) -> Answer<'a, Body> {
        Box::pin(Self::check_body(self, info))
    }
}
