//! What happens in a folder, told by the kernel (inotify). Owns the watching thread; what an event
//! means is for whoever asked.

use std::io;
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::fs::inotify;

pub use rustix::fs::inotify::WatchFlags;

use crate::host::priority;

/// How long the thread may sleep before it looks whether it is still wanted.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// One event in the folder.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Something happened to the entry of this name.
    Entry(&'a str),
    /// So much happened that the kernel lost some of it.
    Lost,
}

/// A folder under watch. The thread ends, and is joined, when this is dropped.
#[derive(Debug)]
pub struct Notify {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Notify {
    /// Begins to watch `folder`; `tell` is called for each event, on a thread of its own.
    ///
    /// # Errors
    /// When the folder is not there or the kernel has no watches left.
    pub fn watch(folder: &Path, what: WatchFlags, tell: impl FnMut(Event<'_>) + Send + 'static) -> io::Result<Self> {
        let events = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
        inotify::add_watch(&events, folder, what)?;
        let stop = Arc::new(AtomicBool::new(false));
        let wanted = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("notify".into()).spawn(move || {
            priority::yield_to_others();
            follow(&events, &wanted, tell);
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Notify {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It panics only if `tell` does, and then there is nothing more to tell.
            let _ = thread.join();
        }
    }
}

fn follow(events: &OwnedFd, stop: &AtomicBool, mut tell: impl FnMut(Event<'_>)) {
    let mut buffer = [MaybeUninit::uninit(); 16 * 1024];
    while !stop.load(Ordering::Relaxed) {
        // An interrupted or fruitless wait just looks again.
        let _ = poll(&mut [PollFd::new(events, PollFlags::IN)], Some(&LOOK));
        let mut reader = inotify::Reader::new(events, &mut buffer);
        while let Ok(event) = reader.next() {
            if event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW) {
                tell(Event::Lost);
            } else if let Some(name) = event.file_name().and_then(|name| name.to_str().ok()) {
                tell(Event::Entry(name));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_new_entry_is_told() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let (send, receive) = mpsc::channel();
        let notify = Notify::watch(folder.path(), WatchFlags::CREATE, move |event| {
            if let Event::Entry(name) = event {
                send.send(name.to_owned()).expect("the test listens");
            }
        })
        .expect("watched");
        std::fs::write(folder.path().join("4242"), "").expect("written");
        assert_eq!(receive.recv_timeout(Duration::from_secs(10)).expect("told"), "4242");
        drop(notify);
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_error() {
        assert!(Notify::watch(Path::new("/nonexistent"), WatchFlags::CREATE, |_| ()).is_err());
    }
}
