//! Errors in the shape that clients of OpenAI and of Anthropic read, with the status that makes them do the right
//! thing: mend the request, come back later, or give up.

use std::fmt;

use axum::http::{HeaderValue, StatusCode, header::RETRY_AFTER};
use axum::response::{IntoResponse, Response};
use node::ClientError;
use node::answer::{PromptError, SourceError};
use serde_json::{Value, json};

use crate::fields::printable;

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    /// The field at fault, as `messages[2].content`.
    param: Option<String>,
    code: Option<&'static str>,
    retry_after_s: Option<u32>,
}

/// Longest message: a peer may have put some of the words there.
const MESSAGE_CHARS_MAX: usize = 1000;

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            kind,
            message: printable(&message.into(), MESSAGE_CHARS_MAX),
            param: None,
            code: None,
            retry_after_s: None,
        }
    }

    fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    fn later(mut self, seconds: u32) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }

    /// The request cannot be read at all.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A field is wrong.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.into()),
            ..Self::malformed(message)
        }
    }

    /// The prompt and its answer do not fit.
    pub fn too_long(param: &str, prompt: usize, limit: u32) -> Self {
        let message = format!(
            "the prompt has {prompt} tokens; the model and the peers allow {limit} for prompt and answer together"
        );
        Self::field(param, message).code("context_length_exceeded")
    }

    /// A body beyond the limit.
    pub fn too_large(limit: usize) -> Self {
        let message = format!("the request is larger than {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
    }

    /// Another type than JSON.
    pub fn not_json() -> Self {
        let message = "send the request with `Content-Type: application/json`";
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "invalid_request_error",
            message,
        )
    }

    /// The body did not come in time.
    pub fn slow() -> Self {
        let message = "the request did not arrive in time";
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            message,
        )
    }

    /// No key, or a wrong one.
    pub fn unauthorized() -> Self {
        let message = "this server asks for a key: `Authorization: Bearer KEY` or `x-api-key: KEY`";
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message).code("invalid_api_key")
    }

    /// A name that this server does not go by.
    pub fn foreign_host(host: &str) -> Self {
        let message = format!(
            "this server has no key and answers only by its own address, not as {}",
            printable(host, 80)
        );
        Self::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    /// A page of somebody else asks, in a way in which it cannot read the answer.
    pub fn foreign_page() -> Self {
        let message = "pages of other sites have no business here";
        Self::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    /// Nobody knows such a peer.
    pub fn no_peer(peer: &str) -> Self {
        let message = format!("no peer {} is known here", printable(peer, 80));
        Self::new(StatusCode::NOT_FOUND, "not_found_error", message).code("peer_not_found")
    }

    /// As many as this server lets look are looking.
    pub fn too_many_watchers(limit: usize) -> Self {
        let message = format!("{limit} are watching the swarm here, which is the limit");
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
            .code("too_many_watchers")
            .later(5)
    }

    /// No such path.
    pub fn no_path(path: &str) -> Self {
        let message = format!("there is no {}", printable(path, 120));
        Self::new(StatusCode::NOT_FOUND, "not_found_error", message).code("unknown_url")
    }

    /// No such method there.
    pub fn no_method(method: &str, path: &str) -> Self {
        let message = format!("{} does not take {method}", printable(path, 120));
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            message,
        )
    }

    /// No such model; the message lists what there is.
    pub fn unknown_model(message: impl Into<String>) -> Self {
        Self {
            param: Some("model".into()),
            ..Self::new(StatusCode::NOT_FOUND, "not_found_error", message).code("model_not_found")
        }
    }

    /// As many requests as this server takes are running.
    pub fn too_many(limit: usize) -> Self {
        let message = format!("{limit} requests are being answered here, which is the limit");
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
            .code("too_many_requests")
            .later(1)
    }

    /// Every holder of some layers is busy.
    pub fn full(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
            .code("swarm_full")
            .later(2)
    }

    /// Nobody is there who could answer.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded_error", message)
            .code("swarm_unavailable")
            .later(5)
    }

    /// This server ends.
    pub fn stopping() -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "overloaded_error",
            "this server is stopping",
        )
        .code("stopping")
        .later(5)
    }

    /// Something here or at a peer went wrong.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "api_error", message)
    }

    /// Its status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// One word for logs: of the message a client may have put some of the words there.
    pub fn name(&self) -> &'static str {
        self.code.unwrap_or(self.kind)
    }

    /// Both dialects in one: Anthropic's has a `type` outside and reads only what it knows inside.
    pub fn json(&self) -> Value {
        json!({
            "type": "error",
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        })
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.json())).into_response();
        if let Some(seconds) = self.retry_after_s {
            let seconds = HeaderValue::from(seconds);
            response.headers_mut().insert(RETRY_AFTER, seconds);
        }
        response
    }
}

impl From<ClientError> for ApiError {
    fn from(error: ClientError) -> Self {
        let message = error.to_string();
        match error {
            ClientError::Busy { .. } => Self::full(message),
            ClientError::NoRoute(_)
            | ClientError::Untrusted { .. }
            | ClientError::Exhausted { .. }
            | ClientError::Hop { .. } => Self::unavailable(message),
            ClientError::ContextFull { .. } | ClientError::Token { .. } => Self::malformed(message),
            ClientError::Differs { .. }
            | ClientError::Truncate { .. }
            | ClientError::NothingAsked
            | ClientError::Model(_) => Self::internal(message),
        }
    }
}

impl From<SourceError> for ApiError {
    fn from(error: SourceError) -> Self {
        match error {
            SourceError::Interrupted => Self::stopping(),
            SourceError::Session(error) => error.into(),
            other => Self::internal(other.to_string()),
        }
    }
}

impl From<PromptError> for ApiError {
    fn from(error: PromptError) -> Self {
        Self::malformed(error.to_string())
    }
}
