//! One running session on one hop: a single task that owns both streams and never blocks. Everything
//! sent on is retained, so that a hop that takes the place of the one below can be fed.
//!
//! ```text
//! upstream ──Rows──▶ Ledger ─▶ worker thread ─▶ encode ──Rows──▶ downstream, or Logits ──▶ client
//!          ◀──Ack──  after forwarding                  ◀──Ack──
//! ```
//!
//! After a reopening each side goes on where the lower one stands: what it does not hold is replayed,
//! what it holds already is computed here and not sent.
//!
//! A decoded token costs this task two wake-ups on its way (the frame, the worker's reply) and one
//! off it (the acknowledgement from below); nothing is handed to another task. It does *not* open
//! sessions (hop) nor pair answer streams (tail).

use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    ops::Range,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use engine::{Done, EngineError, Job, Slot, Step, Worker};
use swarm_proto::{
    Answer, Content, Down, Failure, FailureCode, Fault, Form, Open, Rows, Up, WantRows, activation,
    session::LOGITS_BYTES_MAX,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, Sleep, sleep_until, timeout},
};

use super::{
    config::Deadlines,
    failure::{clamp_to_below, fail, is_leaving},
    ledger::{Ledger, Outbox},
    limits::down_rows,
    payload::{decode, micros, push_logits, push_normed},
    retained::Retained,
    slot::SlotGuard,
    standby::Follower,
    topk::{TopK, log_sum_exp},
    wire::{Pipe, WireError},
};
use crate::{metrics::SessionMetrics, net::Stream, phases::Phases};

mod again;
mod blame;
mod clock;
mod counting;

/// Unread acknowledgements that an upstream may pile up before we stop reading its frames.
const ACK_BACKLOG_MAX: usize = 16 * 1024;

/// Results that may wait for the stream below before we stop reading frames: what one write takes.
const BACKLOG_MAX: usize = 64 * 1024;

/// Result buffers longer than this are not kept: 32 rows of 8,192 floats. Logits of a large vocabulary
/// are longer.
const SPARE_FLOATS_MAX: usize = 256 * 1024;

/// Acknowledgements of single rows wait until so many are due, or [`ACK_DELAY`] is over: each write
/// wakes four tasks on its way, and a decoding client waits for logits, not for them.
const ACK_BATCH: usize = 4;
/// Far below any deadline that watches acknowledgements.
const ACK_DELAY: Duration = Duration::from_millis(20);

/// Why a session stopped running.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum End {
    /// The upstream said so.
    Closed,
    /// The upstream's stream ended without a word: it died, or dropped the session.
    UpstreamLost,
    /// Something went wrong here, or was wrong with what came: nothing is worth keeping.
    Failed(Failure),
    /// The route below is broken, or the client's answer stream is.
    BelowLost(Failure),
    /// The upstream opens the session again.
    Reopen(Box<Open>),
}

/// Why a poll stops in the middle.
enum Halt {
    Ours(Failure),
    Below(Failure),
}

/// Where results go.
#[derive(Default)]
pub(super) enum Below {
    /// Nobody: the route is broken here, or we stand by.
    #[default]
    Nobody,
    /// The next hop.
    Next(Pipe),
    /// The client itself: we are the tail.
    Client {
        answers: Pipe,
        /// Filled in when the client attaches.
        attach: Option<oneshot::Receiver<Stream>>,
        top: TopK,
        /// The session fails when nobody attached by then.
        due: Instant,
    },
}

/// What a relay is made of, once the chain below has opened.
pub(super) struct Parts {
    /// As it was opened last.
    pub(super) open: Open,
    pub(super) ledger: Ledger,
    pub(super) layers: Range<u32>,
    pub(super) worker: Worker,
    pub(super) slot: SlotGuard,
    pub(super) up: Pipe,
    pub(super) below: Below,
    /// Positions that the hop below holds.
    pub(super) below_held: u32,
    /// Who stands by for the hop below.
    pub(super) standby: Option<Follower>,
    pub(super) retained: Retained,
    pub(super) deadlines: Deadlines,
    pub(super) frames_in_flight: usize,
    pub(super) metrics: SessionMetrics,
}

/// A frame in the worker.
struct InFlight {
    rows: Rows,
    step: tracing::Span,
}

/// The running session.
pub(super) struct Relay {
    p: Parts,
    results: mpsc::UnboundedReceiver<Result<Done, EngineError>>,
    reply: mpsc::UnboundedSender<Result<Done, EngineError>>,
    in_flight: VecDeque<InFlight>,
    outbox: Outbox,
    /// Forwarded into the buffer, to be acknowledged once the buffer is on its way.
    to_ack: Vec<u32>,
    /// By when, at the latest; `None` while nothing is owed.
    ack_by: Option<Instant>,
    /// Nothing waits for the stream below.
    forwarded: bool,
    /// Buffers of results that were sent on, for rows that arrive.
    spare: Vec<Vec<f32>>,
    /// The last sign of progress from below while something was owed.
    progress: Instant,
    /// The last word from below.
    heard: Instant,
    /// When the upstream is next told that this hop is at work.
    beat: Instant,
    last_frame: Instant,
    timer: Pin<Box<Sleep>>,
    /// Where the next retained frame to be sent again begins; `None` when all are sent.
    replay: Option<u32>,
    /// A payload that is kept but not sent, or sent again.
    scratch: Vec<u8>,
    phases: Phases,
}

impl Relay {
    /// A session that is open; the upstream is told so.
    pub(super) fn new(mut parts: Parts) -> Self {
        parts.up.set_limits(down_rows(parts.ledger.n_embd));
        let now = Instant::now();
        // Bounded by `frames_in_flight`: one reply per submitted frame.
        let (reply, results) = mpsc::unbounded_channel();
        let mut relay = Self {
            results,
            reply,
            in_flight: VecDeque::with_capacity(parts.frames_in_flight),
            outbox: Outbox::default(),
            to_ack: Vec::with_capacity(parts.frames_in_flight),
            ack_by: None,
            forwarded: true,
            spare: Vec::new(),
            progress: now,
            heard: now,
            beat: now,
            last_frame: now,
            timer: Box::pin(sleep_until(now)),
            replay: None,
            scratch: Vec::new(),
            phases: Phases::default(),
            p: parts,
        };
        if matches!(relay.p.below, Below::Next(_)) && relay.p.below_held < relay.p.ledger.end() {
            relay.replay = Some(relay.p.retained.frame_of(relay.p.below_held));
        }
        relay.say_opened();
        relay
    }

    /// Runs until the session ends.
    ///
    /// # Cancel safety
    /// Safe: all state is in `self`, so that the caller may still say goodbye.
    pub(super) async fn run(&mut self) -> End {
        poll_fn(|cx| self.poll(cx)).await
    }

    /// Tells both sides how it ended, within the deadline for goodbyes. Dropping `self` then frees
    /// the KV.
    pub(super) async fn finish(mut self, end: &End) {
        // Somebody may wait for the room; goodbyes take as long as others like.
        self.p.slot.free();
        let failure = match end {
            End::Failed(failure) | End::BelowLost(failure) => Some(failure.clone()),
            End::Closed | End::Reopen(_) => None,
            End::UpstreamLost => Some(fail(
                self.at().saturating_sub(1),
                Fault::Peer,
                FailureCode::DownstreamLost,
                "the hop before the last closed the session without a word",
            )),
        };
        if let Some(failure) = &failure
            && *end != End::UpstreamLost
        {
            self.p.up.push(&Up::Failed(failure.clone()));
        }
        if let Some(standby) = self.p.standby.take() {
            standby.dismiss();
        }
        // Nobody below waits for a client that did not come back here; one that goes on without this hop comes.
        let goes_on = failure.as_ref().is_some_and(is_leaving);
        match &mut self.p.below {
            Below::Nobody => {}
            Below::Next(_) if goes_on => {}
            Below::Next(pipe) => pipe.push(&Down::Close),
            Below::Client { answers, .. } => {
                if let Some(failure) = failure {
                    answers.push(&Answer::Failed(failure));
                }
            }
        }
        let goodbye = self.p.deadlines.close;
        let below = async {
            match &mut self.p.below {
                Below::Nobody => Ok(()),
                Below::Next(pipe) => pipe.close().await,
                Below::Client { answers, .. } => answers.close().await,
            }
        };
        let _ = tokio::join!(timeout(goodbye, self.p.up.close()), timeout(goodbye, below));
    }

    /// Our place on the route.
    pub(super) fn at(&self) -> u8 {
        self.p.open.at
    }

    /// The session as it was opened last.
    pub(super) fn open(&self) -> &Open {
        &self.p.open
    }

    pub(super) fn worker(&self) -> &Worker {
        &self.p.worker
    }

    pub(super) fn slot(&self) -> Slot {
        self.p.slot.slot()
    }

    pub(super) fn retained(&mut self) -> &mut Retained {
        &mut self.p.retained
    }

    /// Whether nothing is under way, and nothing came for so long.
    pub(super) fn rests(&self, time: Duration) -> bool {
        !self.at_work() && Instant::now() >= self.last_frame + time
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        match self.poll_inner(cx) {
            Ok(poll) => poll,
            Err(Halt::Ours(failure)) => Poll::Ready(End::Failed(failure)),
            Err(Halt::Below(failure)) => Poll::Ready(End::BelowLost(failure)),
        }
    }

    fn poll_inner(&mut self, cx: &mut Context<'_>) -> Result<Poll<End>, Halt> {
        loop {
            // Results first: somebody below waits for them.
            let mut busy = self.poll_results(cx)?;
            busy |= self.replay()?;
            self.poll_forward(cx)?;
            busy |= self.can_replay();
            busy |= self.poll_below(cx)?;
            match self.poll_frame(cx)? {
                Poll::Ready(Some(end)) => return Ok(Poll::Ready(end)),
                Poll::Ready(None) => busy = true,
                Poll::Pending => {}
            }
            if !busy {
                break;
            }
        }
        if let Some(standby) = &mut self.p.standby {
            standby.poll(cx, &mut self.p.retained);
        }
        self.poll_timer(cx)?;
        Ok(Poll::Pending)
    }

    /// Takes the worker's results and encodes them into the buffer towards below.
    fn poll_results(&mut self, cx: &mut Context<'_>) -> Result<bool, Halt> {
        let mut any = false;
        while let Poll::Ready(Some(result)) = self.results.poll_recv(cx) {
            any = true;
            let Some(InFlight { rows, step }) = self.in_flight.pop_front() else {
                continue;
            };
            let done = result.map_err(|e| self.engine_failure(&e))?;
            let compute_us = micros(done.compute);
            step.record("compute_us", compute_us);
            step.record("queued_us", micros(done.queued));
            self.count(&rows, &done);
            let pos_end = rows.pos0 + u32::from(rows.n_rows);
            let sent = self.encode(rows, &done.rows, compute_us)?;
            if self.spare.len() < self.p.frames_in_flight
                && done.rows.capacity() <= SPARE_FLOATS_MAX
            {
                self.spare.push(done.rows);
            }
            let now = Instant::now();
            if sent {
                if self.outbox.is_empty() {
                    (self.progress, self.heard) = (now, now);
                }
                self.outbox.sent(pos_end);
            }
            self.to_ack.push(pos_end);
            let patient = rows.n_rows == 1 && self.to_ack.len() < ACK_BATCH;
            let by = if patient { now + ACK_DELAY } else { now };
            self.ack_by = Some(self.ack_by.map_or(by, |earlier| earlier.min(by)));
        }
        Ok(any)
    }

    /// Keeps a result, and sends it on; whether it did.
    fn encode(&mut self, rows: Rows, out: &[f32], compute_us: u32) -> Result<bool, Halt> {
        let spent_us = rows.spent_us.saturating_add(compute_us);
        let at = self.at();
        let pos_end = rows.pos0 + u32::from(rows.n_rows);
        let (dtype, n_embd, tail) = (self.p.open.dtype, self.p.ledger.n_embd, self.tail());
        let header = Rows {
            content: Content::Hidden(dtype),
            spent_us,
            ..rows
        };
        if let Some(standby) = &mut self.p.standby {
            // Not before what is retained is written anew: it would be fed what was taken back.
            standby.truncate(header.pos0);
        }
        match &mut self.p.below {
            // Nobody: a frame that was under way when the route broke.
            Below::Nobody if tail => return Ok(false),
            // Finite: the stage has looked.
            Below::Next(pipe) if pos_end > self.p.below_held => {
                pipe.push_with(&Down::Rows(header), |b| {
                    activation::encode(out, n_embd, dtype, b)
                });
                let payload = pipe.pushed(header.payload_len(n_embd));
                self.p.retained.push(&header, payload);
            }
            Below::Next(_) | Below::Nobody => {
                self.scratch.clear();
                activation::encode(out, n_embd, dtype, &mut self.scratch);
                self.p.retained.push(&header, &self.scratch);
                return Ok(false);
            }
            Below::Client { answers, .. } if rows.want.form == Form::Normed => {
                push_normed(answers, &rows, out, n_embd, spent_us);
            }
            Below::Client { answers, top, .. } => {
                let n_vocab = self.p.ledger.n_vocab as usize;
                let n_out = (out.len() / n_vocab.max(1)) as u32;
                for (i, row) in (pos_end.saturating_sub(n_out)..).zip(out.chunks_exact(n_vocab)) {
                    let Some(lse) = log_sum_exp(row) else {
                        let message = "logits hold NaN or infinity";
                        return Err(Halt::Ours(fail(
                            at,
                            Fault::Local,
                            FailureCode::Engine,
                            message,
                        )));
                    };
                    push_logits(answers, top, &rows, i, row, lse, spent_us);
                }
            }
        }
        Ok(true)
    }

    pub(super) fn tail(&self) -> bool {
        usize::from(self.at()) + 1 == self.p.open.hops.len()
    }

    /// Writes the buffer out; once it is on its way, the upstream hears of it.
    fn poll_forward(&mut self, cx: &mut Context<'_>) -> Result<(), Halt> {
        let sent = match &mut self.p.below {
            // A standby: what it computed is kept here.
            Below::Nobody => true,
            Below::Next(pipe) => match pipe.poll_flush(cx) {
                Poll::Ready(Err(e)) => {
                    // What it said before it went is worth more than the broken pipe.
                    self.poll_below(cx)?;
                    return Err(self.lost_below(&e));
                }
                sent => sent.is_ready(),
            },
            Below::Client {
                answers, attach, ..
            } => {
                if let Some(waiting) = attach
                    && let Poll::Ready(stream) = Pin::new(waiting).poll(cx)
                {
                    *attach = None;
                    let Ok(stream) = stream else {
                        return Err(self.client_gone());
                    };
                    answers.attach(stream);
                }
                let sent = answers.poll_flush(cx);
                sent.map_err(|_| self.client_gone())?.is_ready()
            }
        };
        self.forwarded = sent;
        if sent && let Some(by) = self.ack_by {
            if matches!(self.p.below, Below::Client { .. }) {
                self.outbox.clear();
            }
            if by <= Instant::now() {
                self.ack_by = None;
                let epoch = self.p.ledger.epoch;
                for pos_end in self.to_ack.drain(..) {
                    self.p.up.push(&Up::Ack { epoch, pos_end });
                }
            }
        }
        // An upstream that is gone shows when its frames are read; here it would hide a failure.
        let _ = self.p.up.poll_flush(cx);
        Ok(())
    }

    /// Reads what comes back from below: acknowledgements, failures, the end of the stream.
    fn poll_below(&mut self, cx: &mut Context<'_>) -> Result<bool, Halt> {
        let mut any = false;
        loop {
            let pipe = match &mut self.p.below {
                Below::Nobody => return Ok(any),
                Below::Next(pipe) => pipe,
                Below::Client { answers, .. } => {
                    match answers.poll_frame::<swarm_proto::Attach>(cx) {
                        Poll::Pending => return Ok(any),
                        // The client has nothing to say on this stream: an end, or a nonsense, is the end.
                        Poll::Ready(_) => return Err(self.client_gone()),
                    }
                }
            };
            match pipe.poll_frame::<Up>(cx) {
                Poll::Pending => return Ok(any),
                Poll::Ready(Ok(Some(Up::Ack { epoch, pos_end }))) => {
                    any = true;
                    self.outbox
                        .acked(self.p.ledger.epoch, epoch, pos_end)
                        .map_err(|e| self.bad_below(&e.to_string()))?;
                    let now = Instant::now();
                    (self.progress, self.heard) = (now, now);
                }
                Poll::Ready(Ok(Some(Up::Working))) => {
                    self.heard = Instant::now();
                    // The client waits for the tail: it hears of work however far down that is.
                    if !self.at_work() && self.p.up.backlog() == 0 {
                        any = true;
                        self.p.up.push(&Up::Working);
                    }
                }
                Poll::Ready(Ok(Some(Up::Failed(failure) | Up::Lost { failure, .. }))) => {
                    let hops = self.p.open.hops.len();
                    return Err(Halt::Below(clamp_to_below(failure, self.at(), hops)));
                }
                Poll::Ready(Ok(Some(Up::Opened { .. }))) => {
                    return Err(self.bad_below("a second opened message"));
                }
                Poll::Ready(Ok(None)) => return Err(self.lost_below(&"the stream ended")),
                Poll::Ready(Err(WireError::Io(e))) => return Err(self.lost_below(&e)),
                Poll::Ready(Err(e)) => return Err(self.bad_below(&e.to_string())),
            }
        }
    }

    /// Takes the next frame, unless enough are under way: then the upstream's writes stall.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Result<Poll<Option<End>>, Halt> {
        let backlog = match &self.p.below {
            Below::Nobody => 0,
            Below::Next(pipe) => pipe.backlog(),
            Below::Client { answers, .. } => answers.backlog(),
        };
        if self.in_flight.len() >= self.p.frames_in_flight
            || self.replay.is_some()
            || backlog > BACKLOG_MAX
            || self.promised() >= LOGITS_BYTES_MAX
            || self.p.up.backlog() > ACK_BACKLOG_MAX
        {
            return Ok(Poll::Pending);
        }
        let Poll::Ready(frame) = self.p.up.poll_frame::<Down>(cx) else {
            return Ok(Poll::Pending);
        };
        match frame {
            Ok(Some(Down::Rows(rows))) => self.on_rows(rows).map(|()| Poll::Ready(None)),
            Ok(Some(Down::Close)) => Ok(Poll::Ready(Some(End::Closed))),
            Ok(Some(Down::Open(open))) => Ok(Poll::Ready(Some(End::Reopen(Box::new(open))))),
            Ok(None) | Err(WireError::Io(_)) => Ok(Poll::Ready(Some(End::UpstreamLost))),
            Err(e) => Err(Halt::Ours(self.bad_frame(&e.to_string()))),
        }
    }

    /// Bytes of whole rows of logits that frames in the worker will bring. Together with what one
    /// frame may ask for, it bounds what waits for a client that does not read.
    fn promised(&self) -> usize {
        if !matches!(self.p.below, Below::Client { .. }) {
            return 0;
        }
        let numbers = |frame: &InFlight| {
            let want = frame.rows.want;
            let rows = match want.rows {
                WantRows::None => 0,
                WantRows::Last => 1,
                WantRows::All => usize::from(frame.rows.n_rows),
            };
            let width = match want.form {
                Form::Top(_) => 0,
                Form::Full => self.p.ledger.n_vocab,
                Form::Normed => self.p.ledger.n_embd,
            };
            rows.saturating_mul(width as usize)
        };
        let numbers = self.in_flight.iter().map(numbers);
        let numbers = numbers.fold(0, usize::saturating_add);
        numbers.saturating_mul(size_of::<f32>())
    }

    fn on_rows(&mut self, rows: Rows) -> Result<(), Halt> {
        if rows.pos0 < self.p.ledger.end() {
            // Written anew: what the hop below holds from here on is not this.
            self.p.below_held = self.p.below_held.min(rows.pos0);
        }
        let payload = self.p.up.payload();
        let input = match self.p.ledger.accept(&rows, payload.len()) {
            Ok(()) => decode(
                &rows,
                payload,
                self.p.ledger.n_embd,
                self.spare.pop().unwrap_or_default(),
            ),
            Err(e) => Err(e.to_string()),
        };
        let input = input.map_err(|e| Halt::Ours(self.bad_frame(&e)))?;
        self.last_frame = Instant::now();
        if self.in_flight.is_empty() {
            self.beat = self.last_frame + self.p.deadlines.beat;
        }
        let want = match (&self.p.below, rows.want.rows) {
            (Below::Next(_) | Below::Nobody, _) | (_, WantRows::None) => engine::Want::None,
            _ if rows.want.form == Form::Normed => engine::Want::Normed,
            (_, WantRows::Last) => engine::Want::Last,
            (_, WantRows::All) => engine::Want::All,
        };
        let step = Step {
            slot: self.p.slot.slot(),
            layers: self.p.layers.clone(),
            pos0: rows.pos0,
            n_rows: u32::from(rows.n_rows),
            want,
        };
        let span = tracing::debug_span!(
            "step",
            pos0 = rows.pos0,
            n_rows = rows.n_rows,
            compute_us = tracing::field::Empty,
            queued_us = tracing::field::Empty,
        );
        self.count_begun(&rows);
        self.in_flight.push_back(InFlight { rows, step: span });
        let reply = self.reply.clone();
        let job = Job {
            step,
            input,
            reply: Box::new(move |result| {
                // Nobody listens any more when the session ended meanwhile.
                let _ = reply.send(result);
            }),
        };
        // Never with a queue of `SessionLimits::worker_queue`.
        let at = self.at();
        let full = |e: engine::Busy| fail(at, Fault::Local, FailureCode::Full, e.to_string());
        self.p.worker.submit(job).map_err(|e| Halt::Ours(full(e)))
    }
}
