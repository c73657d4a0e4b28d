//! How often rows are decoded, and how much of a prompt may run in between. Pure.
//!
//! ```text
//! pass ─▶ part of a prompt ─▶ ······ nothing: the token is on its way round ······ ─▶ pass
//!        └ share × gap ┘
//! gap beside a prompt, seen here: late? less share : more
//! ```

use std::time::{Duration, Instant};

/// How much a new figure weighs beside those before.
const WEIGHT: f32 = 0.125;
/// The part of its time that a stage gives to prompts while others decode: to begin with, most and least. A prompt
/// is in work on every stage of a route at once, on cores that they may have in common, and a token meets all of
/// them: what the stages may give is seen in the gaps alone.
const SHARE: f32 = 0.25;
const SHARE_MAX: f32 = 0.5;
const SHARE_MIN: f32 = 1.0 / 8.0;
/// A gap of so many usual ones is late: less than the two that are aimed at. Where one in twenty takes longer than
/// that without any prompt, on a machine that does other things too, so many more are none that a prompt made.
const LATE: f32 = 1.75;
/// However little else such a machine gets done, longer than so many usual gaps is late.
const LONG_MAX: f32 = 4.0;
/// What a late gap makes of the share, and one that is not: in balance where one in twenty-odd is late.
const LESS: f32 = 0.8;
const MORE: f32 = 1.01;
/// Prompts are cut into multiples of so many rows: the kernels take them by four.
pub(super) const ROWS: u32 = 4;
/// A part begins within so much of the gap behind a pass: the next token is at least as far away as a part takes.
const EARLY: f32 = 0.5;
/// Behind so many gaps a token is not about to come any more, and prompts need not keep out of its way.
const OVERDUE: f32 = 2.0;
/// Without a token for so many of its usual gaps a session is taken to pause. Few would be too few: one late gap
/// would let whole frames run on every stage, and those make the next gap late as well.
const PAUSE_GAPS: f32 = 8.0;
/// But where gaps are long, a pause is not waited for longer than this, or [`OVERDUE`].
const PAUSE_MAX: f32 = 2.0;
/// Until a gap was seen, it is taken for so many passes.
const GAP_PASSES: f32 = 4.0;

/// What the steps of a stage took lately.
#[derive(Debug)]
pub(super) struct Pace {
    /// Seconds between two tokens of a session while no prompt runs.
    gap: Option<f32>,
    /// Of these, about one in twenty is longer.
    long_gap: f32,
    /// Seconds of a pass of single rows.
    pass: Option<f32>,
    /// Seconds of a row of a prompt.
    row: Option<f32>,
    /// When the last part of a prompt was over.
    prompted: Option<Instant>,
    /// The part of the time that prompts may take now.
    share: f32,
    /// Seconds that prompts might take at `counted`; less than none where a part took longer than it should.
    credit: f32,
    counted: Option<Instant>,
}

impl Default for Pace {
    fn default() -> Self {
        Pace {
            gap: None,
            long_gap: 0.0,
            pass: None,
            row: None,
            prompted: None,
            share: SHARE,
            credit: 0.0,
            counted: None,
        }
    }
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
        for last in since {
            let gap = now.saturating_duration_since(last).as_secs_f32();
            if self.prompted.is_none_or(|prompted| prompted < last) {
                mix(&mut self.gap, gap);
                let usual = self.gap();
                let step = if gap > self.long_gap {
                    1.0 / LESS
                } else {
                    1.0 / MORE
                };
                self.long_gap = (self.long_gap * step).clamp(usual, usual * LONG_MAX);
            } else {
                self.beside(gap);
            }
        }
        mix(&mut self.pass, took.as_secs_f32());
    }

    /// A gap in which a prompt ran.
    fn beside(&mut self, gap: f32) {
        let usual = self.gap();
        self.share = if gap > self.long_gap.max(usual * LATE) {
            (self.share * LESS).max(SHARE_MIN)
        } else {
            (self.share * MORE).min(SHARE_MAX)
        };
        // Never a longer one, also not where prompts have next to nothing: what is usual would grow with what it allows.
        if gap < usual {
            mix(&mut self.gap, gap);
        }
    }

    /// So many rows of a prompt took so long, `beside` others who decode or not.
    pub(super) fn prompted(&mut self, now: Instant, rows: u32, took: Duration, beside: bool) {
        self.credit = self.credit(now) - took.as_secs_f32();
        // What was free is no debt.
        self.counted = beside.then_some(now);
        mix(&mut self.row, took.as_secs_f32() / rows.max(1) as f32);
        self.prompted = Some(now);
    }

    /// When a session that had a token at `last` is taken to pause.
    pub(super) fn pauses(&self, last: Instant) -> Instant {
        let gap = self.gap().min(60.0);
        let pause = (gap * PAUSE_GAPS).min(PAUSE_MAX).max(gap * OVERDUE);
        last + Duration::from_secs_f32(pause)
    }

    /// Whether a prompt of `left` rows may go on while others decode, the last of them at `last`, and with how many
    /// rows: all of them where it may not be cut.
    pub(super) fn turn(&self, left: u32, cuts: bool, now: Instant, last: Instant) -> Turn {
        let row = self.row.unwrap_or(self.pass.unwrap_or(0.0) / ROWS as f32);
        let (gap, credit) = (self.gap(), self.credit(now));
        let since = now.saturating_duration_since(last).as_secs_f32();
        let at = |gaps: f32| last + Duration::from_secs_f32((gap * gaps).min(60.0));
        let until = at(OVERDUE).max(now);
        let early = since <= gap * EARLY;
        if !early && since < gap * OVERDUE {
            return Turn::Wait(until);
        }
        // The fewest rows run once all that can be saved was, whatever they take: a prompt comes to its end.
        let all = self.share * gap;
        let enough = if cuts {
            all.min(row * ROWS as f32 / 2.0)
        } else {
            all
        };
        if credit < enough * 0.999 {
            let saved = Duration::from_secs_f32(((enough - credit) / self.share).min(60.0));
            let saved = now + saved;
            return match early && saved > at(EARLY) {
                true => Turn::Wait(until),
                false => Turn::Wait(saved),
            };
        }
        let rows = if row > 0.0 { credit / row } else { left as f32 };
        let rows = (rows / ROWS as f32).round().max(1.0) as u32;
        match cuts {
            true => Turn::Rows(rows.saturating_mul(ROWS).min(left)),
            false => Turn::Rows(left),
        }
    }

    /// Seconds that prompts may take: no more is saved than belongs to one gap.
    fn credit(&self, now: Instant) -> f32 {
        let most = self.share * self.gap();
        let Some(counted) = self.counted else {
            return most;
        };
        let since = now.saturating_duration_since(counted).as_secs_f32();
        (self.credit + self.share * since).min(most)
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

    /// Tokens every 100 ms in passes of 20 ms, rows of prompts of 2 ms; when the last token was.
    fn pace(start: Instant) -> (Pace, Instant) {
        let mut pace = Pace::default();
        pace.prompted(start, 32, 64 * MS, false);
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
        let (mut pace, last) = pace(Instant::now());
        let overdue = last + 200 * MS;
        let near = |turn: Turn, at: Instant| {
            let Turn::Wait(until) = turn else {
                panic!("{turn:?}");
            };
            assert!(until > at - MS && until < at + MS, "{turn:?}");
        };
        // A quarter of 100 ms are twelve rows.
        assert_eq!(pace.turn(32, true, last, last), Turn::Rows(12));
        assert_eq!(pace.turn(3, true, last, last), Turn::Rows(3));
        assert_eq!(pace.turn(32, false, last, last), Turn::Rows(32));
        near(pace.turn(32, true, last + 60 * MS, last), overdue);
        pace.prompted(last + 24 * MS, 12, 24 * MS, true);
        // There is nothing left of it: four rows more are saved soon, what a whole frame wants not before a token
        // is near.
        let now = last + 26 * MS;
        near(pace.turn(32, true, now, last), last + 36 * MS);
        near(pace.turn(32, false, now, last), overdue);
        // What came while a prompt ran is no usual gap.
        let gap = pace.gap;
        let next = last + 130 * MS;
        pace.decoded(next, 20 * MS, [last].into_iter());
        assert_eq!(pace.gap, gap);
        assert_eq!(pace.turn(32, true, next, next), Turn::Rows(12));
        // A whole frame is paid for in the gaps that follow.
        pace.prompted(next + 64 * MS, 32, 64 * MS, true);
        let later = next + 150 * MS;
        assert!(matches!(pace.turn(32, true, later, later), Turn::Wait(_)));
        let later = next + 400 * MS;
        assert_eq!(pace.turn(32, true, later, later), Turn::Rows(12));
        // No token comes: the same share of the time.
        let overdue = later + 210 * MS;
        assert_eq!(pace.turn(32, true, overdue, later), Turn::Rows(12));
        pace.prompted(overdue + 24 * MS, 12, 24 * MS, true);
        let soon = overdue + 30 * MS;
        assert!(matches!(pace.turn(32, true, soon, later), Turn::Wait(at) if at < soon + 100 * MS));
        assert!(pace.pauses(later) > later + 700 * MS);
    }

    #[test]
    fn a_prompt_goes_on_however_dear_its_rows_are() {
        let (mut pace, now) = pace(Instant::now());
        pace.row = Some(10.0);
        assert_eq!(pace.turn(32, true, now, now), Turn::Rows(4));
        assert_eq!(Pace::default().turn(32, true, now, now), Turn::Rows(32));
    }

    #[test]
    fn late_tokens_leave_prompts_less_and_others_give_it_back() {
        let (mut pace, mut last) = pace(Instant::now());
        let mut token = |pace: &mut Pace, gap: u32| {
            pace.prompted(last + 20 * MS, 12, 20 * MS, true);
            let now = last + MS * gap;
            pace.decoded(now, 20 * MS, [last].into_iter());
            last = now;
        };
        for _ in 0..2 {
            token(&mut pace, 260);
        }
        let less = pace.share;
        assert!(less < SHARE * 0.7 && pace.gap() < 0.101, "{pace:?}");
        // One late gap in twenty-five is in balance.
        for i in 0..100 {
            token(&mut pace, if i % 25 == 0 { 260 } else { 150 });
        }
        assert!(pace.share > less && pace.share < less * 1.3, "{pace:?}");
        for _ in 0..200 {
            token(&mut pace, 150);
        }
        assert_eq!(pace.share, SHARE_MAX);
        // They are all late whatever prompts have: that does not become what is usual.
        for _ in 0..60 {
            token(&mut pace, 400);
        }
        assert!(pace.share == SHARE_MIN && pace.gap() < 0.101, "{pace:?}");
    }
}
