//! How many of something bounded each holder has taken: a bound for all and one for each, so that
//! nobody takes everything. Given back on drop. No clock, no I/O.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// What is taken, by whom. Clones share it.
pub(crate) struct Shares<K: Eq + Hash> {
    taken: Arc<Mutex<HashMap<K, usize>>>,
    all_max: usize,
    each_max: usize,
}

/// One of what is bounded, until it is dropped.
pub(crate) struct Share<K: Eq + Hash> {
    shares: Shares<K>,
    holder: K,
}

/// Why a holder gets no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoShare {
    /// All are taken.
    All {
        /// How many.
        taken: usize,
        /// The limit.
        max: usize,
    },
    /// This holder has its part.
    Each {
        /// How many it has.
        taken: usize,
        /// The limit.
        max: usize,
    },
}

impl<K: Eq + Hash + Clone> Shares<K> {
    /// `all_max` together, `each_max` for one holder.
    pub(crate) fn new(all_max: usize, each_max: usize) -> Self {
        Self {
            taken: Arc::default(),
            all_max,
            each_max,
        }
    }

    /// One more for `holder`.
    ///
    /// # Errors
    /// All are taken, or this holder has its part.
    pub(crate) fn take(&self, holder: K) -> Result<Share<K>, NoShare> {
        let mut counts = self.lock();
        let all = counts.values().sum();
        if all >= self.all_max {
            return Err(NoShare::All {
                taken: all,
                max: self.all_max,
            });
        }
        let taken = counts.get(&holder).copied().unwrap_or(0);
        if taken >= self.each_max {
            return Err(NoShare::Each {
                taken,
                max: self.each_max,
            });
        }
        counts.insert(holder.clone(), taken + 1);
        drop(counts);
        Ok(Share {
            shares: self.clone(),
            holder,
        })
    }

    /// How many are taken together.
    pub(crate) fn taken(&self) -> usize {
        self.lock().values().sum()
    }
}

impl<K: Eq + Hash> Shares<K> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, usize>> {
        // Counters whose every change is one call: no invariant spans a panic.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Clone for Shares<K> {
    fn clone(&self) -> Self {
        Self {
            taken: self.taken.clone(),
            ..*self
        }
    }
}

impl<K: Eq + Hash> Drop for Share<K> {
    fn drop(&mut self) {
        let mut counts = self.shares.lock();
        if let Some(n) = counts.get_mut(&self.holder) {
            *n = n.saturating_sub(1);
            if *n == 0 {
                counts.remove(&self.holder);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_everything_and_what_is_dropped_can_be_taken_again() {
        let shares = Shares::new(3, 2);
        let first = shares.take('a').ok();
        let _second = shares.take('a').ok();
        let each = NoShare::Each { taken: 2, max: 2 };
        assert_eq!(shares.take('a').err(), Some(each));
        let _third = shares.take('b').ok();
        let all = NoShare::All { taken: 3, max: 3 };
        assert_eq!(shares.take('c').err(), Some(all));
        drop(first);
        assert!(shares.take('a').is_ok());
        assert_eq!(shares.taken(), 2, "holders with nothing are forgotten");
        assert_eq!(shares.lock().len(), 2);
    }
}
