//! Opens files that another process may have left or replaced: a journal, the runner's files, the event payload, a
//! netrc. Only a regular file of a sane size is opened, and opening one never waits: a named pipe without a reader, a
//! device or a socket is an error at once. What the file holds is for the caller to judge.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::process::geteuid;
use thiserror::Error;

use flywheel_core::text;

/// Why a file is not used.
#[derive(Debug, Error)]
pub enum FileError {
    /// The kind of file, with its article.
    #[error("is {0}, not a regular file")]
    Kind(&'static str),
    /// The owner's user id.
    #[error("belongs to another user (id {0})")]
    Owner(u32),
    /// Its permission bits.
    #[error("can be written by other users (mode {0:04o})")]
    Shared(u32),
    #[error("is no folder")]
    NoFolder,
    #[error("is larger than {}", text::bytes(*.limit))]
    TooLarge {
        /// In bytes.
        limit: u64,
    },
    #[error("cannot be opened: {0}")]
    System(#[from] io::Error),
}

impl FileError {
    /// Whether there is no such file.
    pub fn is_absence(&self) -> bool {
        matches!(self, Self::System(error) if error.kind() == io::ErrorKind::NotFound)
    }
}

impl From<FileError> for io::Error {
    fn from(error: FileError) -> Self {
        match error {
            FileError::System(error) => error,
            other => Self::new(io::ErrorKind::InvalidInput, other.to_string()),
        }
    }
}

/// Whose files are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Everybody's, behind symbolic links too: the runner's files belong to another user where the job is in a
    /// container.
    Any,
    /// This user's alone, and not behind a symbolic link.
    Own,
    /// As `Own`, and no other user may write to them: for what is believed because this user wrote it.
    Exclusive,
}

/// Opens a file to read from it. `limit` is the largest size in bytes; the file may grow beyond it later.
///
/// # Errors
/// When it is missing, no regular file, too large, or another user's where that matters.
pub fn open(file: &Path, owner: Owner, limit: u64) -> Result<File, FileError> {
    open_with(OpenOptions::new().read(true), file, owner, limit)
}

/// Opens a file to append to it, and creates it (0600) if it does not exist.
///
/// # Errors
/// As `open`.
pub fn open_to_append(file: &Path, owner: Owner, limit: u64) -> Result<File, FileError> {
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o600);
    open_with(&mut options, file, owner, limit)
}

/// Opens an empty file to write to or to lock: creates it (0600), or truncates it if `is_emptied`.
///
/// # Errors
/// As `open`.
pub fn open_to_write(
    file: &Path,
    owner: Owner,
    limit: u64,
    is_emptied: bool,
) -> Result<File, FileError> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    let opened = open_with(&mut options, file, owner, limit)?;
    if is_emptied {
        // Only now that its kind and owner are known.
        opened.set_len(0)?;
    }
    Ok(opened)
}

/// Reads a whole file.
///
/// # Errors
/// As `open`, and when reading fails.
pub fn read(file: &Path, owner: Owner, limit: u64) -> Result<Vec<u8>, FileError> {
    read_open(&open(file, owner, limit)?, limit)
}

/// Reads a whole file of text.
///
/// # Errors
/// As `read`, and when the file is not UTF-8.
pub fn read_text(file: &Path, owner: Owner, limit: u64) -> io::Result<String> {
    String::from_utf8(read(file, owner, limit)?)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
}

/// Reads what is left of an open file, which may have grown since it was opened.
///
/// # Errors
/// When it is larger than `limit`, or reading fails.
pub fn read_open(file: &File, limit: u64) -> Result<Vec<u8>, FileError> {
    // With room for all of it, a secret that the file holds is not copied about while the buffer grows.
    let length = file.metadata()?.len().min(limit);
    let mut bytes = Vec::with_capacity(usize::try_from(length + 1).unwrap_or_default());
    // One byte more than allowed is enough to notice that the file is too large.
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        Err(FileError::TooLarge { limit })
    } else {
        Ok(bytes)
    }
}

fn open_with(
    options: &mut OpenOptions,
    file: &Path,
    owner: Owner,
    limit: u64,
) -> Result<File, FileError> {
    let found = match owner {
        Owner::Any => fs::metadata(file),
        Owner::Own | Owner::Exclusive => fs::symlink_metadata(file),
    };
    // Opening some devices has an effect of its own, so the kind is looked at before.
    match found {
        Ok(found) => check(&found, owner, limit)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => (),
        Err(error) => return Err(error.into()),
    }
    // The file may have been replaced since: `NONBLOCK` opens a named pipe without waiting for its other end.
    let mut flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    if owner != Owner::Any {
        flags |= OFlags::NOFOLLOW;
    }
    let opened = options
        .custom_flags(flags.bits().cast_signed())
        .open(file)?;
    check(&opened.metadata()?, owner, limit)?;
    Ok(opened)
}

fn check(found: &Metadata, owner: Owner, limit: u64) -> Result<(), FileError> {
    let kind = found.file_type();
    if !kind.is_file() {
        return Err(FileError::Kind(if kind.is_dir() {
            "a folder"
        } else if kind.is_symlink() {
            "a symbolic link"
        } else if kind.is_fifo() {
            "a named pipe"
        } else if kind.is_socket() {
            "a socket"
        } else {
            "a device"
        }));
    }
    check_owner(found, owner)?;
    if found.len() > limit {
        return Err(FileError::TooLarge { limit });
    }
    Ok(())
}

fn check_owner(found: &Metadata, owner: Owner) -> Result<(), FileError> {
    if owner != Owner::Any && found.uid() != geteuid().as_raw() {
        return Err(FileError::Owner(found.uid()));
    }
    // Others who may write to it, by its permission bits; an access list shows there as well, as the group's.
    if owner == Owner::Exclusive && found.mode() & 0o022 != 0 {
        return Err(FileError::Shared(found.mode() & 0o7777));
    }
    Ok(())
}

/// Makes sure that a folder is this user's, that no other user may write to it, and that it is behind no symbolic link.
///
/// # Errors
/// When it is not so, or there is none.
pub fn check_exclusive_folder(folder: &Path) -> Result<(), FileError> {
    let found = fs::symlink_metadata(folder)?;
    if !found.is_dir() {
        return Err(FileError::NoFolder);
    }
    check_owner(&found, Owner::Exclusive)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixListener;
    use std::time::{Duration, Instant};

    use rustix::fs::{CWD, Mode, mkfifoat};

    use super::*;

    /// The messages for a file as it is read, appended to and locked.
    fn refusals(file: &Path, owner: Owner) -> Vec<String> {
        let began = Instant::now();
        let text = |opened: Result<(), FileError>| {
            opened.map_or_else(|error| error.to_string(), |()| "opened".to_owned())
        };
        let all = vec![
            text(read(file, owner, 1000).map(drop)),
            text(open_to_append(file, owner, 1000).map(drop)),
            text(open_to_write(file, owner, 1000, false).map(drop)),
        ];
        assert!(began.elapsed() < Duration::from_secs(1), "{all:?}");
        all
    }

    #[test]
    fn files_of_foreign_kinds_are_refused_at_once() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let at = |name: &str| folder.path().join(name);
        mkfifoat(CWD, at("pipe"), Mode::from(0o600)).expect("made");
        let _listening = UnixListener::bind(at("socket")).expect("bound");
        fs::create_dir(at("folder")).expect("made");
        File::create(at("large"))
            .and_then(|file| file.set_len(10_000_000_000))
            .expect("a sparse file");
        for (name, said) in [
            ("pipe", "is a named pipe, not a regular file"),
            ("socket", "is a socket, not a regular file"),
            ("folder", "is a folder, not a regular file"),
            ("large", "is larger than 1000 B"),
        ] {
            for owner in [Owner::Any, Owner::Own] {
                assert_eq!(refusals(&at(name), owner), [said; 3], "{name}");
            }
            let link = at(&format!("to-{name}"));
            std::os::unix::fs::symlink(at(name), &link).expect("linked");
            assert_eq!(refusals(&link, Owner::Any), [said; 3], "a link to {name}");
        }
        let device = Path::new("/dev/zero");
        assert_eq!(
            refusals(device, Owner::Any),
            ["is a device, not a regular file"; 3]
        );
    }

    #[test]
    fn an_own_file_is_behind_no_link_and_no_other_users() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        fs::write(&file, "text").expect("written");
        std::os::unix::fs::symlink(&file, &link).expect("linked");
        assert_eq!(refusals(&file, Owner::Own), ["opened"; 3]);
        assert_eq!(refusals(&link, Owner::Any), ["opened"; 3]);
        assert_eq!(
            refusals(&link, Owner::Own),
            ["is a symbolic link, not a regular file"; 3]
        );
        // A file that this user may read, of another one: of root, or, for root, one that is given away.
        let foreign = if geteuid().is_root() {
            std::os::unix::fs::chown(&file, Some(1), None).expect("given away");
            file.clone()
        } else {
            "/etc/passwd".into()
        };
        assert!(
            matches!(
                open(&foreign, Owner::Own, 1 << 20),
                Err(FileError::Owner(_))
            ),
            "{foreign:?}"
        );
        assert!(open(&foreign, Owner::Any, 1 << 20).is_ok());
        assert!(
            open(&folder.path().join("none"), Owner::Own, 1).is_err_and(|error| error.is_absence())
        );
    }

    #[test]
    fn what_others_may_write_is_not_exclusive() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let set = |path: &Path, mode: u32| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("changed");
        };
        let file = folder.path().join("file");
        fs::write(&file, "text").expect("written");
        for (mode, file_said, folder_said) in [
            (0o600, "opened", "exclusive"),
            (0o755, "opened", "exclusive"),
            (
                0o620,
                "can be written by other users (mode 0620)",
                "can be written by other users (mode 0720)",
            ),
            (
                0o777,
                "can be written by other users (mode 0777)",
                "can be written by other users (mode 0777)",
            ),
        ] {
            set(&file, mode);
            assert_eq!(
                refusals(&file, Owner::Exclusive),
                [file_said; 3],
                "{mode:o}"
            );
            assert_eq!(refusals(&file, Owner::Own), ["opened"; 3], "{mode:o}");
            set(folder.path(), mode | 0o100);
            let said = check_exclusive_folder(folder.path());
            let said = said.map_or_else(|error| error.to_string(), |()| "exclusive".to_owned());
            assert_eq!(said, folder_said, "{mode:o}");
        }
        set(folder.path(), 0o700);
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path(), &link).expect("linked");
        for no_folder in [&link, &file] {
            assert!(matches!(
                check_exclusive_folder(no_folder),
                Err(FileError::NoFolder)
            ));
        }
        assert!(
            check_exclusive_folder(&folder.path().join("none"))
                .is_err_and(|error| error.is_absence())
        );
    }

    #[test]
    fn only_a_file_that_is_to_be_emptied_is() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = folder.path().join("file");
        let length = |is_emptied: bool| {
            drop(open_to_write(&file, Owner::Own, 9, is_emptied).expect("opened"));
            let found = fs::metadata(&file).expect("there");
            assert_eq!(found.mode() & 0o777, 0o600);
            found.len()
        };
        assert_eq!(length(false), 0);
        fs::write(folder.path().join("file"), "text").expect("written");
        assert_eq!((length(false), length(true)), (4, 0));
    }
}
