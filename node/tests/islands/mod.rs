//! A small mixture, holders of its experts on networks of their own, and trunks that ask them.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic)] // helpers of tests
#![allow(dead_code)] // each test binary uses its part

use std::{path::PathBuf, sync::Arc, time::Duration};

use engine::{
    ExpertHolder, ExpertLayout, ExpertWorker, FileSource, LoadedExpert, RandomShape, RandomWeights,
    Want, WholeModel, random_model,
};
use gguf::TensorType;
use node::{
    ExpertService, Identity, Island, IslandFacts, IslandOptions, Net, NetConfig, PeerBook, Proto,
    Stream, net::Announcement,
};
use swarm_proto::{
    ExpertAsk, ExpertGive, ExpertSpan, ExpertsAdvert, FrameDecoder, FrameLimits, Hash, ModelAdvert,
    ModelId, Peer, decode_header, encode_frame,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::Handle,
    time::timeout,
};

/// How long anything may take.
pub const DEADLINE: Duration = Duration::from_secs(60);
pub const MODEL: ModelId = ModelId(Hash([0x6d; 32]));
pub const NUMERICS: u64 = 7;
pub const N_EXPERT: u32 = 8;
const N_CTX: u32 = 128;
const SEED: u64 = 20_261_201;

/// A model of three layers of eight experts, three for each row.
#[derive(Clone)]
pub struct Mixture {
    pub source: Arc<FileSource>,
    pub layout: Arc<ExpertLayout>,
    path: PathBuf,
    _dir: Arc<tempfile::TempDir>,
}

pub fn mixture() -> Mixture {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let shape = RandomShape {
        n_expert: N_EXPERT,
        n_expert_used: 3,
        ..RandomShape::tiny()
    };
    let weights = RandomWeights::One(TensorType::Q8_0);
    random_model("qwen3moe", &shape, weights, SEED, &path).unwrap();
    let source = FileSource::open(&path).unwrap();
    let layout = Arc::new(ExpertLayout::new(source.header()).unwrap());
    Mixture {
        source: Arc::new(source),
        layout,
        path,
        _dir: Arc::new(dir),
    }
}

impl Mixture {
    pub fn worker(&self, holds: impl Fn(u32, u32) -> bool) -> Arc<ExpertWorker> {
        let holder = ExpertHolder::new(self.layout.clone(), 1).unwrap();
        let worker = Arc::new(ExpertWorker::spawn(holder, 16).unwrap());
        for layer in self.layout.layers() {
            for expert in (0..N_EXPERT).filter(|expert| holds(layer, *expert)) {
                let loaded = LoadedExpert::read(&self.layout, layer, expert, &*self.source);
                worker.add(loaded.unwrap()).unwrap();
            }
        }
        worker
    }

    /// The logits of the whole model.
    pub fn expected(&self) -> Vec<Vec<u32>> {
        let mut whole = WholeModel::load(&self.path, N_CTX, 1).unwrap();
        generate(&mut whole, |_| ()).unwrap()
    }

    /// The logits of a trunk; `at` is told before each decoded token.
    pub async fn run(
        &self,
        island: &Arc<Island>,
        at: impl FnMut(usize) + Send + 'static,
    ) -> Result<Vec<Vec<u32>>, String> {
        let (path, island) = (self.path.clone(), island.clone());
        let run = move || {
            let mut trunk = WholeModel::load_trunk(&path, N_CTX, 1, island).unwrap();
            generate(&mut trunk, at)
        };
        let run = tokio::task::spawn_blocking(run);
        timeout(DEADLINE, run).await.expect("in time").unwrap()
    }

    pub fn facts(&self) -> IslandFacts {
        IslandFacts::new(MODEL, &self.layout, NUMERICS)
    }
}

pub const DECODED: usize = 10;

/// The bits of the logits of a prompt of more than a chunk, and of tokens after it.
fn generate(model: &mut WholeModel, mut at: impl FnMut(usize)) -> Result<Vec<Vec<u32>>, String> {
    let n_vocab = model.n_vocab();
    let prompt: Vec<u32> = (1..40u32).map(|i| (i * 7919) % n_vocab).collect();
    let mut out = Vec::new();
    let said = |why: engine::EngineError| why.to_string();
    model.feed(0, &prompt, &mut out).map_err(said)?;
    let mut rows = Vec::new();
    for i in 0..DECODED {
        rows.push(out.iter().map(|value| value.to_bits()).collect());
        at(i);
        let best = (0..out.len()).max_by(|a, b| out[*a].total_cmp(&out[*b]));
        let (pos, token) = ((prompt.len() + i) as u32, best.unwrap() as u32);
        model
            .run(pos, &[token], Want::Last, &mut out)
            .map_err(said)?;
    }
    Ok(rows)
}

pub async fn network(near: Option<&Net>) -> Net {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_test_writer()
        .try_init();
    let config = NetConfig {
        listen: vec!["/ip4/127.0.0.1/tcp/0".into()],
        bootstrap: near.map(Net::listen_addrs).unwrap_or_default(),
        ..NetConfig::client(Identity::generate(), "t".parse().unwrap())
    };
    Net::start(config).await.unwrap()
}

/// Says that it holds these experts.
pub async fn advertise(net: &Net, held: impl IntoIterator<Item = (u32, u32)>, numerics: u64) {
    let held = held.into_iter().map(|(l, e)| (l as u16, e as u16));
    let experts = ExpertsAdvert {
        live: ExpertSpan::of(held),
        ..ExpertsAdvert::default()
    };
    let model = ModelAdvert {
        model: MODEL,
        name: "tiny".into(),
        n_layer: 3,
        live: Vec::new(),
        intended: Vec::new(),
        layer_tokens_s: None,
        n_ctx_max: 0,
        free_cells: 0,
        n_embd: 256,
        numerics,
        stored: Vec::new(),
        layer_bytes_max: None,
        experts: Some(experts),
    };
    net.publish(Announcement {
        models: vec![model],
        ..Announcement::default()
    })
    .await;
}

/// A node that computes some experts, and says so.
pub struct HolderNode {
    pub net: Net,
    pub service: ExpertService,
    pub worker: Arc<ExpertWorker>,
}

pub async fn holder(mixture: &Mixture, near: &Net, holds: impl Fn(u32, u32) -> bool) -> HolderNode {
    let net = network(Some(near)).await;
    let service = ExpertService::new(None);
    service.serve(&net).expect("nobody serves yet");
    let worker = mixture.worker(holds);
    service.offer(MODEL, worker.clone());
    advertise(&net, worker.held(), NUMERICS).await;
    HolderNode {
        net,
        service,
        worker,
    }
}

pub fn island_with(mixture: &Mixture, net: &Net, book: &PeerBook, wait: Duration) -> Arc<Island> {
    let options = IslandOptions {
        // The machine that tests run on is busy.
        rtt_max: Duration::from_secs(5),
        missing_wait: wait,
    };
    let runtime = Handle::current();
    Island::new(net.clone(), book.clone(), runtime, mixture.facts(), options)
}

pub fn island(mixture: &Mixture, net: &Net) -> Arc<Island> {
    island_with(mixture, net, &PeerBook::default(), DEADLINE)
}

/// Waits until the island is as it should be.
pub async fn until(island: &Island, what: &str, mut ready: impl FnMut(&Island) -> bool) {
    let mut changes = island.changes();
    let waited = async {
        while !ready(island) {
            // Figures change without a change of the table.
            let _ = timeout(Duration::from_millis(20), changes.changed()).await;
        }
    };
    let waited = timeout(DEADLINE, waited).await;
    waited.unwrap_or_else(|_| panic!("{what}: {:?}", island.stats()));
}

/// Waits until so many holders can be asked.
pub async fn up(island: &Island, holders: usize) {
    until(island, "holders", |island| island.peers().len() == holders).await;
}

/// What a bad holder does with a call: its id, how many rows are to come back.
pub type Misdeed = fn(u32, usize) -> Vec<u8>;

/// A node that says it holds experts, greets well, and does with each call what `misdeed` does.
pub async fn bad_holder(
    near: &Net,
    held: impl IntoIterator<Item = (u32, u32)>,
    misdeed: Misdeed,
) -> Net {
    let net = network(Some(near)).await;
    let mut streams = net.accept(Proto::Experts).expect("nobody serves yet");
    tokio::spawn(async move {
        while let Some((_, stream)) = streams.recv().await {
            tokio::spawn(answer_badly(stream, misdeed));
        }
    });
    advertise(&net, held, NUMERICS).await;
    net
}

async fn answer_badly(mut stream: Stream, misdeed: Misdeed) {
    let mut decoder = FrameDecoder::new(FrameLimits {
        header_max: 1 << 14,
        payload_max: 1 << 24,
    });
    let mut bytes = vec![0; 1 << 14];
    // Whether it says that it works and never does.
    let (working, mut works) = (said(&ExpertGive::Working, &[]), false);
    loop {
        while let Some((header, _)) = decoder.next().unwrap() {
            let say = match decode_header(decoder.bytes(header)).unwrap() {
                ExpertAsk::Hello { .. } => said(&ExpertGive::Serving { n_embd: 256 }, &[]),
                ExpertAsk::Ping(id) => said(&ExpertGive::Pong(id), &[]),
                ExpertAsk::Call(call) => misdeed(call.id, call.rows.len()),
            };
            works |= say == working;
            if stream.write_all(&say).await.is_err() || stream.flush().await.is_err() {
                return;
            }
        }
        match timeout(Duration::from_millis(100), stream.read(&mut bytes)).await {
            Ok(Ok(n @ 1..)) => decoder.push(&bytes[..n]),
            Err(_) if works => {
                if stream.write_all(&working).await.is_err() || stream.flush().await.is_err() {
                    return;
                }
            }
            Err(_) => {}
            _ => return,
        }
    }
}

pub fn said(give: &ExpertGive, values: &[f32]) -> Vec<u8> {
    let mut out = Vec::new();
    let payload = |out: &mut Vec<u8>| values.iter().for_each(|v| out.extend(v.to_le_bytes()));
    encode_frame(give, &mut out, payload).unwrap();
    out
}

pub fn all() -> Vec<(u32, u32)> {
    (0..3)
        .flat_map(|layer| (0..N_EXPERT).map(move |expert| (layer, expert)))
        .collect()
}

pub fn state_of(island: &Island, peer: Peer) -> String {
    let stats = island.stats();
    let view = stats.iter().find(|view| view.peer == Some(peer));
    view.map_or_else(|| "gone".into(), |view| format!("{:?}", view.state))
}
