//! The register of children that this program started for itself, so that they are not mistaken for processes that the
//! job's command left behind.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, MutexGuard};

use tokio::process::{Child, Command};

use crate::process::core_dump;

static STARTED: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// One child's entry in the register. Dropping it removes the entry, so it has to live as long as the child.
#[derive(Debug)]
pub(crate) struct Registered(u32);

impl Drop for Registered {
    fn drop(&mut self) {
        started().remove(&self.0);
    }
}

/// Starts a child and registers it.
///
/// # Errors
/// When it cannot be started.
pub(crate) fn spawn(command: &mut Command) -> io::Result<(Child, Registered)> {
    // Locked before the child exists: otherwise a search for left-over processes could find it unregistered.
    let mut started = started();
    let child = core_dump::with_inherited_limit(|| command.spawn())?;
    let id = child.id().unwrap_or_default();
    started.insert(id);
    Ok((child, Registered(id)))
}

/// The register, locked: no child can be started while the guard lives.
pub(super) fn started() -> MutexGuard<'static, BTreeSet<u32>> {
    STARTED
        .lock()
        .expect("nothing panics while it holds this lock")
}
