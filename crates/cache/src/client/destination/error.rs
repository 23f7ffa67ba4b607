//! The ways in which a request to a destination fails, and how the caller should react to each.

use std::time::Duration;

use thiserror::Error;

use flywheel_core::exit::{Exit, Explain};
use flywheel_nix::nar::DumpError;
use flywheel_sys::http::Layer;

/// Why a request failed.
#[derive(Debug, Error)]
pub enum Error {
    /// No complete response came. At layer `Http` the server may have carried out the request.
    #[error("{text}")]
    Unreachable {
        /// How far the request got.
        layer: Layer,
        text: String,
    },
    /// The server cannot do it now, and may be able to soon.
    #[error("the server answered {status}: {text}")]
    Busy {
        status: u16,
        text: String,
        /// From the response's `Retry-After`.
        retry_after: Option<Duration>,
    },
    /// The token lacks a right, or the server does not know the cache.
    #[error("the server answered {status}: {text}")]
    Refused { status: u16, text: String },
    /// The server received other bytes than the announced NAR; a proxy may have cut them.
    #[error("the server received another NAR than announced: {0}")]
    BadNar(String),
    /// Too much for the server or for a proxy in front of it.
    #[error("{who} refuses {size} bytes in one request ({text})")]
    TooLarge {
        /// The server or a proxy, whichever probably responded.
        who: &'static str,
        /// What was sent, in bytes.
        size: u64,
        text: String,
    },
    /// The server does not understand the request: a bug of Flywheel, or not an Attic server.
    #[error("the server answered {status}: {text}")]
    Rejected { status: u16, text: String },
    /// The response does not belong to Attic's protocol.
    #[error("the server's answer is not Attic's: {0}")]
    Foreign(String),
    /// The token cannot be sent at all. The message does not show it.
    #[error("the token holds characters that no HTTP header can carry")]
    Token,
    /// What the store has registered about the path cannot be sent.
    #[error("{0}")]
    Facts(String),
    /// A program that publishes for us has failed; it may have sent some of the paths.
    #[error("`{call}` failed: {text}")]
    Tool {
        /// The program and its subcommand.
        call: &'static str,
        text: String,
    },
    /// The store path itself could not be read completely.
    #[error(transparent)]
    Local(#[from] DumpError),
}

impl Error {
    /// What a program that publishes for us has failed with. A refusal for good, which its message shows, is one here, so
    /// that nothing is tried again.
    pub(crate) fn from_tool(call: &'static str, text: String) -> Self {
        match refusal(&text) {
            Some(status) => Self::Rejected { status, text },
            None => Self::Tool { call, text },
        }
    }
}

/// The status of a refusal for good in the message of a program: in Nix's words, or by Attic's names.
fn refusal(text: &str) -> Option<u16> {
    const NAMES: [(&str, u16); 3] = [
        ("Unauthorized", 401),
        ("AccessError", 403),
        ("NoSuchCache", 404),
    ];
    let number = text.split_once("HTTP error ").and_then(|(_, rest)| {
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        digits.parse().ok()
    });
    let named = || {
        let mut names = NAMES.iter();
        names
            .find(|(name, _)| text.contains(name))
            .map(|(_, status)| *status)
    };
    number
        .or_else(named)
        .filter(|status| matches!(status, 401 | 403 | 404 | 405 | 410 | 501))
}

impl Explain for Error {
    fn exit(&self) -> Exit {
        Exit::Failed
    }

    fn hint(&self) -> Option<String> {
        match self.action() {
            Action::Stop => {
                Some("Check `ATTIC_TOKEN` (its rights and its end) and `attic-cache`.".into())
            }
            Action::Retry { .. } => {
                Some("Check `attic-server`, and whether the server is up.".into())
            }
            Action::RereadOnce | Action::Never => None,
        }
    }
}

/// How to react to a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Try again later.
    Retry {
        /// The server's `Retry-After`.
        after: Option<Duration>,
        /// Whether the server may have stored the path, so that it is queried before the path is sent again.
        recheck: bool,
    },
    /// Once more after reading the path from disk again, then never.
    RereadOnce,
    /// Never again for this path; others may succeed.
    Never,
    /// Stop publishing as a whole, unless a second check of the server succeeds.
    Stop,
}

impl Error {
    pub(crate) fn action(&self) -> Action {
        match self {
            // Above the connection the request may have arrived, and only the response be lost.
            Self::Unreachable { layer, .. } => Action::Retry {
                after: None,
                recheck: *layer == Layer::Http,
            },
            // A gateway's error leaves open what the server behind it has done; 520 and above are Cloudflare's. A 500
            // comes from the server itself, which has then stored nothing.
            Self::Busy {
                status,
                retry_after,
                ..
            } => Action::Retry {
                after: *retry_after,
                recheck: matches!(status, 502 | 504 | 520..),
            },
            // The program may have sent the path before it failed.
            Self::Tool { .. } => Action::Retry {
                after: None,
                recheck: true,
            },
            Self::Refused { .. } | Self::Token => Action::Stop,
            Self::BadNar(_) => Action::RereadOnce,
            Self::TooLarge { .. }
            | Self::Rejected { .. }
            | Self::Foreign(_)
            | Self::Facts(_)
            | Self::Local(_) => Action::Never,
        }
    }

    /// Whether the server as a whole is unavailable, whatever the request.
    pub(crate) fn is_server_unavailable(&self) -> bool {
        match self {
            Self::Unreachable { layer, .. } => *layer != Layer::Http,
            Self::Busy { status, .. } => matches!(status, 502..=504 | 520..),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_was_refused_for_good_is_not_run_again() {
        let upload = |what: &str| format!("unable to upload 'http://h/x.narinfo': {what}");
        for text in [
            upload("HTTP error 405 ('')"),
            upload("HTTP error 404"),
            "Error: AccessError: Access denied".to_owned(),
            "Error: Unauthorized: Unauthorized.".to_owned(),
        ] {
            let error = Error::from_tool("nix copy", text);
            assert_eq!(error.action(), Action::Never, "{error}");
        }
        for text in [
            upload("HTTP error 503 ('')"),
            upload("HTTP error 429"),
            upload("Couldn't connect to server (7)"),
        ] {
            let error = Error::from_tool("nix copy", text);
            assert!(matches!(error.action(), Action::Retry { .. }), "{error}");
        }
    }
}
