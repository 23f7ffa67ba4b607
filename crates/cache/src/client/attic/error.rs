//! How a request to a cache fails, and what each failure deserves.

use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, RETRY_AFTER};
use serde::Deserialize;
use thiserror::Error;

use flywheel_core::exit::{Exit, Explain};
use flywheel_core::text::one_line;
use flywheel_nix::nar::DumpError;
use flywheel_sys::http::{self, Layer};

/// Characters of a server's own words that are shown.
const SHOWN: usize = 200;

/// Why a request has failed.
#[derive(Debug, Error)]
pub enum Error {
    /// No whole answer came. At layer `Http` the server may have done what it was asked.
    #[error("{text}")]
    Unreachable {
        /// How far the request got.
        layer: Layer,
        /// What broke.
        text: String,
    },
    /// The server cannot now, and may soon.
    #[error("the server answered {status}: {text}")]
    Busy {
        /// Status code.
        status: u16,
        /// Its own words.
        text: String,
        /// How long it asks us to stay away.
        retry_after: Option<Duration>,
    },
    /// The server does not let us, or does not know the cache.
    #[error("the server answered {status}: {text}")]
    Refused {
        /// Status code.
        status: u16,
        /// Its own words.
        text: String,
    },
    /// What arrived was not the NAR that was announced; a proxy may have cut it.
    #[error("the server received another NAR than announced: {0}")]
    BadNar(String),
    /// Too much for the server or for a proxy in front of it.
    #[error("{who} refuses {size} bytes in one request ({text})")]
    TooLarge {
        /// Who probably answered.
        who: &'static str,
        /// What was sent, in bytes.
        size: u64,
        /// Its own words.
        text: String,
    },
    /// The request does not fit the server: our bug, or not an Attic server.
    #[error("the server answered {status}: {text}")]
    Rejected {
        /// Status code.
        status: u16,
        /// Its own words.
        text: String,
    },
    /// An answer that is not of this protocol.
    #[error("the server's answer is not Attic's: {0}")]
    Foreign(String),
    /// The token cannot be sent at all; it is not shown.
    #[error("the token holds characters that no HTTP header can carry")]
    Token,
    /// The store's own facts about the path cannot be sent.
    #[error("{0}")]
    Facts(String),
    /// A program that was to do it has failed; it may have done some of it.
    #[error("`{call}` failed: {text}")]
    Tool {
        /// The program and its command.
        call: &'static str,
        /// What it said.
        text: String,
    },
    /// The store path itself could not be read whole.
    #[error(transparent)]
    Local(#[from] DumpError),
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
            Action::Again { .. } => {
                Some("Check `attic-server`, and whether the server is up.".into())
            }
            Action::RereadOnce | Action::Never => None,
        }
    }
}

/// What a failure deserves (`attic-protocol`, section 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Try again later.
    Again {
        /// What the server asked for.
        after: Option<Duration>,
        /// Whether the server may have done what it was asked, so that one asks before sending again.
        ask_first: bool,
    },
    /// Once more from a fresh reading, then never.
    RereadOnce,
    /// Never again for this path; others may fare better.
    Never,
    /// Publishing as a whole makes no sense, unless a second look says otherwise.
    Stop,
}

impl Error {
    /// What this failure deserves.
    pub fn action(&self) -> Action {
        match self {
            Self::Unreachable { layer, .. } => Action::Again {
                after: None,
                ask_first: *layer == Layer::Http,
            },
            // A gateway's own error says nothing of what the server behind it has done; a 500 is the
            // server's own, and it has kept nothing.
            Self::Busy {
                status,
                retry_after,
                ..
            } => Action::Again {
                after: *retry_after,
                ask_first: matches!(status, 502 | 504 | 520..),
            },
            Self::Tool { .. } => Action::Again {
                after: None,
                ask_first: true,
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

    /// Whether this says that the server as a whole is away, and nothing of the one request.
    pub fn server_is_away(&self) -> bool {
        match self {
            Self::Unreachable { layer, .. } => *layer != Layer::Http,
            Self::Busy { status, .. } => matches!(status, 502..=504 | 520..),
            _ => false,
        }
    }

    /// Reads an answer that is not a success. `size` is what was sent, in bytes.
    pub fn of_answer(status: u16, headers: &HeaderMap, body: &[u8], size: u64) -> Self {
        let said = Said::read(body);
        let text = said.text;
        match status {
            300..=399 => Self::Refused {
                status,
                text: redirected(headers),
            },
            408 | 425 | 429 | 500..=599 => Self::Busy {
                status,
                text,
                retry_after: retry_after(headers),
            },
            401 | 403 | 404 => Self::Refused { status, text },
            400 if is_bad_nar(&text) => Self::BadNar(text),
            413 => Self::TooLarge {
                who: if said.html {
                    "a proxy before the server"
                } else {
                    "the server"
                },
                size,
                text,
            },
            _ => Self::Rejected { status, text },
        }
    }

    /// Reads a failure without an answer.
    pub fn of_request(error: reqwest::Error) -> Self {
        Self::Unreachable {
            layer: http::layer(&error),
            text: http::chain(error),
        }
    }

    /// Reads a connection that could not be made.
    pub fn of_connection(error: &http::ConnectError) -> Self {
        Self::Unreachable {
            layer: error.layer(),
            text: error.to_string(),
        }
    }

    /// Reads an exchange that broke off.
    pub fn broken_off(error: &std::io::Error) -> Self {
        Self::Unreachable {
            layer: Layer::Http,
            text: format!("the connection broke off: {error}"),
        }
    }

    /// No answer within the time it was given.
    pub fn timed_out(limit: Duration) -> Self {
        Self::Unreachable {
            layer: Layer::Http,
            text: format!("nothing moved for {} s", limit.as_secs()),
        }
    }
}

fn is_bad_nar(text: &str) -> bool {
    ["Bad chunk hash or size", "Bad NAR Hash or Size"]
        .iter()
        .any(|known| text.contains(known))
}

fn redirected(headers: &HeaderMap) -> String {
    let target = headers
        .get("location")
        .and_then(|value| value.to_str().ok());
    let host = target
        .and_then(|text| text.parse::<url::Url>().ok())
        .map(|url| http::redact(&url));
    match host {
        Some(url) => format!(
            "it redirects to {}, which is not followed; name that address",
            one_line(&url, SHOWN)
        ),
        None => "it redirects to another address, which is not followed".to_owned(),
    }
}

/// Seconds, or a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    httpdate::parse_http_date(text)
        .ok()?
        .duration_since(SystemTime::now())
        .ok()
}

/// A server's own words: Attic's JSON, else the beginning of whatever came.
struct Said {
    text: String,
    html: bool,
}

#[derive(Deserialize)]
struct AtticError {
    #[serde(default)]
    error: String,
    #[serde(default)]
    message: String,
}

impl Said {
    fn read(body: &[u8]) -> Self {
        if let Ok(said) = serde_json::from_slice::<AtticError>(body) {
            let text = one_line(&format!("{}: {}", said.error, said.message), SHOWN);
            return Self { text, html: false };
        }
        let text = String::from_utf8_lossy(&body[..body.len().min(4096)]);
        let html = text.trim_start().starts_with('<');
        let text = match text.trim() {
            "" => "no text".to_owned(),
            _ if html => format!("HTML, {}", one_line(&title(&text), SHOWN)),
            text => one_line(text, SHOWN),
        };
        Self { text, html }
    }
}

fn title(html: &str) -> String {
    let between = |text: &str| {
        Some(
            text.split_once("<title>")?
                .1
                .split_once("</title>")?
                .0
                .trim()
                .to_owned(),
        )
    };
    between(html).unwrap_or_else(|| "without a title".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(status: u16, body: &str) -> Error {
        Error::of_answer(status, &HeaderMap::new(), body.as_bytes(), 7)
    }

    #[test]
    fn each_answer_deserves_what_the_protocol_says() {
        let again = |ask_first| Action::Again {
            after: None,
            ask_first,
        };
        for (status, body, action) in [
            (
                500,
                r#"{"code":500,"error":"InternalServerError","message":"x"}"#,
                again(false),
            ),
            (429, "", again(false)),
            (503, "", again(false)),
            (502, "<html>", again(true)),
            (401, "", Action::Stop),
            (403, "", Action::Stop),
            (404, "", Action::Stop),
            (302, "", Action::Stop),
            (
                400,
                r#"{"code":400,"error":"RequestError","message":"Bad NAR Hash or Size"}"#,
                Action::RereadOnce,
            ),
            (400, "Bad Host", Action::Never),
            (413, "length limit exceeded", Action::Never),
            (422, "", Action::Never),
        ] {
            assert_eq!(of(status, body).action(), action, "{status} {body}");
        }
    }

    #[test]
    fn a_server_speaks_for_itself() {
        assert_eq!(
            of(
                403,
                r#"{"code":403,"error":"AccessError","message":"no push"}"#
            )
            .to_string(),
            "the server answered 403: AccessError: no push"
        );
        let proxy = of(
            413,
            "<html><head><title>413 Request Entity Too Large</title></head>",
        )
        .to_string();
        assert_eq!(
            proxy,
            "a proxy before the server refuses 7 bytes in one request (HTML, 413 Request Entity Too Large)"
        );
        assert!(
            of(500, &"\u{1b}[31mx\n".repeat(500))
                .to_string()
                .chars()
                .all(|c| !c.is_control())
        );
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, "7".parse().expect("header"));
        assert_eq!(retry_after(&headers), Some(Duration::from_secs(7)));
        let later = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(90));
        headers.insert(RETRY_AFTER, later.parse().expect("header"));
        assert!(retry_after(&headers).is_some_and(|wait| wait > Duration::from_secs(60)));
        headers.insert(RETRY_AFTER, "soon".parse().expect("header"));
        assert_eq!(retry_after(&headers), None);
    }
}
