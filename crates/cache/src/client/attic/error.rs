//! How the responses of Attic's server, and requests that got none, become errors of the destination.

use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, RETRY_AFTER};
use serde::Deserialize;

use crate::client::destination::Error;
use flywheel_core::text::one_line;
use flywheel_sys::http::{self, Layer};

/// Of a server's error message.
const SHOWN_CHARACTERS: usize = 200;

impl Error {
    /// For a response that is not a success. `size` is what was sent, in bytes.
    pub(crate) fn from_response(status: u16, headers: &HeaderMap, body: &[u8], size: u64) -> Self {
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
    pub(crate) fn from_reqwest(error: reqwest::Error) -> Self {
        Self::Unreachable {
            layer: http::layer(&error),
            text: http::chain(error),
        }
    }

    /// For a connection that could not be made.
    pub(crate) fn from_connect(error: &http::ConnectError) -> Self {
        Self::Unreachable {
            layer: error.layer(),
            text: error.to_string(),
        }
    }

    /// For a connection that ended before the response was complete.
    pub(crate) fn disconnected(error: &std::io::Error) -> Self {
        Self::Unreachable {
            layer: Layer::Http,
            text: format!("the connection broke off: {error}"),
        }
    }

    /// For an exchange in which no byte moved for `limit`.
    pub(crate) fn timed_out(limit: Duration) -> Self {
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
    use crate::client::destination::Action;

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
