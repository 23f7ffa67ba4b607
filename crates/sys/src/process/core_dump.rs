//! Keeps what this program has in memory, tokens among it, out of core dumps and away from other processes of its user.
//! Its children get the limit back that it was started with.

use std::sync::{Mutex, OnceLock};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The limit of this process at its start; unset where dumps were not forbidden.
static INHERITED: OnceLock<Rlimit> = OnceLock::new();
/// Held while the limit is the inherited one.
static STARTING: Mutex<()> = Mutex::new(());

/// Whether a CI looks into this process to know whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It ends with its step. Other processes of its user can neither trace it nor read its environment and memory.
    Step,
    /// It may outlive its step. At the job's end GitHub's runner finds such a process by its environment, which
    /// `PR_SET_DUMPABLE` would hide from a runner that is not root.
    Job,
}

/// Forbids core dumps of this process.
pub fn forbid(reach: Reach) {
    let inherited = *INHERITED.get_or_init(|| getrlimit(Resource::Core));
    // It fails only where a sandbox forbids it; the job goes on without this protection.
    let _ = setrlimit(Resource::Core, without_dumps(inherited));
    if reach == Reach::Step {
        forbid_tracing();
    }
}

#[cfg(target_os = "linux")]
fn forbid_tracing() {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
}

/// Only Linux has it.
#[cfg(not(target_os = "linux"))]
fn forbid_tracing() {}

/// The soft limit alone is lowered, so that it can be raised again.
fn without_dumps(inherited: Rlimit) -> Rlimit {
    Rlimit {
        current: Some(0),
        ..inherited
    }
}

/// Runs `start`, which starts a child, with the limit that this process was started with.
pub(super) fn with_inherited_limit<T>(start: impl FnOnce() -> T) -> T {
    let Some(inherited) = INHERITED.get() else {
        return start();
    };
    let _held = STARTING
        .lock()
        .expect("nothing panics while it holds this lock");
    let _ = setrlimit(Resource::Core, *inherited);
    let started = start();
    let _ = setrlimit(Resource::Core, without_dumps(*inherited));
    started
}
