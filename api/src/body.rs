//! Request bodies, read within limits, and answers as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::extract::Request;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::sse::{Event as Sse, KeepAlive, Sse as Stream};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use futures::stream;
use serde_json::Value;
use tokio::time::timeout;

use crate::answers::{Answers, Event};
use crate::error::ApiError;
use crate::state::State;

/// A body may take this long to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// What is too large is read on and dropped, so far and so long, so that the client hears why instead of a broken pipe.
const DROPPED_BYTES_MAX: usize = 64 << 20;
const DROP_TIMEOUT: Duration = Duration::from_secs(5);
/// While a long prompt is computed, something passes so often that no proxy takes the connection for dead.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// The whole body of a JSON request.
///
/// # Errors
/// It says that it is something else, is too large, or takes too long.
pub async fn read(request: Request, state: &State) -> Result<Vec<u8>, ApiError> {
    let bytes_max = state.body_bytes_max;
    // A browser asks the server's leave before a foreign page may send this type, but not before plain text.
    let kind = request.headers().get(CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or("");
    let kind = kind.split(';').next().unwrap_or("").trim();
    let json = kind.eq_ignore_ascii_case("application/json");
    let announced = request.headers().get(CONTENT_LENGTH);
    let announced = announced.and_then(|len| len.to_str().ok()?.parse::<usize>().ok());
    let too_large = announced.is_some_and(|len| len > bytes_max);
    let mut body = request.into_body().into_data_stream();
    if !json {
        return Err(ApiError::not_json());
    }
    if too_large {
        drop_rest(body).await;
        return Err(ApiError::too_large(bytes_max));
    }
    let mut bytes = Vec::new();
    let whole = timeout(BODY_TIMEOUT, async {
        // Never closed.
        let _one_of_few = state.bodies.acquire().await;
        while let Some(chunk) = body.next().await {
            let chunk = chunk.map_err(|_| ApiError::malformed("the request broke off"))?;
            if bytes.len() + chunk.len() > bytes_max {
                return Ok(false);
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok::<bool, ApiError>(true)
    });
    match whole.await {
        Err(_) => Err(ApiError::slow()),
        Ok(Err(error)) => Err(error),
        Ok(Ok(true)) => Ok(bytes),
        Ok(Ok(false)) => {
            drop_rest(body).await;
            Err(ApiError::too_large(bytes_max))
        }
    }
}

async fn drop_rest(mut body: axum::body::BodyDataStream) {
    let mut dropped = 0;
    let all = async {
        while let Some(Ok(chunk)) = body.next().await {
            dropped += chunk.len();
            if dropped > DROPPED_BYTES_MAX {
                return;
            }
        }
    };
    let _ = timeout(DROP_TIMEOUT, all).await;
}

/// What a dialect makes of events.
pub trait Shape: Send + 'static {
    /// What comes first.
    fn opening(&mut self) -> Vec<Value> {
        Vec::new()
    }

    /// The parts that tell of an event; failures are told of in any dialect.
    fn parts(&mut self, event: Event) -> Vec<Value>;

    /// A part as it is sent.
    fn line(&self, part: &Value) -> Sse {
        Sse::default().data(part.to_string())
    }

    /// What ends a stream that did not fail.
    fn last(&self) -> Option<Sse> {
        Some(Sse::default().data("[DONE]"))
    }
}

/// The events of `answers` as they come, in a dialect.
pub fn events(answers: Answers, mut shape: impl Shape) -> Response {
    let opening = shape.opening();
    let lines = Lines {
        ready: opening.iter().map(|part| shape.line(part)).collect(),
        answers: Some(answers),
        shape,
    };
    let lines = stream::unfold(lines, async |mut lines| {
        let line = lines.next().await?;
        Some((Ok::<Sse, Infallible>(line), lines))
    });
    Stream::new(lines.boxed())
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response()
}

struct Lines<S> {
    /// None when nothing more comes.
    answers: Option<Answers>,
    shape: S,
    ready: VecDeque<Sse>,
}

impl<S: Shape> Lines<S> {
    async fn next(&mut self) -> Option<Sse> {
        loop {
            if let Some(line) = self.ready.pop_front() {
                return Some(line);
            }
            match self.answers.as_mut()?.next().await {
                Some(Event::Failed(error)) => {
                    self.answers = None;
                    return Some(self.shape.line(&error.json()));
                }
                Some(event) => {
                    let over = matches!(event, Event::Over(_));
                    let parts = self.shape.parts(event);
                    self.ready
                        .extend(parts.iter().map(|part| self.shape.line(part)));
                    if over {
                        self.answers = None;
                        self.ready.extend(self.shape.last());
                    }
                }
                None => return None,
            }
        }
    }
}
