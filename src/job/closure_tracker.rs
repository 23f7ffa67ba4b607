//! Which closures the publisher has been given already. A path that refers only to those needs no query of the
//! store's database, and most paths that a build makes are so.

use std::collections::HashSet;

use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::{PathHash, StorePath};

/// The paths that were given to the publisher together with everything they refer to. None is ever removed: the
/// publisher keeps what it was given as long as the job runs.
#[derive(Debug, Default)]
pub(super) struct ClosureTracker(HashSet<PathHash>);

impl ClosureTracker {
    /// Adds paths that are given together; every reference of theirs is among them or was given before.
    pub(crate) fn add(&mut self, infos: &[PathInfo]) {
        self.0.extend(infos.iter().map(|info| info.path.hash()));
    }

    /// Whether the path was given together with everything that it refers to.
    pub(crate) fn is_given(&self, path: &StorePath) -> bool {
        self.0.contains(&path.hash())
    }

    /// Splits paths, in the order of their registration, into those that are ready to be given and the rest, for which
    /// the closures have to be queried. A path is ready when it refers only to itself, to paths given before, and to
    /// ready ones ahead of it; it counts as given from here on.
    pub(crate) fn split_ready(&mut self, infos: Vec<PathInfo>) -> (Vec<PathInfo>, Vec<PathInfo>) {
        infos.into_iter().partition(|info| {
            let is_given = |path: &StorePath| *path == info.path || self.0.contains(&path.hash());
            let is_ready = info.references.iter().all(is_given);
            if is_ready {
                self.0.insert(info.path.hash());
            }
            is_ready
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flywheel_nix::hash::Sha256;

    fn path(letter: char) -> StorePath {
        format!("/nix/store/{}-x", letter.to_string().repeat(32))
            .parse()
            .expect("valid")
    }

    fn info(letter: char, references: &str) -> PathInfo {
        PathInfo {
            path: path(letter),
            nar_hash: Sha256([0; 32]),
            nar_size: 1,
            references: references.chars().map(path).collect(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
            ultimate: true,
        }
    }

    fn split(closures: &mut ClosureTracker, infos: Vec<PathInfo>) -> [String; 2] {
        let (ready, open) = closures.split_ready(infos);
        [ready, open].map(|infos| {
            infos
                .iter()
                .map(|info| info.path.to_string().as_bytes()[11] as char)
                .collect()
        })
    }

    #[test]
    fn only_what_refers_to_something_not_given_must_be_queried() {
        let mut closures = ClosureTracker::default();
        let batch = || {
            vec![
                info('a', ""),
                info('b', "ab"),
                info('c', "z"),
                info('d', "bc"),
            ]
        };
        assert_eq!(split(&mut closures, batch()), ["ab", "cd"]);
        assert_eq!(
            split(&mut closures, vec![info('f', "c")]),
            ["", "f"],
            "its closure is not known to be given"
        );
        closures.add(&[info('z', ""), info('c', "z")]);
        assert_eq!(
            split(
                &mut closures,
                vec![info('d', "bc"), info('f', "d"), info('g', "y")]
            ),
            ["df", "g"]
        );
    }
}
