//! Who could stand by for each hop of a route.

use std::collections::HashSet;

use swarm_proto::{Hop, Peer};

use super::{Query, Table, Usable, claim};
use crate::adverts::Snapshot;

/// A standby takes a place that another session might need: it is asked only of peers with room for so
/// many of the kind.
pub(super) const ROOM_FOR: usize = 2;

/// For each hop another peer that holds all its layers and computes the same bits: the quickest of those
/// with room to spare that are not on the route. Nobody stands by for two hops.
pub fn standbys(snapshot: &Snapshot, query: &Query, hops: &[Hop]) -> Vec<Option<Hop>> {
    let table = Table::new(snapshot, query);
    let class = |peer: &Peer| {
        let advert = snapshot.adverts.iter().find(|a| a.peer == *peer)?;
        Some(claim(advert, query)?.numerics)
    };
    let mut taken: HashSet<Peer> = hops.iter().map(|hop| hop.peer).collect();
    let mut out = Vec::with_capacity(hops.len());
    for hop in hops {
        let layers = usize::from(hop.layers.len());
        let same_bits = class(&hop.peer);
        let fits = |peer: &Usable| {
            !taken.contains(&peer.advert.peer)
                && peer.room >= layers.saturating_mul(ROOM_FOR)
                && hop.layers.layers().all(|layer| peer.holds(layer))
                && class(&peer.advert.peer) == same_bits
        };
        let price = |peer: &Usable| peer.half_ns + peer.enter_ns + peer.layer_ns * layers as u64;
        let candidates = table.peers.iter().enumerate();
        let best = candidates
            .filter(|(_, peer)| fits(peer))
            .min_by_key(|(_, peer)| price(peer));
        let standby = best.map(|(i, _)| table.hop(i, hop.layers));
        taken.extend(standby.as_ref().map(|hop| hop.peer));
        out.push(standby);
    }
    out
}
