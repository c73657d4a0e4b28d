//! What the search is held against: the same thing searched for in the plainest way, holder by holder, with
//! every measured delay looked at.
//!
//! A way goes on with the hop it ends with, or hands the rows over and begins another. A hop that is
//! cheaper now may run out of room earlier, so a peer has several open hops where its room is short.

use swarm_proto::LayerRange;

use super::{
    Query,
    table::{Price, Table},
};
use crate::adverts::Snapshot;

/// The cheapest way by [`plan`](super::plan)'s promise; none where some layer has no holder.
pub(super) fn cheapest(snapshot: &Snapshot, query: &Query) -> Option<u64> {
    let table = Table::of(snapshot, query);
    let everybody = Everybody::of(&table, query.n_layer);
    let found = Search::new(&everybody, query.n_layer).run(&table.prices)?;
    assert_eq!(found.ns, table.cost(&found.hops, &table.prices));
    Some(found.ns)
}

/// A holder of some layer, and where the layers end that it holds from there on.
#[derive(Debug, Clone, Copy)]
struct Holder {
    peer: u32,
    until: u16,
}

/// A delay that was measured.
#[derive(Debug, Clone, Copy)]
struct Known {
    giver: u32,
    ns: u64,
}

impl Known {
    fn ns(self) -> u64 {
        self.ns
    }
}

struct Everybody<'t, 'a> {
    peers: &'t [super::table::Usable<'a>],
    /// For each layer who holds it.
    holders: Vec<Vec<Holder>>,
    /// For each taker the delays that were measured.
    known: Vec<Vec<Known>>,
}

impl<'t, 'a> Everybody<'t, 'a> {
    fn of(table: &'t Table<'a>, n_layer: u16) -> Self {
        let mut holders = vec![Vec::new(); n_layer.into()];
        let mut numbers = std::collections::HashMap::new();
        for (peer, usable) in (0u32..).zip(&table.peers) {
            numbers.insert(usable.advert.peer, peer);
            for span in usable.live.iter() {
                let until = span.end.min(n_layer);
                for layer in span.start..until {
                    holders[usize::from(layer)].push(Holder { peer, until });
                }
            }
        }
        let mut pairs = std::collections::BTreeSet::new();
        for (a, usable) in (0u32..).zip(&table.peers) {
            let known = usable.advert.rtts.iter();
            let others = known.filter_map(|(other, _)| numbers.get(other));
            pairs.extend(others.filter(|b| **b != a).flat_map(|b| [(a, *b), (*b, a)]));
        }
        let mut known = vec![Vec::new(); table.peers.len()];
        for (taker, giver) in pairs {
            let measured = table.measured(giver as usize, taker as usize);
            known[taker as usize].extend(measured.map(|ns| Known { giver, ns }));
        }
        Self {
            peers: &table.peers,
            holders,
            known,
        }
    }

    fn known(&self, taker: usize) -> &[Known] {
        &self.known[taker]
    }
}

/// Givers of a layer that are kept at hand, the cheapest for any taker first.
const GIVERS: usize = 4;

/// The cheapest way: who computes which layers, and what it costs.
struct Found {
    hops: Vec<(usize, LayerRange)>,
    ns: u64,
}

/// Where the rows of a hop come from.
#[derive(Clone, Copy)]
enum From {
    Client,
    Peer(u32),
}

/// A hop that may still grow.
struct Open {
    start: u16,
    /// The layer that its peer has no room for any more, or does not hold.
    end: u16,
    /// What it would cost on to the end of the model: so the hops of one peer compare, whatever their
    /// length.
    whole: Cost,
}

impl Open {
    /// At least as cheap and as long.
    fn beats(&self, other: &Open) -> bool {
        self.whole <= other.whole && self.end >= other.end
    }
}

/// Adds a hop, unless an earlier one is as cheap and as long; drops those that will never be better.
fn begin(open: &mut Vec<Open>, new: Open) {
    if !open.iter().any(|old| old.beats(&new)) {
        open.retain(|old| !new.beats(old));
        open.push(new);
    }
}

/// The cheapest way to each layer and peer that computes it, as far as it has been searched.
#[derive(Default)]
struct Ways {
    /// For each peer where its ways are, less the first layer it holds.
    at: Vec<usize>,
    /// Where the peer's hop began, and for a hop that began there: from whom.
    ways: Vec<(u16, From)>,
}

impl Ways {
    /// Room for each peer's layers, from the first that it holds to the last.
    fn of(table: &Everybody, n_layer: u16) -> Self {
        let (mut at, mut len) = (Vec::with_capacity(table.peers.len()), usize::from(n_layer));
        for peer in table.peers {
            let first = peer.live.first().map_or(0, |span| span.start.min(n_layer));
            let last = peer.live.last().map_or(0, |span| span.end.min(n_layer));
            at.push(len - usize::from(first));
            len += usize::from(last - first);
        }
        Self {
            at,
            ways: vec![(0, From::Client); len],
        }
    }

    fn get(&mut self, layer: u16, peer: usize) -> &mut (u16, From) {
        &mut self.ways[self.at[peer] + usize::from(layer)]
    }

    /// The hops of the way on which `peer` computes the layer before `end`, the last one first.
    fn hops(&self, peer: usize, end: u16) -> impl Iterator<Item = (usize, LayerRange)> {
        let mut next = Some((peer, end));
        std::iter::from_fn(move || {
            let (peer, end) = next?;
            let start = self.ways[self.at[peer] + usize::from(end) - 1].0;
            next = match self.ways[self.at[peer] + usize::from(start)].1 {
                From::Client => None,
                From::Peer(giver) => Some((giver as usize, start)),
            };
            Some((peer, LayerRange { start, end }))
        })
    }

    /// Layers that `peer` has on the way to `giver`.
    fn taken(&self, peer: usize, giver: From, layer: u16) -> usize {
        let From::Peer(giver) = giver else { return 0 };
        let of_peer = self
            .hops(giver as usize, layer)
            .filter(|(other, _)| *other == peer);
        of_peer.map(|(_, layers)| usize::from(layers.len())).sum()
    }
}

/// What a search reads of a peer.
struct Node {
    layer_ns: u64,
    half_ns: u64,
    send_ns: u64,
    enter_ns: u64,
    /// No measured delay to it is shorter.
    least_ns: u64,
    room: usize,
    /// It has room for all that it holds.
    roomy: bool,
}

/// Who computed the layer before, and may hand the rows over.
struct Givers {
    who: Vec<u32>,
    /// What it cost up to there; none for everybody else.
    cost: Vec<Cost>,
    /// The cheapest for any taker whose delay was not measured.
    best: [(Cost, u32); GIVERS],
    /// What the cheapest costs, its delay aside.
    least_ns: u64,
    /// For which turn a giver's delay was looked at last.
    looked: Vec<u32>,
    turn: u32,
}

impl Givers {
    const NOBODY: [(Cost, u32); GIVERS] = [(Cost::NONE, u32::MAX); GIVERS];

    fn of(n: usize) -> Self {
        Self {
            who: Vec::with_capacity(n),
            cost: vec![Cost::NONE; n],
            best: Self::NOBODY,
            least_ns: u64::MAX,
            looked: vec![0; n],
            turn: 0,
        }
    }

    fn clear(&mut self) {
        for p in self.who.drain(..) {
            self.cost[p as usize] = Cost::NONE;
        }
        self.best = Self::NOBODY;
        self.least_ns = u64::MAX;
    }

    fn add(&mut self, p: u32, cost: Cost, node: &Node) {
        self.who.push(p);
        self.cost[p as usize] = cost;
        self.least_ns = self.least_ns.min(cost.ns.saturating_add(node.send_ns));
        let mut new = (node.given(cost), p);
        for slot in &mut self.best {
            if new < *slot {
                std::mem::swap(&mut new, slot);
            }
        }
    }

    /// Handing over to `taker` costs no less.
    fn bound(&self, taker: &Node) -> u64 {
        let measured = self.least_ns.saturating_add(taker.least_ns);
        let estimated = self.best[0].0.ns.saturating_add(taker.half_ns);
        measured.min(estimated).saturating_add(taker.enter_ns)
    }

    /// The cheapest way to hand rows over to `q`.
    fn hand_over(&mut self, q: usize, known: &[Known], nodes: &[Node]) -> Option<(Cost, From)> {
        let taker = &nodes[q];
        let mut best: Option<(Cost, u32)> = None;
        let mut offer = |cost: Cost, p: u32| {
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, p));
            }
        };
        self.turn += 1;
        self.looked[q] = self.turn;
        for known in known {
            let p = known.giver as usize;
            self.looked[p] = self.turn;
            if self.cost[p] != Cost::NONE {
                let ns = nodes[p].send_ns + known.ns() + taker.enter_ns;
                offer(self.cost[p].hop(ns), known.giver);
            }
        }
        let free = |p: u32| self.looked[p as usize] != self.turn;
        let at_hand = self.best.iter().filter(|(cost, _)| *cost != Cost::NONE);
        let found = at_hand.clone().find(|(_, p)| free(*p)).copied();
        let found = found.or_else(|| {
            // Only where all that are at hand are known, and there are others.
            let others = (at_hand.count() == GIVERS).then_some(&self.who[..]);
            let others = others.unwrap_or_default().iter().filter(|p| free(**p));
            let given = |p: u32| nodes[p as usize].given(self.cost[p as usize]);
            others.map(|p| (given(*p), *p)).min()
        });
        if let Some((cost, p)) = found {
            offer(cost.hop(taker.half_ns + taker.enter_ns), p);
        }
        best.map(|(cost, p)| (cost, From::Peer(p)))
    }
}

impl Node {
    /// What rows cost that it sends on, up to the taker's half of the way.
    fn given(&self, cost: Cost) -> Cost {
        cost.plus(self.send_ns + self.half_ns)
    }
}

/// Searches of one table; what they need is kept from one to the next.
struct Search<'t, 'a> {
    table: &'t Everybody<'t, 'a>,
    n_layer: u16,
    least: Vec<u64>,
    nodes: Vec<Node>,
    ways: Ways,
    open: Vec<Vec<Open>>,
    before: Givers,
}

impl<'t, 'a> Search<'t, 'a> {
    fn new(table: &'t Everybody<'t, 'a>, n_layer: u16) -> Self {
        let n = table.peers.len();
        let least = |peer| {
            let known = table.known(peer).iter();
            known.map(|known| known.ns()).min().unwrap_or(u64::MAX)
        };
        let mut open = Vec::new();
        open.resize_with(n, Vec::new);
        Self {
            least: (0..n).map(least).collect(),
            nodes: Vec::with_capacity(n),
            ways: Ways::of(table, n_layer),
            open,
            before: Givers::of(n),
            table,
            n_layer,
        }
    }

    /// The cheapest way at these prices on which every peer has room for its layers; where none is found,
    /// the cheapest. What is found is the cheapest there is, unless the cheapest way to some layer uses up
    /// the room of a peer that is needed behind it.
    fn run(&mut self, prices: &[Price]) -> Option<Found> {
        self.within(prices, true)
            .or_else(|| self.within(prices, false))
    }

    fn within(&mut self, prices: &[Price], room: bool) -> Option<Found> {
        let table = self.table;
        self.nodes.clear();
        let peers = table.peers.iter().zip(prices).zip(&self.least);
        self.nodes.extend(peers.map(|((peer, price), least)| Node {
            layer_ns: price.layer_ns,
            half_ns: peer.half_ns,
            send_ns: peer.send_ns,
            enter_ns: price.enter_ns,
            least_ns: *least,
            room: if room { peer.room } else { usize::MAX },
            roomy: !room || peer.room as u64 >= peer.n_live,
        }));
        self.open.iter_mut().for_each(Vec::clear);
        self.before.clear();
        let mut next: Vec<(u32, Cost)> = Vec::new();
        for (layer, holders) in (0u16..).zip(&table.holders) {
            next.clear();
            for at in holders {
                let cost = self.compute(layer, *at);
                if cost != Cost::NONE {
                    next.push((at.peer, cost));
                }
            }
            self.before.clear();
            for (peer, cost) in &next {
                self.before.add(*peer, *cost, &self.nodes[*peer as usize]);
            }
        }
        let exit = |p: u32| table.peers[p as usize].exit_ns;
        let ends = next.iter().map(|(p, cost)| (cost.plus(exit(*p)), *p));
        let (total, last) = ends.min()?;
        let mut hops: Vec<_> = self.ways.hops(last as usize, self.n_layer).collect();
        hops.reverse();
        Some(Found { hops, ns: total.ns })
    }

    /// The cheapest way to have `layer` computed by a holder of it.
    fn compute(&mut self, layer: u16, at: Holder) -> Cost {
        let q = at.peer as usize;
        let taker = &self.nodes[q];
        let open = &mut self.open[q];
        let rest = |from: u16| taker.layer_ns * u64::from(self.n_layer - from);
        let end = |room: usize| {
            let end = usize::from(layer).saturating_add(room);
            at.until.min(u16::try_from(end).unwrap_or(u16::MAX))
        };
        // A hop does not reach over a layer that its peer does not hold.
        if self.before.cost[q] == Cost::NONE {
            open.clear();
        } else {
            open.retain(|hop| hop.end > layer);
        }
        let bound = match layer {
            0 => 0,
            _ => self.before.bound(taker).saturating_add(rest(layer)),
        };
        let furthest = end(taker.room);
        let no_better = |old: &Open| old.whole.ns < bound && old.end >= furthest;
        if !open.iter().any(no_better) {
            let entry = if layer == 0 {
                let ns = taker.half_ns + taker.enter_ns;
                Some((Cost { ns, hops: 1 }, From::Client))
            } else {
                self.before.hand_over(q, self.table.known(q), &self.nodes)
            };
            if let Some((cost, giver)) = entry {
                let taken = match taker.roomy {
                    true => 0,
                    false => self.ways.taken(q, giver, layer),
                };
                let room = taker.room.saturating_sub(taken);
                if room > 0 {
                    let hop = Open {
                        start: layer,
                        end: end(room),
                        whole: cost.plus(rest(layer)),
                    };
                    begin(open, hop);
                    self.ways.get(layer, q).1 = giver;
                }
            }
        }
        let Some(hop) = open.iter().min_by_key(|hop| hop.whole) else {
            return Cost::NONE;
        };
        self.ways.get(layer, q).0 = hop.start;
        hop.whole.minus(rest(layer + 1))
    }
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
