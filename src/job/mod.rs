//! What the verbs share that run a job or a part of one (`nix-job`, `watch-store`, `flake-checks`, `publish`): which
//! cache, Nix and the cache made ready, the settings, publication while the job runs, and the report at its end.
//! Each verb decides for itself in which order these happen.

pub(crate) mod added_paths;
pub(crate) mod attach;
mod backend;
mod begin;
mod closure_tracker;
mod daemon_names;
pub(crate) mod destination;
pub(crate) mod disk;
pub(crate) mod failed_builds;
pub(crate) mod inputs;
pub(crate) mod lacking;
mod leftovers;
mod not_watched;
mod ownership;
pub(crate) mod policy;
mod prepare;
pub(crate) mod publication;
mod reading;
mod reclaim;
mod report;
pub(crate) mod rootless;
pub(crate) mod settings;
pub(crate) mod source;
pub(crate) mod store_host;
pub(crate) mod stream;
mod watch;

pub(crate) use self::begin::{STOPPED_LIMIT, Secrets, Session, announce, judge, private_base};
pub(crate) use self::prepare::Prepared;
pub(crate) use self::report::{JobReport, set_outcome};
pub(crate) use self::watch::StoreWatch;
