//! When what the cache holds is on the disk. A file is visible at once and is synced some seconds later, together
//! with all that came beside it: syncing each for itself would take the disk from the build on the same machine.
//!
//! A process that is killed loses nothing by that, for the system keeps what was written. When the machine itself
//! ends, what came since the last time may be lost or torn. So time is cut into epochs: each narinfo names the one
//! that it came in, and `synced` the last one that is on the disk whole. After a restart of the machine all paths of
//! later epochs are taken back. Since references come before what refers to them, no closure is broken.
//!
//! Never keeps what comes waiting while it syncs, and never calls synced what may not be: after a failure, nothing.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};

use crate::server::folder::{Folder, entries};
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::store_path::PathHash;

/// The machine's present run (`random(4)`).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// The field of a stored narinfo; readers never see it.
const FIELD: &str = "Epoch";
/// The writing of this much of each file is begun for all before the first is waited for, in bytes: 1,000 small ones
/// take 0.14 s on an ext4 with a journal, one by one 1.0 s. A `syncfs` takes 0.04 s, but writes what the build has
/// dirty, too, and made builds on an ext4 without a journal 3 to 5 % longer.
const WRITEBACK_BYTES: NonZeroU64 = NonZeroU64::new(1024 * 1024).unwrap();
/// Epochs that a killed process may have used beyond the last one that it wrote down: the one that was being synced,
/// and the one after it.
const UNRECORDED_EPOCHS: u64 = 2;

/// What `synced` says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Synced {
    /// All of this epoch, and of those before it, is on the disk.
    epoch: u64,
    /// The run of the machine that wrote it; empty where the kernel does not tell.
    boot: String,
    /// Nothing came after it: the server was stopped in order.
    clean: bool,
}

impl Synced {
    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
        };
        let boot = field("Boot").unwrap_or_default().to_owned();
        Some(Self {
            epoch: field(FIELD)?.parse().ok()?,
            boot,
            clean: field("Clean")? == "yes",
        })
    }
}

impl std::fmt::Display for Synced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let clean = if self.clean { "yes" } else { "no" };
        write!(
            f,
            "{FIELD}: {}\nBoot: {}\nClean: {clean}\n",
            self.epoch, self.boot
        )
    }
}

/// What is visible and perhaps not yet on the disk.
#[derive(Debug)]
pub struct Durability {
    boot: String,
    /// The cache's folder, open from the beginning so that no failure of its file system is missed.
    root: File,
    epoch: RwLock<u64>,
    pending: Mutex<Pending>,
    /// A killed process has left files that nobody knows by name.
    unknown_files: AtomicBool,
    /// A sync has failed. The system reports that once and forgets, so nothing later can be called synced.
    failed: AtomicBool,
}

/// What of this epoch is to be synced.
#[derive(Debug, Default)]
struct Pending {
    /// In any order.
    files: Vec<PathBuf>,
    /// Beside the files' own.
    folders: BTreeSet<PathBuf>,
}

/// While it lives the epoch does not end.
#[derive(Debug)]
pub struct Epoch<'a> {
    number: RwLockReadGuard<'a, u64>,
    pending: &'a Mutex<Pending>,
}

impl Epoch<'_> {
    /// The line that a narinfo of this epoch carries.
    pub fn line(&self) -> String {
        format!("{FIELD}: {}\n", *self.number)
    }

    /// This file is there, and will be synced.
    pub fn file_added(&self, file: PathBuf) {
        self.pending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .files
            .push(file);
    }

    /// This name is there, of a file that came under another one; it will be synced.
    pub fn link_added(&self, name: &Path) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(folder) = name.parent()
            && !pending.folders.contains(folder)
        {
            pending.folders.insert(folder.to_owned());
        }
    }
}

/// The line of a stored narinfo that says its epoch; none if it was there before there were epochs.
pub fn epoch_line(text: &str) -> Option<String> {
    epoch_of(text).map(|number| format!("{FIELD}: {number}\n"))
}

fn epoch_of(text: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(FIELD)?.strip_prefix(": ")?.parse().ok())
}

impl Durability {
    /// Looks how the folder was left. If the machine has ended since, what may not have reached the disk is taken
    /// back: the number of paths, and then their NARs are not to be trusted either and must be swept.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn open(folder: &Folder) -> io::Result<(Self, Option<u64>)> {
        let boot = std::fs::read_to_string(BOOT_ID)
            .unwrap_or_default()
            .trim()
            .to_owned();
        Self::open_in(folder, boot)
    }

    fn open_in(folder: &Folder, boot: String) -> io::Result<(Self, Option<u64>)> {
        let left = match std::fs::read_to_string(folder.synced()) {
            Ok(text) => Synced::parse(&text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let same = left
            .as_ref()
            .is_some_and(|left| !boot.is_empty() && left.boot == boot);
        let rolled_back = match &left {
            Some(left) if !left.clean && !same => Some(roll_back(folder, left.epoch)?),
            _ => None,
        };
        let unknown_files = left.as_ref().is_some_and(|left| !left.clean && same);
        let epoch = left.map_or(0, |left| left.epoch) + UNRECORDED_EPOCHS;
        // Without unknown_files all that is here now is on the disk.
        let synced = if unknown_files {
            epoch - UNRECORDED_EPOCHS
        } else {
            epoch
        };
        let root = File::open(folder.root())?;
        let durability = Self {
            boot,
            root,
            epoch: RwLock::new(epoch + 1),
            pending: Mutex::default(),
            unknown_files: AtomicBool::new(unknown_files),
            failed: AtomicBool::new(false),
        };
        durability.write(folder, synced, false)?;
        Ok((durability, rolled_back))
    }

    /// Begins something that makes files visible.
    pub fn begin(&self) -> Epoch<'_> {
        // Neither lock guards anything that a panic could have left half-done.
        Epoch {
            number: self.epoch.read().unwrap_or_else(PoisonError::into_inner),
            pending: &self.pending,
        }
    }

    /// Ends the epoch and has all of it reach the disk. Blocks, and is not to be called twice at once.
    ///
    /// # Errors
    /// When the disk fails. Then nothing is called synced any more.
    pub fn sync(&self, folder: &Folder) -> io::Result<()> {
        let (ended, pending) = {
            let mut epoch = self.epoch.write().unwrap_or_else(PoisonError::into_inner);
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            let pending = std::mem::take(&mut *pending);
            let nothing = pending.files.is_empty() && pending.folders.is_empty();
            if self.failed.load(Ordering::Relaxed)
                || (nothing && !self.unknown_files.load(Ordering::Relaxed))
            {
                return Ok(());
            }
            *epoch += 1;
            (*epoch - 1, pending)
        };
        let synced = self
            .sync_pending(&pending)
            .and_then(|()| self.write(folder, ended, false));
        self.failed.store(synced.is_err(), Ordering::Relaxed);
        synced
    }

    /// Settles what is left and notes that nothing comes after it. Nothing may come any more.
    ///
    /// # Errors
    /// As `settle`.
    pub fn close(&self, folder: &Folder) -> io::Result<()> {
        self.sync(folder)?;
        if self.failed.load(Ordering::Relaxed) {
            return Ok(());
        }
        let last = *self.epoch.read().unwrap_or_else(PoisonError::into_inner);
        self.write(folder, last, true)
    }

    fn sync_pending(&self, pending: &Pending) -> io::Result<()> {
        if self.unknown_files.load(Ordering::Relaxed) {
            rustix::fs::syncfs(&self.root)?;
            self.unknown_files.store(false, Ordering::Relaxed);
            return Ok(());
        }
        pending.files.iter().for_each(|file| start_writeback(file));
        pending.files.iter().try_for_each(|file| sync_file(file))?;
        let mut folders: BTreeSet<&Path> = pending
            .files
            .iter()
            .filter_map(|file| file.parent())
            .collect();
        folders.extend(pending.folders.iter().map(PathBuf::as_path));
        folders.into_iter().try_for_each(sync_file)
    }

    fn write(&self, folder: &Folder, epoch: u64, clean: bool) -> io::Result<()> {
        let text = Synced {
            epoch,
            boot: self.boot.clone(),
            clean,
        }
        .to_string();
        folder.write_synced(&folder.synced(), &text)
    }
}

/// Has the system write what is dirty of it, without waiting. That is a side effect of this advice (`posix_fadvise(2)`),
/// not promised anywhere: if it fails to come, the sync only takes longer.
fn start_writeback(file: &Path) {
    if let Ok(file) = File::open(file) {
        let _ = rustix::fs::fadvise(
            &file,
            0,
            Some(WRITEBACK_BYTES),
            rustix::fs::Advice::DontNeed,
        );
    }
}

/// What was removed meanwhile needs no disk.
fn sync_file(file: &Path) -> io::Result<()> {
    match File::open(file).and_then(|file| file.sync_all()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        ended => ended,
    }
}

/// Removes the narinfos that came after `synced`, and torn ones: how many.
fn roll_back(folder: &Folder, synced: u64) -> io::Result<u64> {
    let mut removed = 0;
    for cache in folder.caches()? {
        for entry in entries(&folder.objects(&cache))? {
            let file = entry?.path();
            let name = file
                .file_name()
                .and_then(|name| name.to_str()?.strip_suffix(".narinfo"));
            if name.is_none_or(|name| PathHash::parse(name).is_err()) {
                continue;
            }
            let text = String::from_utf8(std::fs::read(&file)?).unwrap_or_default();
            if NarInfo::parse(&text).is_err() || epoch_of(&text).is_some_and(|epoch| epoch > synced)
            {
                std::fs::remove_file(&file)?;
                removed += 1;
            }
        }
        // Before a later epoch is called synced, their end has to be.
        sync_file(&folder.objects(&cache))?;
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::folder::{FolderError, when_free};
    use flywheel_nix::cache_name::CacheName;

    struct World(tempfile::TempDir);

    impl World {
        fn open(&self, boot: &str) -> (Folder, Durability, Option<u64>) {
            let open = || Folder::open(self.0.path(), &[CacheName::default()]);
            let folder = when_free(open, |error| matches!(error, FolderError::InUse(_)));
            let (durable, rolled_back) =
                Durability::open_in(&folder, boot.to_owned()).expect("the disk works");
            (folder, durable, rolled_back)
        }
    }

    fn object(folder: &Folder, letter: char) -> PathBuf {
        folder.object(
            &CacheName::default(),
            &PathHash::parse(&letter.to_string().repeat(32)).expect("base32"),
        )
    }

    fn add(folder: &Folder, durable: &Durability, letter: char) {
        let (epoch, file) = (durable.begin(), object(folder, letter));
        let hash = format!("sha256:{}", "1".repeat(52));
        let path = format!("/nix/store/{}-x", letter.to_string().repeat(32));
        let text = format!(
            "StorePath: {path}\nURL: nar/x\nNarHash: {hash}\nNarSize: 1\n{}",
            epoch.line()
        );
        std::fs::write(&file, text).expect("written");
        epoch.file_added(file);
    }

    fn held(folder: &Folder) -> String {
        "abcd"
            .chars()
            .filter(|letter| object(folder, *letter).exists())
            .collect()
    }

    #[test]
    fn only_the_machines_end_takes_back_what_was_not_synced() {
        for (boot, then, expected) in [("1", None, "abc"), ("2", Some(2), "a"), ("", Some(2), "a")]
        {
            let world = World(tempfile::tempdir().expect("temporary folder"));
            let (folder, durable, rolled_back) = world.open("1");
            assert_eq!(rolled_back, None, "it is new");
            add(&folder, &durable, 'a');
            durable.sync(&folder).expect("the disk works");
            add(&folder, &durable, 'b');
            add(&folder, &durable, 'c');
            drop((folder, durable));
            let (folder, _, rolled_back) = world.open(boot);
            assert_eq!(
                (rolled_back, held(&folder).as_str()),
                (then, expected),
                "{boot}"
            );
        }
    }

    #[test]
    fn what_a_killed_process_left_is_synced_by_the_next() {
        let world = World(tempfile::tempdir().expect("temporary folder"));
        let (folder, durable, _) = world.open("1");
        add(&folder, &durable, 'a');
        // Killed once while an epoch was being synced, and once before its first one was.
        *durable.epoch.write().expect("sound") += 1;
        add(&folder, &durable, 'b');
        drop((folder, durable));
        let (folder, durable, _) = world.open("1");
        add(&folder, &durable, 'c');
        drop((folder, durable));
        let (folder, durable, _) = world.open("1");
        durable.sync(&folder).expect("the disk works");
        add(&folder, &durable, 'd');
        drop((folder, durable));
        let (folder, _, rolled_back) = world.open("2");
        assert_eq!((rolled_back, held(&folder).as_str()), (Some(1), "abc"));
    }

    #[test]
    fn a_server_that_was_stopped_has_lost_nothing() {
        let world = World(tempfile::tempdir().expect("temporary folder"));
        let (folder, durable, _) = world.open("1");
        add(&folder, &durable, 'a');
        durable.close(&folder).expect("the disk works");
        drop((folder, durable));
        let (folder, durable, rolled_back) = world.open("2");
        assert_eq!((rolled_back, held(&folder).as_str()), (None, "a"));
        add(&folder, &durable, 'b');
        // Torn by the machine's end.
        std::fs::write(object(&folder, 'c'), "StorePath: /nix").expect("written");
        drop((folder, durable));
        let (folder, _, rolled_back) = world.open("3");
        assert_eq!((rolled_back, held(&folder).as_str()), (Some(2), "a"));
    }

    #[test]
    fn a_new_name_of_an_old_file_is_synced_too() {
        let world = World(tempfile::tempdir().expect("temporary folder"));
        let (folder, durable, _) = world.open("1");
        let epoch = || {
            Synced::parse(&std::fs::read_to_string(folder.synced()).expect("there"))
                .expect("whole")
                .epoch
        };
        let before = epoch();
        durable.begin().link_added(
            &folder.marker(&CacheName::default(), &flywheel_nix::hash::Sha256([7; 32])),
        );
        durable.sync(&folder).expect("the disk works");
        let synced = epoch();
        durable.sync(&folder).expect("nothing came");
        assert!(before < synced && epoch() == synced);
    }

    #[test]
    fn after_a_failed_sync_nothing_is_called_synced() {
        let world = World(tempfile::tempdir().expect("temporary folder"));
        let (folder, durable, _) = world.open("1");
        // A circle of links can be neither opened nor missed.
        let circle = folder.nars().join("circle");
        std::os::unix::fs::symlink(&circle, &circle).expect("made");
        durable.begin().file_added(circle);
        add(&folder, &durable, 'a');
        assert!(durable.sync(&folder).is_err());
        add(&folder, &durable, 'b');
        durable.sync(&folder).expect("it has been said");
        assert!(
            durable.pending.lock().expect("sound").files.is_empty(),
            "the list would grow for as long as the server runs"
        );
        durable.close(&folder).expect("it has been said");
        drop((folder, durable));
        let (folder, _, rolled_back) = world.open("2");
        assert_eq!((rolled_back, held(&folder).as_str()), (Some(2), ""));
    }
}
