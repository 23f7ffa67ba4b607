//! The verbs: each reads its inputs, calls services, and decides how the program ends.

pub(crate) mod cache;
pub(crate) mod cache_contract;
pub(crate) mod completions;
pub(crate) mod contract;
pub(crate) mod daemon_proxy;
pub(crate) mod explain;
pub(crate) mod flake_checks;
pub(crate) mod image;
pub(crate) mod init;
pub(crate) mod man;
pub(crate) mod namespace_trial;
pub(crate) mod nix_job;
pub(crate) mod publish;
pub(crate) mod reference;
pub(crate) mod scan;
pub(crate) mod setup;
pub(crate) mod validate_builders;
pub(crate) mod watch_store;
