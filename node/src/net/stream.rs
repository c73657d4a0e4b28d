//! One of our streams to a peer, and why opening one failed. Bytes only: frames belong to swarm-proto.

use std::{
    fmt, io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use swarm_proto::{PROTOCOL_VERSION, Peer, SwarmId};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::OwnedSemaphorePermit,
};

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A bidirectional byte stream to one peer: yamux or QUIC underneath, or anything in tests.
///
/// A write goes to the connection's task and wakes it: write a frame in one call. Dropping the
/// stream resets it; `shutdown` closes our half and leaves the other open.
pub struct Stream {
    io: Box<dyn Io>,
    /// Counts against the limit of streams a connection may hold open; given back on drop.
    _slot: Option<OwnedSemaphorePermit>,
    /// Told of each write.
    activity: Option<Arc<Activity>>,
}

/// When something was last written to a session.
#[derive(Debug)]
pub(super) struct Activity {
    start: Instant,
    /// Since the start, plus one; 0 before the first.
    last_ms: AtomicU64,
}

impl Activity {
    pub(super) fn new() -> Self {
        Self {
            start: Instant::now(),
            last_ms: AtomicU64::new(0),
        }
    }

    fn note(&self) {
        self.last_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    pub(super) fn within(&self, time: Duration) -> bool {
        let last = self.last_ms.load(Ordering::Relaxed);
        let since = self.now_ms().saturating_sub(last);
        last > 0 && u128::from(since) <= time.as_millis()
    }

    fn now_ms(&self) -> u64 {
        let since = self.start.elapsed().as_millis();
        u64::try_from(since).unwrap_or(u64::MAX).saturating_add(1)
    }
}

impl Stream {
    /// Wraps any byte stream, for example one end of `tokio::io::duplex` in a test.
    pub fn new(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        Self {
            io: Box::new(io),
            _slot: None,
            activity: None,
        }
    }

    /// The same, and `activity` is told of each write.
    pub(super) fn watched(mut self, activity: Option<Arc<Activity>>) -> Self {
        self.activity = activity;
        self
    }

    pub(super) fn with_slot(
        io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        slot: OwnedSemaphorePermit,
    ) -> Self {
        Self {
            io: Box::new(io),
            _slot: Some(slot),
            activity: None,
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stream")
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if let Some(activity) = &self.activity {
            activity.note();
        }
        Pin::new(&mut *self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.io).poll_shutdown(cx)
    }
}

/// Which of our stream protocols.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Proto {
    /// Client to stage 1, and stage to stage.
    Session,
    /// Client to the tail.
    Answer,
    /// Adverts, manifests and metadata by hash.
    Fetch,
    /// Parts of shards, on a connection of their own.
    Transfer,
    /// Trunk to holder of experts.
    Experts,
}

impl Proto {
    /// All of them.
    pub const ALL: [Proto; 5] = [
        Proto::Session,
        Proto::Answer,
        Proto::Fetch,
        Proto::Transfer,
        Proto::Experts,
    ];

    /// The name negotiated on the wire; it carries the swarm id, so that swarms do not mix.
    pub fn name(self, swarm: &SwarmId) -> String {
        match self {
            Proto::Session => swarm.session_protocol(),
            Proto::Answer => swarm.answer_protocol(),
            Proto::Fetch => swarm.fetch_protocol(),
            Proto::Transfer => swarm.transfer_protocol(),
            Proto::Experts => swarm.experts_protocol(),
        }
    }

    /// Whether rows or logits pass on its streams.
    pub(super) fn is_session(self) -> bool {
        matches!(self, Proto::Session | Proto::Answer | Proto::Experts)
    }

    /// Whether its streams get a connection of their own, so that nothing small waits behind them.
    pub(super) fn is_bulk(self) -> bool {
        self == Proto::Transfer
    }
}

/// Why a stream could not be opened.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpenError {
    /// Not connected, and nothing says where the peer is.
    #[error("no address is known for peer {peer}; give one with --peer, or wait for its advert")]
    NoAddress {
        /// Whom we wanted.
        peer: Peer,
    },
    /// Every address failed.
    #[error("peer {peer} is unreachable: {reason}")]
    Unreachable {
        /// Whom we wanted.
        peer: Peer,
        /// What the transports said.
        reason: String,
    },
    /// The peer belongs to another swarm.
    #[error("peer {peer} speaks swarm {theirs}, we are {ours}")]
    OtherSwarm {
        /// Whom we wanted.
        peer: Peer,
        /// The swarm it named.
        theirs: String,
        /// Our swarm.
        ours: SwarmId,
    },
    /// Same swarm, another version of its protocols.
    #[error(
        "peer {peer} speaks another version of Shoal (theirs {theirs}, ours {ours}): update the older one"
    )]
    OtherVersion {
        /// Whom we wanted.
        peer: Peer,
        /// The version it named.
        theirs: u32,
        /// Our version.
        ours: u32,
    },
    /// Same swarm, same version, and does not speak this: a client, which serves nothing.
    #[error("peer {peer} does not serve {wanted}, it offers {offers}: it is a client, or leaving")]
    Unsupported {
        /// Whom we wanted.
        peer: Peer,
        /// The protocol asked for.
        wanted: String,
        /// What the peer said it offers.
        offers: String,
    },
    /// The deadline passed.
    #[error("peer {peer} did not open a stream within {deadline:?}")]
    Timeout {
        /// Whom we wanted.
        peer: Peer,
        /// How long we waited.
        deadline: Duration,
    },
    /// Our own list forbids it.
    #[error("peer {peer} is not on the list of allowed peers")]
    NotAllowed {
        /// Whom we wanted.
        peer: Peer,
    },
    /// The peer is there and says no: its queue of new streams is full.
    #[error("peer {peer} refused the stream: it has too many open")]
    Refused {
        /// Whom we wanted.
        peer: Peer,
    },
    /// We already have too many openings under way.
    #[error("too many streams to peer {peer} are being opened (limit {limit})")]
    Busy {
        /// Whom we wanted.
        peer: Peer,
        /// How many may wait.
        limit: usize,
    },
    /// The connection went away meanwhile.
    #[error("the connection to peer {peer} was lost while opening a stream: {reason}")]
    Lost {
        /// Whom we wanted.
        peer: Peer,
        /// What happened.
        reason: String,
    },
    /// The bytes of the peer id are not a key.
    #[error("{peer} is not a valid peer id")]
    BadPeer {
        /// Whom we wanted.
        peer: Peer,
    },
    /// We are going down.
    #[error("this node is shutting down")]
    ShuttingDown,
}

impl OpenError {
    /// Why a peer that identifies itself as `version` is no use to a member of `ours`; none where it
    /// is one of us.
    pub(super) fn stranger(peer: Peer, version: &str, ours: &SwarmId) -> Option<Self> {
        match SwarmId::of_identify(version) {
            Some((swarm, PROTOCOL_VERSION)) if swarm == *ours => None,
            Some((swarm, theirs)) if swarm == *ours => Some(Self::OtherVersion {
                peer,
                theirs,
                ours: PROTOCOL_VERSION,
            }),
            named => Some(Self::OtherSwarm {
                peer,
                theirs: named.map_or_else(|| "none".into(), |(swarm, _)| swarm.to_string()),
                ours: ours.clone(),
            }),
        }
    }
}
