//! Lets one of many equal log lines through: what a remote can cause, it could fill a disk with.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Once a minute is enough to see that something goes on; the rest is told at debug level.
const PAUSE: Duration = Duration::from_secs(60);

/// When the line was last let through.
#[derive(Debug, Default)]
pub(crate) struct Seldom(Mutex<Option<Instant>>);

impl Seldom {
    /// Whether to say it aloud now.
    pub(crate) fn now(&self, now: Instant) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|at| now >= at + PAUSE);
        if due {
            *last = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_minute() {
        let (line, start) = (Seldom::default(), Instant::now());
        let said = (0..180)
            .filter(|s| line.now(start + Duration::from_secs(*s)))
            .count();
        assert_eq!(said, 3);
    }
}
