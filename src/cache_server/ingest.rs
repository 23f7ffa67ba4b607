//! Takes a NAR from the network to a temporary file: unpacks, hashes, counts, compresses, in one
//! pass with flat memory. Never decides whether what arrived is what was announced.

use std::fs::File;
use std::io::{self, Write};

use axum::body::Bytes;
use liblzma::stream::{CONCATENATED, Stream};
use liblzma::write::XzDecoder;
use sha2::Digest as _;
use tempfile::NamedTempFile;
use tokio::sync::mpsc;

use crate::cache_server::body::Incoming;
use crate::cache_server::pack::Frames;
use crate::cache_server::refusal::Refusal;
use crate::cache_server::store::StoredNar;
use crate::nix::hash::Sha256;

/// Pieces on their way to the thread that works; each has at most the connection's buffer.
const PIECES: usize = 4;
/// `xz -9` needs 65 MiB to unpack; Nix's default level needs 9 MiB.
const XZ_MEMORY: u64 = 72 * 1024 * 1024;
/// Windows up to 2^25 bytes, 32 MiB: levels up to 19 need 8 MiB.
const ZSTD_WINDOW_LOG: u32 = 25;

/// How an arriving NAR is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Not at all.
    None,
    /// xz, the default of `nix copy`.
    Xz,
    /// zstd.
    Zstd,
}

/// What to do with an arriving NAR.
#[derive(Debug)]
pub struct Plan {
    /// How it is compressed.
    pub format: Format,
    /// The NAR's announced size in bytes, if there is one: nothing beyond it is read.
    pub nar_size: Option<u64>,
    /// Where it goes; `None` when it is known here already and only its hash is wanted.
    pub target: Option<NamedTempFile>,
    /// Level of zstd for what is stored.
    pub level: i32,
}

/// What arrived.
#[derive(Debug)]
pub struct Taken {
    /// Hash of the NAR.
    pub nar_hash: Sha256,
    /// Size of the NAR in bytes.
    pub nar_size: u64,
    /// Hash of the bytes as they came.
    pub came_hash: Sha256,
    /// Number of bytes as they came.
    pub came_size: u64,
    /// The compressed file, complete; `None` if none was wanted.
    pub stored: Option<(NamedTempFile, StoredNar)>,
}

/// Why a NAR could not be taken.
#[derive(Debug)]
pub enum Stop {
    /// It is longer than announced.
    TooLong,
    /// It cannot be unpacked.
    Packing(String),
    /// The disk failed.
    Disk(io::Error),
    /// The sender went away.
    Abandoned,
}

enum Piece {
    Data(Bytes),
    End,
}

/// Reads `body` to its end. The work is done on a thread of its own; if this future is dropped, or
/// the body breaks, the thread ends and the temporary file goes.
///
/// # Errors
/// The outer error when the body breaks or stops; the inner one when the NAR is at fault.
pub async fn ingest(body: &mut Incoming, plan: Plan) -> Result<Result<Taken, Stop>, Refusal> {
    let (pieces, received) = mpsc::channel(PIECES);
    let worker = tokio::task::spawn_blocking(move || work(received, plan));
    let sent = send(body, &pieces).await;
    drop(pieces);
    let ended = worker.await;
    sent?;
    ended.map_err(|error| Refusal::internal(&io::Error::other(error)))
}

async fn send(body: &mut Incoming, pieces: &mpsc::Sender<Piece>) -> Result<(), Refusal> {
    while let Some(piece) = body.next().await? {
        if pieces.send(Piece::Data(piece)).await.is_err() {
            // The worker has given up and says why.
            return Ok(());
        }
    }
    let _ = pieces.send(Piece::End).await;
    Ok(())
}

fn work(mut pieces: mpsc::Receiver<Piece>, plan: Plan) -> Result<Taken, Stop> {
    let mut intake = Intake::new(plan)?;
    loop {
        match pieces.blocking_recv() {
            None => return Err(Stop::Abandoned),
            Some(Piece::End) => return intake.finish(),
            Some(Piece::Data(piece)) => intake.take(&piece)?,
        }
    }
}

/// A NAR on its way.
struct Intake {
    format: Format,
    target: Option<NamedTempFile>,
    unpacker: Unpacker,
    came: sha2::Sha256,
    came_size: u64,
}

impl Intake {
    fn new(plan: Plan) -> Result<Self, Stop> {
        let sink = NarSink::new(&plan, plan.target.as_ref()).map_err(Stop::Disk)?;
        let unpacker =
            Unpacker::new(plan.format, sink).map_err(|error| Stop::Packing(error.to_string()))?;
        Ok(Self {
            format: plan.format,
            target: plan.target,
            unpacker,
            came: sha2::Sha256::new(),
            came_size: 0,
        })
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), Stop> {
        // Unpacked NARs are hashed once only, by the sink.
        if self.format != Format::None {
            self.came.update(bytes);
        }
        self.came_size += bytes.len() as u64;
        self.unpacker.take(bytes)
    }

    fn finish(self) -> Result<Taken, Stop> {
        let (nar_hash, nar_size, file) = self.unpacker.finish()?;
        let came_hash = if self.format == Format::None {
            nar_hash
        } else {
            Sha256(self.came.finalize().into())
        };
        let stored = self.target.zip(file);
        Ok(Taken {
            nar_hash,
            nar_size,
            came_hash,
            came_size: self.came_size,
            stored,
        })
    }
}

/// Where unpacked bytes go: counted, hashed, compressed into the file.
struct NarSink {
    hash: sha2::Sha256,
    size: u64,
    limit: Option<u64>,
    packer: Option<Frames<Hashing>>,
    /// Why a write failed, where the packing around this sink would hide it.
    stop: Option<Stop>,
}

impl NarSink {
    fn new(plan: &Plan, target: Option<&NamedTempFile>) -> io::Result<Self> {
        let packer = target.map(|file| packer(file, plan)).transpose()?;
        Ok(Self {
            hash: sha2::Sha256::new(),
            size: 0,
            limit: plan.nar_size,
            packer,
            stop: None,
        })
    }

    /// Hash and size of the NAR, and its file.
    fn finish(self) -> Result<(Sha256, u64, Option<StoredNar>), Stop> {
        let whole = self.limit.is_none_or(|limit| self.size == limit);
        let file = match self.packer {
            // A short NAR ends here without a file: it is not what was announced.
            Some(packer) if whole => {
                let file = packer.finish().map_err(Stop::Disk)?;
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

fn packer(file: &NamedTempFile, plan: &Plan) -> io::Result<Frames<Hashing>> {
    Frames::new(
        plan.level,
        Hashing {
            file: file.as_file().try_clone()?,
            hash: sha2::Sha256::new(),
            size: 0,
        },
    )
}

impl Write for NarSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.size += bytes.len() as u64;
        if self.limit.is_some_and(|limit| self.size > limit) {
            self.stop = Some(Stop::TooLong);
            return Err(io::Error::other("longer than announced"));
        }
        self.hash.update(bytes);
        if let Some(packer) = &mut self.packer
            && let Err(error) = packer.write_all(bytes)
        {
            let said = io::Error::new(error.kind(), error.to_string());
            self.stop = Some(Stop::Disk(error));
            return Err(said);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Hashing {
    file: File,
    hash: sha2::Sha256,
    size: u64,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

enum Unpacker {
    None(Box<NarSink>),
    Xz(Box<XzDecoder<NarSink>>),
    Zstd(Box<zstd::stream::write::Decoder<'static, NarSink>>),
}

impl Unpacker {
    fn new(format: Format, sink: NarSink) -> io::Result<Self> {
        Ok(match format {
            Format::None => Self::None(Box::new(sink)),
            Format::Xz => {
                let stream = Stream::new_stream_decoder(XZ_MEMORY, CONCATENATED)?;
                Self::Xz(Box::new(XzDecoder::new_stream(sink, stream)))
            }
            Format::Zstd => {
                let mut decoder = zstd::stream::write::Decoder::new(sink)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Self::Zstd(Box::new(decoder))
            }
        })
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), Stop> {
        let written = match self {
            Self::None(sink) => sink.write_all(bytes),
            Self::Xz(decoder) => decoder.write_all(bytes),
            Self::Zstd(decoder) => decoder.write_all(bytes),
        };
        written.map_err(|error| self.blame(&error))
    }

    /// Whose fault an error was: the sink remembers its own.
    fn blame(&mut self, error: &io::Error) -> Stop {
        let sink = match self {
            Self::None(sink) => sink,
            Self::Xz(decoder) => decoder.get_mut(),
            Self::Zstd(decoder) => decoder.get_mut(),
        };
        sink.stop
            .take()
            .unwrap_or_else(|| Stop::Packing(error.to_string()))
    }

    fn finish(mut self) -> Result<(Sha256, u64, Option<StoredNar>), Stop> {
        let ended = match &mut self {
            Self::None(_) => Ok(()),
            Self::Xz(decoder) => decoder.try_finish(),
            Self::Zstd(decoder) => decoder.do_finish(),
        };
        if let Err(error) = ended {
            return Err(self.blame(&error));
        }
        match self {
            Self::None(sink) => sink.finish(),
            Self::Xz(decoder) => decoder
                .finish()
                .map_err(|error| Stop::Packing(error.to_string()))?
                .finish(),
            Self::Zstd(decoder) => decoder.into_inner().finish(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    const NAR: &[u8] = b"not really a NAR, but bytes are bytes to this module";

    async fn check(bytes: Vec<u8>, format: Format, nar_size: Option<u64>) -> Result<Taken, Stop> {
        let pieces: Vec<io::Result<Bytes>> = bytes
            .chunks(7)
            .map(|piece| Ok(Bytes::copy_from_slice(piece)))
            .collect();
        let mut body = Incoming::new(Body::from_stream(futures_util::stream::iter(pieces)));
        let target = Some(NamedTempFile::new().expect("temporary file"));
        ingest(
            &mut body,
            Plan {
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
            assert_eq!(taken.came_hash, Sha256(sha2::Sha256::digest(&came).into()));
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
                matches!(check(bytes, format, None).await, Err(Stop::Packing(_))),
                "{format:?} cut"
            );
            assert!(
                matches!(
                    check(NAR.to_vec(), format, None).await,
                    Err(Stop::Packing(_))
                ),
                "{format:?} garbage"
            );
        }
    }

    #[tokio::test]
    async fn more_than_announced_is_not_read_and_less_is_not_stored() {
        assert!(matches!(
            check(NAR.to_vec(), Format::None, Some(5)).await,
            Err(Stop::TooLong)
        ));
        let short = check(NAR.to_vec(), Format::None, Some(500))
            .await
            .expect("told by its size");
        assert!(short.nar_size == NAR.len() as u64 && short.stored.is_none());
    }
}
