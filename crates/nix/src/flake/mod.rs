//! Flakes: the source a reference resolves to, its outputs, and their derivations, evaluated in
//! parallel within the available memory. Never builds.

pub mod error;
pub mod evaluate;
pub mod evaluation_memory;
pub mod expression;
pub mod nix_eval_jobs;
mod pool;
pub mod system;
mod worker;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use crate::tool::{Error, Nix};
use flywheel_sys::untrusted_file::{self, Owner};

/// The largest `flake.lock`, in bytes.
const LOCK_FILE_LIMIT: u64 = 64 * 1024 * 1024;
/// Fetching a flake with all its inputs may take a while.
const FETCH_LIMIT: Duration = Duration::from_secs(1800);

/// A flake's source, as Nix resolved it.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// The reference as given, without a fragment.
    pub(crate) reference: String,
    /// The full reference, locked if the source can be locked.
    pub(crate) url: String,
    /// The full reference, unlocked.
    pub resolved: String,
    /// The source tree in the store.
    pub path: PathBuf,
    /// The folder of `flake.nix` in the tree; empty for its root.
    pub(crate) folder: String,
    /// The tree's hash, as Nix writes it.
    pub(crate) nar_hash: String,
    /// The locked attributes of the source, including those that change with the commit.
    pub locked: BTreeMap<String, Value>,
    /// The names of the other attributes in the metadata.
    pub(crate) known: Vec<String>,
    /// The locked inputs.
    pub(crate) locks: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    #[serde(default)]
    url: Option<String>,
    #[serde(default)]
    resolved_url: Option<String>,
    path: PathBuf,
    locked: BTreeMap<String, Value>,
    #[serde(default)]
    locks: Value,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

impl Source {
    /// Resolves a reference with Nix, which fetches what is missing. Writes no lock file.
    ///
    /// # Errors
    /// When the flake does not exist or cannot be fetched.
    pub async fn find(nix: &Nix, reference: &str, arguments: &[String]) -> Result<Self, Error> {
        let mut args = vec![
            "flake",
            "metadata",
            "--json",
            "--no-write-lock-file",
            reference,
        ];
        args.extend(arguments.iter().map(String::as_str));
        let printed = nix.run_checked(&args, FETCH_LIMIT).await?;
        let problem = |problem: String| Error::UnexpectedOutput {
            call: "nix flake metadata".to_owned(),
            problem,
        };
        let found: Metadata =
            serde_json::from_slice(&printed.stdout).map_err(|error| problem(error.to_string()))?;
        let text = |name: &str| {
            found
                .locked
                .get(name)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        let nar_hash = text("narHash");
        // Without the hash, the source cannot be identified.
        if nar_hash.is_empty() {
            return Err(problem("`narHash` is missing".to_owned()));
        }
        let mut known: Vec<String> = found.others.into_keys().collect();
        known.sort();
        // Not every version prints a resolved reference.
        let resolved = found.resolved_url.unwrap_or_else(|| reference.to_owned());
        Ok(Self {
            reference: reference.to_owned(),
            url: found.url.unwrap_or_else(|| resolved.clone()),
            resolved,
            path: found.path,
            folder: text("dir"),
            nar_hash,
            locked: found.locked,
            known,
            locks: found.locks,
        })
    }

    /// The folder of `flake.nix` in the store.
    pub(crate) fn flake_folder(&self) -> PathBuf {
        if self.folder.is_empty() {
            self.path.clone()
        } else {
            self.path.join(&self.folder)
        }
    }

    /// Returns the reason, if any, why the flake's inputs prevent remembering its evaluation.
    pub fn memory_obstacle(&self) -> Option<&'static str> {
        let lock = self.flake_folder().join("flake.lock");
        let written = untrusted_file::read(&lock, Owner::Any, LOCK_FILE_LIMIT).ok();
        let written: Option<Value> = written.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let Some(nodes) = self.locks["nodes"].as_object() else {
            return Some("Nix does not report its inputs");
        };
        // A flake without inputs needs no lock file.
        let alone = nodes.len() <= 1;
        // An outdated lock file means that Nix resolved inputs anew, which another run may do
        // differently.
        let is_written = written.is_some_and(|written| written["nodes"] == self.locks["nodes"]);
        if !alone && !is_written {
            return Some("its inputs are not locked in a `flake.lock` that is up to date");
        }
        let root = self.locks["root"].as_str().unwrap_or("root");
        nodes
            .iter()
            .find_map(|(name, node)| memory_obstacle_of_input(node, name == root))
    }
}

/// Returns the reason, if any, why this input prevents it: an input that sees the flake itself also
/// sees the commit.
fn memory_obstacle_of_input(node: &Value, is_root: bool) -> Option<&'static str> {
    let inputs = node["inputs"].as_object();
    let follows_root = inputs.is_some_and(|inputs| {
        inputs
            .values()
            .any(|to| to.as_array().is_some_and(Vec::is_empty))
    });
    if follows_root {
        return Some("one of its inputs follows the flake itself");
    }
    let locked = &node["locked"];
    let is_inside = locked["type"] == "path"
        && locked["path"]
            .as_str()
            .is_some_and(|path| !path.starts_with('/'));
    if is_inside || node.get("parent").is_some() {
        return Some("one of its inputs is a folder of the flake itself");
    }
    (!is_root && locked["narHash"].as_str().is_none_or(str::is_empty))
        .then_some("one of its inputs is not locked by a hash")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn source(locks: Value) -> Source {
        Source {
            reference: ".".into(),
            url: "path:/x".into(),
            resolved: "path:/x".into(),
            path: "/nonexistent".into(),
            folder: String::new(),
            nar_hash: "sha256-x".into(),
            locked: BTreeMap::new(),
            known: Vec::new(),
            locks,
        }
    }

    #[test]
    fn what_may_see_the_commit_is_not_remembered() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let remembered = |nodes: Value, written: bool| {
            let locks = json!({ "root": "root", "nodes": nodes });
            let lock = folder.path().join("flake.lock");
            let _ = std::fs::remove_file(&lock);
            if written {
                std::fs::write(&lock, locks.to_string()).expect("written");
            }
            Source {
                path: folder.path().into(),
                ..source(locks)
            }
            .memory_obstacle()
        };
        assert_eq!(remembered(json!({ "root": {} }), false), None);
        let good = json!({ "type": "path", "path": "/a", "narHash": "sha256-y" });
        let nodes = |locked: &Value, more: Value| json!({ "root": { "inputs": { "a": "a" } }, "a": { "locked": locked, "inputs": more } });
        assert_eq!(remembered(nodes(&good, json!({})), true), None);
        assert_eq!(remembered(nodes(&good, json!({ "b": ["c"] })), true), None);
        for (locked, more, written, why) in [
            (&good, json!({}), false, "up to date"),
            (
                &good,
                json!({ "root": [] }),
                true,
                "follows the flake itself",
            ),
            (
                &json!({ "type": "path", "path": "./sub", "narHash": "sha256-y" }),
                json!({}),
                true,
                "folder of the flake",
            ),
            (
                &json!({ "type": "git", "url": "x" }),
                json!({}),
                true,
                "by a hash",
            ),
        ] {
            let found = remembered(nodes(locked, more), written).unwrap_or_default();
            assert!(found.contains(why), "{found}: {why}");
        }
    }
}
