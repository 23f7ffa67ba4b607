//! The publication policy applied: looks at each path before any server hears of it, and says what keeps it back.
//! It has to be before: a server that knows a NAR takes the path by its name alone, and takes nothing back.
//! Never sends anything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use flywheel_core::policy::{Policy, Rule, Ruling};
use flywheel_nix::nar::{DumpError, NarSource};
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::scan::{Finding, ScanResult, Scanner};
use flywheel_nix::store::Store;
use flywheel_nix::store_path::{PathHash, StorePath};
use flywheel_sys::host::inline_blocking::Brief;

/// A NAR up to this size, in bytes, stays in memory from the look until it is sent, so that it is read once.
const SMALL: u64 = 64 * 1024;

/// Who inspects. Shared by all that publish in a job.
#[derive(Debug)]
pub struct Inspector {
    scanner: Scanner,
    policy: Policy,
    store: Option<Arc<Store>>,
    /// Looks into small ones.
    brief: Brief,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What the whole job breaks, by rule, in words.
    job: BTreeMap<Rule, String>,
    warned: Vec<(StorePath, Finding)>,
}

impl Inspector {
    /// Without a store, mentioned store paths are not looked up.
    pub fn new(scanner: Scanner, policy: Policy, store: Option<Arc<Store>>) -> Self {
        Self {
            scanner,
            policy,
            store,
            brief: Brief::default(),
            state: Mutex::default(),
        }
    }

    /// The whole job breaks this rule from now on, and why.
    pub fn accuse(&self, rule: Rule, what: String) {
        self.state().job.entry(rule).or_insert(what);
    }

    /// It does not break it any more.
    pub fn acquit(&self, rule: Rule) {
        self.state().job.remove(&rule);
    }

    /// What was found and let go all the same, because its rule only warns.
    pub fn warned(&self) -> Vec<(StorePath, Finding)> {
        self.state().warned.clone()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // A list that a panic left is still a list.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What keeps a path back; nothing if it may go. The NAR of a small one is read on the way.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn inspect(
        self: &Arc<Self>,
        info: &PathInfo,
        source: &mut NarSource,
    ) -> Result<Vec<Finding>, DumpError> {
        let without_location = self.without_location();
        let (withheld, warned) = self.ruled(info, without_location);
        if !withheld.is_empty() {
            return Ok(withheld);
        }
        let mut found = Vec::new();
        if self.looks_inside(info) {
            let (inspector, file) = (Arc::clone(self), source.file.clone());
            let (hash, size) = (info.nar_hash, info.nar_size);
            let looking = move || {
                if size <= SMALL {
                    inspector.scanner.scan_and_read(&file, hash, size)
                } else {
                    inspector.scanner.scan(&file).map(|looked| (looked, None))
                }
            };
            let looked = self
                .brief
                .run(size > SMALL, looking)
                .await
                .map_err(|panic| DumpError::Sink(std::io::Error::other(panic)))?;
            let (looked, read) = looked?;
            source.read = read;
            found.extend(self.dangling(info, &looked).await);
            found.extend(looked.findings);
        }
        let (withheld, more) = self.ruled(info, found);
        self.state().warned.extend(
            warned
                .into_iter()
                .chain(more)
                .map(|finding| (info.path.clone(), finding)),
        );
        Ok(withheld)
    }

    fn without_location(&self) -> Vec<Finding> {
        let state = self.state();
        let finding =
            |(rule, what): (&Rule, &String)| Finding::without_location(*rule, what.clone());
        state.job.iter().map(finding).collect()
    }

    /// Whether any rule needs its content.
    fn looks_inside(&self, info: &PathInfo) -> bool {
        let rules = [Rule::Dangling, Rule::MachinePath, Rule::Secret];
        rules
            .into_iter()
            .any(|rule| self.ruling(info, rule) != Ruling::Publish)
    }

    fn ruling(&self, info: &PathInfo, rule: Rule) -> Ruling {
        self.policy.decide(true, rule, info.path.name(), true)
    }

    /// What withholds the path, and what is only said.
    fn ruled(&self, info: &PathInfo, found: Vec<Finding>) -> (Vec<Finding>, Vec<Finding>) {
        let found = found
            .into_iter()
            .filter(|finding| self.ruling(info, finding.rule) != Ruling::Publish);
        found.partition(|finding| self.ruling(info, finding.rule) == Ruling::Withhold)
    }

    /// References that are not valid, and valid store paths that it mentions and does not refer to: a reader would
    /// not get them. What a store derivation mentions, its outputs too, is no reference.
    async fn dangling(&self, info: &PathInfo, looked: &ScanResult) -> Vec<Finding> {
        let Some(store) = self
            .store
            .as_deref()
            .filter(|_| self.ruling(info, Rule::Dangling) != Ruling::Publish)
        else {
            return Vec::new();
        };
        let others: Vec<StorePath> = info
            .references
            .iter()
            .filter(|path| **path != info.path)
            .cloned()
            .collect();
        let own = info.path.hash();
        if others.is_empty() && looked.mentions.keys().all(|hash| *hash == own) {
            return Vec::new();
        }
        // What cannot be asked of the store now is not held against the path.
        let Ok(known) = store.closure(std::slice::from_ref(&info.path)).await else {
            return Vec::new();
        };
        let unreadable = known
            .unreadable
            .iter()
            .filter_map(|path| path.path.parse::<StorePath>().ok());
        let closure: BTreeSet<PathHash> = known
            .infos
            .iter()
            .map(|info| info.path.hash())
            .chain(unreadable.map(|path| path.hash()))
            .collect();
        let invalid = others.iter().filter(|path| !closure.contains(&path.hash()));
        let mut found: Vec<Finding> = invalid
            .map(|path| {
                Finding::without_location(
                    Rule::Dangling,
                    format!("it refers to `{path}`, which is not valid"),
                )
            })
            .collect();
        if info.path.is_derivation() {
            return found;
        }
        let strangers = looked
            .mentions
            .iter()
            .filter(|(hash, _)| !closure.contains(*hash) && **hash != info.path.hash());
        let strangers: BTreeMap<&PathHash, _> = strangers.collect();
        let hashes: Vec<PathHash> = strangers.keys().map(|hash| (*hash).clone()).collect();
        for path in store.valid_by_hash(hashes).await.unwrap_or_default() {
            if let Some((file, offset)) = strangers.get(&path.hash()) {
                let what = format!("`{path}`, which is not in its closure");
                found.push(Finding {
                    rule: Rule::Dangling,
                    file: file.clone(),
                    offset: *offset,
                    what,
                });
            }
        }
        found
    }
}
