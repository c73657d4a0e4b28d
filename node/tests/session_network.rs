//! Sessions over real networks on loopback: with the hash chain, and with llama.cpp against the
//! whole model.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

use std::{ops::Range, path::Path, sync::Arc, time::Duration};

use engine::{
    Blueprint, ChainStage, FileSource, LlamaStage, LoadOptions, RandomShape, RandomWeights, Stage,
    WholeModel, Worker, random_model,
};
use node::{
    ClientError, ClientSession, Identity, Net, NetConfig, Proto,
    session::{HopName, Kind, Opener, Served, SessionLimits, Sessions},
};
use swarm_proto::{
    Dtype, FailureCode, Form, Hash, Hop, LayerRange, ModelId, SwarmId, Want, WantRows,
};

const MODEL: ModelId = ModelId(Hash([3; 32]));
const BEST: Want = Want {
    rows: WantRows::Last,
    form: Form::Top(1),
};
const WHOLE_ROW: Want = Want {
    rows: WantRows::Last,
    form: Form::Full,
};

struct Node {
    net: Net,
    worker: Worker,
    sessions: Sessions,
    layers: Range<u32>,
}

fn swarm_id() -> SwarmId {
    "sessions".parse().unwrap()
}

async fn start(stage: Box<dyn Stage>, listen: &str) -> Node {
    let layers = stage.stats().held.spans()[0].clone();
    let mut config = NetConfig::client(Identity::generate(), swarm_id());
    config.listen = vec![listen.into()];
    let net = Net::start(config).await.unwrap();
    let mut limits = SessionLimits::default();
    // Nobody comes back here.
    limits.deadlines.keep = Duration::from_secs(1);
    let worker = Worker::spawn(stage, limits.worker_queue()).unwrap();
    let sessions = Sessions::new(net.me(), Arc::new(net.clone()), limits);
    sessions.serve(Served::new(MODEL, worker.clone()));
    let (down, answers) = (
        net.accept(Proto::Session).unwrap(),
        net.accept(Proto::Answer).unwrap(),
    );
    let service = sessions.clone();
    tokio::spawn(async move { service.run(down, answers).await });
    Node {
        net,
        worker,
        sessions,
        layers,
    }
}

fn route(nodes: &[Node]) -> Vec<Hop> {
    let hop = |n: &Node| Hop {
        peer: n.net.me(),
        addrs: n.net.listen_addrs(),
        layers: LayerRange {
            start: n.layers.start as u16,
            end: n.layers.end as u16,
        },
    };
    nodes.iter().map(hop).collect()
}

async fn open(client: &Net, nodes: &[Node], n_ctx: u32) -> ClientSession {
    let opener = Opener::new(client.me(), Arc::new(client.clone()));
    let kind = Kind {
        model: MODEL,
        n_ctx,
        dtype: Dtype::F32,
        n_embd: nodes[0].worker.shape().n_embd,
        numerics: swarm_proto::Numerics::Exact,
        n_vocab: nodes[0].worker.shape().n_vocab,
    };
    opener.open_route(kind, route(nodes)).await.unwrap()
}

async fn client() -> Net {
    Net::start(NetConfig::client(Identity::generate(), swarm_id()))
        .await
        .unwrap()
}

async fn assert_empty(nodes: &[Node]) {
    for node in nodes {
        let freed = async {
            while node.sessions.count() > 0 || node.worker.stats().sessions > 0 {
                tokio::task::yield_now().await;
            }
        };
        // A while longer than what a lost client left is kept for it.
        let freed = tokio::time::timeout(Duration::from_secs(40), freed).await;
        assert!(freed.is_ok(), "{} keeps KV", node.net.me());
    }
}

async fn chain_of(cuts: &[u32], listen: &str) -> Vec<Node> {
    let mut nodes = Vec::new();
    for cut in cuts.windows(2) {
        let stage = ChainStage::new(8, 256, 500, cut[0]..cut[1], 5);
        nodes.push(start(Box::new(stage), listen).await);
    }
    nodes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chain_decodes_over_tcp_and_quic_and_a_lost_node_is_named() {
    let whole = ChainStage::new(8, 256, 500, 0..8, 5);
    for listen in ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"] {
        let mut nodes = chain_of(&[0, 1, 4], listen).await;
        // On a runtime of its own, so that it can go as a killed process does: all at once.
        let doomed = tokio::runtime::Runtime::new().unwrap();
        let stage = ChainStage::new(8, 256, 500, 4..6, 5);
        nodes.push(doomed.spawn(start(Box::new(stage), listen)).await.unwrap());
        nodes.extend(chain_of(&[6, 8], listen).await);
        let me = client().await;
        let mut session = open(&me, &nodes, 512).await;
        let mut all: Vec<u32> = (0..200).map(|i| i * 7 % 500).collect();
        session.feed(&all, BEST).await.unwrap();
        for _ in 0..20 {
            let row = session.next_logits().await.unwrap();
            assert_eq!(row.argmax(), Some(whole.expected(&all)), "{listen}");
            all.extend(row.argmax());
            session.feed(&all[all.len() - 1..], BEST).await.unwrap();
        }
        session.next_logits().await.unwrap();
        doomed.shutdown_background();
        let lost = nodes.remove(2).net.me();
        let error = loop {
            if let Err(e) = session.feed(&[1], BEST).await {
                break e;
            }
            if let Err(e) = session.next_logits().await {
                break e;
            }
        };
        let ClientError::Hop { hop, failure } = &error else {
            panic!("{error}")
        };
        let HopName { at, peer, .. } = *hop;
        assert_eq!((at, peer), (2, lost), "{error}");
        // TCP says so; over QUIC a peer that is gone is one that is silent.
        let gone = [FailureCode::DownstreamLost, FailureCode::Deadline];
        assert!(gone.contains(&failure.code), "{error}");
        drop(session);
        assert_empty(&nodes).await;
        me.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_frees_every_hop() {
    let nodes = chain_of(&[0, 3, 8], "/ip4/127.0.0.1/tcp/0").await;
    let me = client().await;
    let mut session = open(&me, &nodes, 512).await;
    session.feed(&[1; 100], BEST).await.unwrap();
    session.next_logits().await.unwrap();
    let opened: usize = nodes.iter().map(|n| n.sessions.count()).sum();
    assert_eq!(opened, 2);
    drop(session);
    assert_empty(&nodes).await;
    // The whole process goes.
    let _session = open(&me, &nodes, 512).await;
    me.shutdown().await;
    assert_empty(&nodes).await;
}

/// 64 greedy tokens and every logit on the way, over four nodes, against the file in one piece.
async fn staged_equals_whole(file: &Path, cuts: &[u32], tokens: &[u32]) {
    let source = FileSource::open(file).unwrap();
    let blueprint = Blueprint::new(source.header()).unwrap();
    let options = LoadOptions {
        n_threads: 1,
        ..LoadOptions::default()
    };
    let mut nodes = Vec::new();
    for cut in cuts.windows(2) {
        let stage =
            LlamaStage::load(&blueprint, cut[0]..cut[1], &source, &options, &mut |_| {}).unwrap();
        nodes.push(start(Box::new(stage), "/ip4/127.0.0.1/tcp/0").await);
    }
    let me = client().await;
    let mut session = open(&me, &nodes, 256).await;
    let mut whole = WholeModel::load(file, 256, 1).unwrap();
    let mut next = tokens.to_vec();
    let (mut pos, mut expected) = (0, Vec::new());
    for step in 0..64 {
        session.feed(&next, WHOLE_ROW).await.unwrap();
        let row = session.next_logits().await.unwrap();
        whole.feed(pos, &next, &mut expected).unwrap();
        assert!(row.full == expected, "logits differ at step {step}");
        pos += next.len() as u32;
        next = vec![row.argmax().unwrap()];
        session.recycle(row);
    }
    session.close().await;
    assert_empty(&nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_over_four_nodes_equals_the_whole_one() {
    let tokens: Vec<u32> = (0..70).map(|i| 3 + i * 5 % 200).collect();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo.gguf");
    let source = FileSource::open(&demo).unwrap();
    let n = Blueprint::new(source.header()).unwrap().n_layer();
    staged_equals_whole(&demo, &[0, 1, n / 2, n - 1, n], &tokens).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("qwen3.gguf");
    let shape = RandomShape {
        n_layer: 4,
        ..RandomShape::tiny()
    };
    random_model(
        "qwen3",
        &shape,
        RandomWeights::One(gguf::TensorType::Q8_0),
        7,
        &file,
    )
    .unwrap();
    staged_equals_whole(&file, &[0, 1, 2, 3, 4], &tokens).await;
}
