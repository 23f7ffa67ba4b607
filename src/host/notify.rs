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
    /// Something happened to some entries: it was gathered, or so much that the kernel lost some of it.
    Some,
}

/// When to tell. Who writes all the time would pay for each event, and so would who listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Of each event, at once.
    Each,
    /// At once; then nothing is told for this long, and nothing of this time.
    ThenRest(Duration),
    /// This long after the first event, once, of all that came until then.
    Gathered(Duration),
}

/// A folder under watch. The thread ends, and is joined, when this is dropped.
#[derive(Debug)]
pub struct Notify {
    /// Readable from the moment when the thread is to end.
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Notify {
    /// Begins to watch `folder`; `tell` is called on a thread of its own.
    ///
    /// # Errors
    /// When the folder is not there or the kernel has no watches left.
    pub fn watch(
        folder: &Path,
        what: WatchFlags,
        pace: Pace,
        tell: impl FnMut(Event<'_>) + Send + 'static,
    ) -> io::Result<Self> {
        let events = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
        let watched =
            Watched { number: inotify::add_watch(&events, folder, what)?, events, folder: folder.into(), what };
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("notify".into()).spawn(move || {
            // At the usual priority: what an event tells of, a short process say, is soon gone.
            follow(watched, &stopped, pace, tell);
        })?;
        Ok(Self { stop, thread: Some(thread) })
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
    fn rest(&mut self, rest: Duration, stop: &OwnedFd, buffer: &mut [MaybeUninit<u8>]) -> io::Result<()> {
        inotify::remove_watch(&self.events, self.number)?;
        // One that is too long for the kernel has no end.
        let rest = Timespec::try_from(rest).ok();
        let _ = poll(&mut [PollFd::new(stop, PollFlags::IN)], rest.as_ref());
        let mut reader = inotify::Reader::new(&self.events, buffer);
        while reader.next().is_ok() {}
        self.number = inotify::add_watch(&self.events, &self.folder, self.what)?;
        Ok(())
    }
}

fn follow(mut watched: Watched, stop: &OwnedFd, pace: Pace, mut tell: impl FnMut(Event<'_>)) {
    let mut buffer = [MaybeUninit::uninit(); 16 * 1024];
    loop {
        let mut waiting = [PollFd::new(&watched.events, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        // An interrupted wait just looks again.
        let _ = poll(&mut waiting, None);
        if !waiting[1].revents().is_empty() {
            return;
        }
        if waiting[0].revents().is_empty() {
            continue;
        }
        let rested = match pace {
            Pace::Each => {
                tell_each(&watched, &mut buffer, &mut tell);
                Ok(())
            }
            Pace::ThenRest(rest) => {
                tell_each(&watched, &mut buffer, &mut tell);
                watched.rest(rest, stop, &mut buffer)
            }
            Pace::Gathered(rest) => {
                let rested = watched.rest(rest, stop, &mut buffer);
                tell(Event::Some);
                rested
            }
        };
        // A folder that is gone has nothing more to tell.
        if rested.is_err() {
            return;
        }
    }
}

fn tell_each(watched: &Watched, buffer: &mut [MaybeUninit<u8>], tell: &mut impl FnMut(Event<'_>)) {
    let mut reader = inotify::Reader::new(&watched.events, buffer);
    while let Ok(event) = reader.next() {
        if event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW) {
            tell(Event::Some);
        } else if let Some(name) = event.file_name().and_then(|name| name.to_str().ok()) {
            tell(Event::Entry(name));
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
        let notify = Notify::watch(folder.path(), WatchFlags::CREATE, Pace::Each, move |event| {
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
    fn it_rests_after_it_has_told_and_ends_all_the_same() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let (send, receive) = mpsc::channel();
        let pace = Pace::ThenRest(Duration::from_secs(3600));
        let notify = Notify::watch(folder.path(), WatchFlags::CREATE, pace, move |_| send.send(()).expect("heard"));
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
    fn what_is_gathered_is_told_after_the_last_of_it() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let (file, (send, receive)) = (folder.path().join("file"), mpsc::channel());
        let read = file.clone();
        let pace = Pace::Gathered(Duration::from_millis(50));
        let notify = Notify::watch(folder.path(), WatchFlags::MODIFY, pace, move |event| {
            assert_eq!(event, Event::Some);
            send.send(std::fs::read_to_string(&read).expect("there")).expect("the test listens");
        });
        let (notify, text) = (notify.expect("watched"), "x".repeat(100));
        for end in 1..=text.len() {
            std::fs::write(&file, &text[..end]).expect("written");
        }
        let told = std::iter::repeat_with(|| receive.recv_timeout(Duration::from_secs(10)).expect("told"));
        let times = told.take_while(|seen| *seen != text).count();
        assert!(times < text.len(), "each was told");
        drop(notify);
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_error() {
        assert!(Notify::watch(Path::new("/nonexistent"), WatchFlags::CREATE, Pace::Each, |_| ()).is_err());
    }
}
