//! Feeds a standby: another holder of the next hop's layers gets what that hop gets, a little later,
//! so that it can take its place when it is lost.
//!
//! ```text
//! Opening ─▶ Following ─ frames that were sent, at its own pace ─▶ … ─▶ taken: it is the next hop now
//!     └───────────┴─▶ Gone: it failed, and nobody is worse off
//! ```
//!
//! It never holds up the session: it reads what was sent anyway, and what it does not take waits
//! there. Rows decoded one by one go to it in batches, which cost it far less than as many steps.

use std::{
    io,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use swarm_proto::{
    Content, Down, Epoch, Failure, Hop, Open, ROWS_MAX, Rows, SessionId, Standbys, Up, Want,
};
use tokio::time::Instant;

use super::{
    chain::{Next, Shape, open_next},
    hop::Dialer,
    ledger::Outbox,
    wire::Pipe,
};
use crate::net::Proto;

/// Frames that it has not acknowledged: one in work, one on its way.
const FRAMES_MAX: usize = 2;
/// A standby that owes an acknowledgement and says nothing for so long is of no use.
const SILENCE: Duration = Duration::from_secs(2);

/// What a session has sent to the next hop, frame by frame.
pub(super) trait Sent {
    /// One after the last position.
    fn end(&self) -> u32;

    /// Rows of the frame that begins at a position.
    fn rows_at(&self, pos: u32) -> Option<u16>;

    /// Appends the payload of the frame that begins at a position.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    fn append(&mut self, pos: u32, out: &mut Vec<u8>) -> io::Result<()>;
}

/// The opening message for whoever stands by for hop `at` of a route.
pub(super) fn standby_open(open: &Open, at: u8) -> Option<Open> {
    let standby = open.standbys.of(at)?;
    let mut hops = open.hops.clone();
    let hop = hops.get_mut(usize::from(at))?;
    hop.peer = standby.peer;
    hop.addrs.clone_from(&standby.addrs);
    Some(Open {
        hops,
        at,
        standbys: Standbys::default(),
        standing_by: true,
        fork: None,
        ..open.clone()
    })
}

/// A stream to a peer that holds the session, and how much of it.
pub(super) struct Fed {
    pipe: Pipe,
    sent: u32,
}

impl Fed {
    /// The stream to the next hop: that has heard everything.
    pub(super) fn next_hop(pipe: Pipe) -> Self {
        let sent = u32::MAX;
        Self { pipe, sent }
    }
}

/// Goes on over such a stream: the peer is to keep no more than it has.
pub(super) fn resume_at(open: &mut Open, fed: Option<Fed>) -> Option<Pipe> {
    let Fed { pipe, sent } = fed?;
    open.resume = open.resume.min(sent);
    Some(pipe)
}

/// The streams to hop `at` of a new route and to who stands by for it, of those there are: `current`, where
/// that goes to the hop already, and that of the standby so far, which may be the hop now. Goodbye where it is
/// neither.
pub(super) fn streams_to(
    open: &Open,
    at: u8,
    current: Option<Fed>,
    standby: Option<Follower>,
) -> (Option<Fed>, Option<Fed>) {
    let Some(standby) = standby else {
        return (current, None);
    };
    let index = usize::from(at);
    let feeds = |open: &Open| open.hops.get(index).is_some_and(|hop| standby.feeds(hop));
    if current.is_none() && feeds(open) {
        (standby.into_stream(), None)
    } else if standby_open(open, at).is_some_and(|again| feeds(&again)) {
        (current, standby.into_stream())
    } else {
        standby.dismiss();
        (current, None)
    }
}

/// The side of a standby that feeds it.
pub(super) struct Follower {
    to: Hop,
    session: SessionId,
    epoch: Epoch,
    content: Content,
    batch: u16,
    state: State,
    /// Positions sent; while it opens, those that it may keep.
    sent: u32,
    outbox: Outbox,
    heard: Instant,
    scratch: Vec<u8>,
}

#[allow(clippy::large_enum_variant)] // one for a session, and never moved about
enum State {
    Opening(BoxFuture<'static, Result<Next, Failure>>),
    Following(Pipe),
    Gone,
}

impl Follower {
    /// Opens a standby with the message that [`standby_open`] made, over the stream there is or over a
    /// new one, by the deadline. It is driven by [`Follower::poll`].
    pub(super) fn open(
        mut open: Open,
        batch: u16,
        content: Content,
        shape: Shape,
        (current, dialer, deadline): (Option<Fed>, Arc<dyn Dialer>, Instant),
    ) -> Option<Self> {
        let current = resume_at(&mut open, current);
        let to = open.hops.get(usize::from(open.at))?.clone();
        let (session, epoch, hop) = (open.session, open.epoch, to.clone());
        let opening = async move {
            let dial = async || dialer.open(hop.peer, &hop.addrs, Proto::Session).await;
            open_next(&open, shape, current, deadline, dial).await
        };
        Some(Self {
            to,
            session,
            epoch,
            content,
            batch: batch.clamp(1, ROWS_MAX),
            state: State::Opening(Box::pin(opening)),
            sent: u32::MAX,
            outbox: Outbox::default(),
            heard: Instant::now(),
            scratch: Vec::new(),
        })
    }

    /// Whether it is this hop that is fed.
    pub(super) fn feeds(&self, hop: &Hop) -> bool {
        (self.to.peer, self.to.layers) == (hop.peer, hop.layers)
    }

    /// The session forgot the positions from `pos` on.
    pub(super) fn truncate(&mut self, pos: u32) {
        self.sent = self.sent.min(pos);
    }

    /// The stream to it, to go on over, and what it has of the session: what it was sent beyond that
    /// may have been taken back since.
    pub(super) fn into_stream(self) -> Option<Fed> {
        match self.state {
            State::Following(pipe) => Some(Fed {
                pipe,
                sent: self.sent,
            }),
            State::Opening(_) | State::Gone => None,
        }
    }

    /// Says goodbye, as far as the stream takes it at once.
    pub(super) fn dismiss(self) {
        if let Some(Fed { mut pipe, .. }) = self.into_stream() {
            pipe.push(&Down::Close);
            let _ = pipe.poll_flush(&mut Context::from_waker(std::task::Waker::noop()));
        }
    }

    /// Sends what it lacks, as far as it takes it.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, sent: &mut impl Sent) {
        if let Err(why) = self.poll_inner(cx, sent) {
            tracing::debug!(peer = %self.to.peer, layers = %self.to.layers, why, "a standby is lost");
            self.state = State::Gone;
        }
    }

    fn poll_inner(&mut self, cx: &mut Context<'_>, sent: &mut impl Sent) -> Result<(), String> {
        if let State::Opening(opening) = &mut self.state {
            let Poll::Ready(opened) = opening.as_mut().poll(cx) else {
                return Ok(());
            };
            let Next { pipe, held } = opened.map_err(|failure| failure.message)?;
            tracing::debug!(peer = %self.to.peer, layers = %self.to.layers, held, "a standby follows");
            // It may hold what was taken back while it opened.
            self.sent = self.sent.min(held);
            self.state = State::Following(pipe);
        }
        self.hear(cx)?;
        self.send(sent)?;
        let State::Following(pipe) = &mut self.state else {
            return Ok(());
        };
        match pipe.poll_flush(cx) {
            Poll::Ready(Err(e)) => Err(e.to_string()),
            _ => Ok(()),
        }
    }

    fn hear(&mut self, cx: &mut Context<'_>) -> Result<(), String> {
        let State::Following(pipe) = &mut self.state else {
            return Ok(());
        };
        while let Poll::Ready(frame) = pipe.poll_frame::<Up>(cx) {
            self.heard = Instant::now();
            match frame {
                Ok(Some(Up::Ack { epoch, pos_end })) => {
                    let acked = self.outbox.acked(self.epoch, epoch, pos_end);
                    acked.map_err(|e| e.to_string())?;
                }
                Ok(Some(Up::Working)) => {}
                Ok(Some(Up::Failed(failure) | Up::Lost { failure, .. })) => {
                    return Err(failure.message);
                }
                Ok(Some(Up::Opened { .. })) => return Err("it opened twice".into()),
                Ok(None) => return Err("it closed the session".into()),
                Err(e) => return Err(e.to_string()),
            }
        }
        if !self.outbox.is_empty() && self.heard.elapsed() > SILENCE {
            return Err(format!("it was silent for {SILENCE:?}"));
        }
        Ok(())
    }

    fn send(&mut self, sent: &mut impl Sent) -> Result<(), String> {
        while self.outbox.len() < FRAMES_MAX
            && let Some(n_rows) = self.next_rows(sent)
            && let State::Following(pipe) = &mut self.state
        {
            let pos0 = self.sent;
            self.scratch.clear();
            while self.sent < pos0 + u32::from(n_rows) {
                let rows = sent.rows_at(self.sent).unwrap_or(n_rows).max(1);
                let read = sent.append(self.sent, &mut self.scratch);
                read.map_err(|e| format!("retained frames: {e}"))?;
                self.sent += u32::from(rows);
            }
            let header = Rows {
                session: self.session,
                epoch: self.epoch,
                pos0,
                n_rows,
                content: self.content,
                want: Want::NONE,
                spent_us: 0,
            };
            let payload = &self.scratch;
            pipe.push_with(&Down::Rows(header), |b| b.extend_from_slice(payload));
            if self.outbox.is_empty() {
                self.heard = Instant::now();
            }
            self.outbox.sent(self.sent);
        }
        Ok(())
    }

    /// Rows of the next frame for it: one that was sent with several rows as it is, single ones as
    /// soon as a batch of them is there.
    fn next_rows(&self, sent: &impl Sent) -> Option<u16> {
        match sent.rows_at(self.sent)? {
            1 => {}
            rows => return Some(rows),
        }
        let ready = sent.end().saturating_sub(self.sent);
        if ready < u32::from(self.batch) {
            return None;
        }
        let singles = (1..self.batch)
            .take_while(|i| sent.rows_at(self.sent + u32::from(*i)) == Some(1))
            .count();
        u16::try_from(singles + 1).ok()
    }
}
