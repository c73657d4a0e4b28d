//! Where what is drawn by chance comes from: the system, or a seed, which a simulation runs again from.

use std::sync::{Arc, Mutex, PoisonError};

use rand::{Rng, SeedableRng, rngs::StdRng};

/// A source of random numbers. Clones draw from the same one.
#[derive(Clone)]
pub struct Random(Arc<Mutex<StdRng>>);

impl Random {
    /// Seeded by the system: nobody can guess what comes.
    pub fn of_system() -> Self {
        Self::of(StdRng::from_seed(rand::random()))
    }

    /// The same numbers for the same seed.
    pub fn seeded(seed: u64) -> Self {
        Self::of(StdRng::seed_from_u64(seed))
    }

    /// Any number.
    pub fn u64(&self) -> u64 {
        self.lock().next_u64()
    }

    /// Any bytes.
    pub fn bytes<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.lock().fill_bytes(&mut bytes);
        bytes
    }

    /// From 0 up to 1.
    pub fn fraction(&self) -> f64 {
        // As many bits as an f64 holds exactly.
        (self.u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn of(rng: StdRng) -> Self {
        Self(Arc::new(Mutex::new(rng)))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, StdRng> {
        // A draw is one call: no invariant spans a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Random {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Random")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_again_and_the_system_never_does() {
        let draw = |random: Random| (random.u64(), random.bytes::<16>(), random.fraction());
        assert_eq!(draw(Random::seeded(7)), draw(Random::seeded(7)));
        assert_ne!(draw(Random::seeded(7)), draw(Random::seeded(8)));
        assert_ne!(draw(Random::of_system()), draw(Random::of_system()));
        let random = Random::seeded(1);
        assert!((0..1000).all(|_| (0.0..1.0).contains(&random.fraction())));
    }
}
