//! The one task that owns the libp2p swarm.
//!
//! ```text
//!   Net handle ──commands──▶ ┌────────┐ ──outbox──▶ adverts task (checks signatures)
//!   adverts task ──────────▶ │ driver │
//!                            └────────┘ swarm events
//! ```
//! Handlers here are not async and never wait. Events leave through a bounded outbox; while that is
//! full the swarm is not polled, but commands still are, so that the two sides cannot block each
//! other. No hashing, decoding or checking of signatures happens here, and no activation passes.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt;
use libp2p::{
    Multiaddr, PeerId, Swarm,
    core::ConnectedPoint,
    gossipsub::{self, IdentTopic, MessageAcceptance, MessageId},
    identify, kad, mdns, ping,
    swarm::{ConnectionId, DialError, SwarmEvent, dial_opts::DialOpts},
};
use swarm_proto::{Peer, SwarmId};
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    behaviour::{Behaviour, BehaviourEvent},
    bootstrap::Bootstrap,
    facts::Facts,
    providers::Providers,
    stream::{OpenError, Proto},
    streams::OpenRequest,
    transport::explain_dial,
};
use crate::{identity::peer_of, seldom::Seldom};

/// Events that may wait for the adverts task before the swarm is no longer polled.
pub(super) const OUTBOX_MAX: usize = 256;
/// Events the driver itself holds while the outbox is full: one poll of the swarm yields one.
const PENDING_MAX: usize = 8;
/// Peers found by mDNS or Kademlia are dialled only up to this many connections.
const DISCOVERED_MAX: usize = 64;
/// Provider queries that may run at once.
const QUERIES_MAX: usize = 32;
/// How long the last messages (a withdrawn advert) may take to leave, where there are any. Gossipsub
/// has no receipt; the connections' own tasks write within a few milliseconds. What streams wrote
/// needs no such wait: a connection sends it before it closes.
const LINGER: Duration = Duration::from_millis(300);
/// A stranger's connection is kept this long after identify, so that streams being opened on it
/// fail with the reason and not with a lost connection, on both sides.
const STRANGER_GRACE: Duration = Duration::from_secs(2);

/// What the driver is asked to do.
pub(super) enum Command {
    Open(OpenRequest),
    Publish {
        topics: Vec<String>,
        bytes: Vec<u8>,
    },
    Subscribe(String),
    Report {
        id: MessageId,
        source: PeerId,
        acceptance: MessageAcceptance,
    },
    Provide(Vec<u8>),
    StopProviding(Vec<u8>),
    Providers {
        key: Vec<u8>,
        reply: oneshot::Sender<Vec<Peer>>,
    },
    Dial(Multiaddr),
    LookFor(PeerId, Vec<Multiaddr>),
    /// How many connections to a peer are for everything, and for bulk.
    Connections {
        id: PeerId,
        reply: oneshot::Sender<(usize, usize)>,
    },
}

/// What the driver tells the adverts task.
#[derive(Debug)]
pub(super) enum Notice {
    /// An advert to be checked and reported back.
    Advert {
        bytes: Vec<u8>,
        id: MessageId,
        source: PeerId,
    },
    /// A peer of our swarm that serves the fetch protocol is connected.
    Identified { peer: Peer, fetch: bool },
    /// A peer of our swarm has no connection left.
    Disconnected { peer: Peer },
    /// A peer could not be connected to.
    Unreachable { peer: Peer },
    /// Somebody new listens to adverts.
    Subscribed,
    /// Our own addresses changed.
    Listening,
}

/// The task.
pub(super) struct Driver {
    pub(super) swarm: Swarm<Behaviour>,
    pub(super) swarm_id: SwarmId,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) outbox: mpsc::Sender<Notice>,
    pub(super) pending: VecDeque<Notice>,
    pub(super) bootstrap: Bootstrap,
    pub(super) queries: HashMap<kad::QueryId, (Vec<Peer>, oneshot::Sender<Vec<Peer>>)>,
    pub(super) facts: Arc<Facts>,
    pub(super) shutdown: watch::Receiver<bool>,
    pub(super) providers: Providers,
    pub(super) listener: Seldom,
    /// Gossip of ours may still be on its way.
    pub(super) published: bool,
    /// Connected strangers and when they are let go.
    pub(super) strangers: VecDeque<(Instant, PeerId)>,
}

impl Driver {
    /// Runs until told to stop, then lets the last messages out and closes the connections.
    pub(super) async fn run(mut self) {
        let outbox = self.outbox.clone();
        loop {
            let next = self.next_timer();
            let timer = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                changed = self.shutdown.changed() => {
                    if changed.is_err() || *self.shutdown.borrow() { break }
                }
                command = self.commands.recv() => match command {
                    Some(command) => self.on_command(command),
                    None => break,
                },
                place = outbox.reserve(), if !self.pending.is_empty() => match (place, self.pending.pop_front()) {
                    (Ok(place), Some(notice)) => place.send(notice),
                    (Err(_), _) => break,
                    _ => {}
                },
                () = timer => self.on_timer(),
                event = self.swarm.select_next_some(), if self.pending.len() < PENDING_MAX => self.on_event(event),
            }
        }
        self.wind_down().await;
    }

    async fn wind_down(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            self.on_command(command);
        }
        if self.published {
            let _ = tokio::time::timeout(LINGER, self.drive_only()).await;
        }
        let peers: Vec<PeerId> = self.swarm.connected_peers().copied().collect();
        for peer in peers {
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        let closed = async {
            while self.swarm.network_info().num_peers() > 0 {
                self.swarm.select_next_some().await;
            }
        };
        let _ = tokio::time::timeout(LINGER, closed).await;
    }

    async fn drive_only(&mut self) {
        loop {
            self.swarm.select_next_some().await;
        }
    }

    fn on_command(&mut self, command: Command) {
        let behaviour = self.swarm.behaviour_mut();
        match command {
            Command::Open(request) => behaviour.streams.open(request),
            Command::Publish { topics, bytes } => self.publish(&topics, &bytes),
            Command::Subscribe(topic) => {
                if let Err(error) = behaviour.gossip.subscribe(&IdentTopic::new(topic)) {
                    tracing::warn!(%error, "cannot subscribe to adverts");
                }
            }
            Command::Report {
                id,
                source,
                acceptance,
            } => {
                behaviour
                    .gossip
                    .report_message_validation_result(&id, &source, acceptance);
            }
            Command::Provide(key) => {
                if let Err(error) = behaviour.kad.start_providing(kad::RecordKey::new(&key)) {
                    tracing::debug!(%error, "not announced as a provider");
                }
            }
            Command::StopProviding(key) => behaviour.kad.stop_providing(&kad::RecordKey::new(&key)),
            Command::Providers { key, reply } => {
                self.queries.retain(|_, (_, reply)| !reply.is_closed());
                // Dropping the reply says: not now.
                if self.queries.len() < QUERIES_MAX {
                    let id = behaviour.kad.get_providers(kad::RecordKey::new(&key));
                    self.queries.insert(id, (Vec::new(), reply));
                }
            }
            Command::Dial(addr) => self.dial(addr),
            Command::LookFor(peer, addrs) => self.look_for(peer, addrs),
            Command::Connections { id, reply } => {
                let _ = reply.send(behaviour.streams.connections(&id));
            }
        }
    }

    fn publish(&mut self, topics: &[String], bytes: &[u8]) {
        for topic in topics {
            let gossip = &mut self.swarm.behaviour_mut().gossip;
            match gossip.publish(IdentTopic::new(topic), bytes) {
                Ok(_) => self.published = true,
                Err(gossipsub::PublishError::NoPeersSubscribedToTopic) => {}
                Err(error) => tracing::debug!(%error, topic, "advert not published"),
            }
        }
    }

    fn dial(&mut self, addr: Multiaddr) {
        if let Err(error) = self.swarm.dial(addr.clone()) {
            tracing::debug!(%addr, %error, "not dialled");
        }
    }

    fn next_timer(&self) -> Option<Instant> {
        let stranger = self.strangers.front().map(|(at, _)| *at);
        [self.bootstrap.next(), stranger]
            .into_iter()
            .flatten()
            .min()
    }

    fn on_timer(&mut self) {
        let now = Instant::now();
        while self.strangers.front().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, stranger)) = self.strangers.pop_front() {
                let _ = self.swarm.disconnect_peer_id(stranger);
            }
        }
        self.dial_bootstrap();
    }

    fn dial_bootstrap(&mut self) {
        let now = Instant::now();
        for addr in self.bootstrap.due(now) {
            let opts = DialOpts::from(addr.clone());
            let id = opts.connection_id();
            self.bootstrap.dialling(&addr, id);
            if let Err(error) = self.swarm.dial(opts) {
                self.bootstrap_failed(id, &error);
            }
        }
    }

    fn bootstrap_failed(&mut self, id: ConnectionId, error: &DialError) {
        if self.bootstrap.failed(id, Instant::now()) {
            tracing::info!(error = %explain_dial(error), "a peer given by --peer does not answer yet; trying on");
        }
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(event) => self.on_behaviour(event),
            SwarmEvent::NewListenAddr { address, .. } => self.listening(Some(address), None),
            SwarmEvent::ExpiredListenAddr { address, .. } => self.listening(None, Some(address)),
            SwarmEvent::ListenerClosed {
                addresses, reason, ..
            } => {
                tracing::warn!(?addresses, ?reason, "no longer listening");
                for address in addresses {
                    self.listening(None, Some(address));
                }
            }
            // Connections that are broken off while they are accepted show here too.
            SwarmEvent::ListenerError { error, .. } => {
                if self.listener.now(Instant::now()) {
                    tracing::warn!(%error, "listener");
                } else {
                    tracing::debug!(%error, "listener");
                }
            }
            SwarmEvent::ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint,
                ..
            } => {
                self.connected(peer_id, connection_id, &endpoint);
            }
            SwarmEvent::ConnectionClosed {
                peer_id,
                num_established: 0,
                cause,
                ..
            } => {
                tracing::debug!(peer = %peer_id, ?cause, "disconnected");
                if cause.is_some() {
                    self.look_for(peer_id, Vec::new());
                }
                self.bootstrap.disconnected(peer_id, Instant::now());
                if let Some(peer) = peer_of(&peer_id) {
                    self.facts.disconnected(&peer);
                    self.pending.push_back(Notice::Disconnected { peer });
                }
            }
            SwarmEvent::OutgoingConnectionError {
                connection_id,
                peer_id,
                error,
            } => {
                tracing::debug!(?peer_id, error = %explain_dial(&error), "dial failed");
                self.bootstrap_failed(connection_id, &error);
                self.unreachable(peer_id, &error);
            }
            SwarmEvent::IncomingConnectionError {
                error,
                send_back_addr,
                ..
            } => {
                tracing::debug!(%error, from = %send_back_addr, "inbound connection refused");
            }
            _ => {}
        }
    }

    /// A connection broke: whether its peer is gone or the connection was is found out at once, so that
    /// nobody else has to.
    fn look_for(&mut self, peer: PeerId, addrs: Vec<Multiaddr>) {
        let opts = DialOpts::peer_id(peer)
            .addresses(addrs)
            .extend_addresses_through_behaviour();
        if let Err(error) = self.swarm.dial(opts.build()) {
            tracing::debug!(%peer, error = %explain_dial(&error), "not dialled");
        }
    }

    fn unreachable(&mut self, peer: Option<PeerId>, error: &DialError) {
        let tried = matches!(
            error,
            DialError::Transport(_) | DialError::WrongPeerId { .. }
        );
        let peer = peer.filter(|peer| tried && !self.swarm.is_connected(peer));
        if let Some(peer) = peer.and_then(|peer| peer_of(&peer)) {
            self.pending.push_back(Notice::Unreachable { peer });
        }
    }

    fn connected(&mut self, id: PeerId, connection: ConnectionId, endpoint: &ConnectedPoint) {
        tracing::debug!(peer = %id, addr = %endpoint.get_remote_address(), "connected");
        self.bootstrap.connected(id, connection);
    }

    fn listening(&mut self, new: Option<Multiaddr>, gone: Option<Multiaddr>) {
        self.facts.listening(new, gone);
        self.pending.push_back(Notice::Listening);
    }

    fn on_behaviour(&mut self, event: BehaviourEvent) {
        match event {
            BehaviourEvent::Identify(identify::Event::Received { peer_id, info, .. }) => {
                self.identified(peer_id, info);
            }
            BehaviourEvent::Ping(ping::Event {
                peer,
                result: Ok(rtt),
                ..
            }) => {
                if let Some(peer) = peer_of(&peer) {
                    self.facts.rtt(peer, rtt);
                }
            }
            BehaviourEvent::Ping(ping::Event {
                peer,
                connection,
                result: Err(error),
            }) => {
                tracing::debug!(%peer, %error, "ping failed: closing");
                self.swarm.close_connection(connection);
            }
            BehaviourEvent::Gossip(gossipsub::Event::Message {
                propagation_source,
                message_id,
                message,
            }) => {
                self.pending.push_back(Notice::Advert {
                    bytes: message.data,
                    id: message_id,
                    source: propagation_source,
                });
            }
            BehaviourEvent::Gossip(gossipsub::Event::Subscribed { .. }) => {
                self.pending.push_back(Notice::Subscribed);
            }
            BehaviourEvent::Kad(event) => self.on_kad(event),
            BehaviourEvent::Mdns(mdns::Event::Discovered(found)) => self.discovered(found),
            _ => {}
        }
    }

    /// A stranger is let go, and told to the user who gave us its address; one of us is remembered.
    fn identified(&mut self, id: PeerId, info: identify::Info) {
        let Some(peer) = peer_of(&id) else {
            // No stream is opened to such a peer, and its adverts name nobody.
            return;
        };
        let stranger = OpenError::stranger(peer, &info.protocol_version, &self.swarm_id);
        self.swarm
            .behaviour_mut()
            .streams
            .identified(id, stranger.clone(), &info.protocols);
        if let Some(why) = stranger {
            self.estranged(id, why);
            return;
        }
        for addr in info.listen_addrs.into_iter().take(8) {
            self.swarm.behaviour_mut().kad.add_address(&id, addr);
        }
        self.facts.connected(peer);
        let fetch = Proto::Fetch.name(&self.swarm_id);
        let fetch = info.protocols.iter().any(|p| p.as_ref() == fetch);
        self.pending.push_back(Notice::Identified { peer, fetch });
    }

    fn estranged(&mut self, id: PeerId, why: OpenError) {
        let now = Instant::now();
        if self.bootstrap.useless(id, now) {
            tracing::warn!("given by --peer: {why}; disconnecting");
        } else {
            tracing::debug!("{why}; disconnecting");
        }
        self.facts.stranger(why);
        self.strangers.push_back((now + STRANGER_GRACE, id));
    }

    fn discovered(&mut self, found: Vec<(PeerId, Multiaddr)>) {
        for (peer, addr) in found {
            let room = self.swarm.network_info().num_peers() < DISCOVERED_MAX;
            if room && !self.swarm.is_connected(&peer) {
                let opts = DialOpts::peer_id(peer).addresses(vec![addr]).build();
                if let Err(error) = self.swarm.dial(opts) {
                    tracing::debug!(%peer, %error, "found on this network, not dialled");
                }
            }
        }
    }

    fn on_kad(&mut self, event: kad::Event) {
        match event {
            kad::Event::InboundRequest {
                request:
                    kad::InboundRequest::AddProvider {
                        record: Some(record),
                    },
            } => self.keep_provider(record),
            kad::Event::OutboundQueryProgressed {
                id,
                result: kad::QueryResult::GetProviders(result),
                step,
                ..
            } => {
                if let Some((found, _)) = self.queries.get_mut(&id)
                    && let Ok(kad::GetProvidersOk::FoundProviders { providers, .. }) = result
                {
                    found.extend(providers.iter().filter_map(peer_of).take(64));
                }
                if step.last
                    && let Some((found, reply)) = self.queries.remove(&id)
                {
                    let _ = reply.send(found);
                }
            }
            _ => {}
        }
    }

    /// Keys are model ids (32 bytes) and the records are bounded; Kademlia itself has checked that the
    /// provider is the sender.
    fn keep_provider(&mut self, record: kad::ProviderRecord) {
        use kad::store::RecordStore;
        let now = Instant::now();
        let store = self.swarm.behaviour_mut().kad.store_mut();
        for (provider, key) in self.providers.sweep(now) {
            store.remove_provider(&key, &provider);
        }
        let fits = record.key.as_ref().len() == 32 && record.addresses.len() <= 16;
        if fits && self.providers.keep(record.provider, &record.key, now) {
            let _ = store.add_provider(record);
        } else {
            tracing::debug!(provider = %record.provider, "provider record refused");
        }
    }
}
