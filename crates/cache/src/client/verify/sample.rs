//! Which bodies are read back: all below a budget, and above it a sample over all sizes, drawn by a seed. Pure.

use std::fmt;

use sha2::{Digest as _, Sha256};

use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::StorePath;

/// Bodies that are read back of the paths that the cache had already, in one job.
pub(crate) const ALREADY_THERE: usize = 4;
/// Of those, one that is larger than this, in bytes, is read only with the chance `LARGE_BODY / size`, so that the
/// expected number of bytes has a bound and no size is safe from being read.
const LARGE_BODY: u64 = 16 * 1024 * 1024;

/// The seed of a sample. It is random, so that no server can know which bodies are read, and printed, so that the draw
/// can be repeated: the paths are ordered by the SHA-256 of the seed's text, a space and the path's base name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seed(pub u64);

impl Seed {
    /// A new seed.
    #[must_use]
    pub fn random() -> Self {
        Self(fastrand::u64(..))
    }

    /// A path's place in the order of the draw: the lowest come first.
    pub(crate) fn rank(self, path: &StorePath) -> u64 {
        self.number(path.base_name())
    }

    /// Whether a body of this size is read, once its path is drawn from those that were there already.
    pub(crate) fn reads(self, info: &PathInfo) -> bool {
        let chance = LARGE_BODY as f64 / info.nar_size.max(1) as f64;
        self.fraction(&format!("size of {}", info.path.base_name())) < chance
    }

    fn number(self, text: &str) -> u64 {
        let digest = Sha256::digest(format!("{self} {text}"));
        let first = digest.first_chunk().expect("SHA-256 has 32 bytes");
        u64::from_be_bytes(*first)
    }

    /// A number from 0 up to, but without, 1.
    fn fraction(self, text: &str) -> f64 {
        // The 53 bits that a `f64` holds exactly.
        (self.number(text) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

impl fmt::Display for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The indices of the paths with a body that is read: of all paths if their NARs are no larger than `budget` bytes
/// together. Otherwise each body is read with the same chance, which is the budget's share of all bytes: so the expected
/// number of bytes is the budget, and of damaged bodies the same share is found, whatever their sizes.
pub(crate) fn draw(paths: &[PathInfo], seed: Seed, budget: u64) -> Vec<usize> {
    let total: u64 = paths.iter().map(|info| info.nar_size).sum();
    if total <= budget {
        return (0..paths.len()).collect();
    }
    let expected = paths.len() as f64 * budget as f64 / total as f64;
    // The fraction is drawn, too: always rounding up would read the one body of a job that sends a single large path.
    let drawn =
        expected.floor() as usize + usize::from(seed.fraction("one body more") < expected.fract());
    let mut order: Vec<usize> = (0..paths.len()).collect();
    order.sort_by_cached_key(|n| seed.rank(&paths[*n].path));
    order.truncate(drawn);
    order
}
