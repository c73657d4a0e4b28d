//! The limits and deadlines of sessions, with the reason of each. Plain data: time is not read here.

use std::time::Duration;

/// How long a hop or a client waits for each thing it can wait for.
///
/// Deadlines nest: whoever sits further up the chain waits a little longer
/// ([`Deadlines::per_hop`] for each hop below), so that the hop next to the fault reports it, and
/// names the right peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// Opening a stream and hearing `Opened` from the last hop: a dial over a slow link, and KV.
    pub open: Duration,
    /// Added to `open` for each hop further down: they open one after the other.
    pub open_per_hop: Duration,
    /// From forwarding a frame (or the last sign of progress) to its acknowledgement.
    pub step: Duration,
    /// Added to `step` for each row of the largest frame seen: a slow CPU on a large layer range.
    pub per_row: Duration,
    /// Added to `step` for each hop further down, so that deadlines nest.
    pub per_hop: Duration,
    /// A hop that has rows in work says so this often,
    pub beat: Duration,
    /// and is lost when it says nothing at all for this long: it is dead, frozen or cut off, however
    /// slow it may be.
    pub silence: Duration,
    /// A session without a frame for this long is closed, its KV freed: the lease.
    pub idle: Duration,
    /// How long the session and the answer stream wait for each other at the tail, and a stream
    /// that was just accepted for its first frame.
    pub pair: Duration,
    /// How long a session whose upstream or whose route below is lost is kept for its client, who may
    /// open it again: a network that comes back, another route found.
    pub keep: Duration,
    /// Saying goodbye: the last frame of a session that ends.
    pub close: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            open: Duration::from_secs(5),
            open_per_hop: Duration::from_secs(1),
            step: Duration::from_secs(10),
            per_row: Duration::from_millis(250),
            per_hop: Duration::from_millis(500),
            beat: Duration::from_millis(150),
            silence: Duration::from_millis(600),
            idle: Duration::from_secs(600),
            pair: Duration::from_secs(15),
            keep: Duration::from_secs(20),
            close: Duration::from_secs(2),
        }
    }
}

impl Deadlines {
    /// For the answer of a chain of `below` hops to an `Open`.
    pub fn opened(&self, below: usize) -> Duration {
        self.open
            .saturating_add(self.open_per_hop.saturating_mul(count(below)))
    }

    /// For the answer of a chain of `below` hops, most of which hold the session already.
    pub fn reopened(&self, below: usize) -> Duration {
        self.opened(below) / 2
    }

    /// For the acknowledgement of frames of up to `rows` rows by the first of `below` hops.
    pub fn acked(&self, rows: u32, below: usize) -> Duration {
        self.step
            .saturating_add(self.per_row.saturating_mul(rows))
            .saturating_add(self.per_hop.saturating_mul(count(below)))
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// What a node grants to sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionLimits {
    /// Sessions at once, over all clients: each holds KV, a task and three stream buffers.
    pub sessions_max: usize,
    /// Sessions at once that one peer opens in the name of one client, so that one client cannot
    /// take them all: most of them, for `shoal serve` is one client with many users. Owners have their turns on
    /// the stage one after the other, however many sessions each has. On the first hop the two are the same peer.
    pub per_client_max: usize,
    /// Sessions at once that one peer opens here, in whose name soever: only the first hop knows
    /// that a client is who it says, so a member could invent clients. A busy first hop sends
    /// many clients' sessions on to one next hop, hence most of the places; not all, so that
    /// others still get in.
    pub per_upstream_max: usize,
    /// Frames of one session that may wait for, or be in, the worker. Two keep the worker busy;
    /// two more absorb jitter. Beyond it the hop stops reading, and the sender feels it.
    pub frames_in_flight: usize,
    /// Answer streams that may wait for their session.
    pub parked_max: usize,
    /// Bytes of sent frames that all sessions may keep in memory: about 30,000 positions of a model
    /// of 8 billion weights.
    pub retained_memory: u64,
    /// And on disk, in the temporary directory, when memory is used up.
    pub retained_disk: u64,
    /// Those of one client: as many as its sessions, and as many again whose opening failed.
    pub parked_per_client_max: usize,
    /// The deadlines.
    pub deadlines: Deadlines,
}

impl SessionLimits {
    /// The length of a worker's queue that these limits can never fill.
    pub fn worker_queue(&self) -> usize {
        // One opening beside the frames.
        self.sessions_max
            .saturating_mul(self.frames_in_flight.saturating_add(1))
    }
}

impl Default for SessionLimits {
    fn default() -> Self {
        Self {
            sessions_max: 64,
            per_client_max: 48,
            per_upstream_max: 48,
            frames_in_flight: 4,
            parked_max: 256,
            retained_memory: 512 << 20,
            retained_disk: 4 << 30,
            parked_per_client_max: 96,
            deadlines: Deadlines::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_nest() {
        let d = Deadlines::default();
        assert!(d.opened(2) > d.opened(1));
        assert!(d.acked(1, 2) > d.acked(1, 1));
        assert!(d.acked(32, 1) > d.acked(1, 1));
    }
}
