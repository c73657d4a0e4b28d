//! Whom a pass waits for: of most quantised types four rows cost little more than one. Pure.
//!
//! ```text
//! a row comes ─▶ who ran with it last time, or is due within a pass? ─▶ wait a pass for them
//!             └▶ where tokens come in: who is due within a gap? ─▶ now and then, wait for them
//! ```
//! Sessions whose rows ran in one pass come to the stages below, and back from their clients, at the same time: once
//! together they stay so. Those who are not are brought together at the first stage, by waiting once for most of
//! what a token takes.

use std::time::{Duration, Instant};

use super::queue::Worth;
use crate::stage::Bench;

/// A session is not expected any more when so many of its gaps went by without a row.
const GAPS_MAX: u32 = 2;
/// How much a new gap weighs beside those before: one in so many.
const SMOOTH: u32 = 4;
/// One pass in so many of a bench may wait for longer than a pass, and one when a session is new.
const GATHER_EVERY: u32 = 16;

/// When the single rows of a session come.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rhythm {
    came: Option<Instant>,
    gap: Option<Duration>,
    /// The pass in which the last ran.
    pass: u64,
}

impl Rhythm {
    /// One came then, and runs in this pass.
    pub(super) fn came(&mut self, at: Instant, pass: u64) {
        self.pass = pass;
        let Some(before) = self.came.replace(at) else {
            return;
        };
        let gap = at.saturating_duration_since(before);
        self.gap = Some(match self.gap {
            Some(usual) if gap < usual * GAPS_MAX => usual * (SMOOTH - 1) / SMOOTH + gap / SMOOTH,
            Some(_) | None => gap,
        });
    }

    /// It does something else for a while.
    pub(super) fn pause(&mut self) {
        self.came = None;
    }

    /// When the next should come, and how long that is after the last; none where none is expected.
    fn next(&self, now: Instant) -> Option<(Instant, Duration)> {
        let (came, gap) = (self.came?, self.gap?);
        (now < came + gap * GAPS_MAX).then_some((came + gap, gap))
    }
}

/// How the sessions of a bench come together.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Company {
    /// Until when its rows wait for more than a pass.
    gathers: Option<Instant>,
    /// Passes since they did, or so many that they may.
    passes: u32,
}

/// Rows of a bench that could run.
pub(super) struct Ready<'a> {
    pub(super) bench: Bench,
    /// When the first of them came.
    pub(super) since: Instant,
    /// Their sessions, and the others of the bench.
    pub(super) sessions: &'a [Rhythm],
    pub(super) missing: &'a [Rhythm],
    /// It is tokens that came, and nothing else could use the time.
    pub(super) gathers: bool,
}

impl Company {
    /// Until when these rows wait, if they do.
    pub(super) fn until(
        &mut self,
        ready: &Ready<'_>,
        now: Instant,
        worth: Worth<'_>,
    ) -> Option<Instant> {
        let with_us = |other: &Rhythm| ready.sessions.iter().any(|ours| ours.pass == other.pass);
        let next = ready.missing.iter();
        let next = next.filter_map(|other| {
            let (due, gap) = other.next(now)?;
            let due = if with_us(other) { ready.since } else { due };
            Some((due, gap))
        });
        let next: Vec<(Instant, Duration)> = next.collect();
        let with = |others: usize| {
            let rows = u32::try_from(ready.sessions.len() + others).ok()?;
            worth(ready.bench, rows).filter(|_| others > 0)
        };
        let pass = with(next.len())?;
        if let Some(until) = self.gathers.filter(|until| now < *until) {
            return Some(until);
        }
        let soon = next.iter().filter(|(due, _)| *due <= ready.since + pass);
        let soon = with(soon.count()).map(|pass| ready.since + pass);
        if let Some(until) = soon.filter(|until| now < *until) {
            return Some(until);
        }
        if !ready.gathers || self.gathers.is_some() || self.passes < GATHER_EVERY {
            return None;
        }
        // As much of what a token takes as brings the others here.
        let gap = next.iter().map(|(_, gap)| *gap).min()?;
        let coming = next.iter().filter(|(due, _)| *due <= ready.since + gap);
        with(coming.clone().count())?;
        let last = coming.map(|(due, _)| *due).max()?;
        let until = (last + pass).min(ready.since + gap);
        self.gathers = Some(until);
        (now < until).then_some(until)
    }

    /// Another session is in it, which is gathered as soon as its rhythm is known.
    pub(super) fn joined(&mut self) {
        self.passes = GATHER_EVERY;
    }

    /// A pass of it ran.
    pub(super) fn ran(&mut self) {
        self.passes = match self.gathers.take() {
            Some(_) => 0,
            None => self.passes.saturating_add(1),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const BENCH: Bench = Bench(7);

    /// Three and four rows are worth a wait of 30 ms, as with kernels that take rows by four.
    fn by_four(_: Bench, rows: u32) -> Option<Duration> {
        (rows >= 3).then_some(30 * MS)
    }

    /// Somebody whose rows came every 120 ms, each in a pass of its own; the last then.
    fn came(at: Instant) -> Rhythm {
        let mut rhythm = Rhythm::default();
        for n in (0..4).rev() {
            rhythm.came(at - 120 * MS * n, 0);
        }
        rhythm
    }

    /// So many rows that came just now.
    fn rows(n: u32, at: Instant) -> Vec<Rhythm> {
        let row = |pass| Rhythm {
            pass,
            ..came(at - 120 * MS)
        };
        (1..).take(n as usize).map(row).collect()
    }

    fn ready<'a>(
        sessions: &'a [Rhythm],
        since: Instant,
        missing: &'a [Rhythm],
        gathers: bool,
    ) -> Ready<'a> {
        Ready {
            bench: BENCH,
            since,
            sessions,
            missing,
            gathers,
        }
    }

    #[test]
    fn those_who_come_at_the_same_time_are_waited_for_a_pass() {
        let now = Instant::now() + 1000 * MS;
        let (mut company, one) = (Company::default(), rows(1, now));
        // Due now, in 10 ms, and overdue.
        let near = [
            came(now - 120 * MS),
            came(now - 110 * MS),
            came(now - 130 * MS),
        ];
        let until = company.until(&ready(&one, now, &near, false), now, &by_four);
        assert_eq!(until, Some(now + 30 * MS));
        let late = now + 30 * MS;
        let until = company.until(&ready(&one, now, &near, false), late, &by_four);
        assert_eq!(until, None, "a pass and no longer");
        // One more is not worth it.
        let until = company.until(&ready(&one, now, &near[..1], false), now, &by_four);
        assert_eq!(until, None);
        // Nor are those who are half a gap away, or came no more.
        let far = [
            came(now - 60 * MS),
            came(now - 60 * MS),
            came(now - 241 * MS),
        ];
        let until = company.until(&ready(&one, now, &far, false), now, &by_four);
        assert_eq!(until, None);
        // But who ran with it last time comes with it, whatever the gap was.
        let with = far.map(|far| Rhythm { pass: 1, ..far });
        let until = company.until(&ready(&one, now, &with, false), now, &by_four);
        assert_eq!(until, Some(now + 30 * MS));
    }

    #[test]
    fn the_others_are_gathered_now_and_then() {
        let now = Instant::now() + 1000 * MS;
        let (mut company, two) = (Company::default(), rows(2, now));
        let far = [came(now - 60 * MS), came(now - 50 * MS)];
        let until = |company: &mut Company, at: Instant, gathers| {
            company.until(&ready(&two, now, &far, gathers), at, &by_four)
        };
        company.joined();
        assert_eq!(
            until(&mut company, now, false),
            None,
            "the first stage does"
        );
        let gathered = Some(now + 100 * MS);
        assert_eq!(until(&mut company, now, true), gathered);
        assert_eq!(until(&mut company, now + 70 * MS, true), gathered);
        assert_eq!(until(&mut company, now + 100 * MS, true), None);
        company.ran();
        assert_eq!(until(&mut company, now, true), None, "not again so soon");
        (0..GATHER_EVERY).for_each(|_| company.ran());
        assert_eq!(until(&mut company, now, true), gathered);
    }

    #[test]
    fn a_pause_is_no_gap() {
        let now = Instant::now() + 1000 * MS;
        let mut rhythm = came(now);
        assert_eq!(rhythm.next(now), Some((now + 120 * MS, 120 * MS)));
        rhythm.pause();
        assert_eq!(rhythm.next(now), None);
        rhythm.came(now + 5000 * MS, 0);
        let next = rhythm.next(now + 5000 * MS);
        assert_eq!(next, Some((now + 5120 * MS, 120 * MS)));
    }
}
