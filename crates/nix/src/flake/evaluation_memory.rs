//! Evaluation memory: the results of earlier evaluations, keyed by everything they depend on. The
//! commit is not part of the key; results that depend on the commit are not stored (see
//! `expression.rs`).
//!
//! There is one file per key, in a folder that a workflow cache or a disk may preserve. Whoever can write such a file can
//! make a failing check look like one that passes, so a file is believed only if it is this user's alone, and in a job
//! that others rely on only with a MAC by a secret of that job's. Any other file counts as missing.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ring::hmac;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::flake::Source;
use crate::flake::evaluate::{Derivation, Names};
use flywheel_core::secret::Secret;
use flywheel_sys::untrusted_file::{self, FileError, Owner, check_exclusive_folder};

/// Increment this when the expressions or the stored format change their meaning.
const VERSION: u32 = 3;
/// What the MAC's text begins with, so that it is none of anything else that the secret may sign.
const MAC_DOMAIN: &str = "flywheel evaluation memory";
/// Files that have not been used for this long are removed.
const MAX_AGE: Duration = Duration::from_secs(30 * 24 * 60 * 60);
const MAX_FILES: usize = 200;
/// In bytes: more than the derivations of any flake take.
const SIZE_LIMIT: u64 = 256 * 1024 * 1024;

/// Everything that an evaluation depends on.
#[derive(Debug, Serialize)]
pub struct MemoryKey<'a> {
    pub nix: &'a str,
    pub attribute: &'a [String],
    /// The user's function that lists the outputs, if there is one.
    pub function: Option<&'a str>,
    /// The systems whose outputs are listed; `None` for all.
    pub systems: Option<&'a [String]>,
    /// Further arguments of Nix.
    pub arguments: &'a [String],
    /// The settings that may change the result.
    pub settings: &'a str,
}

/// What makes a file of the memory believed.
#[derive(Clone, Debug)]
pub enum Seal {
    /// That it and its folder are this user's, and nobody else may write to them.
    Owner,
    /// That too, and a MAC by this secret, which jobs of less trust do not have.
    Secret(Secret),
}

impl Seal {
    /// The sum of a text, as a file's first line has it. A MAC holds for this file name alone.
    fn sum(&self, file: &str, text: &str) -> String {
        match self {
            Self::Owner => hex::encode(Sha256::digest(text)),
            Self::Secret(secret) => {
                let key = hmac::Key::new(hmac::HMAC_SHA256, secret.expose().as_bytes());
                let tag = hmac::sign(&key, format!("{MAC_DOMAIN}\n{file}\n{text}").as_bytes());
                hex::encode(tag.as_ref())
            }
        }
    }

    /// Whether `sum` is that of the text.
    fn holds(&self, sum: &str, file: &str, text: &str) -> bool {
        // The comparison may end early, because nobody is told how far it came.
        sum == self.sum(file, text)
    }
}

/// Why what is in the folder is not used, or why nothing can be kept in it.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// It is as somebody else may have left it.
    #[error("`{}` {why}", .path.display())]
    Untrusted { path: PathBuf, why: FileError },
    /// It is this user's alone, but has no MAC by the job's secret.
    #[error("`{}` is damaged, or was not written by a job with this job's `ATTIC_TOKEN`", .0.display())]
    Unsealed(PathBuf),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The results stored under a key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    /// The outputs of the flake.
    pub names: Names,
    /// The derivations, by label.
    pub facts: BTreeMap<String, Derivation>,
}

impl Remembered {
    /// Whether nothing is left to evaluate.
    pub fn is_whole(&self) -> bool {
        self.names
            .outputs
            .iter()
            .all(|name| self.facts.contains_key(&name.label))
    }
}

/// The file of one key.
#[derive(Clone, Debug)]
pub struct EvaluationMemory {
    folder: PathBuf,
    name: String,
    seal: Seal,
}

impl EvaluationMemory {
    /// The file for this flake and key.
    pub fn new(folder: &Path, source: &Source, key: &MemoryKey<'_>, seal: Seal) -> Self {
        // A flake can test whether an attribute exists, so the names are part of the key. Values
        // that change with the commit are not.
        let names: Vec<&String> = source.locked.keys().chain(&source.known).collect();
        let kinds: Vec<_> = ["type", "submodules", "lfs"]
            .iter()
            .map(|name| source.locked.get(*name))
            .collect();
        let all = serde_json::json!({
            "version": VERSION,
            "narHash": source.nar_hash,
            "folder": source.folder,
            "names": names,
            "kinds": kinds,
            "key": key,
            // Jobs with another secret, or with none, keep files of their own beside these.
            "seal": seal.sum("", "name"),
        });
        let sum = Sha256::digest(all.to_string());
        Self {
            folder: folder.to_owned(),
            name: format!("{}.json", hex::encode(&sum[..20])),
            seal,
        }
    }

    fn file(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    /// Returns the stored results; `None` if there are none.
    ///
    /// # Errors
    /// When there are some, or a folder for them, and they are not to be believed.
    pub fn read(&self) -> Result<Option<Remembered>, MemoryError> {
        let untrusted = |path: &Path, why: FileError| MemoryError::Untrusted {
            path: path.to_owned(),
            why,
        };
        let file = self.file();
        // Who may write to the folder may replace the file.
        match check_exclusive_folder(&self.folder) {
            Err(error) if error.is_absence() => return Ok(None),
            checked => checked.map_err(|error| untrusted(&self.folder, error))?,
        }
        let bytes = match untrusted_file::read(&file, Owner::Exclusive, SIZE_LIMIT) {
            Err(error) if error.is_absence() => return Ok(None),
            read => read.map_err(|error| untrusted(&file, error))?,
        };
        let text = String::from_utf8(bytes).unwrap_or_default();
        let Some((_, body)) = text
            .split_once('\n')
            .filter(|(sum, body)| self.seal.holds(sum, &self.name, body))
        else {
            return Err(MemoryError::Unsealed(file));
        };
        // Mark the file as used, for `prune`. Failing to do so is no reason to ignore the results.
        let _ = fs::File::options()
            .append(true)
            .open(&file)
            .and_then(|file| file.set_modified(SystemTime::now()));
        Ok(serde_json::from_str(body).ok())
    }

    /// Stores results, completely or not at all.
    ///
    /// # Errors
    /// When the folder cannot be written, or others may write to it.
    pub fn write(&self, remembered: &Remembered) -> Result<(), MemoryError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)?;
        check_exclusive_folder(&self.folder).map_err(|why| MemoryError::Untrusted {
            path: self.folder.clone(),
            why,
        })?;
        let body = serde_json::to_string(remembered).map_err(io::Error::from)?;
        // It is made with mode 0600.
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
        write!(file, "{}\n{body}", self.seal.sum(&self.name, &body))?;
        // Renaming makes the change atomic for concurrent readers.
        file.persist(self.file())
            .map_err(|error| MemoryError::Io(error.error))?;
        // Prune after writing, so that the new file counts.
        prune(&self.folder);
        Ok(())
    }
}

/// Removes files that are too old, and the oldest of too many. Failures are ignored.
fn prune(folder: &Path) {
    let mut files: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_ours = path.extension().is_some_and(|end| end == "json");
        if let (true, Ok(modified)) = (is_ours, entry.metadata().and_then(|data| data.modified())) {
            files.push((modified, path));
        }
    }
    files.sort_by_key(|(modified, _)| std::cmp::Reverse(*modified));
    let old = SystemTime::now() - MAX_AGE;
    for (_, path) in files
        .iter()
        .enumerate()
        .filter(|(n, (at, _))| *n >= MAX_FILES || *at < old)
        .map(|(_, file)| file)
    {
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use serde_json::json;

    use super::*;
    use crate::flake::evaluate::OutputName;

    fn source(nar_hash: &str, rev: Option<&str>) -> Source {
        let mut locked = BTreeMap::from([
            ("type".to_owned(), json!("git")),
            ("lastModified".to_owned(), json!(rev.map_or(1, str::len))),
        ]);
        if let Some(rev) = rev {
            locked.insert("rev".to_owned(), json!(rev));
        }
        Source {
            reference: ".".into(),
            url: "git+file:///x".into(),
            resolved: "git+file:///x".into(),
            path: "/nix/store/x-source".into(),
            folder: String::new(),
            nar_hash: nar_hash.into(),
            locked,
            known: vec!["revision".into()],
            locks: json!({}),
        }
    }

    fn key(arguments: &[String]) -> MemoryKey<'_> {
        MemoryKey {
            nix: "nix (Nix) 2.8.0",
            attribute: &[],
            function: None,
            systems: None,
            arguments,
            settings: "",
        }
    }

    #[test]
    fn another_commit_of_the_same_tree_is_the_same_key_and_another_tree_is_not() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = |source: &Source, arguments: &[String]| {
            EvaluationMemory::new(folder.path(), source, &key(arguments), Seal::Owner).file()
        };
        let one = file(&source("sha256-a", Some("aaaa")), &[]);
        assert_eq!(one, file(&source("sha256-a", Some("bbbbbb")), &[]));
        assert_ne!(one, file(&source("sha256-b", Some("aaaa")), &[]));
        assert_ne!(
            one,
            file(&source("sha256-a", None), &[]),
            "a tree with changes has no `rev`"
        );
        assert_ne!(
            one,
            file(&source("sha256-a", Some("aaaa")), &["--option".into()])
        );
    }

    fn remembered() -> Remembered {
        let output = OutputName {
            attr: vec!["a".into()],
            label: "a".into(),
        };
        Remembered {
            names: Names {
                outputs: vec![output],
                ..Names::default()
            },
            facts: BTreeMap::new(),
        }
    }

    fn memory(folder: &Path, seal: &Seal) -> EvaluationMemory {
        EvaluationMemory::new(folder, &source("sha256-a", None), &key(&[]), seal.clone())
    }

    fn sealed(secret: &str) -> Seal {
        Seal::Secret(Secret::new(secret).expect("not empty"))
    }

    /// What reading gives: `none`, `believed`, or the reason why not.
    fn reading(memory: &EvaluationMemory) -> String {
        match memory.read() {
            Ok(None) => "none".to_owned(),
            Ok(Some(found)) if found == remembered() => "believed".to_owned(),
            Ok(Some(found)) => format!("{found:?}"),
            Err(error) => error.to_string(),
        }
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("changed");
    }

    #[test]
    fn what_is_damaged_or_may_be_anothers_is_not_believed() {
        for seal in [Seal::Owner, sealed("token")] {
            let parent = tempfile::tempdir().expect("temporary folder");
            let folder = parent.path().join("made/here");
            let memory = memory(&folder, &seal);
            assert_eq!(reading(&memory), "none");
            memory.write(&remembered()).expect("written");
            assert_eq!(reading(&memory), "believed");

            let file = memory.file();
            for (path, mode) in [(&folder, 0o700), (&file, 0o600)] {
                assert_eq!(fs::metadata(path).expect("there").mode() & 0o777, mode);
                set_mode(path, 0o777);
                let said = reading(&memory);
                assert!(
                    said.contains("can be written by other users (mode 0777)"),
                    "{said}"
                );
                set_mode(path, mode);
            }
            assert_eq!(reading(&memory), "believed");
            set_mode(&folder, 0o770);
            memory
                .write(&remembered())
                .expect_err("the folder is not this user's alone");
            set_mode(&folder, 0o700);

            let text = fs::read_to_string(&file).expect("read");
            fs::write(&file, text.replace("\"a\"", "\"b\"")).expect("written");
            assert!(
                reading(&memory).contains("is damaged"),
                "{}",
                reading(&memory)
            );
            fs::write(&file, text).expect("written");
            assert_eq!(reading(&memory), "believed");
        }
    }

    #[test]
    fn only_the_secret_makes_a_seal_and_for_one_file_alone() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let trusted = memory(folder.path(), &sealed("token"));
        let forged = "is damaged, or was not written by a job";
        // Each seal has a file of its own.
        for other in [sealed("other"), Seal::Owner] {
            let other = memory(folder.path(), &other);
            other.write(&remembered()).expect("written");
            assert_eq!(reading(&trusted), "none");
            fs::copy(other.file(), trusted.file()).expect("copied");
            assert!(reading(&trusted).contains(forged), "{}", reading(&trusted));
            fs::remove_file(trusted.file()).expect("removed");
        }
        // A file that the secret made for another flake.
        let elsewhere = EvaluationMemory::new(
            folder.path(),
            &source("sha256-b", None),
            &key(&[]),
            sealed("token"),
        );
        elsewhere.write(&remembered()).expect("written");
        fs::copy(elsewhere.file(), trusted.file()).expect("copied");
        assert!(reading(&trusted).contains(forged), "{}", reading(&trusted));
        trusted.write(&remembered()).expect("written");
        assert_eq!(reading(&trusted), "believed");
    }
}
