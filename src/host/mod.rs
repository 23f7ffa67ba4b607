//! The machine this runs on: control groups and memory, private temporary folders, priorities.
//! Owns what is read and kept there; what follows from it is decided in `budget`.

pub mod memory;
pub mod notify;
pub mod peak;
pub mod priority;
pub mod private;
