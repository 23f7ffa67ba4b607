//! Who else can have written the store that this job works on: jobs of another repository or of lower trust, as far as
//! the runner, the registry of this host's jobs and the input `shared-host` show.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use clap::ValueEnum;

use super::inputs::HostInputs;
use flywheel_core::progress::Sink;
use flywheel_nix::ping::{Ping, ping};
use flywheel_nix::settings::Settings;
use flywheel_nix::store_location::{default_state, locate};
use flywheel_nix::store_writers::other_writers;
use flywheel_nix::tool::Nix;
use flywheel_sys::host::home::is_private_home;
use flywheel_sys::host::job_registry::{JobRecord, JobRegistry, OtherJob, jobs_seen};
use flywheel_sys::runner::context;
use flywheel_sys::runner::env::Env;

/// How long Nix may take to say which store it opens.
const PING_LIMIT: Duration = Duration::from_secs(10);

/// The input `shared-host`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum SharedHost {
    /// As the runner and the jobs that were seen on this host show.
    #[default]
    Auto,
    /// Jobs of other repositories, or of lower trust, work on this host's store.
    True,
    /// Every job on this host may publish what is in its store.
    False,
}

/// Whether a path that no evidence gives to a job can be another job's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// All jobs that can have written the store are of this repository, and may publish. Holds the reason.
    Alone(String),
    /// Another repository's job, or one that may not publish, can have written the store. Holds the reason.
    Shared(String),
}

impl Sharing {
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self, Self::Shared(_))
    }

    /// Judges by the input, the kind of runner, and the jobs of the same store; `unread` is why these are not known.
    fn judge<'a>(
        own: &JobRecord,
        shared: SharedHost,
        is_hosted: bool,
        mut others: impl Iterator<Item = &'a JobRecord>,
        unread: Option<String>,
    ) -> Self {
        match shared {
            SharedHost::False => Self::Alone("`shared-host: false`".into()),
            SharedHost::True => Self::Shared("`shared-host: true`".into()),
            SharedHost::Auto if is_hosted => {
                Self::Alone("a GitHub-hosted runner has one job".into())
            }
            SharedHost::Auto => match others.find_map(|other| foreign(own, other)).or(unread) {
                Some(why) => Self::Shared(why),
                None => Self::Alone(
                    "no job of another repository or of lower trust was seen on this host".into(),
                ),
            },
        }
    }
}

impl std::fmt::Display for Sharing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Alone(why) => write!(f, "this repository's alone ({why})"),
            Self::Shared(why) => write!(f, "shared with other jobs ({why})"),
        }
    }
}

/// What was found of other jobs at one moment.
#[derive(Debug)]
pub(crate) struct Neighbours {
    pub(crate) sharing: Sharing,
    /// Whether jobs may be at work that could not be looked for.
    pub(crate) may_be_more: bool,
    /// The jobs that live, or have ended since this one began.
    beside: Vec<OtherJob>,
}

impl Neighbours {
    /// Whether another job has been at work while this one was, or may have been unseen.
    pub(crate) fn are_beside(&self) -> bool {
        self.may_be_more || !self.beside.is_empty()
    }

    /// The base names of the store paths that jobs beside this one have named.
    pub(crate) fn claims(&self) -> BTreeSet<String> {
        self.beside.iter().flat_map(OtherJob::claims).collect()
    }
}

/// The host and the store of one job.
#[derive(Debug)]
pub(crate) struct StoreHost {
    own: JobRecord,
    shared: SharedHost,
    /// Whether the runner is a machine for one job.
    is_hosted: bool,
    registry: Registry,
}

/// Why a registry in a home that was made up shows no other job, and what helps.
const NOTHING_LASTS: &str = "no folder of this user's lasts from job to job here, so that other jobs are not known; \
                             the input `journal` can name one, and `shared-host: false` says that there are none";

#[derive(Debug)]
enum Registry {
    /// `journal: off`, or no folder for it.
    Off,
    Entered(JobRegistry),
    /// It cannot be used, for this reason.
    Unusable(String),
}

impl StoreHost {
    /// Enters this job into the registry in `folder`, and finds out who else works on the store.
    pub(crate) fn enter(
        folder: Option<&Path>,
        own: JobRecord,
        shared: SharedHost,
        is_hosted: bool,
        sink: &Sink,
    ) -> Self {
        let registry = folder.map_or(Registry::Off, |folder| {
            if is_private_home(folder) {
                // Without a registry, nothing is lost where the host is known to have no other job.
                if shared == SharedHost::Auto && !is_hosted {
                    sink.degraded("journal", NOTHING_LASTS);
                }
                return Registry::Unusable(NOTHING_LASTS.to_owned());
            }
            match JobRegistry::enter(folder, &own) {
                Ok(registry) => Registry::Entered(registry),
                Err(error) => {
                    let text = format!("`{}` cannot be used: {error}", folder.display());
                    sink.degraded("journal", format!("the registry of jobs in {text}"));
                    Registry::Unusable(text)
                }
            }
        });
        Self {
            own,
            shared,
            is_hosted,
            registry,
        }
    }

    /// Records paths that a process of this job has named, for the jobs beside it.
    pub(crate) fn claim<'a>(&self, names: impl IntoIterator<Item = &'a str>) {
        if let Registry::Entered(registry) = &self.registry {
            registry.claim(names);
        }
    }

    /// Reads the registry. To be called after the paths that are judged were found valid: a job enters the registry
    /// before it touches the store.
    pub(crate) fn neighbours(&self) -> Neighbours {
        let others = match &self.registry {
            Registry::Entered(registry) => registry.others().map_err(|error| error.to_string()),
            Registry::Off => Ok(Vec::new()),
            Registry::Unusable(problem) => Err(problem.clone()),
        };
        let (others, unread) = match others {
            Ok(others) => (others, None),
            Err(problem) => (Vec::new(), Some(problem)),
        };
        let mut here: Vec<OtherJob> = others;
        here.retain(|job| job.record.store == self.own.store);
        let records = here.iter().map(|job| &job.record);
        let is_unread = unread.is_some();
        let sharing = Sharing::judge(&self.own, self.shared, self.is_hosted, records, unread);
        here.retain(|job| job.is_beside);
        Neighbours {
            // The input or the kind of runner may say that there are none, whatever the registry does.
            may_be_more: is_unread && sharing.is_shared(),
            sharing,
            beside: here,
        }
    }

    /// Whether every job is known that can be at work on this host.
    pub(crate) fn knows_all_jobs(&self) -> bool {
        self.is_hosted
            || self.shared == SharedHost::False
            || matches!(self.registry, Registry::Entered(_))
    }

    /// Whether jobs may be at work that no registry shows.
    pub(crate) fn is_declared_shared(&self) -> bool {
        self.shared == SharedHost::True
    }
}

/// Why what this other job leaves in the store must not be published unseen by the own one, if that is so.
fn foreign(own: &JobRecord, other: &JobRecord) -> Option<String> {
    let repository = other.repository.as_deref().unwrap_or("no repository");
    if other.repository != own.repository {
        Some(format!("a job of {repository} worked on this store"))
    } else if own.trusted && !other.trusted {
        Some("a job that may not publish worked on this store".into())
    } else {
        None
    }
}

/// What is known, without Nix, of the host of a job that would begin now: who else works on it, in one line.
pub(crate) fn survey_host(inputs: &HostInputs, trusted: bool, env: &Env) -> String {
    sharing_seen(inputs, trusted, None, env).to_string()
}

/// What can be said of the store of a job that would begin now, and of who else can write it, in one line.
pub(crate) async fn survey(nix: &Nix, inputs: &HostInputs, trusted: bool, env: &Env) -> String {
    let (opened, settings) = tokio::join!(ping(nix, PING_LIMIT), Settings::read(nix));
    let (opened, settings) = match (opened, settings) {
        (Ok(Ping::Open(opened)), Ok(settings)) => (opened, settings),
        (Ok(Ping::Failed(failure)), _) => return format!("it does not open: {}", failure.text()),
        (Err(error), _) | (_, Err(error)) => return format!("it cannot be read: {error}"),
    };
    let setting = settings.text("store").unwrap_or_default();
    let location = match locate(nix, &opened.url, &setting) {
        Ok(location) => location,
        Err(why) => return format!("not watched: {why}"),
    };
    let state = location.state.unwrap_or_else(|| default_state(nix));
    let sharing = sharing_seen(inputs, trusted, Some(&state), env);
    let user = env.get("USER");
    let writers = other_writers(&location.folder, &opened, &settings, user);
    format!("{sharing}{}", written_by(writers.as_deref()))
}

/// Who works on this host's stores, or on the one with this state folder. Adds nothing to the registry.
fn sharing_seen(inputs: &HostInputs, trusted: bool, state: Option<&Path>, env: &Env) -> Sharing {
    let own = JobRecord {
        repository: context::repository(env),
        trusted,
        store: state.map_or_else(String::new, |state| state.display().to_string()),
    };
    let seen = match inputs.registry(env) {
        Some(folder) if is_private_home(&folder) => Err(NOTHING_LASTS.to_owned()),
        Some(folder) => jobs_seen(&folder)
            .map_err(|error| format!("the registry of jobs cannot be read: {error}")),
        None => Ok(Vec::new()),
    };
    let (mut seen, unread) = match seen {
        Ok(seen) => (seen, None),
        Err(problem) => (Vec::new(), Some(problem)),
    };
    seen.retain(|job| state.is_none() || job.store == own.store);
    let is_hosted = context::is_hosted_runner(env);
    Sharing::judge(&own, inputs.shared_host, is_hosted, seen.iter(), unread)
}

/// What a line about a store adds where others can forge what is in it.
pub(super) fn written_by(writers: Option<&str>) -> String {
    writers.map_or_else(String::new, |writers| {
        format!("; {writers} can write what they like into it, against which no rule of this job's helps")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(repository: &str, trusted: bool, store: &str) -> JobRecord {
        JobRecord {
            repository: Some(repository.into()),
            trusted,
            store: store.into(),
        }
    }

    fn enter(folder: &Path, record: JobRecord, shared: SharedHost, hosted: bool) -> StoreHost {
        StoreHost::enter(Some(folder), record, shared, hosted, &Sink::new(|_| ()))
    }

    fn is_shared(other: JobRecord, shared: SharedHost, hosted: bool) -> bool {
        let folder = tempfile::tempdir().expect("temporary folder");
        let folder = folder.path().join("jobs");
        drop(enter(&folder, other, SharedHost::Auto, false));
        let own = enter(&folder, record("o/own", true, "/s"), shared, hosted);
        own.neighbours().sharing.is_shared()
    }

    #[test]
    fn a_store_is_shared_with_those_who_may_not_publish_here() {
        let other = |repository, trusted| record(repository, trusted, "/s");
        let auto = |job| is_shared(job, SharedHost::Auto, false);
        assert!(!auto(other("o/own", true)));
        assert!(auto(other("o/own", false)), "a pull request");
        assert!(auto(other("o/other", true)));
        assert!(
            !auto(record("o/other", true, "/elsewhere")),
            "another store"
        );
        assert!(!is_shared(other("o/other", true), SharedHost::Auto, true));
        assert!(!is_shared(
            other("o/other", false),
            SharedHost::False,
            false
        ));
        assert!(is_shared(other("o/own", true), SharedHost::True, true));
    }

    #[test]
    fn what_cannot_be_read_counts_as_shared() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = folder.path().join("file");
        std::fs::write(&file, "").expect("written");
        let own = enter(&file, record("o/own", true, "/s"), SharedHost::Auto, false);
        assert!(own.neighbours().sharing.is_shared());
    }

    #[test]
    fn where_no_folder_lasts_other_jobs_are_not_known() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let mine = format!("flywheel-{}/home/.local/state", rustix::process::geteuid());
        let passing = folder.path().join(mine).join("flywheel/journal/jobs");
        let enter = |folder: &Path, shared, hosted| {
            enter(folder, record("o/own", true, "/s"), shared, hosted)
        };
        let own = enter(&passing, SharedHost::Auto, false);
        let found = own.neighbours();
        assert!(found.sharing.is_shared() && found.are_beside() && !own.knows_all_jobs());
        for (shared, hosted) in [(SharedHost::False, false), (SharedHost::Auto, true)] {
            let own = enter(&passing, shared, hosted);
            let found = own.neighbours();
            assert!(!found.sharing.is_shared() && !found.are_beside() && own.knows_all_jobs());
        }
        let own = enter(&folder.path().join("jobs"), SharedHost::Auto, false);
        assert!(!own.neighbours().sharing.is_shared() && own.knows_all_jobs());
    }

    #[test]
    fn what_a_job_beside_this_one_names_is_its_claim() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let folder = folder.path().join("jobs");
        let own = enter(
            &folder,
            record("o/own", true, "/s"),
            SharedHost::Auto,
            false,
        );
        assert!(!own.neighbours().are_beside());
        let other = enter(
            &folder,
            record("o/own", true, "/s"),
            SharedHost::Auto,
            false,
        );
        other.claim(["x-theirs"]);
        let found = own.neighbours();
        assert!(found.are_beside() && !found.sharing.is_shared());
        assert!(found.claims().contains("x-theirs"));
    }
}
