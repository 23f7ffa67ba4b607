//! Flywheel: Nix CI for GitHub workflows, as a library behind one thin binary.
//!
//! Modules stand on floors and import only downwards; `tests/it/house.rs` holds them to it and
//! `ARCHITECTURE.md` draws the map.

// Floor 5: the front door.
pub mod cli;
pub mod command;
pub mod job;

// Floor 4: services.
pub mod cache;
pub mod cache_server;
pub mod report;

// Floor 3: everything that knows Nix.
pub mod nix;

// Floor 2: doors to the outside world.
pub mod github;
pub mod host;
pub mod process;
pub mod runner;

// Floor 1: rules, pure decisions.
pub mod budget;
pub mod contract;
pub mod policy;
pub mod sizing;
pub mod trust;

// Floor 0: ground.
pub mod exit;
pub mod http;
pub mod location;
pub mod progress;
pub mod retry;
pub mod secret;
pub mod text;
