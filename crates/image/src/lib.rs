//! The image lane: how large a runner a build needs, whether it ran out of memory, what its progress says, and which
//! caches it may read and write. Decides and reads; it starts no build.
//!
//! The groups below are layers, the lowest first. `tests/it/house/layers.rs` reads them here.

// What several of the modules below stand on.
pub mod document;

// The sizes, which several of them choose among.
pub mod size;

// Formats and rules, each by itself.
pub mod build_spec;
pub mod history;
pub mod language;
pub mod memory_verdict;
pub mod namespace;
pub mod nickel;
pub mod rawjson;

// What is decided from several of them.
pub mod directives;
pub mod sizing;
