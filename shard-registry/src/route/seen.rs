//! What a client learns of the hops of a route from how long its tokens take.
//!
//! It sees one time for all of them. What the others at least took, by their own claims, and the ways between
//! leave to each hop at most the rest: so fast it is at least. A slow hop that claims to be fast never shows more
//! than it does; an honest one on the same route shows what it can on another.

use std::time::Duration;

use swarm_proto::{Hop, Peer};

use super::{
    Query, SEEN_FACTOR,
    table::{COMPUTE_WEIGHT, Table, believed},
};
use crate::adverts::Snapshot;

/// A claim that what was seen contradicts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Doubt {
    /// Whose.
    pub peer: Peer,
    /// Layer-tokens a second, as it says.
    pub claimed: f32,
    /// As the client saw them.
    pub seen: f32,
    /// As the planner counts them.
    pub counted: f32,
}

/// Layer-tokens a second that each peer of a route had at least, where a token along it took `step`. None of those
/// who say nothing of the model, or are not to be used.
pub fn seen_at_least(
    snapshot: &Snapshot,
    query: &Query,
    hops: &[Hop],
    step: Duration,
) -> Vec<(Peer, f32)> {
    // Sessions under way have their room.
    let claims = Query {
        n_ctx: 0,
        seen: &[],
        jitter: 0.0,
        ..query.clone()
    };
    let table = Table::of(snapshot, &claims);
    let Some(route) = table.find(hops).filter(|route| !route.is_empty()) else {
        return Vec::new();
    };
    let seconds = |ns: u64| Duration::from_nanos(ns).as_secs_f64();
    let compute = |(at, layers): &(usize, swarm_proto::LayerRange)| {
        let ns = table.prices[*at].layer_ns * u64::from(layers.len());
        seconds(ns) / COMPUTE_WEIGHT
    };
    let all: f64 = route.iter().map(compute).sum();
    // Queues are part of what is seen, and not of the way.
    let queues = route.iter().map(|(at, _)| table.prices[*at].queued_ns);
    let ways = table.cost(&route, &table.prices) - queues.sum::<u64>();
    let ways = seconds(ways) - all * COMPUTE_WEIGHT;
    let mut seen: Vec<(Peer, f32)> = Vec::with_capacity(route.len());
    for (at, _) in &route {
        let peer = table.peers[*at].advert.peer;
        if seen.iter().any(|(other, _)| *other == peer) {
            continue;
        }
        let of_peer = route.iter().filter(|(other, _)| other == at);
        let (mut own, mut layers) = (0.0, 0u32);
        for part in of_peer {
            own += compute(part);
            layers += u32::from(part.1.len());
        }
        // No less than it claims to take.
        let at_most = (step.as_secs_f64() - ways - (all - own)).max(own).max(1e-9);
        seen.push((peer, (f64::from(layers) / at_most) as f32));
    }
    seen
}

/// Whose claims are not counted as they stand.
pub fn doubts(snapshot: &Snapshot, query: &Query) -> Vec<Doubt> {
    let doubt = |(peer, seen): &(Peer, f32)| {
        let model = snapshot.of_model(peer, &query.model)?;
        let claimed = model.layer_tokens_s?.value;
        let counted = believed(model, Some(*seen))? as f32;
        (claimed > seen * SEEN_FACTOR).then_some(Doubt {
            peer: *peer,
            claimed,
            seen: *seen,
            counted,
        })
    };
    query.seen.iter().filter_map(doubt).collect()
}
