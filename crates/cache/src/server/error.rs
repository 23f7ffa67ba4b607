//! Error responses: `{code, error, message}`, as Attic sends them. Never contains a token or a path
//! of the host.

use std::io;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

/// A response that reports an error.
#[derive(Debug)]
pub(crate) struct ErrorResponse {
    status: StatusCode,
    error: &'static str,
    message: String,
    /// For the server's log only.
    cause: Option<String>,
}

/// The cause for the log; attached to the response as an extension.
#[derive(Clone, Debug)]
pub(crate) struct LoggedCause(pub(crate) String);

impl ErrorResponse {
    fn new(status: StatusCode, error: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            error,
            message: message.into(),
            cause: None,
        }
    }

    /// 400: the request is invalid.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "RequestError", message)
    }

    /// 401: no valid token, and the cache is not public.
    pub(crate) fn unauthorized() -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "Unauthorized",
            "this needs a token that may use this cache",
        )
    }

    /// 403: the token may read but not write.
    pub(crate) fn forbidden() -> Self {
        Self::new(
            StatusCode::FORBIDDEN,
            "AccessError",
            "this token may not write to this cache",
        )
    }

    /// 404: no such cache.
    pub(crate) fn no_cache() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "NoSuchCache",
            "there is no such cache here",
        )
    }

    /// 404: no such object.
    pub(crate) fn no_object() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "NoSuchObject",
            "this cache has no such object",
        )
    }

    /// 404: unknown address.
    pub(crate) fn not_found() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "NotFound",
            "there is nothing at this address",
        )
    }

    /// 400: the server's address was given instead of a cache's. Nix shows the text of a 400 to its user, but takes a 404
    /// without a word to mean that the cache lacks a path.
    pub(crate) fn not_a_cache(cache: &str) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "NotACache",
            format!("this is the server's address; a cache has its name behind it: {cache}"),
        )
    }

    /// 405: the address does not support this method.
    pub(crate) fn method_not_allowed() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "MethodNotAllowed",
            "this address does not support this method",
        )
    }

    /// 400: there is such a cache already.
    pub(crate) fn cache_exists(name: &str) -> Self {
        let text = format!("the cache `{name}` is there already; it needs no `attic cache create`");
        Self::new(StatusCode::BAD_REQUEST, "CacheAlreadyExists", text)
    }

    /// 405: clients neither make nor change caches.
    pub(crate) fn caches_are_fixed() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "MethodNotAllowed",
            "clients cannot make, change or remove caches here: the server makes those that it is started with, as in \
             `flywheel cache serve --cache NAME`",
        )
    }

    /// 408: the body stopped arriving, or arrives too slowly.
    pub(crate) fn timed_out() -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "RequestTimeout",
            "the request's body arrives too slowly",
        )
    }

    /// 413: the body is too large.
    pub(crate) fn too_large(limit: usize) -> Self {
        let message = format!("the request's body is over {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "PayloadTooLarge", message)
    }

    /// 415: an unsupported format.
    pub(crate) fn unsupported_media_type(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "UnsupportedMediaType",
            message,
        )
    }

    /// 422: valid JSON with the wrong structure.
    pub(crate) fn unprocessable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "RequestError", message)
    }

    /// 503: something the request depends on is gone, or the server is full; the client should
    /// retry.
    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "IncompleteNar", message)
    }

    /// 500: our fault or the disk's. The cause goes to the log, not to the client.
    pub(crate) fn internal(error: &io::Error) -> Self {
        // A full disk is for the operator to fix, and clients may know about it. Other causes could
        // contain paths of the host.
        let message = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "the cache's disk is full",
            _ => "the cache could not use its folder",
        };
        let mut response = Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "InternalServerError",
            message,
        );
        response.cause = Some(error.to_string());
        response
    }
}

impl From<io::Error> for ErrorResponse {
    fn from(error: io::Error) -> Self {
        Self::internal(&error)
    }
}

impl IntoResponse for ErrorResponse {
    fn into_response(self) -> Response {
        // The log also shows the message that the client gets.
        let cause = self.cause.unwrap_or_else(|| self.message.clone());
        let body = serde_json::json!({"code": self.status.as_u16(), "error": self.error, "message": self.message});
        let mut response = (self.status, Json(body)).into_response();
        response.extensions_mut().insert(LoggedCause(cause));
        // HTTP requires this header with a 401 (RFC 9110, 15.5.2), and Nix offers its netrc as
        // `Basic`.
        if self.status == StatusCode::UNAUTHORIZED {
            let realm = HeaderValue::from_static("Basic realm=\"flywheel\"");
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, realm);
        }
        // The condition passes quickly: a slot becomes free, or the client sends the NAR again.
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
