//! What is at a store path before anything comes there: whose it can be, and what it is.

use std::io::{self, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use sha2::{Digest as _, Sha256 as Hasher};

use crate::hash::Sha256;
use crate::nar;

/// Whether another ordinary user can have written what is at this store path. What has the store's usual modes inside of a
/// folder of root's or of our own is theirs.
pub(super) fn can_be_of_others(file: &Path) -> bool {
    file.symlink_metadata().is_ok_and(|facts| {
        let is_ours = [0, rustix::process::geteuid().as_raw()].contains(&facts.uid());
        !is_ours || (!facts.is_symlink() && facts.mode() & 0o022 != 0)
    })
}

/// The hash of what is there, if it can be read.
pub(super) fn nar_hash(path: &Path) -> Option<Sha256> {
    let mut out = HashedBytes(Hasher::new());
    nar::write(path, &mut out).ok()?;
    Some(Sha256(out.0.finalize().into()))
}

struct HashedBytes(Hasher);

impl Write for HashedBytes {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
