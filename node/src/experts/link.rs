//! The stream to one holder: calls leave as they come from stage threads, answers go straight back to them.
//!
//! A holder that owes an answer says every 150 ms that it is at work; one that says nothing for four of these is
//! taken for gone, whatever its connection says. An answer that is none (other rows than were asked for, values
//! that are not finite, an id that nobody gave) ends the stream and goes into the peer book.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::mpsc::Sender,
    task::{Context, Poll},
    time::Duration,
};

use swarm_proto::{
    Dtype, ExpertAsk, ExpertGive, ExpertRefusal, ModelId, activation, expert_call::EXPERT_ROWS_MAX,
};
use tokio::{
    sync::mpsc,
    time::{Instant, Sleep, timeout},
};

use super::{keeper::Up, wire};
use crate::{net::Stream, session::wire::Pipe};

/// How long a holder may take to say whether it serves.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);
/// Round trips measured before it is asked for anything.
const PINGS_FIRST: usize = 4;
/// Round trips of which the least counts.
const PINGS_KEPT: usize = 8;
/// How often one is measured while there is nothing else to say.
const PING_EVERY: Duration = Duration::from_secs(10);
/// A holder that owes an answer and says nothing for so long is gone: four times what it may be silent for.
const SILENT_MAX: Duration = Duration::from_millis(600);
/// How long it may be at work on one call.
const WORK_MAX: Duration = Duration::from_secs(30);
/// How often that is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Calls that may wait for one holder: more are put elsewhere.
pub(super) const CALLS_MAX: usize = 16;

/// A call on its way.
pub(super) struct Request {
    pub(super) id: u32,
    pub(super) frame: Vec<u8>,
    /// Rows that come back.
    pub(super) rows: u32,
    pub(super) reply: Reply,
}

/// Where an answer goes. Whoever drops it says that there is none.
pub(super) struct Reply {
    pub(super) to: Sender<Event>,
    pub(super) want: usize,
    pub(super) attempt: usize,
    pub(super) said: bool,
}

/// What a stage thread that waits is told.
#[derive(Debug)]
pub(super) enum Event {
    /// An answer, or why there is none, to attempt number so-and-so of a call.
    Answer {
        want: usize,
        attempt: usize,
        rows: Result<Vec<f32>, Failed>,
    },
    /// Who holds what is no longer as it was.
    Changed,
}

/// Why one holder did not answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failed {
    /// Its stream ended.
    Lost,
    /// It does not hold this one.
    NotHeld(u16),
    /// It has too much to do.
    Busy,
    /// It does nothing for others just now.
    Paused,
    /// It says that it cannot.
    Said(String),
}

impl Reply {
    pub(super) fn send(mut self, rows: Result<Vec<f32>, Failed>) {
        self.put(rows);
    }

    fn put(&mut self, rows: Result<Vec<f32>, Failed>) {
        self.said = true;
        let (want, attempt) = (self.want, self.attempt);
        // Who waits no more has the answer of another.
        let _ = self.to.send(Event::Answer {
            want,
            attempt,
            rows,
        });
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.said {
            self.put(Err(Failed::Lost));
        }
    }
}

/// Why a link ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Ended {
    #[error("it could not be reached: {0}")]
    Open(String),
    #[error("it refused: {0}")]
    Refused(String),
    #[error("the stream was lost: {0}")]
    Lost(String),
    #[error("silent for {} ms", SILENT_MAX.as_millis())]
    Silent,
    #[error("at work on one call for {} s", WORK_MAX.as_secs())]
    Stuck,
    #[error("it does nothing for others just now")]
    Paused,
    #[error("a round trip of {0:?} is too long")]
    Far(Duration),
    #[error("a wrong answer: {0}")]
    Lied(String),
    #[error("the island is closed")]
    Closed,
}

/// A stream on which a holder said that it serves.
pub(super) struct Welcome {
    pipe: Pipe,
    /// The least of some round trips.
    pub(super) rtt: Duration,
    pings: Vec<Duration>,
}

/// Says hello and measures round trips.
pub(super) async fn greet(stream: Stream, model: ModelId, n_embd: u32) -> Result<Welcome, Ended> {
    let mut pipe = Pipe::new(stream, wire::HELLO);
    pipe.push(&ExpertAsk::Hello { model });
    match next(&mut pipe).await? {
        ExpertGive::Serving { n_embd: theirs } if theirs == n_embd => {}
        ExpertGive::Serving { n_embd: theirs } => {
            return Err(Ended::Lied(format!("rows of {theirs}, not {n_embd}")));
        }
        ExpertGive::Refused(why) => return Err(Ended::Refused(why)),
        other => return Err(Ended::Lied(format!("{other:?} to a hello"))),
    }
    let mut pings = Vec::with_capacity(PINGS_KEPT + 1);
    for id in 0..PINGS_FIRST as u32 {
        let begun = Instant::now();
        pipe.push(&ExpertAsk::Ping(id));
        match next(&mut pipe).await? {
            ExpertGive::Pong(pong) if pong == id => pings.push(begun.elapsed()),
            other => return Err(Ended::Lied(format!("{other:?} to a ping"))),
        }
    }
    let rtt = pings.iter().min().copied().unwrap_or(HELLO_DEADLINE);
    Ok(Welcome { pipe, rtt, pings })
}

async fn next(pipe: &mut Pipe) -> Result<ExpertGive, Ended> {
    let lost = |why: String| Ended::Lost(why);
    let spoken = async {
        pipe.flush().await.map_err(|why| lost(why.to_string()))?;
        let said = pipe.frame::<ExpertGive>().await;
        said.map_err(|why| lost(why.to_string()))?
            .ok_or_else(|| lost("the holder closed it".into()))
    };
    let said = timeout(HELLO_DEADLINE, spoken).await;
    said.unwrap_or(Err(Ended::Silent))
}

struct Pending {
    id: u32,
    rows: u32,
    since: Instant,
    reply: Reply,
}

/// The running link. Fields are dropped in their order: the table is told before those who wait.
pub(super) struct Link {
    up: Up,
    requests: mpsc::Receiver<Request>,
    pending: Vec<Pending>,
    pipe: Pipe,
    n_embd: u32,
    rtt_max: Duration,
    pings: Vec<Duration>,
    /// The ping that is not answered.
    ping: Option<(u32, Instant)>,
    pinged: (u32, Instant),
    /// How much had moved, and when.
    moved: (u64, Instant),
    timer: Pin<Box<Sleep>>,
}

impl Link {
    pub(super) fn new(
        welcome: Welcome,
        up: Up,
        requests: mpsc::Receiver<Request>,
        n_embd: u32,
        rtt_max: Duration,
    ) -> Self {
        let mut pipe = welcome.pipe;
        pipe.set_limits(wire::answers(
            EXPERT_ROWS_MAX.saturating_mul(n_embd as usize),
        ));
        let moved = (pipe.moved(), Instant::now());
        Self {
            up,
            requests,
            pending: Vec::with_capacity(CALLS_MAX),
            pipe,
            n_embd,
            rtt_max,
            pings: welcome.pings,
            ping: None,
            pinged: (PINGS_FIRST as u32, moved.1),
            moved,
            timer: Box::pin(tokio::time::sleep(PING_EVERY)),
        }
    }

    /// Serves stage threads until it is over.
    pub(super) async fn run(mut self) -> Ended {
        poll_fn(|cx| match self.poll(cx) {
            Ok(()) => Poll::Pending,
            Err(ended) => Poll::Ready(ended),
        })
        .await
    }

    /// Does all there is to do now.
    fn poll(&mut self, cx: &mut Context<'_>) -> Result<(), Ended> {
        loop {
            while self.pending.len() < CALLS_MAX {
                match self.requests.poll_recv(cx) {
                    Poll::Ready(Some(request)) => self.push(request),
                    Poll::Ready(None) => return Err(Ended::Closed),
                    Poll::Pending => break,
                }
            }
            if let Poll::Ready(Err(why)) = self.pipe.poll_flush(cx) {
                return Err(Ended::Lost(why.to_string()));
            }
            let full = self.pending.len() == CALLS_MAX;
            loop {
                match self.pipe.poll_frame::<ExpertGive>(cx) {
                    Poll::Pending => break,
                    Poll::Ready(Ok(Some(give))) => self.take(give)?,
                    Poll::Ready(Ok(None)) => {
                        return Err(Ended::Lost("the holder closed it".into()));
                    }
                    Poll::Ready(Err(crate::session::wire::WireError::Frame(why))) => {
                        return Err(Ended::Lied(why.to_string()));
                    }
                    Poll::Ready(Err(why)) => return Err(Ended::Lost(why.to_string())),
                }
            }
            let ticked = self.timer.as_mut().poll(cx).is_ready();
            if ticked {
                self.tick()?;
            }
            let room = full && self.pending.len() < CALLS_MAX;
            if !ticked && !room {
                return Ok(());
            }
        }
    }

    fn push(&mut self, request: Request) {
        let now = Instant::now();
        if self.pending.is_empty() && self.ping.is_none() {
            self.moved = (self.pipe.moved(), now);
        }
        self.pipe.push_encoded(&request.frame);
        self.pending.push(Pending {
            id: request.id,
            rows: request.rows,
            since: now,
            reply: request.reply,
        });
        self.look_within(LOOK_EVERY);
    }

    fn look_within(&mut self, time: Duration) {
        let due = Instant::now() + time;
        if self.timer.deadline() > due {
            self.timer.as_mut().reset(due);
        }
    }

    fn take(&mut self, give: ExpertGive) -> Result<(), Ended> {
        match give {
            ExpertGive::Working => Ok(()),
            ExpertGive::Pong(id) => match self.ping.take() {
                Some((ping, since)) if ping == id => self.pong(since.elapsed()),
                _ => Err(Ended::Lied("a pong to no ping".into())),
            },
            ExpertGive::Rows { id, spent_us } => {
                let pending = self.pending(id)?;
                // A lie: the table is told before the stage thread.
                let rows = self.rows(pending.rows).inspect_err(|_| self.up.down())?;
                let took = pending.since.elapsed();
                let spent = Duration::from_micros(spent_us.into());
                self.up.holder().answered(pending.rows, took, spent);
                pending.reply.send(Ok(rows));
                Ok(())
            }
            ExpertGive::Failed { id, why } => {
                let pending = self.pending(id)?;
                let why = match why {
                    ExpertRefusal::NotHeld { expert } => Failed::NotHeld(expert),
                    ExpertRefusal::Busy => Failed::Busy,
                    ExpertRefusal::Paused => Failed::Paused,
                    ExpertRefusal::Call(why) | ExpertRefusal::Failed(why) => Failed::Said(why),
                };
                let paused = why == Failed::Paused;
                if paused {
                    // Before the stage thread looks for another one.
                    self.up.down();
                }
                pending.reply.send(Err(why));
                if paused { Err(Ended::Paused) } else { Ok(()) }
            }
            other => Err(Ended::Lied(format!("{other:?} without being asked"))),
        }
    }

    fn pending(&mut self, id: u32) -> Result<Pending, Ended> {
        let at = self.pending.iter().position(|pending| pending.id == id);
        at.map(|at| self.pending.swap_remove(at))
            .ok_or_else(|| Ended::Lied(format!("an answer to call {id}, which waits for none")))
    }

    /// The payload as so many rows.
    fn rows(&self, n: u32) -> Result<Vec<f32>, Ended> {
        let payload = self.pipe.payload();
        let row = Dtype::F32.row_len(self.n_embd);
        if payload.len() != row.saturating_mul(n as usize) {
            let len = payload.len();
            return Err(Ended::Lied(format!(
                "{len} bytes for {n} rows of {row} bytes"
            )));
        }
        let mut rows = Vec::new();
        activation::decode(payload, self.n_embd, Dtype::F32, &mut rows)
            .map_err(|why| Ended::Lied(why.to_string()))?;
        Ok(rows)
    }

    fn pong(&mut self, rtt: Duration) -> Result<(), Ended> {
        if self.pings.len() == PINGS_KEPT {
            self.pings.remove(0);
        }
        self.pings.push(rtt);
        let least = self.pings.iter().min().copied().unwrap_or(rtt);
        self.up.holder().set_rtt(least);
        // Twice: who is in stays in while the figure only wavers.
        match least > self.rtt_max.saturating_mul(2) {
            true => Err(Ended::Far(least)),
            false => Ok(()),
        }
    }

    fn tick(&mut self) -> Result<(), Ended> {
        let now = Instant::now();
        let (last, at) = self.pinged;
        let idle = self.pending.is_empty() && self.ping.is_none();
        if idle && now >= at + PING_EVERY {
            let id = last.wrapping_add(1);
            self.pinged = (id, now);
            self.ping = Some((id, now));
            self.moved = (self.pipe.moved(), now);
            self.pipe.push(&ExpertAsk::Ping(id));
        }
        let owed = !self.pending.is_empty() || self.ping.is_some();
        if !owed || self.moved.0 != self.pipe.moved() {
            self.moved = (self.pipe.moved(), now);
        }
        if now.saturating_duration_since(self.moved.1) >= SILENT_MAX {
            return Err(Ended::Silent);
        }
        let oldest = self.pending.iter().map(|pending| pending.since).min();
        if oldest.is_some_and(|since| now.saturating_duration_since(since) > WORK_MAX) {
            return Err(Ended::Stuck);
        }
        let next = if owed {
            now + LOOK_EVERY
        } else {
            self.pinged.1 + PING_EVERY
        };
        self.timer.as_mut().reset(next);
        Ok(())
    }
}
