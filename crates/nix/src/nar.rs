//! Writes NARs straight from disk: each file is read once and hashed on the way, in constant
//! memory. Never runs Nix, and never sends the last byte of a NAR that differs from the registered
//! one.

pub mod compression;
pub(crate) mod unpack;

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read as _, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use futures_util::Stream;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, fstat, openat, readlinkat, statat};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256 as Hasher};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::hash::Sha256;

/// Size of a stream's blocks. One is being filled, one is queued and one is with the sender; three
/// stay below the half MiB that an upload may hold.
const BLOCK_SIZE: usize = 128 * 1024;
/// Bytes to read from a file at once.
const READ_SIZE: usize = 64 * 1024;

/// `O_NOATIME`, which Linux alone has.
#[cfg(target_os = "linux")]
const NO_ACCESS_TIME: OFlags = OFlags::NOATIME;
#[cfg(not(target_os = "linux"))]
const NO_ACCESS_TIME: OFlags = OFlags::empty();
/// Whether to open files with `O_NOATIME`. Otherwise the file system records each access time,
/// which writes as many inodes as are read. Only the owner of a file may use the flag (`open(2)`),
/// and on a shared store that is another user.
static USE_NOATIME: AtomicBool = AtomicBool::new(true);

/// Why a path gave no NAR, or not the registered one.
#[derive(Debug, Error)]
pub enum DumpError {
    /// The path is gone: a garbage collection removed it.
    #[error("`{0}` is no longer in the store")]
    Gone(PathBuf),
    /// The path contains something that a NAR cannot express: a socket, a device, a pipe.
    #[error("`{0}` is neither a file, a folder nor a symbolic link")]
    Special(PathBuf),
    #[error("`{path}` cannot be read")]
    Read {
        /// The file that could not be read.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The content on disk is not what Nix registered: a corrupt or modified store path.
    #[error("`{path}` is corrupt: its content is not what the store has registered ({difference})")]
    Corrupt { path: PathBuf, difference: String },
    /// The writer or the visitor returned an error.
    #[error("the NAR could not be passed on")]
    Sink(#[source] io::Error),
}

/// Receives the contents of a NAR while it is read, in the NAR's order. An error stops the reading.
pub trait NarVisitor {
    /// Begins an entry of a folder.
    fn enter(&mut self, name: &[u8]) -> io::Result<()>;
    /// Ends that entry.
    fn leave(&mut self);
    /// The next bytes of a file.
    fn content(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Ends a file.
    fn end(&mut self) -> io::Result<()>;
    /// The target of a symbolic link.
    fn target(&mut self, target: &[u8]) -> io::Result<()>;
}

/// Ignores everything.
struct NoVisitor;

impl NarVisitor for NoVisitor {
    fn enter(&mut self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn leave(&mut self) {}
    fn content(&mut self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn end(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn target(&mut self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// Writes the NAR of `path` to `out`, with entries in bytewise order.
///
/// # Errors
/// As for `write_visited`.
pub fn write(path: &Path, out: &mut impl Write) -> Result<(), DumpError> {
    write_visited(path, out, &mut NoVisitor)
}

/// Writes the NAR of `path` to `out`, with entries in bytewise order, and passes its contents to
/// `visitor`.
///
/// One folder is open at a time and nothing recurses, so depth costs neither stack nor descriptors,
/// and the full name may be longer than `PATH_MAX`.
///
/// # Errors
/// When the path is gone, unreadable or contains what a NAR cannot express, or when `out` or the
/// visitor returns an error.
pub fn write_visited(
    path: &Path,
    out: &mut impl Write,
    visitor: &mut impl NarVisitor,
) -> Result<(), DumpError> {
    let mut writer = Writer {
        out,
        visitor,
        root: path,
        buffer: Vec::new(),
    };
    writer.text(b"nix-archive-1")?;
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| DumpError::Special(path.to_owned()))?;
    // A store path may be a single file or link.
    let Some(mut folder) = writer.node(CWD, &name)? else {
        return Ok(());
    };
    let mut levels = vec![writer.names(&folder)?.into_iter()];
    while let Some(level) = levels.last_mut() {
        if let Some(name) = level.next() {
            writer.texts(&[b"entry", b"(", b"name", name.to_bytes(), b"node"])?;
            writer
                .visitor
                .enter(name.to_bytes())
                .map_err(DumpError::Sink)?;
            match writer.node(folder.as_fd(), &name)? {
                None => writer.leave()?,
                Some(below) => {
                    levels.push(writer.names(&below)?.into_iter());
                    folder = below;
                }
            }
        } else {
            writer.text(b")")?;
            levels.pop();
            if !levels.is_empty() {
                writer.leave()?;
                // Store paths are immutable, so `..` still leads to the folder that was left.
                folder = writer.open(folder.as_fd(), c"..", OFlags::DIRECTORY)?;
            }
        }
    }
    Ok(())
}

struct Writer<'a, W, O> {
    out: &'a mut W,
    visitor: &'a mut O,
    root: &'a Path,
    buffer: Vec<u8>,
}

impl<W: Write, O: NarVisitor> Writer<'_, W, O> {
    fn leave(&mut self) -> Result<(), DumpError> {
        self.visitor.leave();
        self.text(b")")
    }

    /// Writes a file or a link completely. Of a folder it writes the opening only, and returns its
    /// descriptor.
    fn node(&mut self, parent: impl AsFd, name: &CStr) -> Result<Option<OwnedFd>, DumpError> {
        let parent = parent.as_fd();
        // A symbolic link is an entry of its own and is never followed.
        let stat = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| self.unreadable(name, error.into()))?;
        self.texts(&[b"(", b"type"])?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                self.text(b"directory")?;
                return self.open(parent, name, OFlags::DIRECTORY).map(Some);
            }
            FileType::Symlink => {
                let target = readlinkat(parent, name, Vec::new())
                    .map_err(|error| self.unreadable(name, error.into()))?;
                self.visitor
                    .target(target.to_bytes())
                    .map_err(DumpError::Sink)?;
                self.texts(&[b"symlink", b"target", target.to_bytes()])?;
            }
            FileType::RegularFile => {
                let file = self.open(parent, name, OFlags::empty())?;
                self.file(name, file.into())?;
            }
            _ => return Err(DumpError::Special(self.at(name))),
        }
        self.text(b")")?;
        Ok(None)
    }

    fn file(&mut self, name: &CStr, mut file: File) -> Result<(), DumpError> {
        // The size of the opened file: the name may have been replaced since `statat`.
        let stat = fstat(&file).map_err(|error| self.unreadable(name, error.into()))?;
        self.text(b"regular")?;
        // A NAR has one bit of permissions: whether the owner may execute the file.
        if Mode::from_raw_mode(stat.st_mode).contains(Mode::XUSR) {
            self.texts(&[b"executable", b""])?;
        }
        self.text(b"contents")?;
        let size = u64::try_from(stat.st_size).unwrap_or_default();
        // The size precedes the content, so it must be known before reading.
        self.raw(&size.to_le_bytes())?;
        let mut left = size;
        let most = usize::try_from(size).unwrap_or(READ_SIZE).min(READ_SIZE);
        // Grow the buffer only as far as needed: most files are small.
        self.buffer.resize(self.buffer.len().max(most), 0);
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(READ_SIZE).min(READ_SIZE);
            let got = match file.read(&mut self.buffer[..want]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.unreadable(name, error)),
                // The size is already written, so a shorter file cannot be completed.
                Ok(0) => return Err(self.unreadable(name, io::ErrorKind::UnexpectedEof.into())),
                Ok(got) => got,
            };
            self.visitor
                .content(&self.buffer[..got])
                .map_err(DumpError::Sink)?;
            self.out
                .write_all(&self.buffer[..got])
                .map_err(DumpError::Sink)?;
            left -= got as u64;
        }
        self.visitor.end().map_err(DumpError::Sink)?;
        self.pad(size)
    }

    /// Returns the names in a folder, sorted bytewise.
    fn names(&self, folder: &OwnedFd) -> Result<Vec<CString>, DumpError> {
        let unreadable = |error: Errno| self.unreadable(c"", error.into());
        let mut names = Vec::new();
        for entry in Dir::read_from(folder).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let name = entry.file_name();
            if name != c"." && name != c".." {
                names.push(name.to_owned());
            }
        }
        // The order of `readdir` is arbitrary, and the NAR's hash depends on the order.
        names.sort_unstable();
        Ok(names)
    }

    fn open(&self, parent: impl AsFd, name: &CStr, flags: OFlags) -> Result<OwnedFd, DumpError> {
        let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        if USE_NOATIME.load(Ordering::Relaxed) {
            match openat(&parent, name, flags | NO_ACCESS_TIME, Mode::empty()) {
                // This store belongs to another user, and so do its other files: do not try again.
                Err(Errno::PERM) => USE_NOATIME.store(false, Ordering::Relaxed),
                opened => return opened.map_err(|error| self.unreadable(name, error.into())),
            }
        }
        openat(parent, name, flags, Mode::empty())
            .map_err(|error| self.unreadable(name, error.into()))
    }

    /// Writes a string as NARs have it: the length in eight bytes, the bytes, and zeros up to the
    /// next multiple of eight.
    fn text(&mut self, text: &[u8]) -> Result<(), DumpError> {
        self.raw(&(text.len() as u64).to_le_bytes())?;
        self.raw(text)?;
        self.pad(text.len() as u64)
    }

    fn texts(&mut self, texts: &[&[u8]]) -> Result<(), DumpError> {
        texts.iter().try_for_each(|text| self.text(text))
    }

    fn pad(&mut self, size: u64) -> Result<(), DumpError> {
        let rest = (8 - size % 8) % 8;
        self.raw(&[0; 8][..usize::try_from(rest).expect("less than eight")])
    }

    fn raw(&mut self, bytes: &[u8]) -> Result<(), DumpError> {
        self.out.write_all(bytes).map_err(DumpError::Sink)
    }

    fn at(&self, name: &CStr) -> PathBuf {
        let name = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
        // The root is opened by its full path, and a folder being listed has no name here.
        if name.is_absolute() || name.as_os_str().is_empty() {
            self.root.to_owned()
        } else {
            self.root.join(name)
        }
    }

    /// Turns a read error into a `DumpError`. A file that vanishes while its store path is read is
    /// being garbage collected.
    fn unreadable(&self, name: &CStr, source: io::Error) -> DumpError {
        if source.kind() == io::ErrorKind::NotFound {
            DumpError::Gone(self.root.to_owned())
        } else {
            DumpError::Read {
                path: self.at(name),
                source,
            }
        }
    }
}

/// The error that ended a NAR stream, for a caller that only sees that sending failed.
#[derive(Clone, Debug, Default)]
pub struct Fault(Arc<Mutex<Option<DumpError>>>);

impl Fault {
    /// Takes the error that ended the stream, if the stream itself failed.
    pub fn take(&self) -> Option<DumpError> {
        self.0
            .lock()
            .expect("nothing panics while it holds this lock")
            .take()
    }

    fn set(&self, error: DumpError) {
        *self
            .0
            .lock()
            .expect("nothing panics while it holds this lock") = Some(error);
    }
}

/// The source of a store path's NAR: the path on disk, and the NAR itself if it has been read.
#[derive(Clone, Debug)]
pub struct NarSource {
    pub file: PathBuf,
    /// The complete NAR, already checked against the registered hash and size.
    pub read: Option<Bytes>,
}

impl<T: AsRef<Path>> From<T> for NarSource {
    fn from(file: T) -> Self {
        Self {
            file: file.as_ref().to_owned(),
            read: None,
        }
    }
}

impl NarSource {
    /// Streams the NAR in blocks. `hash` and `size` are the registered ones.
    pub fn stream(&self, hash: Sha256, size: u64) -> NarStream {
        match &self.read {
            Some(nar) => NarStream::from_bytes(nar.clone()),
            None => NarStream::open(self.file.clone(), hash, size),
        }
    }
}

/// Reads the NAR of a small path into memory and passes its contents to `visitor`. `hash` and
/// `size` are the registered ones.
///
/// # Errors
/// As for `write_visited`, and when the NAR is not the registered one.
pub(crate) fn read_visited(
    path: &Path,
    hash: Sha256,
    size: u64,
    visitor: &mut impl NarVisitor,
) -> Result<Bytes, DumpError> {
    let mut out = BlockWriter::new(None, size);
    write_visited(path, &mut out, visitor).map_err(|error| out.classify(path, error))?;
    out.finish(path, hash)
}

/// The NAR of a store path as a stream of blocks. It ends well only if hash and size are the
/// registered ones; otherwise an error takes the place of the last block.
#[derive(Debug)]
pub struct NarStream {
    blocks: mpsc::Receiver<Bytes>,
    /// The reading thread. It returns the last block, so a small NAR never passes through the
    /// channel.
    task: Option<JoinHandle<Result<Bytes, DumpError>>>,
    last: Option<Bytes>,
    fault: Fault,
}

impl NarStream {
    /// Starts reading `path` on a thread that may block. Dropping the stream stops the thread at
    /// its next block.
    pub(crate) fn open(path: PathBuf, hash: Sha256, size: u64) -> Self {
        // A queue of one block bounds memory and lets reading overlap with sending.
        let (sender, blocks) = mpsc::channel(1);
        let task = tokio::task::spawn_blocking(move || {
            let mut out = BlockWriter::new(Some(sender), size);
            write(&path, &mut out).map_err(|error| out.classify(&path, error))?;
            out.finish(&path, hash)
        });
        Self {
            blocks,
            task: Some(task),
            last: None,
            fault: Fault::default(),
        }
    }

    fn from_bytes(nar: Bytes) -> Self {
        Self {
            blocks: mpsc::channel(1).1,
            task: None,
            last: Some(nar),
            fault: Fault::default(),
        }
    }

    /// A handle on the error that ends this stream, to be read when sending has failed.
    pub fn fault(&self) -> Fault {
        self.fault.clone()
    }
}

impl Stream for NarStream {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(task) = &mut self.task
            && let Poll::Ready(ended) = Pin::new(task).poll(context)
        {
            self.task = None;
            let ended = ended.unwrap_or_else(|panic| Err(DumpError::Sink(io::Error::other(panic))));
            match ended {
                Ok(last) => self.last = Some(last),
                Err(error) => {
                    // The stream's items carry an `io::Error`; the full error stays in `fault`.
                    let shown = io::Error::other(error.to_string());
                    self.fault.set(error);
                    // An error is final: no queued block may follow it.
                    self.blocks.close();
                    return Poll::Ready(Some(Err(shown)));
                }
            }
        }
        match self.blocks.poll_recv(context) {
            Poll::Ready(Some(block)) => Poll::Ready(Some(Ok(block))),
            // The task drops its sender just before it ends, and wakes this stream when it has
            // ended.
            _ if self.task.is_some() => Poll::Pending,
            _ => Poll::Ready(self.last.take().map(Ok)),
        }
    }
}

/// Splits the written bytes into blocks and hashes them. A full block is sent only when more bytes
/// follow, so the last block is still here when the hash is known.
struct BlockWriter {
    /// `None` collects everything in a single block.
    sender: Option<mpsc::Sender<Bytes>>,
    block: BytesMut,
    hasher: Hasher,
    written: u64,
    size: u64,
}

impl BlockWriter {
    fn new(sender: Option<mpsc::Sender<Bytes>>, size: u64) -> Self {
        Self {
            sender,
            block: BytesMut::new(),
            hasher: Hasher::new(),
            written: 0,
            size,
        }
    }

    fn send(&mut self) -> io::Result<()> {
        let Some(sender) = &self.sender else {
            return Ok(());
        };
        self.hasher.update(&self.block);
        let block = self.block.split().freeze();
        sender
            .blocking_send(block)
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// Turns the error for too many bytes (see `write`) into a corrupt path, since the sink is not
    /// at fault.
    fn classify(&self, path: &Path, error: DumpError) -> DumpError {
        match error {
            DumpError::Sink(source) if source.kind() == io::ErrorKind::InvalidData => {
                self.corrupt(path, format!("its NAR is longer than {} bytes", self.size))
            }
            other => other,
        }
    }

    /// Returns the last block, if the NAR has the registered size and hash.
    fn finish(mut self, path: &Path, hash: Sha256) -> Result<Bytes, DumpError> {
        if self.written != self.size {
            let difference = format!(
                "its NAR has {} bytes instead of {}",
                self.written, self.size
            );
            return Err(self.corrupt(path, difference));
        }
        self.hasher.update(&self.block);
        let found = Sha256(std::mem::take(&mut self.hasher).finalize().into());
        if found != hash {
            return Err(self.corrupt(path, format!("its NAR's hash is {found} instead of {hash}")));
        }
        Ok(self.block.freeze())
    }

    fn corrupt(&self, path: &Path, difference: String) -> DumpError {
        DumpError::Corrupt {
            path: path.to_owned(),
            difference,
        }
    }
}

impl Write for BlockWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Stop here instead of sending a NAR that is known to be wrong.
        if self.written + bytes.len() as u64 > self.size {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // Without a channel, the whole NAR becomes one block.
        let room = if self.sender.is_some() {
            BLOCK_SIZE
        } else {
            usize::MAX
        };
        if self.block.len() == room {
            self.send()?;
        }
        if self.block.capacity() == 0 {
            // Reserve no more than the NAR needs.
            let left = usize::try_from(self.size - self.written).unwrap_or(BLOCK_SIZE);
            self.block.reserve(left.min(room));
        }
        // Writing less than given is allowed; `write_all` calls again for the rest.
        let taken = bytes.len().min(room - self.block.len());
        self.block.extend_from_slice(&bytes[..taken]);
        self.written += taken as u64;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
