//! Where there is no inotify: no folder can be watched, which the caller hears as an error.

use std::io;
use std::path::Path;
use std::time::Duration;

/// What would be watched for.
#[derive(Clone, Copy, Debug)]
pub struct WatchFlags(());

impl WatchFlags {
    pub const CREATE: Self = Self(());
    pub const MODIFY: Self = Self(());
}

impl std::ops::BitOr for WatchFlags {
    type Output = Self;

    fn bitor(self, _: Self) -> Self {
        self
    }
}

/// One event in the folder.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// The entry of this name changed.
    Entry(&'a str),
    /// Some events are lost.
    Lost,
}

/// A watched folder.
#[derive(Debug)]
pub struct Notify(std::convert::Infallible);

impl Notify {
    /// # Errors
    /// Always.
    pub fn watch(
        _folder: &Path,
        _what: WatchFlags,
        _pause: Duration,
        _on_event: impl FnMut(Event<'_>) + Send + 'static,
    ) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
