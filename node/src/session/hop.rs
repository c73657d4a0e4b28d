//! The session service of a node: takes streams, opens the chain below, runs the relays.
//!
//! ```text
//! stream ─▶ Open ─▶ held already? ─▶ its task goes on (held)
//!                 └▶ admit ─▶ KV ┐
//!                          next ─┴▶ Opened ─▶ Held::run ─▶ goodbye, KV freed
//! ```
//!
//! One task a session. Everything a session takes is owned by that task, so that its end, however
//! it comes, gives everything back.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use engine::Worker;
use futures::future::BoxFuture;
use swarm_proto::{
    Answer, Attach, Content, Down, Epoch, Failure, FailureCode, Fault, LayerRange, ModelId, Open,
    Peer, Up,
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument;

use super::{
    admit::admit,
    chain::{Shape, open_next},
    config::SessionLimits,
    failure::{fail, is_goodbye, paused},
    held::{Comeback, Desks, Held},
    ledger::Ledger,
    limits::{ATTACH, OPEN},
    relay::{Below, End, Parts, Relay},
    retained::Budget,
    standby::{Fed, Follower, standby_open},
    tail::{Claim, Pairing, Place},
    topk::TopK,
    trace,
    wire::{Pipe, WireError},
};
use crate::{
    net::{Net, OpenError, Proto, Stream},
    seldom::Seldom,
    shares::{NoShare, Share, Shares},
};

/// Opens streams to peers. `Net` is one; tests bring their own.
pub trait Dialer: Send + Sync + 'static {
    /// Opens a stream, dialling first when needed. The caller brings the deadline.
    fn open<'a>(
        &'a self,
        peer: Peer,
        addrs: &'a [String],
        proto: Proto,
    ) -> BoxFuture<'a, Result<Stream, OpenError>>;
}

/// What a pipe from a node to itself buffers: about one frame of a prompt.
const TO_SELF_BYTES: usize = 256 * 1024;
/// The callers' own deadlines are shorter; this one only bounds a caller without.
const DIAL_DEADLINE: Duration = Duration::from_secs(60);

impl Dialer for Net {
    fn open<'a>(
        &'a self,
        peer: Peer,
        addrs: &'a [String],
        proto: Proto,
    ) -> BoxFuture<'a, Result<Stream, OpenError>> {
        Box::pin(Net::open(self, peer, addrs, proto, DIAL_DEADLINE))
    }
}

/// A model that this node serves layers of.
#[derive(Clone)]
pub struct Served {
    /// Which model.
    pub model: ModelId,
    /// Layers of the whole model.
    pub n_layer: u32,
    /// Floats in a hidden row.
    pub n_embd: u32,
    /// Floats in a logits row.
    pub n_vocab: u32,
    /// Longest context a session may ask for.
    pub n_ctx_max: u32,
    /// The worker that holds the weights of some layers: which, may change. Its queue must be [`SessionLimits::worker_queue`] long.
    pub worker: Worker,
}

impl Served {
    /// What a worker holds of a model.
    pub fn new(model: ModelId, worker: Worker) -> Self {
        let shape = worker.shape();
        Self {
            model,
            n_layer: shape.n_layer,
            n_embd: shape.n_embd,
            n_vocab: shape.n_vocab,
            n_ctx_max: shape.n_ctx_max,
            worker,
        }
    }
}

/// The session service. Clones share everything.
#[derive(Clone)]
pub struct Sessions {
    shared: Arc<Shared>,
}

/// What the sessions of a node hold together: all of it is given back in the end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Sessions that are open or being opened, at most [`SessionLimits::sessions_max`].
    pub sessions: usize,
    /// Of these, sessions that can be opened again.
    pub held: usize,
    /// Halves of sessions at the tail that wait for the other half.
    pub pairing: usize,
    /// Bytes of sent frames in memory, at most [`SessionLimits::retained_memory`].
    pub retained_memory: u64,
    /// And on disk, at most [`SessionLimits::retained_disk`].
    pub retained_disk: u64,
}

pub(super) struct Shared {
    pub(super) me: Peer,
    dialer: Arc<dyn Dialer>,
    pub(super) limits: SessionLimits,
    served: Mutex<HashMap<ModelId, Served>>,
    /// By the peer that opened the stream.
    upstreams: Shares<Peer>,
    /// By that peer and the client it names: nobody can use up a client's part in its name.
    clients: Shares<(Peer, Peer)>,
    pairing: Pairing,
    /// Where a session that comes back finds the task that holds it.
    pub(super) desks: Desks,
    pub(super) retained: Arc<Budget>,
    pub(super) metrics: crate::metrics::SessionMetrics,
    /// Sessions fail for reasons of our own.
    failing: Seldom,
    /// No new sessions for now: the node is paused.
    paused: AtomicBool,
    /// No new sessions.
    draining: CancellationToken,
    /// The running ones end too.
    pub(super) stopping: CancellationToken,
    pub(super) tasks: TaskTracker,
}

impl Sessions {
    /// A service that serves nothing yet.
    pub fn new(me: Peer, dialer: Arc<dyn Dialer>, limits: SessionLimits) -> Self {
        let shared = Shared {
            me,
            dialer,
            served: Mutex::default(),
            upstreams: Shares::new(limits.sessions_max, limits.per_upstream_max),
            clients: Shares::new(limits.sessions_max, limits.per_client_max),
            pairing: Pairing::new(limits.parked_max, limits.parked_per_client_max),
            desks: Desks::default(),
            retained: Budget::new(limits.retained_memory, limits.retained_disk),
            metrics: Default::default(),
            failing: Seldom::default(),
            paused: AtomicBool::new(false),
            draining: CancellationToken::new(),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
            limits,
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Serves a span from now on; replaces what was served of that model.
    pub fn serve(&self, served: Served) {
        lock(&self.shared.served).insert(served.model, served);
    }

    /// Opens no new sessions of a model. Running ones go on.
    pub fn withdraw(&self, model: &ModelId) {
        lock(&self.shared.served).remove(model);
    }

    /// Has the sessions of a model go on elsewhere that are on layers which `go`; their clients lose nothing by it.
    /// How many they are. New ones are still taken.
    pub fn hand_over(&self, model: &ModelId, go: impl Fn(LayerRange) -> bool) -> usize {
        self.shared.desks.leave(model, go)
    }

    /// What is served of a model.
    #[cfg(test)]
    pub(crate) fn served(&self, model: &ModelId) -> Option<Served> {
        lock(&self.shared.served).get(model).cloned()
    }

    /// From now on new sessions are refused, or taken again. Those that run go on, and may be opened again.
    pub fn pause(&self, paused: bool) {
        self.shared.paused.store(paused, Ordering::Relaxed);
    }

    /// Sessions that are open or being opened.
    pub fn count(&self) -> usize {
        self.shared.upstreams.taken()
    }

    pub(crate) fn metrics(&self) -> &crate::metrics::SessionMetrics {
        &self.shared.metrics
    }

    /// What sessions hold now.
    pub fn holdings(&self) -> Holdings {
        let (retained_memory, retained_disk) = self.shared.retained.used();
        Holdings {
            sessions: self.count(),
            held: self.shared.desks.len(),
            pairing: self.shared.pairing.len(),
            retained_memory,
            retained_disk,
        }
    }

    /// Takes session and answer streams until both channels close, a task each.
    pub async fn run(
        &self,
        mut sessions: mpsc::Receiver<(Peer, Stream)>,
        mut answers: mpsc::Receiver<(Peer, Stream)>,
    ) {
        loop {
            tokio::select! {
                Some((from, stream)) = sessions.recv() => self.accept_session(from, stream),
                Some((from, stream)) = answers.recv() => self.accept_answer(from, stream),
                else => return,
            }
        }
    }

    /// Serves one session stream on a task of its own.
    pub fn accept_session(&self, from: Peer, stream: Stream) {
        let shared = self.shared.clone();
        self.shared
            .tasks
            .spawn(async move { shared.session(from, stream).await });
    }

    /// Pairs one answer stream on a task of its own.
    pub fn accept_answer(&self, from: Peer, stream: Stream) {
        let shared = self.shared.clone();
        self.shared.tasks.spawn(async move {
            if let Err(why) = shared.answer(from, stream).await {
                tracing::debug!(peer = %from, why, "answer stream refused");
            }
        });
    }

    /// Refuses new sessions, lets running ones go on for `grace`, then ends them.
    pub async fn shutdown(&self, grace: Duration) {
        self.shared.draining.cancel();
        self.shared.tasks.close();
        if timeout(grace, self.shared.tasks.wait()).await.is_err() {
            self.shared.stopping.cancel();
            let goodbye = self.shared.limits.deadlines.close.saturating_mul(2);
            let _ = timeout(goodbye, self.shared.tasks.wait()).await;
        }
    }
}

/// A session counts against its upstream and its client until this is dropped.
pub(super) struct Lease {
    _upstream: Share<Peer>,
    _client: Share<(Peer, Peer)>,
}

/// What the chain below a hop became; nothing, for one that stands by.
#[derive(Default)]
pub(super) struct Chain {
    pub(super) below: Below,
    /// Positions that the hop below holds.
    pub(super) held: u32,
    /// Our place in the pairing table, when we are the tail.
    pub(super) place: Option<Place>,
}

impl Shared {
    async fn session(self: Arc<Self>, from: Peer, stream: Stream) {
        let mut up = Pipe::new(stream, OPEN);
        let pair = self.limits.deadlines.pair;
        let open = match timeout(pair, up.frame::<Down>()).await {
            Ok(Ok(Some(Down::Open(open)))) => open,
            Ok(Ok(Some(_))) => {
                let message = "a session begins with an open message";
                let failure = fail(0, Fault::Caller, FailureCode::BadFrame, message);
                return self.refuse(up, failure).await;
            }
            Ok(Err(WireError::Frame(e))) => {
                let failure = fail(0, Fault::Caller, FailureCode::BadFrame, e.to_string());
                return self.refuse(up, failure).await;
            }
            // Nothing came that could be answered.
            Ok(Ok(None) | Err(_)) | Err(_) => return,
        };
        // A session that is held here goes on in its own task.
        let Some(Comeback { from, open, up }) = self.desks.hand_over(from, open, up) else {
            return;
        };
        let span = trace::session_span(&open);
        self.opened(from, open, up).instrument(span).await;
    }

    async fn opened(self: Arc<Self>, from: Peer, open: Open, mut up: Pipe) {
        let opened = tokio::select! {
            biased;
            opened = self.clone().build(from, &open, &mut up) => opened,
            () = self.stopping.cancelled() => Err(Some(self.going_down(open.at))),
        };
        match opened {
            Ok(held) => {
                tracing::debug!(peer = %from, "session open");
                held(up).run().await;
            }
            Err(Some(failure)) => {
                tracing::debug!(peer = %from, failure = %failure.message, "session refused");
                self.metrics.refused(&failure);
                self.refuse(up, failure).await;
            }
            // The upstream is gone.
            Err(None) => {}
        }
    }

    /// What others can cause is told at debug level: it could fill a disk.
    pub(super) fn log(&self, at: u8, end: &End) {
        match end {
            End::Failed(f) if is_goodbye(f) => tracing::debug!("session over: the client left"),
            End::Failed(f) => {
                let ours = f.at == at && f.code == FailureCode::Engine;
                if ours && self.failing.now(std::time::Instant::now()) {
                    tracing::warn!(why = %f.message, "sessions fail on this node");
                }
                tracing::debug!(at = f.at, code = ?f.code, why = %f.message, "session failed");
            }
            end => tracing::debug!(?end, "session over"),
        }
    }

    /// Everything between the open message and the relay. `Err(None)`: the upstream is gone.
    async fn build(
        self: Arc<Self>,
        from: Peer,
        open: &Open,
        up: &mut Pipe,
    ) -> Result<impl FnOnce(Pipe) -> Held + use<>, Option<Failure>> {
        if self.draining.is_cancelled() {
            return Err(Some(self.going_down(open.at)));
        }
        if self.paused.load(Ordering::Relaxed) {
            return Err(Some(paused(open.at)));
        }
        let served = lock(&self.served).get(&open.model).cloned();
        let admitted = admit(open, from, self.me, served.as_ref())?;
        let Some(served) = served else {
            return Err(None);
        };
        let lease = self.lease(from, open)?;
        let (desk, calls) = self.desks.take(open);
        let ours = async {
            let slot = self.room_for(open, &admitted, &served).await?;
            let begun = self.forked(from, open, &served.worker, slot.slot());
            let begun = begun.await;
            Ok((slot, begun))
        };
        let both = async { tokio::try_join!(ours, self.below(open, &served, None)) };
        let ((slot, begun), chain) = self.while_heard(open, up, both).await?;
        let mut ledger = Ledger::new(
            open.session,
            open.epoch,
            open.n_ctx,
            (served.n_embd, served.n_vocab),
            admitted.content,
        );
        ledger.begin_at(begun.held);
        let standby = self.standby(open, &served, None);
        let (open, limits) = (open.clone(), self.limits);
        Ok(move |up| {
            let relay = Relay::new(Parts {
                open,
                ledger,
                layers: admitted.layers,
                worker: served.worker.clone(),
                slot,
                up,
                below: chain.below,
                below_held: chain.held,
                standby,
                retained: begun.retained,
                deadlines: limits.deadlines,
                frames_in_flight: limits.frames_in_flight,
                metrics: self.metrics.clone(),
            });
            Held {
                shared: self,
                served,
                relay,
                from,
                calls,
                place: chain.place,
                kept_until: None,
                desk,
                _lease: lease,
            }
        })
    }

    /// Does the work of an opening while its upstream is there. `Err(None)`: it is gone.
    async fn while_heard<T>(
        &self,
        open: &Open,
        up: &mut Pipe,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Option<Failure>> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done.map_err(Some),
                // The client may change its mind while the chain opens.
                frame = up.frame::<Down>() => return match frame {
                    Ok(Some(Down::Rows(_) | Down::Open(_))) => {
                        let message = "frames before the session is open";
                        Err(Some(fail(open.at, Fault::Caller, FailureCode::BadFrame, message)))
                    }
                    _ => Err(None),
                },
                // Somebody waits for this hop in place of a lost one: it is there.
                () = sleep(self.limits.deadlines.beat), if open.epoch > Epoch(0) => {
                    up.push(&Up::Working);
                    let _ = timeout(self.limits.deadlines.beat, up.flush()).await;
                }
            }
        }
    }

    fn lease(&self, from: Peer, open: &Open) -> Result<Lease, Failure> {
        let full = |whose: &str, no: NoShare| {
            let message = match no {
                NoShare::All { taken, max } => {
                    format!("{taken} sessions are open, the limit here is {max}")
                }
                NoShare::Each { taken, max } => {
                    format!("{whose} has {taken} sessions open, the limit here is {max}")
                }
            };
            fail(open.at, Fault::Local, FailureCode::Full, message)
        };
        let client = self.clients.take((from, open.client));
        let upstream = self.upstreams.take(from);
        Ok(Lease {
            _client: client.map_err(|no| full("this client", no))?,
            _upstream: upstream.map_err(|no| full("the peer before this hop", no))?,
        })
    }

    /// Opens what is below: over `current` where that still works, else over a new stream.
    pub(super) async fn below(
        self: &Arc<Self>,
        open: &Open,
        served: &Served,
        current: Option<Pipe>,
    ) -> Result<Chain, Failure> {
        if open.standing_by {
            return Ok(Chain::default());
        }
        let next = open.at.saturating_add(1);
        let Some(hop) = open.hops.get(usize::from(next)) else {
            return self.client_below(open);
        };
        let below = open.hops.len() - usize::from(next);
        let deadlines = &self.limits.deadlines;
        let wait = match open.epoch {
            Epoch(0) => deadlines.opened(below),
            _ => deadlines.reopened(below),
        };
        let deadline = Instant::now() + wait;
        let shape = Shape {
            n_embd: served.n_embd,
            n_vocab: served.n_vocab,
        };
        let open = Open {
            at: next,
            trace: trace::current().or(open.trace),
            ..open.clone()
        };
        let dial = async || {
            if hop.peer == self.me {
                return Ok(self.to_self());
            }
            self.dialer.open(hop.peer, &hop.addrs, Proto::Session).await
        };
        let next = open_next(&open, shape, current, deadline, dial).await?;
        Ok(Chain {
            below: Below::Next(next.pipe),
            held: next.held,
            place: None,
        })
    }

    /// Opens who stands by for the next hop, while the session runs already: over `current` where that
    /// is a stream to it.
    pub(super) fn standby(
        self: &Arc<Self>,
        open: &Open,
        served: &Served,
        current: Option<Fed>,
    ) -> Option<Follower> {
        let ask = standby_open(open, open.at.checked_add(1)?)?;
        let shape = Shape {
            n_embd: served.n_embd,
            n_vocab: served.n_vocab,
        };
        let content = Content::Hidden(open.dtype);
        let dialer = self.dialer.clone();
        let deadline = Instant::now() + self.limits.deadlines.opened(0);
        Follower::open(
            ask,
            open.standbys.batch,
            content,
            shape,
            (current, dialer, deadline),
        )
    }

    /// A route may use two spans of one peer in a row; nobody dials itself.
    fn to_self(self: &Arc<Self>) -> Stream {
        let (near, far) = tokio::io::duplex(TO_SELF_BYTES);
        let sessions = Sessions {
            shared: self.clone(),
        };
        sessions.accept_session(self.me, Stream::new(far));
        Stream::new(near)
    }

    fn client_below(&self, open: &Open) -> Result<Chain, Failure> {
        let key = (open.client, open.session, open.epoch);
        let (stream, place) = self
            .pairing
            .session(key)
            .map_err(|e| fail(open.at, Fault::Caller, FailureCode::BadFrame, e.to_string()))?;
        let mut answers = Pipe::detached(ATTACH);
        answers.push(&Answer::Attached);
        let below = Below::Client {
            answers,
            attach: Some(stream),
            top: TopK::default(),
            due: Instant::now() + self.limits.deadlines.pair,
        };
        Ok(Chain {
            below,
            held: 0,
            place: Some(place),
        })
    }

    async fn answer(&self, from: Peer, stream: Stream) -> Result<(), String> {
        let deadline = Instant::now() + self.limits.deadlines.pair;
        let mut pipe = Pipe::new(stream, ATTACH);
        let attach = timeout_at(deadline, pipe.frame::<Attach>()).await;
        let attach = match attach {
            Ok(Ok(Some(attach))) => attach,
            Ok(Ok(None)) | Err(_) => return Err("no attach message came".into()),
            Ok(Err(e)) => return Err(e.to_string()),
        };
        let claim = match self.pairing.answer((from, attach.session, attach.epoch)) {
            Ok(claim) => claim,
            Err(e) => {
                let failure = fail(0, Fault::Local, FailureCode::Full, e.to_string());
                pipe.push(&Answer::Failed(failure));
                let _ = timeout(self.limits.deadlines.close, pipe.close()).await;
                return Err(e.to_string());
            }
        };
        let to = match claim {
            Claim::Now(to) => to,
            Claim::Later(mut later, place) => {
                let session = tokio::select! {
                    biased;
                    session = timeout_at(deadline, &mut later) => session.ok().and_then(Result::ok),
                    // The client gave up, or talks where it must listen.
                    _ = pipe.frame::<Attach>() => None,
                    () = self.stopping.cancelled() => None,
                };
                drop(later);
                drop(place);
                session.ok_or("its session did not come")?
            }
        };
        let stream = pipe.into_stream().ok_or("bytes after the attach message")?;
        to.send(stream)
            .map_err(|_| "its session is over".to_string())
    }

    pub(super) async fn refuse(&self, mut up: Pipe, failure: Failure) {
        up.push(&Up::Failed(failure));
        let _ = timeout(self.limits.deadlines.close, up.close()).await;
    }

    pub(super) fn going_down(&self, at: u8) -> Failure {
        fail(
            at,
            Fault::Local,
            FailureCode::ShuttingDown,
            "this node is shutting down",
        )
    }
}

pub(super) fn dial_code(e: &OpenError) -> FailureCode {
    match e {
        OpenError::Unsupported { .. }
        | OpenError::OtherSwarm { .. }
        | OpenError::OtherVersion { .. } => FailureCode::Version,
        OpenError::Refused { .. } | OpenError::Busy { .. } => FailureCode::Full,
        OpenError::Timeout { .. } => FailureCode::Deadline,
        _ => FailureCode::DownstreamLost,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Maps and counters whose every change is one call: no invariant spans a panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
