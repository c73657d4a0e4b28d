//! What is said of every request: an id, a count, a span that may be part of the caller's trace, and one line in the
//! log. Nothing of what was asked or answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use node::telemetry;
use swarm_proto::TraceParent;
use tracing::{Instrument, Span};

use crate::state::State as Shared;

tokio::task_local! {
    /// Whether the request's line is written by whoever answers it: that is over later than its head.
    static TOLD: Arc<AtomicBool>;
}

/// Who answers the request writes its line, too.
pub fn told_later() {
    let _ = TOLD.try_with(|told| told.store(true, Ordering::Relaxed));
}

/// Outside of everything else, so that what is refused is seen as well.
pub async fn observe(State(state): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let id = format!("{:016x}", rand::random::<u64>());
    // A path that does not exist is the client's word.
    let path = request.extensions().get::<MatchedPath>();
    let path = path.map_or("other", MatchedPath::as_str).to_owned();
    let span = span(&request, &id, &path);
    let told = Arc::new(AtomicBool::new(false));
    let answered = TOLD.scope(Arc::clone(&told), next.run(request));
    let mut response = answered.instrument(span.clone()).await;
    let status = response.status().as_u16();
    span.record("http.response.status_code", status);
    if status >= 500 {
        span.record("otel.status_code", "ERROR");
    }
    state.metrics.responded(&path, status, begun.elapsed());
    if !told.load(Ordering::Relaxed) {
        span.in_scope(|| log(&path, status, begun));
    }
    if let Ok(id) = HeaderValue::from_str(&id) {
        let name = HeaderName::from_static("x-request-id");
        response.headers_mut().insert(name, id);
    }
    response
}

/// Looking, and what strangers can cause, is told at debug level: it could fill a disk.
fn log(path: &str, status: u16, begun: Instant) {
    let ms = begun.elapsed().as_millis() as u64;
    if path.starts_with("/v1/") && !matches!(status, 401 | 403) {
        tracing::info!(status, ms, "request");
    } else {
        tracing::debug!(status, ms, "request");
    }
}

fn span(request: &Request, id: &str, path: &str) -> Span {
    let method = request.method().as_str();
    let span = tracing::info_span!(
        "request",
        otel.name = format!("{method} {path}"),
        otel.kind = "server",
        otel.status_code = tracing::field::Empty,
        id,
        http.request.method = method,
        http.route = path,
        http.response.status_code = tracing::field::Empty,
        model = tracing::field::Empty,
    );
    if let Some(parent) = traceparent(request.headers()) {
        telemetry::set_parent(&span, &parent);
    }
    span
}

/// The caller's span, as W3C's trace context writes it; nothing where that is malformed.
fn traceparent(headers: &HeaderMap) -> Option<TraceParent> {
    let text = headers.get("traceparent")?.to_str().ok()?.trim();
    let mut parts = text.split('-');
    let version: [u8; 1] = hex(parts.next()?)?;
    let (trace, span) = (hex(parts.next()?)?, hex(parts.next()?)?);
    let flags: [u8; 1] = hex(parts.next()?)?;
    // Later versions may say more; this one does not, and 255 is none.
    if version[0] == 0xff || (version[0] == 0 && parts.next().is_some()) {
        return None;
    }
    Some(TraceParent::new(trace, span, flags[0] & 1 == 1))
}

/// Digits in lower case, as the standard has them.
fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let text = text.as_bytes();
    if text.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_parent_is_read_as_the_standard_writes_it() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("traceparent", HeaderValue::from_str(text).unwrap());
            traceparent(&headers)
        };
        let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let parent = read(text).unwrap();
        assert_eq!(parent.trace_id()[..3], [0x4b, 0xf9, 0x2f]);
        assert_eq!(parent.span_id()[6..], [0x02, 0xb7]);
        assert!(parent.sampled());
        assert!(!read(&text.replace("-01", "-00")).unwrap().sampled());
        assert!(
            read(&text.replacen("00-", "cc-", 1)).is_some(),
            "a later version"
        );
        for wrong in [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
        assert_eq!(traceparent(&HeaderMap::new()), None);
    }
}
