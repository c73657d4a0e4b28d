//! How often each expert was picked: measured, to say which of them another holder would help.

use std::sync::atomic::{AtomicU64, Ordering};

use swarm_proto::{HotExpert, experts::HOT_EXPERTS_MAX};

use super::table::Shape;

/// Picks of a layer without which nothing is said of it: fewer are chance.
const PICKS_MIN: u64 = 400;
/// Picks of a layer, by its experts, after which older ones count half: use changes with what is asked.
const REMEMBERED: u64 = 1 << 16;

/// The counts.
pub(super) struct Usage {
    total: Vec<AtomicU64>,
    recent: Vec<AtomicU64>,
    /// Of each layer, of what is recent.
    layers: Vec<AtomicU64>,
}

impl Usage {
    pub(super) fn new(shape: &Shape) -> Self {
        let zeros = |n| (0..n).map(|_| AtomicU64::new(0)).collect();
        Self {
            total: zeros(shape.len()),
            recent: zeros(shape.len()),
            layers: zeros(shape.layers().len()),
        }
    }

    /// The expert at a place was picked for so many rows.
    pub(super) fn picked(&self, shape: &Shape, at: usize, rows: u64) {
        let n_expert = usize::from(shape.n_expert()).max(1);
        let slot = at / n_expert;
        let (Some(total), Some(recent), Some(layer)) = (
            self.total.get(at),
            self.recent.get(at),
            self.layers.get(slot),
        ) else {
            return;
        };
        total.fetch_add(rows, Ordering::Relaxed);
        recent.fetch_add(rows, Ordering::Relaxed);
        if layer.fetch_add(rows, Ordering::Relaxed) + rows > REMEMBERED {
            // A pick that another thread counts just now may be lost: these are shares.
            let of_layer = self.recent.iter().skip(slot * n_expert).take(n_expert);
            let mut sum = 0;
            for recent in of_layer {
                let half = recent.load(Ordering::Relaxed) / 2;
                recent.store(half, Ordering::Relaxed);
                sum += half;
            }
            layer.store(sum, Ordering::Relaxed);
        }
    }

    /// Rows of each expert, in the order of their places.
    pub(super) fn total(&self) -> impl Iterator<Item = u64> {
        self.total.iter().map(|rows| rows.load(Ordering::Relaxed))
    }

    /// Experts picked at least half again as often as a fair share, and by more than chance, the most picked
    /// first.
    pub(super) fn hot(&self, shape: &Shape) -> Vec<HotExpert> {
        let n_expert = usize::from(shape.n_expert()).max(1);
        let mut hot = Vec::new();
        for (layer, picks) in shape.layers().iter().zip(self.recent.chunks(n_expert)) {
            let picks: Vec<u64> = picks.iter().map(|n| n.load(Ordering::Relaxed)).collect();
            let all: u64 = picks.iter().sum();
            if all < PICKS_MIN {
                continue;
            }
            let fair = all as f64 / n_expert as f64;
            for (expert, n) in (0u16..).zip(picks) {
                let over = n as f64 - fair;
                if over >= 0.5 * fair && over >= 4.0 * fair.sqrt() {
                    hot.push(HotExpert {
                        layer: *layer,
                        expert,
                        per_mille: u16::try_from(n * 1000 / all).unwrap_or(1000),
                    });
                }
            }
        }
        hot.sort_by_key(|hot| (std::cmp::Reverse(hot.per_mille), hot.layer, hot.expert));
        hot.truncate(HOT_EXPERTS_MAX);
        hot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_picked_more_than_its_share_is_hot_and_chance_is_not() {
        let shape = Shape::new(&[1, 4], 8);
        let usage = Usage::new(&shape);
        let pick = |layer, expert, rows| {
            usage.picked(&shape, shape.at(layer, expert).unwrap(), rows);
        };
        (0..8).for_each(|expert| pick(1, expert, 20 + u64::from(expert)));
        pick(1, 2, 300);
        assert_eq!(usage.hot(&shape).len(), 1);
        let hot = usage.hot(&shape)[0];
        assert_eq!((hot.layer, hot.expert), (1, 2));
        assert_eq!(hot.per_mille, (322 * 1000 / 488) as u16);
        (0..8).for_each(|expert| pick(4, expert, 60 + 3 * u64::from(expert)));
        assert_eq!(usage.hot(&shape).len(), 1, "81 instead of 70 is chance");
        // Later another one is: what was is forgotten.
        for _ in 0..3000 {
            pick(1, 5, 100);
            pick(1, 0, 90);
        }
        let hot: Vec<_> = usage.hot(&shape).iter().map(|hot| hot.expert).collect();
        assert_eq!(hot, [5, 0]);
        assert_eq!(usage.total().nth(2), Some(322), "and not from the total");
        assert!(usage.layers[0].load(Ordering::Relaxed) <= REMEMBERED);
    }
}
