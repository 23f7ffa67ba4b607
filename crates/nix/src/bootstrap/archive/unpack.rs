//! Unpacks a release archive into the staging folder, with the modes and times that Nix gives to store paths, and hashes it on
//! the way. Nothing outside of that folder is touched, whatever the archive holds. Blocks; for a thread that may wait.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Component, Path};

use bytes::Bytes;
use rustix::fs::{
    AtFlags, Mode, OFlags, Timespec, Timestamps, chmodat, fchmod, futimens, mkdirat, openat,
    symlinkat, utimensat,
};
use sha2::{Digest as _, Sha256 as Hasher};
use tar::{Archive, Entry, EntryType};
use tokio::sync::mpsc;

use crate::bootstrap::closure::{Registration, StagingError, StagingFolder};
use crate::hash::Sha256;
use crate::nar::compression;
use crate::store_path::StorePath;

/// Far more than the largest release: in bytes, and in files.
const SIZE_LIMIT: u64 = 4 * 1024 * 1024 * 1024;
const FILES_LIMIT: usize = 1_000_000;
/// Folders within each other, as in a NAR.
const DEPTH_LIMIT: usize = 256;
/// The descriptions of all paths, in bytes.
const REGISTRATIONS_LIMIT: u64 = 16 * 1024 * 1024;
const BUFFER: usize = 128 * 1024;
/// Nix sets every time to one second after the epoch.
const TIME: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};
const TIMES: Timestamps = Timestamps {
    last_access: TIME,
    last_modification: TIME,
};

/// The packed bytes.
pub(super) enum Packed {
    File(File),
    Coming(mpsc::Receiver<Bytes>, Bytes),
}

impl Read for Packed {
    fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.read(space),
            Self::Coming(blocks, current) => {
                while current.is_empty() {
                    match blocks.blocking_recv() {
                        Some(block) => *current = block,
                        None => return Ok(0),
                    }
                }
                let got = space.len().min(current.len());
                space[..got].copy_from_slice(&current.split_to(got));
                Ok(got)
            }
        }
    }
}

/// What was in an archive.
pub(super) struct Unpacked {
    pub(super) registrations: Vec<Registration>,
    /// The store path of Nix.
    pub(super) nix: StorePath,
    /// SHA-256 of the whole file, in hexadecimal.
    pub(super) sum: String,
}

/// Why an archive was not unpacked.
pub(super) enum Problem {
    Archive(String),
    Disk(StagingError),
}

/// Counts what it hashes by.
struct Hashed {
    packed: Packed,
    hasher: Hasher,
}

impl Read for Hashed {
    fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        let got = self.packed.read(space)?;
        self.hasher.update(&space[..got]);
        Ok(got)
    }
}

/// Unpacks an archive.
pub(super) fn unpack(packed: Packed, into: &StagingFolder) -> Result<Unpacked, Problem> {
    let mut hashed = Hashed {
        packed,
        hasher: Hasher::new(),
    };
    let contents = read_entries(&mut hashed, into)?;
    // The sum is that of the whole file, and what unpacks may stop before its end.
    let rest = io::copy(&mut hashed, &mut io::sink());
    rest.map_err(|error| Problem::Archive(error.to_string()))?;
    let (registrations, nix) = contents.check()?;
    Ok(Unpacked {
        registrations,
        nix,
        sum: Sha256(hashed.hasher.finalize().into()).base16(),
    })
}

fn read_entries(hashed: &mut Hashed, into: &StagingFolder) -> Result<Contents, Problem> {
    let broken = |error: io::Error| Problem::Archive(error.to_string());
    let buffered = BufReader::with_capacity(BUFFER, hashed);
    let reader = compression::reader(buffered, "xz").map_err(broken)?;
    let reader = reader.expect("xz is among the compressions");
    let mut contents = Contents::new(into)?;
    // One byte more than the limit shows that it is exceeded.
    let mut archive = Archive::new(reader.take(SIZE_LIMIT + 1));
    for (number, entry) in archive.entries().map_err(broken)?.enumerate() {
        if number > FILES_LIMIT {
            return Err(Problem::Archive(format!(
                "it has more than {FILES_LIMIT} files"
            )));
        }
        contents.take(entry.map_err(broken)?, into)?;
    }
    contents.seal(into)?;
    Ok(contents)
}

/// What has been unpacked so far.
struct Contents {
    folder: OwnedFd,
    /// The folders that were made, as paths below the staging folder. Nothing is made in any other.
    folders: BTreeSet<String>,
    /// The store paths that were unpacked.
    paths: BTreeSet<String>,
    /// Those with a program `nix-store`.
    programs: BTreeSet<String>,
    registrations: Option<String>,
}

impl Contents {
    fn new(into: &StagingFolder) -> Result<Self, Problem> {
        let folder = into.folder();
        Ok(Self {
            folder: folder.map_err(|source| Problem::Disk(into.failure(source)))?,
            folders: BTreeSet::new(),
            paths: BTreeSet::new(),
            programs: BTreeSet::new(),
            registrations: None,
        })
    }

    /// Takes an entry: `nix-…/.reginfo`, something below `nix-…/store`, or a script that is not needed.
    fn take<R: Read>(
        &mut self,
        mut entry: Entry<'_, R>,
        into: &StagingFolder,
    ) -> Result<(), Problem> {
        let path = entry
            .path()
            .map_err(|error| Problem::Archive(error.to_string()))?;
        let parts = parts(&path)?;
        if parts.len() > DEPTH_LIMIT {
            return Err(Problem::Archive(format!(
                "its folders are nested more than {DEPTH_LIMIT} levels deep"
            )));
        }
        match parts
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>()
            .as_slice()
        {
            [_, ".reginfo"] => {
                let mut text = String::new();
                let read = entry
                    .by_ref()
                    .take(REGISTRATIONS_LIMIT)
                    .read_to_string(&mut text);
                read.map_err(|error| Problem::Archive(error.to_string()))?;
                self.registrations = Some(text);
                Ok(())
            }
            [_, "store", base, rest @ ..] => {
                StorePath::from_base_name(base)
                    .map_err(|_| Problem::Archive(format!("`{base}` is no store path")))?;
                self.paths.insert((*base).to_owned());
                if rest == ["bin", "nix-store"] {
                    self.programs.insert((*base).to_owned());
                }
                let name = [&[*base], rest].concat().join("/");
                self.write(&name, &mut entry, into)
            }
            _ => Ok(()),
        }
    }

    fn write<R: Read>(
        &mut self,
        name: &str,
        entry: &mut Entry<'_, R>,
        into: &StagingFolder,
    ) -> Result<(), Problem> {
        let disk = |error: io::Error| Problem::Disk(into.failure_at(name, error));
        // A folder that was not made here can be a symbolic link to elsewhere.
        if let Some((parent, _)) = name.rsplit_once('/')
            && !self.folders.contains(parent)
        {
            return Err(Problem::Archive(format!(
                "`{name}` comes before its folder"
            )));
        }
        let at = self.folder.as_fd();
        match entry.header().entry_type() {
            EntryType::Directory => {
                if !self.folders.insert(name.to_owned()) {
                    return Err(Problem::Archive(format!("`{name}` is there twice")));
                }
                mkdirat(at, name, Mode::from_raw_mode(0o755)).map_err(|error| disk(error.into()))
            }
            EntryType::Regular | EntryType::Continuous => {
                let executable = entry.header().mode().is_ok_and(|mode| mode & 0o100 != 0);
                let flags = OFlags::WRONLY
                    | OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                let opened = openat(at, name, flags, Mode::from_raw_mode(0o600));
                let mut file = File::from(opened.map_err(|error| disk(error.into()))?);
                copy(entry, &mut file).map_err(|error| match error {
                    Copy::Read(problem) => Problem::Archive(problem.to_string()),
                    Copy::Write(error) => disk(error),
                })?;
                let mode = if executable { 0o555 } else { 0o444 };
                fchmod(&file, Mode::from_raw_mode(mode))
                    .and_then(|()| futimens(&file, &TIMES))
                    .map_err(|error| disk(error.into()))
            }
            EntryType::Symlink => {
                let target = entry.link_name_bytes();
                let target =
                    target.ok_or_else(|| Problem::Archive(format!("`{name}` links to nothing")))?;
                symlinkat(target.as_ref(), at, name)
                    .and_then(|()| utimensat(at, name, &TIMES, AtFlags::SYMLINK_NOFOLLOW))
                    .map_err(|error| disk(error.into()))
            }
            kind => Err(Problem::Archive(format!(
                "`{name}` is of the kind {kind:?}"
            ))),
        }
    }

    /// Gives the folders their last mode and time, the innermost first. The roots of the paths stay writable, since only root
    /// could move them otherwise.
    fn seal(&self, into: &StagingFolder) -> Result<(), Problem> {
        for name in self.folders.iter().rev() {
            let mode = if name.contains('/') { 0o555 } else { 0o755 };
            chmodat(
                &self.folder,
                name.as_str(),
                Mode::from_raw_mode(mode),
                AtFlags::empty(),
            )
            .and_then(|()| utimensat(&self.folder, name.as_str(), &TIMES, AtFlags::empty()))
            .map_err(|error| Problem::Disk(into.failure_at(name, error.into())))?;
        }
        Ok(())
    }

    /// Sees that there is a Nix, and that every path is described.
    fn check(&self) -> Result<(Vec<Registration>, StorePath), Problem> {
        let wrong = |problem: &str| Problem::Archive(problem.to_owned());
        let text = self.registrations.as_deref();
        let registrations = registrations(text.ok_or_else(|| wrong("it has no `.reginfo`"))?)?;
        let described: BTreeSet<String> = registrations
            .iter()
            .map(|one| one.path.base_name().to_owned())
            .collect();
        if described != self.paths {
            return Err(wrong("`.reginfo` describes other paths than it has"));
        }
        let mut programs = self
            .programs
            .iter()
            .filter_map(|base| StorePath::from_base_name(base).ok());
        let nix = programs.find(|path| path.name().starts_with("nix"));
        Ok((
            registrations,
            nix.ok_or_else(|| wrong("it has no `nix-store`"))?,
        ))
    }
}

/// The parts of an entry's path.
fn parts(path: &Path) -> Result<Vec<String>, Problem> {
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::Normal(part) => match part.to_str() {
                Some(part) => parts.push(part.to_owned()),
                None => return Err(Problem::Archive("a name in it is no text".into())),
            },
            _ => {
                let shown = flywheel_core::text::one_line(&path.to_string_lossy(), 120);
                return Err(Problem::Archive(format!("`{shown}` leads out of it")));
            }
        }
    }
    Ok(parts)
}

/// Which side of a copy failed.
enum Copy {
    Read(io::Error),
    Write(io::Error),
}

fn copy(from: &mut impl Read, to: &mut impl io::Write) -> Result<(), Copy> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(got) => to.write_all(&buffer[..got]).map_err(Copy::Write)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Copy::Read(error)),
        }
    }
}

/// Reads what `nix-store --dump-db` writes: path, hash, size, deriver, number of references, references.
fn registrations(text: &str) -> Result<Vec<Registration>, Problem> {
    let mut lines = text.lines();
    let mut all = Vec::new();
    while let Some(path) = lines.next().filter(|line| !line.is_empty()) {
        let one = registration(path, &mut lines);
        all.push(
            one.ok_or_else(|| Problem::Archive(format!("`.reginfo` is damaged at `{path}`")))?,
        );
    }
    Ok(all)
}

fn registration<'a>(path: &str, lines: &mut impl Iterator<Item = &'a str>) -> Option<Registration> {
    let hash = lines.next()?;
    let hash = hash.strip_prefix("sha256:").unwrap_or(hash);
    let nar_hash = Sha256::parse(&format!("sha256:{hash}")).ok()?;
    let nar_size = lines.next()?.parse().ok()?;
    let deriver = lines.next()?;
    let number: usize = lines.next()?.parse().ok()?;
    let references = (0..number)
        .map(|_| lines.next()?.parse().ok())
        .collect::<Option<Vec<StorePath>>>()?;
    Some(Registration {
        path: path.parse().ok()?,
        nar_hash,
        nar_size,
        references,
        deriver: if deriver.is_empty() {
            None
        } else {
            deriver.parse().ok()
        },
    })
}
