//! Opens a session along a route: the chain from the first hop on and, at the same time, the answer
//! stream to the tail. On failure another route is tried without the peer at fault.

use std::sync::Arc;

use swarm_proto::{
    Answer, Attach, Down, Dtype, Epoch, Failure, FailureCode, Fault, Hop, ModelId, Open, Peer,
    SessionId, Up,
};
use tokio::time::{Instant, timeout_at};

use super::{
    client::{ClientSession, Opened},
    config::Deadlines,
    error::ClientError,
    failure::fail,
    hop::{Dialer, dial_code},
    limits, trace,
    wire::{Pipe, WireError},
};
use crate::net::Proto;

/// Routes tried before giving up.
const TRIES_MAX: usize = 4;

/// Who opens sessions, and how.
#[derive(Clone)]
pub struct Opener {
    /// Who we are to the hops.
    pub me: Peer,
    /// How streams are opened.
    pub dialer: Arc<dyn Dialer>,
    /// The deadlines.
    pub deadlines: Deadlines,
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
    /// Floats in a logits row, as the manifest says: a hop that says otherwise is at fault.
    pub n_vocab: u32,
}

impl Opener {
    /// Opens along the routes that `plan` gives, which is told whom to avoid.
    ///
    /// # Errors
    /// There is no route, or every route that was tried failed.
    pub async fn open(
        &self,
        kind: Kind,
        mut plan: impl FnMut(&[Peer]) -> Result<Vec<Hop>, ClientError>,
    ) -> Result<ClientSession, ClientError> {
        let mut avoid = Vec::new();
        let mut last: Option<ClientError> = None;
        for tries in 0..TRIES_MAX {
            let route = match plan(&avoid) {
                Ok(route) => route,
                // Without the peers that failed there is none: their failure is the news.
                Err(none) => return Err(exhausted(tries, last).unwrap_or(none)),
            };
            match self.open_route(kind, &route).await {
                Ok(session) => return Ok(session),
                Err(e) => {
                    tracing::info!(error = %e, "a route failed to open");
                    let Some(culprit) = e.culprit(&route) else {
                        return Err(e);
                    };
                    avoid.push(culprit);
                    last = Some(e);
                }
            }
        }
        Err(exhausted(TRIES_MAX, last).unwrap_or(ClientError::NothingAsked))
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
        route: &[Hop],
    ) -> Result<ClientSession, ClientError> {
        let session = SessionId(rand::random());
        let epoch = Epoch(0);
        let open = Open {
            session,
            epoch,
            client: self.me,
            model: kind.model,
            n_ctx: kind.n_ctx,
            dtype: kind.dtype,
            hops: route.to_vec(),
            at: 0,
            trace: trace::current(),
        };
        let deadline = Instant::now() + self.deadlines.opened(route.len());
        // The tail greets when the chain reaches it: if the chain does not, that is the news.
        let greeting = deadline + self.deadlines.per_hop;
        let both = async {
            tokio::try_join!(
                self.chain(open, kind.n_vocab, deadline),
                self.answers(route, session, greeting)
            )
        };
        let (up, mut answers) = both
            .await
            .map_err(|failure| ClientError::hop(route, failure))?;
        answers.set_limits(limits::answers(kind.n_vocab));
        Ok(ClientSession::new(Opened {
            up,
            answers,
            session,
            epoch,
            route: route.to_vec(),
            dtype: kind.dtype,
            n_ctx: kind.n_ctx,
            n_vocab: kind.n_vocab,
            deadlines: self.deadlines,
        }))
    }

    async fn chain(&self, open: Open, n_vocab: u32, deadline: Instant) -> Result<Pipe, Failure> {
        let at_fault = |code, message: String| fail(0, Fault::Peer, code, message);
        let hops = open.hops.len();
        let Some(hop) = open.hops.first() else {
            return Err(at_fault(FailureCode::BadFrame, "the route is empty".into()));
        };
        let late = |_| at_fault(FailureCode::Deadline, "it did not open in time".into());
        let stream = self.dialer.open(hop.peer, &hop.addrs, Proto::Session);
        let stream = timeout_at(deadline, stream).await.map_err(late)?;
        let stream = stream.map_err(|e| at_fault(dial_code(&e), e.to_string()))?;
        let mut pipe = Pipe::new(stream, limits::UP);
        pipe.push(&Down::Open(open));
        let opened = async {
            pipe.flush().await.map_err(WireError::Io)?;
            pipe.frame::<Up>().await
        };
        match timeout_at(deadline, opened).await.map_err(late)? {
            Ok(Some(Up::Opened { n_vocab: told, .. })) if told == n_vocab => Ok(pipe),
            Ok(Some(Up::Opened { n_vocab: told, .. })) => Err(at_fault(
                FailureCode::BadFrame,
                format!("it has a vocabulary of {told}, the model has {n_vocab}"),
            )),
            Ok(Some(Up::Failed(mut failure))) => {
                failure.at = failure
                    .at
                    .min(u8::try_from(hops.saturating_sub(1)).unwrap_or(u8::MAX));
                Err(failure)
            }
            Ok(Some(_)) => Err(at_fault(
                FailureCode::BadFrame,
                "an answer that fits no opening".into(),
            )),
            Ok(None) => Err(at_fault(
                FailureCode::DownstreamLost,
                "it closed the stream while opening".into(),
            )),
            Err(e) => Err(at_fault(FailureCode::DownstreamLost, e.to_string())),
        }
    }

    async fn answers(
        &self,
        route: &[Hop],
        session: SessionId,
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
        pipe.push(&Attach {
            session,
            epoch: Epoch(0),
        });
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

fn exhausted(tries: usize, last: Option<ClientError>) -> Option<ClientError> {
    match (tries, last) {
        (_, None) => None,
        (0 | 1, Some(last)) => Some(last),
        (tries, Some(last)) => Some(ClientError::Exhausted {
            tries,
            last: Box::new(last),
        }),
    }
}
