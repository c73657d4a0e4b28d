//! A serving node: network, model, stage worker and sessions put together.
//!
//! ```text
//! identity, store ─▶ network ─▶ listen to adverts ─▶ choose layers, say so ─▶ load, measure
//!                                                     └─▶ serve sessions, advertise what is live
//! ```

use std::{
    fs::{File, TryLockError},
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use engine::{EngineError, Stage, Worker};
use shard_registry::{
    Store, StoreError, UnknownModel,
    placement::{self, Count, Holdings, join},
};
use swarm_proto::{LayerRange, ModelAdvert, ModelId, Peer, ShardId, advert::ADVERT_SPANS_MAX};
use tokio::{sync::Notify, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Settings,
    control::{self, Control},
    cpu_share::CpuShare,
    growth::{self, Growth},
    identity::{Identity, IdentityError},
    known_peers::KnownPeers,
    load::{self, Found, LoadError, Plan},
    measure::{Speed, Timed},
    net::{Announcement, Net, NetConfig, NetError, Proto, Shelf},
    pause::Pause,
    peer_book::PeerBook,
    quiet_hours::QuietHours,
    session::{Served, SessionLimits, Sessions},
    transfer::{self, Transfer, TransferError},
};

/// How long to wait for the first adverts before choosing layers.
const LISTEN_FIRST: Duration = Duration::from_secs(3);
/// How long others get to object to a choice of layers, each time.
const SETTLE: Duration = Duration::from_millis(700);
/// Rounds of choosing: nodes that start together see each other's choices after one.
const ROUNDS: u32 = 4;
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
    /// Alias, id, file or `demo`.
    pub model: String,
    /// Which layers; none: as many as fit, where they are needed most.
    pub layers: Option<Range<u32>>,
    /// Memory for layers and KV, in bytes; none: half of what is free.
    pub memory: Option<u64>,
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
    model: ModelId,
    layers: Range<u32>,
    tasks: Vec<JoinHandle<()>>,
    /// The stage worker died.
    died: CancellationToken,
    _control: Control,
    /// Held while the node runs; the system lets go of it when the process dies.
    _home: File,
}

impl SwarmNode {
    /// Loads layers and serves them. Returns when sessions are accepted.
    ///
    /// # Errors
    /// See [`StartError`]: each names the cause and what to try.
    pub async fn start(config: NodeConfig) -> Result<Self, StartError> {
        let home = config.settings.home.clone();
        let identity = Identity::load_or_create(&home)?;
        let lock = lock(&home)?;
        let control = Control::open(&home, identity.peer(), config.quiet_hours.clone());
        let store = Store::open(&home.join("store"))?;
        let found = blocking({
            let (store, model) = (store.clone(), config.model.clone());
            move || load::find(&store, &home, &model)
        })
        .await?;
        let found = match found {
            Ok(found) => Ok(found),
            Err(LoadError::Unknown(unknown)) => Err(unknown),
            Err(other) => return Err(other.into()),
        };
        let net = Net::start(net_config(&config, identity)).await?;
        match Self::serve(&config, store, found, net.clone(), (lock, control)).await {
            Ok(node) => Ok(node),
            Err(error) => {
                net.shutdown().await;
                Err(error)
            }
        }
    }

    async fn serve(
        config: &NodeConfig,
        store: Store,
        found: Result<Found, UnknownModel>,
        net: Net,
        (lock, control): (File, Control),
    ) -> Result<Self, StartError> {
        let (transfer, mut tasks) = give(config, &net, &store);
        control.knows(&net, &transfer);
        let settings = &config.settings;
        let known = KnownPeers::new(&settings.home, &settings.swarm);
        let given = !settings.peers.is_empty();
        let alone = !given && !settings.mdns && known.addrs().is_empty();
        tokio::spawn({
            let (known, net) = (known.clone(), net.clone());
            async move { known.fall_back(&net, given).await }
        });
        let found = match found {
            Ok(found) => found,
            Err(unknown) => growth::locate(unknown, &transfer, &net, alone).await?,
        };
        let stored = stored(&store, found.id).await;
        let plan = choose_layers(config, &found, &stored, &net, alone).await?;
        tracing::info!(model = %found.name, id = %found.id.short(), layers = ?plan.layers, "loading");
        let speed = Speed::default();
        let limits = SessionLimits::default();
        let threads = config
            .threads
            .unwrap_or_else(|| load::default_threads(&found.blueprint, &plan.layers));
        let mut growth = Growth::new(found.clone(), &plan.layers, transfer.clone(), net.clone());
        let first = growth.first().await?;
        let mut stage = load::stage(&found, &plan, threads)?;
        first.map_or(Ok(()), |first| stage.add(first))?;
        let timed = (speed.clone(), config.cpu_share);
        let worker = worker(stage, timed, limits.worker_queue()).await?;
        let sessions = Sessions::new(net.me(), Arc::new(net.clone()), limits);
        sessions.serve(Served::new(found.id, worker.clone()));
        control.holds(control::Stage::new(&found, &plan.layers, &worker, &speed));
        tasks.extend(take_sessions(&sessions, &net));
        let model = found.id;
        let figures = Figures {
            store,
            stored,
            found,
            layers: plan.layers.clone(),
            worker: worker.clone(),
            speed,
            threads,
            news: Arc::default(),
            pause: control.pause().clone(),
        };
        tasks.push(control.serves(&sessions, &transfer, &figures.news));
        let (news, pause) = (figures.news.clone(), figures.pause.clone());
        tasks.push(tokio::spawn(growth.go_on(worker, news, pause)));
        net.publish(figures.announcement(&net)).await;
        let died = CancellationToken::new();
        let watched = watch(net.clone(), sessions.clone(), figures, died.clone());
        tasks.push(tokio::spawn(watched));
        tasks.push(tokio::spawn(known.keep(net.clone())));
        Ok(Self {
            net,
            transfer,
            sessions,
            model,
            layers: plan.layers,
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

    /// Which model is served.
    pub fn model(&self) -> ModelId {
        self.model
    }

    /// Which of its layers it is to serve; they come one by one where they are fetched.
    pub fn layers(&self) -> Range<u32> {
        self.layers.clone()
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
            .field("model", &self.model)
            .field("layers", &self.layers)
            .finish()
    }
}

/// Measures a stage and gives it a thread.
async fn worker(
    stage: engine::LlamaStage,
    (speed, share): (Speed, CpuShare),
    queue: usize,
) -> Result<Worker, StartError> {
    let spawn = move || Worker::spawn(Box::new(Timed::new(stage, speed, share)), queue);
    blocking(spawn).await?.map_err(StartError::Worker)
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

/// `alone`: nobody to hear from is known.
async fn choose_layers(
    config: &NodeConfig,
    found: &Found,
    stored: &[LayerRange],
    net: &Net,
    alone: bool,
) -> Result<Plan, StartError> {
    let memory = config.memory.unwrap_or_else(load::default_memory);
    if let Some(layers) = config.layers.clone() {
        return Ok(load::plan_fixed(&found.blueprint, layers, memory)?);
    }
    let layer_bytes = load::layer_bytes(&found.blueprint);
    let windows = load::windows(&layer_bytes, memory)?;
    let plan = |window: &Range<u16>| {
        let layers = window.start.into()..window.end.into();
        load::plan(&found.blueprint, layers, memory)
    };
    if let [only] = &windows[..] {
        return Ok(plan(only));
    }
    if !alone && !net.synced(LISTEN_FIRST).await {
        tracing::info!("no other node was heard within {LISTEN_FIRST:?}");
    }
    let facts = found.facts(&layer_bytes);
    let pick = || {
        let holdings = Holdings::of(&net.adverts().snapshot(), &facts);
        let near = placement::near(net.rtts());
        join::choose(
            &windows,
            &holdings.coverage(Count::Held, net.me(), near),
            net.me(),
        )
    };
    let mut window = pick().unwrap_or(0..1);
    for _ in 0..ROUNDS {
        let layers = window.start.into()..window.end.into();
        net.publish(intention(found, layers, stored)).await;
        if alone {
            break;
        }
        // Not a wait for one event: others' choices may come or not.
        tokio::time::sleep(SETTLE).await;
        match pick() {
            Some(better) if better != window => window = better,
            _ => break,
        }
    }
    Ok(plan(&window))
}

fn intention(found: &Found, layers: Range<u32>, stored: &[LayerRange]) -> Announcement {
    let model = ModelAdvert {
        model: found.id,
        name: found.name.clone(),
        n_layer: found.manifest.n_layer,
        live: Vec::new(),
        intended: span(&layers),
        layer_tokens_s: None,
        n_ctx_max: 0,
        free_cells: 0,
        n_embd: found.manifest.n_embd,
        numerics: 0,
        stored: stored.to_vec(),
    };
    Announcement {
        models: vec![model],
        ..Announcement::default()
    }
}

fn span(layers: &Range<u32>) -> Vec<LayerRange> {
    let (start, end) = (u16::try_from(layers.start), u16::try_from(layers.end));
    match (start, end) {
        (Ok(start), Ok(end)) => LayerRange::new(start, end).into_iter().collect(),
        _ => Vec::new(),
    }
}

/// What the advert says, as it is now.
struct Figures {
    store: Store,
    stored: Vec<LayerRange>,
    found: Found,
    layers: Range<u32>,
    worker: Worker,
    speed: Speed,
    threads: u32,
    /// Told when more layers are there, or none are to be offered.
    news: Arc<Notify>,
    pause: Pause,
}

impl Figures {
    fn announcement(&self, net: &Net) -> Announcement {
        if self.pause.now().is_some() {
            // Nothing live and nothing to come: others go around us, and see that layers are missing.
            return Announcement::default();
        }
        let stats = self.worker.stats();
        let mut announcement = intention(&self.found, self.layers.clone(), &self.stored);
        for model in &mut announcement.models {
            model.live = stats.held.spans().iter().flat_map(span).collect();
            model.layer_tokens_s = self.speed.get();
            model.n_ctx_max = self.worker.shape().n_ctx_max;
            model.free_cells = stats
                .free_cells
                .saturating_mul(stats.held.n_layers().into());
            model.numerics = engine::numerics_class(self.threads);
        }
        announcement.uplink_bytes_s = net.uplink();
        announcement.queue = u16::try_from(self.worker.queued()).unwrap_or(u16::MAX);
        announcement
    }
}

/// Gives what the store has to others: descriptions, and shards.
fn give(config: &NodeConfig, net: &Net, store: &Store) -> (Transfer, Vec<JoinHandle<()>>) {
    let book = PeerBook::default();
    let transfer = Transfer::new(net.clone(), store.clone(), config.transfer, book, true);
    let described = net.serve_fetch(Arc::new(StoreShelf(transfer.clone())));
    let tasks = described.into_iter().chain(transfer.serve()).collect();
    (transfer, tasks)
}

/// Announces until the stage worker dies, and says so then.
async fn watch(net: Net, sessions: Sessions, figures: Figures, died: CancellationToken) {
    let model = figures.found.id;
    keep_announcing(&net, figures).await;
    sessions.withdraw(&model);
    net.withdraw().await;
    tracing::error!(
        "the stage worker died: the model is withdrawn and this node serves nothing any more; \
         start it again, and report the panic above if it comes back"
    );
    died.cancel();
}

/// Keeps the figures of the advert fresh for as long as the stage worker lives.
async fn keep_announcing(net: &Net, mut figures: Figures) {
    let mut refresh = tokio::time::interval(REFRESH);
    let mut watch = tokio::time::interval(WATCH);
    loop {
        tokio::select! {
            _ = watch.tick() => {
                if !figures.worker.is_alive() {
                    return;
                }
            }
            () = figures.news.notified() => refresh.reset_immediately(),
            _ = refresh.tick() => {
                figures.stored = stored(&figures.store, figures.found.id).await;
                net.publish(figures.announcement(net)).await;
            }
        }
    }
}

/// Layers of a model that others can have from here, as many spans of them as an advert holds.
async fn stored(store: &Store, model: ModelId) -> Vec<LayerRange> {
    let store = store.clone();
    let here = blocking(move || store.here(model)).await;
    let mut layers = here.map_or_else(|_| Ok(Vec::new()), |here| here.map(|here| here.layers));
    if let Ok(layers) = &mut layers {
        layers.truncate(ADVERT_SPANS_MAX);
    }
    layers.unwrap_or_default()
}

async fn blocking<T: Send + 'static>(
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
    use swarm_proto::{Dtype, FailureCode, Hop};

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
            model: "demo".into(),
            layers: Some(0..8),
            memory: Some(256 << 20),
            listen: vec!["/ip4/127.0.0.1/tcp/0".into()],
            announce: Vec::new(),
            threads: Some(1),
            transfer: transfer::Limits::default(),
            cpu_share: CpuShare::default(),
            quiet_hours: QuietHours::default(),
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

        let worker = node.sessions.served(&node.model).unwrap().worker;
        let (n_vocab, model) = (worker.shape().n_vocab, node.model);
        let panicking: engine::Reply<engine::Slot> = Box::new(|_| panic!("as the test wants"));
        worker.open(16, 0..8, panicking).unwrap();
        tokio::time::timeout(DEADLINE, node.died()).await.unwrap();
        until(&near, <[_]>::is_empty).await;
        let opener = Opener::new(near.me(), Arc::new(near.clone()));
        let kind = Kind {
            model,
            n_ctx: 16,
            dtype: Dtype::F32,
            n_vocab,
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
