//! Where very many hold a layer and some are short of room, not every way goes on.
//!
//! A first route among few says what the cheapest costs at most, and what is left from each boundary on costs no
//! less than each layer at its cheapest holder: ways that cannot be better than the first route end. Nothing is
//! lost by that. Where room is short it ends too few, because hops are many and what they cost beyond their layers
//! is only known roughly: then the most promising ways go on ([`WIDTH`]), and those handed over to are not much
//! dearer than those before.

use super::{
    links::Links,
    rooms::Rooms,
    search::{NONE, Node, word},
    table::half,
};

/// Holders of a layer among whom a first route is looked for.
pub(super) const FEW: usize = 32;
/// Ways that go on from a boundary where room is short.
const WIDTH: usize = 96;
/// Peers that are looked at where room is short: hops are many then, and each takes one of the best.
const PEERS: usize = 384;

pub(super) struct Crowd {
    /// What a way costs at most that is worth anything.
    most: u64,
    /// The least that is left from each boundary on.
    rest: Vec<u64>,
    /// The least that a hop costs beyond its layers.
    hop: u64,
    hopeful: Vec<bool>,
    /// The dearest way that went on from the boundary before, with what is left of it, and how much dearer the
    /// next may be.
    last: u64,
    reach: u64,
    kept: Vec<(u64, u16)>,
}

impl Crowd {
    pub(super) fn of(
        nodes: &[Node],
        starts: &[Vec<(u16, u16)>],
        exits: &[u64],
        links: &Links,
        most: u64,
    ) -> Self {
        let entry = |(seat, node): (u16, &Node)| {
            let nearest = links.takers(seat).first();
            let nearest = nearest.map_or(NONE, |link| word(half(link.rtt_us)));
            nearest.min(node.half) + node.enter
        };
        let entries: Vec<u64> = (0u16..).zip(nodes).map(entry).collect();
        // What each layer costs at least; of who has little room each pays its part of the hop.
        let rate = |at: usize| {
            let node = &nodes[at];
            let leave = node.send.min(exits[at]);
            let of_hop = (entries[at] + leave) / u64::from(node.room.max(1));
            node.layer + if node.short { of_hop } else { 0 }
        };
        let rates: Vec<u64> = (0..nodes.len()).map(rate).collect();
        let rest = rest(starts, &rates);
        let dearest = rest
            .windows(2)
            .map(|two| two[0] - two[1])
            .max()
            .unwrap_or(0);
        let total = rest.first().copied().unwrap_or(0);
        let mut worst = NONE;
        if nodes.iter().any(|node| node.short) && rates.len() > PEERS {
            let mut sorted = rates.clone();
            worst = *sorted.select_nth_unstable(PEERS).1;
        }
        let hopeful = |(at, node): (usize, &Node)| {
            let least = if node.short {
                rates[at]
            } else {
                entries[at] + node.layer
            };
            least + total.saturating_sub(dearest) < most && rates[at] <= worst
        };
        Self {
            hopeful: nodes
                .iter()
                .enumerate()
                .map(|(at, node)| hopeful((at, node)))
                .collect(),
            hop: entries.iter().copied().min().unwrap_or(0),
            most,
            rest,
            last: NONE,
            reach: NONE,
            kept: Vec::new(),
        }
    }

    /// Whether a way with this peer may be worth anything.
    pub(super) fn hopeful(&self, seat: u16) -> bool {
        self.hopeful[usize::from(seat)]
    }

    /// What is left at least of a way on which `node` computed the layer before a boundary.
    fn left(&self, boundary: u16, node: &Node) -> u64 {
        let rest = self.rest[usize::from(boundary)];
        let n_layer = self.rest.len() as u16 - 1;
        if node.short || boundary == n_layer {
            return rest;
        }
        let leave = self.hop + node.send + rest;
        if node.until == n_layer {
            leave.min(node.layer.saturating_mul((n_layer - boundary).into()))
        } else {
            leave
        }
    }

    /// What being handed rows may cost at most to be worth anything.
    pub(super) fn most(&self, layer: u16, node: &Node) -> u64 {
        let most = self.most.min(self.last.saturating_add(self.reach));
        let behind = self.left(layer + 1, node) + node.layer + node.enter;
        // Without who gives: nobody does.
        word(most.saturating_sub(behind) / word(1))
    }

    /// Ends ways that are not worth anything, and the least promising of too many.
    pub(super) fn thin(
        &mut self,
        boundary: u16,
        on: Vec<u16>,
        nodes: &mut [Node],
        rooms: &mut Rooms,
    ) -> Vec<u16> {
        let mut kept = std::mem::take(&mut self.kept);
        kept.clear();
        let whole = |seat: u16| {
            let node = &nodes[usize::from(seat)];
            (node.cost + self.left(boundary, node), seat)
        };
        kept.extend(on.iter().map(|seat| whole(*seat)));
        kept.sort_unstable();
        let worth = kept.partition_point(|(whole, _)| *whole < self.most);
        let n = worth.min(WIDTH);
        for (_, seat) in &kept[n..] {
            nodes[usize::from(*seat)].cost = NONE;
            rooms.begin(*seat);
        }
        if let Some(least) = kept.first() {
            let dearest = kept[n.max(1) - 1].0;
            self.reach = match self.reach {
                NONE if worth > WIDTH => dearest - least.0,
                NONE => NONE,
                reach if worth < WIDTH => reach.saturating_mul(2),
                reach if worth > 2 * WIDTH => reach / 4 * 3,
                reach => reach,
            };
            self.last = dearest;
        }
        let mut on = on;
        on.clear();
        on.extend(kept[..n].iter().map(|kept| kept.1));
        self.kept = kept;
        on
    }
}

/// The sum of each layer's least rate, from each boundary on.
fn rest(starts: &[Vec<(u16, u16)>], rates: &[u64]) -> Vec<u64> {
    let mut rest = vec![0; starts.len() + 1];
    let mut on: Vec<(u16, u64)> = Vec::new();
    let mut least = NONE;
    for (layer, starts) in starts.iter().enumerate() {
        let n = on.len();
        on.retain(|(until, _)| usize::from(*until) > layer);
        if on.len() < n {
            least = on.iter().map(|on| on.1).min().unwrap_or(NONE);
        }
        for (seat, until) in starts {
            let rate = rates[usize::from(*seat)];
            on.push((*until, rate));
            least = least.min(rate);
        }
        // No more than adds up.
        rest[layer] = least.min(NONE >> 16);
    }
    for layer in (0..starts.len()).rev() {
        rest[layer] += rest[layer + 1];
    }
    rest
}
