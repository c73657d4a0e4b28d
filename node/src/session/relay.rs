//! One running session on one hop: a single task that owns both streams and never blocks.
//!
//! ```text
//! upstream ──Rows──▶ Ledger ─▶ worker thread ─▶ encode ──Rows──▶ downstream, or Logits ──▶ client
//!          ◀──Ack──  after forwarding                  ◀──Ack──
//! ```
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

use engine::{Done, EngineError, Job, Step, Worker};
use swarm_proto::{
    Answer, Content, Down, Dtype, Failure, FailureCode, Fault, Rows, Up, WantRows, activation,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, Sleep, sleep_until, timeout},
};

use super::{
    config::Deadlines,
    failure::{clamp_to_below, fail},
    ledger::{Ledger, Outbox},
    payload::{decode, micros, push_logits},
    slot::SlotGuard,
    topk::{TopK, log_sum_exp},
    wire::{Pipe, WireError},
};
use crate::net::Stream;

/// Unread acknowledgements that an upstream may pile up before we stop reading its frames.
const ACK_BACKLOG_MAX: usize = 16 * 1024;

/// Results that may wait for the stream below before we stop reading frames: what one write takes.
const BACKLOG_MAX: usize = 64 * 1024;

/// Acknowledgements of single rows wait until so many are due, or [`ACK_DELAY`] is over: each write
/// wakes four tasks on its way, and a decoding client waits for logits, not for them.
const ACK_BATCH: usize = 4;
/// Far below any deadline that watches acknowledgements.
const ACK_DELAY: Duration = Duration::from_millis(20);

/// How a session ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum End {
    /// The upstream said so.
    Closed,
    /// The upstream's stream ended without a word: it died, or dropped the session.
    UpstreamLost,
    /// Something went wrong, here or below.
    Failed(Failure),
}

/// Where results go.
pub(super) enum Below {
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
    pub(super) at: u8,
    pub(super) hops: usize,
    pub(super) ledger: Ledger,
    pub(super) dtype: Dtype,
    pub(super) layers: Range<u32>,
    pub(super) n_vocab: u32,
    pub(super) worker: Worker,
    pub(super) slot: SlotGuard,
    pub(super) up: Pipe,
    pub(super) below: Below,
    pub(super) deadlines: Deadlines,
    pub(super) frames_in_flight: usize,
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
    last_frame: Instant,
    timer: Pin<Box<Sleep>>,
}

impl Relay {
    pub(super) fn new(parts: Parts) -> Self {
        let now = Instant::now();
        // Bounded by `frames_in_flight`: one reply per submitted frame.
        let (reply, results) = mpsc::unbounded_channel();
        Self {
            results,
            reply,
            in_flight: VecDeque::with_capacity(parts.frames_in_flight),
            outbox: Outbox::default(),
            to_ack: Vec::with_capacity(parts.frames_in_flight),
            ack_by: None,
            forwarded: true,
            spare: Vec::new(),
            progress: now,
            last_frame: now,
            timer: Box::pin(sleep_until(now)),
            p: parts,
        }
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
        let failure = match end {
            End::Failed(failure) => Some(failure.clone()),
            End::Closed => None,
            End::UpstreamLost => Some(fail(
                self.p.at.saturating_sub(1),
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
        match &mut self.p.below {
            // A lost upstream is passed on as it was felt: by dropping the stream.
            Below::Next(pipe) if *end != End::UpstreamLost => pipe.push(&Down::Close),
            Below::Next(_) => {}
            Below::Client { answers, .. } => {
                if let Some(failure) = failure {
                    answers.push(&Answer::Failed(failure));
                }
            }
        }
        let below = match &mut self.p.below {
            Below::Next(pipe) => pipe,
            Below::Client { answers, .. } => answers,
        };
        let goodbye = self.p.deadlines.close;
        let _ = tokio::join!(
            timeout(goodbye, self.p.up.close()),
            timeout(goodbye, below.close())
        );
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        match self.poll_inner(cx) {
            Ok(poll) => poll,
            Err(failure) => Poll::Ready(End::Failed(failure)),
        }
    }

    fn poll_inner(&mut self, cx: &mut Context<'_>) -> Result<Poll<End>, Failure> {
        loop {
            // Results first: somebody below waits for them.
            let mut busy = self.poll_results(cx)?;
            self.poll_forward(cx)?;
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
        self.poll_timer(cx)?;
        Ok(Poll::Pending)
    }

    /// Takes the worker's results and encodes them into the buffer towards below.
    fn poll_results(&mut self, cx: &mut Context<'_>) -> Result<bool, Failure> {
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
            let pos_end = rows.pos0 + u32::from(rows.n_rows);
            self.encode(rows, &done.rows, compute_us)?;
            if self.spare.len() < self.p.frames_in_flight {
                self.spare.push(done.rows);
            }
            let now = Instant::now();
            if self.outbox.is_empty() {
                self.progress = now;
            }
            self.outbox.sent(pos_end);
            self.to_ack.push(pos_end);
            let patient = rows.n_rows == 1 && self.to_ack.len() < ACK_BATCH;
            let by = if patient { now + ACK_DELAY } else { now };
            self.ack_by = Some(self.ack_by.map_or(by, |earlier| earlier.min(by)));
        }
        Ok(any)
    }

    fn encode(&mut self, rows: Rows, out: &[f32], compute_us: u32) -> Result<(), Failure> {
        let spent_us = rows.spent_us.saturating_add(compute_us);
        let at = self.p.at;
        match &mut self.p.below {
            Below::Next(pipe) => {
                // Finite: the stage has looked.
                let header = Rows {
                    content: Content::Hidden(self.p.dtype),
                    spent_us,
                    ..rows
                };
                let (n_embd, dtype) = (self.p.ledger.n_embd, self.p.dtype);
                pipe.push_with(&Down::Rows(header), |b| {
                    activation::encode(out, n_embd, dtype, b)
                });
            }
            Below::Client { answers, top, .. } => {
                let n_vocab = self.p.n_vocab as usize;
                let pos_end = rows.pos0 + u32::from(rows.n_rows);
                let n_out = (out.len() / n_vocab.max(1)) as u32;
                for (i, row) in (pos_end.saturating_sub(n_out)..).zip(out.chunks_exact(n_vocab)) {
                    let Some(lse) = log_sum_exp(row) else {
                        let message = "logits hold NaN or infinity";
                        return Err(fail(at, Fault::Local, FailureCode::Engine, message));
                    };
                    push_logits(answers, top, &rows, i, row, lse, spent_us);
                }
            }
        }
        Ok(())
    }

    /// Writes the buffer out; once it is on its way, the upstream hears of it.
    fn poll_forward(&mut self, cx: &mut Context<'_>) -> Result<(), Failure> {
        let sent = match &mut self.p.below {
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
    fn poll_below(&mut self, cx: &mut Context<'_>) -> Result<bool, Failure> {
        let mut any = false;
        loop {
            let pipe = match &mut self.p.below {
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
                    self.progress = Instant::now();
                }
                Poll::Ready(Ok(Some(Up::Failed(failure)))) => {
                    return Err(clamp_to_below(failure, self.p.at, self.p.hops));
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
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Result<Poll<Option<End>>, Failure> {
        let backlog = match &self.p.below {
            Below::Next(pipe) => pipe.backlog(),
            Below::Client { answers, .. } => answers.backlog(),
        };
        if self.in_flight.len() >= self.p.frames_in_flight
            || backlog > BACKLOG_MAX
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
            Ok(Some(Down::Open(_))) => Err(self.bad_frame("a second open message")),
            Ok(None) | Err(WireError::Io(_)) => Ok(Poll::Ready(Some(End::UpstreamLost))),
            Err(e) => Err(self.bad_frame(&e.to_string())),
        }
    }

    fn on_rows(&mut self, rows: Rows) -> Result<(), Failure> {
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
        let input = input.map_err(|e| self.bad_frame(&e))?;
        self.last_frame = Instant::now();
        let want = match (&self.p.below, rows.want.rows) {
            (Below::Next(_), _) | (_, WantRows::None) => engine::Want::None,
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
        let full =
            |e: engine::Busy| fail(self.p.at, Fault::Local, FailureCode::Full, e.to_string());
        self.p.worker.submit(job).map_err(full)
    }

    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Result<(), Failure> {
        loop {
            let due = self.due();
            // Moving a timer takes a lock: it is left alone while it fires too early, not too late.
            if due < self.timer.deadline() || self.timer.is_elapsed() {
                self.timer.as_mut().reset(due);
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Ok(());
            }
            self.check_deadlines(Instant::now())?;
            if self.ack_by.is_some() {
                self.poll_forward(cx)?;
            }
        }
    }

    fn due(&self) -> Instant {
        let mut due = self.last_frame + self.p.deadlines.idle;
        if !self.outbox.is_empty() {
            due = due.min(self.ack_due());
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

    fn ack_due(&self) -> Instant {
        self.progress + self.ack_timeout()
    }

    fn ack_timeout(&self) -> Duration {
        let below = self.p.hops.saturating_sub(usize::from(self.p.at) + 1);
        self.p.deadlines.acked(self.p.ledger.rows_max(), below)
    }

    fn check_deadlines(&mut self, now: Instant) -> Result<(), Failure> {
        let at = self.p.at;
        let fail = |at, fault, message| Err(fail(at, fault, FailureCode::Deadline, message));
        if let Below::Client {
            attach: Some(_),
            due,
            ..
        } = &self.p.below
            && now >= *due
        {
            let message = "the client did not attach its answer stream in time".to_string();
            return fail(at, Fault::Caller, message);
        }
        if !self.outbox.is_empty() && now >= self.ack_due() {
            let waited = self.ack_timeout();
            return match self.p.below {
                Below::Next(_) => fail(
                    at + 1,
                    Fault::Peer,
                    format!("no acknowledgement within {waited:?}"),
                ),
                Below::Client { .. } => fail(
                    at,
                    Fault::Caller,
                    format!("the client read no answer for {waited:?}"),
                ),
            };
        }
        if now >= self.last_frame + self.p.deadlines.idle {
            let idle = self.p.deadlines.idle;
            return fail(
                at,
                Fault::Caller,
                format!("no frame for {idle:?}: the session's lease ended"),
            );
        }
        Ok(())
    }

    fn bad_frame(&self, what: &str) -> Failure {
        fail(self.p.at, Fault::Caller, FailureCode::BadFrame, what)
    }

    fn bad_below(&self, what: &str) -> Failure {
        fail(
            self.p.at + 1,
            Fault::Peer,
            FailureCode::BadFrame,
            format!("its upstream refused: {what}"),
        )
    }

    fn lost_below(&self, why: &impl std::fmt::Display) -> Failure {
        fail(
            self.p.at + 1,
            Fault::Peer,
            FailureCode::DownstreamLost,
            format!("connection lost: {why}"),
        )
    }

    fn client_gone(&self) -> Failure {
        let message = "the client closed its answer stream";
        fail(
            self.p.at,
            Fault::Caller,
            FailureCode::DownstreamLost,
            message,
        )
    }

    fn engine_failure(&self, e: &EngineError) -> Failure {
        let (fault, code) = match e.fault() {
            engine::Fault::Caller => (Fault::Caller, FailureCode::BadFrame),
            engine::Fault::Local => (Fault::Local, FailureCode::Engine),
        };
        fail(self.p.at, fault, code, e.to_string())
    }
}
