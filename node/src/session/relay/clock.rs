//! When a relay acts by itself: beats, acknowledgements that wait, deadlines.

use std::{future::Future, task::Context, time::Duration};

use swarm_proto::{FailureCode, Fault, Up};
use tokio::time::Instant;

use super::{Below, Halt, Relay};
use crate::session::failure::fail;

impl Relay {
    pub(super) fn poll_timer(&mut self, cx: &mut Context<'_>) -> Result<(), Halt> {
        loop {
            let due = self.due();
            // Moving a timer takes a lock: it is left alone while it fires too early, not too late.
            if due < self.timer.deadline() || self.timer.is_elapsed() {
                self.timer.as_mut().reset(due);
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Ok(());
            }
            let now = Instant::now();
            self.check_deadlines(now)?;
            if self.at_work() && now >= self.beat {
                self.p.up.push(&Up::Working);
                let _ = self.p.up.poll_flush(cx);
                self.beat = now + self.p.deadlines.beat;
            }
            if self.ack_by.is_some() {
                self.poll_forward(cx)?;
            }
        }
    }

    fn due(&self) -> Instant {
        let mut due = self.last_frame + self.p.deadlines.idle;
        if !self.outbox.is_empty() {
            due = due.min(self.ack_due());
            if matches!(self.p.below, Below::Next(_)) {
                due = due.min(self.heard + self.p.deadlines.silence);
            }
        }
        if self.at_work() {
            due = due.min(self.beat);
        }
        if let Some(by) = self.ack_by
            && self.forwarded
        {
            due = due.min(by);
        }
        if let Below::Client {
            attach: Some(_),
            due: attach_due,
            ..
        } = &self.p.below
        {
            due = due.min(*attach_due);
        }
        due
    }

    /// Whether the client waits for something that is here or below: as long as anything is under way
    /// it hears so, and when it hears nothing more the answer should be there.
    pub(super) fn at_work(&self) -> bool {
        !self.in_flight.is_empty()
            || !self.to_ack.is_empty()
            || !self.outbox.is_empty()
            || self.p.up.is_receiving()
    }

    fn ack_due(&self) -> Instant {
        self.progress + self.ack_timeout()
    }

    fn ack_timeout(&self) -> Duration {
        let below = self
            .p
            .open
            .hops
            .len()
            .saturating_sub(usize::from(self.at()) + 1);
        self.p.deadlines.acked(self.p.ledger.rows_max(), below)
    }

    fn check_deadlines(&mut self, now: Instant) -> Result<(), Halt> {
        let at = self.at();
        let late = |at, fault, message| fail(at, fault, FailureCode::Deadline, message);
        if let Below::Client {
            attach: Some(_),
            due,
            ..
        } = &self.p.below
            && now >= *due
        {
            let message = "the client did not attach its answer stream in time".to_string();
            return Err(Halt::Below(late(at, Fault::Caller, message)));
        }
        let silence = self.p.deadlines.silence;
        if !self.outbox.is_empty()
            && matches!(self.p.below, Below::Next(_))
            && now >= self.heard + silence
        {
            let message = format!("it has work and was silent for {silence:?}");
            return Err(Halt::Below(late(at + 1, Fault::Peer, message)));
        }
        if !self.outbox.is_empty() && now >= self.ack_due() {
            let waited = self.ack_timeout();
            return Err(Halt::Below(match self.p.below {
                Below::Next(_) | Below::Nobody => late(
                    at + 1,
                    Fault::Peer,
                    format!("no acknowledgement within {waited:?}"),
                ),
                Below::Client { .. } => late(
                    at,
                    Fault::Caller,
                    format!("the client read no answer for {waited:?}"),
                ),
            }));
        }
        if now >= self.last_frame + self.p.deadlines.idle {
            let idle = self.p.deadlines.idle;
            return Err(Halt::Ours(late(
                at,
                Fault::Caller,
                format!("no frame for {idle:?}: the session's lease ended"),
            )));
        }
        Ok(())
    }
}
