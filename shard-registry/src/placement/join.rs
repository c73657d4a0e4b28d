//! What a node does that comes: which window it takes, and in which order it loads its layers.
//!
//! Petals' rule, "the window whose sorted throughput is lexicographically smallest" (Borzunov et al.,
//! "Distributed inference and fine-tuning of large language models over the internet", 2023, section
//! 3.2), with three changes: a holder gives each layer its even share and at most its uplink, what is
//! intended counts, and what is near counts twice. Layers are loaded one by one, the scarcest first,
//! each served as soon as it is there: under churn that is what matters most (docs/decisions/0070).

use std::{cmp::Ordering, ops::Range};

use swarm_proto::Peer;

use super::draw::draw;

/// The window whose layers are covered worst: its sorted coverage is the smallest, a longer window
/// before its own beginning. Between equals each peer draws its own, from its id, so that nodes that
/// start together spread. `coverage` is that of [`super::Holdings::coverage`] with
/// [`super::Count::Held`]; layers beyond its end count as not covered. `None` where there is no window.
pub fn choose(windows: &[Range<u16>], coverage: &[f64], me: Peer) -> Option<Range<u16>> {
    let sorted = |window: &Range<u16>| {
        let rows_s = |layer| coverage.get(usize::from(layer)).copied().unwrap_or(0.0);
        let mut sorted: Vec<f64> = window.clone().map(rows_s).collect();
        sorted.sort_unstable_by(f64::total_cmp);
        sorted
    };
    let tie = |window: &Range<u16>| draw("window", me, window.start.into());
    let ranked = windows.iter().map(|window| (sorted(window), window));
    let best = ranked.min_by(|(x, a), (y, b)| weaker(x, y).then_with(|| tie(a).cmp(&tie(b))));
    best.map(|(_, window)| window.clone())
}

/// Lexicographic, but the longer one first where one is the beginning of the other.
fn weaker(x: &[f64], y: &[f64]) -> Ordering {
    let mut pairs = x.iter().zip(y).map(|(x, y)| x.total_cmp(y));
    let unequal = pairs.find(|order| order.is_ne());
    unequal.unwrap_or_else(|| y.len().cmp(&x.len()))
}

/// Which of these layers to load next: the one that is covered worst now. Asked again after each
/// layer, with a fresh snapshot. Between equals each peer draws its own. `coverage` is of what is live,
/// see [`super::Count::Live`]. `None` where none is left.
pub fn scarcest(left: &[u16], coverage: &[f64], me: Peer) -> Option<u16> {
    let rows_s = |layer: u16| coverage.get(usize::from(layer)).copied().unwrap_or(0.0);
    let tie = |layer: u16| draw("load", me, layer.into());
    let order = |a: &u16, b: &u16| {
        let by_coverage = rows_s(*a).total_cmp(&rows_s(*b));
        by_coverage.then_with(|| tie(*a).cmp(&tie(*b)))
    };
    left.iter().copied().min_by(order)
}
