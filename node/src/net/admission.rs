//! The first byte of each of our streams: the side that was asked says yes or no.
//!
//! ```text
//!   opener                           acceptor
//!   protocol name ──multistream──▶   reserve a place in the queue of that protocol
//!                 ◀── echo + 1 byte  ADMITTED, and the stream waits in the queue,
//!                                    or BUSY, and the stream is closed
//! ```
//! Without it a stream dropped because a queue is full looks, to the opener, like a peer that
//! died; the byte travels with the negotiation's answer and costs no round trip.

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use futures::{AsyncReadExt, AsyncWriteExt, FutureExt, future::BoxFuture};
use libp2p::{
    StreamProtocol,
    core::upgrade::{InboundUpgrade, OutboundUpgrade, UpgradeInfo},
};
use swarm_proto::Peer;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::compat::FuturesAsyncReadCompatExt;

use super::stream::{Activity, Stream};
use crate::seldom::Seldom;

/// The stream is in the acceptor's queue.
pub(super) const ADMITTED: u8 = 1;
/// The queue, or the connection's allowance of streams, is full.
pub(super) const BUSY: u8 = 2;

/// The queues of those who accept streams, by protocol name.
#[derive(Default)]
pub(super) struct Acceptors {
    queues: Mutex<HashMap<String, Queue>>,
    refusing: Seldom,
}

/// A place in a queue, whether its streams are bulk, and who is told of writes.
pub(super) type Reserved = (
    mpsc::OwnedPermit<(Peer, Stream)>,
    bool,
    Option<Arc<Activity>>,
);

struct Queue {
    streams: mpsc::Sender<(Peer, Stream)>,
    bulk: bool,
    activity: Option<Arc<Activity>>,
}

impl Acceptors {
    /// Registers a queue of `depth`; `None` where another one for `name` is alive. `bulk` streams mark the
    /// connection they come on, and `activity` is told of writes.
    pub(super) fn register(
        &self,
        name: String,
        bulk: bool,
        activity: Option<Arc<Activity>>,
        depth: usize,
    ) -> Option<mpsc::Receiver<(Peer, Stream)>> {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = |queue: &Queue| !queue.streams.is_closed();
        if queues.get(&name).is_some_and(taken) {
            return None;
        }
        let (streams, receiver) = mpsc::channel(depth);
        let queue = Queue {
            streams,
            bulk,
            activity,
        };
        queues.insert(name, queue);
        Some(receiver)
    }

    /// Lets no new stream in; those open stay.
    pub(super) fn close(&self) {
        self.queues
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    fn names(&self) -> Vec<String> {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.retain(|_, queue| !queue.streams.is_closed());
        queues.keys().cloned().collect()
    }

    /// A place in the queue of `name`, if somebody takes its streams and it is not full.
    pub(super) fn reserve(&self, name: &str) -> Option<Reserved> {
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = queues.get(name)?;
        let place = queue.streams.clone().try_reserve_owned().ok()?;
        Some((place, queue.bulk, queue.activity.clone()))
    }
}

/// The answering side, one per inbound stream.
pub(super) struct Admit {
    pub(super) remote: Peer,
    pub(super) acceptors: Arc<Acceptors>,
    /// How many more streams this connection may hold open towards us.
    pub(super) slots: Arc<Semaphore>,
}

impl UpgradeInfo for Admit {
    type Info = StreamProtocol;
    type InfoIter = Vec<StreamProtocol>;

    fn protocol_info(&self) -> Self::InfoIter {
        let names = self.acceptors.names().into_iter();
        names
            .filter_map(|name| StreamProtocol::try_from_owned(name).ok())
            .collect()
    }
}

impl InboundUpgrade<libp2p::Stream> for Admit {
    /// Whether it is a bulk stream.
    type Output = bool;
    type Error = io::Error;
    type Future = BoxFuture<'static, Result<bool, io::Error>>;

    fn upgrade_inbound(self, mut stream: libp2p::Stream, name: StreamProtocol) -> Self::Future {
        async move {
            let slot = self.slots.clone().try_acquire_owned().ok();
            let reserved = self.acceptors.reserve(name.as_ref());
            let (Some(slot), Some((place, bulk, activity))) = (slot, reserved) else {
                let peer = self.remote;
                if self.acceptors.refusing.now(Instant::now()) {
                    tracing::warn!(%peer, protocol = %name, "streams are refused: queue full");
                } else {
                    tracing::debug!(%peer, protocol = %name, "stream refused: queue full");
                }
                stream.write_all(&[BUSY]).await?;
                stream.close().await?;
                return Ok(false);
            };
            stream.write_all(&[ADMITTED]).await?;
            stream.flush().await?;
            let stream = Stream::with_slot(stream.compat(), slot).watched(activity);
            place.send((self.remote, stream));
            Ok(bulk)
        }
        .boxed()
    }
}

/// The asking side.
pub(super) struct Ask {
    pub(super) name: StreamProtocol,
}

/// What came of asking.
#[derive(Debug)]
pub(super) enum Answer {
    /// Ready for bytes.
    Admitted(Stream),
    /// The peer has too many.
    Refused,
}

impl UpgradeInfo for Ask {
    type Info = StreamProtocol;
    type InfoIter = std::iter::Once<StreamProtocol>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once(self.name.clone())
    }
}

impl OutboundUpgrade<libp2p::Stream> for Ask {
    type Output = Answer;
    type Error = io::Error;
    type Future = BoxFuture<'static, Result<Answer, io::Error>>;

    fn upgrade_outbound(self, mut stream: libp2p::Stream, _: StreamProtocol) -> Self::Future {
        async move {
            let mut said = [0];
            stream.read_exact(&mut said).await?;
            match said {
                [ADMITTED] => Ok(Answer::Admitted(Stream::new(stream.compat()))),
                [BUSY] => Ok(Answer::Refused),
                [other] => Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("first byte of the stream is {other}, expected {ADMITTED} or {BUSY}"),
                )),
            }
        }
        .boxed()
    }
}

/// Named so that the handler's associated types read well.
pub(super) type Never = Infallible;
