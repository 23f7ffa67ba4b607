//! Whose closures the publisher has been given already: what refers to nothing else needs no question to the store's
//! database, and most of what a build makes is so. Asks nobody, and forgets nothing while the job runs.

use std::collections::HashSet;

use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::{PathHash, StorePath};

/// The paths that were given with all they refer to.
#[derive(Debug, Default)]
pub struct ClosureTracker(HashSet<PathHash>);

impl ClosureTracker {
    /// These were given together, and every reference of theirs with them or before.
    pub fn add(&mut self, infos: &[PathInfo]) {
        self.0.extend(infos.iter().map(|info| info.path.hash()));
    }

    /// Divides what is to be given, in the order of its registration: first what refers only to what was given, itself,
    /// or something before it, and counts as given from now on; second the rest, whose closures must be asked for.
    pub fn split_ready(&mut self, infos: Vec<PathInfo>) -> (Vec<PathInfo>, Vec<PathInfo>) {
        infos.into_iter().partition(|info| {
            let is_given = |path: &StorePath| *path == info.path || self.0.contains(&path.hash());
            let is_whole = info.references.iter().all(is_given);
            if is_whole {
                self.0.insert(info.path.hash());
            }
            is_whole
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

    fn divided(closures: &mut ClosureTracker, infos: Vec<PathInfo>) -> [String; 2] {
        let (whole, open) = closures.split_ready(infos);
        [whole, open].map(|infos| {
            infos
                .iter()
                .map(|info| info.path.to_string().as_bytes()[11] as char)
                .collect()
        })
    }

    #[test]
    fn only_what_refers_to_something_not_given_must_be_asked_for() {
        let mut closures = ClosureTracker::default();
        let batch = || {
            vec![
                info('a', ""),
                info('b', "ab"),
                info('c', "z"),
                info('d', "bc"),
            ]
        };
        assert_eq!(divided(&mut closures, batch()), ["ab", "cd"]);
        assert_eq!(
            divided(&mut closures, vec![info('f', "c")]),
            ["", "f"],
            "its closure is not known to be given"
        );
        closures.add(&[info('z', ""), info('c', "z")]);
        assert_eq!(
            divided(
                &mut closures,
                vec![info('d', "bc"), info('f', "d"), info('g', "y")]
            ),
            ["df", "g"]
        );
    }
}
