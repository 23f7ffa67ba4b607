//! Which of the paths in the store are this job's: one rule, for the time while the job runs and for its end.
//!
//! Everything that was registered after the mark is the job's own, unless there is evidence that it is not. Process ids
//! are no such evidence. Where jobs of another repository or of lower trust can have written the store, the default is
//! the other way round: a path goes only if this job named it and its registration vouches for it. What is then left in
//! doubt is named and counted, never dropped silently.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::sync::Arc;

use super::daemon_names::DaemonNames;
use super::store_host::{Sharing, StoreHost};
use flywheel_cache::client::publish::Upstream;
use flywheel_nix::key::PublicKey;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store::{self, Mark, Store};
use flywheel_nix::store_path::StorePath;
use flywheel_nix::temp_roots::TempRootWatcher;

/// What becomes of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    Publish,
    /// It may be forged, or another repository's.
    Ambiguous(Doubt),
    /// A job beside this one has named it, and this one has not.
    OtherJob,
    /// Nothing substitutes a derivation: its closure is its build-time sources.
    Derivation,
}

/// When a path was registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Registered {
    BeforeMark,
    AfterMark,
}

/// Why a path on a shared host is not published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// No process of this job was seen to name it.
    NotNamed {
        /// Why the store counts as shared.
        shared: String,
    },
    /// The job named it, but it may have been imported by another.
    NotVouched {
        /// Why the store counts as shared.
        shared: String,
    },
    /// It refers to a path that is in doubt.
    Refers(StorePath),
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let remedy = "Give the job a store of its own, or set `shared-host: false` if every job on this host may publish";
        match self {
            Self::NotNamed { shared } => write!(
                f,
                "nothing shows that this job added it, and {shared}. {remedy}"
            ),
            Self::NotVouched { shared } => write!(
                f,
                "it was neither built here from a derivation of this job, nor is it content-addressed or signed by a trusted key, and {shared}. {remedy}"
            ),
            Self::Refers(path) => write!(f, "it refers to `{path}`, which is ambiguous"),
        }
    }
}

/// The rule, with what it needs to know of the job, its store and its host.
#[derive(Debug)]
pub(super) struct Ownership {
    pub(super) store: Arc<Store>,
    /// Paths that were registered later may be the job's.
    pub(super) mark: Mark,
    pub(super) temp_roots: Arc<TempRootWatcher>,
    pub(super) host: Arc<StoreHost>,
    /// Who else can write what they like into the store, if anybody can.
    pub(super) writers: Option<String>,
    /// The keys that Nix trusts.
    pub(super) trusted_keys: Vec<PublicKey>,
    /// What the job's commands name to a daemon, if they can be listened to.
    pub(super) daemon_names: Option<DaemonNames>,
}

/// What speaks for and against a path at one moment.
#[derive(Debug)]
pub(super) struct Evidence {
    pub(super) sharing: Sharing,
    /// The paths that processes of this job have named, and its results.
    pub(super) named: HashSet<StorePath>,
    /// What the named paths lead to. Empty where all paths are published by default.
    need: BTreeSet<StorePath>,
    /// Whether it is known of every process of this job what it named.
    is_complete: bool,
    /// Of how many Nix processes it is not known what they named for this job, where nothing listens to its daemon, or did not
    /// until the end.
    pub(super) unread_processes: usize,
    /// Whether a path that was added after the mark may be another job's.
    others_at_work: bool,
    /// The base names of what jobs beside this one have named.
    claimed: BTreeSet<String>,
    /// Whether a job that could not be seen may have named more.
    may_be_claimed: bool,
    trusted_keys: Vec<PublicKey>,
}

impl Ownership {
    /// Collects the evidence about paths that are valid by now. `results` are the job's, whichever process built them.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub(super) async fn evidence(&self, results: &[StorePath]) -> Result<Evidence, store::Error> {
        let neighbours = self.host.neighbours();
        let mut named = self.temp_roots.named();
        named.extend(results.iter().cloned());
        if let Some(names) = &self.daemon_names {
            let wanted: Vec<StorePath> = names.wanted().await.into_iter().collect();
            named.extend(self.store.outputs_of(wanted).await?);
        }
        let is_alone = !(neighbours.are_beside() || neighbours.sharing.is_shared());
        let (is_complete, unread_processes) = match &self.daemon_names {
            Some(names) if names.is_complete().await => (true, 0),
            names => {
                // Where no other job is, the names of a process without an owner are the job's, below.
                let ownerless = self.temp_roots.ownerless();
                let unread = self.temp_roots.unread() + if is_alone { 0 } else { ownerless };
                (names.is_none() && unread == 0, unread)
            }
        };
        let mut need = BTreeSet::new();
        let mut claimed = BTreeSet::new();
        if !is_alone {
            let mut roots: Vec<StorePath> = named.iter().cloned().collect();
            // These are more than what the job wants, so they are evidence for what was added and for nothing else.
            if let Some(names) = &self.daemon_names {
                roots.extend(names.named().await);
            }
            need = self.store.leads_to(roots, &self.mark).await?;
            claimed = neighbours.claims();
        } else {
            named.extend(self.temp_roots.unattributed());
        }
        Ok(Evidence {
            is_complete,
            unread_processes,
            others_at_work: neighbours.are_beside() || self.host.is_declared_shared(),
            may_be_claimed: neighbours.may_be_more,
            sharing: neighbours.sharing,
            named,
            need,
            claimed,
            trusted_keys: self.trusted_keys.clone(),
        })
    }
}

impl Ownership {
    /// The upstream caches' keys, as far as this job can check them.
    pub(super) fn upstream(&self) -> Upstream {
        Upstream::default().with_keys(self.trusted_keys.iter().cloned())
    }

    /// Whether the registration of a path that a dead job named shows that it is what its name says. The derivation is
    /// not known any more, but `ultimate` cannot be set by an import.
    pub(super) fn is_own_work(&self, info: &PathInfo) -> bool {
        info.ultimate
            || info.ca.is_some()
            || self.trusted_keys.iter().any(|key| info.signed_by(key))
    }
}

impl Evidence {
    /// Whether another repository's job, or one of lower trust, can have written the store.
    pub(super) fn is_shared(&self) -> bool {
        self.sharing.is_shared()
    }

    /// Decides about a path that was added after the mark, was named by the job, or belongs to the closure of such a
    /// path.
    pub(super) fn decide(&self, info: &PathInfo, registered: Registered) -> Decision {
        let is_needed = self.need.contains(&info.path);
        match &self.sharing {
            _ if info.path.is_derivation() => Decision::Derivation,
            // No other job was there to add it.
            _ if registered == Registered::AfterMark && !self.others_at_work => Decision::Publish,
            Sharing::Alone(_) if is_needed => Decision::Publish,
            Sharing::Shared(_) if is_needed && self.is_vouched(info) => Decision::Publish,
            Sharing::Shared(why) if is_needed => Decision::Ambiguous(Doubt::NotVouched {
                shared: why.clone(),
            }),
            _ if self.is_complete && self.claimed.contains(info.path.base_name()) => {
                Decision::OtherJob
            }
            // This job may have named it, too, by a process that was gone too soon.
            Sharing::Alone(_) => Decision::Publish,
            Sharing::Shared(why) => Decision::Ambiguous(Doubt::NotNamed {
                shared: why.clone(),
            }),
        }
    }

    /// Of paths that were added after the mark, those that are the job's by now, and those that are so unless a job beside
    /// this one claims them: it records what it names a moment later, while a path may be read at once.
    pub(super) fn split_own(&self, infos: Vec<PathInfo>) -> (Vec<PathInfo>, Vec<PathInfo>) {
        let mut own = infos;
        own.retain(|info| self.decide(info, Registered::AfterMark) == Decision::Publish);
        let is_unclaimed = |info: &PathInfo| {
            self.others_at_work && self.is_complete && !self.need.contains(&info.path)
        };
        let (unclaimed, own) = own.into_iter().partition(is_unclaimed);
        (own, unclaimed)
    }

    /// Whether a claim of a job beside this one would settle whose one of these paths is.
    pub(super) fn awaits_claims(&self, infos: &[PathInfo]) -> bool {
        let is_open = |info: &PathInfo| {
            !info.path.is_derivation()
                && !self.need.contains(&info.path)
                && !self.claimed.contains(info.path.base_name())
        };
        self.others_at_work && self.is_complete && infos.iter().any(is_open)
    }

    /// Whether a path that was added after the mark is this job's alone, so that no other job misses it: this one has
    /// named it, and no other one has.
    pub(super) fn is_own_alone(&self, info: &PathInfo) -> bool {
        let is_named = self.named.contains(&info.path) || self.need.contains(&info.path);
        let is_claimed = self.may_be_claimed || self.claimed.contains(info.path.base_name());
        is_named && !is_claimed && self.decide(info, Registered::AfterMark) == Decision::Publish
    }

    /// Whether the registration shows that the path is what its name says. Of what an untrusted user of a daemon can
    /// register, an import has neither `ultimate` nor a trusted signature; its deriver is as its importer claims.
    fn is_vouched(&self, info: &PathInfo) -> bool {
        let is_built_for_us = info.ultimate
            && info
                .deriver
                .as_ref()
                .is_some_and(|deriver| self.need.contains(deriver));
        is_built_for_us
            || info.ca.is_some()
            || self.trusted_keys.iter().any(|key| info.signed_by(key))
    }

    /// Divides paths into those that may be published and those that may not, with the reason. Paths that refer to one
    /// that may not be published may not, either; `is_published` says of a path outside of `infos` that it may.
    pub(super) fn divide(
        &self,
        infos: Vec<PathInfo>,
        registered: impl Fn(&StorePath) -> Registered,
        is_published: impl Fn(&StorePath) -> bool,
    ) -> (Vec<PathInfo>, Vec<(PathInfo, Decision)>) {
        let mut refused = Vec::new();
        let mut kept = Vec::new();
        for info in infos {
            match self.decide(&info, registered(&info.path)) {
                // A closure is published whole where no other job can have planted a part of it.
                Decision::Publish => kept.push(info),
                Decision::OtherJob | Decision::Derivation if !self.is_shared() => kept.push(info),
                decision => refused.push((info, decision)),
            }
        }
        if refused.is_empty() {
            return (kept, refused);
        }
        loop {
            let names: HashSet<&StorePath> = kept.iter().map(|info| &info.path).collect();
            let dangling = |info: &PathInfo| {
                let mut references = info.references.iter();
                let lacks = references.find(|path| !names.contains(path) && !is_published(path));
                lacks.map(|path| (info.path.clone(), path.clone()))
            };
            let lacking: Vec<(StorePath, StorePath)> = kept.iter().filter_map(dangling).collect();
            if lacking.is_empty() {
                return (kept, refused);
            }
            for (path, reference) in lacking {
                let at = kept.iter().position(|info| info.path == path);
                let info = kept.remove(at.expect("it was found among these"));
                refused.push((info, Decision::Ambiguous(Doubt::Refers(reference))));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Registered::{AfterMark, BeforeMark};
    use super::*;
    use flywheel_nix::hash::Sha256;
    use flywheel_nix::key::SecretKey;
    use flywheel_nix::path_info::fingerprint;

    fn path(name: &str) -> StorePath {
        format!("/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-{name}")
            .parse()
            .expect("valid")
    }

    fn built(name: &str, deriver: &str) -> PathInfo {
        PathInfo {
            path: path(name),
            nar_hash: Sha256([0; 32]),
            nar_size: 1,
            references: Vec::new(),
            deriver: Some(path(deriver)),
            signatures: Vec::new(),
            ca: None,
            ultimate: true,
        }
    }

    fn imported(name: &str, deriver: &str) -> PathInfo {
        PathInfo {
            ultimate: false,
            ..built(name, deriver)
        }
    }

    fn alone() -> Evidence {
        Evidence {
            sharing: Sharing::Alone("the test".into()),
            named: HashSet::new(),
            need: BTreeSet::new(),
            is_complete: true,
            unread_processes: 0,
            others_at_work: true,
            claimed: BTreeSet::new(),
            may_be_claimed: false,
            trusted_keys: Vec::new(),
        }
    }

    fn shared(need: &[&str]) -> Evidence {
        Evidence {
            sharing: Sharing::Shared("the test".into()),
            need: need.iter().map(|name| path(name)).collect(),
            ..alone()
        }
    }

    #[test]
    fn where_all_jobs_may_publish_what_nobody_claims_goes() {
        let mut evidence = alone();
        assert_eq!(
            evidence.decide(&imported("x", "x.drv"), AfterMark),
            Decision::Publish
        );
        assert_eq!(
            evidence.decide(&built("x.drv", "y"), AfterMark),
            Decision::Derivation
        );
        evidence.claimed.insert(path("x").base_name().to_owned());
        assert_eq!(
            evidence.decide(&built("x", "x.drv"), AfterMark),
            Decision::OtherJob
        );
        evidence.is_complete = false;
        let decision = evidence.decide(&built("x", "x.drv"), AfterMark);
        assert_eq!(
            decision,
            Decision::Publish,
            "this job may have named it, too"
        );
        evidence.is_complete = true;
        evidence.need.insert(path("x"));
        assert_eq!(
            evidence.decide(&built("x", "x.drv"), AfterMark),
            Decision::Publish,
            "both want it"
        );
    }

    #[test]
    fn on_a_shared_host_a_path_goes_if_it_was_named_and_is_vouched_for() {
        let evidence = shared(&["x", "x.drv"]);
        let is_ambiguous =
            |info: &PathInfo| matches!(evidence.decide(info, AfterMark), Decision::Ambiguous(_));
        assert_eq!(
            evidence.decide(&built("x", "x.drv"), AfterMark),
            Decision::Publish
        );
        assert!(
            is_ambiguous(&imported("x", "x.drv")),
            "whoever imported it claims the deriver"
        );
        assert!(
            is_ambiguous(&built("x", "other.drv")),
            "another's derivation built it"
        );
        assert!(is_ambiguous(&built("y", "y.drv")), "nobody named it");
        let addressed = |name| PathInfo {
            ca: Some("fixed:r:sha256:x".into()),
            deriver: None,
            ..imported(name, "x.drv")
        };
        assert_eq!(
            evidence.decide(&addressed("x"), AfterMark),
            Decision::Publish
        );
        assert!(
            is_ambiguous(&addressed("secret")),
            "another repository's file"
        );
    }

    #[test]
    fn what_only_the_absence_of_a_claim_gives_to_the_job_waits_for_one() {
        let infos = || vec![built("x", "x.drv"), built("y", "y.drv")];
        let names = |infos: &[PathInfo]| -> Vec<StorePath> {
            infos.iter().map(|info| info.path.clone()).collect()
        };
        let split = |evidence: &Evidence| {
            let (own, unclaimed) = evidence.split_own(infos());
            (names(&own), names(&unclaimed))
        };
        let mut evidence = Evidence {
            need: BTreeSet::from([path("x")]),
            ..alone()
        };
        assert_eq!(split(&evidence), (vec![path("x")], vec![path("y")]));
        evidence.claimed.insert(path("y").base_name().to_owned());
        assert_eq!(split(&evidence), (vec![path("x")], vec![]));
        assert!(!evidence.awaits_claims(&infos()));
        evidence.claimed.clear();
        assert!(evidence.awaits_claims(&infos()));
        // Where no claim could be believed, or no other job is, none is waited for.
        let both = (vec![path("x"), path("y")], vec![]);
        evidence.is_complete = false;
        assert_eq!(split(&evidence), both);
        assert!(!evidence.awaits_claims(&infos()));
        evidence.is_complete = true;
        evidence.others_at_work = false;
        assert_eq!(split(&evidence), both);
        assert!(!evidence.awaits_claims(&infos()));
    }

    #[test]
    fn only_what_this_job_and_no_other_has_named_may_be_freed() {
        let mut evidence = alone();
        let (own, drv) = (built("x", "x.drv"), built("x.drv", "y"));
        assert!(!evidence.is_own_alone(&own), "nobody named it");
        evidence.named = HashSet::from([path("x"), path("x.drv")]);
        assert!(evidence.is_own_alone(&own));
        assert!(!evidence.is_own_alone(&drv));
        evidence.claimed.insert(path("x").base_name().to_owned());
        assert!(!evidence.is_own_alone(&own), "another needs it, too");
        evidence.claimed.clear();
        evidence.may_be_claimed = true;
        assert!(!evidence.is_own_alone(&own), "another may need it unseen");
    }

    /// No daemon makes up for a name or for a row that vouches, however well it builds: see `docs/publication.md`.
    #[test]
    fn what_a_remote_builder_made_needs_a_signature_on_a_shared_host_and_what_nobody_named_stays() {
        let evidence = shared(&["remote", "remote.drv"]);
        let decide = |info: &PathInfo| evidence.decide(info, AfterMark);
        let shared = || "the test".to_owned();
        let not_vouched = Decision::Ambiguous(Doubt::NotVouched { shared: shared() });
        // Its registration is that of an unsigned import.
        assert_eq!(decide(&imported("remote", "remote.drv")), not_vouched);
        let not_named = Decision::Ambiguous(Doubt::NotNamed { shared: shared() });
        assert_eq!(decide(&built("around", "around.drv")), not_named);
        let alone = Evidence {
            sharing: Sharing::Alone(shared()),
            ..self::shared(&["remote", "remote.drv"])
        };
        for info in [
            imported("remote", "remote.drv"),
            built("around", "around.drv"),
        ] {
            assert_eq!(alone.decide(&info, AfterMark), Decision::Publish);
        }
    }

    #[test]
    fn what_nobody_else_can_have_added_goes_and_what_was_there_before_may_be_planted() {
        let evidence = Evidence {
            others_at_work: false,
            ..shared(&["planted", "planted.drv"])
        };
        let own = imported("own", "x.drv");
        assert_eq!(evidence.decide(&own, AfterMark), Decision::Publish);
        let planted = imported("planted", "planted.drv");
        let decision = evidence.decide(&planted, BeforeMark);
        assert!(matches!(decision, Decision::Ambiguous(_)), "{decision:?}");
    }

    #[test]
    fn a_trusted_signature_vouches_and_another_does_not() {
        let (trusted, other) = (SecretKey::generate("t"), SecretKey::generate("o"));
        let (trusted, other) = (trusted.expect("random"), other.expect("random"));
        let evidence = Evidence {
            trusted_keys: vec![trusted.public()],
            ..shared(&["x"])
        };
        let signed = |key: &SecretKey| {
            let info = imported("x", "x.drv");
            let text = fingerprint(&info.path, &info.nar_hash, info.nar_size, &info.references);
            PathInfo {
                signatures: vec![key.sign(&text)],
                ..info
            }
        };
        assert_eq!(
            evidence.decide(&signed(&trusted), AfterMark),
            Decision::Publish
        );
        assert!(matches!(
            evidence.decide(&signed(&other), AfterMark),
            Decision::Ambiguous(_)
        ));
    }

    #[test]
    fn what_refers_to_a_doubtful_path_is_doubtful() {
        let evidence = shared(&["lib", "tool", "tool.drv", "lib.drv", "alone"]);
        let refers = |name: &str, to: &str| PathInfo {
            references: vec![path(to), path(name)],
            ..built(name, "tool.drv")
        };
        let infos = vec![
            imported("lib", "lib.drv"),
            refers("tool", "lib"),
            refers("alone", "given"),
        ];
        let (kept, refused) =
            evidence.divide(infos, |_| BeforeMark, |found| *found == path("given"));
        assert_eq!(kept.len(), 1);
        assert_eq!(kept[0].path, path("alone"));
        assert_eq!(
            refused[1].1,
            Decision::Ambiguous(Doubt::Refers(path("lib")))
        );
    }
}
