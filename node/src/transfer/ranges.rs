//! Which ranges of a shard are still to be had, and who is at which. What somebody is slow with is given to somebody
//! else too, once there is nothing else to do: the same bytes may come twice, never wrong ones. Pure: time is
//! passed in.

use std::{
    collections::VecDeque,
    ops::Range,
    time::{Duration, Instant},
};

/// A range that takes longer is given to a second holder when one has nothing to do.
const SLOW: Duration = Duration::from_secs(2);
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
    since: Instant,
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

    /// The next range for `who`, or one that somebody else is slow with.
    pub(super) fn next(&mut self, who: u64, now: Instant) -> Option<Range<u32>> {
        if let Some(range) = self.todo.pop_front() {
            self.flying.push(Flying {
                range: range.clone(),
                since: now,
                by: vec![who],
            });
            return Some(range);
        }
        let slow = self.flying.iter_mut().filter(|flying| {
            now >= flying.since + SLOW && flying.by.len() < COPIES_MAX && !flying.by.contains(&who)
        });
        let slowest = slow.min_by_key(|flying| flying.since)?;
        slowest.by.push(who);
        Some(slowest.range.clone())
    }

    /// All of it is here.
    pub(super) fn done(&mut self, range: &Range<u32>) {
        self.flying.retain(|flying| flying.range != *range);
    }

    /// `who` does not bring it.
    pub(super) fn give_back(&mut self, range: &Range<u32>, who: u64) {
        let Some(i) = self.flying.iter().position(|flying| flying.range == *range) else {
            return;
        };
        let flying = &mut self.flying[i];
        flying.by.retain(|other| *other != who);
        if flying.by.is_empty() {
            let flying = self.flying.swap_remove(i);
            self.todo.push_front(flying.range);
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
        assert_eq!(ranges.next(1, now), Some(0..4));
        assert_eq!(ranges.next(2, now), Some(4..8));
        assert_eq!(ranges.next(2, now), None, "nobody is slow yet");
        let later = now + SLOW;
        ranges.done(&(4..8));
        assert_eq!(ranges.next(1, later), None, "not twice to the same");
        assert_eq!(ranges.next(2, later), Some(0..4));
        assert_eq!(ranges.next(3, later), None, "two are enough");
        ranges.give_back(&(0..4), 1);
        assert!(!ranges.is_done());
        ranges.give_back(&(0..4), 2);
        assert_eq!(ranges.next(3, later), Some(0..4), "given back by both");
        ranges.done(&(0..4));
        ranges.give_back(&(0..4), 3);
        assert!(ranges.is_done());
    }
}
