//! What happens in a folder, told by the kernel (inotify). Owns the watching thread; what an event
//! means is for whoever asked.

use std::io;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::fs::inotify;

pub use rustix::fs::inotify::WatchFlags;

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
    /// Readable from the moment when the thread is to end.
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Notify {
    /// Begins to watch `folder`; `tell` is called for each event, on a thread of its own. After each burst of events
    /// it rests for `pace`, and tells nothing of that time: who writes all the time would pay for each event.
    ///
    /// # Errors
    /// When the folder is not there or the kernel has no watches left.
    pub fn watch(
        folder: &Path,
        what: WatchFlags,
        pace: Duration,
        tell: impl FnMut(Event<'_>) + Send + 'static,
    ) -> io::Result<Self> {
        let events = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
        let watched = Watched {
            number: inotify::add_watch(&events, folder, what)?,
            events,
            folder: folder.into(),
            what,
        };
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("notify".into())
            .spawn(move || {
                // At the usual priority: what an event tells of, a short process say, is soon gone.
                follow(watched, &stopped, pace, tell);
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Notify {
    fn drop(&mut self) {
        // It fails only where the counter is full, and then the thread knows.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // It panics only if `tell` does, and then there is nothing more to tell.
            let _ = thread.join();
        }
    }
}

/// What the kernel has been asked to tell.
struct Watched {
    events: OwnedFd,
    number: i32,
    folder: PathBuf,
    what: WatchFlags,
}

impl Watched {
    /// Asks it to tell nothing until the rest is over, and to forget what it has not told. `stop` cuts the rest short.
    fn rest(
        &mut self,
        rest: &Timespec,
        stop: &OwnedFd,
        buffer: &mut [MaybeUninit<u8>],
    ) -> io::Result<()> {
        inotify::remove_watch(&self.events, self.number)?;
        let _ = poll(&mut [PollFd::new(stop, PollFlags::IN)], Some(rest));
        let mut reader = inotify::Reader::new(&self.events, buffer);
        while reader.next().is_ok() {}
        self.number = inotify::add_watch(&self.events, &self.folder, self.what)?;
        Ok(())
    }
}

fn follow(mut watched: Watched, stop: &OwnedFd, pace: Duration, mut tell: impl FnMut(Event<'_>)) {
    let rest = Timespec::try_from(pace).ok().filter(|_| !pace.is_zero());
    let mut buffer = [MaybeUninit::uninit(); 16 * 1024];
    loop {
        let mut waiting = [
            PollFd::new(&watched.events, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        // An interrupted wait just looks again.
        let _ = poll(&mut waiting, None);
        if !waiting[1].revents().is_empty() {
            return;
        }
        let mut reader = inotify::Reader::new(&watched.events, &mut buffer);
        while let Ok(event) = reader.next() {
            if event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW) {
                tell(Event::Lost);
            } else if let Some(name) = event.file_name().and_then(|name| name.to_str().ok()) {
                tell(Event::Entry(name));
            }
        }
        // A folder that is gone has nothing more to tell.
        if let Some(rest) = &rest
            && watched.rest(rest, stop, &mut buffer).is_err()
        {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_new_entry_is_told() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let (send, receive) = mpsc::channel();
        let notify = Notify::watch(
            folder.path(),
            WatchFlags::CREATE,
            Duration::ZERO,
            move |event| {
                if let Event::Entry(name) = event {
                    send.send(name.to_owned()).expect("the test listens");
                }
            },
        )
        .expect("watched");
        std::fs::write(folder.path().join("4242"), "").expect("written");
        assert_eq!(
            receive.recv_timeout(Duration::from_secs(10)).expect("told"),
            "4242"
        );
        drop(notify);
    }

    #[test]
    fn it_rests_after_it_has_told_and_ends_all_the_same() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let (send, receive) = mpsc::channel();
        let pace = Duration::from_secs(3600);
        let notify = Notify::watch(folder.path(), WatchFlags::CREATE, pace, move |_| {
            send.send(()).expect("heard");
        });
        let notify = notify.expect("watched");
        std::fs::write(folder.path().join("first"), "").expect("written");
        receive.recv_timeout(Duration::from_secs(10)).expect("told");
        // What comes while a burst is being told belongs to it.
        let rests = (0..100).any(|number| {
            std::fs::write(folder.path().join(number.to_string()), "").expect("written");
            receive.recv_timeout(Duration::from_millis(100)) == Err(mpsc::RecvTimeoutError::Timeout)
        });
        assert!(rests, "it told of a hundred more");
        drop(notify);
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_error() {
        assert!(
            Notify::watch(
                Path::new("/nonexistent"),
                WatchFlags::CREATE,
                Duration::ZERO,
                |_| ()
            )
            .is_err()
        );
    }
}
