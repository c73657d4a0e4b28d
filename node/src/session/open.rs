//! Opens a session along a route: the chain from the first hop on and, at the same time, the answer
//! stream to the tail. On failure another route is tried without the peer at fault; where nobody has
//! room, the client waits its turn.

use std::{sync::Arc, time::Duration};

use swarm_proto::{
    Answer, Attach, Content, Dtype, Epoch, Failure, FailureCode, Fault, Fork, Hop, LayerRange,
    ModelId, Numerics, Open, Peer, SessionId, Standbys,
};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{
    chain::{Next, Shape, open_next},
    client::{Beginning, ClientSession, Opened},
    config::Deadlines,
    error::{ClientError, HopName},
    failure::fail,
    hop::{Dialer, dial_code},
    limits,
    standby::{Fed, Follower, resume_at, standby_open},
    trace,
    wire::{Pipe, WireError},
};
use crate::{net::Proto, peer_book::PeerBook, random::Random};

/// Routes that may fail before giving up, not counting those that failed for want of room: after a
/// power cut many peers are gone whose adverts are still believed, and most of them refuse at once.
const TRIES_MAX: usize = 16;
/// Peers without room that are asked in one round: each costs a round trip.
const FULL_MAX: usize = 16;
/// Before the first further round. A short answer on a small model takes about as long.
const PAUSE_MIN: Duration = Duration::from_millis(200);
/// Before each later one, reached by doubling: a place that became free is found within this, and
/// many who wait do not keep the holders busy with refusing them.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Who opens sessions, and how.
#[derive(Clone)]
pub struct Opener {
    /// Who we are to the hops.
    pub me: Peer,
    /// How streams are opened.
    pub dialer: Arc<dyn Dialer>,
    /// The deadlines.
    pub deadlines: Deadlines,
    /// What session ids and pauses are drawn from.
    pub random: Random,
    /// What is thought of peers.
    pub book: PeerBook,
}

/// What kind of session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// The model.
    pub model: ModelId,
    /// Positions that the session must hold.
    pub n_ctx: u32,
    /// How hidden states travel.
    pub dtype: Dtype,
    /// What may be done with its numbers.
    pub numerics: Numerics,
    /// Floats in a hidden row, as the manifest says: a hop that says otherwise is at fault.
    pub n_embd: u32,
    /// Floats in a logits row, likewise.
    pub n_vocab: u32,
}

/// Along which peers a session is opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Route {
    /// In order.
    pub hops: Vec<Hop>,
    /// Who stands by for which of them.
    pub standbys: Standbys,
}

impl Route {
    /// Who stands by for the hop of these layers, as that hop.
    pub fn standby_for(&self, layers: LayerRange) -> Option<Hop> {
        let at = self.hops.iter().position(|hop| hop.layers == layers)?;
        let standby = self.standbys.of(u8::try_from(at).ok()?)?;
        Some(Hop {
            peer: standby.peer,
            addrs: standby.addrs.clone(),
            layers,
        })
    }
}

impl From<Vec<Hop>> for Route {
    fn from(hops: Vec<Hop>) -> Self {
        let standbys = Standbys::default();
        Self { hops, standbys }
    }
}

impl From<&[Hop]> for Route {
    fn from(hops: &[Hop]) -> Self {
        hops.to_vec().into()
    }
}

/// Peers that hold these layers were asked and have no room.
struct NoRoom {
    layers: Vec<LayerRange>,
    last: ClientError,
}

impl NoRoom {
    fn of(mut full: Vec<(HopName, ClientError)>) -> Option<Self> {
        let layers = LayerRange::merge(full.iter().map(|(hop, _)| hop.layers).collect());
        let (_, last) = full.pop()?;
        Some(Self { layers, last })
    }
}

impl Opener {
    /// One over `dialer` with the usual deadlines, the system's chance and an empty book.
    pub fn new(me: Peer, dialer: Arc<dyn Dialer>) -> Self {
        Self {
            me,
            dialer,
            deadlines: Deadlines::default(),
            random: Random::of_system(),
            book: PeerBook::default(),
        }
    }

    /// Opens along the routes that `plan` gives, which is told whom to avoid.
    ///
    /// # Errors
    /// There is no route, every route that was tried failed, or nobody has room.
    ///
    /// # Cancel safety
    /// As [`Opener::open_route`].
    pub async fn open<R: Into<Route>>(
        &self,
        kind: Kind,
        plan: impl FnMut(&[Peer]) -> Result<R, ClientError>,
    ) -> Result<ClientSession, ClientError> {
        self.open_waiting(kind, Duration::ZERO, plan, |_| {}).await
    }

    /// The same, but where all that stands in the way is peers without room, they are asked again, with
    /// pauses, until `patience` is over; `busy` hears once for which layers.
    ///
    /// # Errors
    /// As [`Opener::open`].
    pub async fn open_waiting<R: Into<Route>>(
        &self,
        kind: Kind,
        patience: Duration,
        mut plan: impl FnMut(&[Peer]) -> Result<R, ClientError>,
        busy: impl FnOnce(&[LayerRange]),
    ) -> Result<ClientSession, ClientError> {
        let deadline = Instant::now() + patience;
        let (mut pause, mut busy) = (PAUSE_MIN, Some(busy));
        let mut broken = Vec::new();
        loop {
            let NoRoom { layers, last } = match self.round(kind, &mut broken, &mut plan).await? {
                Ok(session) => return Ok(session),
                Err(full) => full,
            };
            let now = Instant::now();
            if now >= deadline {
                return Err(ClientError::Busy {
                    layers,
                    waited: patience,
                    last: Box::new(last),
                });
            }
            if let Some(busy) = busy.take() {
                busy(&layers);
            }
            // Half to one and a half of it: those who were refused together do not come back together.
            let drawn = pause.mul_f64(0.5 + self.random.fraction());
            sleep_until((now + drawn).min(deadline)).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Tries routes until one opens or none is left. Peers that failed join `broken`; peers without
    /// room are avoided in this round only.
    async fn round<R: Into<Route>>(
        &self,
        kind: Kind,
        broken: &mut Vec<(Peer, ClientError)>,
        plan: &mut impl FnMut(&[Peer]) -> Result<R, ClientError>,
    ) -> Result<Result<ClientSession, NoRoom>, ClientError> {
        let mut full: Vec<(HopName, ClientError)> = Vec::new();
        loop {
            let failed = broken.iter().map(|(peer, _)| *peer);
            let avoid: Vec<Peer> = failed.chain(full.iter().map(|(hop, _)| hop.peer)).collect();
            let planned = if full.len() < FULL_MAX && broken.len() < TRIES_MAX {
                plan(&avoid)
            } else {
                Err(ClientError::NothingAsked)
            };
            let route: Route = match planned {
                Ok(route) => route.into(),
                Err(none) => {
                    let none = exhausted(broken).unwrap_or(none);
                    return NoRoom::of(full).map(Err).ok_or(none);
                }
            };
            let error = match self.open_route(kind, route.clone()).await {
                Ok(session) => return Ok(Ok(session)),
                Err(error) => error,
            };
            tracing::info!(%error, "a route failed to open");
            match (error.without_room(), error.culprit(&route.hops)) {
                (Some(hop), _) => full.push((hop, error)),
                (None, Some(culprit)) => {
                    let why = error.to_string();
                    match error.hop_at() {
                        Some(0) | None => self.book.failed(culprit, &why),
                        Some(_) => self.book.accused(culprit, &why),
                    }
                    broken.push((culprit, error));
                }
                (None, None) => return Err(error),
            }
        }
    }

    /// Opens along one route.
    ///
    /// # Errors
    /// A hop failed; the error names it.
    ///
    /// # Cancel safety
    /// Dropping the future drops the streams, and every hop frees what it took.
    pub async fn open_route(
        &self,
        kind: Kind,
        route: impl Into<Route>,
    ) -> Result<ClientSession, ClientError> {
        self.open_with(kind, route.into(), None).await
    }

    /// The same for a session that begins with the first `positions` of another one, which runs or is kept on the
    /// same route: hops that can copy them compute them no more. They are the session's from the beginning.
    ///
    /// # Errors
    /// As [`Opener::open_route`].
    ///
    /// # Cancel safety
    /// As [`Opener::open_route`].
    pub async fn fork(
        &self,
        kind: Kind,
        route: impl Into<Route>,
        of: &Beginning,
        positions: u32,
    ) -> Result<ClientSession, ClientError> {
        let begun = of.fork(positions.min(kind.n_ctx));
        self.open_with(kind, route.into(), Some(begun)).await
    }

    async fn open_with(
        &self,
        kind: Kind,
        route: Route,
        begun: Option<(Fork, &[u32])>,
    ) -> Result<ClientSession, ClientError> {
        let session = SessionId(self.random.bytes());
        let epoch = Epoch(0);
        let open = Open {
            session,
            epoch,
            resume: 0,
            since: epoch,
            fork: begun.map(|(fork, _)| fork),
            client: self.me,
            model: kind.model,
            n_ctx: kind.n_ctx,
            dtype: kind.dtype,
            numerics: kind.numerics,
            hops: route.hops.clone(),
            at: 0,
            standbys: route.standbys.clone(),
            standing_by: false,
            trace: trace::current(),
        };
        let shape = Shape {
            n_embd: kind.n_embd,
            n_vocab: kind.n_vocab,
        };
        let deadline = Instant::now() + self.deadlines.opened(route.hops.len());
        let opened = self.both_ends(&open, shape, None, deadline).await;
        let (next, answers) = opened.map_err(|failure| ClientError::hop(&route.hops, failure))?;
        let mut opened = ClientSession::new(Opened {
            up: next.pipe,
            answers,
            model: kind.model,
            session,
            epoch,
            standby: self.standby(&open, shape, None),
            route,
            dtype: kind.dtype,
            numerics: kind.numerics,
            n_ctx: kind.n_ctx,
            shape,
            deadlines: self.deadlines,
        });
        if let Some((_, tokens)) = begun {
            opened.begin_with(tokens, next.held);
        }
        Ok(opened)
    }

    /// Opens a session again along another route, in a higher epoch. Hops that are on both routes keep
    /// what they hold.
    ///
    /// # Errors
    /// A hop of the new route failed; the session can be opened again along yet another.
    ///
    /// # Cancel safety
    /// As after an error.
    pub async fn reopen(
        &self,
        session: &mut ClientSession,
        route: impl Into<Route>,
    ) -> Result<(), ClientError> {
        let route = route.into();
        let again = session.begin_again(self.me, &route);
        let (open, shape) = (again.open, again.shape);
        let mut first = open.clone();
        let current = resume_at(&mut first, again.current);
        let deadline = Instant::now() + self.deadlines.reopened(route.hops.len());
        let opened = self.both_ends(&first, shape, current, deadline).await;
        let (next, answers) = opened.map_err(|failure| ClientError::hop(&route.hops, failure))?;
        let standby = self.standby(&open, shape, again.standby);
        session.go_on(next.pipe, answers, route, open.epoch, next.held, standby);
        Ok(())
    }

    /// The chain from the first hop on and the answer stream of the tail, at the same time.
    async fn both_ends(
        &self,
        open: &Open,
        shape: Shape,
        current: Option<Pipe>,
        deadline: Instant,
    ) -> Result<(Next, Pipe), Failure> {
        // The tail greets when the chain reaches it: if the chain does not, that is the news.
        let greeting = deadline + self.deadlines.per_hop;
        let (next, mut answers) = tokio::try_join!(
            self.chain(open.clone(), shape, current, deadline),
            self.answers(&open.hops, open.session, open.epoch, greeting)
        )?;
        answers.set_limits(limits::answers(shape));
        Ok((next, answers))
    }

    /// Opens who stands by for the first hop.
    fn standby(&self, open: &Open, shape: Shape, current: Option<Fed>) -> Option<Follower> {
        let ask = standby_open(open, 0)?;
        let (dialer, batch) = (self.dialer.clone(), open.standbys.batch);
        let deadline = Instant::now() + self.deadlines.opened(0);
        let how = (current, dialer, deadline);
        Follower::open(ask, batch, Content::Tokens, shape, how)
    }

    async fn chain(
        &self,
        open: Open,
        shape: Shape,
        current: Option<Pipe>,
        deadline: Instant,
    ) -> Result<Next, Failure> {
        let Some(hop) = open.hops.first() else {
            let message = "the route is empty";
            return Err(fail(0, Fault::Peer, FailureCode::BadFrame, message));
        };
        let dial = async || self.dialer.open(hop.peer, &hop.addrs, Proto::Session).await;
        open_next(&open, shape, current, deadline, dial).await
    }

    async fn answers(
        &self,
        route: &[Hop],
        session: SessionId,
        epoch: Epoch,
        deadline: Instant,
    ) -> Result<Pipe, Failure> {
        let tail = u8::try_from(route.len().saturating_sub(1)).unwrap_or(u8::MAX);
        let at_fault = |code, message: String| fail(tail, Fault::Peer, code, message);
        let Some(hop) = route.last() else {
            return Err(at_fault(FailureCode::BadFrame, "the route is empty".into()));
        };
        let late = |_| {
            at_fault(
                FailureCode::Deadline,
                "it did not take the answer stream in time".into(),
            )
        };
        let stream = self.dialer.open(hop.peer, &hop.addrs, Proto::Answer);
        let stream = timeout_at(deadline, stream).await.map_err(late)?;
        let stream = stream.map_err(|e| at_fault(dial_code(&e), e.to_string()))?;
        let mut pipe = Pipe::new(stream, limits::UP);
        pipe.push(&Attach { session, epoch });
        let attached = async {
            pipe.flush().await.map_err(WireError::Io)?;
            pipe.frame::<Answer>().await
        };
        match timeout_at(deadline, attached).await.map_err(late)? {
            Ok(Some(Answer::Attached)) => Ok(pipe),
            Ok(Some(Answer::Failed(failure))) => Err(Failure {
                at: tail,
                ..failure
            }),
            Ok(Some(Answer::Logits(_))) => Err(at_fault(
                FailureCode::BadFrame,
                "logits before the greeting".into(),
            )),
            // The chain's own stream knows why; it is given the time to say so.
            Ok(None) | Err(_) => {
                tokio::time::sleep_until(deadline).await;
                Err(at_fault(
                    FailureCode::DownstreamLost,
                    "it closed the answer stream".into(),
                ))
            }
        }
    }
}

/// The last failure, and how many there were; none where no peer failed.
fn exhausted(broken: &[(Peer, ClientError)]) -> Option<ClientError> {
    let (_, last) = broken.last()?;
    Some(match broken.len() {
        1 => last.clone(),
        tries => ClientError::Exhausted {
            tries,
            last: Box::new(last.clone()),
        },
    })
}
