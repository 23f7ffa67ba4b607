//! Compresses NARs, whole or piece by piece. Knows nothing about files or the content of a NAR.

use std::fmt;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use zstd::bulk::Compressor;
use zstd::zstd_safe::{CParameter, compress_bound};

/// Maximum number of idle compressors; each takes some MiB at the highest level.
const MAX_SPARE: usize = 2;

/// A pool of compressors, because creating one takes longer than compressing a NAR of a few KiB.
pub(crate) struct CompressorPool {
    level: i32,
    spare: Mutex<Vec<Compressor<'static>>>,
}

impl CompressorPool {
    /// For this level of zstd.
    pub(crate) fn new(level: i32) -> Self {
        Self {
            level,
            spare: Mutex::default(),
        }
    }

    /// Compresses a NAR into one frame with a checksum and the content size, in the same format as
    /// each frame of `FrameEncoder`.
    ///
    /// # Errors
    /// When memory fails.
    pub(crate) fn compress(&self, nar: &[u8]) -> io::Result<Vec<u8>> {
        let spare = self
            .spare
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let mut compressor = spare.map_or_else(|| self.fresh(), Ok)?;
        let compressed = compressor.compress(nar)?;
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < MAX_SPARE {
            spare.push(compressor);
        }
        Ok(compressed)
    }

    fn fresh(&self) -> io::Result<Compressor<'static>> {
        compressor(self.level)
    }
}

fn compressor(level: i32) -> io::Result<Compressor<'static>> {
    let mut compressor = Compressor::new(level)?;
    // The checksum lets a reader notice damage while decompressing.
    compressor.set_parameter(CParameter::ChecksumFlag(true))?;
    Ok(compressor)
}

impl fmt::Debug for CompressorPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompressorPool")
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}

/// Compresses what is written into frames, each from one contiguous buffer. A single streamed
/// frame, whose window wraps all the time, would take a quarter to a half longer.
pub(crate) struct FrameEncoder<W> {
    compressor: Compressor<'static>,
    /// Bytes of content per frame.
    size: usize,
    pending: Vec<u8>,
    compressed: Vec<u8>,
    wrote_frame: bool,
    out: W,
}

impl<W: Write> FrameEncoder<W> {
    /// For this level of zstd.
    ///
    /// # Errors
    /// When memory fails.
    pub(crate) fn new(level: i32, out: W) -> io::Result<Self> {
        // At least the window of the level, so that splitting costs little compression.
        let size = if level <= 5 { 2 << 20 } else { 8 << 20 };
        Ok(Self {
            compressor: compressor(level)?,
            size,
            pending: Vec::new(),
            compressed: Vec::new(),
            wrote_frame: false,
            out,
        })
    }

    fn write_frame(&mut self) -> io::Result<()> {
        self.compressed.clear();
        self.compressed.reserve(compress_bound(self.pending.len()));
        self.compressor
            .compress_to_buffer(&self.pending, &mut self.compressed)?;
        self.wrote_frame = true;
        self.pending.clear();
        self.out.write_all(&self.compressed)
    }

    /// Writes what is left. Without any input, it writes one empty frame.
    ///
    /// # Errors
    /// When the output fails, or memory runs out.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        // An empty file would not be valid zstd.
        if !self.pending.is_empty() || !self.wrote_frame {
            self.write_frame()?;
        }
        Ok(self.out)
    }
}

impl<W: Write> Write for FrameEncoder<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(self.size - self.pending.len());
        self.pending.extend_from_slice(&bytes[..taken]);
        if self.pending.len() == self.size {
            self.write_frame()?;
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
        let packers = CompressorPool::new(3);
        let nars = [
            b"first".repeat(1000),
            b"other".repeat(50),
            Vec::new(),
            vec![7; 256 * 1024],
        ];
        for nar in &nars {
            let compressed = packers.compress(nar).expect("memory");
            assert_eq!(
                compressed,
                CompressorPool::new(3).compress(nar).expect("memory")
            );
            assert_eq!(zstd::decode_all(&*compressed).expect("zstd"), *nar);
            assert_eq!(
                zstd::zstd_safe::get_frame_content_size(&compressed)
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
            let mut compressor = FrameEncoder::new(3, Vec::new()).expect("memory");
            for piece in nar.chunks(100_000) {
                compressor.write_all(piece).expect("memory");
            }
            let compressed = compressor.finish().expect("memory");
            assert!(
                zstd::decode_all(&*compressed).expect("zstd") == nar,
                "{length}"
            );
            let (mut rest, mut found) = (&*compressed, 0);
            while !rest.is_empty() {
                let size = zstd::zstd_safe::find_frame_compressed_size(rest).expect("a frame");
                (rest, found) = (&rest[size..], found + 1);
            }
            assert_eq!(found, frames, "{length}");
        }
    }
}
