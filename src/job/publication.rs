//! From the results of the publisher and of the verification to the publication that is reported. Pure.

use crate::report::publication::{KeySource, Missed, Publication};
use flywheel_cache::client::publish::{Options, Outcome};
use flywheel_cache::client::verify::{self, Verdict, Verification};
use flywheel_nix::path_info::{PathInfo, Unreadable};
use flywheel_nix::scan::Finding;
use flywheel_nix::store_path::StorePath;

/// Sums up what was published, and what of it the cache serves. `unreadable` are valid paths that could not even be
/// offered: those are lost too. `warned` are paths that were published although they break a rule that only warns.
pub(crate) fn summarize(
    outcome: &Outcome,
    verification: &Verification,
    unreadable: &[Unreadable],
    warned: &[(StorePath, Finding)],
) -> Publication {
    let counts = outcome.counts();
    let not_sent = outcome.lost().map(|(info, reason)| missed(info, reason));
    let unread = unreadable.iter().map(|path| Missed {
        path: path.path.clone(),
        reason: path.problem.clone(),
    });
    let mut publication = Publication {
        published: counts.published,
        already_there: counts.already_there,
        skipped: counts.skipped,
        verified: verification.good(),
        bytes: outcome.bytes,
        lost: not_sent.chain(unread).collect(),
        unverified: Vec::new(),
        withheld: outcome
            .withheld()
            .map(|(info, why)| missed(info, &why.to_string()))
            .collect(),
        warned: warned
            .iter()
            .map(|(path, finding)| Missed {
                path: path.to_string(),
                reason: finding.to_string(),
            })
            .collect(),
        key: match verification.key {
            verify::Key::Given(_) => KeySource::Given,
            verify::Key::Announced(_) => KeySource::Announced,
            verify::Key::Unknown => KeySource::Unknown,
        },
        stopped: outcome.stopped.clone(),
    };
    for (info, verdict) in &verification.paths {
        match verdict {
            Verdict::Good { .. } => (),
            Verdict::Bad(reason) => publication.lost.push(missed(info, reason)),
            Verdict::Unverified(reason) => publication.unverified.push(missed(info, reason)),
        }
    }
    publication
}

/// The publication to a cache that takes nothing: each path is lost, and named. Paths that an upstream cache has
/// signed would not have been sent, so they are not lost.
pub(crate) fn all_lost(wanted: &[PathInfo], reason: &str) -> Publication {
    let upstream = Options::default().upstream_keys;
    let signed = |info: &PathInfo| {
        let keys = info
            .signatures
            .iter()
            .filter_map(|signature| signature.split(':').next());
        keys.into_iter()
            .any(|key| upstream.iter().any(|known| known == key))
    };
    let lost = wanted
        .iter()
        .filter(|info| !signed(info))
        .map(|info| missed(info, reason));
    Publication {
        lost: lost.collect(),
        ..Publication::default()
    }
}

fn missed(info: &PathInfo, reason: &str) -> Missed {
    Missed {
        path: info.path.to_string(),
        reason: reason.to_owned(),
    }
}
