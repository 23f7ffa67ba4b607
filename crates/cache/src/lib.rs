//! The binary cache from both sides: the client that publishes and verifies, and the embedded server. Neither uses
//! the other: they meet over HTTP alone.

pub mod client;
pub mod server;
