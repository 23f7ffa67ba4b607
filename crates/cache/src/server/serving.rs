//! The body of a served NAR, as it is stored or in the compression in which it came. One that has not been checked since the server's start is checked while it is sent, and
//! its last piece is sent only if it is good: no client ever gets the whole of a damaged one.

use std::fs::{File, Metadata};
use std::io::{self, Read as _};
use std::sync::Arc;

use axum::body::{Body, Bytes};
use liblzma::read::XzEncoder;
use liblzma::stream::{Check, Stream};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::io::ReaderStream;

use crate::server::ingest::Format;
use crate::server::sound::{NarCheck, is_damage};
use crate::server::store::{OpenNar, Store};
use flywheel_nix::hash::Sha256;

/// Bytes of a served NAR to hold in memory.
const READ_BUFFER: usize = 128 * 1024;
/// The level of xz that costs the least: nobody keeps the result.
const XZ_LEVEL: u32 = 0;

/// Streamed from disk: a NAR may be larger than memory.
pub(crate) fn body(nar: OpenNar, hash: Sha256, store: Arc<Store>) -> Body {
    let OpenNar {
        file,
        about,
        checked,
    } = nar;
    if checked {
        let file = tokio::fs::File::from_std(file);
        return Body::from_stream(ReaderStream::with_capacity(file, READ_BUFFER));
    }
    let reader = CheckedReader {
        file,
        about,
        hash,
        store,
        check: None,
        sent: 0,
    };
    Body::from_stream(futures_util::stream::try_unfold(reader, async |reader| {
        // Reading and decompressing block, as for any file.
        tokio::task::spawn_blocking(move || reader.next())
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)))
    }))
}

/// A NAR that has been checked, decompressed or compressed anew. `turn` is given back at its end.
///
/// # Errors
/// When memory is short.
pub(crate) fn repacked(
    nar: impl io::Read + Send + 'static,
    format: Format,
    turn: OwnedSemaphorePermit,
) -> io::Result<Body> {
    let reader: Box<dyn io::Read + Send> = match format {
        Format::None => Box::new(nar),
        Format::Xz => {
            let stream = Stream::new_easy_encoder(XZ_LEVEL, Check::Crc64)?;
            Box::new(XzEncoder::new_stream(nar, stream))
        }
        Format::Zstd => Box::new(zstd::stream::read::Encoder::new(nar, 1)?),
    };
    let stream = futures_util::stream::try_unfold((reader, turn), async |(mut reader, turn)| {
        // Decompressing blocks.
        tokio::task::spawn_blocking(move || {
            let mut piece = Vec::new();
            let read = reader
                .by_ref()
                .take(READ_BUFFER as u64)
                .read_to_end(&mut piece)?;
            Ok((read > 0).then(|| (Bytes::from(piece), (reader, turn))))
        })
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)))
    });
    Ok(Body::from_stream(stream))
}

struct CheckedReader {
    file: File,
    about: Metadata,
    hash: Sha256,
    store: Arc<Store>,
    /// Made for the first piece, because the body of an answer to HEAD is never read.
    check: Option<Box<NarCheck>>,
    sent: u64,
}

impl CheckedReader {
    fn next(mut self) -> io::Result<Option<(Bytes, Self)>> {
        let mut check = match self.check.take() {
            Some(check) => check,
            None if self.sent == 0 => Box::new(NarCheck::new()?),
            // The last piece has been sent.
            None => return Ok(None),
        };
        let mut piece = vec![0; READ_BUFFER];
        let read = match self.file.read(&mut piece) {
            Err(error) if is_damage(&error) => return self.damaged(),
            read => read?,
        };
        piece.truncate(read);
        self.sent += read as u64;
        if read == 0 || !check.take(&piece) {
            return self.damaged();
        }
        if self.sent < self.about.len() {
            self.check = Some(check);
        } else {
            let Some(nar) = check.finish(&self.hash) else {
                return self.damaged();
            };
            self.store.note_checked(&self.hash, &self.about, nar);
        }
        Ok(Some((piece.into(), self)))
    }

    /// Ends the body too early, so that the client sees that it is not whole.
    fn damaged<T>(&self) -> io::Result<T> {
        self.store.remove_damaged(&self.hash, &self.about)?;
        Err(io::Error::other("the stored NAR is damaged"))
    }
}
