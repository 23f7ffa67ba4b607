//! One NAR from the cache to the staging folder: received, unpacked and hashed at the same time, in bounded memory.

use std::io::{self, BufReader, Read};
use std::sync::Arc;

use bytes::Bytes;
use sha2::{Digest as _, Sha256 as Hasher};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep};

use crate::bootstrap::closure::Error;
use crate::bootstrap::closure::fetch::{Cache, TRIES, Trouble, next_block};
use crate::bootstrap::closure::staging::{Staging, StagingError, StagingFolder};
use crate::hash::Sha256;
use crate::nar::compression;
use crate::nar::unpack::{UnpackError, Unpacker};
use crate::narinfo::NarInfo;

/// Bodies up to this size, in bytes, are received whole before they are unpacked, so that a slow connection holds no
/// thread.
const SMALL: u64 = 1024 * 1024;
/// How many bytes a body may exceed the NAR by, besides an eighth, where the narinfo has no size: incompressible data
/// grows a little.
const SLACK: u64 = 64 * 1024;
/// Blocks of a body, each of some kilobytes, between the connection and the thread that unpacks.
const BLOCKS: usize = 16;
const BUFFER: usize = 128 * 1024;

/// What a thread found wrong with a body.
enum Problem {
    /// It is not what was signed.
    Corrupt(String),
    /// It ends too early, as when a connection breaks.
    Short(String),
    Compression,
    Disk(StagingError),
}

/// Fetches a NAR; returns when its last byte came. `turns` bounds how many are unpacked at once.
pub(super) async fn receive(
    cache: &Cache,
    info: &NarInfo,
    staging: &Staging,
    turns: &Arc<Semaphore>,
) -> Result<Instant, Error> {
    let mut tries = 0;
    loop {
        tries += 1;
        let trouble = match once(cache, info, staging, turns).await {
            Ok(Ok(when)) => return Ok(when),
            Ok(Err(problem)) => match problem {
                Problem::Short(problem) => Trouble::Network(problem),
                problem => return Err(error(cache, info, problem)),
            },
            Err(trouble) => trouble,
        };
        match TRIES.wait(tries, None).filter(|_| trouble.is_passing()) {
            Some(wait) => sleep(wait).await,
            None => {
                let problem = match trouble {
                    Trouble::Stalled | Trouble::Refused(_) => {
                        return Err(cache.error(&info.path, trouble));
                    }
                    Trouble::Status(status) => format!("HTTP status {}", status.as_u16()),
                    Trouble::Network(problem) => problem,
                };
                return Err(Error::Fetch {
                    address: cache.address(),
                    problem: format!("the NAR of `{}`: {problem}", info.path),
                });
            }
        }
        staging.discard(&info.path).await?;
    }
}

fn error(cache: &Cache, info: &NarInfo, problem: Problem) -> Error {
    let path = info.path.clone();
    match problem {
        Problem::Corrupt(problem) | Problem::Short(problem) => Error::Corrupt {
            address: cache.address(),
            path,
            problem,
        },
        Problem::Compression => Error::Compression {
            path,
            compression: info.compression.clone(),
        },
        Problem::Disk(error) => Error::Staging(error),
    }
}

/// The most bytes that a body can have.
fn limit(info: &NarInfo) -> u64 {
    info.file_size.unwrap_or_else(|| {
        info.nar_size
            .saturating_add(info.nar_size / 8)
            .saturating_add(SLACK)
    })
}

async fn once(
    cache: &Cache,
    info: &NarInfo,
    staging: &Staging,
    turns: &Arc<Semaphore>,
) -> Result<Result<Instant, Problem>, Trouble> {
    if limit(info) > SMALL {
        return streamed(cache, info, staging, turns).await;
    }
    let mut response = cache.open_body(&info.url).await?;
    let (mut blocks, mut total) = (Vec::new(), 0);
    while let Some(block) = next_block(&mut response).await? {
        total += block.len() as u64;
        // One byte more than allowed is enough to see that it is too long.
        blocks.push(block);
        if total > limit(info) {
            break;
        }
    }
    let last_byte = Instant::now();
    let _turn = turn(turns).await;
    let (into, info) = (staging.folder(), info.clone());
    let work = move || {
        unpack(
            Blocks::Whole(blocks.into_iter(), Bytes::new()),
            &info,
            &into,
        )
    };
    Ok(joined(tokio::task::spawn_blocking(work).await).map(|()| last_byte))
}

/// Unpacks a body while it comes.
async fn streamed(
    cache: &Cache,
    info: &NarInfo,
    staging: &Staging,
    turns: &Arc<Semaphore>,
) -> Result<Result<Instant, Problem>, Trouble> {
    let _turn = turn(turns).await;
    let mut response = cache.open_body(&info.url).await?;
    let (send, receive) = mpsc::channel(BLOCKS);
    let (into, described) = (staging.folder(), info.clone());
    // The thread ends with the channel, so it does not outlive this call by more than a block.
    let unpacking = tokio::task::spawn_blocking(move || {
        unpack(Blocks::Coming(receive, Bytes::new()), &described, &into)
    });
    let broken = loop {
        match next_block(&mut response).await {
            Ok(Some(block)) => {
                // The thread has ended early, with a verdict that no further byte can change.
                if send.send(block).await.is_err() {
                    break None;
                }
            }
            Ok(None) => break None,
            Err(trouble) => break Some(trouble),
        }
    };
    let last_byte = Instant::now();
    drop(send);
    let unpacked = joined(unpacking.await);
    match (broken, unpacked) {
        (Some(trouble), Err(Problem::Short(_) | Problem::Corrupt(_))) => Err(trouble),
        (_, unpacked) => Ok(unpacked.map(|()| last_byte)),
    }
}

async fn turn(turns: &Semaphore) -> tokio::sync::SemaphorePermit<'_> {
    turns.acquire().await.expect("nothing closes it")
}

fn joined(ended: Result<Result<(), Problem>, tokio::task::JoinError>) -> Result<(), Problem> {
    ended.unwrap_or_else(|panic| Err(Problem::Corrupt(panic.to_string())))
}

/// Unpacks a body on this thread, and compares it with what was signed.
fn unpack(body: Blocks, info: &NarInfo, into: &StagingFolder) -> Result<(), Problem> {
    let limit = limit(info);
    let mut packed = Packed {
        body,
        hasher: info.file_hash.map(|_| Hasher::new()),
        got: 0,
        limit,
    };
    let outcome = unpack_into(&mut packed, info, into);
    // Why it could not be unpacked is less telling than that it is too short, or too long.
    if packed.got > limit {
        return Err(Problem::Corrupt(format!(
            "it is served with more than {limit} bytes"
        )));
    }
    match (&outcome, info.file_size) {
        (Err(Problem::Corrupt(_) | Problem::Short(_)) | Ok(()), Some(size))
            if packed.got < size && packed.is_at_end() =>
        {
            let got = packed.got;
            return Err(Problem::Short(format!(
                "it ends after {got} of {size} bytes"
            )));
        }
        _ => outcome?,
    }
    let found = packed.hasher.map(|hasher| Sha256(hasher.finalize().into()));
    match (found, info.file_hash) {
        (Some(found), Some(wanted)) if found != wanted => Err(Problem::Corrupt(format!(
            "the hash of the file is {found} instead of {wanted}"
        ))),
        _ => Ok(()),
    }
}

fn unpack_into(packed: &mut Packed, info: &NarInfo, into: &StagingFolder) -> Result<(), Problem> {
    let damaged = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Problem::Short("it ends in the middle".to_owned()),
        _ => Problem::Corrupt(format!("it cannot be unpacked ({error})")),
    };
    let buffered = BufReader::with_capacity(BUFFER, packed);
    let mut reader = compression::reader(buffered, &info.compression)
        .map_err(damaged)?
        .ok_or(Problem::Compression)?;
    let disk = |source| Problem::Disk(into.failure(source));
    let folder = into.folder().map_err(disk)?;
    let mut unpacker = Unpacker::new(folder, info.path.base_name(), info.nar_size).map_err(disk)?;
    let (mut hasher, mut size) = (Hasher::new(), 0_u64);
    let mut buffer = vec![0; BUFFER];
    let judged = |unpacked: Result<(), UnpackError>| {
        unpacked.map_err(|error| match error {
            UnpackError::Write { name, source } => Problem::Disk(into.failure_at(&name, source)),
            error => Problem::Corrupt(error.to_string()),
        })
    };
    loop {
        let got = match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(damaged(error)),
        };
        size += got as u64;
        if size > info.nar_size {
            let announced = info.nar_size;
            return Err(Problem::Corrupt(format!(
                "it has more than {announced} bytes"
            )));
        }
        hasher.update(&buffer[..got]);
        judged(unpacker.take(&buffer[..got]))?;
    }
    if size < info.nar_size {
        let announced = info.nar_size;
        return Err(Problem::Corrupt(format!(
            "it has {size} bytes instead of {announced}"
        )));
    }
    let found = Sha256(hasher.finalize().into());
    if found != info.nar_hash {
        let wanted = info.nar_hash;
        return Err(Problem::Corrupt(format!(
            "its hash is {found} instead of {wanted}"
        )));
    }
    judged(unpacker.finish())
}

/// The blocks of a body as a reader.
enum Blocks {
    Whole(std::vec::IntoIter<Bytes>, Bytes),
    /// For a thread that may wait.
    Coming(mpsc::Receiver<Bytes>, Bytes),
}

impl Read for Blocks {
    fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        loop {
            let (current, next) = match self {
                Self::Whole(blocks, current) if current.is_empty() => (current, blocks.next()),
                Self::Coming(blocks, current) if current.is_empty() => {
                    (current, blocks.blocking_recv())
                }
                Self::Whole(_, current) | Self::Coming(_, current) => {
                    let got = space.len().min(current.len());
                    space[..got].copy_from_slice(&current.split_to(got));
                    return Ok(got);
                }
            };
            match next {
                Some(block) => *current = block,
                None => return Ok(0),
            }
        }
    }
}

/// A body that is counted and hashed as it is served.
struct Packed {
    body: Blocks,
    /// `None` where the narinfo has no hash of the file.
    hasher: Option<Hasher>,
    got: u64,
    limit: u64,
}

impl Packed {
    /// Whether nothing more comes.
    fn is_at_end(&mut self) -> bool {
        matches!(self.body.read(&mut [0]), Ok(0))
    }
}

impl Read for Packed {
    fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        let got = self.body.read(space)?;
        self.got += got as u64;
        if self.got > self.limit {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is too long"));
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&space[..got]);
        }
        Ok(got)
    }
}
