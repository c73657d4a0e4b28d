//! Who should hold which experts.
//!
//! Each layer waits for the holder that is done last, so what counts is that the picks of every single layer are
//! spread evenly, not that the sum over layers is.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap},
};

use super::{
    cost::Machine,
    shape::{ExpertUse, MixtureShape},
};

/// An expert of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExpertId {
    /// Of which layer.
    pub layer: u16,
    /// Which.
    pub expert: u16,
}

/// What somebody holds.
pub type ExpertSet = BTreeSet<ExpertId>;

/// The experts do not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes of experts do not fit {room} bytes of {n_holders} holders")]
pub struct NoRoom {
    /// Of all experts.
    pub bytes: u64,
    /// Of all holders.
    pub room: u64,
    /// How many there are.
    pub n_holders: usize,
}

/// Deals all experts out to `holders`, each one once: in every layer the ones that are used most first, each to the
/// holder that is done first with what it has of that layer, as far as its memory's share of the layers goes. What
/// memory is left is filled with second and further copies of the experts that are used most. The same input gives
/// the same sets.
///
/// # Errors
/// They do not fit.
pub fn assign_experts(
    shape: &MixtureShape,
    used: &ExpertUse,
    holders: &[Machine],
) -> Result<Vec<ExpertSet>, NoRoom> {
    let n_expert = u64::from(shape.n_expert);
    let bytes = shape
        .layers
        .iter()
        .map(|layer| layer.expert_bytes * n_expert);
    let bytes: u64 = bytes.sum();
    let room: u64 = holders.iter().map(|holder| holder.memory_bytes).sum();
    let no_room = || NoRoom {
        bytes,
        room,
        n_holders: holders.len(),
    };
    let mut dealt = Dealt {
        sets: vec![ExpertSet::new(); holders.len()],
        left: holders.iter().map(|holder| holder.memory_bytes).collect(),
        holders,
    };
    // Bytes of experts up to this layer: so much of its memory each may have used.
    let mut up_to = 0;
    for (layer, of) in (0u16..).zip(&shape.layers) {
        up_to += of.expert_bytes * n_expert;
        let mut busy = vec![0.0; holders.len()];
        for (share, id) in hottest(shape, used, layer) {
            if !of.has_experts() {
                break;
            }
            let may = |at: &usize| {
                let has = holders[*at].memory_bytes;
                let quota = u128::from(has) * u128::from(up_to) / u128::from(bytes.max(1));
                u128::from(has - dealt.left[*at] + of.expert_bytes) <= quota
            };
            let to = dealt.first_done(&busy, share, of.expert_bytes, may);
            // Whole experts do not divide evenly: then whoever has room.
            let to = to.or_else(|| dealt.first_done(&busy, share, of.expert_bytes, |_| true));
            let to = to.ok_or_else(no_room)?;
            busy[to] += share / holders[to].read_bytes_s.max(1.0);
            dealt.give(to, id, of.expert_bytes);
        }
    }
    dealt.copy(shape, used);
    Ok(dealt.sets)
}

/// The experts of a layer, the one that is used most first.
fn hottest(shape: &MixtureShape, used: &ExpertUse, layer: u16) -> Vec<(f64, ExpertId)> {
    let expert = |expert| {
        let share = used.share(shape, layer, expert);
        (share, ExpertId { layer, expert })
    };
    let mut experts: Vec<_> = (0..shape.n_expert).map(expert).collect();
    experts.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    experts
}

struct Dealt<'a> {
    sets: Vec<ExpertSet>,
    /// Bytes.
    left: Vec<u64>,
    holders: &'a [Machine],
}

impl Dealt<'_> {
    fn give(&mut self, to: usize, id: ExpertId, bytes: u64) {
        self.sets[to].insert(id);
        self.left[to] -= bytes;
    }

    /// Who is done first with one more of `share`; of those the one with the most room.
    fn first_done(
        &self,
        busy: &[f64],
        share: f64,
        bytes: u64,
        may: impl Fn(&usize) -> bool,
    ) -> Option<usize> {
        let done = |at: usize| busy[at] + share / self.holders[at].read_bytes_s.max(1.0);
        let able = (0..busy.len()).filter(|at| self.left[*at] >= bytes && may(at));
        able.min_by(|a, b| {
            let time = done(*a).total_cmp(&done(*b));
            time.then(self.left[*b].cmp(&self.left[*a])).then(a.cmp(b))
        })
    }

    /// Fills what is left: each time the expert with the most use for each copy, where there is most room.
    fn copy(&mut self, shape: &MixtureShape, used: &ExpertUse) {
        let rank = |share: f64, copies: u32| (share / f64::from(copies) * 1e12) as u64;
        let mut hot = BinaryHeap::new();
        for (layer, of) in (0u16..).zip(&shape.layers) {
            for (share, id) in hottest(shape, used, layer) {
                if of.has_experts() {
                    hot.push((rank(share, 1), Reverse(id), 1));
                }
            }
        }
        while let Some((_, Reverse(id), copies)) = hot.pop() {
            let bytes = shape.layers[usize::from(id.layer)].expert_bytes;
            let able = (0..self.left.len())
                .filter(|at| self.left[*at] >= bytes && !self.sets[*at].contains(&id));
            let to = able.min_by(|a, b| self.left[*b].cmp(&self.left[*a]).then(a.cmp(b)));
            // Who finds no room now finds none later.
            let Some(to) = to else { continue };
            self.give(to, id, bytes);
            let share = used.share(shape, id.layer, id.expert);
            hot.push((rank(share, copies + 1), Reverse(id), copies + 1));
        }
    }
}
