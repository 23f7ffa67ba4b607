//! Reports for people and machines: closing line, job summary, step outputs, annotations, progress. Formats results
//! only; never asks a server, the store or the system for one.

pub mod canary;
pub mod job;
pub mod outputs;
pub mod publication;
pub mod screen;
pub mod summary;
