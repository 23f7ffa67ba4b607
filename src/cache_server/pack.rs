//! Compresses NARs that are in memory whole. Knows no file, and never what a NAR holds.

use std::fmt;
use std::io;
use std::sync::{Mutex, PoisonError};

use zstd::bulk::Compressor;
use zstd::zstd_safe::CParameter;

/// Compressors that are kept for the next NAR, at most: some MiB each at the highest level.
const SPARE: usize = 2;

/// Compressors in store, since making one takes longer than compressing a NAR of some KiB.
pub struct Packers {
    level: i32,
    spare: Mutex<Vec<Compressor<'static>>>,
}

impl Packers {
    /// For this level of zstd.
    pub fn new(level: i32) -> Self {
        Self { level, spare: Mutex::default() }
    }

    /// One frame, with its checksum and its content's size, as a NAR that comes piece by piece gets.
    ///
    /// # Errors
    /// When memory fails.
    pub fn pack(&self, nar: &[u8]) -> io::Result<Vec<u8>> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut packer = spare.map_or_else(|| self.fresh(), Ok)?;
        let packed = packer.compress(nar)?;
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < SPARE {
            spare.push(packer);
        }
        Ok(packed)
    }

    fn fresh(&self) -> io::Result<Compressor<'static>> {
        let mut packer = Compressor::new(self.level)?;
        packer.set_parameter(CParameter::ChecksumFlag(true))?;
        Ok(packer)
    }
}

impl fmt::Debug for Packers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packers").field("level", &self.level).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compressor_that_was_used_packs_as_a_new_one() {
        let packers = Packers::new(3);
        let nars = [b"first".repeat(1000), b"other".repeat(50), Vec::new(), vec![7; 256 * 1024]];
        for nar in &nars {
            let packed = packers.pack(nar).expect("memory");
            assert_eq!(packed, Packers::new(3).pack(nar).expect("memory"));
            assert_eq!(zstd::decode_all(&*packed).expect("zstd"), *nar);
            assert_eq!(zstd::zstd_safe::get_frame_content_size(&packed).ok().flatten(), Some(nar.len() as u64));
        }
        assert_eq!(packers.spare.lock().expect("sound").len(), 1);
    }
}
