//! The search itself: boundary by boundary, for each holder of the next layer the cheapest way to have it
//! computed by it, over everybody who may be used. Where nobody is short of room all holders of a layer go on
//! together ([`sweep`](super::sweep)); else one by one, here.
//!
//! ```text
//! those who computed layer l-1 ─▶ push what handing over costs to the takers they measured, the nearest first
//!                              └▶ the few cheapest for any other taker
//! each holder of layer l       ─▶ goes on with its hop, or begins one with the cheapest giver
//! ```
//!
//! A cost is one word, so that the cheaper of two is a minimum and no branch: ns, then hops, then who gives.
//! It gives what a search of every way gives. Where room is short a way may use up the room of a peer that is
//! needed behind it (see [`rooms`](super::rooms)), and where very many hold a layer not every way is followed (see
//! [`crowd`](super::crowd)).

use std::sync::Arc;

use swarm_proto::LayerRange;

use super::{
    Query,
    bound::{self, Bound, CROWD},
    crowd::{Crowd, FEW},
    links::{Links, SEATS_MAX},
    rooms::Rooms,
    sweep::Sweep,
    table::{Price, Table, Usable, half, servers},
};
use crate::adverts::Snapshot;

/// Givers of a boundary that are kept at hand, the cheapest for any taker first.
pub(super) const GIVERS: usize = 4;
/// Bits of who gives: a seat, counted from 1.
const WHO_BITS: u32 = (SEATS_MAX + 1).trailing_zeros();
pub(super) const WHO: u64 = (1 << WHO_BITS) - 1;
/// One hop. Of more than 63 each 64 count as a nanosecond: it decides nothing.
pub(super) const HOP: u64 = 1 << WHO_BITS;
const NS_BITS: u32 = WHO_BITS + 6;
/// No way: more than any, and what is added to it before it is looked at does not wrap.
pub(super) const NONE: u64 = 1 << 62;
/// Who gives where the client does.
const CLIENT: u16 = 0;

pub(super) fn word(ns: u64) -> u64 {
    ns << NS_BITS
}

/// Who gives.
pub(super) fn giver(word: u64) -> Option<u16> {
    ((word & WHO) as u16).checked_sub(1)
}

/// The cheapest way: who computes which layers, and what it costs.
pub(super) struct Found {
    pub(super) hops: Vec<(usize, LayerRange)>,
    pub(super) ns: u64,
}

/// What a search reads of a peer, in one cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Node {
    pub(super) layer: u64,
    pub(super) half: u64,
    pub(super) send: u64,
    /// Being entered, with the hop.
    pub(super) enter: u64,
    /// The cheapest way on which it computed the layer before the boundary.
    pub(super) cost: u64,
    /// Where its ways are, less the first layer it holds.
    ways: u32,
    /// Where the hop of that way began.
    pub(super) start: u16,
    /// Where the layers end that it holds from there on.
    pub(super) until: u16,
    /// Layers that it has room for.
    pub(super) room: u16,
    /// It has no room for all that it holds.
    pub(super) short: bool,
}

const NOBODY: Node = Node {
    layer: 0,
    half: 0,
    send: 0,
    enter: 0,
    cost: NONE,
    ways: 0,
    start: 0,
    until: 0,
    room: 0,
    short: false,
};

/// Of a peer and a layer it computes: where its hop began and, where one begins, who gave.
pub(super) struct Ways(Vec<(u16, u16)>);

impl Ways {
    fn at(nodes: &[Node], seat: u16, layer: u16) -> usize {
        nodes[usize::from(seat)].ways.wrapping_add(layer.into()) as usize
    }

    /// The hops of the way on which `seat` computes the layer before `end`, the last one first.
    pub(super) fn hops(
        &self,
        nodes: &[Node],
        seat: u16,
        end: u16,
    ) -> impl Iterator<Item = (u16, LayerRange)> {
        let mut next = Some((seat, end));
        std::iter::from_fn(move || {
            let (seat, end) = next?;
            let start = self.0[Self::at(nodes, seat, end - 1)].0;
            let giver = self.0[Self::at(nodes, seat, start)].1;
            next = (giver != CLIENT).then(|| (giver - 1, start));
            Some((seat, LayerRange { start, end }))
        })
    }
}

/// Who computed the layer before a boundary, and what handing over costs.
struct Givers {
    seats: Vec<u16>,
    /// By seat, with the delay aside; none for everybody else.
    given: Vec<u64>,
    /// The cheapest for any taker whose delay was not measured.
    at_hand: [u64; GIVERS],
    /// By seat, to which of those at hand the delay was measured: a bit for each.
    measured: Vec<u8>,
}

impl Givers {
    fn of(n: usize) -> Self {
        Self {
            seats: Vec::with_capacity(n),
            given: vec![NONE; n],
            at_hand: [NONE; GIVERS],
            measured: vec![0; n],
        }
    }

    fn clear(&mut self) {
        for seat in self.seats.drain(..) {
            self.given[usize::from(seat)] = NONE;
        }
        self.at_hand = [NONE; GIVERS];
    }

    /// Notes, or forgets, who was measured by those at hand.
    fn mark(&mut self, links: &Links, note: bool) {
        for (bit, given) in self.at_hand.iter().enumerate() {
            let Some(giver) = giver(*given) else { break };
            for link in links.takers(giver) {
                let measured = &mut self.measured[usize::from(link.to)];
                *measured = if note { *measured | 1 << bit } else { 0 };
            }
        }
    }

    fn add(&mut self, seat: u16, node: &Node) {
        let given = (node.cost + node.send) | (u64::from(seat) + 1);
        self.seats.push(seat);
        self.given[usize::from(seat)] = given;
        let mut new = given + node.half;
        if new < self.at_hand[GIVERS - 1] {
            for slot in &mut self.at_hand {
                if new < *slot {
                    std::mem::swap(&mut new, slot);
                }
            }
        }
    }
}

/// Searches of one table; what they need is kept from one to the next.
pub(super) struct Search<'t, 'a> {
    table: &'t Table<'a>,
    links: Arc<Links>,
    n_layer: u16,
    /// Of each seat the peer in the table.
    peers: Vec<u32>,
    exits: Vec<u64>,
    nodes: Vec<Node>,
    /// For each layer whose layers begin there, by seat, and where they end.
    starts: Vec<Vec<(u16, u16)>>,
    ways: Ways,
    before: Givers,
    /// By seat, what being handed rows costs, and by whom.
    taken: Box<[u64; SEATS_MAX + 1]>,
    crowded: bool,
}

impl<'t, 'a> Search<'t, 'a> {
    pub(super) fn new(table: &'t Table<'a>, snapshot: &Snapshot, query: &Query) -> Self {
        let n_layer = query.n_layer;
        let servers = servers(snapshot, query);
        let (links, all_seats) = snapshot.links.of(query.model, n_layer, &servers);
        // Both are sorted by peer.
        let mut seated = servers.iter().zip(&all_seats);
        let seat = |peer: &Usable| {
            let found = seated.find(|(server, _)| server.advert.peer == peer.advert.peer);
            found.map_or(usize::MAX, |(_, seat)| *seat as usize)
        };
        let seats: Vec<usize> = table.peers.iter().map(seat).collect();
        let n = all_seats.iter().map(|seat| *seat as usize + 1).max();
        let n = n.unwrap_or(0).max(links.len()).min(SEATS_MAX);
        let mut nodes = vec![NOBODY; n];
        let (mut peers, mut exits) = (vec![u32::MAX; n], vec![NONE; n]);
        let mut starts = vec![Vec::new(); n_layer.into()];
        let mut n_ways = 0;
        for (at, (peer, seat)) in (0u32..).zip(table.peers.iter().zip(seats)) {
            let Some(node) = nodes.get_mut(seat) else {
                continue;
            };
            peers[seat] = at;
            exits[seat] = word(peer.exit_ns);
            node.half = word(peer.half_ns);
            node.send = word(peer.send_ns);
            node.room = u16::try_from(peer.room).unwrap_or(u16::MAX);
            let extent = peer.extent();
            node.ways = u32::wrapping_sub(n_ways, extent.start.into());
            n_ways += u32::from(extent.len());
            for span in peer.live.iter() {
                if let Some(starts) = starts.get_mut(usize::from(span.start)) {
                    starts.push((seat as u16, span.end.min(n_layer)));
                }
            }
        }
        let states: u64 = table.peers.iter().map(|peer| peer.n_live).sum();
        Self {
            table,
            links,
            n_layer,
            peers,
            exits,
            nodes,
            starts,
            ways: Ways(vec![(0, CLIENT); n_ways as usize]),
            before: Givers::of(n),
            taken: Box::new([NONE; SEATS_MAX + 1]),
            crowded: states > CROWD * u64::from(n_layer),
        }
    }

    /// The cheapest way at these prices on which every peer has room for its layers; where none is found,
    /// the cheapest. What is found is the cheapest there is, unless the cheapest way to some layer uses up
    /// the room of a peer that is needed behind it.
    pub(super) fn run(&mut self, prices: &[Price]) -> Option<Found> {
        self.within(prices, true, None)
            .or_else(|| self.within(prices, false, None))
    }

    /// The same among some of the table's peers only.
    pub(super) fn among(&mut self, prices: &[Price], some: &[bool]) -> Option<Found> {
        self.within(prices, true, Some(some))
            .or_else(|| self.within(prices, false, Some(some)))
    }

    fn within(&mut self, prices: &[Price], room: bool, some: Option<&[bool]>) -> Option<Found> {
        let mut short = false;
        for (node, at) in self.nodes.iter_mut().zip(&self.peers) {
            if let Some(price) = prices.get(*at as usize) {
                let peer = &self.table.peers[*at as usize];
                node.layer = word(price.layer_ns);
                node.enter = word(price.enter_ns) + HOP;
                node.short = room && (peer.room as u64) < peer.n_live;
                short |= node.short;
            }
        }
        if !short {
            return self.sweep(prices, some);
        }
        let mut rooms = Rooms::of(self.nodes.len());
        let mut hops = if !self.crowded || some.is_some() {
            self.once(some, &mut rooms)?.1
        } else {
            // A first route among few bounds what all others may cost.
            let few = self.best(prices, FEW);
            let first = self.once(Some(&few), &mut rooms);
            let most = first.as_ref().map_or(NONE, |first| first.0);
            let crowd = Crowd::of(&self.nodes, &self.starts, &self.exits, &self.links, most);
            let found = self.pass(None, &mut rooms, &mut Some(crowd));
            let both = first.into_iter().chain(found).min_by_key(|found| found.0);
            // Where nothing was found some way ended too early.
            both.or_else(|| self.once(None, &mut rooms))?.1
        };
        hops.reverse();
        let ns = self.table.cost(&hops, prices);
        Some(Found { hops, ns })
    }

    /// The cheapest way where nobody is short of room.
    fn sweep(&self, prices: &[Price], some: Option<&[bool]>) -> Option<Found> {
        let (nodes, starts, exits) = (&self.nodes[..], &self.starts[..], &self.exits[..]);
        let found = |hops: &mut dyn Iterator<Item = (u16, LayerRange)>| {
            let hops = hops.map(|(seat, layers)| (self.peers[usize::from(seat)] as usize, layers));
            let hops: Vec<_> = hops.collect();
            let ns = self.table.cost(&hops, prices);
            Found { hops, ns }
        };
        let mut known = None;
        let mut bound = None;
        if self.crowded && some.is_none() {
            let mut left = Bound::of(nodes, starts, exits, &self.links)?;
            let first = found(&mut left.hops.iter().copied());
            left.most = bound::priced(first.ns, first.hops.len());
            let one = first.hops.len() == 1;
            known = Some(first);
            if one {
                return known;
            }
            if let Some((whole, seat)) = bound::alone(nodes, starts, exits)
                && whole < left.most
            {
                left.most = whole;
                let layers = LayerRange {
                    start: 0,
                    end: self.n_layer,
                };
                known = Some(found(&mut std::iter::once((seat, layers))));
            }
            bound = Some(left);
        }
        let mut sweep = Sweep::of(nodes, &self.links);
        let wanted =
            |seat: u16| some.is_none_or(|some| some[self.peers[usize::from(seat)] as usize]);
        match sweep.run(starts, exits, wanted, bound.as_ref()) {
            Some((_, hops)) => Some(found(&mut hops.into_iter().rev())),
            None => known,
        }
    }

    /// Who is among the `n` best holders of some layer, by what they cost alone.
    pub(super) fn best(&self, prices: &[Price], n: usize) -> Vec<bool> {
        let mut best: Vec<(u64, u32)> = Vec::with_capacity(prices.len());
        for (seat, at) in (0u16..).zip(&self.peers) {
            let Some(price) = prices.get(*at as usize) else {
                continue;
            };
            let peer = &self.table.peers[*at as usize];
            // Who is far from the client, or nobody knows how far, may be near to the hop before.
            let nearest = self.links.takers(seat).first();
            let nearest = nearest.map_or(peer.half_ns, |link| half(link.rtt_us));
            let per_hop = nearest.min(peer.half_ns) + price.enter_ns + peer.send_ns;
            let layers = peer.n_live.min(peer.room as u64).max(1);
            best.push((price.layer_ns + per_hop / layers, *at));
        }
        best.sort_unstable();
        let mut found = vec![0; self.n_layer.into()];
        // Layers for which more are looked for.
        let mut open = found.len();
        let mut kept = vec![false; prices.len()];
        for (_, at) in best {
            if open == 0 {
                break;
            }
            for layer in self.table.peers[at as usize]
                .live
                .iter()
                .flat_map(LayerRange::layers)
            {
                let found = found.get_mut(usize::from(layer));
                if let Some(found) = found.filter(|found| **found < n) {
                    kept[at as usize] = true;
                    *found += 1;
                    open -= usize::from(*found == n);
                }
            }
        }
        kept
    }

    /// The cheapest way, and its hops, the last one first.
    fn once(
        &mut self,
        some: Option<&[bool]>,
        rooms: &mut Rooms,
    ) -> Option<(u64, Vec<(usize, LayerRange)>)> {
        let mut found = self.pass(some, rooms, &mut None);
        if rooms.met.take() {
            // Neither rule is always the better one.
            rooms.picky = false;
            let other = self.pass(some, rooms, &mut None);
            found = found.into_iter().chain(other).min_by_key(|found| found.0);
            rooms.picky = true;
        }
        found
    }

    /// Goes through the layers once: the cheapest way and its hops, the last one first.
    fn pass(
        &mut self,
        some: Option<&[bool]>,
        rooms: &mut Rooms,
        crowd: &mut Option<Crowd>,
    ) -> Option<(u64, Vec<(usize, LayerRange)>)> {
        self.before.clear();
        let mut active: Vec<u16> = Vec::with_capacity(self.nodes.len());
        for layer in 0..self.n_layer {
            active.retain(|seat| self.nodes[usize::from(*seat)].until > layer);
            for (seat, until) in &self.starts[usize::from(layer)] {
                let at = usize::from(*seat);
                (self.nodes[at].cost, self.nodes[at].until) = (NONE, *until);
                let wanted = some.is_none_or(|some| some[self.peers[at] as usize]);
                if wanted && crowd.as_ref().is_none_or(|crowd| crowd.hopeful(*seat)) {
                    active.push(*seat);
                    rooms.begin(*seat);
                }
            }
            if layer > 0 {
                let most = self.offer(layer, &active, rooms, crowd);
                self.hand_over(layer, most, rooms);
            }
            self.before.clear();
            for seat in &active {
                self.compute(layer, *seat, rooms);
            }
            if let Some(crowd) = crowd {
                let on = std::mem::take(&mut self.before.seats);
                self.before.clear();
                for seat in crowd.thin(layer + 1, on, &mut self.nodes, rooms) {
                    self.before.add(seat, &self.nodes[usize::from(seat)]);
                }
            }
            rooms.turn();
            if self.before.seats.is_empty() {
                return None;
            }
        }
        let whole = |seat: u16| self.nodes[usize::from(seat)].cost + self.exits[usize::from(seat)];
        let last = self
            .before
            .seats
            .iter()
            .copied()
            .min_by_key(|seat| whole(*seat))?;
        let hops = self.ways.hops(&self.nodes, last, self.n_layer);
        let peer = |(seat, layers)| (self.peers[usize::from(seat)] as usize, layers);
        Some((whole(last), hops.map(peer).collect()))
    }

    /// For each holder of `layer` what being handed the rows may cost at most to be better than going on, or
    /// costs from the best whose delay was not measured; the largest of it.
    fn offer(&mut self, layer: u16, active: &[u16], rooms: &Rooms, crowd: &Option<Crowd>) -> u64 {
        let (mut most, mut marked) = (0, false);
        for seat in active {
            let at = usize::from(*seat);
            let node = &self.nodes[at];
            // A hop contains what entering it cost.
            let mut least = node.cost - node.enter;
            if node.short {
                least = NONE;
            }
            if let Some(crowd) = crowd {
                least = least.min(crowd.most(layer, node));
            }
            if self.before.at_hand[0] + node.half < least {
                if !marked {
                    self.before.mark(&self.links, true);
                    marked = true;
                }
                least = self.unmeasured(layer, *seat, least, rooms);
            }
            self.taken[at & SEATS_MAX] = least;
            most = most.max(least);
        }
        if marked {
            self.before.mark(&self.links, false);
        }
        most
    }

    /// Hands the rows over to those whose delay was measured, where that is cheaper.
    fn hand_over(&mut self, layer: u16, most: u64, rooms: &Rooms) {
        let (links, taken) = (&*self.links, &mut *self.taken);
        for seat in &self.before.seats {
            let given = self.before.given[usize::from(*seat)];
            // So far away nobody is.
            let far = most.saturating_sub(given) / word(half(1));
            for link in links.takers(*seat) {
                if u64::from(link.rtt_us) > far {
                    break;
                }
                let offer = given + u64::from(link.rtt_us) * word(half(1));
                let taken = &mut taken[usize::from(link.to) & SEATS_MAX];
                let of = (&self.nodes[..], &self.ways);
                if offer < *taken && !rooms.spent(of, *seat, link.to, layer) {
                    *taken = offer;
                }
            }
        }
    }

    /// The cheapest giver whose delay to `taker` was not measured, where that is less than `least`.
    fn unmeasured(&self, layer: u16, taker: u16, least: u64, rooms: &Rooms) -> u64 {
        let half = self.nodes[usize::from(taker)].half;
        let may = |giver: u16| {
            let of = (&self.nodes[..], &self.ways);
            giver != taker && !rooms.spent(of, giver, taker, layer)
        };
        let measured = self.before.measured[usize::from(taker)];
        for (bit, given) in self.before.at_hand.iter().enumerate() {
            if given + half >= least {
                return least;
            }
            if measured >> bit & 1 == 0 && giver(*given).is_some_and(may) {
                return given + half;
            }
        }
        // Those at hand are measured, and there may be others.
        let given =
            |seat: u16| self.before.given[usize::from(seat)] + self.nodes[usize::from(seat)].half;
        let others = self.before.seats.iter().copied();
        let others = others.filter(|seat| given(*seat) + half < least);
        let others = others.filter(|seat| may(*seat) && !self.links.measured(*seat, taker));
        others.map(given).min().map_or(least, |given| given + half)
    }

    /// The cheapest way to have `layer` computed by a holder of it.
    fn compute(&mut self, layer: u16, seat: u16, rooms: &mut Rooms) {
        let at = usize::from(seat);
        let node = &self.nodes[at];
        let (taken, entered) = match layer {
            0 => (node.half, true),
            _ => {
                let taken = self.taken[at & SEATS_MAX];
                (taken, taken & WHO > 0)
            }
        };
        if !entered && node.cost >= NONE {
            return;
        }
        let giver = (taken & WHO) as u16;
        let given = entered.then(|| ((taken & !WHO) + node.enter, giver));
        let (cost, start) = rooms.compute((&self.nodes, &self.ways), layer, seat, given);
        let node = &mut self.nodes[at];
        node.start = start;
        node.cost = (cost + node.layer).min(NONE);
        let way = &mut self.ways.0[node.ways.wrapping_add(layer.into()) as usize];
        *way = (start, if entered { giver } else { way.1 });
        if node.cost < NONE {
            self.before.add(seat, node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::crowds;
    use super::*;

    /// Every way would else be looked at for nothing, or the cheapest end too early.
    #[test]
    fn a_bound_is_never_more_than_what_is_left() {
        for (n, (swarm, query)) in crowds().into_iter().enumerate() {
            let table = Table::of(&swarm, &query.ask());
            let mut search = Search::new(&table, &swarm, &query.ask());
            let found = search.run(&table.prices).expect("a route");
            let (nodes, starts) = (&search.nodes, &search.starts);
            let bound = Bound::of(nodes, starts, &search.exits, &search.links);
            let bound = bound.expect("all layers are held");
            let seat = |peer: usize| search.peers.iter().position(|at| *at as usize == peer);
            let (mut left, mut tight) = (0, false);
            let mut behind: Option<usize> = None;
            for (peer, layers) in found.hops.iter().rev() {
                let (at, price) = (seat(*peer).expect("a seat"), table.prices[*peer]);
                left += match behind {
                    None => table.peers[*peer].exit_ns,
                    Some(next) => table.link(*peer, next),
                };
                for boundary in (layers.start + 1..=layers.end).rev() {
                    let least = bound.left(boundary.into())[at] >> NS_BITS;
                    assert!(least <= left, "swarm {n}, {boundary}: {least} > {left}");
                    tight |= 2 * least > left;
                    left += price.layer_ns;
                }
                left += price.enter_ns;
                behind = Some(*peer);
            }
            assert!(tight, "swarm {n}: a bound that ends nothing");
        }
    }
}
