//! The register of children that this program started for itself, so that they are not taken for
//! what a command left behind.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, MutexGuard};

use tokio::process::{Child, Command};

static STARTED: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// The entry of one child; it ends with this value, which is to live as long as the child.
#[derive(Debug)]
pub struct Registered(u32);

impl Drop for Registered {
    fn drop(&mut self) {
        started().remove(&self.0);
    }
}

/// Starts a child and registers it before anybody can look for left-over processes.
///
/// # Errors
/// When it cannot be started.
pub fn spawn(command: &mut Command) -> io::Result<(Child, Registered)> {
    let mut started = started();
    let child = command.spawn()?;
    let id = child.id().unwrap_or_default();
    started.insert(id);
    Ok((child, Registered(id)))
}

/// The register, held: nobody starts a child meanwhile.
pub(super) fn started() -> MutexGuard<'static, BTreeSet<u32>> {
    STARTED
        .lock()
        .expect("nothing panics while it holds this lock")
}
