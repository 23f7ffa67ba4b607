//! The fast suite: the real binary through its front door, in a cleared environment, with the world
//! faked at its edges only. No network but loopback, no Nix. What needs those is in `tests/real`.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod world;

mod cache_contract;
mod cache_serve;
mod check_runs;
mod cli;
mod completions;
mod contract;
mod daemon_proxy;
mod definitions;
mod docs;
mod explain;
mod flake_checks;
mod house;
mod image;
mod init;
mod launcher;
mod man;
mod matrix;
mod namespace_trial;
mod nix_job;
mod pictures;
mod publish;
mod reference;
mod release;
mod scan;
mod scripts;
mod setup;
mod validate_builders;
mod watch_store;
