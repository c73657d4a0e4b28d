//! The search where everybody has room for all he holds: a boundary is crossed by all peers at once.
//!
//! ```text
//! seats     … ended │ who holds the layer …          │ begin later …
//! on          what going on costs, or being handed the rows by the cheapest giver
//! measured    who was measured by a giver may be handed them for less: few, one by one
//! computed    on + layer ─▶ what each of them gives for
//! ```
//!
//! Seats follow each other as their layers do, so that a boundary concerns a window of them; figures are in
//! columns and choices are minima, so that a compiler makes vector instructions of all but the measured delays.

use swarm_proto::LayerRange;

use super::{
    bound::Bound,
    links::Links,
    search::{GIVERS, NONE, Node, WHO, giver, word},
    table::half,
};

/// Of a seat that holds the layer all bits, of others none.
type Mask = u64;

/// What a search reads and writes of peers, by seat.
pub(super) struct Sweep<'l> {
    links: &'l Links,
    layer: Vec<u64>,
    half: Vec<u64>,
    enter: Vec<u64>,
    /// Sending, with who gives.
    give: Vec<u64>,
    /// The shortest delay that was measured.
    near: Vec<u64>,
    here: Vec<Mask>,
    /// The cheapest way on which it computed the layer before the boundary.
    cost: Vec<u64>,
    /// The same with what sending costs, and by whom.
    given: Vec<u64>,
    /// What being handed rows, or going on, costs, and by whom.
    taken: Vec<u64>,
    /// The cheapest for any taker whose delay was not measured.
    at_hand: [u64; GIVERS],
    /// Who may be cheaper for somebody whose delay was measured.
    givers: Vec<u16>,
    /// Seats between which somebody computed the layer before, or computes the next.
    from: usize,
    to: usize,
    ways: Ways,
}

/// By layer and seat, who gave the rows, counted from 1; 0: nobody, its hop went on.
#[derive(Default)]
struct Ways {
    givers: Vec<u16>,
    /// Of each layer where its seats begin, and the first of them.
    layers: Vec<(usize, usize)>,
}

impl Ways {
    fn at(&self, layer: u16, seat: u16) -> u16 {
        let (begin, first) = self.layers[usize::from(layer)];
        self.givers[begin + usize::from(seat) - first]
    }

    /// The hops of the way on which `seat` computes the layer before `end`, the last one first.
    fn hops(&self, seat: u16, end: u16) -> impl Iterator<Item = (u16, LayerRange)> {
        let mut next = Some((seat, end));
        std::iter::from_fn(move || {
            let (seat, end) = next?;
            let before = (1..end).rev().map(|layer| (layer, self.at(layer, seat)));
            let entered = before.into_iter().find(|(_, giver)| *giver > 0);
            next = entered.map(|(layer, giver)| (giver - 1, layer));
            let start = entered.map_or(0, |(layer, _)| layer);
            Some((seat, LayerRange { start, end }))
        })
    }
}

impl<'l> Sweep<'l> {
    pub(super) fn of(nodes: &[Node], links: &'l Links) -> Self {
        let column = |of: fn(&Node) -> u64| nodes.iter().map(of).collect::<Vec<u64>>();
        let near = |seat: u16| {
            let nearest = links.takers(seat).first();
            nearest.map_or(NONE, |link| delay(link.rtt_us))
        };
        let seats = 0..nodes.len() as u16;
        let who = |(seat, node): (u16, &Node)| node.send + u64::from(seat) + 1;
        Self {
            links,
            layer: column(|node| node.layer),
            half: column(|node| node.half),
            enter: column(|node| node.enter),
            give: seats.clone().zip(nodes).map(who).collect(),
            near: seats.map(near).collect(),
            here: vec![0; nodes.len()],
            cost: vec![NONE; nodes.len()],
            given: vec![NONE; nodes.len()],
            taken: vec![0; nodes.len()],
            at_hand: [NONE; GIVERS],
            givers: vec![0; nodes.len()],
            from: nodes.len(),
            to: 0,
            ways: Ways::default(),
        }
    }

    /// The cheapest way and its hops, the last one first. `starts` says whose layers begin at each layer and where
    /// they end; with a bound only a way that costs less is found.
    pub(super) fn run(
        &mut self,
        starts: &[Vec<(u16, u16)>],
        exits: &[u64],
        wanted: impl Fn(u16) -> bool,
        bound: Option<&Bound>,
    ) -> Option<(u64, Vec<(u16, LayerRange)>)> {
        let n_layer = starts.len();
        let mut ends: Vec<Vec<u16>> = vec![Vec::new(); n_layer + 1];
        for (layer, starts) in starts.iter().enumerate() {
            for seat in &ends[layer] {
                self.here[usize::from(*seat)] = 0;
            }
            for (seat, until) in starts.iter().filter(|(seat, _)| wanted(*seat)) {
                let at = usize::from(*seat);
                (self.here[at], self.cost[at]) = (Mask::MAX, NONE);
                (self.from, self.to) = (self.from.min(at), self.to.max(at + 1));
                ends[usize::from(*until).min(n_layer)].push(*seat);
            }
            if layer == 0 {
                self.begin();
            } else {
                let bound = bound.map(|bound| (bound.left(layer + 1), bound.most));
                let most = self.offer(bound);
                self.hand_over(most);
            }
            self.compute();
            if let Some(bound) = bound {
                self.end(bound.left(layer + 1), bound.most);
            }
            self.at_hand();
            if self.at_hand[0] >= NONE {
                return None;
            }
            while self.here.get(self.from) == Some(&0) {
                self.from += 1;
            }
        }
        let whole = |seat: usize| self.cost[seat] + exits[seat];
        let last = (self.from..self.to).min_by_key(|seat| whole(*seat))?;
        let hops = self.ways.hops(last as u16, n_layer as u16).collect();
        Some((whole(last), hops))
    }

    /// The client hands over.
    fn begin(&mut self) {
        let of = self.from..self.to;
        for ((taken, half), here) in self.taken[of.clone()]
            .iter_mut()
            .zip(&self.half[of.clone()])
            .zip(&self.here[of])
        {
            *taken = half & here;
        }
    }

    /// What going on costs, or being handed the rows by the cheapest giver whose delay was not measured; the
    /// largest of it.
    fn offer(&mut self, bound: Option<(&[u64], u64)>) -> u64 {
        let of = self.from..self.to;
        let first = self.at_hand[0];
        // What is worth anything.
        match bound {
            None => self.taken[of.clone()].fill(NONE),
            Some((left, most)) => {
                let columns = self.taken[of.clone()].iter_mut().zip(&left[of.clone()]);
                let columns = columns.zip(&self.enter[of.clone()]);
                for (((taken, left), enter), layer) in columns.zip(&self.layer[of.clone()]) {
                    let behind = left.wrapping_add(*enter).wrapping_add(*layer);
                    *taken = most.saturating_sub(behind);
                }
            }
        }
        let columns = self.taken[of.clone()].iter_mut();
        let columns = columns.zip(&self.cost[of.clone()]);
        let columns = columns.zip(&self.enter[of.clone()]);
        let columns = columns.zip(&self.half[of.clone()]);
        let mut most = 0;
        for ((((taken, cost), enter), half), here) in columns.zip(&self.here[of]) {
            // A hop contains what entering it cost.
            let on = cost.wrapping_sub(*enter).min(*taken);
            *taken = on.min(first.wrapping_add(*half)) & here;
            most = most.max(*taken);
        }
        let Some(who) = giver(first) else { return most };
        for link in self.links.takers(who) {
            let at = usize::from(link.to);
            if self.taken[at] & WHO == first & WHO && self.here[at] > 0 {
                let mut on = self.cost[at] - self.enter[at];
                if let Some((left, most)) = bound {
                    let behind = left[at] + self.enter[at] + self.layer[at];
                    on = on.min(most.saturating_sub(behind));
                }
                self.taken[at] = self.unmeasured(link.to, on);
                most = most.max(self.taken[at]);
            }
        }
        most
    }

    /// The cheapest giver but the first at hand whose delay to `taker` was not measured, where that is less than
    /// `least`.
    fn unmeasured(&self, taker: u16, least: u64) -> u64 {
        let half = self.half[usize::from(taker)];
        let may = |giver: u16| giver != taker && !self.links.measured(giver, taker);
        for given in &self.at_hand[1..] {
            if given + half >= least {
                return least;
            }
            if giver(*given).is_some_and(may) {
                return given + half;
            }
        }
        // Those at hand are measured, and there may be others.
        let given = |seat: usize| self.given[seat] + self.half[seat];
        let others = (self.from..self.to).filter(|seat| given(*seat) + half < least);
        let others = others.filter(|seat| may(*seat as u16)).map(given);
        others.min().map_or(least, |given| given + half)
    }

    /// Hands the rows over to those whose delay was measured, where that is cheaper.
    fn hand_over(&mut self, most: u64) {
        let of = self.from..self.to;
        let mut n = 0;
        let columns = self.given[of.clone()].iter().zip(&self.near[of.clone()]);
        for (seat, (given, near)) in (of.start as u16..).zip(columns) {
            // Without a branch: nobody could foretell it.
            self.givers[n] = seat;
            n += usize::from(given.wrapping_add(*near) < most);
        }
        for seat in &self.givers[..n] {
            let given = self.given[usize::from(*seat)];
            for link in self.links.takers(*seat) {
                let offer = given.wrapping_add(delay(link.rtt_us));
                if offer >= most {
                    break;
                }
                let taken = &mut self.taken[usize::from(link.to)];
                *taken = offer.min(*taken);
            }
        }
    }

    /// The cheapest way to have the layer computed by each holder of it.
    fn compute(&mut self) {
        let of = self.from..self.to;
        let begin = (self.ways.givers.len(), of.start);
        self.ways.layers.push(begin);
        let taken = &self.taken[of.clone()];
        let givers = taken.iter().map(|taken| (taken & WHO) as u16);
        self.ways.givers.extend(givers);
        let columns = self.cost[of.clone()].iter_mut();
        let columns = columns.zip(&mut self.given[of.clone()]).zip(taken);
        let columns = columns.zip(&self.enter[of.clone()]);
        let columns = columns.zip(&self.layer[of.clone()]);
        let columns = columns.zip(&self.give[of.clone()]);
        for ((((((cost, given), taken), enter), layer), give), here) in columns.zip(&self.here[of])
        {
            let way = (taken & !WHO).wrapping_add(*enter).wrapping_add(*layer);
            *cost = if *here == 0 { NONE } else { way.min(NONE) };
            *given = cost.wrapping_add(*give);
        }
    }

    /// Ends ways that cost no less than is worth anything.
    fn end(&mut self, left: &[u64], most: u64) {
        let of = self.from..self.to;
        let columns = self.cost[of.clone()].iter_mut();
        let columns = columns.zip(&mut self.given[of.clone()]);
        for ((cost, given), left) in columns.zip(&left[of]) {
            let over = cost.wrapping_add(*left) >= most;
            *cost = if over { NONE } else { *cost };
            *given = if over { NONE } else { *given };
        }
    }

    /// Finds the cheapest givers.
    fn at_hand(&mut self) {
        let of = self.from..self.to;
        self.at_hand = [NONE; GIVERS];
        for (given, half) in self.given[of.clone()].iter().zip(&self.half[of]) {
            let mut new = given.wrapping_add(*half);
            if new < self.at_hand[GIVERS - 1] {
                for slot in &mut self.at_hand {
                    if new < *slot {
                        std::mem::swap(&mut new, slot);
                    }
                }
            }
        }
    }
}

/// One way of a round trip.
pub(super) fn delay(rtt_us: u32) -> u64 {
    u64::from(rtt_us).wrapping_mul(word(half(1)))
}
