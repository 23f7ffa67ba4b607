//! Ground and rules: pure decisions over plain values. No async runtime, no file system, no network, no
//! environment: a rule can be tested with plain values, because nothing below it waits.
//!
//! The groups below are layers, the lowest first. `tests/it/house.rs` reads them here.

// The ground. Its modules may use each other.
pub mod exit;
pub mod location;
pub mod markdown;
pub mod progress;
pub mod retry;
pub mod secret;
pub mod text;

// The rules, each by itself.
pub mod budget;
pub mod contract;
pub mod disk;
pub mod policy;
pub mod sizing;
pub mod trust;
