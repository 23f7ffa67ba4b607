//! Watches a folder by inotify. It owns the watching thread; the caller interprets the events.

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
    /// The entry of this name changed.
    Entry(&'a str),
    /// The kernel's queue overflowed, and some events are lost.
    Lost,
}

/// A watched folder. When this is dropped, the thread is stopped and joined.
#[derive(Debug)]
pub struct Notify {
    /// An eventfd that becomes readable when the thread must end.
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Notify {
    /// Begins to watch `folder`; `on_event` is called for each event, on a thread of its own. After each burst of
    /// events the watch is removed for `pause`, and what happens in that time is not reported: a process that writes
    /// all the time would pay for each event.
    ///
    /// # Errors
    /// When the folder does not exist or the kernel has no watches left.
    pub fn watch(
        folder: &Path,
        what: WatchFlags,
        pause: Duration,
        on_event: impl FnMut(Event<'_>) + Send + 'static,
    ) -> io::Result<Self> {
        // Non-blocking, so that reading ends when the queue is empty.
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
                // At normal priority: the subject of an event, such as a short-lived process, may soon be gone.
                follow(watched, &stopped, pause, on_event);
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Notify {
    fn drop(&mut self) {
        // The write fails only when the counter is full, and then the thread has been stopped already.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // The thread panics only if `on_event` does, and then no more events can be handled.
            let _ = thread.join();
        }
    }
}

/// An inotify instance and its one watch.
struct Watched {
    events: OwnedFd,
    number: i32,
    folder: PathBuf,
    what: WatchFlags,
}

impl Watched {
    /// Removes the watch for `pause`, and discards queued events. `stop` cuts the pause short.
    fn pause(
        &mut self,
        pause: &Timespec,
        stop: &OwnedFd,
        buffer: &mut [MaybeUninit<u8>],
    ) -> io::Result<()> {
        inotify::remove_watch(&self.events, self.number)?;
        let _ = poll(&mut [PollFd::new(stop, PollFlags::IN)], Some(pause));
        // What is left in the queue belongs to the burst that was just handled.
        let mut reader = inotify::Reader::new(&self.events, buffer);
        while reader.next().is_ok() {}
        self.number = inotify::add_watch(&self.events, &self.folder, self.what)?;
        Ok(())
    }
}

fn follow(
    mut watched: Watched,
    stop: &OwnedFd,
    pause: Duration,
    mut on_event: impl FnMut(Event<'_>),
) {
    let pause = Timespec::try_from(pause).ok().filter(|_| !pause.is_zero());
    let mut buffer = [MaybeUninit::uninit(); 16 * 1024];
    loop {
        let mut waiting = [
            PollFd::new(&watched.events, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        // An interrupted wait needs no handling: reading finds nothing, and the loop waits again.
        let _ = poll(&mut waiting, None);
        if !waiting[1].revents().is_empty() {
            return;
        }
        let mut reader = inotify::Reader::new(&watched.events, &mut buffer);
        while let Ok(event) = reader.next() {
            if event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW) {
                on_event(Event::Lost);
            } else if let Some(name) = event.file_name().and_then(|name| name.to_str().ok()) {
                on_event(Event::Entry(name));
            }
        }
        // Watching again fails when the folder is gone, and then there are no more events.
        if let Some(pause) = &pause
            && watched.pause(pause, stop, &mut buffer).is_err()
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
    fn a_new_entry_is_reported() {
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
            receive
                .recv_timeout(Duration::from_secs(10))
                .expect("reported"),
            "4242"
        );
        drop(notify);
    }

    #[test]
    fn it_pauses_after_a_burst_and_can_be_stopped_all_the_same() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let (send, receive) = mpsc::channel();
        let pause = Duration::from_secs(3600);
        let notify = Notify::watch(folder.path(), WatchFlags::CREATE, pause, move |_| {
            send.send(()).expect("the test waits");
        });
        let notify = notify.expect("watched");
        std::fs::write(folder.path().join("first"), "").expect("written");
        receive
            .recv_timeout(Duration::from_secs(10))
            .expect("reported");
        // Events that come while a burst is being handled belong to it.
        let pauses = (0..100).any(|number| {
            std::fs::write(folder.path().join(number.to_string()), "").expect("written");
            receive.recv_timeout(Duration::from_millis(100)) == Err(mpsc::RecvTimeoutError::Timeout)
        });
        assert!(pauses, "it reported a hundred more");
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
