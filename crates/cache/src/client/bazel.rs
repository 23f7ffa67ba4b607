//! Probes a Bazel remote cache or executor: by gRPC's capabilities call and a question to the content-addressed store, or
//! by fetching the empty blob from an HTTP cache. It only reads, never retries, and ends within its limit.
//!
//! The calls: `Capabilities/GetCapabilities` and `ContentAddressableStorage/FindMissingBlobs` of bazelbuild/remote-apis;
//! the HTTP cache: Bazel's documentation, "Remote caching".

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Limited};
use reqwest::header::{CONTENT_TYPE, HeaderMap};
use thiserror::Error;
use url::Url;

use flywheel_core::text::one_line;
use flywheel_sys::http::{self, Roots};

/// The largest response that is read, in bytes.
const RESPONSE_LIMIT: usize = 256 * 1024;
/// SHA-256 of nothing. Any content-addressed store responds to it: with the empty blob or with 404.
const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
const CAPABILITIES: &str = "build.bazel.remote.execution.v2.Capabilities/GetCapabilities";
const FIND_MISSING: &str =
    "build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs";
/// Fields of `ServerCapabilities` in `remote_execution.proto`.
const CACHE_FIELD: u64 = 1;
const EXECUTION_FIELD: u64 = 2;

/// Why an endpoint cannot be used.
#[derive(Debug, Error)]
#[error("{text}")]
pub struct Failure {
    /// The layer that failed: `name`, `connect`, `TLS`, `answer`, `authorisation`.
    pub layer: &'static str,
    /// The cause, without the address.
    pub text: String,
}

/// The services that an endpoint offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    pub cache: bool,
    pub execution: bool,
}

#[derive(Clone, Debug)]
pub struct BazelProber {
    plain: reqwest::Client,
    grpc: reqwest::Client,
}

impl BazelProber {
    /// # Errors
    /// As [`http::client`].
    pub fn new(roots: &Roots) -> Result<Self, http::Error> {
        Ok(Self {
            plain: http::client(roots)?,
            grpc: http::grpc_client(roots)?,
        })
    }

    /// Probes an endpoint of scheme `grpc`, `grpcs`, `http` or `https`.
    ///
    /// # Errors
    /// When the endpoint does not respond within `limit`, or does not behave like a cache or executor.
    pub async fn probe(&self, endpoint: &Url, limit: Duration) -> Result<Capabilities, Failure> {
        let probe = async {
            match endpoint.scheme() {
                "grpc" | "grpcs" => self.capabilities(endpoint).await,
                _ => self.empty_blob(endpoint).await,
            }
        };
        let timed_out = Failure {
            layer: "connect",
            text: format!("no answer within {} s", limit.as_secs_f64()),
        };
        tokio::time::timeout(limit, probe)
            .await
            .unwrap_or(Err(timed_out))
    }

    async fn empty_blob(&self, endpoint: &Url) -> Result<Capabilities, Failure> {
        let url = below(endpoint, endpoint.scheme(), &format!("cas/{EMPTY}"))?;
        let response = self.plain.get(url).send().await.map_err(broken)?;
        let status = response.status().as_u16();
        let body = read(response.into()).await?.1;
        match status {
            // The cache works; it has just never stored the empty blob.
            404 => {}
            200 | 204 if body.is_empty() => {}
            200 | 204 => {
                return Err(bad_response(
                    "it serves something else for the empty blob, so it is no Bazel cache",
                ));
            }
            401 | 403 => return Err(unauthorised(&format!("the server answered {status}"))),
            _ => return Err(bad_response(&format!("the server answered {status}"))),
        }
        Ok(Capabilities {
            cache: true,
            execution: false,
        })
    }

    async fn capabilities(&self, endpoint: &Url) -> Result<Capabilities, Failure> {
        // No bytes: the request for the default instance.
        let body = self.call(endpoint, CAPABILITIES, &[]).await?;
        let found = parse(&body).ok_or_else(|| {
            bad_response("its answer is no message of the remote execution protocol")
        })?;
        if found.cache {
            // Every build with a hit fails if the action cache answers and the store of the blobs does not.
            let asked = self.call(endpoint, FIND_MISSING, &empty_digest()).await;
            asked.map_err(|failure| Failure {
                text: format!("its content-addressed store: {}", failure.text),
                ..failure
            })?;
        }
        Ok(found)
    }

    /// Makes a call with this protobuf message. Returns the body of the answer, a gRPC frame.
    async fn call(&self, endpoint: &Url, call: &str, message: &[u8]) -> Result<Bytes, Failure> {
        let scheme = if endpoint.scheme() == "grpcs" {
            "https"
        } else {
            "http"
        };
        let url = below(endpoint, scheme, call)?;
        let request = self
            .grpc
            .post(url)
            .header(CONTENT_TYPE, "application/grpc")
            // gRPC requires this header: it reveals proxies that drop trailers.
            .header("te", "trailers");
        let response = request.body(frame(message)).send().await.map_err(broken)?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        match status {
            200 => {}
            401 | 403 => return Err(unauthorised(&format!("the server answered {status}"))),
            _ => {
                return Err(bad_response(&format!(
                    "the server answered {status}, which is no gRPC"
                )));
            }
        }
        let (trailers, body) = read(response.into()).await?;
        grpc_status(&headers).and_then(|()| trailers.as_ref().map_or(Ok(()), grpc_status))?;
        Ok(body)
    }
}

/// A gRPC frame with an uncompressed message.
fn frame(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).expect("our own messages are small");
    [&[0], &length.to_be_bytes()[..], message].concat()
}

/// `FindMissingBlobsRequest` with the digest of the empty blob, which every store has to know: field 2, a message with the
/// hash as field 1; a size of 0 is left out.
fn empty_digest() -> Vec<u8> {
    let length = u8::try_from(EMPTY.len()).expect("64");
    [&[0x12, length + 2, 0x0a, length], EMPTY.as_bytes()].concat()
}

/// The URL of a call below an endpoint. The text is parsed again because `Url::set_scheme` refuses to change between
/// the web's schemes and others.
fn below(endpoint: &Url, scheme: &str, path: &str) -> Result<Url, Failure> {
    let rest = endpoint
        .as_str()
        .split_once(':')
        .map_or("", |(_, rest)| rest);
    let mut url = Url::parse(&format!("{scheme}:{rest}"))
        .map_err(|error| bad_response(&error.to_string()))?;
    url.set_path(&format!("{}/{path}", endpoint.path().trim_end_matches('/')));
    url.set_query(None);
    url.set_fragment(None);
    Ok(url)
}

async fn read(
    response: axum::http::Response<reqwest::Body>,
) -> Result<(Option<HeaderMap>, Bytes), Failure> {
    let body = Limited::new(response.into_body(), RESPONSE_LIMIT);
    let collected = body
        .collect()
        .await
        .map_err(|error| bad_response(&format!("its answer broke off: {error}")))?;
    let trailers = collected.trailers().cloned();
    Ok((trailers, collected.to_bytes()))
}

/// Checks gRPC's own status. It is in the headers of a response without a message, and in the trailers of one with a
/// message.
fn grpc_status(headers: &HeaderMap) -> Result<(), Failure> {
    let text = |name: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    };
    let message = one_line(text("grpc-message"), 200);
    match text("grpc-status") {
        // Status codes of gRPC: 7 permission denied, 16 unauthenticated, 12 unimplemented.
        "" | "0" => Ok(()),
        "7" | "16" => Err(unauthorised(&format!(
            "the server refuses the call: {message}"
        ))),
        // 3 is an invalid argument: a store with other digests than SHA-256 answers, too.
        "3" => Ok(()),
        "12" => Err(bad_response("it speaks gRPC, but is no Bazel remote cache")),
        number => Err(bad_response(&format!(
            "the call failed with gRPC status {}: {message}",
            one_line(number, 10)
        ))),
    }
}

/// Reads the fields of `ServerCapabilities` from a gRPC frame: a compression byte, a length, and a protobuf message.
fn parse(body: &[u8]) -> Option<Capabilities> {
    let (head, message) = body.split_first_chunk::<5>()?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    // A compressed message (1) was not requested.
    let mut message = message.get(..length).filter(|_| head[0] == 0)?;
    let mut found = Capabilities {
        cache: false,
        execution: false,
    };
    while !message.is_empty() {
        let tag = varint(&mut message)?;
        // Only the presence of a field counts; its content is skipped by its wire type.
        // Wire types: 0 is a varint, 1 has 64 bits, 2 has a length in front, 5 has 32 bits.
        match tag & 7 {
            0 => drop(varint(&mut message)?),
            1 => message = message.get(8..)?,
            2 => {
                let length = usize::try_from(varint(&mut message)?).ok()?;
                message = message.get(length..)?;
            }
            5 => message = message.get(4..)?,
            _ => return None,
        }
        found.cache |= tag >> 3 == CACHE_FIELD;
        found.execution |= tag >> 3 == EXECUTION_FIELD;
    }
    Some(found)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    // Seven bits in each byte, the lowest first. The high bit marks that more follow.
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn broken(error: reqwest::Error) -> Failure {
    let layer = match http::layer(&error) {
        http::Layer::Name => "name",
        http::Layer::Connect => "connect",
        http::Layer::Tls => "TLS",
        http::Layer::Http => "answer",
    };
    Failure {
        layer,
        text: one_line(&http::chain(error), 300),
    }
}

fn bad_response(text: &str) -> Failure {
    Failure {
        layer: "answer",
        text: text.to_owned(),
    }
}

fn unauthorised(text: &str) -> Failure {
    Failure {
        layer: "authorisation",
        text: text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_from_a_message() {
        let message = |bytes: &[u8]| {
            [
                &[0, 0, 0, 0, u8::try_from(bytes.len()).expect("short")],
                bytes,
            ]
            .concat()
        };
        let both = Capabilities {
            cache: true,
            execution: true,
        };
        assert_eq!(parse(&message(&[0x0a, 2, 0x08, 1, 0x12, 0])), Some(both));
        assert_eq!(
            parse(&message(&[0x0a, 0])),
            Some(Capabilities {
                cache: true,
                execution: false
            })
        );
        assert_eq!(
            parse(&message(&[])),
            Some(Capabilities {
                cache: false,
                execution: false
            })
        );
        for wrong in [&[0x0a_u8, 9][..], &[0x0b], &[0xff; 12]] {
            assert_eq!(parse(&message(wrong)), None, "{wrong:?}");
        }
        assert_eq!(parse(b""), None);
        assert_eq!(parse(&[0, 0, 0, 0, 9, 1]), None);
    }

    #[test]
    fn a_call_stands_below_the_endpoint() {
        let at = |text: &str| {
            below(&text.parse().expect("URL"), "http", "a/b")
                .expect("URL")
                .to_string()
        };
        assert_eq!(
            at("grpc://cache.example:9092"),
            "http://cache.example:9092/a/b"
        );
        assert_eq!(
            at("grpcs://cache.example/team/?x=y"),
            "http://cache.example/team/a/b"
        );
    }
}
