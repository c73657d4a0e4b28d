//! How often rows are decoded, and how much of a prompt may run in between. Pure.

use std::time::{Duration, Instant};

/// How much a new figure weighs beside those before.
const WEIGHT: f32 = 0.125;
/// The part of the usual time between two tokens of a session that prompts may take of it on a stage: a prompt is
/// in work on every stage of a route at once, and a token meets all of them.
const PROMPT_SHARE: f32 = 0.5;
/// Prompts are cut into multiples of so many rows: the kernels take them by four.
pub(super) const ROWS: u32 = 4;
/// Without a token for so many of its usual gaps a session is taken to pause.
const PAUSE_GAPS: f32 = 2.0;
/// Until a gap was seen, it is taken for so many passes.
const GAP_PASSES: f32 = 4.0;

/// What the steps of a stage took lately.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Seconds between two tokens of a session while no prompt runs.
    gap: Option<f32>,
    /// Seconds of a pass of single rows.
    pass: Option<f32>,
    /// Seconds of a row of a prompt.
    row: Option<f32>,
    /// When the last pass of single rows was over.
    decoded: Option<Instant>,
    /// When the last part of a prompt was over.
    prompted: Option<Instant>,
    /// Seconds that prompts took since the last pass.
    spent: f32,
}

/// What a prompt may do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Run so many rows.
    Rows(u32),
    /// Wait for a token, or until then.
    Wait(Instant),
}

impl Pace {
    /// A pass of single rows took so long; `since` is when each session in it had its last one.
    pub(super) fn decoded(
        &mut self,
        now: Instant,
        took: Duration,
        since: impl Iterator<Item = Instant>,
    ) {
        for last in since.filter(|last| self.prompted.is_none_or(|prompted| prompted < *last)) {
            mix(
                &mut self.gap,
                now.saturating_duration_since(last).as_secs_f32(),
            );
        }
        mix(&mut self.pass, took.as_secs_f32());
        self.decoded = Some(now);
        self.spent = 0.0;
    }

    /// So many rows of a prompt took so long.
    pub(super) fn prompted(&mut self, now: Instant, rows: u32, took: Duration) {
        let took = took.as_secs_f32();
        mix(&mut self.row, took / rows.max(1) as f32);
        self.prompted = Some(now);
        self.spent += took;
    }

    /// When a session that had a token at `last` is taken to pause.
    pub(super) fn pauses(&self, last: Instant) -> Instant {
        last + Duration::from_secs_f32((self.gap() * PAUSE_GAPS).min(60.0))
    }

    /// Whether a prompt of `left` rows may go on while others decode until `until`, and with how many rows: all of
    /// them where it may not be cut.
    pub(super) fn turn(&self, left: u32, cuts: bool, until: Instant) -> Turn {
        let budget = self.gap() * PROMPT_SHARE - self.spent;
        let row = self.row.unwrap_or(self.pass.unwrap_or(0.0) / ROWS as f32);
        let rows = if row > 0.0 { budget / row } else { left as f32 };
        // The first part of a gap runs whatever it takes: a prompt comes to its end.
        let rows = if self.spent == 0.0 {
            rows.max(1.0)
        } else {
            rows
        };
        let rows = (rows / ROWS as f32).round() as u32 * ROWS;
        match rows {
            0 if self.spent > 0.0 => Turn::Wait(until),
            _ if !cuts => Turn::Rows(left),
            rows => Turn::Rows(rows.clamp(ROWS.min(left), left)),
        }
    }

    fn gap(&self) -> f32 {
        self.gap.unwrap_or(self.pass.unwrap_or(0.0) * GAP_PASSES)
    }
}

fn mix(figure: &mut Option<f32>, new: f32) {
    *figure = Some(match *figure {
        // A pause is no gap.
        Some(old) => old + WEIGHT * (new.min(2.0 * old) - old),
        None => new,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Tokens every 100 ms in passes of 20 ms, rows of prompts of 5 ms.
    fn pace(start: Instant) -> (Pace, Instant) {
        let mut pace = Pace::default();
        pace.prompted(start, 32, 160 * MS);
        let mut now = start + MS;
        for _ in 0..40 {
            let last = now;
            now += 100 * MS;
            pace.decoded(now, 20 * MS, [last].into_iter());
        }
        (pace, now)
    }

    #[test]
    fn a_prompt_has_its_share_of_each_gap() {
        let (mut pace, now) = pace(Instant::now());
        let until = pace.pauses(now);
        assert!(until > now + 199 * MS && until < now + 201 * MS);
        // 50 ms are ten rows: twelve are as near as eight.
        let Turn::Rows(rows) = pace.turn(32, true, until) else {
            panic!("it may begin");
        };
        assert!((8..=12).contains(&rows) && rows % 4 == 0, "{rows}");
        assert_eq!(pace.turn(3, true, until), Turn::Rows(3));
        assert_eq!(pace.turn(32, false, until), Turn::Rows(32));
        pace.prompted(now + 45 * MS, 9, 45 * MS);
        assert_eq!(pace.turn(32, true, until), Turn::Wait(until));
        assert_eq!(pace.turn(32, false, until), Turn::Wait(until));
        // What came while a prompt ran is no usual gap.
        let gap = pace.gap;
        pace.decoded(now + 180 * MS, 20 * MS, [now].into_iter());
        assert_eq!(pace.gap, gap);
        assert!(matches!(pace.turn(32, true, until), Turn::Rows(_)));
    }

    #[test]
    fn a_prompt_goes_on_however_dear_its_rows_are() {
        let (mut pace, now) = pace(Instant::now());
        pace.row = Some(10.0);
        assert_eq!(pace.turn(32, true, now), Turn::Rows(4));
        assert_eq!(Pace::default().turn(32, true, now), Turn::Rows(32));
    }
}
