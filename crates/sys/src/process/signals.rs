//! The signals that end this program, as one closed enum.

use std::io;

use rustix::process::Signal;
use tokio::signal::unix::{Signal as Stream, SignalKind, signal};

/// A request to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// `SIGINT`: GitHub's first signal when a job is cancelled, and Ctrl-C.
    Interrupt,
    /// `SIGTERM`: GitHub's second signal, 7.5 s later.
    Terminate,
    /// `SIGHUP`: the terminal was closed.
    HangUp,
}

impl Stop {
    /// The signal to forward to a child.
    pub(crate) fn signal(self) -> Signal {
        match self {
            Self::Interrupt => Signal::INT,
            Self::Terminate => Signal::TERM,
            Self::HangUp => Signal::HUP,
        }
    }
}

/// A listener for requests to stop. While it lives, these signals do not end the process by themselves.
#[derive(Debug)]
pub struct Signals {
    interrupt: Stream,
    terminate: Stream,
    hang_up: Stream,
    /// One that `heard` has waited for.
    unhandled: Option<Stop>,
}

impl Signals {
    /// # Errors
    /// When the system refuses a handler.
    pub fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            unhandled: None,
        })
    }

    /// Waits for a request, which is for whoever calls `next` after that. Cancel-safe.
    pub async fn heard(&mut self) {
        let stop = self.next().await;
        self.unhandled = Some(stop);
    }

    /// The next request. Cancel-safe.
    pub async fn next(&mut self) -> Stop {
        if let Some(stop) = self.unhandled.take() {
            return stop;
        }
        tokio::select! {
            _ = self.interrupt.recv() => Stop::Interrupt,
            _ = self.terminate.recv() => Stop::Terminate,
            _ = self.hang_up.recv() => Stop::HangUp,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Signal, getpid, kill_process};

    #[tokio::test]
    async fn a_signal_that_was_heard_is_still_there() {
        let mut signals = Signals::listen().expect("a handler");
        kill_process(getpid(), Signal::HUP).expect("this process");
        signals.heard().await;
        assert_eq!(signals.next().await, Stop::HangUp);
    }
}
