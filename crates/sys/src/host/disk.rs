//! File systems: which one a folder is on, how much room it has, and errors that say that there is none. It reads only,
//! apart from [`FileSystem::refuses_writes`].

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{StatVfsMountFlags, statvfs};

use flywheel_core::disk::{Inodes, Room};

/// What is written to see whether anything can be, in bytes.
const PROBE: usize = 64 * 1024;

/// A file system, by a folder that is on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// The nearest folder that exists.
    folder: PathBuf,
    /// The device's number, by which two folders are known to be on one file system.
    pub device: u64,
    /// Where it is mounted.
    pub mount: PathBuf,
    /// `ext4`, `tmpfs`, `overlay` …; empty where the kernel does not show it.
    pub kind: String,
}

impl FileSystem {
    /// The file system of a folder, or of the nearest folder above it that exists.
    ///
    /// # Errors
    /// When none can be read.
    pub fn of(path: &Path) -> io::Result<Self> {
        let folder = path
            .ancestors()
            .find_map(|folder| fs::canonicalize(folder).ok())
            .ok_or(ErrorKind::NotFound)?;
        let device = fs::metadata(&folder)?.dev();
        let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
        let (mount, kind) = mount_of(&table, &folder)
            .unwrap_or_else(|| (top_of_device(&folder, device), String::new()));
        Ok(Self {
            folder,
            device,
            mount,
            kind,
        })
    }

    /// Its room now.
    ///
    /// # Errors
    /// When the system gives no answer, and for an image that can only be read.
    pub fn room(&self) -> io::Result<Room> {
        let found = statvfs(&self.folder)?;
        let inodes = Inodes {
            total: found.f_files,
            free: found.f_favail,
        };
        // An image that is read only has no room and needs none. A store that is merely mounted so has some.
        if found.f_bavail == 0 && found.f_flag.contains(StatVfsMountFlags::RDONLY) {
            return Err(ErrorKind::ReadOnlyFilesystem.into());
        }
        Ok(Room {
            total: found.f_blocks.saturating_mul(found.f_frsize),
            free: found.f_bavail.saturating_mul(found.f_frsize),
            // Some report none, because they make them as they are needed, and some report nonsense.
            inodes: Some(inodes).filter(|it| it.total > 0 && it.free <= it.total),
        })
    }

    /// Whether a small file cannot be written for want of room, of inodes or of quota, which the numbers need not show.
    /// The file has no name, or is removed at once.
    pub fn refuses_writes(&self) -> bool {
        // Without a sync, which takes long on a busy disk: room is reserved when a file is written to.
        let written =
            tempfile::tempfile_in(&self.folder).and_then(|mut file| file.write_all(&[0; PROBE]));
        written.is_err_and(|error| is_full(&error))
    }

    /// Where it is mounted, and what it is: `/nix (tmpfs)`.
    pub fn name(&self) -> String {
        let mount = self.mount.display();
        if self.kind.is_empty() {
            mount.to_string()
        } else {
            format!("{mount} ({})", self.kind)
        }
    }
}

/// Whether an error says that there is no room, or that a quota is used up.
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded
    )
}

/// Names the disk, its mount point and its room, if the error says that there is none: ``no room on `/tmp (tmpfs)`: 0 B
/// of 64.0 KiB are left``.
pub fn full_disk(error: &io::Error, path: &Path) -> Option<String> {
    if !is_full(error) {
        return None;
    }
    let Ok(disk) = FileSystem::of(path) else {
        return Some(format!("no room for `{}`", path.display()));
    };
    let what = match error.kind() {
        ErrorKind::QuotaExceeded => "no quota left on",
        _ => "no room on",
    };
    let left = disk
        .room()
        .map(|room| format!(": {} are left", room.left()));
    Some(format!(
        "{what} `{}`{}",
        disk.name(),
        left.unwrap_or_default()
    ))
}

/// The mount point and the type of the file system that `folder` is on, by the kernel's table (`proc(5)`, `mountinfo`).
fn mount_of(table: &[u8], folder: &Path) -> Option<(PathBuf, String)> {
    let mut found: Option<(PathBuf, String)> = None;
    for line in table.split(|byte| *byte == b'\n') {
        let mut fields = line.split(|byte| *byte == b' ');
        let Some(mount) = fields.nth(4) else { continue };
        let mount = PathBuf::from(OsStr::from_bytes(&unescaped(mount)));
        let kind = fields.skip_while(|field| *field != b"-").nth(1);
        let is_longer = |(known, _): &(PathBuf, String)| mount.starts_with(known);
        // Of two on one mount point, the later one is on top.
        if folder.starts_with(&mount) && found.as_ref().is_none_or(is_longer) {
            let kind = String::from_utf8_lossy(kind.unwrap_or_default()).into_owned();
            found = Some((mount, kind));
        }
    }
    found
}

/// The table has blanks and the like as octal numbers: `\040`.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let code = after
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(code.unwrap_or(first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    bytes
}

/// The uppermost folder that is on the same device.
fn top_of_device(folder: &Path, device: u64) -> PathBuf {
    let is_same = |folder: &&Path| fs::metadata(folder).is_ok_and(|it| it.dev() == device);
    let top = folder.ancestors().take_while(is_same).last();
    top.unwrap_or(folder).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_system_of_a_folder_that_is_not_there_yet_is_that_above_it() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let there = FileSystem::of(folder.path()).expect("read");
        let below = FileSystem::of(&folder.path().join("a/b")).expect("read");
        assert_eq!(there, below);
        assert!(folder.path().starts_with(&there.mount), "{there:?}");
        let room = there.room().expect("read");
        assert!(room.total > 0 && room.free <= room.total, "{room:?}");
        assert!(!there.refuses_writes());
        let left = fs::read_dir(folder.path()).expect("read").count();
        assert_eq!(left, 0);
    }

    #[test]
    fn the_mount_point_is_the_longest_and_of_two_the_later() {
        let table = b"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n\
            2 1 0:5 / /nix rw shared:1 master:2 - ext4 /dev/sdb rw\n\
            3 2 0:6 / /nix rw - tmpfs tmpfs rw\n\
            4 1 0:7 / /with\\040blank rw - xfs x rw\n";
        let of = |folder: &str| mount_of(table, Path::new(folder)).expect("found");
        assert_eq!(of("/nix/store"), ("/nix".into(), "tmpfs".into()));
        assert_eq!(of("/nixos"), ("/".into(), "ext4".into()));
        assert_eq!(of("/with blank/a"), ("/with blank".into(), "xfs".into()));
        assert_eq!(mount_of(b"", Path::new("/")), None);
    }

    #[test]
    fn an_error_for_want_of_room_names_the_disk_and_another_does_not() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = folder.path().join("file");
        let full = io::Error::from(ErrorKind::StorageFull);
        let text = full_disk(&full, &file).expect("full");
        assert!(text.starts_with("no room on `/"), "{text}");
        assert!(text.ends_with(" are left"), "{text}");
        let quota = io::Error::from(ErrorKind::QuotaExceeded);
        let text = full_disk(&quota, &file).expect("full");
        assert!(text.starts_with("no quota left on"), "{text}");
        let denied = io::Error::from(ErrorKind::PermissionDenied);
        assert_eq!(full_disk(&denied, &file), None);
    }
}
