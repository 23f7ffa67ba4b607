//! Reads a NAR from the network into a temporary file: decompresses, checks its form, hashes, counts
//! and compresses it in one pass, in constant memory. Does not decide whether it is the announced NAR.

use std::fs::File;
use std::io::{self, Write};

use axum::body::Bytes;
use liblzma::stream::{CONCATENATED, Stream};
use liblzma::write::XzDecoder;
use sha2::Digest as _;
use tempfile::NamedTempFile;
use tokio::sync::mpsc;

use crate::server::body::RequestBody;
use crate::server::compress::FrameEncoder;
use crate::server::error::ErrorResponse;
use crate::server::store::StoredNar;
use crate::server::upload_name::{self, SIGNATURE_LENGTH};
use flywheel_nix::hash::Sha256;
use flywheel_nix::nar_validator::{NarError, NarValidator};

/// Pieces queued for the worker thread; each is at most as large as the connection's buffer.
const QUEUE_LENGTH: usize = 4;
/// Memory limit for decompressing xz: `xz -9` needs 65 MiB, Nix's default level 9 MiB.
const XZ_MEMORY: u64 = 72 * 1024 * 1024;
/// Maximum window for decompressing zstd: 2^25 bytes, 32 MiB. Levels up to 19 need 8 MiB.
const ZSTD_WINDOW_LOG: u32 = 25;
/// A compressed NAR of unknown size may unpack to this many bytes …
const UNPACKED_BASE: u64 = 1024 * 1024 * 1024;
/// … and this many for each byte received. Real NARs have a tenth of it at most; one of nothing but zeros may have more.
const UNPACKED_RATIO: u64 = 1024;

/// The compression of an uploaded NAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    None,
    /// xz, the default of `nix copy`.
    Xz,
    Zstd,
}

#[derive(Debug)]
pub(crate) struct IngestOptions {
    pub(crate) format: Format,
    /// The NAR's announced size in bytes, if known; reading stops there.
    pub(crate) nar_size: Option<u64>,
    /// Where to write it; `None` if it is stored already and only its hash is needed.
    pub(crate) target: Option<NamedTempFile>,
    /// The zstd level for storing it.
    pub(crate) level: i32,
}

#[derive(Debug)]
pub(crate) struct IngestedNar {
    pub(crate) nar_hash: Sha256,
    /// Size of the NAR in bytes.
    pub(crate) nar_size: u64,
    /// Hash of the bytes as received.
    pub(crate) received_hash: Sha256,
    /// Number of bytes as received.
    pub(crate) received_size: u64,
    /// The complete compressed file; `None` if there was no target.
    pub(crate) stored: Option<(NamedTempFile, StoredNar)>,
}

#[derive(Debug)]
pub(crate) enum IngestError {
    TooLong,
    /// Its size is not announced, and it unpacks to too much for what was received.
    OutOfProportion,
    /// It cannot be decompressed.
    Corrupt(String),
    /// What was received, or what it unpacks to, is not a NAR.
    NoNar(NarError),
    /// It is compressed, in a way that was not announced.
    Compressed(&'static str),
    Disk(io::Error),
    /// The client disconnected.
    Abandoned,
}

enum Message {
    Data(Bytes),
    End,
}

/// Reads `body` to its end. The work runs on a thread of its own. If this future is dropped or the
/// body breaks, the thread ends and the temporary file is deleted.
///
/// # Errors
/// The outer error if the body breaks or stalls, the inner one if the NAR is at fault.
pub(crate) async fn ingest(
    body: &mut RequestBody,
    options: IngestOptions,
) -> Result<Result<IngestedNar, IngestError>, ErrorResponse> {
    let (pieces, received) = mpsc::channel(QUEUE_LENGTH);
    // Compressing would block the runtime's own threads.
    let worker = tokio::task::spawn_blocking(move || work(received, options));
    let sent = send(body, &pieces).await;
    drop(pieces);
    let ended = worker.await;
    // A broken body is reported first; the worker then only knows that it ended early.
    sent?;
    ended.map_err(|error| ErrorResponse::internal(&io::Error::other(error)))
}

async fn send(body: &mut RequestBody, pieces: &mpsc::Sender<Message>) -> Result<(), ErrorResponse> {
    while let Some(piece) = body.next().await? {
        if pieces.send(Message::Data(piece)).await.is_err() {
            // The worker has failed and returns the reason.
            return Ok(());
        }
    }
    let _ = pieces.send(Message::End).await;
    Ok(())
}

fn work(
    mut pieces: mpsc::Receiver<Message>,
    options: IngestOptions,
) -> Result<IngestedNar, IngestError> {
    let mut ingest = Ingest::new(options)?;
    loop {
        match pieces.blocking_recv() {
            // The channel closed without the end marker, so the body is incomplete.
            None => return Err(IngestError::Abandoned),
            Some(Message::End) => return ingest.finish(),
            Some(Message::Data(piece)) => ingest.take(&piece)?,
        }
    }
}

/// The state of one upload.
struct Ingest {
    format: Format,
    target: Option<NamedTempFile>,
    decoder: Decoder,
    received: sha2::Sha256,
    received_size: u64,
}

impl Ingest {
    fn new(options: IngestOptions) -> Result<Self, IngestError> {
        let sink = NarSink::new(&options, options.target.as_ref()).map_err(IngestError::Disk)?;
        let decoder = Decoder::new(options.format, sink)
            .map_err(|error| IngestError::Corrupt(error.to_string()))?;
        Ok(Self {
            format: options.format,
            target: options.target,
            decoder,
            received: sha2::Sha256::new(),
            received_size: 0,
        })
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), IngestError> {
        // The hash of an uncompressed NAR is that of its bytes, which the sink computes.
        if self.format != Format::None {
            self.received.update(bytes);
        }
        self.received_size += bytes.len() as u64;
        if self.format != Format::None {
            self.decoder.sink().proportion =
                UNPACKED_BASE.saturating_add(self.received_size.saturating_mul(UNPACKED_RATIO));
        }
        self.decoder.take(bytes)
    }

    fn finish(self) -> Result<IngestedNar, IngestError> {
        let (nar_hash, nar_size, file) = self.decoder.finish()?;
        let received_hash = if self.format == Format::None {
            nar_hash
        } else {
            Sha256(self.received.finalize().into())
        };
        // A NAR that was too short has a target but no file.
        let stored = self.target.zip(file);
        Ok(IngestedNar {
            nar_hash,
            nar_size,
            received_hash,
            received_size: self.received_size,
            stored,
        })
    }
}

/// The sink for decompressed bytes: checks, counts and hashes them, and compresses them into the file.
struct NarSink {
    hash: sha2::Sha256,
    size: u64,
    limit: Option<u64>,
    /// The most bytes that are in proportion to what was received, where no limit is known.
    proportion: u64,
    validator: NarValidator,
    /// The first bytes, by which a compressed file is recognised.
    beginning: Vec<u8>,
    compressor: Option<FrameEncoder<HashingFile>>,
    /// Why a write failed, because the decoder around this sink would hide the reason.
    error: Option<IngestError>,
}

impl NarSink {
    fn new(options: &IngestOptions, target: Option<&NamedTempFile>) -> io::Result<Self> {
        let compressor = target.map(|file| compressor(file, options)).transpose()?;
        Ok(Self {
            hash: sha2::Sha256::new(),
            size: 0,
            limit: options.nar_size,
            proportion: u64::MAX,
            validator: NarValidator::default(),
            beginning: Vec::new(),
            compressor,
            error: None,
        })
    }

    /// Returns the NAR's hash and size, and its file.
    fn finish(self) -> Result<(Sha256, u64, Option<StoredNar>), IngestError> {
        let whole = self.limit.is_none_or(|limit| self.size == limit);
        if whole {
            self.validator.finish().map_err(IngestError::NoNar)?;
        }
        let file = match self.compressor {
            // A NAR shorter than announced is not stored.
            Some(compressor) if whole => {
                let file = compressor.finish().map_err(IngestError::Disk)?;
                Some(StoredNar {
                    file_hash: Sha256(file.hash.finalize().into()),
                    file_size: file.size,
                })
            }
            _ => None,
        };
        Ok((Sha256(self.hash.finalize().into()), self.size, file))
    }
}

fn compressor(
    file: &NamedTempFile,
    options: &IngestOptions,
) -> io::Result<FrameEncoder<HashingFile>> {
    FrameEncoder::new(
        options.level,
        HashingFile {
            file: file.as_file().try_clone()?,
            hash: sha2::Sha256::new(),
            size: 0,
        },
    )
}

impl NarSink {
    /// Whether the bytes may be the next of a NAR of the right size.
    fn check(&mut self, bytes: &[u8]) -> Result<(), IngestError> {
        self.size += bytes.len() as u64;
        // Checked on each write, so that an endless NAR is not read to its end.
        match self.limit {
            Some(limit) if self.size > limit => return Err(IngestError::TooLong),
            None if self.size > self.proportion => return Err(IngestError::OutOfProportion),
            _ => (),
        }
        let more = SIGNATURE_LENGTH.saturating_sub(self.beginning.len());
        self.beginning.extend(bytes.iter().take(more));
        self.validator.take(bytes).map_err(|error| {
            upload_name::compression(&self.beginning)
                .map_or(IngestError::NoNar(error), IngestError::Compressed)
        })
    }
}

impl Write for NarSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Err(error) = self.check(bytes) {
            self.error = Some(error);
            return Err(io::Error::other("the NAR is refused"));
        }
        self.hash.update(bytes);
        if let Some(compressor) = &mut self.compressor
            && let Err(error) = compressor.write_all(bytes)
        {
            let copy = io::Error::new(error.kind(), error.to_string());
            self.error = Some(IngestError::Disk(error));
            return Err(copy);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct HashingFile {
    file: File,
    hash: sha2::Sha256,
    size: u64,
}

impl Write for HashingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A write may take only part of the bytes; hash exactly those.
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

enum Decoder {
    None(Box<NarSink>),
    Xz(Box<XzDecoder<NarSink>>),
    Zstd(Box<zstd::stream::write::Decoder<'static, NarSink>>),
}

impl Decoder {
    fn new(format: Format, sink: NarSink) -> io::Result<Self> {
        Ok(match format {
            Format::None => Self::None(Box::new(sink)),
            Format::Xz => {
                // `xz` files may consist of several streams.
                let stream = Stream::new_stream_decoder(XZ_MEMORY, CONCATENATED)?;
                Self::Xz(Box::new(XzDecoder::new_stream(sink, stream)))
            }
            Format::Zstd => {
                let mut decoder = zstd::stream::write::Decoder::new(sink)?;
                // The header of a frame decides how much memory decoding takes.
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Self::Zstd(Box::new(decoder))
            }
        })
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), IngestError> {
        let written = match self {
            Self::None(sink) => sink.write_all(bytes),
            Self::Xz(decoder) => decoder.write_all(bytes),
            Self::Zstd(decoder) => decoder.write_all(bytes),
        };
        written.map_err(|error| self.error_from(&error))
    }

    fn sink(&mut self) -> &mut NarSink {
        match self {
            Self::None(sink) => sink,
            Self::Xz(decoder) => decoder.get_mut(),
            Self::Zstd(decoder) => decoder.get_mut(),
        }
    }

    /// Finds the cause of an error: the sink has recorded its own.
    fn error_from(&mut self, error: &io::Error) -> IngestError {
        self.sink()
            .error
            .take()
            .unwrap_or_else(|| IngestError::Corrupt(error.to_string()))
    }

    fn finish(mut self) -> Result<(Sha256, u64, Option<StoredNar>), IngestError> {
        let ended = match &mut self {
            Self::None(_) => Ok(()),
            // Detects a truncated stream.
            Self::Xz(decoder) => decoder.try_finish(),
            Self::Zstd(decoder) => decoder.do_finish(),
        };
        if let Err(error) = ended {
            return Err(self.error_from(&error));
        }
        match self {
            Self::None(sink) => sink.finish(),
            Self::Xz(decoder) => decoder
                .finish()
                .map_err(|error| IngestError::Corrupt(error.to_string()))?
                .finish(),
            Self::Zstd(decoder) => decoder.into_inner().finish(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    /// A symbolic link to `target`.
    const NAR: &[u8] = b"\x0d\0\0\0\0\0\0\0nix-archive-1\0\0\0\x01\0\0\0\0\0\0\0(\0\0\0\0\0\0\0\
        \x04\0\0\0\0\0\0\0type\0\0\0\0\x07\0\0\0\0\0\0\0symlink\0\x06\0\0\0\0\0\0\0target\0\0\
        \x06\0\0\0\0\0\0\0target\0\0\x01\0\0\0\0\0\0\0)\0\0\0\0\0\0\0";

    async fn check(
        bytes: Vec<u8>,
        format: Format,
        nar_size: Option<u64>,
    ) -> Result<IngestedNar, IngestError> {
        let pieces: Vec<io::Result<Bytes>> = bytes
            .chunks(7)
            .map(|piece| Ok(Bytes::copy_from_slice(piece)))
            .collect();
        let mut body = RequestBody::new(Body::from_stream(futures_util::stream::iter(pieces)));
        let target = Some(NamedTempFile::new().expect("temporary file"));
        ingest(
            &mut body,
            IngestOptions {
                format,
                nar_size,
                target,
                level: 3,
            },
        )
        .await
        .expect("the body is whole")
    }

    fn xz(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
        encoder.write_all(bytes).expect("memory");
        encoder.finish().expect("memory")
    }

    #[tokio::test]
    async fn every_format_gives_the_same_nar() {
        let hash = Sha256(sha2::Sha256::digest(NAR).into());
        let zstd = zstd::encode_all(NAR, 3).expect("memory");
        for (bytes, format) in [
            (NAR.to_vec(), Format::None),
            (xz(NAR), Format::Xz),
            (zstd, Format::Zstd),
        ] {
            let came = bytes.clone();
            let taken = check(bytes, format, None).await.expect("good");
            assert_eq!((taken.nar_hash, taken.nar_size), (hash, NAR.len() as u64));
            assert_eq!(
                taken.received_hash,
                Sha256(sha2::Sha256::digest(&came).into())
            );
            let (file, nar) = taken.stored.expect("wanted");
            let stored = std::fs::read(file.path()).expect("written");
            let file_hash = Sha256(sha2::Sha256::digest(&stored).into());
            assert_eq!(
                nar,
                StoredNar {
                    file_hash,
                    file_size: stored.len() as u64
                }
            );
            assert_eq!(zstd::decode_all(&*stored).expect("zstd"), NAR);
        }
    }

    #[tokio::test]
    async fn what_is_cut_or_no_archive_is_refused() {
        for (mut bytes, format) in [
            (xz(NAR), Format::Xz),
            (zstd::encode_all(NAR, 3).expect("memory"), Format::Zstd),
        ] {
            bytes.truncate(bytes.len() - 3);
            assert!(
                matches!(
                    check(bytes, format, None).await,
                    Err(IngestError::Corrupt(_))
                ),
                "{format:?} cut"
            );
            assert!(
                matches!(
                    check(NAR.to_vec(), format, None).await,
                    Err(IngestError::Corrupt(_))
                ),
                "{format:?} garbage"
            );
        }
    }

    #[tokio::test]
    async fn more_than_announced_is_not_read_and_less_is_not_stored() {
        assert!(matches!(
            check(NAR.to_vec(), Format::None, Some(5)).await,
            Err(IngestError::TooLong)
        ));
        let short = check(NAR.to_vec(), Format::None, Some(500))
            .await
            .expect("told by its size");
        assert!(short.nar_size == NAR.len() as u64 && short.stored.is_none());
    }

    #[tokio::test]
    async fn what_is_no_nar_is_refused_and_its_compression_named() {
        let garbage = vec![b'x'; 5000];
        let cut = NAR[..NAR.len() - 8].to_vec();
        for bytes in [garbage, cut, Vec::new(), [NAR, b"more"].concat()] {
            let zstd = zstd::encode_all(&*bytes, 3).expect("memory");
            for (bytes, format) in [
                (bytes.clone(), Format::None),
                (xz(&bytes), Format::Xz),
                (zstd, Format::Zstd),
            ] {
                let taken = check(bytes, format, None).await;
                assert!(matches!(taken, Err(IngestError::NoNar(_))), "{taken:?}");
            }
        }
        let gzip = b"\x1f\x8b\x08\0\0\0\0\0\x02\x03 and so on".to_vec();
        for (bytes, name) in [(gzip, "gzip"), (xz(NAR), "xz")] {
            let taken = check(bytes, Format::None, None).await;
            assert!(
                matches!(taken, Err(IngestError::Compressed(found)) if found == name),
                "{taken:?}"
            );
        }
    }

    #[tokio::test]
    async fn what_unpacks_out_of_proportion_is_not_unpacked_to_its_end() {
        // The head of a file of 2 GiB, and as many zeros.
        let mut nar = NAR[..56].to_vec();
        for word in ["regular", "contents"] {
            nar.extend((word.len() as u64).to_le_bytes());
            nar.extend(word.as_bytes());
            nar.resize(nar.len().next_multiple_of(8), 0);
        }
        nar.extend((2 * UNPACKED_BASE).to_le_bytes());
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).expect("memory");
        encoder.write_all(&nar).expect("memory");
        let zeros = vec![0; 1024 * 1024];
        for _ in 0..2 * UNPACKED_BASE / zeros.len() as u64 {
            encoder.write_all(&zeros).expect("memory");
        }
        let bytes = encoder.finish().expect("memory");
        assert!(bytes.len() < 512 * 1024, "{}", bytes.len());
        let taken = check(bytes, Format::Zstd, None).await;
        assert!(
            matches!(taken, Err(IngestError::OutOfProportion)),
            "{taken:?}"
        );
    }
}
