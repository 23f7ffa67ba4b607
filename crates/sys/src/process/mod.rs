//! The child processes of this program: starting, supervising and stopping them. No other module starts any.

pub mod capture;
pub mod companion;
pub mod core_dump;
pub mod detached;
pub mod lines;
pub mod namespace;
mod orphans;
pub mod own;
pub mod piped;
pub mod service;
pub mod signals;
pub mod supervise;
