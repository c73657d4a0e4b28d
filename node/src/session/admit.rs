//! Whether an open message is admitted: everything that can be said without waiting. Pure.

use std::ops::Range;

use swarm_proto::{Content, Failure, FailureCode, Fault, Hop, Open, Peer};

use super::{failure::fail, hop::Served};

/// What an admitted session is to this hop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Admitted {
    pub(super) at: u8,
    pub(super) layers: Range<u32>,
    pub(super) content: Content,
    /// Nobody below: we answer the client.
    pub(super) tail: bool,
}

/// Checks an open message that arrived from `from` at `me`, which serves `served`.
pub(super) fn admit(
    open: &Open,
    from: Peer,
    me: Peer,
    served: Option<&Served>,
) -> Result<Admitted, Failure> {
    let at = open.at;
    let caller = |message: String| fail(at, Fault::Caller, FailureCode::BadFrame, message);
    let index = usize::from(at);
    let Some(hop) = open.hops.get(index) else {
        return Err(caller(format!(
            "hop {at} of a route of {} hops",
            open.hops.len()
        )));
    };
    if hop.peer != me {
        return Err(caller(format!(
            "hop {at} of this route is {}, this is {me}",
            hop.peer
        )));
    }
    let upstream = index
        .checked_sub(1)
        .and_then(|i| open.hops.get(i))
        .map_or(open.client, |h| h.peer);
    if from != upstream {
        return Err(caller(format!(
            "hop {at} expects its stream from {upstream}, it came from {from}"
        )));
    }
    let Some(served) = served else {
        let message = format!("model {} is not served here", open.model);
        return Err(fail(at, Fault::Local, FailureCode::UnknownModel, message));
    };
    check_route(&open.hops, served.n_layer).map_err(caller)?;
    let held = served.worker.held();
    let layers = u32::from(hop.layers.start)..u32::from(hop.layers.end);
    if !held.covers(&layers) {
        let Range { start, end } = layers;
        let message = format!("layers {start}..{end} are asked for, {held} are held");
        return Err(fail(at, Fault::Local, FailureCode::LayersNotHeld, message));
    }
    if open.n_ctx == 0 || open.n_ctx > served.n_ctx_max {
        let message = format!(
            "a context of {} is asked for, 1 to {} are possible",
            open.n_ctx, served.n_ctx_max
        );
        return Err(fail(at, Fault::Caller, FailureCode::Full, message));
    }
    let content = if at == 0 {
        Content::Tokens
    } else {
        Content::Hidden(open.dtype)
    };
    Ok(Admitted {
        at,
        layers,
        content,
        tail: index + 1 == open.hops.len(),
    })
}

/// A route covers every layer exactly once, in order.
fn check_route(hops: &[Hop], n_layer: u32) -> Result<(), String> {
    let mut next = 0u32;
    for (at, hop) in hops.iter().enumerate() {
        let (start, end) = (u32::from(hop.layers.start), u32::from(hop.layers.end));
        if start != next || end <= start {
            return Err(format!(
                "hop {at} of the route has layers {start}..{end}, {next} comes next"
            ));
        }
        next = end;
    }
    if next != n_layer {
        return Err(format!(
            "the route ends at layer {next}, the model has {n_layer}"
        ));
    }
    Ok(())
}
