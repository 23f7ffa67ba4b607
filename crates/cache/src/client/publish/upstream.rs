//! Which paths need not be sent, because a cache that every reader has serves them: those with a valid signature by its
//! key. The key's name alone says nothing: anybody can put any name into a store.

use std::collections::HashSet;

use flywheel_nix::key::{NIXOS_CACHE_KEY, PublicKey};
use flywheel_nix::path_info::PathInfo;

/// The keys of upstream caches.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// The names of the keys. The cache's own list is added.
    names: HashSet<String>,
    /// The keys that are known. A path that is signed by a key of which only the name is known is sent.
    keys: Vec<PublicKey>,
}

impl Default for Upstream {
    /// `cache.nixos.org`.
    fn default() -> Self {
        let key: PublicKey = NIXOS_CACHE_KEY.parse().expect("the constant is a key");
        Self {
            names: HashSet::from([key.name().to_owned()]),
            keys: vec![key],
        }
    }
}

impl Upstream {
    /// No upstream cache: every path is sent.
    pub fn none() -> Self {
        Self {
            names: HashSet::new(),
            keys: Vec::new(),
        }
    }

    /// Knows these keys, too, which are those that the job's Nix trusts.
    #[must_use]
    pub fn with_keys(mut self, keys: impl IntoIterator<Item = PublicKey>) -> Self {
        self.keys.extend(keys);
        self
    }

    pub(super) fn add_names(&mut self, names: impl IntoIterator<Item = String>) {
        self.names.extend(names);
    }

    /// The name of the upstream key that has signed the path, if one has.
    pub fn signer(&self, info: &PathInfo) -> Option<&str> {
        let mut keys = self.keys.iter();
        keys.find(|key| self.names.contains(key.name()) && info.signed_by(key))
            .map(PublicKey::name)
    }
}
