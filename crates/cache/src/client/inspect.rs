//! Applies the publication policy: scans each path before it is sent to any server, and gives the reasons to withhold
//! it. It has to come first: a server that knows a NAR accepts the path by its hash alone, and nothing can be taken
//! back. It never sends anything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use flywheel_core::policy::{Policy, Rule, Ruling};
use flywheel_nix::nar::{DumpError, NarSource};
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::scan::{Finding, ScanResult, Scanner};
use flywheel_nix::store::Store;
use flywheel_nix::store_path::{PathHash, StorePath};
use flywheel_sys::host::inline_blocking::AdaptiveBlocking;

/// A NAR up to this size, in bytes, stays in memory from the scan until it is sent, so that it is read once.
const SMALL: u64 = 64 * 1024;

/// Scans paths and applies the policy to what it finds. All publishers of a job share one.
#[derive(Debug)]
pub struct Inspector {
    scanner: Scanner,
    policy: Policy,
    store: Option<Arc<Store>>,
    /// Scans small paths.
    blocking: AdaptiveBlocking,
    state: Mutex<InspectorState>,
}

#[derive(Debug, Default)]
struct InspectorState {
    /// Violations of the job as a whole, which apply to every path: rule and description.
    job: BTreeMap<Rule, String>,
    warned: Vec<(StorePath, Finding)>,
}

impl Inspector {
    /// Without a store the rule about dangling references is not checked.
    pub fn new(scanner: Scanner, policy: Policy, store: Option<Arc<Store>>) -> Self {
        Self {
            scanner,
            policy,
            store,
            blocking: AdaptiveBlocking::default(),
            state: Mutex::default(),
        }
    }

    /// Records that the job as a whole violates `rule` from now on; `what` describes the violation.
    pub fn record_violation(&self, rule: Rule, what: String) {
        self.state().job.entry(rule).or_insert(what);
    }

    /// Withdraws the violation of `rule` by the job as a whole.
    pub fn clear_violation(&self, rule: Rule) {
        self.state().job.remove(&rule);
    }

    /// Findings in published paths: their rules only warn.
    pub fn warned(&self) -> Vec<(StorePath, Finding)> {
        self.state().warned.clone()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, InspectorState> {
        // No change takes more than one step, so a panic cannot have left the state half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The findings that withhold a path; none if it may be published. Keeps the NAR of a small path in `source`.
    ///
    /// # Errors
    /// When the path cannot be read.
    pub(crate) async fn inspect(
        self: &Arc<Self>,
        info: &PathInfo,
        source: &mut NarSource,
    ) -> Result<Vec<Finding>, DumpError> {
        let (withheld, warned) = self.apply_policy(info, self.job_findings());
        // A path that the job alone withholds need not be scanned.
        if !withheld.is_empty() {
            return Ok(withheld);
        }
        let mut found = Vec::new();
        if self.needs_scan(info) {
            let (inspector, file) = (Arc::clone(self), source.file.clone());
            let (hash, size) = (info.nar_hash, info.nar_size);
            let scan = move || {
                if size <= SMALL {
                    inspector.scanner.scan_and_read(&file, hash, size)
                } else {
                    inspector.scanner.scan(&file).map(|looked| (looked, None))
                }
            };
            let looked = self
                .blocking
                .run(size > SMALL, scan)
                .await
                .map_err(|panic| DumpError::Sink(std::io::Error::other(panic)))?;
            let (looked, read) = looked?;
            source.read = read;
            found.extend(self.dangling(info, &looked).await);
            found.extend(looked.findings);
        }
        let (withheld, more) = self.apply_policy(info, found);
        self.state().warned.extend(
            warned
                .into_iter()
                .chain(more)
                .map(|finding| (info.path.clone(), finding)),
        );
        Ok(withheld)
    }

    fn job_findings(&self) -> Vec<Finding> {
        let state = self.state();
        let finding =
            |(rule, what): (&Rule, &String)| Finding::without_location(*rule, what.clone());
        state.job.iter().map(finding).collect()
    }

    /// Whether any rule needs the path's content.
    fn needs_scan(&self, info: &PathInfo) -> bool {
        let mut rules = Rule::ALL.into_iter().filter(|rule| rule.is_about_content());
        rules.any(|rule| self.ruling(info, rule) != Ruling::Publish)
    }

    fn ruling(&self, info: &PathInfo, rule: Rule) -> Ruling {
        self.policy.decide(true, rule, info.path.name(), true)
    }

    /// Divides findings into those that withhold the path and those that only warn. The policy may drop some.
    fn apply_policy(&self, info: &PathInfo, found: Vec<Finding>) -> (Vec<Finding>, Vec<Finding>) {
        let found = found
            .into_iter()
            .filter(|finding| self.ruling(info, finding.rule) != Ruling::Publish);
        found.partition(|finding| self.ruling(info, finding.rule) == Ruling::Withhold)
    }

    /// References that are not valid, and valid store paths that the content mentions without a reference: a host that
    /// fetches the path would not get them.
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
        // A path that refers to nothing and mentions only itself needs no query of the store.
        if others.is_empty() && looked.mentions.keys().all(|hash| *hash == own) {
            return Vec::new();
        }
        // A store that cannot be queried now is no fault of the path.
        let Ok(known) = store.closure(std::slice::from_ref(&info.path)).await else {
            return Vec::new();
        };
        // Paths whose facts cannot be parsed are in the closure all the same.
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
        // A store derivation mentions its outputs, which are no references.
        if !info.path.is_derivation() {
            found.extend(unreferenced(store, info, looked, &closure).await);
        }
        found
    }
}

/// Valid store paths outside the closure that the content mentions.
async fn unreferenced(
    store: &Store,
    info: &PathInfo,
    looked: &ScanResult,
    closure: &BTreeSet<PathHash>,
) -> Vec<Finding> {
    let outside = looked
        .mentions
        .iter()
        .filter(|(hash, _)| !closure.contains(*hash) && **hash != info.path.hash());
    let outside: BTreeMap<&PathHash, _> = outside.collect();
    let hashes: Vec<PathHash> = outside.keys().map(|hash| (*hash).clone()).collect();
    // A mention counts only if the store has such a path: other text can look like a hash.
    let valid = store.valid_by_hash(hashes).await.unwrap_or_default();
    let found = valid.iter().filter_map(|path| {
        let (file, offset) = outside.get(&path.hash())?;
        Some(Finding {
            rule: Rule::Dangling,
            file: file.clone(),
            offset: *offset,
            what: format!("`{path}`, which is not in its closure"),
        })
    });
    found.collect()
}
