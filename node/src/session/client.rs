//! The client's end of a session: token ids out to the first hop, logits in from the tail.
//!
//! ```text
//! feed ─▶ queue ─▶ frames (a window of them) ─▶ hop 0 … tail ─▶ rows ─▶ next_logits
//! ```
//!
//! When a hop is lost the session fails, but it is not over: it knows what it fed and what was
//! answered, and can be opened again along another route (`Opener::reopen`). The last answer then
//! comes twice, and must be the same.
//!
//! There is no task behind it: `feed` and `next_logits` drive both streams while they wait, so an
//! answer wakes the caller itself. The client holds the root of truth (token ids); hops hold only
//! what can be computed again.

use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use engine::PREFILL_CHUNK;
use swarm_proto::{
    Answer, Content, Down, Dtype, Epoch, Failure, FailureCode, Fault, Form, ModelId, Numerics,
    Rows, SessionId, Up, Want, WantRows,
};
use tokio::time::{Instant, Sleep, sleep_until, timeout};

use super::{
    chain::Shape,
    config::Deadlines,
    error::ClientError,
    failure::fail,
    ledger::Outbox,
    open::Route,
    row::{Answered, LogitsRow},
    standby::Follower,
    wire::{Pipe, WireError},
};

mod again;
mod fork;

use again::History;
use fork::Lending;
pub use fork::{Beginning, Lender};

/// Frames sent and not yet acknowledged by the first hop: enough to keep its queue full while the
/// acknowledgements travel, few enough that a truncation does not wait for a long prompt.
const WINDOW_FRAMES: usize = 8;
/// Tokens whose time is kept.
const STEPS_MAX: usize = 32;
/// Bytes of logits that wait for `next_logits` before reading stops, and with it the whole chain.
const ROWS_BYTES_MAX: usize = 32 << 20;
/// How long the client waits for the hop that failed to be named, once the tail's stream ended.
const NAMING_GRACE: Duration = Duration::from_millis(500);

/// An open session. Dropping it closes it, and frees its KV on every hop.
pub struct ClientSession {
    pub(super) up: Pipe,
    pub(super) answers: Pipe,
    session: SessionId,
    model: ModelId,
    epoch: Epoch,
    /// The last epoch that opened, and in which rows were sent.
    ran: Epoch,
    route: Route,
    /// Who stands by for the first hop.
    standby: Option<Follower>,
    dtype: Dtype,
    numerics: Numerics,
    n_ctx: u32,
    shape: Shape,
    deadlines: Deadlines,
    /// Positions held once everything queued has run.
    pos: u32,
    queue: VecDeque<Chunk>,
    /// Everything fed, by position, and the frames that it went in.
    tokens: Vec<u32>,
    frames: Vec<Frame>,
    /// Positions that the first hop had from another session.
    spared: u32,
    lending: Lending,
    /// The last row that came.
    last: Option<Answered>,
    /// How far its log-probability may differ when it comes again.
    tolerance: f32,
    /// Rows up to this position were asked for again when the session was reopened.
    again: Option<u32>,
    /// From here on the hops may hold what was taken back: no answer to what came instead has come yet.
    floor: Option<u32>,
    /// Answers that still come to what was asked before.
    stale: usize,
    /// Every row asked for before this position came.
    answered: u32,
    outbox: Outbox,
    /// The row that was asked for alone, and when.
    asked_alone: Option<(u32, Instant)>,
    /// How long the answers to such rows took, the last ones.
    steps: VecDeque<Duration>,
    /// Rows that the tail owes: position and form, in order.
    asked: VecDeque<(u32, Form)>,
    ready: VecDeque<LogitsRow>,
    ready_bytes: usize,
    spare: Vec<LogitsRow>,
    progress: Instant,
    /// The last word of the first hop.
    heard: Instant,
    rows_max: u32,
    timer: Pin<Box<Sleep>>,
    failed: Option<ClientError>,
    /// The tail's stream ended; until then the hop at fault may still be named.
    answers_over: Option<(Instant, Failure)>,
}

/// A frame that was fed.
#[derive(Debug, Clone, Copy)]
struct Frame {
    pos0: u32,
    n_rows: u32,
    want: Want,
}

impl Frame {
    fn end(&self) -> u32 {
        self.pos0 + self.n_rows
    }
}

/// Tokens of one frame.
struct Chunk {
    pos0: u32,
    tokens: Vec<u32>,
    want: Want,
}

/// What opening a route gave.
pub(super) struct Opened {
    pub(super) up: Pipe,
    pub(super) answers: Pipe,
    pub(super) session: SessionId,
    pub(super) model: ModelId,
    pub(super) epoch: Epoch,
    pub(super) route: Route,
    pub(super) standby: Option<Follower>,
    pub(super) dtype: Dtype,
    pub(super) numerics: Numerics,
    pub(super) n_ctx: u32,
    pub(super) shape: Shape,
    pub(super) deadlines: Deadlines,
}

impl ClientSession {
    pub(super) fn new(o: Opened) -> Self {
        let now = Instant::now();
        Self {
            up: o.up,
            answers: o.answers,
            session: o.session,
            model: o.model,
            epoch: o.epoch,
            ran: o.epoch,
            route: o.route,
            standby: o.standby,
            dtype: o.dtype,
            numerics: o.numerics,
            n_ctx: o.n_ctx,
            shape: o.shape,
            deadlines: o.deadlines,
            pos: 0,
            queue: VecDeque::new(),
            tokens: Vec::new(),
            frames: Vec::new(),
            spared: 0,
            lending: Lending::default(),
            last: None,
            tolerance: 0.0,
            again: None,
            floor: None,
            stale: 0,
            answered: 0,
            outbox: Outbox::default(),
            asked_alone: None,
            steps: VecDeque::new(),
            asked: VecDeque::new(),
            ready: VecDeque::new(),
            ready_bytes: 0,
            spare: Vec::new(),
            progress: now,
            heard: now,
            rows_max: 1,
            timer: Box::pin(sleep_until(now)),
            failed: None,
            answers_over: None,
        }
    }

    /// Positions that the session holds, counting what was fed and still travels.
    pub fn pos(&self) -> u32 {
        self.pos
    }

    /// Positions that the session can hold.
    pub fn n_ctx(&self) -> u32 {
        self.n_ctx
    }

    /// Tokens in the model's vocabulary, as the hops say.
    pub fn n_vocab(&self) -> u32 {
        self.shape.n_vocab
    }

    /// The hops, in order, and who stands by.
    pub fn route(&self) -> &Route {
        &self.route
    }

    /// How hidden states travel between the hops.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The session's id: the same at every hop, for logs.
    pub fn id(&self) -> SessionId {
        self.session
    }

    /// Forgets the positions from `pos` on; the hops do so when the next frame arrives. Rows that
    /// were asked for before still come.
    ///
    /// # Errors
    /// `pos` lies beyond what the session holds.
    pub fn truncate(&mut self, pos: u32) -> Result<(), ClientError> {
        if pos > self.pos {
            return Err(ClientError::Truncate {
                pos,
                held: self.pos,
            });
        }
        self.pos = pos;
        self.forget(pos);
        Ok(())
    }

    /// Appends tokens. Long prompts go in frames, several under way at once. Returns when all are
    /// written, or earlier when rows wait to be taken: `next_logits` then sends the rest.
    ///
    /// # Errors
    /// The context is full (nothing was sent then), or the session failed: the tokens are then fed along the route that
    /// it is opened again with.
    ///
    /// # Cancel safety
    /// The tokens are queued when this is first polled; what is unsent goes with the next call.
    pub async fn feed(&mut self, tokens: &[u32], want: Want) -> Result<(), ClientError> {
        self.enqueue(tokens, want)?;
        poll_fn(|cx| self.poll_fed(cx)).await
    }

    /// The next row asked for, in order.
    ///
    /// # Errors
    /// Nothing was asked for, or the session failed: the error names the hop and whose fault it is.
    ///
    /// # Cancel safety
    /// Safe: a row is taken whole or not at all.
    pub async fn next_logits(&mut self) -> Result<LogitsRow, ClientError> {
        poll_fn(|cx| self.poll_row(cx)).await
    }

    /// How long the last tokens took, of those that were alone under way.
    pub(crate) fn steps(&self) -> &VecDeque<Duration> {
        &self.steps
    }

    /// The same, which are forgotten by that.
    pub(crate) fn take_steps(&mut self) -> Vec<Duration> {
        self.steps.drain(..).collect()
    }

    /// Gives a row's buffers back, so that the next row allocates nothing.
    pub fn recycle(&mut self, row: LogitsRow) {
        if self.spare.len() < WINDOW_FRAMES {
            self.spare.push(row);
        }
    }

    /// Says goodbye to every hop, and waits until the first has heard it. Dropping the session says it
    /// too, without waiting: a connection closed right after may take it along.
    pub async fn close(mut self) {
        if let Some(standby) = self.standby.take() {
            standby.dismiss();
        }
        self.up.push(&Down::Close);
        let heard = async {
            let _ = self.up.close().await;
            while let Ok(Some(_)) = self.up.frame::<Up>().await {}
        };
        let _ = timeout(self.deadlines.close, heard).await;
    }

    fn enqueue(&mut self, tokens: &[u32], want: Want) -> Result<(), ClientError> {
        let full = ClientError::ContextFull {
            n_ctx: self.n_ctx,
            pos: self.pos,
            asked: tokens.len(),
        };
        let Ok(asked) = u32::try_from(tokens.len()) else {
            return Err(full);
        };
        if self
            .pos
            .checked_add(asked)
            .is_none_or(|end| end > self.n_ctx)
        {
            return Err(full);
        }
        if let Some(token) = tokens.iter().find(|t| **t >= self.shape.n_vocab) {
            return Err(ClientError::Token {
                token: *token,
                n_vocab: self.shape.n_vocab,
            });
        }
        let rows_max = usize::from(want.rows_max(self.shape.n_vocab));
        let chunks = tokens.chunks(rows_max.min(PREFILL_CHUNK as usize));
        let last = chunks.len().saturating_sub(1);
        for (i, tokens) in chunks.enumerate() {
            let rows = match want.rows {
                WantRows::Last if i != last => WantRows::None,
                rows => rows,
            };
            let n_rows = tokens.len() as u32;
            self.rows_max = self.rows_max.max(n_rows);
            let (pos0, want) = (
                self.pos,
                Want {
                    rows,
                    form: want.form,
                },
            );
            self.tokens.extend_from_slice(tokens);
            self.frames.push(Frame { pos0, n_rows, want });
            self.queue.push_back(Chunk {
                pos0,
                tokens: tokens.to_vec(),
                want,
            });
            self.lend_frame(self.pos, n_rows);
            self.pos += n_rows;
        }
        self.say_beginning();
        Ok(())
    }

    fn poll_fed(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ClientError>> {
        if let Err(e) = self.drive(cx) {
            return Poll::Ready(Err(e));
        }
        let sent = self.queue.is_empty() && self.up.backlog() == 0;
        if sent || !self.ready.is_empty() {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    }

    fn poll_row(&mut self, cx: &mut Context<'_>) -> Poll<Result<LogitsRow, ClientError>> {
        if self.ready.is_empty()
            && let Err(e) = self.drive(cx)
        {
            return Poll::Ready(Err(e));
        }
        if let Some(row) = self.ready.pop_front() {
            self.ready_bytes -= row.bytes();
            return Poll::Ready(Ok(row));
        }
        if self.asked.is_empty() && !self.queue.iter().any(|c| c.want.rows != WantRows::None) {
            return Poll::Ready(Err(ClientError::NothingAsked));
        }
        Poll::Pending
    }

    /// Moves everything that can move. An error is final.
    fn drive(&mut self, cx: &mut Context<'_>) -> Result<(), ClientError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        let driven = self.drive_inner(cx);
        if let Err(e) = &driven {
            self.asked_alone = None;
            self.failed = Some(e.clone());
        }
        driven
    }

    fn drive_inner(&mut self, cx: &mut Context<'_>) -> Result<(), ClientError> {
        loop {
            let answered = self.poll_answers(cx)?;
            let acked = self.poll_up(cx)?;
            let sent = self.send();
            if let Poll::Ready(Err(e)) = self.up.poll_flush(cx) {
                // What the hop said before it went is worth more than the broken pipe.
                self.poll_up(cx)?;
                return Err(self.lost(0, &e.to_string()));
            }
            if !(answered || acked || sent) {
                break;
            }
        }
        if let Some(standby) = &mut self.standby {
            let (tokens, frames) = (&self.tokens, &self.frames);
            standby.poll(cx, &mut History { tokens, frames });
        }
        self.poll_timer(cx)
    }

    fn poll_answers(&mut self, cx: &mut Context<'_>) -> Result<bool, ClientError> {
        let mut any = false;
        while self.ready_bytes < ROWS_BYTES_MAX && self.answers_over.is_none() {
            let Poll::Ready(answer) = self.answers.poll_frame::<Answer>(cx) else {
                break;
            };
            any = true;
            let tail = self.tail();
            match answer {
                Ok(Some(Answer::Logits(header))) => self.take_row(&header)?,
                Ok(Some(Answer::Failed(failure))) => self.end_of_answers(failure),
                Ok(Some(Answer::Attached)) => {
                    return Err(self.bad_answer("a second greeting".into()));
                }
                Err(WireError::Frame(e)) => return Err(self.bad_answer(e.to_string())),
                Ok(None) => self.end_of_answers(lost(tail, "it closed the answer stream")),
                Err(e) => self.end_of_answers(lost(tail, &e.to_string())),
            }
        }
        Ok(any)
    }

    /// The session's own stream may say more than the tail knows: it gets a moment.
    fn end_of_answers(&mut self, failure: Failure) {
        self.answers_over = Some((Instant::now() + NAMING_GRACE, failure));
    }

    fn take_row(&mut self, header: &swarm_proto::Logits) -> Result<(), ClientError> {
        let Some((pos, form)) = self.asked.front() else {
            return Err(self.bad_answer(format!(
                "logits for position {}, none were asked for",
                header.pos
            )));
        };
        if header.pos != *pos || header.epoch != self.epoch {
            let what = format!(
                "logits for position {}, position {pos} comes next",
                header.pos
            );
            return Err(self.bad_answer(what));
        }
        let mut row = self.spare.pop().unwrap_or_default();
        if let Err(e) = row.fill(header, self.answers.payload(), form, self.shape) {
            return Err(self.bad_answer(e.to_string()));
        }
        self.asked.pop_front();
        self.progress = Instant::now();
        if let Some((_, since)) = self.asked_alone.take_if(|(pos, _)| *pos == row.pos) {
            if self.steps.len() == STEPS_MAX {
                self.steps.pop_front();
            }
            self.steps.push_back(self.progress - since);
        }
        let answered = Answered::of(&row);
        match self.stale.checked_sub(1) {
            Some(left) => self.stale = left,
            // Every hop has computed what was written anew.
            None => self.floor = self.floor.filter(|floor| row.pos < *floor),
        }
        self.say_beginning();
        if self.again.is_some_and(|again| row.pos <= again) {
            if self.again.take_if(|again| *again == row.pos).is_some()
                && let Some(last) = self.last
                && answered != Some(last)
            {
                let by = row.log_prob(last.token).unwrap_or(f32::NEG_INFINITY);
                let by = (by - last.log_prob).abs();
                if self.tolerance == 0.0 || by > self.tolerance {
                    return Err(differs(last, answered, by));
                }
            }
            self.recycle(row);
            return Ok(());
        }
        self.answered = self.answered.max(row.pos + 1);
        self.last = answered;
        self.ready_bytes += row.bytes();
        self.ready.push_back(row);
        Ok(())
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Result<bool, ClientError> {
        let mut any = false;
        while let Poll::Ready(frame) = self.up.poll_frame::<Up>(cx) {
            any = true;
            match frame {
                Ok(Some(Up::Ack { epoch, pos_end })) => {
                    let acked = self.outbox.acked(self.epoch, epoch, pos_end);
                    acked.map_err(|e| self.bad_hop(0, &e.to_string()))?;
                    self.lend_computed(pos_end);
                    let now = Instant::now();
                    (self.progress, self.heard) = (now, now);
                }
                Ok(Some(Up::Working)) => self.heard = Instant::now(),
                Ok(Some(Up::Failed(failure) | Up::Lost { failure, .. })) => {
                    return Err(self.hop_failed(failure));
                }
                Ok(Some(Up::Opened { .. })) => return Err(self.bad_hop(0, "it opened twice")),
                Ok(None) => return Err(self.lost(0, "it closed the session")),
                Err(WireError::Frame(e)) => return Err(self.bad_hop(0, &e.to_string())),
                Err(e) => return Err(self.lost(0, &e.to_string())),
            }
        }
        Ok(any)
    }

    /// Puts queued frames on their way while the window is open.
    fn send(&mut self) -> bool {
        let mut any = false;
        while self.outbox.len() < WINDOW_FRAMES
            && self.ready_bytes < ROWS_BYTES_MAX
            && let Some(chunk) = self.queue.pop_front()
        {
            any = true;
            if self.outbox.is_empty() {
                let now = Instant::now();
                (self.progress, self.heard) = (now, now);
            }
            let n_rows = chunk.tokens.len() as u32;
            let end = chunk.pos0 + n_rows;
            let alone = n_rows == 1 && self.asked.is_empty() && self.queue.is_empty();
            let asks = chunk.want.rows != WantRows::None;
            self.asked_alone = (alone && asks).then(|| (chunk.pos0, Instant::now()));
            self.outbox.sent(end);
            match chunk.want.rows {
                WantRows::None => {}
                WantRows::Last => self.asked.push_back((end - 1, chunk.want.form)),
                WantRows::All => self
                    .asked
                    .extend((chunk.pos0..end).map(|p| (p, chunk.want.form))),
            }
            let rows = Rows {
                session: self.session,
                epoch: self.epoch,
                pos0: chunk.pos0,
                n_rows: n_rows as u16,
                content: Content::Tokens,
                want: chunk.want,
                spent_us: 0,
            };
            self.up.push_with(&Down::Rows(rows), |out| {
                chunk
                    .tokens
                    .iter()
                    .for_each(|t| out.extend_from_slice(&t.to_le_bytes()));
            });
        }
        any
    }

    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Result<(), ClientError> {
        loop {
            let Some(due) = self.due() else { return Ok(()) };
            if due < self.timer.deadline() || self.timer.is_elapsed() {
                self.timer.as_mut().reset(due);
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Ok(());
            }
            if Instant::now() >= due {
                return Err(self.overdue());
            }
        }
    }

    fn due(&self) -> Option<Instant> {
        let over = self.answers_over.as_ref().map(|(due, _)| *due);
        let owed = if !self.outbox.is_empty() {
            let silent = self.heard + self.deadlines.silence;
            Some(silent.min(self.progress + self.ack_timeout()))
        } else if !self.asked.is_empty() {
            Some(self.unanswered().min(self.progress + self.answer_timeout()))
        } else {
            None
        };
        over.into_iter().chain(owed).min()
    }

    /// When the tail is given up: no hop has had any work for so long that its answer is lost.
    fn unanswered(&self) -> Instant {
        self.heard.max(self.progress) + self.deadlines.silence * 3 / 2
    }

    fn ack_timeout(&self) -> Duration {
        self.deadlines.acked(self.rows_max, self.route.hops.len())
    }

    /// Each hop may take its time; each watches the next, and reports it sooner than this.
    fn answer_timeout(&self) -> Duration {
        self.ack_timeout()
            .saturating_mul(u32::from(self.tail()) + 1)
    }

    fn overdue(&self) -> ClientError {
        if let Some((_, failure)) = &self.answers_over {
            return self.hop_failed(failure.clone());
        }
        let (at, what) = if self.outbox.is_empty() {
            (
                self.tail(),
                "no logits came, and no hop has any work left".into(),
            )
        } else {
            let (late, silence) = (self.ack_timeout(), self.deadlines.silence);
            let what = if Instant::now() >= self.progress + late {
                format!("no acknowledgement within {late:?}")
            } else {
                format!("it has work and was silent for {silence:?}")
            };
            (0, what)
        };
        self.hop_failed(fail(at, Fault::Peer, FailureCode::Deadline, what))
    }

    fn tail(&self) -> u8 {
        u8::try_from(self.route.hops.len().saturating_sub(1)).unwrap_or(u8::MAX)
    }

    fn lost(&self, at: u8, why: &str) -> ClientError {
        self.hop_failed(lost(at, why))
    }

    fn bad_hop(&self, at: u8, what: &str) -> ClientError {
        self.hop_failed(fail(at, Fault::Peer, FailureCode::BadFrame, what))
    }

    fn bad_answer(&self, what: String) -> ClientError {
        self.bad_hop(self.tail(), &what)
    }

    fn hop_failed(&self, failure: Failure) -> ClientError {
        ClientError::hop(&self.route.hops, failure)
    }
}

fn lost(at: u8, why: &str) -> Failure {
    fail(
        at,
        Fault::Peer,
        FailureCode::DownstreamLost,
        format!("the connection was lost: {why}"),
    )
}

fn differs(last: Answered, again: Option<Answered>, by: f32) -> ClientError {
    ClientError::Differs {
        pos: last.pos,
        token: last.token,
        again: again.map_or(u32::MAX, |again| again.token),
        by,
    }
}

impl Drop for ClientSession {
    fn drop(&mut self) {
        // A word of goodbye if the stream takes it at once; its end says the same a little later.
        if let Some(standby) = self.standby.take() {
            standby.dismiss();
        }
        self.up.push(&Down::Close);
        let _ = self.up.poll_flush(&mut Context::from_waker(Waker::noop()));
    }
}
