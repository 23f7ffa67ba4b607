//! The ways in which a request to a cache fails, and how the caller should react to each.

use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, RETRY_AFTER};
use serde::Deserialize;
use thiserror::Error;

use flywheel_core::exit::{Exit, Explain};
use flywheel_core::text::one_line;
use flywheel_nix::nar::DumpError;
use flywheel_sys::http::{self, Layer};

/// Of a server's error message.
const SHOWN_CHARACTERS: usize = 200;

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

/// How to react to a failure (`attic-protocol`, section 3).
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
    pub fn action(&self) -> Action {
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
    pub fn is_server_unavailable(&self) -> bool {
        match self {
            Self::Unreachable { layer, .. } => *layer != Layer::Http,
            Self::Busy { status, .. } => matches!(status, 502..=504 | 520..),
            _ => false,
        }
    }

    /// For a response that is not a success. `size` is what was sent, in bytes.
    pub fn from_response(status: u16, headers: &HeaderMap, body: &[u8], size: u64) -> Self {
        let body = ErrorBody::parse(body);
        let text = body.text;
        match status {
            // Redirects are not followed, so the configured address is wrong.
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
            // Attic has no status of its own for this; only the message shows it.
            400 if is_bad_nar(&text) => Self::BadNar(text),
            413 => Self::TooLarge {
                // Attic's server responds in JSON, so HTML comes from something in front of it.
                who: if body.html {
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

    /// For a request without a complete response.
    pub fn from_reqwest(error: reqwest::Error) -> Self {
        Self::Unreachable {
            layer: http::layer(&error),
            text: http::chain(error),
        }
    }

    /// For a connection that could not be made.
    pub fn from_connect(error: &http::ConnectError) -> Self {
        Self::Unreachable {
            layer: error.layer(),
            text: error.to_string(),
        }
    }

    /// For a connection that ended before the response was complete.
    pub fn disconnected(error: &std::io::Error) -> Self {
        Self::Unreachable {
            layer: Layer::Http,
            text: format!("the connection broke off: {error}"),
        }
    }

    /// For an exchange in which no byte moved for `limit`.
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
            one_line(&url, SHOWN_CHARACTERS)
        ),
        None => "it redirects to another address, which is not followed".to_owned(),
    }
}

/// `Retry-After` holds seconds or a date (RFC 9110, 10.2.3).
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

/// The body of a failed response: the message in Attic's JSON, else the beginning of the text.
struct ErrorBody {
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

impl ErrorBody {
    fn parse(body: &[u8]) -> Self {
        if let Ok(json) = serde_json::from_slice::<AtticError>(body) {
            let text = one_line(
                &format!("{}: {}", json.error, json.message),
                SHOWN_CHARACTERS,
            );
            return Self { text, html: false };
        }
        let text = String::from_utf8_lossy(&body[..body.len().min(4096)]);
        let html = text.trim_start().starts_with('<');
        let text = match text.trim() {
            "" => "no text".to_owned(),
            // In a proxy's error page the title has the message.
            _ if html => format!("HTML, {}", one_line(&title(&text), SHOWN_CHARACTERS)),
            text => one_line(text, SHOWN_CHARACTERS),
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
        Error::from_response(status, &HeaderMap::new(), body.as_bytes(), 7)
    }

    #[test]
    fn each_response_has_the_action_of_the_protocol() {
        let again = |recheck| Action::Retry {
            after: None,
            recheck,
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
    fn the_servers_message_is_shown() {
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
