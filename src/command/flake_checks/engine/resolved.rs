//! Which derivations Nix builds in the place of which: one with content-addressed inputs is resolved, that is, gets the
//! store paths of these inputs, and what is built, logged and failed from then on is the resolved derivation.

use std::collections::HashMap;

use flywheel_nix::store_path::StorePath;

#[derive(Debug, Default)]
pub(super) struct ResolvedDerivations {
    by_original: HashMap<StorePath, StorePath>,
    originals: HashMap<StorePath, Vec<StorePath>>,
}

impl ResolvedDerivations {
    pub(super) fn insert(&mut self, original: StorePath, resolved: StorePath) {
        let originals = self.originals.entry(resolved.clone()).or_default();
        if !originals.contains(&original) {
            originals.push(original.clone());
        }
        self.by_original.insert(original, resolved);
    }

    /// The names under which Nix may report the build of this derivation.
    pub(super) fn names_of<'a>(
        &'a self,
        original: &'a StorePath,
    ) -> impl Iterator<Item = &'a StorePath> {
        std::iter::once(original).chain(self.by_original.get(original))
    }

    /// The derivations that this one is built for. Several may resolve to the same one.
    pub(super) fn built_for<'a>(
        &'a self,
        built: &'a StorePath,
    ) -> impl Iterator<Item = &'a StorePath> {
        let originals = self.originals.get(built);
        std::iter::once(built).chain(originals.into_iter().flatten())
    }
}
