//! Draws from a seed.

use std::time::Duration;

use node::Random;

/// What a part of the simulation draws from. Each part has its own, so that one more draw in one of
/// them leaves the others as they were.
#[derive(Clone, Debug)]
pub(super) struct Dice(Random);

impl Dice {
    /// For part number `part` of the run with this seed.
    pub(super) fn new(seed: u64, part: u64) -> Self {
        Self(Random::seeded(part_seed(seed, part)))
    }

    /// From 0, below `n`; 0 where `n` is 0.
    pub(super) fn below(&self, n: usize) -> usize {
        (self.0.u64() % n.max(1) as u64) as usize
    }

    /// One of these.
    pub(super) fn pick<T: Copy>(&self, of: &[T]) -> Option<T> {
        of.get(self.below(of.len())).copied()
    }

    /// True so often in a hundred.
    pub(super) fn percent(&self, of_100: usize) -> bool {
        self.below(100) < of_100
    }

    /// From `least` up to `most`, in ms.
    pub(super) fn millis(&self, least: u64, most: u64) -> Duration {
        let range = most.saturating_sub(least).saturating_add(1);
        Duration::from_millis(least + self.0.u64() % range)
    }
}

/// A seed of its own for what the product draws.
pub(super) fn part_seed(seed: u64, part: u64) -> u64 {
    let hash = blake3::hash(&[seed.to_le_bytes(), part.to_le_bytes()].concat());
    let word = hash.as_bytes().first_chunk();
    word.map_or(0, |word| u64::from_le_bytes(*word))
}
