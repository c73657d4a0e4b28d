//! How a relay stops when something is lost, and goes on along another route.

use std::{
    future::poll_fn,
    task::{Poll, ready},
    time::Duration,
};

use swarm_proto::{Content, Down, Failure, FailureCode, Fault, Open, Rows, Up, Want};
use tokio::time::{Instant, timeout};

use super::{BACKLOG_MAX, Below, End, Halt, Relay};
use crate::session::{
    failure::fail,
    limits::down_rows,
    standby::Follower,
    wire::{Pipe, WireError},
};

impl Relay {
    /// Another stream from above: the old one is dropped, and with it all that comes late on it.
    pub(in crate::session) fn take_upstream(&mut self, mut up: Pipe) {
        up.set_limits(down_rows(self.p.ledger.n_embd));
        self.p.up = up;
    }

    /// The time a frame may take here.
    pub(in crate::session) fn step_deadline(&self) -> Duration {
        self.p.deadlines.acked(self.p.ledger.rows_max(), 0)
    }

    /// Takes what is below away, and the standby. Nothing is sent until [`Relay::resume`].
    pub(in crate::session) fn detach(&mut self) -> (Below, Option<Follower>) {
        let below = std::mem::replace(&mut self.p.below, Below::Nobody);
        (below, self.p.standby.take())
    }

    /// Feeds a standby of the next hop from now on.
    pub(in crate::session) fn stand_by(&mut self, standby: Option<Follower>) {
        self.p.standby = standby;
    }

    /// Waits for what is in the worker, keeps it, and goes back to where `open` resumes; to the very
    /// beginning where what is held here may not be the session any more.
    ///
    /// # Errors
    /// The worker failed.
    pub(in crate::session) async fn rewind(
        &mut self,
        open: Open,
        anew: bool,
    ) -> Result<(), Failure> {
        // The step under way may take long; the upstream hears meanwhile that somebody is there.
        let beat = self.p.deadlines.beat;
        loop {
            match timeout(beat, self.finish_steps()).await {
                Ok(finished) => break finished?,
                Err(_) => self.say_working(),
            }
        }
        // Who missed what ran last may hold what was taken back meanwhile.
        let anew = anew || self.p.open.epoch < open.since;
        let keep = if anew { 0 } else { open.resume };
        self.p.ledger.reopen(open.epoch, keep);
        self.p.retained.truncate(keep);
        self.p.open = open;
        self.outbox.clear();
        self.to_ack.clear();
        self.ack_by = None;
        self.replay = None;
        Ok(())
    }

    /// Waits for what is in the worker, and keeps it.
    async fn finish_steps(&mut self) -> Result<(), Failure> {
        poll_fn(|cx| {
            let _ = self.p.up.poll_flush(cx);
            while !self.in_flight.is_empty() {
                match self.poll_results(cx) {
                    Ok(true) => {}
                    Ok(false) => return Poll::Pending,
                    Err(Halt::Ours(failure) | Halt::Below(failure)) => {
                        return Poll::Ready(Err(failure));
                    }
                }
            }
            Poll::Ready(Ok(()))
        })
        .await
    }

    /// Goes on with a new chain below, which holds positions up to `held`; the upstream hears from
    /// where to go on.
    ///
    /// # Errors
    /// The hop below lacks what is no longer retained.
    pub(in crate::session) fn resume(&mut self, below: Below, held: u32) -> Result<(), Failure> {
        let ours = self.p.ledger.end();
        if matches!(below, Below::Next(_)) && held < ours {
            if self.p.retained.end() != Some(ours) {
                let message = "what the next hop lacks is no longer retained";
                return Err(fail(
                    self.at(),
                    Fault::Local,
                    FailureCode::NotRetained,
                    message,
                ));
            }
            // It may hold a part of a frame that was computed as one.
            self.replay = Some(self.p.retained.frame_of(held));
        }
        self.p.below = below;
        self.p.below_held = held;
        let now = Instant::now();
        (self.progress, self.heard, self.last_frame) = (now, now, now);
        self.say_opened();
        Ok(())
    }

    /// Tells the upstream that this hop and all below are ready.
    pub(super) fn say_opened(&mut self) {
        let ledger = &self.p.ledger;
        self.p.up.push(&Up::Opened {
            n_embd: ledger.n_embd,
            n_vocab: ledger.n_vocab,
            held: ledger.end(),
        });
    }

    /// Tells the upstream that this hop is there, and at work on the chain below.
    pub(in crate::session) fn say_working(&mut self) {
        self.p.up.push(&Up::Working);
    }

    /// Tells the upstream that the route below is broken.
    pub(in crate::session) fn say_lost(&mut self, failure: Failure) {
        let epoch = self.p.ledger.epoch;
        self.p.up.push(&Up::Lost { epoch, failure });
    }

    /// Reads what the upstream says while nothing runs; rows are dropped, for they will come again.
    pub(in crate::session) async fn hear(&mut self) -> End {
        poll_fn(|cx| {
            let _ = self.p.up.poll_flush(cx);
            loop {
                let frame = ready!(self.p.up.poll_frame::<Down>(cx));
                return Poll::Ready(match frame {
                    Ok(Some(Down::Rows(_))) => continue,
                    Ok(Some(Down::Open(open))) => End::Reopen(Box::new(open)),
                    Ok(Some(Down::Close)) => End::Closed,
                    Ok(None) | Err(WireError::Io(_)) => End::UpstreamLost,
                    Err(e) => End::Failed(self.bad_frame(&e.to_string())),
                });
            }
        })
        .await
    }

    /// Whether the stream below has room again for what is to be sent again.
    pub(super) fn can_replay(&self) -> bool {
        matches!(&self.p.below, Below::Next(pipe) if pipe.backlog() == 0) && self.replay.is_some()
    }

    /// Sends retained frames again, as fast as the stream below takes them.
    pub(super) fn replay(&mut self) -> Result<bool, Halt> {
        let mut any = false;
        while let Some(pos) = self.replay
            && let Below::Next(pipe) = &mut self.p.below
            && pipe.backlog() <= BACKLOG_MAX
        {
            if pos >= self.p.ledger.end() {
                self.replay = None;
                break;
            }
            any = true;
            self.scratch.clear();
            let read = self.p.retained.read(pos, &mut self.scratch);
            let n_rows = read.map_err(|e| {
                let message = format!("retained frames: {e}");
                Halt::Ours(fail(
                    self.p.open.at,
                    Fault::Local,
                    FailureCode::NotRetained,
                    message,
                ))
            })?;
            let header = Rows {
                session: self.p.ledger.session,
                epoch: self.p.ledger.epoch,
                pos0: pos,
                n_rows,
                content: Content::Hidden(self.p.open.dtype),
                // The client has their answers, or asks for them again.
                want: Want::NONE,
                spent_us: 0,
            };
            let scratch = &self.scratch;
            pipe.push_with(&Down::Rows(header), |b| b.extend_from_slice(scratch));
            let pos_end = pos + u32::from(n_rows);
            if self.outbox.is_empty() {
                let now = Instant::now();
                (self.progress, self.heard) = (now, now);
            }
            self.outbox.sent(pos_end);
            self.replay = Some(pos_end);
        }
        Ok(any)
    }
}
