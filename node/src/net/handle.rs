//! The handle to the network: starting it, opening and accepting streams, shutting it down.

use std::{
    io,
    net::IpAddr,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use libp2p::{Multiaddr, StreamProtocol, Swarm, multiaddr::Protocol, swarm};
use swarm_proto::{
    Advert, Measured, Peer, SwarmId,
    advert::{ADVERT_ADDRS_MAX, ADVERT_RTTS_MAX},
    session::ADDR_BYTES_MAX,
};
use tokio::{
    sync::{Mutex, mpsc, oneshot, watch},
    task::JoinHandle,
};

use super::{
    admission::Acceptors,
    adverts::{self, Adverts, Announcement, Publisher, Request},
    behaviour::{Behaviour, BehaviourError, Parts},
    bootstrap::Bootstrap,
    driver::{Command, Driver, OUTBOX_MAX},
    facts::Facts,
    gate::Access,
    stream::{Activity, OpenError, Proto, Stream},
    streams::OpenRequest,
    transport::{self, TransportError},
    uplink::Uplink,
};
use crate::{
    identity::{Identity, peer_id},
    seldom::Seldom,
};

/// Commands that may wait for the driver: it takes thousands a second, so a full queue means that
/// it is stuck, and callers then wait up to their own deadline.
const COMMANDS_MAX: usize = 256;
/// New streams that may wait for whoever accepts them, per protocol; more are refused.
const ACCEPT_MAX: usize = 64;
/// How long the system may take to give us our addresses.
const LISTEN_DEADLINE: Duration = Duration::from_secs(5);
/// A connection on which nothing happens is kept this long: the next session then needs no dial.
const IDLE_CONNECTION: Duration = Duration::from_secs(600);
/// How long signing and queueing the last advert may take.
const LEAVE_DEADLINE: Duration = Duration::from_secs(1);
/// A session that nothing was written to for so long does not run.
const RUNNING: Duration = Duration::from_secs(1);
/// What a stream of ours to ourselves buffers: about one frame of a prompt.
const TO_SELF_BYTES: usize = 256 * 1024;
/// Addresses of one peer that are tried.
const ADDRS_PER_PEER: usize = 8;

/// What a network is started with.
#[derive(Debug, Clone)]
pub struct NetConfig {
    /// Who we are.
    pub identity: Identity,
    /// Which swarm: peers of another one are told so and left alone.
    pub swarm: SwarmId,
    /// The key of a private swarm; TCP only then.
    pub key: Option<[u8; 32]>,
    /// Whom we talk to.
    pub access: Access,
    /// Where to listen, as multiaddresses; none for a client.
    pub listen: Vec<String>,
    /// Where others reach us, told them instead of where we listen; none: there.
    pub announce: Vec<String>,
    /// Peers to stay connected to, as multiaddresses with or without `/p2p/…`.
    pub bootstrap: Vec<String>,
    /// Whether to look for peers on the local network.
    pub mdns: bool,
    /// What we call ourselves, for people: `shoal-node/0.1.0`.
    pub agent: String,
}

impl NetConfig {
    /// A client of `swarm`: listens nowhere, knows nobody yet.
    pub fn client(identity: Identity, swarm: SwarmId) -> Self {
        Self {
            identity,
            swarm,
            key: None,
            access: Access::Open,
            listen: Vec::new(),
            announce: Vec::new(),
            bootstrap: Vec::new(),
            mdns: false,
            agent: concat!("shoal/", env!("CARGO_PKG_VERSION")).into(),
        }
    }
}

/// Why the network did not start.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Not a multiaddress.
    #[error("address {addr:?}: {reason}; expected for example /ip4/192.168.1.5/tcp/4001")]
    Address {
        /// What was given.
        addr: String,
        /// Why it is none.
        reason: String,
    },
    /// An address could not be bound.
    #[error("cannot listen on {addr}: {reason}")]
    Listen {
        /// Where.
        addr: String,
        /// Why, and what to do.
        reason: String,
    },
    /// With a pre-shared key only TCP is covered.
    #[error(
        "{addr} is a QUIC address, and a pre-shared key protects TCP only: leave it out, or use --allow instead of a key"
    )]
    QuicWithKey {
        /// The address.
        addr: String,
    },
    /// The system did not report an address in time.
    #[error("no listening address after {LISTEN_DEADLINE:?}")]
    NoAddress,
    /// The protocols could not be set up.
    #[error(transparent)]
    Behaviour(#[from] BehaviourError),
    /// The transports could not be set up.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

/// A running network; clones share it. It stops with [`Net::shutdown`] or when the last clone goes.
#[derive(Clone)]
pub struct Net {
    inner: Arc<Inner>,
}

/// What clones of the handle share.
pub(super) struct Inner {
    identity: Identity,
    swarm: SwarmId,
    access: Access,
    agent: String,
    announce: Vec<Multiaddr>,
    publisher: Publisher,
    facts: Arc<Facts>,
    acceptors: Arc<Acceptors>,
    commands: mpsc::Sender<Command>,
    shutdown: watch::Sender<bool>,
    driver: Mutex<Option<JoinHandle<()>>>,
    /// Files that peers ask for cannot be read.
    unreadable: Seldom,
    uplink: std::sync::Mutex<Uplink>,
    activity: Arc<Activity>,
}

impl Net {
    /// Starts the driver and waits until every listening address is bound.
    ///
    /// # Errors
    /// When an address is none, is in use, or the system gives no address in time.
    pub async fn start(config: NetConfig) -> Result<Self, NetError> {
        let [listen, announce, bootstrap] = addresses(&config)?;
        let acceptors = Arc::new(Acceptors::default());
        let keypair = config.identity.keypair();
        let behaviour = Behaviour::new(Parts {
            keypair,
            swarm: &config.swarm,
            access: config.access.clone(),
            acceptors: acceptors.clone(),
            agent: config.agent.clone(),
            mdns: config.mdns,
            server: !listen.is_empty(),
            announced: !announce.is_empty(),
        })?;
        let transport = transport::build(keypair, config.key)?;
        let settings =
            swarm::Config::with_tokio_executor().with_idle_connection_timeout(IDLE_CONNECTION);
        let me = keypair.public().to_peer_id();
        let mut swarm = Swarm::new(transport, behaviour, me, settings);
        for addr in &listen {
            bind(&mut swarm, addr)?;
        }
        for addr in &announce {
            swarm.add_external_address(addr.clone());
        }
        let facts = Arc::new(Facts::new());
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let (outbox, notices) = mpsc::channel(OUTBOX_MAX);
        let (shutdown, stop) = watch::channel(false);
        let driver = Driver {
            swarm,
            swarm_id: config.swarm.clone(),
            commands: inbox,
            outbox,
            pending: Default::default(),
            bootstrap: Bootstrap::new(bootstrap, Instant::now()),
            queries: Default::default(),
            facts: facts.clone(),
            shutdown: stop,
            providers: Default::default(),
            listener: Default::default(),
            published: false,
            strangers: Default::default(),
        };
        let driver = tokio::spawn(driver.run());
        let inner = Arc::new_cyclic(|weak| Inner {
            publisher: adverts::start(
                weak.clone(),
                config.swarm.clone(),
                commands.downgrade(),
                notices,
            ),
            identity: config.identity,
            swarm: config.swarm,
            access: config.access,
            agent: config.agent,
            announce,
            facts,
            acceptors,
            commands,
            shutdown,
            driver: Mutex::new(Some(driver)),
            unreadable: Seldom::default(),
            uplink: Default::default(),
            activity: Arc::new(Activity::new()),
        });
        let net = Self { inner };
        net.wait_listening(listen.len()).await?;
        Ok(net)
    }

    async fn wait_listening(&self, wanted: usize) -> Result<(), NetError> {
        let mut addrs = self.inner.facts.addrs();
        let bound = addrs.wait_for(|addrs| addrs.len() >= wanted);
        match tokio::time::timeout(LISTEN_DEADLINE, bound).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(NetError::NoAddress),
        }
    }

    /// Our own id.
    pub fn me(&self) -> Peer {
        self.inner.identity.peer()
    }

    /// Our swarm.
    pub fn swarm(&self) -> &SwarmId {
        &self.inner.swarm
    }

    /// Our key, for signing.
    pub fn identity(&self) -> &Identity {
        &self.inner.identity
    }

    /// Where others reach us now, each with `/p2p/<our id>`: what was announced, else where we listen, other
    /// machines' views first, loopback last.
    pub fn listen_addrs(&self) -> Vec<String> {
        let addrs = self.inner.ranked_addrs().into_iter();
        addrs
            .map(|addr| format!("{addr}/p2p/{}", self.me()))
            .collect()
    }

    /// Peers of our swarm that we are connected to now; changes as they come and go.
    pub fn peers(&self) -> watch::Receiver<Vec<Peer>> {
        self.inner.facts.peers()
    }

    /// Why peers that answered are of no use to us: another swarm, another version. The first few.
    pub fn strangers(&self) -> Vec<OpenError> {
        self.inner.facts.strangers()
    }

    /// The least round trip measured to each connected peer, nearest first.
    pub fn rtts(&self) -> Vec<(Peer, Duration)> {
        self.inner.facts.rtts()
    }

    /// Opens a stream, dialling first where there is no connection: `addrs` and whatever else is
    /// known of the peer are tried.
    ///
    /// # Errors
    /// See [`OpenError`]; never waits longer than `deadline`.
    ///
    /// # Cancel safety
    /// Dropping the future gives the stream up.
    pub async fn open(
        &self,
        peer: Peer,
        addrs: &[String],
        proto: Proto,
        deadline: Duration,
    ) -> Result<Stream, OpenError> {
        let name = proto.name(&self.inner.swarm);
        if peer == self.me() {
            return self.open_to_self(&name);
        }
        if !self.inner.access.may_dial(&peer) {
            return Err(OpenError::NotAllowed { peer });
        }
        let id = peer_id(&peer).ok_or(OpenError::BadPeer { peer })?;
        let name = StreamProtocol::try_from_owned(name).map_err(|_| OpenError::ShuttingDown)?;
        // Addresses that are none, or name another peer, are useless and not an error of ours.
        let known = self.adverts().addrs(&peer);
        let addrs = addrs.iter().chain(&known);
        let addrs = addrs.filter_map(|addr| addr.parse::<Multiaddr>().ok());
        let addrs = addrs.take(ADDRS_PER_PEER).collect();
        let (reply, answer) = oneshot::channel();
        // On a connection that stands, opening is one word and its answer.
        let bulk = proto.is_bulk();
        let begun = (!bulk && self.inner.facts.is_connected(&peer)).then(Instant::now);
        let request = OpenRequest {
            peer,
            id,
            addrs,
            name,
            bulk,
            reply,
        };
        let opened = async {
            let sent = self.inner.commands.send(Command::Open(request)).await;
            sent.map_err(|_| OpenError::ShuttingDown)?;
            let lost = || OpenError::Lost {
                peer,
                reason: "the connection closed".into(),
            };
            answer.await.unwrap_or_else(|_| Err(lost()))
        };
        let timed = tokio::time::timeout(deadline, opened).await;
        let opened = timed.unwrap_or(Err(OpenError::Timeout { peer, deadline }))?;
        if let Some(begun) = begun {
            self.inner.facts.rtt(peer, begun.elapsed());
        }
        Ok(opened.watched(self.activity_of(proto)))
    }

    /// A stream to whoever takes this protocol's here: a client that shares a node's network uses the node's own
    /// layers like anybody's, and nobody can dial itself.
    fn open_to_self(&self, name: &str) -> Result<Stream, OpenError> {
        let peer = self.me();
        let reserved = self.inner.acceptors.reserve(name);
        let (place, _, activity) = reserved.ok_or(OpenError::Refused { peer })?;
        let (near, far) = tokio::io::duplex(TO_SELF_BYTES);
        place.send((peer, Stream::new(far).watched(activity.clone())));
        Ok(Stream::new(near).watched(activity))
    }

    fn activity_of(&self, proto: Proto) -> Option<Arc<Activity>> {
        proto.is_session().then(|| self.inner.activity.clone())
    }

    /// Whether rows or logits passed through this node within the last second.
    pub(crate) fn sessions_run(&self) -> bool {
        self.inner.activity.within(RUNNING)
    }

    /// How many connections to a peer are for everything, and how many for bulk streams only.
    pub async fn connections_to(&self, peer: &Peer) -> (usize, usize) {
        let Some(id) = peer_id(peer) else {
            return (0, 0);
        };
        let (reply, answer) = oneshot::channel();
        let asked = Command::Connections { id, reply };
        let _ = self.inner.commands.send(asked).await;
        answer.await.unwrap_or_default()
    }

    /// Takes the streams that peers open for `proto`, until the receiver is dropped; `None` where
    /// somebody takes them already. The queue is bounded: while it is full, openers are refused.
    pub fn accept(&self, proto: Proto) -> Option<mpsc::Receiver<(Peer, Stream)>> {
        let activity = self.activity_of(proto);
        let name = proto.name(&self.inner.swarm);
        self.inner
            .acceptors
            .register(name, proto.is_bulk(), activity, ACCEPT_MAX)
    }

    /// Connects to an address, once, in the background; failures are logged.
    pub async fn dial(&self, addr: &str) -> Result<(), NetError> {
        let addr = parse(addr)?;
        let _ = self.inner.commands.send(Command::Dial(addr)).await;
        Ok(())
    }

    /// Connects to a peer, in the background, if it is not connected: whether it is reachable then shows in
    /// [`Adverts::unreachable`]. Where the driver has much to do, it is left out.
    pub fn look_for(&self, peer: Peer) {
        if peer == self.me() {
            return;
        }
        let addrs = self.adverts().addrs(&peer);
        let addrs = addrs.iter().filter_map(|addr| addr.parse().ok());
        let addrs = addrs.take(ADDRS_PER_PEER).collect();
        if let Some(id) = peer_id(&peer) {
            let _ = self.inner.commands.try_send(Command::LookFor(id, addrs));
        }
    }

    /// Peers that Kademlia says hold `key` (a model's id); empty where nobody answers in time.
    pub async fn providers(&self, key: [u8; 32], deadline: Duration) -> Vec<Peer> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Providers {
            key: key.to_vec(),
            reply,
        };
        let asked = async {
            self.inner.commands.send(command).await.ok()?;
            answer.await.ok()
        };
        tokio::time::timeout(deadline, asked)
            .await
            .ok()
            .flatten()
            .unwrap_or_default()
    }

    /// The adverts known: to plan with, and to watch.
    pub fn adverts(&self) -> &Adverts {
        &self.inner.publisher.adverts
    }

    /// Says what we serve, now if it changed and every ten seconds from then on, signed.
    pub async fn publish(&self, announcement: Announcement) {
        let request = Request::Publish(announcement);
        let _ = self.inner.publisher.requests.send(request).await;
    }

    /// Waits until a peer has handed over the adverts it knows, so that planning need not wait for
    /// gossip; false where none did in time. Peers are asked as they connect.
    pub async fn synced(&self, deadline: Duration) -> bool {
        let mut synced = self.inner.publisher.synced.clone();
        let done = synced.wait_for(|done| *done > 0);
        matches!(tokio::time::timeout(deadline, done).await, Ok(Ok(_)))
    }

    /// Bytes a second that we upload, measured on replies to fetches and on shards; none before the first large one.
    pub fn uplink(&self) -> Option<Measured> {
        self.with_uplink(|uplink| uplink.best(Instant::now()))
    }

    pub(crate) fn with_uplink<T>(&self, look: impl FnOnce(&mut Uplink) -> T) -> T {
        let uplink = self.inner.uplink.lock();
        look(&mut uplink.unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn unreadable(&self) -> &Seldom {
        &self.inner.unreadable
    }

    pub(super) fn from_inner(inner: Arc<Inner>) -> Self {
        Self { inner }
    }

    /// Withdraws our advert: peers take us out of their tables at once. Bounded.
    pub async fn withdraw(&self) {
        let (done, left) = oneshot::channel();
        let withdrawn = async {
            if self
                .inner
                .publisher
                .requests
                .send(Request::Leave(done))
                .await
                .is_ok()
            {
                let _ = left.await;
            }
        };
        let _ = tokio::time::timeout(LEAVE_DEADLINE, withdrawn).await;
    }

    /// Refuses new streams, withdraws our advert, closes all connections. What was written to a stream
    /// arrives for certain only if the other side closed it before. Bounded: about a second at most.
    pub async fn shutdown(&self) {
        self.inner.acceptors.close();
        self.withdraw().await;
        self.inner.shutdown.send_replace(true);
        if let Some(driver) = self.inner.driver.lock().await.take() {
            let _ = driver.await;
        }
    }
}

impl Inner {
    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    fn ranked_addrs(&self) -> Vec<Multiaddr> {
        if !self.announce.is_empty() {
            return self.announce.clone();
        }
        let mut addrs = self.facts.addrs().borrow().clone();
        addrs.sort_by_key(address_rank);
        addrs
    }

    /// Our advert at this moment.
    pub(super) fn advert(
        &self,
        own: Announcement,
        seq: u64,
        ttl: Duration,
        leaving: bool,
    ) -> Advert {
        let micros = |rtt: Duration| u32::try_from(rtt.as_micros()).unwrap_or(u32::MAX);
        let addrs = self.ranked_addrs().into_iter().map(|addr| addr.to_string());
        let rtts = self.facts.rtts().into_iter().take(ADVERT_RTTS_MAX);
        Advert {
            peer: self.identity.peer(),
            seq,
            ttl_ms: u32::try_from(ttl.as_millis()).unwrap_or(u32::MAX),
            addrs: addrs
                .filter(|a| a.len() <= ADDR_BYTES_MAX)
                .take(ADVERT_ADDRS_MAX)
                .collect(),
            models: own.models,
            uplink_bytes_s: own.uplink_bytes_s,
            queue: own.queue,
            rtts: rtts.map(|(peer, rtt)| (peer, micros(rtt))).collect(),
            leaving,
            agent: self.agent.clone(),
        }
    }
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net")
            .field("me", &self.me())
            .field("swarm", &self.inner.swarm)
            .finish()
    }
}

fn bind(swarm: &mut Swarm<Behaviour>, addr: &Multiaddr) -> Result<(), NetError> {
    port_is_free(addr)?;
    let bound = swarm.listen_on(addr.clone());
    bound.map(drop).map_err(|error| {
        let reason = match &error {
            libp2p::TransportError::Other(io) => explain_deep(io),
            libp2p::TransportError::MultiaddrNotSupported(_) => "no such transport here".into(),
        };
        NetError::Listen {
            addr: addr.to_string(),
            reason,
        }
    })
}

/// libp2p binds TCP with SO_REUSEPORT: a second process on the port would not fail but take half of
/// the connections. Without that option the system tells.
fn port_is_free(addr: &Multiaddr) -> Result<(), NetError> {
    let mut parts = addr.iter();
    let ip = match parts.next() {
        Some(Protocol::Ip4(ip)) => IpAddr::from(ip),
        Some(Protocol::Ip6(ip)) => IpAddr::from(ip),
        _ => return Ok(()),
    };
    let Some(Protocol::Tcp(port @ 1..)) = parts.next() else {
        return Ok(());
    };
    match std::net::TcpListener::bind((ip, port)) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(NetError::Listen {
            addr: addr.to_string(),
            reason: transport::explain(&error),
        }),
        // Whatever else is wrong, listening says.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// The transports wrap the system's error several times over; its kind is what helps.
fn explain_deep(error: &io::Error) -> String {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<io::Error>());
    inner.map_or_else(|| transport::explain(error), explain_deep)
}

fn parse(addr: &str) -> Result<Multiaddr, NetError> {
    addr.parse()
        .map_err(|error: libp2p::multiaddr::Error| NetError::Address {
            addr: addr.into(),
            reason: error.to_string(),
        })
}

/// Where to listen, what to announce, whom to stay connected to.
fn addresses(config: &NetConfig) -> Result<[Vec<Multiaddr>; 3], NetError> {
    let listen = parse_all(&config.listen)?;
    let announce = parse_all(&config.announce)?;
    announce.iter().try_for_each(check_dialable)?;
    let bootstrap = parse_all(&config.bootstrap)?;
    if config.key.is_some() {
        no_quic(listen.iter().chain(&announce).chain(&bootstrap))?;
    }
    Ok([listen, announce, bootstrap])
}

fn parse_all(addrs: &[String]) -> Result<Vec<Multiaddr>, NetError> {
    addrs.iter().map(|addr| parse(addr)).collect()
}

/// An address for others names a host and a port, and leaves our id to us.
fn check_dialable(addr: &Multiaddr) -> Result<(), NetError> {
    let reason = addr.iter().find_map(|part| match part {
        Protocol::Ip4(ip) if ip.is_unspecified() => Some("nobody can dial 0.0.0.0"),
        Protocol::Ip6(ip) if ip.is_unspecified() => Some("nobody can dial ::"),
        Protocol::Tcp(0) | Protocol::Udp(0) => Some("nobody can dial port 0"),
        Protocol::P2p(_) => Some("leave /p2p/... out, it is added"),
        _ => None,
    });
    reason.map_or(Ok(()), |reason| {
        Err(NetError::Address {
            addr: addr.to_string(),
            reason: reason.into(),
        })
    })
}

fn no_quic<'a>(mut addrs: impl Iterator<Item = &'a Multiaddr>) -> Result<(), NetError> {
    let quic = |addr: &&Multiaddr| {
        addr.iter()
            .any(|p| matches!(p, Protocol::QuicV1 | Protocol::Quic))
    };
    addrs.find(quic).map_or(Ok(()), |addr| {
        Err(NetError::QuicWithKey {
            addr: addr.to_string(),
        })
    })
}

/// Reachable by most first; TCP before QUIC, whose echo takes half as long again on a LAN.
fn address_rank(addr: &Multiaddr) -> (bool, bool, bool) {
    let first = addr.iter().next();
    let loopback = match &first {
        Some(Protocol::Ip4(ip)) => ip.is_loopback(),
        Some(Protocol::Ip6(ip)) => ip.is_loopback(),
        _ => false,
    };
    let quic = addr.iter().any(|p| matches!(p, Protocol::QuicV1));
    (loopback, quic, matches!(first, Some(Protocol::Ip6(_))))
}
