//! Where very many hold a layer: what is left at least of a way, so that those which cannot be better than a route
//! that is known end.
//!
//! From the last boundary to the first, as if everybody were handed the rows by his nearest giver. Nothing is lost
//! by it: nobody is nearer than that. Where the cheapest way has one hop it is the answer already.

use swarm_proto::LayerRange;

use super::{
    links::Links,
    search::{HOP, NONE, Node},
    sweep::delay,
};

/// More holders of a layer than this, on average, are a crowd.
pub(super) const CROWD: u64 = 200;

/// What is left at least, and the way that would be the cheapest.
pub(super) struct Bound {
    /// By boundary and seat, of who computed the layer before it: what is left.
    left: Vec<u64>,
    n: usize,
    /// The hops of the way that would be the cheapest, the first one first.
    pub(super) hops: Vec<(u16, LayerRange)>,
    /// Ways that cost no less than this are not worth anything.
    pub(super) most: u64,
}

/// What is read of peers, by seat.
struct Columns {
    layer: Vec<u64>,
    send: Vec<u64>,
    /// Being entered by the nearest giver, and the layer.
    enter: Vec<u64>,
}

impl Bound {
    /// `starts` says whose layers begin at each layer and where they end.
    pub(super) fn of(
        nodes: &[Node],
        starts: &[Vec<(u16, u16)>],
        exits: &[u64],
        links: &Links,
    ) -> Option<Self> {
        let (n, n_layer) = (nodes.len(), starts.len());
        let known = nodes.iter().zip(exits).filter(|(_, exit)| **exit < NONE);
        let half = known.map(|(node, _)| node.half).min()?;
        let enter = |(seat, node): (u16, &Node)| {
            let nearest = links.nearest_giver(seat).map_or(NONE, delay);
            nearest.min(node.half + half) + node.enter + node.layer
        };
        let columns = Columns {
            layer: nodes.iter().map(|node| node.layer).collect(),
            send: nodes.iter().map(|node| node.send).collect(),
            enter: (0u16..).zip(nodes).map(enter).collect(),
        };
        let mut ends: Vec<Vec<u16>> = vec![Vec::new(); n_layer + 1];
        for (seat, until) in starts.iter().flatten() {
            ends[usize::from(*until)].push(*seat);
        }
        let mut here = vec![0; n];
        let mut left = vec![NONE; n * (n_layer + 1)];
        left[n * n_layer..].copy_from_slice(exits);
        // Of each boundary who would be handed the rows.
        let mut takers = vec![0; n_layer];
        for layer in (0..n_layer).rev() {
            for seat in &ends[layer + 1] {
                here[usize::from(*seat)] = u64::MAX;
            }
            let (before, behind) = left[n * layer..].split_at_mut(n);
            let least;
            (takers[layer], least) = columns.cross(&here, before, &behind[..n]);
            if least >= NONE {
                return None;
            }
            for (seat, _) in &starts[layer] {
                here[usize::from(*seat)] = 0;
            }
        }
        let mut bound = Bound {
            left,
            n,
            hops: Vec::new(),
            most: NONE,
        };
        bound.follow(nodes, starts, &columns, &takers);
        Some(bound)
    }

    /// What is left of ways from a boundary on, by seat.
    pub(super) fn left(&self, boundary: usize) -> &[u64] {
        &self.left[self.n * boundary..][..self.n]
    }

    /// Finds the hops of the way that would be the cheapest.
    fn follow(
        &mut self,
        nodes: &[Node],
        starts: &[Vec<(u16, u16)>],
        columns: &Columns,
        takers: &[u16],
    ) {
        let whole = |seat: u16| {
            let node = &nodes[usize::from(seat)];
            node.half + node.enter + node.layer + self.left(1)[usize::from(seat)]
        };
        let first = starts[0].iter().map(|(seat, _)| *seat);
        let Some(mut seat) = first.min_by_key(|seat| whole(*seat)) else {
            return;
        };
        let n_layer = starts.len();
        let (mut hops, mut start) = (Vec::new(), 0);
        let mut until = starts[0]
            .iter()
            .find(|(of, _)| *of == seat)
            .map_or(0, |(_, until)| usize::from(*until));
        for (layer, taker) in takers.iter().enumerate().skip(1) {
            let at = usize::from(seat);
            let on = self.left(layer + 1)[at] + columns.layer[at];
            if until > layer && on == self.left(layer)[at] {
                continue;
            }
            hops.push((seat, range(start, layer)));
            (seat, start) = (*taker, layer);
            let spans = starts[..=layer].iter().flatten();
            let ends = spans.filter(|(of, until)| *of == seat && usize::from(*until) > layer);
            until = ends
                .map(|(_, until)| usize::from(*until))
                .min()
                .unwrap_or(0);
        }
        hops.push((seat, range(start, n_layer)));
        self.hops = hops;
    }
}

impl Columns {
    /// What is left before a layer, from what is left behind it; and who would be handed the rows, for how much.
    fn cross(&self, here: &[u64], before: &mut [u64], behind: &[u64]) -> (u16, u64) {
        let columns = self.enter.iter().zip(behind).zip(here);
        let mut least = NONE;
        for ((enter, behind), here) in columns {
            least = least.min(enter.wrapping_add(*behind) | !here >> 1);
        }
        let mut columns = self.enter.iter().zip(behind);
        let taker = columns.position(|(enter, behind)| enter.wrapping_add(*behind) == least);
        let columns = before.iter_mut().zip(behind).zip(here);
        for (((before, behind), here), (layer, send)) in
            columns.zip(self.layer.iter().zip(&self.send))
        {
            let on = layer.wrapping_add(*behind) | !here >> 1;
            *before = on.min(send.wrapping_add(least));
        }
        (taker.unwrap_or(0) as u16, least)
    }
}

/// The cheapest way of one hop, where somebody holds all layers.
pub(super) fn alone(
    nodes: &[Node],
    starts: &[Vec<(u16, u16)>],
    exits: &[u64],
) -> Option<(u64, u16)> {
    let n_layer = starts.len();
    let all = starts.first()?.iter();
    let all = all.filter(|(_, until)| usize::from(*until) >= n_layer);
    let whole = |seat: u16| {
        let node = &nodes[usize::from(seat)];
        let layers = node.layer.saturating_mul(n_layer as u64).min(NONE);
        node.half + node.enter + layers + exits[usize::from(seat)]
    };
    all.map(|(seat, _)| (whole(*seat), *seat)).min()
}

fn range(start: usize, end: usize) -> LayerRange {
    LayerRange {
        start: start as u16,
        end: end as u16,
    }
}

/// A route's price as a search adds it up.
pub(super) fn priced(ns: u64, hops: usize) -> u64 {
    super::search::word(ns) + HOP * hops as u64
}
