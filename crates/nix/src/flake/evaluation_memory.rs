//! Evaluation memory: the results of earlier evaluations, keyed by everything they depend on. The
//! commit is not part of the key; results that depend on the commit are not stored (see
//! `expression.rs`).
//!
//! There is one file per key, in a folder that a workflow cache or a disk may preserve. A file that
//! cannot be read, or does not match its checksum, counts as missing.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::flake::Source;
use crate::flake::evaluate::{Derivation, OutputName};
use flywheel_sys::untrusted_file::{self, Owner};

/// Increment this when the expressions or the stored format change their meaning.
const VERSION: u32 = 1;
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
    /// Further arguments of Nix.
    pub arguments: &'a [String],
    /// The settings that may change the result.
    pub settings: &'a str,
}

/// The results stored under a key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    /// The outputs of the flake.
    pub names: Vec<OutputName>,
    /// The derivations, by label.
    pub facts: BTreeMap<String, Derivation>,
}

impl Remembered {
    /// Whether nothing is left to evaluate.
    pub fn is_whole(&self) -> bool {
        self.names
            .iter()
            .all(|name| self.facts.contains_key(&name.label))
    }
}

/// The file of one key.
#[derive(Clone, Debug)]
pub struct EvaluationMemory {
    file: PathBuf,
}

impl EvaluationMemory {
    /// The file for this flake and key.
    pub fn new(folder: &Path, source: &Source, key: &MemoryKey<'_>) -> Self {
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
        });
        let sum = Sha256::digest(all.to_string());
        Self {
            file: folder.join(format!("{}.json", hexadecimal(&sum[..20]))),
        }
    }

    /// Returns the stored results; `None` if there are none or the file is damaged.
    pub fn read(&self) -> Option<Remembered> {
        let bytes = untrusted_file::read(&self.file, Owner::Any, SIZE_LIMIT).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        let (sum, body) = text.split_once('\n')?;
        if sum != hexadecimal(&Sha256::digest(body)) {
            return None;
        }
        let remembered = serde_json::from_str(body).ok()?;
        // Mark the file as used, for `prune`. Failing to do so is no reason to ignore the results.
        let _ = std::fs::File::options()
            .append(true)
            .open(&self.file)
            .and_then(|file| file.set_modified(SystemTime::now()));
        Some(remembered)
    }

    /// Stores results, completely or not at all.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn write(&self, remembered: &Remembered) -> io::Result<()> {
        let folder = self.file.parent().expect("it was joined to one");
        std::fs::create_dir_all(folder)?;
        let body = serde_json::to_string(remembered)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        write!(file, "{}\n{body}", hexadecimal(&Sha256::digest(&body)))?;
        // Renaming makes the change atomic for concurrent readers.
        file.persist(&self.file)?;
        // Prune after writing, so that the new file counts.
        prune(folder);
        Ok(())
    }
}

/// Removes files that are too old, and the oldest of too many. Failures are ignored.
fn prune(folder: &Path) {
    let mut files: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
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
        let _ = std::fs::remove_file(path);
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
            arguments,
            settings: "",
        }
    }

    #[test]
    fn another_commit_of_the_same_tree_is_the_same_key_and_another_tree_is_not() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = |source: &Source, arguments: &[String]| {
            EvaluationMemory::new(folder.path(), source, &key(arguments)).file
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

    #[test]
    fn what_is_damaged_is_not_there() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let memory = EvaluationMemory::new(folder.path(), &source("sha256-a", None), &key(&[]));
        assert_eq!(memory.read(), None);
        let remembered = Remembered {
            names: vec![OutputName {
                attr: vec!["a".into()],
                label: "a".into(),
            }],
            facts: BTreeMap::new(),
        };
        memory.write(&remembered).expect("written");
        assert_eq!(memory.read(), Some(remembered));
        let text = std::fs::read_to_string(&memory.file).expect("read");
        std::fs::write(&memory.file, text.replace("\"a\"", "\"b\"")).expect("written");
        assert_eq!(memory.read(), None);
    }
}
