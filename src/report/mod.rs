//! Reports for people and machines: closing line, job summary, step outputs, annotations, progress. Formats results
//! only; never asks a server, the store or the system for one.

pub(crate) mod canary;
pub(crate) mod disk;
pub(crate) mod job;
pub(crate) mod outputs;
pub(crate) mod publication;
pub(crate) mod screen;
pub(crate) mod summary;
