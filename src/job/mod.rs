//! What the verbs share that run a job or a part of one (`nix-job`, `watch-store`, `flake-checks`, `publish`): which
//! cache, Nix and the cache made ready, the settings, publication while the job runs, and the report at its end.
//! Each verb decides for itself in which order these happen.

pub mod added_paths;
pub mod attach;
mod begin;
mod closure_tracker;
pub mod destination;
pub mod inputs;
mod ownership;
pub mod policy;
mod prepare;
pub mod publication;
mod report;
pub mod settings;
pub mod source;
pub mod stream;
mod watch;

pub use self::begin::{STOPPED_LIMIT, Secrets, Session, announce, judge, private_base};
pub use self::prepare::Prepared;
pub use self::report::{JobReport, set_outcome};
pub use self::watch::StoreWatch;
