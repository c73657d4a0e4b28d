//! How long one holder takes: learnt from its answers. No clock of its own.

use std::time::{Duration, Instant};

/// Weight of the newest answer: the figures follow within some ten tokens.
const NEWEST: f64 = 0.1;
/// Before this nobody is asked a second time: below it a scheduler's pause looks like a fault.
const LEAST_DEADLINE: Duration = Duration::from_millis(100);
/// What a holder is taken for that was never asked: as a near one, so that it is.
const WIRE_UNKNOWN: f64 = 200e-6;
const ROW_UNKNOWN: f64 = 50e-6;
/// A figure counts half of itself after so long without an answer: who was slow once is asked again.
const HALF_LIFE: Duration = Duration::from_secs(10);

/// What is known of a holder's times, in seconds.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Timing {
    /// (beyond its computing, a row's computing, how far it is off at most times, when).
    known: Option<Known>,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    wire: f64,
    row: f64,
    off: f64,
    at: Instant,
}

impl Timing {
    /// An answer of `rows` rows came after `took`, of which the holder says that it spent `spent`.
    pub(super) fn answered(&mut self, rows: u32, took: Duration, spent: Duration, now: Instant) {
        let spent = spent.min(took);
        let wire = (took - spent).as_secs_f64();
        let row = spent.as_secs_f64() / f64::from(rows.max(1));
        let off = (took.as_secs_f64() - self.expected(rows)).abs();
        let toward = |old: f64, new: f64| old + (new - old) * NEWEST;
        self.known = Some(match self.known {
            None => Known {
                wire,
                row,
                off: 0.0,
                at: now,
            },
            Some(old) => Known {
                wire: toward(old.wire, wire),
                row: toward(old.row, row),
                off: toward(old.off, off),
                at: now,
            },
        });
    }

    /// No answer came within `waited`: that is the least it takes, until it is seen or forgotten.
    pub(super) fn late(&mut self, waited: Duration, now: Instant) {
        let waited = waited.as_secs_f64();
        let known = self.known.get_or_insert(Known {
            wire: waited,
            row: ROW_UNKNOWN,
            off: 0.0,
            at: now,
        });
        known.wire = known.wire.max(waited);
        known.at = now;
    }

    fn expected(&self, rows: u32) -> f64 {
        self.known
            .map_or(0.0, |known| known.wire + known.row * f64::from(rows.max(1)))
    }

    /// How long an answer of `rows` rows may take before another holder is asked, too.
    pub(super) fn deadline(&self, rows: u32) -> Duration {
        let off = self.known.map_or(0.0, |known| known.off);
        let seconds = self.expected(rows) + 4.0 * off;
        Duration::try_from_secs_f64(seconds).map_or(LEAST_DEADLINE, |time| time.max(LEAST_DEADLINE))
    }

    /// What asking it costs, and a row: for choosing between holders.
    pub(super) fn costs(&self, now: Instant) -> (f64, f64) {
        let Some(known) = self.known else {
            return (WIRE_UNKNOWN, ROW_UNKNOWN);
        };
        let age = now.saturating_duration_since(known.at).as_secs_f64();
        let fresh = 0.5f64.powf(age / HALF_LIFE.as_secs_f64());
        (known.wire * fresh, known.row * fresh)
    }

    /// Beyond its computing, and a row's computing, as they were last known.
    pub(super) fn figures(&self) -> Option<(Duration, Duration)> {
        let known = self.known?;
        let time = |seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default();
        Some((time(known.wire), time(known.row)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    #[test]
    fn figures_follow_answers_and_deadlines_follow_figures() {
        let now = Instant::now();
        let mut timing = Timing::default();
        assert_eq!(timing.deadline(1), LEAST_DEADLINE);
        for _ in 0..100 {
            timing.answered(4, 1000 * US, 800 * US, now);
        }
        let (wire, row) = timing.figures().unwrap();
        assert!(wire.abs_diff(200 * US) < US && row.abs_diff(200 * US) < US);
        assert_eq!(timing.deadline(4), LEAST_DEADLINE);
        // A step of a prompt is not late because a token's is fast.
        assert!(timing.deadline(1000) > 200 * Duration::from_millis(1));
        for _ in 0..100 {
            timing.answered(4, 300_000 * US, 800 * US, now);
            timing.answered(4, 100_000 * US, 800 * US, now);
        }
        let deadline = timing.deadline(4);
        assert!(
            deadline > Duration::from_millis(500) && deadline < Duration::from_secs(1),
            "{deadline:?}"
        );
    }

    #[test]
    fn who_was_slow_is_tried_again_and_nobody_is_believed_to_have_spent_more_than_it_took() {
        let now = Instant::now();
        let mut timing = Timing::default();
        timing.answered(1, 100 * US, Duration::from_secs(9), now);
        assert_eq!(timing.figures(), Some((Duration::ZERO, 100 * US)));
        let mut slow = Timing::default();
        slow.answered(1, Duration::from_secs(1), Duration::from_secs(1), now);
        let (_, then) = slow.costs(now);
        let (_, later) = slow.costs(now + 14 * HALF_LIFE);
        assert!(then > 0.9 && later < 100e-6, "{then} {later}");
        // Silence counts at once: nobody waits a second time while there are others.
        let mut frozen = Timing::default();
        frozen.late(LEAST_DEADLINE, now);
        assert!(frozen.costs(now).0 >= 0.1);
        assert!(frozen.costs(now + HALF_LIFE).0 > 100.0 * WIRE_UNKNOWN);
        assert!(frozen.costs(now + 12 * HALF_LIFE).0 < WIRE_UNKNOWN);
    }
}
