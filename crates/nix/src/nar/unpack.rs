//! Unpacks a NAR to disk while it comes, with the modes and times that Nix gives to store paths. Nothing outside of the
//! one name in the one folder is touched, whatever the bytes hold, and nothing that exists is opened. Does not hash.

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, Timespec, Timestamps, fchmod, futimens, mkdirat, openat,
    statat, symlinkat, utimensat,
};
use thiserror::Error;

use crate::nar_validator::{Event, NarError, NarValidator};

/// Deepest nesting of folders. Removing a tree takes a descriptor for each level, and a process has 1024 of them.
const DEPTH_LIMIT: usize = 256;
/// Nix sets every time to one second after the epoch.
const TIME: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};
const TIMES: Timestamps = Timestamps {
    last_access: TIME,
    last_modification: TIME,
};

/// Why a NAR was not unpacked.
#[derive(Debug, Error)]
pub(crate) enum UnpackError {
    #[error("it is no NAR that Nix could restore: {0}")]
    Nar(#[from] NarError),
    #[error("its folders are nested more than {DEPTH_LIMIT} levels deep")]
    Deep,
    #[error("it announces a file of {size} bytes, and has {left} bytes left")]
    Size { size: u64, left: u64 },
    /// The disk did not take it.
    #[error("`{name}` could not be written")]
    Write {
        /// The last part of its path.
        name: String,
        #[source]
        source: io::Error,
    },
}

/// A NAR on its way to the disk.
pub(crate) struct Unpacker {
    validator: NarValidator,
    tree: Tree,
}

impl Unpacker {
    /// Unpacks to `name` in `folder`, which nobody else may write to. `size` is that of the whole NAR, in bytes.
    pub(crate) fn new(folder: OwnedFd, name: &str, size: u64) -> io::Result<Self> {
        Ok(Self {
            validator: NarValidator::default(),
            tree: Tree {
                outside: folder,
                folder: None,
                depth: 0,
                name: CString::new(name)?,
                file: None,
                left: size,
                failed: None,
            },
        })
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// When they cannot belong to a NAR, or cannot be written.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Result<(), UnpackError> {
        let tree = &mut self.tree;
        let valid = self
            .validator
            .take_events(bytes, |event| tree.on_event(event));
        // What could not be written comes before what was wrong behind it.
        match self.tree.failed.take() {
            Some(error) => Err(error),
            None => {
                self.tree.left = self.tree.left.saturating_sub(bytes.len() as u64);
                Ok(valid?)
            }
        }
    }

    /// # Errors
    /// When the NAR is not complete.
    pub(crate) fn finish(self) -> Result<(), UnpackError> {
        self.validator.finish()?;
        Ok(())
    }
}

/// What has been written so far. After an error nothing more is.
struct Tree {
    /// The folder that the root is in.
    outside: OwnedFd,
    /// The open folder; `None` for `outside`. One is open at a time, so depth costs no descriptors.
    folder: Option<OwnedFd>,
    depth: usize,
    /// The name of the next node.
    name: CString,
    file: Option<(File, Mode)>,
    /// Bytes of the NAR that are still to come, counted before the piece that is being taken.
    left: u64,
    failed: Option<UnpackError>,
}

impl Tree {
    fn on_event(&mut self, event: Event<'_>) {
        if self.failed.is_some() {
            return;
        }
        if let Err(error) = self.write(event) {
            self.failed = Some(error);
        }
    }

    fn write(&mut self, event: Event<'_>) -> Result<(), UnpackError> {
        match event {
            Event::Name(name) => {
                let name = CString::new(name).map_err(|error| self.failure(error.into()))?;
                self.name = name;
                return Ok(());
            }
            Event::Folder if self.depth == DEPTH_LIMIT => return Err(UnpackError::Deep),
            Event::File { size, .. } if size > self.left => {
                let left = self.left;
                return Err(UnpackError::Size { size, left });
            }
            _ => (),
        }
        self.write_node(event).map_err(|error| self.failure(error))
    }

    fn write_node(&mut self, event: Event<'_>) -> io::Result<()> {
        match event {
            Event::Name(_) => (),
            Event::Folder => {
                mkdirat(self.here(), &self.name, Mode::from_raw_mode(0o755))?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let opened = openat(self.here(), &self.name, flags, Mode::empty())?;
                self.folder = Some(opened);
                self.depth += 1;
            }
            Event::FolderEnd => self.leave()?,
            Event::File { executable, .. } => {
                let flags = OFlags::WRONLY
                    | OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                let file = openat(self.here(), &self.name, flags, Mode::from_raw_mode(0o600))?;
                self.file = Some((
                    file.into(),
                    Mode::from_raw_mode(0o444 | executed(executable)),
                ));
            }
            Event::Contents(bytes) => {
                if let Some((file, _)) = &mut self.file {
                    file.write_all(bytes)?;
                }
            }
            Event::FileEnd => {
                if let Some((file, mode)) = self.file.take() {
                    fchmod(&file, mode)?;
                    futimens(&file, &TIMES)?;
                }
            }
            Event::Symlink(target) => {
                symlinkat(target, self.here(), &self.name)?;
                utimensat(self.here(), &self.name, &TIMES, AtFlags::SYMLINK_NOFOLLOW)?;
            }
        }
        Ok(())
    }

    /// Ends a folder. The root stays writable for its owner: else only root could move it to another folder (`seal`).
    fn leave(&mut self) -> io::Result<()> {
        self.depth -= 1;
        let Some(folder) = self.folder.take() else {
            return Ok(());
        };
        if self.depth == 0 {
            return Ok(());
        }
        fchmod(&folder, Mode::from_raw_mode(0o555))?;
        futimens(&folder, &TIMES)?;
        // Nobody else writes here, so `..` leads to the folder that this one was made in.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        self.folder = Some(openat(&folder, c"..", flags, Mode::empty())?);
        Ok(())
    }

    fn here(&self) -> BorrowedFd<'_> {
        self.folder.as_ref().unwrap_or(&self.outside).as_fd()
    }

    fn failure(&self, source: io::Error) -> UnpackError {
        UnpackError::Write {
            name: flywheel_core::text::one_line(&self.name.to_string_lossy(), 120),
            source,
        }
    }
}

fn executed(executable: bool) -> rustix::fs::RawMode {
    if executable { 0o111 } else { 0 }
}

/// Gives the root of an unpacked path its last mode and time; the rest has them already.
///
/// # Errors
/// When there is no such path, or it belongs to another user.
pub(crate) fn seal(folder: impl AsFd, name: &str) -> io::Result<()> {
    let folder = folder.as_fd();
    let found = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = openat(folder, name, flags, Mode::empty())?;
        fchmod(&opened, Mode::from_raw_mode(0o555))?;
        futimens(&opened, &TIMES)?;
    }
    Ok(())
}

/// Removes a tree of store paths, whose folders are not writable. Nothing to remove is no error.
///
/// # Errors
/// When something of it cannot be removed.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Err(error) => Err(error),
        Ok(facts) if facts.is_dir() => {
            make_writable(path)?;
            fs::remove_dir_all(path)
        }
        Ok(_) => fs::remove_file(path),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn make_writable(folder: &Path) -> io::Result<()> {
    // Root needs no leave.
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    fs::set_permissions(folder, Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            make_writable(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use flywheel_testing::nar_strings;

    use super::*;

    /// Words of a NAR; `''` stands for the empty one.
    fn words(text: &str) -> Vec<u8> {
        let words: Vec<&str> = text
            .split(' ')
            .map(|word| word.trim_matches('\''))
            .collect();
        nar_strings(&words)
    }

    fn unpack(into: &Path, nar: &[u8], piece: usize) -> Result<(), UnpackError> {
        let folder: OwnedFd = File::open(into).expect("a folder").into();
        let mut unpacker = Unpacker::new(folder, "path", nar.len() as u64).expect("a name");
        for bytes in nar.chunks(piece) {
            unpacker.take(bytes)?;
        }
        unpacker.finish()?;
        seal(File::open(into).expect("a folder"), "path").expect("it is there");
        Ok(())
    }

    #[test]
    fn what_was_packed_comes_back_with_nixs_modes_and_times() {
        let from = tempfile::tempdir().expect("temporary folder");
        fs::create_dir_all(from.path().join("a/b/c")).expect("made");
        fs::create_dir(from.path().join("empty")).expect("made");
        for (name, size, mode) in [
            ("x", 0, 0o644),
            ("a/y", 7, 0o600),
            ("a/b/run", 300_000, 0o755),
        ] {
            fs::write(from.path().join(name), vec![7; size]).expect("made");
            fs::set_permissions(from.path().join(name), Permissions::from_mode(mode))
                .expect("its owner");
        }
        std::os::unix::fs::symlink("/etc/passwd", from.path().join("a/link")).expect("made");
        let mut nar = Vec::new();
        crate::nar::write(from.path(), &mut nar).expect("readable");
        for piece in [1, 7, 4096, nar.len()] {
            let into = tempfile::tempdir().expect("temporary folder");
            unpack(into.path(), &nar, piece).expect("a NAR");
            let root = into.path().join("path");
            let mut again = Vec::new();
            crate::nar::write(&root, &mut again).expect("readable");
            assert!(again == nar, "{piece}");
            for (name, mode) in [
                ("", 0o40555),
                ("a", 0o40555),
                ("a/b", 0o40555),
                ("empty", 0o40555),
                ("x", 0o100_444),
                ("a/y", 0o100_444),
                ("a/b/run", 0o100_555),
                ("a/link", 0o120_777),
            ] {
                let facts = fs::symlink_metadata(root.join(name)).expect("it is there");
                assert_eq!((facts.mode(), facts.mtime()), (mode, 1), "{name}");
            }
        }
    }

    #[test]
    fn a_path_can_be_a_file_or_a_link() {
        for (text, mode) in [
            ("nix-archive-1 ( type regular contents hello )", 0o100_444),
            ("nix-archive-1 ( type symlink target / )", 0o120_777),
        ] {
            let into = tempfile::tempdir().expect("temporary folder");
            unpack(into.path(), &words(text), 5).expect("a NAR");
            let facts = fs::symlink_metadata(into.path().join("path")).expect("it is there");
            assert_eq!((facts.mode(), facts.mtime()), (mode, 1));
        }
    }

    #[test]
    fn nothing_leaves_the_folder_and_nothing_that_exists_is_touched() {
        let tree =
            "nix-archive-1 ( type directory entry ( name NAME node ( type regular contents x ) ) )";
        for name in ["..", ".", "''", "a/b", "../path2"] {
            let into = tempfile::tempdir().expect("temporary folder");
            let error = unpack(into.path(), &words(&tree.replace("NAME", name)), 3);
            assert!(matches!(error, Err(UnpackError::Nar(_))), "{name}");
            let names: Vec<_> = fs::read_dir(into.path()).expect("a folder").collect();
            assert_eq!(names.len(), 1, "{name}: only the root itself");
        }
        let into = tempfile::tempdir().expect("temporary folder");
        let other = into.path().join("other");
        fs::write(&other, "mine").expect("written");
        std::os::unix::fs::symlink(&other, into.path().join("path")).expect("made");
        for text in [
            "nix-archive-1 ( type regular contents x )",
            "nix-archive-1 ( type symlink target x )",
            "nix-archive-1 ( type directory )",
        ] {
            let error = unpack(into.path(), &words(text), 100).expect_err(text);
            assert!(matches!(error, UnpackError::Write { .. }), "{error}");
        }
        assert_eq!(fs::read_to_string(other).expect("still there"), "mine");
    }

    #[test]
    fn a_link_is_not_followed_by_what_comes_after_it() {
        let into = tempfile::tempdir().expect("temporary folder");
        let outside = tempfile::tempdir().expect("temporary folder");
        let twice = format!(
            "nix-archive-1 ( type directory entry ( name a node ( type symlink target {} ) ) \
             entry ( name a node ( type directory ) ) )",
            outside.path().display()
        );
        let error = unpack(into.path(), &words(&twice), 100).expect_err("twice the same name");
        assert!(error.to_string().contains("not sorted"), "{error}");
    }

    #[test]
    fn more_than_is_announced_and_folders_without_end_are_refused() {
        let into = tempfile::tempdir().expect("temporary folder");
        let mut nar = words("nix-archive-1 ( type regular contents");
        nar.extend((1_u64 << 40).to_le_bytes());
        let error = unpack(into.path(), &nar, 1000).expect_err("a size");
        assert!(matches!(error, UnpackError::Size { .. }), "{error}");
        let into = tempfile::tempdir().expect("temporary folder");
        let mut nar = words("nix-archive-1 ( type directory");
        for _ in 0..DEPTH_LIMIT {
            nar.extend(words("entry ( name a node ( type directory"));
        }
        let error = unpack(into.path(), &nar, 1000).expect_err("deep");
        assert!(matches!(error, UnpackError::Deep), "{error}");
        remove_tree(&into.path().join("path")).expect("removable");
    }
}
