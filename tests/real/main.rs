//! The real suite: real Nix, real act with our real actions, real servers on loopback.
//! Nothing is skipped: a missing tool fails the test, with a message about how to get it.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking"
)]

#[path = "../it/world/bazel.rs"]
mod bazel;
#[path = "../it/world/faults.rs"]
mod faults;
mod world;

mod actions;
mod adversary;
mod arm64;
mod cache_serve;
mod crates;
mod destination;
mod disk;
mod dist;
mod docs;
mod elsewhere;
mod environment;
mod flake_checks;
mod greedy;
mod harness;
mod init;
mod install;
mod journal;
mod lint;
mod nix_floor;
mod nix_job;
mod obedience;
mod policy;
mod publish;
mod report;
mod rootless;
mod sharing;
mod slow_cache;
mod stream;
mod validate_builders;
mod watch_store;
