//! The builds of a job that failed, for its report: those whose log Nix has written since the job began, and that added
//! nothing to the store.

use std::collections::HashSet;
use std::time::SystemTime;

use futures_util::future::join_all;

use super::added_paths::AddedPaths;
use super::prepare::Prepared;
use super::watch::StoreWatch;
use crate::report::job::FailedBuild;
use flywheel_nix::build_logs::BuildLogs;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::StorePath;

/// Of so many failed builds the report shows the end of the log.
const SHOWN: usize = 3;
/// How many lines that are.
const LINES: usize = 25;

/// Where a job's build logs are, and since when they are the job's.
pub(crate) struct LogSearch {
    logs: BuildLogs,
    begun: SystemTime,
}

impl LogSearch {
    /// To be made while the job's store is still watched.
    pub(crate) fn new(watch: &StoreWatch, prepared: &Prepared) -> Option<Self> {
        let logs = BuildLogs::of(watch.nix(prepared), watch.store())?;
        let begun = watch.begun();
        Some(Self { logs, begun })
    }

    /// The builds that failed, the last one first; `freed` are outputs that are gone again. On a host that is shared with other repositories' jobs there are none,
    /// since a log may be another's.
    pub(crate) async fn failed(
        &self,
        added_paths: &AddedPaths,
        freed: &[PathInfo],
    ) -> Vec<FailedBuild> {
        if added_paths.is_shared {
            return Vec::new();
        }
        let infos = || added_paths.wanted.iter().chain(freed);
        let built: HashSet<&StorePath> = infos().filter_map(|info| info.deriver.as_ref()).collect();
        // The log of a content-addressed build is that of the resolved derivation, which is no deriver.
        let floating = infos().filter(|info| info.ca.is_some());
        let floating: HashSet<&str> = floating.map(|info| info.path.name()).collect();
        let mut failed = self.logs.written_since(self.begun).await;
        failed.retain(|path| !built.contains(path) && !floating.contains(name(path)));
        let tails = join_all(
            failed
                .iter()
                .take(SHOWN)
                .map(|path| self.logs.last_lines(path, LINES)),
        );
        let mut tails = tails.await.into_iter();
        failed
            .iter()
            .map(|path| FailedBuild {
                derivation: path.to_string(),
                name: name(path).to_owned(),
                log_tail: tails.next().unwrap_or_default(),
            })
            .collect()
    }
}

fn name(derivation: &StorePath) -> &str {
    let name = derivation.name();
    name.strip_suffix(".drv").unwrap_or(name)
}
