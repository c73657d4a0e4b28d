//! Who could stand by for each hop of a route.

use swarm_proto::{Hop, LayerRange, ModelAdvert, Peer};

use super::{
    Query,
    table::{Usable, usable_peers},
};
use crate::adverts::Snapshot;

/// A standby takes a place that another session might need: it is asked only of peers with room for so
/// many of the kind.
pub(super) const ROOM_FOR: usize = 2;

/// For each hop another peer that holds all its layers and computes the same bits: the quickest of those
/// with room to spare that are not on the route. Nobody stands by for two hops.
pub fn standbys(snapshot: &Snapshot, query: &Query, hops: &[Hop]) -> Vec<Option<Hop>> {
    let able = |model: &ModelAdvert| {
        let holds = |hop: &Hop| covers(&model.live, hop.layers);
        hops.iter().any(holds)
    };
    let peers = usable_peers(snapshot, query, able);
    let mut taken: Vec<Peer> = hops.iter().map(|hop| hop.peer).collect();
    let mut out = Vec::with_capacity(hops.len());
    for hop in hops {
        let layers = u64::from(hop.layers.len());
        let need = usize::from(hop.layers.len()).saturating_mul(ROOM_FOR);
        let bits = snapshot.of_model(&hop.peer, &query.model);
        let bits = bits.map(|model| model.numerics);
        let fits = |peer: &&Usable| {
            peer.room >= need
                && peer.holds(hop.layers)
                && Some(peer.model.numerics) == bits
                && !taken.contains(&peer.advert.peer)
        };
        let price = |peer: &&Usable| {
            let price = peer.price(query);
            peer.half_ns + price.enter_ns + price.layer_ns * layers
        };
        let best = peers.iter().filter(fits).min_by_key(price);
        taken.extend(best.map(|peer| peer.advert.peer));
        out.push(best.map(|peer| peer.hop(hop.layers)));
    }
    out
}

/// Whether spans may cover these layers; those that touch are looked at by whoever merges them.
fn covers(live: &[LayerRange], layers: LayerRange) -> bool {
    let start = live
        .iter()
        .any(|span| span.start <= layers.start && layers.start < span.end);
    start
        && live
            .iter()
            .any(|span| span.start < layers.end && layers.end <= span.end)
}
