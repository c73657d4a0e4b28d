//! The search itself: layer by layer, for each holder the cheapest way to have that layer computed by it.
//!
//! A way goes on with the hop it ends with, or hands the rows over and begins another. A hop that is
//! cheaper now may run out of room earlier, so a peer has several open hops where its room is short.

use swarm_proto::LayerRange;

use super::{Query, Table, Usable};

/// The cheapest way: who computes which layers, and what it costs.
pub(super) struct Found {
    pub(super) hops: Vec<(usize, LayerRange)>,
    pub(super) ns: u64,
}

/// Where the rows of a hop come from.
#[derive(Clone, Copy)]
enum From {
    Client,
    Peer(usize),
}

/// A hop that may still grow.
struct Open {
    start: u16,
    /// The layer that its peer has no room for any more.
    end: u16,
    /// What it would cost on to the end of the model: so the hops of one peer compare, whatever their
    /// length.
    whole: Cost,
}

/// Adds a hop, unless an earlier one is as cheap and as long; drops those that will never be better.
fn begin(open: &mut Vec<Open>, new: Open) {
    let beats = |a: &Open, b: &Open| a.whole <= b.whole && a.end >= b.end;
    if !open.iter().any(|old| beats(old, &new)) {
        open.retain(|old| !beats(&new, old));
        open.push(new);
    }
}

/// The cheapest way to each layer and peer that computes it, as far as it has been searched.
struct Ways {
    n: usize,
    /// Where the peer's hop began.
    begun: Vec<u16>,
    /// For a hop that began there: from whom.
    from: Vec<From>,
}

impl Ways {
    fn at(&self, layer: u16, peer: usize) -> usize {
        usize::from(layer) * self.n + peer
    }

    /// The hops of the way on which `peer` computes the layer before `end`, the last one first.
    fn hops(&self, peer: usize, end: u16) -> impl Iterator<Item = (usize, LayerRange)> {
        let mut next = Some((peer, end));
        std::iter::from_fn(move || {
            let (peer, end) = next?;
            let start = self.begun[self.at(end - 1, peer)];
            next = match self.from[self.at(start, peer)] {
                From::Client => None,
                From::Peer(giver) => Some((giver, start)),
            };
            Some((peer, LayerRange { start, end }))
        })
    }

    /// Layers that `peer` has on the way to `giver`.
    fn taken(&self, peer: usize, giver: From, layer: u16) -> usize {
        let From::Peer(giver) = giver else { return 0 };
        let of_peer = self.hops(giver, layer).filter(|(other, _)| *other == peer);
        of_peer.map(|(_, layers)| usize::from(layers.len())).sum()
    }
}

/// `None` where no way is found that leaves every peer within its `room`. What is found is the cheapest
/// there is, unless the cheapest way to some layer uses up the room of a peer that is needed behind it.
pub(super) fn search(
    table: &Table,
    query: &Query,
    room: impl Fn(&Usable) -> usize,
) -> Option<Found> {
    let n = table.peers.len();
    let n_layer = query.n_layer;
    let mut ways = Ways {
        n,
        begun: vec![0; n * usize::from(n_layer)],
        from: vec![From::Client; n * usize::from(n_layer)],
    };
    let mut open: Vec<Vec<Open>> = Vec::new();
    open.resize_with(n, Vec::new);
    let mut cost = vec![Cost::NONE; n];
    // One list of givers is enough for every taker when it is longer than what any taker skips.
    let longest = table.peers.iter().map(|peer| peer.known.len()).max();
    let longest = longest.unwrap_or(0) + 2;
    let mut givers: Vec<(Cost, usize)> = Vec::new();
    let mut skip = vec![usize::MAX; n];
    for layer in 0..n_layer {
        list_givers(table, &cost, layer, longest, &mut givers);
        let mut next = vec![Cost::NONE; n];
        for &q in &table.holders[usize::from(layer)] {
            let taker = &table.peers[q];
            let rest = |from: u16| taker.layer_ns * u64::from(n_layer - from);
            // A hop does not reach over a layer that its peer does not hold.
            let goes_on = cost[q] != Cost::NONE;
            open[q].retain(|hop| goes_on && hop.end > layer);
            let entry = if layer == 0 {
                let ns = taker.half_ns + taker.enter_ns;
                Some((Cost { ns, hops: 1 }, From::Client))
            } else {
                skip[q] = q;
                hand_over(table, &cost, &givers, q, &mut skip)
            };
            if let Some((cost, giver)) = entry {
                let mut room = room(taker);
                if room < usize::from(n_layer) {
                    room = room.saturating_sub(ways.taken(q, giver, layer));
                }
                if room > 0 {
                    let end = usize::from(layer).saturating_add(room);
                    let hop = Open {
                        start: layer,
                        end: u16::try_from(end).unwrap_or(u16::MAX),
                        whole: cost.plus(rest(layer)),
                    };
                    begin(&mut open[q], hop);
                    let at = ways.at(layer, q);
                    ways.from[at] = giver;
                }
            }
            if let Some(hop) = open[q].iter().min_by_key(|hop| hop.whole) {
                let at = ways.at(layer, q);
                ways.begun[at] = hop.start;
                next[q] = hop.whole.minus(rest(layer + 1));
            }
        }
        cost = next;
    }
    let ends = table.holders.last()?.iter();
    let ends = ends.filter(|p| cost[**p] != Cost::NONE);
    let ends = ends.map(|&p| (cost[p].plus(table.peers[p].exit_ns), p));
    let (total, last) = ends.min()?;
    let mut hops: Vec<_> = ways.hops(last, n_layer).collect();
    hops.reverse();
    Some(Found { hops, ns: total.ns })
}

/// Who computed the layer before, the cheapest for any taker first.
fn list_givers(
    table: &Table,
    cost: &[Cost],
    layer: u16,
    longest: usize,
    givers: &mut Vec<(Cost, usize)>,
) {
    givers.clear();
    let Some(before) = layer.checked_sub(1) else {
        return;
    };
    let able = table.holders[usize::from(before)].iter();
    let able = able.filter(|p| cost[**p] != Cost::NONE);
    givers.extend(able.map(|&p| {
        let peer = &table.peers[p];
        (cost[p].plus(peer.send_ns + peer.half_ns), p)
    }));
    if givers.len() > longest {
        givers.select_nth_unstable(longest);
        givers.truncate(longest);
    }
    givers.sort_unstable();
}

/// The cheapest way to hand rows over to `q`, from those that computed the layer before.
fn hand_over(
    table: &Table,
    cost: &[Cost],
    givers: &[(Cost, usize)],
    q: usize,
    skip: &mut [usize],
) -> Option<(Cost, From)> {
    let taker = &table.peers[q];
    let mut best: Option<(Cost, usize)> = None;
    let mut offer = |cost: Cost, p: usize| {
        if best.is_none_or(|(least, _)| cost < least) {
            best = Some((cost, p));
        }
    };
    for &(p, delay) in &taker.known {
        skip[p] = q;
        if cost[p] != Cost::NONE {
            let giver = table.peers[p].send_ns;
            offer(cost[p].hop(giver + delay + taker.enter_ns), p);
        }
    }
    if let Some(&(giver, p)) = givers.iter().find(|(_, p)| skip[*p] != q) {
        offer(giver.hop(taker.half_ns + taker.enter_ns), p);
    }
    best.map(|(cost, p)| (cost, From::Peer(p)))
}

/// A cost, then the hops it takes: of two equal ones the shorter wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    ns: u64,
    hops: u16,
}

impl Cost {
    const NONE: Cost = Cost {
        ns: u64::MAX,
        hops: u16::MAX,
    };

    fn plus(self, ns: u64) -> Cost {
        Cost {
            ns: self.ns.saturating_add(ns),
            ..self
        }
    }

    fn minus(self, ns: u64) -> Cost {
        Cost {
            ns: self.ns.saturating_sub(ns),
            ..self
        }
    }

    fn hop(self, ns: u64) -> Cost {
        Cost {
            ns: self.ns.saturating_add(ns),
            hops: self.hops.saturating_add(1),
        }
    }
}
