//! The doors to the outside world: the CI runner, child processes, the host, HTTP. No door uses another; below them is
//! what several need.

pub mod untrusted_file;

pub mod host;
pub mod http;
pub mod process;
pub mod runner;

/// The end of a supervised command ends every other child of this process, too. A test that supervises one holds this, and
/// so does a test whose children must live on.
#[cfg(test)]
static CHILDREN_OF_TESTS: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
