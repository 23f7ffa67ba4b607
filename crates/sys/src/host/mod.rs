//! The machine this runs on: control groups and memory, private temporary folders, priorities, and on which
//! thread brief work is done.
//! Owns what is read and kept there; what follows from it is decided in `budget`.

pub mod inline_blocking;
pub mod memory;
pub mod notify;
pub mod peak;
pub mod priority;
pub mod private;
