//! What the server says when it says no: `{code, error, message}`, as Attic does. Owns status,
//! name and text; never a token, never a path of the host.

use std::io;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

/// An answer that is an error.
#[derive(Debug)]
pub struct ErrorResponse {
    status: StatusCode,
    error: &'static str,
    message: String,
    /// For the server's own log, not for the client.
    cause: Option<String>,
}

/// What the log says beyond the answer; travels as an extension of the response.
#[derive(Clone, Debug)]
pub struct LoggedCause(pub String);

impl ErrorResponse {
    fn new(status: StatusCode, error: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            error,
            message: message.into(),
            cause: None,
        }
    }

    /// 400: the request makes no sense.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "RequestError", message)
    }

    /// 401: nobody we know, and nothing here is for everybody.
    pub fn unauthorized() -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "Unauthorized",
            "this needs a token that may use this cache",
        )
    }

    /// 403: readable, but not for this.
    pub fn forbidden() -> Self {
        Self::new(
            StatusCode::FORBIDDEN,
            "AccessError",
            "this token may not write to this cache",
        )
    }

    /// 404: no such cache.
    pub fn no_cache() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "NoSuchCache",
            "there is no such cache here",
        )
    }

    /// 404: no such object.
    pub fn no_object() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "NoSuchObject",
            "this cache has no such object",
        )
    }

    /// 404: no such address.
    pub fn not_found() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "NotFound",
            "there is nothing at this address",
        )
    }

    /// 405: the address is known, the method is not.
    pub fn method_not_allowed() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "MethodNotAllowed",
            "this address does not take this method",
        )
    }

    /// 408: the body stopped moving.
    pub fn timed_out() -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "RequestTimeout",
            "the request's body stopped arriving",
        )
    }

    /// 413: more than this address takes.
    pub fn too_large(limit: usize) -> Self {
        let message = format!("the request's body is over {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "PayloadTooLarge", message)
    }

    /// 415: a format that this server does not take.
    pub fn unsupported_media_type(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "UnsupportedMediaType",
            message,
        )
    }

    /// 422: JSON, but not the JSON that is wanted.
    pub fn unprocessable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "RequestError", message)
    }

    /// 503: what the request rests on is not there any more, or the server is full; try again.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "IncompleteNar", message)
    }

    /// 500: the fault is ours or the disk's. The cause goes to the log, not to the client.
    pub fn internal(error: &io::Error) -> Self {
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
        let cause = self.cause.unwrap_or_else(|| self.message.clone());
        let body = serde_json::json!({"code": self.status.as_u16(), "error": self.error, "message": self.message});
        let mut response = (self.status, Json(body)).into_response();
        response.extensions_mut().insert(LoggedCause(cause));
        if self.status == StatusCode::UNAUTHORIZED {
            let realm = HeaderValue::from_static("Basic realm=\"flywheel\"");
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, realm);
        }
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
