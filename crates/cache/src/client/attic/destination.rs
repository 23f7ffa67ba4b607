//! Attic's server as a destination.

use std::collections::HashSet;
use std::sync::Arc;

use crate::client::attic::Attic;
use crate::client::destination::{
    BodyCheck, ByteCounter, CacheConfig, Destination, Pending, Target, Uploaded,
};
use crate::client::endpoint::Endpoint;
use flywheel_nix::nar::NarSource;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::StorePath;

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

    fn describe(&self) -> Pending<'_, CacheConfig> {
        Box::pin(self.cache_config())
    }

    fn missing<'a>(&'a self, paths: &'a [StorePath]) -> Pending<'a, HashSet<StorePath>> {
        Box::pin(async move {
            // Attic's protocol identifies a path by its hash alone.
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
        counter: &'a ByteCounter,
    ) -> Pending<'a, Uploaded> {
        Box::pin(self.upload(info, source, counter))
    }

    fn look_up<'a>(&'a self, path: &'a StorePath) -> Pending<'a, Option<NarInfo>> {
        Box::pin(async move { self.nar_info(&path.hash()).await })
    }

    fn check_body<'a>(
        &'a self,
        info: &'a NarInfo,
        received: &'a ByteCounter,
    ) -> Pending<'a, BodyCheck> {
        Box::pin(Self::check_body(self, info, received))
    }

    fn answers(&self) -> Pending<'_, ()> {
        Box::pin(self.cache_info())
    }
}
