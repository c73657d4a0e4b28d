//! How fast we upload: the best of the last larger replies to fetches, and of shards that went to one peer without a
//! limit of ours. Pure: times are passed in.
//!
//! A slow or distant reader makes one reply slow and does not lower the figure; a burst that only
//! filled buffers does not raise it, because the clock stops when the reader says it has read all. A
//! reader that lies makes it larger: it is a claim, like all that an advert says.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use swarm_proto::Measured;

/// Shorter replies say how far the reader is, not how wide the way.
pub(super) const BYTES_MIN: usize = 64 * 1024;
/// Replies remembered: the figure follows a line that got slower after so many.
const SAMPLES: usize = 16;

/// Bytes a second of the last replies, and when each was sent.
#[derive(Debug, Default)]
pub(crate) struct Uplink {
    samples: VecDeque<(f64, Instant)>,
}

impl Uplink {
    /// A reply was read to its end, `took` after its first byte was written.
    pub(crate) fn sent(&mut self, bytes: usize, took: Duration, now: Instant) {
        if bytes < BYTES_MIN {
            return;
        }
        if self.samples.len() == SAMPLES {
            self.samples.pop_front();
        }
        let value = bytes as f64 / took.as_secs_f64().max(1e-6);
        self.samples.push_back((value, now));
    }

    /// The best, with its age; none before the first.
    pub(super) fn best(&self, now: Instant) -> Option<Measured> {
        let (value, at) = self.samples.iter().max_by(|a, b| a.0.total_cmp(&b.0))?;
        let age_s = now.saturating_duration_since(*at).as_secs();
        Some(Measured {
            value: *value as f32,
            age_s: u32::try_from(age_s).unwrap_or(u32::MAX),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_the_last_replies_counts_and_slow_readers_do_not() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut uplink = Uplink::default();
        uplink.sent(BYTES_MIN - 1, second, start);
        assert_eq!(uplink.best(start), None, "too short to say anything");
        uplink.sent(4_000_000, second, start);
        uplink.sent(4_000_000, 100 * second, start + second);
        let best = Measured {
            value: 4e6,
            age_s: 7,
        };
        assert_eq!(uplink.best(start + 7 * second), Some(best));
        for n in 0..SAMPLES as u32 {
            uplink.sent(1_000_000, second, start + n * second);
        }
        let best = uplink.best(start).map(|best| best.value);
        assert_eq!(best, Some(1e6), "the line got slower");
    }
}
