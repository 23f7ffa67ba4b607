//! The verbs: each reads its inputs, calls services, and decides how the program ends.

pub mod cache;
pub mod cache_contract;
pub mod contract;
pub mod explain;
pub mod flake_checks;
pub mod inputs;
pub mod job;
pub mod nix_job;
pub mod publish;
pub mod scan;
pub mod setup;
mod units;
pub mod value;
pub mod watch_store;

use crate::exit::Explain;

/// How a verb fails: any error that can explain itself.
pub type Failure = Box<dyn Explain>;

impl<E: Explain> From<E> for Failure {
    fn from(error: E) -> Self {
        Box::new(error)
    }
}
pub mod validate_builders;
