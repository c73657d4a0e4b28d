//! One trace across the hops of a session: the traceparent that travels in the open message.

use swarm_proto::{Open, TraceParent};

use crate::telemetry;

/// The span of a session on this hop, a child of the span that the open message names.
pub(super) fn session_span(open: &Open) -> tracing::Span {
    let layers = open.hops.get(usize::from(open.at));
    let layers = layers.map(|hop| tracing::field::display(hop.layers));
    let span = tracing::info_span!(
        "session",
        layers,
        session = %open.session,
        at = open.at,
        hops = open.hops.len(),
        model = %open.model.short(),
    );
    if let Some(parent) = &open.trace {
        telemetry::set_parent(&span, parent);
    }
    span
}

/// The current span, for the next hop; none where traces are not exported.
pub(super) fn current() -> Option<TraceParent> {
    telemetry::current_traceparent()
}
