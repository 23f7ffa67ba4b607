//! Lets this process and all that it starts see a private folder at a place of the root folder where there is none, or
//! where this user may not write: in a user namespace and a mount namespace, which end with the last process in them.
//! Everything else stays where it is, and the user who he is.

#[cfg(target_os = "linux")]
mod linux;
mod obstacle;

use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;

use thiserror::Error;

#[cfg(target_os = "linux")]
use linux::make;
pub use obstacle::{Limits, Obstacle};

/// What this process has entered.
static ENTERED: OnceLock<View> = OnceLock::new();

/// A folder that is to be seen at another place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    pub folder: PathBuf,
    /// Where it is seen: an entry of the root folder, which need not exist.
    pub seen_at: PathBuf,
    /// An empty folder, on which a new root folder is put together where `seen_at` does not exist.
    pub scratch: PathBuf,
}

/// How far it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The namespaces were not made. This process is as it was.
    Create,
    /// This user has no name in the new namespace; nothing but the end of this process is left.
    MapUser,
    /// The folders could not be put together; nothing but the end of this process is left.
    Mount,
}

/// The system did not let this process enter.
#[derive(Debug, Error)]
#[error("{action} failed")]
pub struct Refused {
    pub step: Step,
    /// What was tried, such as "`pivot_root`".
    action: String,
    #[source]
    pub(crate) source: io::Error,
}

impl Refused {
    fn new(step: Step, action: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self {
            step,
            action: action.into(),
            source: source.into(),
        }
    }
}

/// The view that this process has entered, if it has.
pub fn entered() -> Option<&'static View> {
    ENTERED.get()
}

/// Enters namespaces in which `view.folder` is seen at `view.seen_at`. Gives the entries of the root folder that could not be
/// taken along.
///
/// To be called before any thread is started, since a process with threads cannot change its user namespace, and before
/// core dumps are forbidden, since the user's own files in `/proc` then belong to root.
///
/// # Errors
/// When the system refuses it. `Step` has what is left of this process then.
pub fn enter(view: &View) -> Result<Vec<PathBuf>, Refused> {
    let left_out = make(view)?;
    // It is set once: a second call finds the folder where it is wanted, and has no reason to be made.
    let _ = ENTERED.set(view.clone());
    Ok(left_out)
}

/// Linux alone has namespaces.
#[cfg(not(target_os = "linux"))]
fn make(_view: &View) -> Result<Vec<PathBuf>, Refused> {
    let refusal = io::Error::from(io::ErrorKind::Unsupported);
    Err(Refused::new(Step::Create, "making the namespaces", refusal))
}
