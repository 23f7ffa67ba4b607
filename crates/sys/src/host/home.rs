//! Where the files of this process's user go. Nix, the journal and most tools look below `HOME`; a service, a pod or a
//! container often has none, or one that cannot be written to. Variables make up for what is missing.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::process::geteuid;

use crate::host::answering;
use crate::host::private::{PrivateError, PrivateFolder};

/// The variables of freedesktop.org's base directory specification, and where each folder is below the home. The first
/// is only read, so that it stays in a home that cannot be written to.
const FOLDERS: [(&str, &str); 4] = [
    (CONFIG, ".config"),
    ("XDG_CACHE_HOME", ".cache"),
    ("XDG_DATA_HOME", ".local/share"),
    ("XDG_STATE_HOME", ".local/state"),
];
const CONFIG: &str = "XDG_CONFIG_HOME";

/// What the environment lacks for its user to have a home.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Home {
    pub variables: Vec<(&'static str, OsString)>,
    /// Why, as a sentence for the log; `None` if nothing is lacking.
    pub note: Option<String>,
}

impl Home {
    /// Looks at the home that `variable` names, and at the one in `/etc/passwd`. Where neither can be written to, a
    /// private folder below `base` takes its place, which outlives this process as a home does.
    ///
    /// # Errors
    /// When that folder cannot be made.
    pub fn find(
        variable: impl Fn(&str) -> Option<OsString>,
        base: &Path,
    ) -> Result<Self, PrivateError> {
        let id = geteuid().as_raw().to_string();
        let entry = Entry::of_this_user();
        let named = variable("HOME").map(PathBuf::from);
        Self::find_answering(variable, named, entry, &id, base, answering::answers)
    }

    /// Where a home does not answer, neither Nix nor the job may come near it.
    fn find_answering(
        variable: impl Fn(&str) -> Option<OsString>,
        named: Option<PathBuf>,
        mut entry: Option<Entry>,
        id: &str,
        base: &Path,
        answers: impl Fn(&Path) -> bool,
    ) -> Result<Self, PrivateError> {
        let dead = named.filter(|home| home.is_absolute() && !answers(home));
        entry = entry.filter(|entry| match &dead {
            Some(home) if *home == entry.home => false,
            _ => answers(&entry.home),
        });
        let Some(dead) = dead else {
            return Self::find_by(variable, entry.as_ref(), id, base);
        };
        let others = |name: &str| variable(name).filter(|_| name != "HOME");
        let mut found = Self::find_by(others, entry.as_ref(), id, base)?;
        let home = found.variables.iter().find(|(name, _)| *name == "HOME");
        let home = home.map(|(_, home)| home.display().to_string());
        found.note = Some(format!(
            "`{}` does not answer within {} s, as where its server is gone: `{}` is the home for this job, its journal \
             included",
            dead.display(),
            answering::LIMIT.as_secs(),
            home.unwrap_or_default()
        ));
        Ok(found)
    }

    fn find_by(
        variable: impl Fn(&str) -> Option<OsString>,
        entry: Option<&Entry>,
        id: &str,
        base: &Path,
    ) -> Result<Self, PrivateError> {
        let folder = |name: &str| {
            let named = variable(name).map(PathBuf::from);
            named.filter(|folder| folder.is_absolute())
        };
        let of_entry = entry
            .map(|entry| entry.home.clone())
            .filter(|home| is_own(home));
        let mut found = match (folder("HOME"), of_entry) {
            (Some(home), of_entry) => Self::of_folders(&home, of_entry.is_some(), folder, base)?,
            (None, Some(home)) => {
                let mut found = Self::of_folders(&home, true, folder, base)?;
                found.note.get_or_insert_with(|| {
                    let home = home.display();
                    format!("`HOME` is not set: it is `{home}` for this job, as in `/etc/passwd`")
                });
                found.variables.push(("HOME", home.into()));
                found
            }
            (None, None) => Self::private(base)?,
        };
        // Nix needs a name for the user's profiles, and takes this one where the system knows none.
        if entry.is_none() && variable("USER").is_none() {
            found.variables.push(("USER", id.into()));
        }
        Ok(found)
    }

    /// A private folder as the home.
    fn private(base: &Path) -> Result<Self, PrivateError> {
        let home = private_home(base)?;
        let note = format!(
            "`HOME` is not set, and `/etc/passwd` names no home of this user: `{}` is the home for this job, its journal \
             included",
            home.display()
        );
        Ok(Self {
            variables: vec![("HOME", home.into())],
            note: Some(note),
        })
    }

    /// The folders below `home` that have to be named. `has_other`: whether `/etc/passwd` names a home of this user's.
    fn of_folders(
        home: &Path,
        has_other: bool,
        named: impl Fn(&str) -> Option<PathBuf>,
        base: &Path,
    ) -> Result<Self, PrivateError> {
        // Nix takes the home in `/etc/passwd` for one that is another user's, and fails if there is none. It does not look
        // at the owner of a folder that a variable names.
        let is_accepted = has_other || is_own(home) || !home.exists();
        let mut found = Self::default();
        let mut replacement = None;
        for (name, below) in FOLDERS {
            if named(name).is_some() {
                continue;
            }
            let folder = home.join(below);
            if name != CONFIG && !can_be_written(&folder) {
                let private = replacement.get_or_insert(private_home(base)?);
                found.variables.push((name, private.join(below).into()));
            } else if !is_accepted {
                found.variables.push((name, folder.into()));
            }
        }
        let home = home.display();
        found.note = match replacement {
            Some(private) => Some(format!(
                "`{home}` cannot be written to: what belongs there, such as caches and the journal, is in `{}` for this job",
                private.display()
            )),
            None if !is_accepted => Some(format!(
                "`{home}` belongs to another user, and Nix refuses it: `XDG_CACHE_HOME` and its like name its folders"
            )),
            None => None,
        };
        Ok(found)
    }
}

/// A user in `/etc/passwd`.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub home: PathBuf,
}

impl Entry {
    /// That of this process's user.
    pub fn of_this_user() -> Option<Self> {
        let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
        Self::find(&users, geteuid().as_raw())
    }

    /// The user with this id in the text of the file.
    pub fn find(users: &str, id: u32) -> Option<Self> {
        users.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let [name, _, number, _, _, home, _] = fields.as_slice() else {
                return None;
            };
            (number.parse() == Ok(id)).then(|| Self {
                name: (*name).to_owned(),
                home: home.into(),
            })
        })
    }
}

/// The name of a home that was made up, in this user's private folder.
const PRIVATE_HOME: &str = "home";

/// Whether a folder is in a home that was made up: it is gone with the job's temporary files, and another job on the host
/// may have another one.
pub fn is_private_home(folder: &Path) -> bool {
    let own = format!("flywheel-{}", geteuid());
    let named = |folder: &Path, name: &str| folder.file_name().is_some_and(|file| file == name);
    folder.ancestors().any(|folder| {
        let above = folder.parent().and_then(Path::file_name);
        named(folder, PRIVATE_HOME)
            && above.is_some_and(|above| above.to_string_lossy().starts_with(&own))
    })
}

/// The private folder is one of this user alone, and so is what is made in it.
fn private_home(base: &Path) -> Result<PathBuf, PrivateError> {
    let folder = PrivateFolder::shared(base)?.join(PRIVATE_HOME);
    match fs::create_dir(&folder) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            Err(PrivateError::Make { folder, source })
        }
        _ => Ok(folder),
    }
}

fn is_own(home: &Path) -> bool {
    fs::metadata(home).is_ok_and(|found| found.is_dir() && found.uid() == geteuid().as_raw())
}

/// Whether files can be made in the folder, or the folder itself can be made. Tried with a file without a name, because
/// permissions do not show what a disk or its server refuses.
fn can_be_written(folder: &Path) -> bool {
    let mut found = folder.ancestors().filter(|folder| folder.exists());
    found
        .next()
        .is_some_and(|folder| tempfile::tempfile_in(folder).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found where `HOME` is `home`, and whether it is noted. BASE stands for the folder of the private home.
    fn find(home: Option<&Path>, of_entry: Option<&Path>) -> (Vec<(&'static str, String)>, bool) {
        let base = tempfile::tempdir().expect("temporary folder");
        let variable = |name: &str| home.filter(|_| name == "HOME").map(Into::into);
        let entry = of_entry.map(|home| Entry {
            name: "user".into(),
            home: home.into(),
        });
        let found = Home::find_by(variable, entry.as_ref(), "7", base.path());
        let found = found.expect("a folder can be made");
        let own = format!("{}/flywheel-{}", base.path().display(), geteuid().as_raw());
        let shown = |value: &OsString| value.display().to_string().replace(&own, "BASE");
        let variables = found.variables.iter();
        let variables = variables.map(|(name, value)| (*name, shown(value)));
        (variables.collect(), found.note.is_some())
    }

    #[test]
    fn a_home_of_ones_own_is_left_alone() {
        let home = tempfile::tempdir().expect("temporary folder");
        let entry = Some(home.path());
        assert_eq!(find(Some(home.path()), entry), (vec![], false));
        // A folder that is still to be made.
        let new = home.path().join("new");
        assert_eq!(find(Some(&new), entry), (vec![], false));
        // A user without a name.
        let user = vec![("USER", "7".to_owned())];
        assert_eq!(find(Some(home.path()), None), (user, false));
    }

    #[test]
    fn a_home_whose_server_is_gone_is_not_looked_at() {
        let base = tempfile::tempdir().expect("temporary folder");
        let gone = Path::new("/srv/gone");
        let variable = |name: &str| (name == "HOME").then(|| gone.into());
        let entry = Some(Entry {
            name: "user".into(),
            home: gone.into(),
        });
        let tries = std::cell::Cell::new(0);
        let answers = |home: &Path| {
            tries.set(tries.get() + 1);
            home != gone
        };
        let found = Home::find_answering(
            variable,
            Some(gone.into()),
            entry,
            "7",
            base.path(),
            answers,
        );
        let found = found.expect("a folder can be made");
        let (name, home) = &found.variables[0];
        assert!(*name == "HOME" && Path::new(home).starts_with(base.path()));
        assert!(found.note.is_some_and(|note| note.contains("/srv/gone")));
        assert_eq!(tries.get(), 1, "each try takes seconds");
    }

    #[test]
    fn without_the_variable_it_is_that_of_passwd_or_a_private_one() {
        let home = tempfile::tempdir().expect("temporary folder");
        let own = vec![("HOME", home.path().display().to_string())];
        assert_eq!(find(None, Some(home.path())), (own, true));
        let private = vec![("HOME", "BASE/home".to_owned())];
        let nobody = Some(Path::new("/nonexistent"));
        assert_eq!(find(None, nobody), (private.clone(), true));
        assert_eq!(find(Some(Path::new("relative")), nobody), (private, true));
    }

    #[test]
    fn what_cannot_be_written_there_is_elsewhere() {
        // Nothing can be made below `/proc`, by root either.
        let root = Some(Path::new("/"));
        let (variables, is_noted) = find(Some(Path::new("/proc/home")), root);
        let private = |name, below: &str| (name, format!("BASE/home/{below}"));
        assert_eq!(
            variables,
            [
                private("XDG_CACHE_HOME", ".cache"),
                private("XDG_DATA_HOME", ".local/share"),
                private("XDG_STATE_HOME", ".local/state"),
            ]
        );
        assert!(is_noted);
    }

    #[test]
    fn passwd_is_read_by_the_users_id() {
        let users =
            "root:x:0:0:root:/root:/bin/sh\nrunner:x:1001:0::/home/runner:/bin/sh\nno:x:7\n";
        let home = |id: u32| Entry::find(users, id).map(|entry| entry.home);
        assert_eq!(home(1001), Some("/home/runner".into()));
        assert_eq!(home(7), None);
        assert_eq!(home(100), None);
    }
}
