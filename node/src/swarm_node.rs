//! A serving node: network, model, stage worker and sessions put together.
//!
//! ```text
//! identity, store ─▶ network ─▶ listen to adverts ─▶ choose layers, say so ─▶ load, measure
//!                                                     └─▶ serve sessions, advertise what is live
//! ```

use std::{
    collections::HashSet,
    fs::{File, TryLockError},
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use engine::EngineError;
use futures::future::try_join_all;
use shard_registry::{Store, StoreError, UnknownModel};
use swarm_proto::{ModelId, Peer, ShardId};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{
    config::Settings,
    control::Control,
    cpu_share::CpuShare,
    experts::ExpertService,
    hosting::{self, Board, Hold, Hosted, Model, Place},
    identity::{Identity, IdentityError},
    keys::Keys,
    known_peers::KnownPeers,
    load::{self, Found, LoadError},
    metrics::{self, Metrics, MetricsAddr, MetricsServer},
    net::{Net, NetConfig, NetError, Proto, Shelf},
    peer_book::PeerBook,
    quiet_hours::QuietHours,
    session::{SessionLimits, Sessions},
    transfer::{self, Transfer, TransferError},
};

/// How often figures in the advert are refreshed.
const REFRESH: Duration = Duration::from_secs(10);
/// How often the stage worker is looked after: sessions fail on a dead one, and others still plan with it.
const WATCH: Duration = Duration::from_secs(1);
/// How long sessions may go on after the node was told to stop; with their own goodbye and the
/// network's it stays below five seconds.
const DRAIN: Duration = Duration::from_secs(2);

/// What a node serves and with what.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// Swarm, home, trust.
    pub settings: Settings,
    /// Aliases, ids, files or `demo`: one model or several.
    pub models: Vec<String>,
    /// Which layers of each; none: as many as fit, where they are needed most.
    pub layers: Option<Range<u32>>,
    /// Memory for layers and KV of all models, in bytes; none: half of what is free.
    pub memory: Option<u64>,
    /// What of a mixture of experts it holds.
    pub hold: Hold,
    /// The longest round trip to peers that compute experts for it, or for whose trunks it does.
    pub island_rtt: Duration,
    /// How often nodes look whether layers should move; the same in the whole swarm.
    pub turn: Duration,
    /// Where to listen.
    pub listen: Vec<String>,
    /// Where others reach us, if not there.
    pub announce: Vec<String>,
    /// Compute threads; none: as [`crate::load::default_threads`] says.
    pub threads: Option<u32>,
    /// What others may have of our uplink, and fetched shards of our disk.
    pub transfer: transfer::Limits,
    /// How much of the time the compute threads may work.
    pub cpu_share: CpuShare,
    /// Hours of the day in which it is paused.
    pub quiet_hours: QuietHours,
    /// Where what it counts is served; none: nowhere.
    pub metrics: Option<ServeMetrics>,
}

/// Where a node's metrics are served, and to whom.
#[derive(Debug, Clone)]
pub struct ServeMetrics {
    /// Where.
    pub at: MetricsAddr,
    /// Keys of which every request must have one, if there are any.
    pub keys: Keys,
    /// Serve others than this machine without asking for a key.
    pub without_key: bool,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Two nodes with one identity would answer for each other.
    #[error("another node runs with the home directory {path}; give this one its own: --home DIR")]
    HomeInUse {
        /// The directory.
        path: PathBuf,
    },
    /// The home directory.
    #[error("{path}: {source}")]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The model.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The network.
    #[error(transparent)]
    Net(#[from] NetError),
    /// What is not here could not be had from peers.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// The stage refuses what was loaded for it.
    #[error("the first layers cannot be served: {0}")]
    Engine(#[from] EngineError),
    /// What it counts cannot be served.
    #[error(transparent)]
    Metrics(#[from] metrics::ServerError),
    /// The stage's thread.
    #[error("cannot start the stage worker: {0}")]
    Worker(std::io::Error),
    /// A task of ours died.
    #[error("internal: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// A running node. It serves until [`SwarmNode::shutdown`].
pub struct SwarmNode {
    net: Net,
    transfer: Transfer,
    sessions: Sessions,
    hosted: Vec<Hosted>,
    metrics: Metrics,
    metrics_server: Option<MetricsServer>,
    tasks: Vec<JoinHandle<()>>,
    /// The stage worker died.
    died: CancellationToken,
    _control: Control,
    /// Held while the node runs; the system lets go of it when the process dies.
    _home: File,
}

impl SwarmNode {
    /// Loads layers and serves them. Returns when sessions are accepted for the first layers of every model.
    ///
    /// # Errors
    /// See [`StartError`]: each names the cause and what to try.
    pub async fn start(config: NodeConfig) -> Result<Self, StartError> {
        let home = config.settings.home.clone();
        let identity = Identity::load_or_create(&home)?;
        let lock = lock(&home)?;
        let control = Control::open(&home, identity.peer(), config.quiet_hours.clone());
        let metrics = Metrics::new("shoal-node");
        control.counts(&metrics);
        // From the start: loading takes a while, and is something to see.
        let server = match config.metrics.clone() {
            None => None,
            Some(ServeMetrics {
                at,
                keys,
                without_key,
            }) => Some(MetricsServer::start(at, keys, without_key, metrics.clone()).await?),
        };
        let store = Store::open(&home.join("store"))?;
        let mut known = Vec::new();
        for model in config.models.clone() {
            let (store, home) = (store.clone(), home.clone());
            match blocking(move || load::find(&store, &home, &model)).await? {
                Ok(found) => known.push(Ok(found)),
                Err(LoadError::Unknown(unknown)) => known.push(Err(unknown)),
                Err(other) => return Err(other.into()),
            }
        }
        let net = Net::start(net_config(&config, identity)).await?;
        metrics.register_net(&net);
        match Self::serve(&config, store, known, net.clone(), (lock, control)).await {
            Ok(node) => {
                let sessions = node.sessions.metrics();
                metrics.register(|registry| sessions.register(registry));
                Ok(Self {
                    metrics,
                    metrics_server: server,
                    ..node
                })
            }
            Err(error) => {
                net.shutdown().await;
                Err(error)
            }
        }
    }

    async fn serve(
        config: &NodeConfig,
        store: Store,
        models: Vec<Result<Found, UnknownModel>>,
        net: Net,
        (lock, control): (File, Control),
    ) -> Result<Self, StartError> {
        let book = PeerBook::default();
        let (transfer, mut tasks) = give(config, &net, &store, &book);
        control.knows(&net, &transfer);
        let settings = &config.settings;
        let known = KnownPeers::new(&settings.home, &settings.swarm);
        let given = !settings.peers.is_empty();
        let alone = !given && !settings.mdns && known.addrs().is_empty();
        tokio::spawn({
            let (known, net) = (known.clone(), net.clone());
            async move { known.fall_back(&net, given).await }
        });
        let found = try_join_all(models.into_iter().map(|model| async {
            match model {
                Ok(found) => Ok(found),
                Err(unknown) => hosting::locate(unknown, &transfer, &net, alone).await,
            }
        }));
        let found = each_once(found.await?);
        let place = Place {
            sessions: Sessions::new(net.me(), Arc::new(net.clone()), SessionLimits::default()),
            service: ExpertService::new(Some(control.pause().clone())),
            board: Board::new(net.clone(), store, control.pause().clone()),
            book,
            cpu_share: config.cpu_share,
            net: net.clone(),
            transfer: transfer.clone(),
            threads: config.threads,
            turn: config.turn,
            island_rtt: config.island_rtt,
            alone,
        };
        let sessions = place.sessions.clone();
        tasks.extend(take_sessions(&sessions, &net));
        tasks.extend(place.service.serve(&net));
        tasks.push(control.serves(&sessions, &transfer, &place.board));
        let mut hosted = Vec::new();
        let memory = config.memory.unwrap_or_else(load::default_memory);
        let blueprints: Vec<_> = found.iter().map(|found| &found.blueprint).collect();
        let shares = load::shares(memory, &blueprints);
        let hosts = found.into_iter().zip(shares);
        let hosts = hosts.map(|(found, memory)| {
            hosting::host(&place, found, memory, config.layers.clone(), config.hold)
        });
        for (model, keeping) in try_join_all(hosts).await? {
            hosted.push(model);
            tasks.push(tokio::spawn(keeping));
        }
        let died = CancellationToken::new();
        let watched = watch(net.clone(), place.board, sessions.clone(), died.clone());
        tasks.push(tokio::spawn(watched));
        tasks.push(tokio::spawn(known.keep(net.clone())));
        Ok(Self {
            net,
            transfer,
            sessions,
            hosted,
            metrics: Metrics::default(),
            metrics_server: None,
            tasks,
            died,
            _control: control,
            _home: lock,
        })
    }

    /// The network.
    pub fn net(&self) -> &Net {
        &self.net
    }

    /// Shards to and from others.
    pub fn transfer(&self) -> &Transfer {
        &self.transfer
    }

    /// Our id.
    pub fn peer(&self) -> Peer {
        self.net.me()
    }

    /// What it serves.
    pub fn hosted(&self) -> &[Hosted] {
        &self.hosted
    }

    /// What this process counts.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Where that is served, if it is.
    pub fn metrics_url(&self) -> Option<String> {
        self.metrics_server.as_ref().map(MetricsServer::url)
    }

    /// Sessions that are open.
    pub fn sessions(&self) -> usize {
        self.sessions.count()
    }

    /// Waits until the stage worker has died, which it should not: the model is withdrawn by then, and
    /// only a new process can serve again.
    pub async fn died(&self) {
        self.died.cancelled().await;
    }

    /// Withdraws the advert, refuses new sessions, lets running ones end, closes the network:
    /// within five seconds.
    pub async fn shutdown(self) {
        self.net.withdraw().await;
        self.sessions.shutdown(DRAIN).await;
        for task in &self.tasks {
            task.abort();
        }
        self.net.shutdown().await;
    }
}

impl std::fmt::Debug for SwarmNode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = f.debug_struct("SwarmNode");
        out.field("net", &self.net)
            .field("hosted", &self.hosted)
            .finish()
    }
}

/// Takes streams of sessions; nothing where somebody does so already.
fn take_sessions(sessions: &Sessions, net: &Net) -> Option<JoinHandle<()>> {
    let (down, answers) = (net.accept(Proto::Session)?, net.accept(Proto::Answer)?);
    let sessions = sessions.clone();
    Some(tokio::spawn(
        async move { sessions.run(down, answers).await },
    ))
}

/// One node in one home directory.
fn lock(home: &Path) -> Result<File, StartError> {
    let path = home.join("node.lock");
    let io = |source| StartError::Lock {
        path: path.clone(),
        source,
    };
    let mut options = File::options();
    let file = options.create(true).truncate(false).write(true);
    let file = file.open(&path).map_err(io)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StartError::HomeInUse {
            path: home.to_owned(),
        }),
        Err(TryLockError::Error(source)) => Err(io(source)),
    }
}

fn net_config(config: &NodeConfig, identity: Identity) -> NetConfig {
    let settings = &config.settings;
    NetConfig {
        key: settings.key,
        access: settings.access.clone(),
        listen: config.listen.clone(),
        announce: config.announce.clone(),
        bootstrap: settings.peers.clone(),
        mdns: settings.mdns,
        agent: concat!("shoal-node/", env!("CARGO_PKG_VERSION")).into(),
        ..NetConfig::client(identity, settings.swarm.clone())
    }
}

/// Gives what the store has to others: descriptions, and shards.
fn give(
    config: &NodeConfig,
    net: &Net,
    store: &Store,
    book: &PeerBook,
) -> (Transfer, Vec<JoinHandle<()>>) {
    let limits = config.transfer;
    let transfer = Transfer::new(net.clone(), store.clone(), limits, book.clone(), true);
    let described = net.serve_fetch(Arc::new(StoreShelf(transfer.clone())));
    let tasks = described.into_iter().chain(transfer.serve()).collect();
    (transfer, tasks)
}

/// Two names may be one model.
fn each_once(mut found: Vec<Found>) -> Vec<Found> {
    let mut seen = HashSet::new();
    found.retain(|found| seen.insert(found.id));
    found
}

/// Keeps the advert fresh until a stage worker dies, and says so then.
async fn watch(net: Net, board: Board, sessions: Sessions, died: CancellationToken) {
    let mut refresh = tokio::time::interval(REFRESH);
    let mut watch = tokio::time::interval(WATCH);
    while board.models().iter().all(Model::is_alive) {
        tokio::select! {
            _ = watch.tick() => {}
            _ = refresh.tick() => board.refresh().await,
        }
    }
    for model in &board.models() {
        sessions.withdraw(&model.id);
    }
    net.withdraw().await;
    tracing::error!(
        "a stage worker died: everything is withdrawn and this node serves nothing any more; \
         start it again, and report the panic above if it comes back"
    );
    died.cancel();
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, tokio::task::JoinError> {
    tokio::task::spawn_blocking(work).await
}

/// Manifests and metadata of the store, for others.
struct StoreShelf(Transfer);

impl Shelf for StoreShelf {
    fn manifest(&self, id: &ModelId) -> std::io::Result<Option<Vec<u8>>> {
        match self.0.store().manifest_bytes(*id) {
            Ok(bytes) => {
                self.0.described(bytes.len());
                Ok(Some(bytes))
            }
            Err(StoreError::Missing { .. }) => Ok(None),
            Err(error) => Err(std::io::Error::other(error)),
        }
    }

    fn shard(&self, id: &ShardId) -> std::io::Result<Option<Vec<u8>>> {
        let shard = self.0.store().metadata_shard(*id);
        self.0.described(shard.as_ref().map_or(0, Vec::len));
        Ok(shard)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::FileConfig,
        net::Access,
        session::{Kind, Opener},
    };
    use swarm_proto::{Dtype, FailureCode, Hop, LayerRange};

    const DEADLINE: Duration = Duration::from_secs(60);

    async fn node(home: &Path) -> SwarmNode {
        let settings = Settings {
            home: home.to_owned(),
            swarm: "t".parse().unwrap(),
            key: None,
            peers: Vec::new(),
            mdns: false,
            access: Access::Open,
            otlp: None,
            log: None,
            log_json: false,
            file: FileConfig::default(),
        };
        let config = NodeConfig {
            settings,
            models: vec!["demo".into()],
            layers: Some(0..8),
            memory: Some(256 << 20),
            hold: Hold::Auto,
            island_rtt: Duration::from_micros(500),
            turn: Duration::from_secs(60),
            listen: vec!["/ip4/127.0.0.1/tcp/0".into()],
            announce: Vec::new(),
            threads: Some(1),
            transfer: transfer::Limits::default(),
            cpu_share: CpuShare::default(),
            quiet_hours: QuietHours::default(),
            metrics: None,
        };
        SwarmNode::start(config).await.unwrap()
    }

    /// A network that knows the node, and waits for what its advert says.
    async fn neighbour(node: &SwarmNode) -> Net {
        let swarm = node.net().swarm().clone();
        let config = NetConfig {
            bootstrap: node.net().listen_addrs(),
            ..NetConfig::client(Identity::generate(), swarm)
        };
        Net::start(config).await.unwrap()
    }

    async fn until(net: &Net, wanted: impl Fn(&[Arc<swarm_proto::Advert>]) -> bool) {
        let mut changes = net.adverts().changes();
        let seen = async {
            while !wanted(&net.adverts().snapshot().adverts) {
                changes.changed().await.unwrap();
            }
        };
        tokio::time::timeout(DEADLINE, seen).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_node_whose_worker_died_withdraws_and_says_so() {
        let home = tempfile::tempdir().unwrap();
        let node = node(home.path()).await;
        let near = neighbour(&node).await;
        until(&near, |adverts| {
            adverts.iter().any(|a| !a.models.is_empty())
        })
        .await;
        let pending = tokio::time::timeout(2 * WATCH, node.died()).await;
        assert!(pending.is_err(), "it lives");

        let worker = node.sessions.served(&node.hosted[0].model).unwrap().worker;
        let (shape, model) = (worker.shape(), node.hosted[0].model);
        let panicking: engine::Reply<engine::Slot> = Box::new(|_| panic!("as the test wants"));
        worker.open(16, 0..8, panicking).unwrap();
        tokio::time::timeout(DEADLINE, node.died()).await.unwrap();
        until(&near, <[_]>::is_empty).await;
        let opener = Opener::new(near.me(), Arc::new(near.clone()));
        let kind = Kind {
            model,
            n_ctx: 16,
            dtype: Dtype::F32,
            n_embd: shape.n_embd,
            n_vocab: shape.n_vocab,
            numerics: swarm_proto::Numerics::Exact,
        };
        let hop = Hop {
            peer: node.peer(),
            addrs: node.net().listen_addrs(),
            layers: LayerRange { start: 0, end: 8 },
        };
        let refused = opener.open_route(kind, vec![hop]).await.map(drop);
        let error = refused.unwrap_err();
        let crate::ClientError::Hop { failure, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(failure.code, FailureCode::UnknownModel, "{error}");
        node.shutdown().await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_advert_carries_the_uplink_once_it_is_measured() {
        let home = tempfile::tempdir().unwrap();
        let node = node(home.path()).await;
        let near = neighbour(&node).await;
        let uplink = |adverts: &[Arc<swarm_proto::Advert>]| {
            let mut figures = adverts.iter().map(|advert| advert.uplink_bytes_s);
            figures
                .next()
                .map(|figure| figure.map(|figure| figure.value))
        };
        until(&near, |adverts| uplink(adverts) == Some(None)).await;
        let second = Duration::from_secs(1);
        node.net()
            .with_uplink(|uplink| uplink.sent(5_000_000, second, std::time::Instant::now()));
        until(&near, |adverts| uplink(adverts) == Some(Some(5e6))).await;
        node.shutdown().await;
    }
}
