//! Which ranges of a shard are still to be had, and who is at which. What somebody is slow with is given to somebody
//! else too, once there is nothing else to do: the same bytes may come twice, never wrong ones. Pure: time is
//! passed in.

use std::{
    collections::VecDeque,
    ops::Range,
    time::{Duration, Instant},
};

/// A range that takes longer is given to a second holder when one has nothing to do.
pub(super) const SLOW: Duration = Duration::from_secs(2);
/// Holders that are at one range at most.
const COPIES_MAX: usize = 2;

/// The ranges of one shard.
#[derive(Debug)]
pub(super) struct Ranges {
    todo: VecDeque<Range<u32>>,
    flying: Vec<Flying>,
}

#[derive(Debug)]
struct Flying {
    range: Range<u32>,
    /// From when on it is given to a second holder.
    slow_at: Instant,
    /// By the number of whoever is at it.
    by: Vec<u64>,
}

impl Ranges {
    /// In this order, so that who comes after us finds the beginning here first.
    pub(super) fn new(missing: Vec<Range<u32>>) -> Self {
        Self {
            todo: missing.into(),
            flying: Vec::new(),
        }
    }

    /// The next range for `who`, or one that somebody else is slow with. What `silent` holders are given, others
    /// need not wait for.
    pub(super) fn next(&mut self, who: u64, silent: bool, now: Instant) -> Option<Range<u32>> {
        if let Some(range) = self.todo.pop_front() {
            self.flying.push(Flying {
                range: range.clone(),
                slow_at: if silent { now } else { now + SLOW },
                by: vec![who],
            });
            return Some(range);
        }
        let slow = self.flying.iter_mut().filter(|flying| {
            now >= flying.slow_at && flying.by.len() < COPIES_MAX && !flying.by.contains(&who)
        });
        let slowest = slow.min_by_key(|flying| flying.slow_at)?;
        slowest.by.push(who);
        Some(slowest.range.clone())
    }

    /// All of it is here.
    pub(super) fn done(&mut self, range: &Range<u32>) {
        self.flying.retain(|flying| flying.range != *range);
    }

    /// `who` does not bring it; what comes before group `from` is here.
    pub(super) fn give_back(&mut self, range: &Range<u32>, from: u32, who: u64) {
        let Some(i) = self.flying.iter().position(|flying| flying.range == *range) else {
            return;
        };
        let flying = &mut self.flying[i];
        flying.by.retain(|other| *other != who);
        if flying.by.is_empty() {
            let flying = self.flying.swap_remove(i);
            if from < flying.range.end {
                self.todo.push_front(from..flying.range.end);
            }
        }
    }

    /// Nothing is to be had any more.
    pub(super) fn is_done(&self) -> bool {
        self.todo.is_empty() && self.flying.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_range_goes_to_one_holder_and_a_slow_one_to_a_second() {
        let now = Instant::now();
        let mut ranges = Ranges::new(vec![0..4, 4..8]);
        assert_eq!(ranges.next(1, false, now), Some(0..4));
        assert_eq!(ranges.next(2, false, now), Some(4..8));
        assert_eq!(ranges.next(2, false, now), None, "nobody is slow yet");
        let later = now + SLOW;
        ranges.done(&(4..8));
        assert_eq!(ranges.next(1, false, later), None, "not twice to the same");
        assert_eq!(ranges.next(2, false, later), Some(0..4));
        assert_eq!(ranges.next(3, false, later), None, "two are enough");
        ranges.give_back(&(0..4), 0, 1);
        assert!(!ranges.is_done());
        ranges.give_back(&(0..4), 1, 2);
        assert_eq!(
            ranges.next(3, false, later),
            Some(1..4),
            "given back by both, without what came"
        );
        ranges.give_back(&(1..4), 4, 3);
        ranges.give_back(&(1..4), 0, 3);
        assert!(ranges.is_done());
    }

    #[test]
    fn what_a_silent_holder_is_given_others_take_at_once() {
        let now = Instant::now();
        let mut ranges = Ranges::new(vec![0..4, 4..8]);
        assert_eq!(ranges.next(1, true, now), Some(0..4));
        assert_eq!(ranges.next(2, false, now), Some(4..8));
        assert_eq!(ranges.next(2, false, now), Some(0..4));
        ranges.done(&(0..4));
        assert_eq!(ranges.next(1, true, now), None, "nobody else is slow yet");
    }
}
