//! The client's side of binary caches: probing, publishing, verifying. It never decides whether to publish.

pub mod attic;
pub mod attic_cli;
mod batch;
pub mod bazel;
pub mod copy;
pub mod destination;
pub mod endpoint;
pub mod inspect;
pub mod journal;
pub mod probe;
pub mod publish;
pub mod read_proxy;
pub mod verify;

#[cfg(test)]
mod fake;
