//! From the results of the publisher and of the verification to the publication that is reported. Pure.

use std::collections::HashMap;

use crate::report::publication::{KeySource, Missed, Publication};
use flywheel_cache::client::publish::{Final, Outcome, PathOutcome, Skip, Upstream};
use flywheel_cache::client::verify::{self, Coverage, Mode, Verdict, Verification};
use flywheel_core::text::count;
use flywheel_nix::path_info::{Origin, PathInfo, Unreadable};
use flywheel_nix::scan::Finding;
use flywheel_nix::store_path::StorePath;

/// Sums up what was published, and what of it the cache serves. `unreadable` are valid paths that could not even be
/// offered: those are lost too. `warned` are paths that were published although they break a rule that only warns. `store`:
/// what became of the job's paths in the store itself.
pub(crate) fn summarize(
    outcome: &Outcome,
    verification: &Verification,
    unreadable: &[Unreadable],
    warned: &[(StorePath, Finding)],
    store: &StoreAtEnd,
) -> Publication {
    let counts = outcome.counts();
    let coverage = coverage(outcome, verification);
    let not_sent = outcome.lost().map(|(info, reason)| missed(info, reason));
    let unread = unreadable.iter().map(|path| Missed {
        path: path.path.clone(),
        reason: path.problem.clone(),
    });
    let mut publication = Publication {
        published: counts.published,
        already_there: counts.already_there,
        repaired: repaired(outcome, verification),
        skipped: counts.skipped,
        verified: verification.good(),
        coverage,
        bytes: outcome.bytes,
        lost: not_sent
            .chain(unread)
            .chain(deleted(outcome, store))
            .collect(),
        ambiguous: store.unseen(),
        unread_processes: store.unread_processes as u64,
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
    add_verdicts(&mut publication, outcome, verification);
    add_unrealised(&mut publication, outcome, store);
    publication
}

/// Adds what was found to be damaged or could not be checked.
fn add_verdicts(publication: &mut Publication, outcome: &Outcome, verification: &Verification) {
    for (info, verdict) in &verification.paths {
        match verdict {
            Verdict::Good { .. } => (),
            Verdict::Bad(reason) => {
                let damage = outcome
                    .repaired()
                    .find(|(damaged, _)| damaged.path == info.path);
                publication.lost.push(match damage {
                    Some((_, damage)) => missed(
                        info,
                        &format!("the cache has it damaged ({damage}), and it is no better after it was sent anew: {reason}"),
                    ),
                    None => missed(info, reason),
                });
            }
            Verdict::Unverified(reason) => publication.unverified.push(missed(info, reason)),
        }
    }
    for path in outcome.already_there() {
        match &path.checked {
            Some(Verdict::Unverified(reason)) => {
                publication.unverified.push(missed(&path.info, reason));
            }
            // Every one was to be checked, and for this one there was no time.
            None if verification.mode == Mode::Full => {
                let reason = "it was already there, and the time for checking it was over";
                publication.unverified.push(missed(&path.info, reason));
            }
            _ => (),
        }
    }
}

/// Adds the paths to the lost ones that are in the cache without the realisation by which they are found.
fn add_unrealised(publication: &mut Publication, outcome: &Outcome, store: &StoreAtEnd) {
    for path in &store.floating {
        let is_served = |other: &PathOutcome| {
            other.info.path == *path
                && matches!(
                    other.end,
                    Final::Published | Final::AlreadyThere | Final::Repaired { .. }
                )
        };
        let is_lost = publication
            .lost
            .iter()
            .any(|lost| lost.path == path.to_string());
        if outcome.paths.iter().any(is_served) && !is_lost {
            publication.verified = publication.verified.saturating_sub(1);
            publication.lost.push(Missed {
                path: path.to_string(),
                reason: "its content is in the cache and its realisation is not, so that its content-addressed derivation is built again".to_owned(),
            });
        }
    }
}

/// What became of the job's paths in the store while the job ran.
#[derive(Debug, Default)]
pub(crate) struct StoreAtEnd {
    /// Paths of the job that were read and are not valid any more.
    pub(crate) deleted: Vec<PathInfo>,
    /// How many paths were registered and deleted before they could be read.
    pub(crate) unread: u64,
    /// What it has signed was not to be sent.
    pub(crate) upstream: Upstream,
    /// Paths that the job named and that are not valid: those that were not read are among them.
    pub(crate) named: Vec<StorePath>,
    /// Valid paths that cannot be substituted without their realisations.
    pub(crate) floating: Vec<StorePath>,
    /// Nix processes of which it is not known what they named.
    pub(crate) unread_processes: usize,
}

impl StoreAtEnd {
    /// The paths of which nothing is known but their number, in one entry.
    fn unseen(&self) -> Vec<Missed> {
        let reason = "registered and deleted again while the job ran, before they could be read";
        let one = || Missed {
            path: count(self.unread, "path"),
            reason: reason.to_owned(),
        };
        (self.unread > 0).then(one).into_iter().collect()
    }
}

/// The paths that need no more care; the next job takes up the rest.
pub(crate) fn settled<'a>(
    outcome: &'a Outcome,
    verification: &'a Verification,
) -> Vec<&'a StorePath> {
    let decided = outcome.paths.iter().filter(|path| match &path.end {
        Final::Skipped(_) | Final::Withheld(_) => true,
        // The cache's word that it has a path is enough, unless a check could not be made.
        Final::AlreadyThere => !matches!(path.checked, Some(Verdict::Unverified(_))),
        Final::Published | Final::Repaired { .. } => verification.mode == Mode::Off,
        Final::Failed { .. } | Final::Left { .. } => false,
    });
    let good = verification
        .paths
        .iter()
        .filter(|(_, verdict)| matches!(verdict, Verdict::Good { .. }));
    decided
        .map(|path| &path.info.path)
        .chain(good.map(|(info, _)| &info.path))
        .collect()
}

/// The paths that were deleted before the cache had them. Of a source that is gone, nothing can be rebuilt elsewhere
/// that an evaluation does not add again, so that it is no loss.
fn deleted(outcome: &Outcome, store: &StoreAtEnd) -> Vec<Missed> {
    let is_gone = |end: &Final| *end == Final::Skipped(Skip::Vanished);
    let ended: HashMap<&StorePath, &Final> = outcome
        .paths
        .iter()
        .map(|path| (&path.info.path, &path.end))
        .collect();
    // What was never offered has no end; what was sent before it was deleted has a good one.
    let unsent = store
        .deleted
        .iter()
        .filter(|info| !ended.contains_key(&info.path));
    let vanished = outcome.paths.iter().filter(|path| is_gone(&path.end));
    let unread = store
        .named
        .iter()
        .filter(|path| store.unread > 0 && !ended.contains_key(path))
        .map(|path| Missed {
            path: path.to_string(),
            reason: "it was deleted from the store before it could be read, if it was built at all"
                .to_owned(),
        });
    let unread: Vec<Missed> = unread.collect();
    unsent
        .chain(vanished.map(|path| &path.info))
        .filter(|info| info.origin() != Origin::Added && store.upstream.signer(info).is_none())
        .map(|info| {
            missed(
                info,
                "it was deleted from the store before it could be sent",
            )
        })
        .chain(unread)
        .collect()
}

/// The paths that the cache had damaged, and now serves.
fn repaired(outcome: &Outcome, verification: &Verification) -> Vec<Missed> {
    let is_bad = |info: &PathInfo| {
        let mut verdicts = verification.paths.iter();
        verdicts
            .any(|(other, verdict)| other.path == info.path && matches!(verdict, Verdict::Bad(_)))
    };
    let mended = outcome.repaired().filter(|(info, _)| !is_bad(info));
    mended.map(|(info, reason)| missed(info, reason)).collect()
}

/// The paths that were already there and whose check has this verdict.
fn checked(outcome: &Outcome, wanted: impl Fn(&Verdict) -> bool) -> u64 {
    let checked = outcome
        .already_there()
        .filter_map(|path| path.checked.as_ref());
    checked.filter(|verdict| wanted(verdict)).count() as u64
}

fn coverage(outcome: &Outcome, verification: &Verification) -> Coverage {
    Coverage {
        mode: verification.mode,
        sent: outcome.sent().count() as u64,
        sent_read: verification.bodies_read(),
        there: outcome.counts().already_there,
        there_read: checked(outcome, |verdict| {
            matches!(verdict, Verdict::Good { body: true })
        }),
        seed: verification.seed,
    }
}

/// The publication to a cache that takes nothing: each path is lost, and named. Paths that an upstream cache has
/// signed would not have been sent, so they are not lost.
pub(crate) fn all_lost(wanted: &[PathInfo], upstream: &Upstream, reason: &str) -> Publication {
    let lost = wanted
        .iter()
        .filter(|info| upstream.signer(info).is_none())
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

#[cfg(test)]
mod tests {
    use super::*;
    use flywheel_cache::client::publish::PathOutcome;
    use flywheel_cache::client::verify::{Key, Seed};
    use flywheel_nix::hash::Sha256;

    fn info(letter: char) -> PathInfo {
        let base_name = format!("{}-x", letter.to_string().repeat(32));
        PathInfo {
            path: StorePath::from_base_name(&base_name).expect("base name"),
            nar_hash: Sha256([0; 32]),
            nar_size: 100,
            references: Vec::new(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
            ultimate: true,
        }
    }

    fn outcome(ends: &[(char, Final, Option<Verdict>)]) -> Outcome {
        let path = |(letter, end, checked): &(char, Final, Option<Verdict>)| PathOutcome {
            info: info(*letter),
            end: end.clone(),
            checked: checked.clone(),
        };
        Outcome {
            paths: ends.iter().map(path).collect(),
            ..Outcome::default()
        }
    }

    fn verification(mode: Mode, verdicts: &[(char, Verdict)]) -> Verification {
        let verdicts = verdicts.iter();
        Verification {
            paths: verdicts
                .map(|(letter, verdict)| (info(*letter), verdict.clone()))
                .collect(),
            key: Key::Unknown,
            mode,
            seed: Seed(1),
        }
    }

    fn repaired() -> Final {
        Final::Repaired {
            reason: "it was short".into(),
        }
    }

    #[test]
    fn the_next_job_takes_up_what_was_not_seen_to_be_well() {
        let unread = Verdict::Unverified("silence".into());
        let outcome = outcome(&[
            ('a', Final::AlreadyThere, None),
            ('b', Final::AlreadyThere, Some(Verdict::Good { body: true })),
            ('c', Final::AlreadyThere, Some(unread.clone())),
            ('d', Final::Published, None),
            ('f', Final::Published, None),
            ('g', repaired(), None),
        ]);
        let sample = verification(
            Mode::Sample,
            &[
                ('d', Verdict::Good { body: true }),
                ('f', unread),
                ('g', Verdict::Bad("still short".into())),
            ],
        );
        let letters = |verification: &Verification| -> String {
            let settled = settled(&outcome, verification);
            settled.iter().map(|path| &path.base_name()[..1]).collect()
        };
        assert_eq!(letters(&sample), "abd");
        assert_eq!(letters(&verification(Mode::Off, &[])), "abdfg");
    }

    #[test]
    fn a_repair_that_did_not_help_is_lost_and_not_counted_as_one() {
        let outcome = outcome(&[('a', repaired(), None), ('b', repaired(), None)]);
        let bad = Verdict::Bad("it is still short".into());
        let seen = [('a', Verdict::Good { body: true }), ('b', bad)];
        let verification = verification(Mode::Sample, &seen);
        let publication = summarize(&outcome, &verification, &[], &[], &StoreAtEnd::default());
        assert_eq!((publication.repaired.len(), publication.lost.len()), (1, 1));
        let reason = &publication.lost[0].reason;
        assert!(
            reason.contains("damaged (it was short)") && reason.contains("it is still short"),
            "{reason}"
        );
        assert_eq!(
            publication.coverage.sentence(),
            "every body of what was sent"
        );
    }
}
