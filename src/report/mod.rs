//! What people and machines are told of a job: closing line, job summary, step outputs, annotations,
//! progress. Says what others found out; never finds out anything itself.

pub mod canary;
pub mod job;
pub mod outputs;
pub mod publication;
pub mod screen;
pub mod summary;
