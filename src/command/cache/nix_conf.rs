//! The lines by which Nix reads a cache.

use flywheel_nix::key::PublicKey;

/// A cache that Nix is to read.
#[derive(Clone, Debug)]
pub(super) struct ReadCache {
    address: String,
    key: Option<PublicKey>,
}

impl ReadCache {
    /// `address` is whole: with the cache's name.
    pub(super) fn new(address: String, key: Option<PublicKey>) -> Self {
        Self { address, key }
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }
}

/// The settings for `nix.conf`, which leave other caches as they are.
pub(super) fn nix_lines(caches: &[ReadCache]) -> String {
    let addresses: Vec<&str> = caches.iter().map(ReadCache::address).collect();
    let keys: Vec<String> = caches
        .iter()
        .filter_map(|cache| Some(cache.key.as_ref()?.to_string()))
        .collect();
    let mut lines = format!("extra-substituters = {}\n", addresses.join(" "));
    if !keys.is_empty() {
        lines.push_str(&format!("extra-trusted-public-keys = {}\n", keys.join(" ")));
    }
    lines
}
