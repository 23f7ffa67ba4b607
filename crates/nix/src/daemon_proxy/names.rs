//! The names that the proxy has found and not yet handed on: each once, and within bounds, however much goes through.

use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Mutex, MutexGuard};

use tokio::sync::Notify;

use crate::daemon_proxy::protocol::Report;

/// The most different names that are handed on. A job that evaluates all of Nixpkgs names a quarter of that.
pub(super) const NAME_COUNT_LIMIT: usize = 1_000_000;
/// Bytes of lines that wait for a reader which has stopped reading. Clients never wait for it.
const WAITING_LIMIT: usize = 32 * 1024 * 1024;

/// The lines for the process that has started the proxy, in order.
#[derive(Default)]
pub(super) struct Names {
    inner: Mutex<Inner>,
    more: Notify,
    hasher: RandomState,
}

#[derive(Default)]
struct Inner {
    /// Hashes with a random key in place of the names: eight bytes each, and no name can be made to look like another.
    seen: HashSet<u64>,
    lines: VecDeque<String>,
    waiting: usize,
    /// Whether a name was left out.
    incomplete: bool,
    closed: bool,
}

impl Names {
    /// Adds a name that was found, unless it was found before.
    pub(super) fn add(&self, name: &[u8]) {
        let hash = self.hasher.hash_one(name);
        let mut inner = self.lock();
        if inner.closed || inner.seen.contains(&hash) {
            return;
        }
        if inner.seen.len() >= NAME_COUNT_LIMIT || inner.waiting + name.len() > WAITING_LIMIT {
            if !inner.incomplete {
                inner.incomplete = true;
                inner.push(Report::Incomplete.line());
                self.more.notify_one();
            }
            return;
        }
        inner.seen.insert(hash);
        let name = std::str::from_utf8(name).expect("names are ASCII");
        inner.push(Report::Named(name.to_owned()).line());
        self.more.notify_one();
    }

    /// Keeps nothing from now on: there is no reader any more.
    pub(super) fn close(&self) {
        *self.lock() = Inner {
            closed: true,
            ..Inner::default()
        };
    }

    /// Adds an answer, behind all names that were found before it.
    pub(super) fn answer(&self, report: &Report) {
        self.lock().push(report.line());
        self.more.notify_one();
    }

    /// The lines that wait, in one text. Waits until there is one.
    pub(super) async fn next(&self) -> String {
        loop {
            if let Some(lines) = self.lock().take() {
                return lines;
            }
            self.more.notified().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .expect("nothing panics while it holds this lock")
    }
}

impl Inner {
    fn push(&mut self, line: String) {
        self.waiting += line.len();
        self.lines.push_back(line);
    }

    fn take(&mut self) -> Option<String> {
        if self.lines.is_empty() {
            return None;
        }
        self.waiting = 0;
        Some(self.lines.drain(..).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_is_handed_on_once_and_before_the_answer() {
        let names = Names::default();
        names.add(b"a");
        names.add(b"b");
        names.add(b"a");
        names.answer(&Report::Flushed(1));
        assert_eq!(names.next().await, "named a\nnamed b\nflushed 1\n");
        names.add(b"a");
        names.add(b"c");
        assert_eq!(names.next().await, "named c\n");
    }

    #[tokio::test]
    async fn a_reader_that_stops_costs_names_and_not_memory() {
        let names = Names::default();
        let long = "x".repeat(1024 * 1024);
        for n in 0..100 {
            names.add(format!("{n}{long}").as_bytes());
        }
        let lines = names.next().await;
        assert!(lines.len() <= WAITING_LIMIT + 1024, "{}", lines.len());
        assert_eq!(lines.matches("incomplete\n").count(), 1);
        assert!(lines.ends_with("incomplete\n"));
    }
}
