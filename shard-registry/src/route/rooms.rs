//! Ways in which peers have room for some of their layers only: which hops may still grow, and who is on a
//! way already.
//!
//! A hop that is cheaper now may run out of room earlier, so a peer has several open hops. A peer gets no more
//! layers of a way than it has room for: who has none left is not handed the rows again.

use std::cell::Cell;

use super::search::{NONE, Node, Ways};

/// A hop that may still grow.
#[derive(Clone, Copy)]
struct Open {
    start: u16,
    /// The layer that its peer has no room for any more, or does not hold.
    end: u16,
    /// Up to the layer that is looked at.
    cost: u64,
    /// Who is on its way.
    on: Marks,
}

/// A set of peers that says no, or perhaps: a bit for each, which several share.
type Marks = u128;

fn mark(seat: u16) -> Marks {
    1 << (seat % 128)
}

pub(super) struct Rooms {
    open: Vec<Vec<Open>>,
    /// Who is on the way of each giver, and on that of each who computes the layer behind.
    on: Vec<Marks>,
    next: Vec<Marks>,
    /// Whether a giver is passed over who used up the taker's room; else the cheapest gives, or nobody.
    pub(super) picky: bool,
    /// Whether some peer was on a way already that it could have been on again: what is found may not be the
    /// cheapest.
    pub(super) met: Cell<bool>,
}

impl Rooms {
    pub(super) fn of(n: usize) -> Self {
        Self {
            open: vec![Vec::new(); n],
            on: vec![0; n],
            next: vec![0; n],
            picky: true,
            met: Cell::new(false),
        }
    }

    /// A peer holds the next layer and did not hold the one before.
    pub(super) fn begin(&mut self, seat: u16) {
        self.open[usize::from(seat)].clear();
    }

    /// A boundary further.
    pub(super) fn turn(&mut self) {
        std::mem::swap(&mut self.on, &mut self.next);
    }

    fn with(&self, seat: u16, giver: u16) -> Marks {
        let before = giver.checked_sub(1);
        before.map_or(0, |giver| self.on[usize::from(giver)]) | mark(seat)
    }

    /// Whether nothing is left of the room of `taker` on the way to `giver`.
    pub(super) fn spent(&self, of: (&[Node], &Ways), giver: u16, taker: u16, layer: u16) -> bool {
        let node = &of.0[usize::from(taker)];
        self.picky && node.short && self.taken(of, giver, taker, layer) >= node.room
    }

    /// Layers that `taker` has on the way to `giver`.
    fn taken(&self, (nodes, ways): (&[Node], &Ways), giver: u16, taker: u16, layer: u16) -> u16 {
        if self.on[usize::from(giver)] & mark(taker) == 0 {
            return 0;
        }
        let hops = ways.hops(nodes, giver, layer);
        let of_taker = hops.filter(|(seat, _)| *seat == taker);
        let taken = of_taker.map(|(_, layers)| layers.len()).sum();
        self.met.set(self.met.get() || taken > 0);
        taken
    }

    /// The cheapest way to have `layer` computed by a peer: its cost before, and where the hop begins.
    pub(super) fn compute(
        &mut self,
        of: (&[Node], &Ways),
        layer: u16,
        seat: u16,
        entered: Option<(u64, u16)>,
    ) -> (u64, u16) {
        let node = &of.0[usize::from(seat)];
        if !node.short {
            let (on, way) = match entered {
                Some((cost, giver)) => (self.with(seat, giver), (cost, layer)),
                None => (self.on[usize::from(seat)], (node.cost, node.start)),
            };
            self.next[usize::from(seat)] = on;
            return way;
        }
        let new = entered.and_then(|(cost, giver)| {
            let before = giver.checked_sub(1);
            let taken = before.map_or(0, |giver| self.taken(of, giver, seat, layer));
            let room = node.room.saturating_sub(taken);
            (room > 0).then(|| Open {
                start: layer,
                end: node.until.min(layer.saturating_add(room)),
                cost,
                on: self.with(seat, giver),
            })
        });
        let open = &mut self.open[usize::from(seat)];
        open.retain(|hop| hop.end > layer);
        if let Some(new) = new
            && !open
                .iter()
                .any(|old| old.cost <= new.cost && old.end >= new.end)
        {
            open.retain(|old| new.cost > old.cost || new.end < old.end);
            open.push(new);
        }
        let Some(best) = open.iter().min_by_key(|hop| hop.cost).copied() else {
            return (NONE, layer);
        };
        for hop in open {
            hop.cost = (hop.cost + node.layer).min(NONE);
        }
        self.next[usize::from(seat)] = best.on;
        (best.cost, best.start)
    }
}
