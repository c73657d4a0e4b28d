//! How much each node may hold: uneven spans from a seed, as pure numbers.
//!
//! The point of a testnet is a model that no node holds and a route of several hops, so no span reaches half of the
//! model (where there are nodes enough). The first nodes get the largest span, so that few of them cover the model.
//! Where nodes are to fail, every layer is held several times.

use std::ops::Range;

/// A small seeded generator (splitmix64), so that a run can be repeated from the seed it prints.
#[derive(Clone, Debug)]
pub struct Seeded(u64);

impl Seeded {
    /// A generator for `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound` (0 for a bound of 0).
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64().checked_rem(bound).unwrap_or(0)
    }
}

/// The largest span that still makes every route take three hops, or, with too few nodes for that, the smallest
/// with which they cover the model.
pub fn span_max(n_layer: u32, nodes: u32) -> u32 {
    let three_hops = n_layer.saturating_sub(1) / 2;
    let coverable = n_layer.div_ceil(nodes.max(1));
    three_hops.max(coverable).max(1)
}

/// How many layers each of `nodes` may hold, from `seed`.
pub fn spans(n_layer: u32, nodes: u32, seed: u64) -> Vec<u32> {
    let max = span_max(n_layer, nodes);
    let covering = n_layer.div_ceil(max);
    let mut seeded = Seeded::new(seed);
    (0..nodes)
        .map(|node| {
            let drawn = 1 + u32::try_from(seeded.below(u64::from(max))).unwrap_or(0);
            if node < covering { max } else { drawn }
        })
        .collect()
}

/// The least number of nodes with which every layer has two holders.
pub const NODES_FOR_COPIES: u32 = 2 * HOPS;

/// Parts into which a copy of the model is cut: what is before, in and after the middle of a route.
const HOPS: u32 = 3;

/// The layers of each of `nodes`, so that the model is held `nodes / 3` times: each copy cut into three (a model of
/// fewer layers into as many), one layer off here and there so that copies do not fit together at each cut. Nodes
/// that are left hold the first part.
pub fn copies(n_layer: u32, nodes: u32, seed: u64) -> Vec<Range<u32>> {
    let parts = HOPS.min(n_layer).max(1);
    let mut seeded = Seeded::new(seed);
    let mut spans = Vec::new();
    while spans.len() < nodes as usize {
        let mut start = 0;
        for part in 1..=parts {
            let even = (n_layer * part).div_ceil(parts);
            // With two layers a part, a cut can move by one and leave both sides something.
            let moved = if part < parts && n_layer >= 2 * parts {
                u32::try_from(seeded.below(3)).unwrap_or(1)
            } else {
                1
            };
            let end = even + moved - 1;
            spans.push(start..end);
            start = end;
        }
    }
    spans.truncate(nodes as usize);
    spans
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_model_takes_three_hops_and_is_covered() {
        for nodes in [3, 4, 24, 36] {
            let spans = spans(8, nodes, 1);
            assert_eq!(spans.len(), nodes as usize);
            assert!(spans.iter().all(|span| (1..=3).contains(span)), "{spans:?}");
            assert!(spans.iter().sum::<u32>() >= 8, "{spans:?}");
        }
    }

    #[test]
    fn copies_hold_every_layer_several_times_and_no_span_is_empty() {
        for (n_layer, nodes, seed) in [
            (8, 6, 1),
            (8, 12, 1),
            (8, 13, 2),
            (3, 6, 1),
            (5, 7, 3),
            (1, 6, 1),
            (80, 9, 4),
        ] {
            let spans = copies(n_layer, nodes, seed);
            assert_eq!(spans.len(), nodes as usize);
            assert!(spans.iter().all(|span| !span.is_empty()), "{spans:?}");
            for layer in 0..n_layer {
                let holders = spans.iter().filter(|span| span.contains(&layer)).count();
                assert!(holders >= nodes as usize / 3, "{layer}: {spans:?}");
            }
        }
        assert_ne!(copies(8, 12, 1), copies(8, 12, 2));
    }

    #[test]
    fn few_nodes_still_cover() {
        assert_eq!(spans(8, 1, 1), [8]);
        assert_eq!(spans(8, 2, 1), [4, 4]);
        assert_eq!(spans(1, 3, 1), [1, 1, 1]);
    }

    #[test]
    fn spans_are_uneven_and_a_seed_repeats_them() {
        let first = spans(8, 24, 7);
        assert_eq!(first, spans(8, 24, 7));
        assert!((1..=3).all(|span| first.contains(&span)), "{first:?}");
        assert_ne!(first, spans(8, 24, 8));
    }
}
