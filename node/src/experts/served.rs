//! One trunk's stream at a holder: calls go to the worker as they come, answers leave as they are ready.
//!
//! One task, written as one poll function: results first, then calls, then one lazily moved timer.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use engine::{ExpertCall, ExpertError, ExpertReply};
use swarm_proto::{Dtype, ExpertAsk, ExpertGive, ExpertRefusal, ExpertRows, ModelId, activation};
use tokio::{
    sync::mpsc,
    time::{Instant, Sleep, timeout},
};

use super::{service::Inner, wire};
use crate::{
    net::Stream,
    session::wire::{Pipe, WireError},
};

/// How long the first message may take.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);
/// Calls under way on one stream: a trunk has one for each of its threads, and those that it asked others for, too.
const CALLS_MAX: usize = 8;
/// How often a holder at work says so, as hops do.
const WORKING_EVERY: Duration = Duration::from_millis(150);
/// How long the rest of a frame, or room for one, is waited for.
const STUCK_MAX: Duration = Duration::from_secs(20);
/// How long a stream may stay without a word: a trunk's links ping more often.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// Why a stream ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServeError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("too slow")]
    Slow,
    #[error("a call that cannot be: {0}")]
    Call(String),
}

/// A call's id and what became of it, from the worker's thread.
type Answer = (u32, Result<ExpertReply, ExpertError>);

struct InWork {
    id: u32,
    since: Instant,
}

struct Served {
    inner: Arc<Inner>,
    pipe: Pipe,
    model: ModelId,
    n_embd: u32,
    in_work: Vec<InWork>,
    answer: mpsc::UnboundedSender<Answer>,
    answers: mpsc::UnboundedReceiver<Answer>,
    /// When we last said anything, and heard anything.
    said: Instant,
    heard: Instant,
    timer: Pin<Box<Sleep>>,
}

/// Answers a trunk until it goes.
pub(super) async fn serve(inner: &Arc<Inner>, stream: Stream) -> Result<(), ServeError> {
    let mut pipe = Pipe::new(stream, wire::HELLO);
    let hello = timeout(HELLO_DEADLINE, pipe.frame::<ExpertAsk>()).await;
    let model = match hello.map_err(|_| ServeError::Slow)?? {
        Some(ExpertAsk::Hello { model }) => model,
        Some(_) => return Err(ServeError::Call("it begins without a hello".into())),
        None => return Ok(()),
    };
    let offer = match inner.offer(&model) {
        _ if inner.is_paused() => Err("its owner wants it to do nothing for others just now"),
        None => Err("it holds no experts of that model"),
        Some(worker) => Ok(worker),
    };
    let worker = match offer {
        Ok(worker) => worker,
        Err(why) => {
            inner.refuse();
            pipe.push(&ExpertGive::Refused(why.into()));
            let closed = timeout(HELLO_DEADLINE, pipe.close()).await;
            return Ok(closed.map_err(|_| ServeError::Slow)??);
        }
    };
    let (n_embd, n_used) = (worker.layout().n_embd(), worker.layout().n_used());
    drop(worker);
    pipe.set_limits(wire::calls(n_embd, n_used));
    pipe.push(&ExpertGive::Serving { n_embd });
    let (answer, answers) = mpsc::unbounded_channel();
    let now = Instant::now();
    let mut served = Served {
        inner: inner.clone(),
        pipe,
        model,
        n_embd,
        in_work: Vec::with_capacity(CALLS_MAX),
        answer,
        answers,
        said: now,
        heard: now,
        timer: Box::pin(tokio::time::sleep(IDLE_MAX)),
    };
    poll_fn(|cx| served.poll(cx)).await
}

impl Served {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ServeError>> {
        loop {
            while let Poll::Ready(Some((id, answer))) = self.answers.poll_recv(cx) {
                self.give(id, answer);
            }
            let flushed = match self.pipe.poll_flush(cx) {
                Poll::Ready(Err(why)) => return Poll::Ready(Err(why.into())),
                Poll::Ready(Ok(())) => true,
                Poll::Pending => false,
            };
            let mut pushed = false;
            // Who does not take answers gets no more of them: its calls wait in the stream.
            while flushed && self.in_work.len() < CALLS_MAX && !pushed {
                match self.pipe.poll_frame::<ExpertAsk>(cx) {
                    Poll::Pending => break,
                    Poll::Ready(Ok(Some(ask))) => match self.take(ask) {
                        Ok(said) => pushed = said,
                        Err(why) => return Poll::Ready(Err(why)),
                    },
                    Poll::Ready(Ok(None)) => return Poll::Ready(Ok(())),
                    Poll::Ready(Err(why)) => return Poll::Ready(Err(why.into())),
                }
            }
            if self.timer.as_mut().poll(cx).is_ready() {
                if let Err(why) = self.tick() {
                    return Poll::Ready(Err(why));
                }
                // Armed again: the next poll of it registers, and what was said leaves.
                continue;
            }
            if !pushed {
                return Poll::Pending;
            }
        }
    }

    /// Does what was asked; whether something is to be said at once.
    fn take(&mut self, ask: ExpertAsk) -> Result<bool, ServeError> {
        self.heard = Instant::now();
        match ask {
            ExpertAsk::Hello { .. } => Err(ServeError::Call("a second hello".into())),
            ExpertAsk::Ping(id) => {
                self.say(&ExpertGive::Pong(id));
                Ok(true)
            }
            ExpertAsk::Call(rows) => self.call(&rows),
        }
    }

    fn call(&mut self, rows: &ExpertRows) -> Result<bool, ServeError> {
        let id = rows.id;
        if rows.n_embd != self.n_embd {
            return Err(ServeError::Call(format!("rows of {}", rows.n_embd)));
        }
        let call = wire::decode_call(rows, self.pipe.payload()).map_err(ServeError::Call)?;
        match self.submit(id, call) {
            Ok(()) => {
                let since = self.heard;
                self.in_work.push(InWork { id, since });
                if let Ok((id, answer)) = self.answers.try_recv() {
                    self.give(id, answer);
                    return Ok(true);
                }
                let due = since + WORKING_EVERY;
                if self.timer.deadline() > due {
                    self.timer.as_mut().reset(due);
                }
                Ok(false)
            }
            Err(why) => {
                self.fail(id, why);
                Ok(true)
            }
        }
    }

    fn submit(&self, id: u32, call: ExpertCall) -> Result<(), ExpertRefusal> {
        if self.inner.is_paused() {
            return Err(ExpertRefusal::Paused);
        }
        let Some(worker) = self.inner.offer(&self.model) else {
            let expert = call.groups.first().map_or(0, |group| group.expert);
            let layer = call.layer;
            return Err(wire::refusal(ExpertError::NotHeld { layer, expert }));
        };
        let answer = self.answer.clone();
        // A stream that is gone needs no answer.
        let reply = Box::new(move |reply| drop(answer.send((id, reply))));
        worker.submit(call, reply).map_err(wire::refusal)
    }

    fn give(&mut self, id: u32, answer: Result<ExpertReply, ExpertError>) {
        let at = self.in_work.iter().position(|work| work.id == id);
        let since = at.map(|at| self.in_work.swap_remove(at).since);
        match answer {
            Ok(reply) => {
                let n_embd = self.n_embd;
                let rows = reply.rows.len() / (n_embd as usize).max(1);
                self.inner.answered(rows as u64);
                let spent = since.map_or(Duration::ZERO, |since| since.elapsed());
                let spent_us = u32::try_from(spent.as_micros()).unwrap_or(u32::MAX);
                self.said = Instant::now();
                self.pipe
                    .push_with(&ExpertGive::Rows { id, spent_us }, |out| {
                        activation::encode(&reply.rows, n_embd, Dtype::F32, out);
                    });
            }
            Err(why) => self.fail(id, wire::refusal(why)),
        }
    }

    fn fail(&mut self, id: u32, why: ExpertRefusal) {
        self.inner.refuse();
        self.say(&ExpertGive::Failed { id, why });
    }

    fn say(&mut self, what: &ExpertGive) {
        self.said = Instant::now();
        self.pipe.push(what);
    }

    /// The timer went off.
    fn tick(&mut self) -> Result<(), ServeError> {
        let now = Instant::now();
        let idle = self.in_work.is_empty();
        if self.pipe.stuck().is_some_and(|time| time > STUCK_MAX)
            || idle && now.saturating_duration_since(self.heard) > IDLE_MAX
        {
            return Err(ServeError::Slow);
        }
        let says = !idle && now.saturating_duration_since(self.said) >= WORKING_EVERY;
        // Where the last words are still on their way, they say enough.
        if says && self.pipe.backlog() == 0 {
            self.say(&ExpertGive::Working);
        }
        let next = if idle { STUCK_MAX } else { WORKING_EVERY };
        self.timer.as_mut().reset(now + next);
        Ok(())
    }
}
