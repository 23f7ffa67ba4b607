//! Compresses NARs, whole or piece by piece. Knows no file, and never what a NAR holds.

use std::fmt;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use zstd::bulk::Compressor;
use zstd::zstd_safe::{CParameter, compress_bound};

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
        Self {
            level,
            spare: Mutex::default(),
        }
    }

    /// One frame, with its checksum and its content's size, as each of a NAR that comes in pieces has.
    ///
    /// # Errors
    /// When memory fails.
    pub fn pack(&self, nar: &[u8]) -> io::Result<Vec<u8>> {
        let spare = self
            .spare
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let mut packer = spare.map_or_else(|| self.fresh(), Ok)?;
        let packed = packer.compress(nar)?;
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < SPARE {
            spare.push(packer);
        }
        Ok(packed)
    }

    fn fresh(&self) -> io::Result<Compressor<'static>> {
        compressor(self.level)
    }
}

fn compressor(level: i32) -> io::Result<Compressor<'static>> {
    let mut packer = Compressor::new(level)?;
    packer.set_parameter(CParameter::ChecksumFlag(true))?;
    Ok(packer)
}

impl fmt::Debug for Packers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packers")
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}

/// Compresses what is written and hands it on, as frames that each come from memory in one piece: a stream of one
/// frame, whose window wraps all the time, takes a quarter to a half longer.
pub struct Frames<W> {
    packer: Compressor<'static>,
    /// Bytes of a frame's content.
    size: usize,
    gathered: Vec<u8>,
    packed: Vec<u8>,
    begun: bool,
    out: W,
}

impl<W: Write> Frames<W> {
    /// For this level of zstd.
    ///
    /// # Errors
    /// When memory fails.
    pub fn new(level: i32, out: W) -> io::Result<Self> {
        // As far as the level looks back, or some more.
        let size = if level <= 5 { 2 << 20 } else { 8 << 20 };
        Ok(Self {
            packer: compressor(level)?,
            size,
            gathered: Vec::new(),
            packed: Vec::new(),
            begun: false,
            out,
        })
    }

    fn pack(&mut self) -> io::Result<()> {
        self.packed.clear();
        self.packed.reserve(compress_bound(self.gathered.len()));
        self.packer
            .compress_to_buffer(&self.gathered, &mut self.packed)?;
        self.begun = true;
        self.gathered.clear();
        self.out.write_all(&self.packed)
    }

    /// Hands on what is left. Of nothing one frame becomes, too.
    ///
    /// # Errors
    /// Those of what it is handed to, or when memory fails.
    pub fn finish(mut self) -> io::Result<W> {
        if !self.gathered.is_empty() || !self.begun {
            self.pack()?;
        }
        Ok(self.out)
    }
}

impl<W: Write> Write for Frames<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(self.size - self.gathered.len());
        self.gathered.extend_from_slice(&bytes[..taken]);
        if self.gathered.len() == self.size {
            self.pack()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compressor_that_was_used_packs_as_a_new_one() {
        let packers = Packers::new(3);
        let nars = [
            b"first".repeat(1000),
            b"other".repeat(50),
            Vec::new(),
            vec![7; 256 * 1024],
        ];
        for nar in &nars {
            let packed = packers.pack(nar).expect("memory");
            assert_eq!(packed, Packers::new(3).pack(nar).expect("memory"));
            assert_eq!(zstd::decode_all(&*packed).expect("zstd"), *nar);
            assert_eq!(
                zstd::zstd_safe::get_frame_content_size(&packed)
                    .ok()
                    .flatten(),
                Some(nar.len() as u64)
            );
        }
        assert_eq!(packers.spare.lock().expect("sound").len(), 1);
    }

    #[test]
    fn what_comes_in_pieces_unpacks_to_the_same_wherever_a_frame_ends() {
        const FRAME: usize = 2 << 20;
        for (length, frames) in [
            (0, 1),
            (1, 1),
            (FRAME - 1, 1),
            (FRAME, 1),
            (FRAME + 1, 2),
            (2 * FRAME, 2),
        ] {
            let nar: Vec<u8> = (0..length).map(|at| (at / 3 * 7) as u8).collect();
            let mut packer = Frames::new(3, Vec::new()).expect("memory");
            for piece in nar.chunks(100_000) {
                packer.write_all(piece).expect("memory");
            }
            let packed = packer.finish().expect("memory");
            assert!(zstd::decode_all(&*packed).expect("zstd") == nar, "{length}");
            let (mut rest, mut found) = (&*packed, 0);
            while !rest.is_empty() {
                let size = zstd::zstd_safe::find_frame_compressed_size(rest).expect("a frame");
                (rest, found) = (&rest[size..], found + 1);
            }
            assert_eq!(found, frames, "{length}");
        }
    }
}
