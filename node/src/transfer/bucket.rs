//! A token bucket in debt: what is sent is counted at once, and who sends waits until it is paid. Pure: time is
//! passed in.

use std::time::{Duration, Instant};

/// How long it counts as full after somebody waited: parts follow each other faster at any rate worth a limit.
const LATELY: Duration = Duration::from_secs(1);

/// Bytes a second, shared by all who send.
#[derive(Debug)]
pub(super) struct Bucket {
    bytes_s: f64,
    /// How much may leave at once, in time at the full rate.
    burst: Duration,
    /// When everything that was sent will be paid.
    paid: Instant,
    /// When somebody last had to wait.
    waited: Option<Instant>,
}

impl Bucket {
    pub(super) fn new(bytes_s: u64, burst: Duration, now: Instant) -> Self {
        Self {
            burst,
            bytes_s: (bytes_s as f64).max(1.0),
            paid: now,
            waited: None,
        }
    }

    /// Counts `bytes` that are about to leave, and says how long to wait before.
    pub(super) fn take(&mut self, bytes: usize, now: Instant) -> Duration {
        let wait = self
            .paid
            .saturating_duration_since(now)
            .saturating_sub(self.burst);
        // No bucket is emptied for longer than a day, whatever the rate.
        let cost = (bytes as f64 / self.bytes_s).min(86_400.0);
        self.paid = self.paid.max(now) + Duration::from_secs_f64(cost);
        if !wait.is_zero() {
            self.waited = Some(now);
        }
        wait
    }

    /// Whether somebody had to wait lately.
    pub(super) fn is_full(&self, now: Instant) -> bool {
        self.waited.is_some_and(|at| now < at + LATELY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leaves_in_a_second_is_the_rate_and_idling_saves_up_no_more_than_a_burst() {
        let start = Instant::now();
        let mut bucket = Bucket::new(1_000_000, Duration::from_millis(50), start);
        let sent_within = |bucket: &mut Bucket, from: Instant| {
            let (mut now, mut sent) = (from, 0);
            while now < from + Duration::from_secs(1) {
                now += bucket.take(10_000, now);
                sent += 10_000;
            }
            sent
        };
        let first = sent_within(&mut bucket, start);
        assert!((1_000_000..=1_080_000).contains(&first), "{first}");
        let second = sent_within(&mut bucket, start + Duration::from_secs(60));
        assert!((1_000_000..=1_080_000).contains(&second), "{second}");
        let (busy, idle) = (
            start + Duration::from_secs(61),
            start + Duration::from_secs(63),
        );
        assert!(bucket.is_full(busy) && !bucket.is_full(idle));
    }
}
