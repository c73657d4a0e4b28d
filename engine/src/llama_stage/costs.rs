//! What calls of so many rows take on this machine: measured, for the kernels differ. Pure.

use std::time::Duration;

use crate::llama::LANES_MAX;

const LANES: usize = LANES_MAX as usize;

/// How much a new figure weighs beside those before where it is less, and where it is more: what a call takes is what
/// it takes when nothing else wants the core.
const WEIGHT_LESS: f32 = 0.25;
const WEIGHT_MORE: f32 = 0.03;
/// Each row more than one is taken to cost so much more, until so many were tried: less than it mostly does, so that
/// they are.
const UNKNOWN_ROW: f32 = 0.1;

/// Seconds of a call, by its rows.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Costs([Option<f32>; LANES]);

impl Costs {
    /// A call of `rows` rows took so long.
    pub(super) fn saw(&mut self, rows: usize, took: Duration) {
        let Some(cost) = rows.checked_sub(1).and_then(|at| self.0.get_mut(at)) else {
            return;
        };
        let took = took.as_secs_f32();
        *cost = Some(match *cost {
            Some(old) if took < old => old + WEIGHT_LESS * (took - old),
            Some(old) => old + WEIGHT_MORE * (took.min(4.0 * old) - old),
            None => took,
        });
    }

    /// What a call of `rows` rows should take; 0 while nothing is known.
    pub(super) fn of(&self, rows: usize) -> f32 {
        let known = |at: usize| self.0.get(at.wrapping_sub(1)).copied().flatten();
        if let Some(cost) = known(rows) {
            return cost;
        }
        let less = (1..rows).find_map(|n| Some((n, known(n)?)));
        let more = (rows + 1..=LANES).find_map(|n| Some((n, known(n)?)));
        match (less, more) {
            (Some((n, cost)), _) => cost * (1.0 + UNKNOWN_ROW * (rows - n) as f32),
            (None, Some((n, cost))) => cost * (rows as f32 / n as f32).max(0.5),
            (None, None) => 0.0,
        }
    }

    /// Splits ascending lanes into calls of lanes that follow each other: first and last of each. A call may take
    /// lanes along that do not run, of the `all` there are, where that is cheaper and `fills` allows it.
    pub(super) fn calls(
        &self,
        lanes: &[u32],
        all: u32,
        fills: impl Fn(u32) -> bool,
    ) -> Vec<(u32, u32)> {
        let idle = |lane: u32| !lanes.contains(&lane) && fills(lane);
        // The cheapest way to run the first so many of them, its last call, and what came before that.
        let mut best = vec![(0.0f32, (0, 0), 0usize)];
        for (end, last) in (1..).zip(lanes) {
            let mut cheapest = (f32::INFINITY, (*last, *last), end - 1);
            for (begin, first) in lanes.iter().enumerate().take(end).rev() {
                let mut between = (*first..=*last).filter(|lane| !lanes.contains(lane));
                if !between.all(&fills) {
                    break;
                }
                let (cost, call) = self.widened((*first, *last), all, idle);
                let cost = best[begin].0 + cost;
                // A longer call wins where both are the same: while nothing is known.
                if cost <= cheapest.0 {
                    cheapest = (cost, call, begin);
                }
            }
            best.push(cheapest);
        }
        let mut calls = Vec::new();
        let mut end = lanes.len();
        while end > 0 {
            let (_, call, begin) = best[end];
            calls.push(call);
            end = begin;
        }
        calls.reverse();
        calls
    }

    /// The cheapest call that has these lanes: four rows may cost less than three.
    fn widened(
        &self,
        (first, last): (u32, u32),
        all: u32,
        idle: impl Fn(u32) -> bool,
    ) -> (f32, (u32, u32)) {
        let before = (0..first).rev().take_while(|lane| idle(*lane)).count() as u32;
        let after = (last + 1..all).take_while(|lane| idle(*lane)).count() as u32;
        let mut cheapest = (self.of((last - first) as usize + 1), (first, last));
        for (first, last) in (first - before..=first)
            .flat_map(|first| (last..=last + after).map(move |last| (first, last)))
        {
            let cost = self.of((last - first) as usize + 1);
            if cost < cheapest.0 {
                cheapest = (cost, (first, last));
            }
        }
        cheapest
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    fn costs(ms: [u64; 4]) -> Costs {
        let mut costs = Costs::default();
        for (rows, ms) in (1..).zip(ms) {
            costs.saw(rows, Duration::from_millis(ms));
        }
        costs
    }

    #[test]
    fn gaps_are_filled_where_that_is_cheaper() {
        // Kernels that take rows by four, and such that take each by itself.
        let (by_four, each) = (costs([88, 152, 194, 128]), costs([10, 20, 30, 40]));
        let all = |_| true;
        assert_eq!(by_four.calls(&[0, 1, 2, 3], 4, all), [(0, 3)]);
        assert_eq!(by_four.calls(&[0, 3], 4, all), [(0, 3)]);
        assert_eq!(by_four.calls(&[1, 2], 4, all), [(0, 3)]);
        assert_eq!(by_four.calls(&[0, 1], 2, all), [(0, 1)]);
        assert_eq!(by_four.calls(&[2], 4, all), [(2, 2)]);
        let not_the_last = |lane| lane != 3;
        assert_eq!(by_four.calls(&[0, 2], 4, not_the_last), [(0, 0), (2, 2)]);
        assert_eq!(each.calls(&[0, 2, 3], 4, all), [(0, 0), (2, 3)]);
        assert_eq!(each.calls(&[], 4, all), []);
        // Nothing is known yet: together.
        assert_eq!(Costs::default().calls(&[0, 1, 3], 4, all), [(0, 3)]);
    }

    #[test]
    fn what_was_not_tried_is_guessed_from_what_was() {
        let mut costs = Costs::default();
        assert_eq!(costs.of(4), 0.0);
        costs.saw(1, Duration::from_secs(1));
        assert!(costs.of(4) < 2.0, "so that it is tried");
        costs.saw(4, Duration::from_secs(8));
        assert_eq!(costs.of(4), 8.0);
        costs.saw(4, Duration::from_secs(100));
        assert!(costs.of(4) < 12.0, "once is nothing");
        costs.saw(9, Duration::from_secs(1));
        costs.saw(0, Duration::from_secs(1));
    }
}
