//! The doors to the outside world: the CI runner, child processes, the host, HTTP. No door uses another.

pub mod host;
pub mod http;
pub mod process;
pub mod runner;
