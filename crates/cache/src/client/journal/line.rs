//! The journal's lines: how they are written, and how a file is read, even one that was cut off. Pure.
//!
//! A line is a line break, eight bytes of the text's SHA-256 in hexadecimal, a space, and the text, which is JSON. A
//! line with a wrong sum was torn and does not count.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use flywheel_nix::store_path::StorePath;

/// The version of the format. Journals of other versions are ignored until they are too old.
const VERSION: u32 = 1;

/// The state of a path. It only rises, so the order of lines does not matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Step {
    /// A process of the job is about to add the path.
    Expected,
    /// The path is valid, and wanted in the cache.
    Seen,
    /// The cache lacks the path, and it will be sent.
    Planned,
    /// The cache has the path.
    Uploaded,
    /// The cache was seen to serve the path, or it is left out on purpose.
    Settled,
}

/// One line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    #[serde(skip_serializing_if = "Option::is_none", default)]
    begin: Option<Begin>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    step: Option<Step>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    paths: Vec<String>,
    /// Since when a path of an earlier job is unsettled (seconds since 1970).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    since: Option<u64>,
    /// Where the account of this job ends, because another one began.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    until: Option<Until>,
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    end: bool,
}

/// The mark of another job: what was registered after it may be that job's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Until {
    /// An id in Nix's database.
    pub id: i64,
    /// Whether the other job publishes to the same cache, and so accounts for what comes after.
    pub heir: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Begin {
    version: u32,
    /// Empty for a job that publishes nothing.
    cache: String,
    /// The state folder of the job's store.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    store: Option<String>,
    /// The highest id in that store's database when the job began.
    mark: Option<i64>,
    /// The path with that id, by its base name.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    marked: Option<String>,
    at: u64,
}

impl Entry {
    pub(super) fn begin(
        cache: &str,
        store: &str,
        (mark, marked): (Option<i64>, Option<&StorePath>),
        at: u64,
    ) -> Self {
        Self {
            begin: Some(Begin {
                version: VERSION,
                cache: cache.to_owned(),
                store: Some(store.to_owned()),
                mark,
                marked: marked.map(|path| path.base_name().to_owned()),
                at,
            }),
            ..Self::default()
        }
    }

    pub(super) fn paths(step: Step, paths: &[&str]) -> Self {
        let paths = paths.iter().map(|path| (*path).to_owned()).collect();
        Self {
            step: Some(step),
            paths,
            ..Self::default()
        }
    }

    pub(super) fn carried(path: &StorePath, since: u64) -> Self {
        let paths = vec![path.base_name().to_owned()];
        Self {
            step: Some(Step::Seen),
            paths,
            since: Some(since),
            ..Self::default()
        }
    }

    pub(super) fn until(until: Until) -> Self {
        Self {
            until: Some(until),
            ..Self::default()
        }
    }

    pub(super) fn end() -> Self {
        Self {
            end: true,
            ..Self::default()
        }
    }

    pub(super) fn to_line(&self) -> String {
        let text = serde_json::to_string(self).expect("texts and numbers are always JSON");
        format!("\n{} {text}", sum(&text))
    }

    fn parse(line: &[u8]) -> Option<Self> {
        let (written, text) = std::str::from_utf8(line).ok()?.split_once(' ')?;
        (written == sum(text))
            .then(|| serde_json::from_str(text).ok())
            .flatten()
    }
}

fn sum(text: &str) -> String {
    hex::encode(&Sha256::digest(text.as_bytes())[..8])
}

/// The content of a journal.
#[derive(Debug, Default)]
pub(super) struct JournalContent {
    pub(crate) cache: Option<String>,
    store: Option<String>,
    pub(crate) mark: Option<i64>,
    /// The path with that id.
    pub(crate) marked: Option<StorePath>,
    pub(crate) begun: Option<u64>,
    /// The earliest beginning of another job.
    pub(crate) until: Option<Until>,
    ended: bool,
    paths: BTreeMap<StorePath, (Step, u64)>,
}

impl JournalContent {
    pub(super) fn parse(text: &[u8]) -> Self {
        let mut read = Self::default();
        // Torn lines have no valid sum and are dropped here.
        for entry in text.split(|byte| *byte == b'\n').filter_map(Entry::parse) {
            read.take(entry);
        }
        read
    }

    fn take(&mut self, entry: Entry) {
        // A journal in another version's format keeps no cache name here, so no job takes it up.
        if let Some(begin) = entry.begin.filter(|begin| begin.version == VERSION) {
            (self.cache, self.store) = (Some(begin.cache), begin.store);
            (self.mark, self.begun) = (begin.mark, Some(begin.at));
            let marked = begin.marked.as_deref().map(StorePath::from_base_name);
            self.marked = marked.and_then(Result::ok);
        }
        self.ended |= entry.end;
        self.until = self.until.into_iter().chain(entry.until).min();
        let Some(step) = entry.step else { return };
        // A path of an earlier job keeps its date, and all others count from the beginning of this job. A date that
        // moved with each job would keep paths that cannot be published for ever.
        let since = entry.since.or(self.begun).unwrap_or_default();
        for path in entry
            .paths
            .iter()
            .filter_map(|name| StorePath::from_base_name(name).ok())
        {
            let known = self.paths.entry(path).or_insert((step, since));
            // The highest state and the earliest date win, so the order of the lines does not matter.
            *known = (known.0.max(step), known.1.min(since));
        }
    }

    /// Whether the job worked on the store with this state folder. A journal without one is of any.
    pub(super) fn is_of_store(&self, state: &str) -> bool {
        self.store.as_ref().is_none_or(|store| store == state)
    }

    /// The paths that are wanted in the cache but not settled, and since when.
    pub(super) fn seen(&self) -> impl Iterator<Item = (StorePath, u64)> {
        let unsettled = self
            .paths
            .iter()
            .filter(|(_, (step, _))| (Step::Seen..Step::Settled).contains(step));
        unsettled.map(|(path, (_, since))| (path.clone(), *since))
    }

    /// The paths that may have become valid without being seen: none in a journal that was closed.
    pub(super) fn expected(&self) -> impl Iterator<Item = StorePath> {
        let expected = self
            .paths
            .iter()
            .filter(|(_, (step, _))| !self.ended && *step == Step::Expected);
        expected.map(|(path, _)| path.clone())
    }

    /// The mark of a job that never came to read the store at its end: whatever was registered after it is unaccounted
    /// for.
    pub(super) fn unaccounted(&self) -> Option<i64> {
        self.mark.filter(|_| !self.ended)
    }

    /// When the youngest unsettled path was seen.
    pub(super) fn youngest(&self) -> u64 {
        self.seen()
            .map(|(_, since)| since)
            .max()
            .unwrap_or_default()
    }
}
