//! The verbs: each reads its inputs, calls services, and decides how the program ends.

pub mod cache;
pub mod cache_contract;
pub mod contract;
pub mod explain;
pub mod flake_checks;
pub mod nix_job;
pub mod publish;
pub mod reference;
pub mod scan;
pub mod setup;
pub mod validate_builders;
pub mod watch_store;
