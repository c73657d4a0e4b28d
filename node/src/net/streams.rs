//! A libp2p behaviour that opens and accepts our streams, keyed by connection.
//!
//! Everything is bounded and every refusal is said: openings that wait for a dial, openings queued
//! at a connection, streams a remote may hold open. Streams are handed over whole; no byte of
//! theirs passes through the swarm's driver.
//!
//! Bulk streams have connections of their own (`docs/decisions/0081`): who opens the first dials for it, who is
//! asked learns it from the stream's protocol. Where a second connection cannot be made, they share.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use libp2p::{
    Multiaddr, PeerId, StreamProtocol,
    core::{Endpoint, transport::PortUse},
    swarm::{
        ConnectionClosed, ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent,
        ConnectionId, DialError, DialFailure, FromSwarm, ListenFailure, NetworkBehaviour,
        StreamUpgradeError, SubstreamProtocol, THandlerInEvent, THandlerOutEvent, ToSwarm,
        behaviour::ConnectionEstablished,
        dial_opts::{DialOpts, PeerCondition},
        handler::{
            ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound,
        },
    },
};
use swarm_proto::Peer;
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::{
    admission::{Acceptors, Admit, Answer, Ask, Never},
    gate::NotAllowed,
    stream::{OpenError, Stream},
    transport::explain_dial,
};

/// Openings that may wait for one peer (being dialled, or queued at its connection): more are
/// refused at once, so that a burst shows as refusals and not as memory.
pub(super) const OPENING_PER_PEER_MAX: usize = 64;
/// Openings that may wait for dials, over all peers.
const WAITING_MAX: usize = 1024;
/// Streams a remote may hold open on one connection: below yamux's and QUIC's own 256, so that it
/// is we who refuse, with a word.
const INBOUND_PER_CONNECTION_MAX: usize = 192;
/// How long negotiating one stream may take; the caller's own deadline is usually shorter.
const NEGOTIATION_TIMEOUT: Duration = Duration::from_secs(10);

/// Somebody wants a stream.
#[derive(Debug)]
pub(super) struct OpenRequest {
    pub(super) peer: Peer,
    pub(super) id: PeerId,
    pub(super) addrs: Vec<Multiaddr>,
    pub(super) name: StreamProtocol,
    pub(super) bulk: bool,
    pub(super) reply: oneshot::Sender<Result<Stream, OpenError>>,
}

impl OpenRequest {
    fn fail(self, error: OpenError) {
        // The caller may have given up: then nobody needs the reason.
        let _ = self.reply.send(Err(error));
    }
}

/// What identify told us of a peer.
struct Offer {
    /// It is none of us.
    stranger: Option<OpenError>,
    protocols: String,
}

struct Connection {
    id: ConnectionId,
    /// Bulk streams go here, and nothing else while there is another one.
    bulk: bool,
    queue: mpsc::Sender<OpenRequest>,
}

#[derive(Default)]
struct Waiting {
    requests: Vec<OpenRequest>,
    /// The dial that we asked for with the requests' addresses; others may be dialling too.
    dial: Option<ConnectionId>,
}

/// The behaviour.
pub(super) struct Streams {
    acceptors: Arc<Acceptors>,
    connections: HashMap<PeerId, Vec<Connection>>,
    /// Queues of connections which other behaviours may still deny.
    fresh: HashMap<ConnectionId, mpsc::Sender<OpenRequest>>,
    /// By peer, bulk apart from the rest.
    waiting: HashMap<(PeerId, bool), Waiting>,
    /// Connected peers to whom no second connection could be made.
    sharing: HashSet<PeerId>,
    offers: HashMap<PeerId, Offer>,
    /// Openings that failed before identify said who the peer is.
    unexplained: Vec<OpenRequest>,
    dials: VecDeque<DialOpts>,
    waker: Option<Waker>,
}

impl Streams {
    pub(super) fn new(acceptors: Arc<Acceptors>) -> Self {
        Self {
            acceptors,
            connections: HashMap::new(),
            fresh: HashMap::new(),
            waiting: HashMap::new(),
            sharing: HashSet::new(),
            offers: HashMap::new(),
            unexplained: Vec::new(),
            dials: VecDeque::new(),
            waker: None,
        }
    }

    /// Opens on a live connection of its kind, or dials first.
    pub(super) fn open(&mut self, request: OpenRequest) {
        let shares = self.sharing.contains(&request.id);
        let bulk = request.bulk;
        self.open_where(request, |connection| shares || connection.bulk == bulk);
    }

    fn open_where(&mut self, request: OpenRequest, fits: impl Fn(&Connection) -> bool) {
        let connections = self.connections.get(&request.id);
        let mut fitting = connections
            .into_iter()
            .flatten()
            .filter(|c| fits(c))
            .peekable();
        if fitting.peek().is_none() {
            return self.wait_for_dial(request);
        }
        let mut request = request;
        for connection in fitting {
            match connection.queue.try_send(request) {
                Ok(()) => return,
                Err(
                    mpsc::error::TrySendError::Full(back) | mpsc::error::TrySendError::Closed(back),
                ) => {
                    request = back;
                }
            }
        }
        let peer = request.peer;
        request.fail(OpenError::Busy {
            peer,
            limit: OPENING_PER_PEER_MAX,
        });
    }

    /// Connections to a peer: those for everything, those for bulk.
    pub(super) fn connections(&self, id: &PeerId) -> (usize, usize) {
        let all = self.connections.get(id).map_or(&[][..], Vec::as_slice);
        let bulk = all.iter().filter(|connection| connection.bulk).count();
        (all.len() - bulk, bulk)
    }

    /// Identify spoke: failed openings can now be explained.
    pub(super) fn identified(
        &mut self,
        id: PeerId,
        stranger: Option<OpenError>,
        protocols: &[StreamProtocol],
    ) {
        let ours = protocols
            .iter()
            .filter(|p| p.as_ref().starts_with("/shoal/"));
        let protocols = ours.map(|p| p.to_string()).collect::<Vec<_>>().join(", ");
        let protocols = if protocols.is_empty() {
            "no shoal protocol".into()
        } else {
            protocols
        };
        self.offers.insert(
            id,
            Offer {
                stranger,
                protocols,
            },
        );
        for request in std::mem::take(&mut self.unexplained) {
            if request.id == id {
                self.explain(request)
            } else {
                self.unexplained.push(request)
            }
        }
    }

    fn wait_for_dial(&mut self, request: OpenRequest) {
        let total: usize = self.waiting.values().map(|w| w.requests.len()).sum();
        let connected = self.connections.contains_key(&request.id);
        let key = (request.id, request.bulk);
        let waiting = self.waiting.entry(key).or_default();
        waiting.requests.retain(|r| !r.reply.is_closed());
        if waiting.requests.len() >= OPENING_PER_PEER_MAX || total >= WAITING_MAX {
            let peer = request.peer;
            return request.fail(OpenError::Busy {
                peer,
                limit: OPENING_PER_PEER_MAX,
            });
        }
        if waiting.requests.is_empty() || waiting.dial.is_none() {
            let opts = dial(&request, connected);
            waiting.dial = Some(opts.connection_id());
            self.dials.push_back(opts);
        }
        waiting.requests.push(request);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// The protocol was not agreed on: says why, or waits for identify, which knows.
    fn explain(&mut self, request: OpenRequest) {
        let Some(offer) = self.offers.get(&request.id) else {
            self.unexplained.retain(|r| !r.reply.is_closed());
            if self.unexplained.len() < WAITING_MAX {
                self.unexplained.push(request);
            }
            return;
        };
        let error = offer
            .stranger
            .clone()
            .unwrap_or_else(|| OpenError::Unsupported {
                peer: request.peer,
                wanted: request.name.to_string(),
                offers: offer.protocols.clone(),
            });
        request.fail(error);
    }

    fn connected(&mut self, id: PeerId, connection: ConnectionId) {
        let Some(queue) = self.fresh.remove(&connection) else {
            return;
        };
        let dialled_for = |waiting: &Waiting| waiting.dial == Some(connection);
        let bulk = self.waiting.get(&(id, true)).is_some_and(dialled_for);
        self.connections.entry(id).or_default().push(Connection {
            id: connection,
            bulk,
            queue,
        });
        for request in self
            .waiting
            .remove(&(id, bulk))
            .unwrap_or_default()
            .requests
        {
            self.open(request);
        }
        // Others may have waited for this one's end, and it is not for them.
        if bulk
            && let Some(waiting) = self.waiting.get_mut(&(id, false))
            && waiting.dial.is_none()
            && let Some(first) = waiting.requests.first()
        {
            let opts = dial(first, true);
            waiting.dial = Some(opts.connection_id());
            self.dials.push_back(opts);
        }
    }

    /// The other side opened a bulk stream on it.
    fn became_bulk(&mut self, id: PeerId, connection: ConnectionId) {
        let connections = self.connections.get_mut(&id).into_iter().flatten();
        for known in connections.filter(|known| known.id == connection) {
            known.bulk = true;
        }
    }

    fn disconnected(&mut self, id: PeerId, connection: ConnectionId) {
        let Some(connections) = self.connections.get_mut(&id) else {
            return;
        };
        connections.retain(|c| c.id != connection);
        if !connections.is_empty() {
            return;
        }
        self.connections.remove(&id);
        self.sharing.remove(&id);
        for request in std::mem::take(&mut self.unexplained) {
            if request.id == id {
                self.explain_lost(request)
            } else {
                self.unexplained.push(request)
            }
        }
        self.offers.remove(&id);
    }

    fn explain_lost(&mut self, request: OpenRequest) {
        if self.offers.contains_key(&request.id) {
            return self.explain(request);
        }
        let (peer, wanted) = (request.peer, request.name.to_string());
        request.fail(OpenError::Unsupported {
            peer,
            wanted,
            offers: "nothing it told us of".into(),
        });
    }

    fn dial_failed(&mut self, id: PeerId, connection: ConnectionId, error: &DialError) {
        let bulk = self.waiting.get(&(id, true));
        if bulk.is_some_and(|waiting| waiting.dial == Some(connection)) {
            return self.alone_failed(id, true, error);
        }
        let connected = self.connections.contains_key(&id);
        let Some(waiting) = self.waiting.get_mut(&(id, false)) else {
            return;
        };
        if matches!(error, DialError::DialPeerConditionFalse(_)) {
            // Somebody else is dialling this peer, perhaps with other addresses: their end decides
            // whether ours are tried.
            waiting.dial = None;
            return;
        }
        if waiting.dial != Some(connection)
            && let Some(first) = waiting.requests.first()
        {
            let opts = dial(first, connected);
            waiting.dial = Some(opts.connection_id());
            self.dials.push_back(opts);
            return;
        }
        self.alone_failed(id, false, error);
    }

    /// No connection of this kind: another one is shared, if there is one.
    fn alone_failed(&mut self, id: PeerId, bulk: bool, error: &DialError) {
        let connected = self.connections.contains_key(&id);
        if connected {
            tracing::debug!(peer = %id, error = %explain_dial(error), "no second connection: sharing one");
            self.sharing.insert(id);
        }
        for request in self
            .waiting
            .remove(&(id, bulk))
            .unwrap_or_default()
            .requests
        {
            if connected {
                self.open(request);
            } else {
                let error = unreachable_error(request.peer, error);
                request.fail(error);
            }
        }
    }

    fn handler(
        &mut self,
        id: PeerId,
        connection: ConnectionId,
    ) -> Result<Handler, ConnectionDenied> {
        let Some(remote) = crate::identity::peer_of(&id) else {
            return Err(ConnectionDenied::new(NotEd25519(id)));
        };
        let (sender, queue) = mpsc::channel(OPENING_PER_PEER_MAX);
        self.fresh.insert(connection, sender);
        Ok(Handler {
            remote,
            acceptors: self.acceptors.clone(),
            slots: Arc::new(Semaphore::new(INBOUND_PER_CONNECTION_MAX)),
            queue,
            negotiating: 0,
            told: VecDeque::new(),
        })
    }
}

/// A peer whose key our messages cannot name.
#[derive(Debug, thiserror::Error)]
#[error("peer {0} has no ed25519 identity")]
struct NotEd25519(PeerId);

/// A bulk stream, or the first that is none while there is only a bulk connection, wants a connection more; from
/// the port we listen on there can be only one.
fn dial(request: &OpenRequest, connected: bool) -> DialOpts {
    let opts = DialOpts::peer_id(request.id)
        .addresses(request.addrs.clone())
        .extend_addresses_through_behaviour();
    if request.bulk || connected {
        let opts = opts.condition(PeerCondition::Always);
        return opts.allocate_new_port().build();
    }
    opts.condition(PeerCondition::DisconnectedAndNotDialing)
        .build()
}

fn unreachable_error(peer: Peer, error: &DialError) -> OpenError {
    match error {
        DialError::NoAddresses => OpenError::NoAddress { peer },
        DialError::Denied { cause } if cause.downcast_ref::<NotAllowed>().is_some() => {
            OpenError::NotAllowed { peer }
        }
        other => OpenError::Unreachable {
            peer,
            reason: explain_dial(other),
        },
    }
}

impl NetworkBehaviour for Streams {
    type ConnectionHandler = Handler;
    type ToSwarm = Never;

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<Handler, ConnectionDenied> {
        self.handler(peer, connection)
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<Handler, ConnectionDenied> {
        self.handler(peer, connection)
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        match event {
            FromSwarm::ConnectionEstablished(ConnectionEstablished {
                peer_id,
                connection_id,
                ..
            }) => self.connected(peer_id, connection_id),
            FromSwarm::ConnectionClosed(ConnectionClosed {
                peer_id,
                connection_id,
                ..
            }) => {
                self.disconnected(peer_id, connection_id);
            }
            FromSwarm::DialFailure(DialFailure {
                peer_id,
                error,
                connection_id,
            }) => {
                self.fresh.remove(&connection_id);
                if let Some(id) = peer_id {
                    self.dial_failed(id, connection_id, error);
                }
            }
            FromSwarm::ListenFailure(ListenFailure { connection_id, .. }) => {
                self.fresh.remove(&connection_id);
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(
        &mut self,
        id: PeerId,
        connection: ConnectionId,
        told: THandlerOutEvent<Self>,
    ) {
        match told {
            Told::Unsupported(request) => self.explain(request),
            Told::Bulk => self.became_bulk(id, connection),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Never, THandlerInEvent<Self>>> {
        if let Some(opts) = self.dials.pop_front() {
            return Poll::Ready(ToSwarm::Dial { opts });
        }
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// What a connection tells the behaviour.
#[derive(Debug)]
pub(super) enum Told {
    /// The other side does not speak the protocol of this opening.
    Unsupported(OpenRequest),
    /// The other side opened a bulk stream.
    Bulk,
}

/// Our part of one connection; runs on the connection's own task.
pub(super) struct Handler {
    remote: Peer,
    acceptors: Arc<Acceptors>,
    slots: Arc<Semaphore>,
    queue: mpsc::Receiver<OpenRequest>,
    negotiating: usize,
    told: VecDeque<Told>,
}

impl Handler {
    fn upgrade_failed(&mut self, request: OpenRequest, error: StreamUpgradeError<std::io::Error>) {
        let peer = request.peer;
        match error {
            StreamUpgradeError::NegotiationFailed => {
                self.told.push_back(Told::Unsupported(request))
            }
            StreamUpgradeError::Timeout => {
                request.fail(OpenError::Timeout {
                    peer,
                    deadline: NEGOTIATION_TIMEOUT,
                });
            }
            StreamUpgradeError::Apply(e) | StreamUpgradeError::Io(e) => {
                request.fail(OpenError::Lost {
                    peer,
                    reason: e.to_string(),
                });
            }
        }
    }
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Never;
    type ToBehaviour = Told;
    type InboundProtocol = Admit;
    type OutboundProtocol = Ask;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = OpenRequest;

    fn listen_protocol(&self) -> SubstreamProtocol<Admit> {
        let admit = Admit {
            remote: self.remote,
            acceptors: self.acceptors.clone(),
            slots: self.slots.clone(),
        };
        SubstreamProtocol::new(admit, ()).with_timeout(NEGOTIATION_TIMEOUT)
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Ask, OpenRequest, Told>> {
        if let Some(told) = self.told.pop_front() {
            return Poll::Ready(ConnectionHandlerEvent::NotifyBehaviour(told));
        }
        while self.negotiating < OPENING_PER_PEER_MAX
            && let Poll::Ready(Some(request)) = self.queue.poll_recv(cx)
        {
            if request.reply.is_closed() {
                continue;
            }
            self.negotiating += 1;
            let ask = Ask {
                name: request.name.clone(),
            };
            return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest {
                protocol: SubstreamProtocol::new(ask, request).with_timeout(NEGOTIATION_TIMEOUT),
            });
        }
        Poll::Pending
    }

    fn on_behaviour_event(&mut self, event: Never) {
        match event {}
    }

    fn on_connection_event(&mut self, event: ConnectionEvent<'_, Admit, Ask, (), OpenRequest>) {
        match event {
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound {
                protocol,
                info,
            }) => {
                self.negotiating = self.negotiating.saturating_sub(1);
                let peer = info.peer;
                let answer = match protocol {
                    Answer::Admitted(stream) => Ok(stream),
                    Answer::Refused => Err(OpenError::Refused { peer }),
                };
                // A caller that gave up drops its end: the stream is then reset, as it should.
                let _ = info.reply.send(answer);
            }
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound {
                protocol: true,
                ..
            }) => self.told.push_back(Told::Bulk),
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info, error }) => {
                self.negotiating = self.negotiating.saturating_sub(1);
                self.upgrade_failed(info, error);
            }
            ConnectionEvent::ListenUpgradeError(failed) => {
                tracing::debug!(peer = %self.remote, error = %failed.error, "inbound stream failed");
            }
            _ => {}
        }
    }
}
