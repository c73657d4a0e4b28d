//! Serving nodes in one process, the demo model, real sessions: the wiring from a name to tokens.
#![allow(clippy::expect_used)] // helpers of tests

use std::{collections::HashSet, ops::Range, time::Duration};

use engine::{RandomShape, RandomWeights, random_model};
use node::{
    Access, Client, Identity, NetConfig, NodeConfig, Privacy, Session, SessionSpec, SwarmNode,
    config::{FileConfig, Settings},
};
use swarm_proto::{Form, LayerRange, Peer, Want, WantRows};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(60);
const MEMORY: u64 = 256 << 20;

fn settings(home: &TempDir, peers: Vec<String>) -> Settings {
    Settings {
        home: home.path().to_owned(),
        swarm: "t".parse().expect("swarm id"),
        key: None,
        peers,
        mdns: false,
        access: Access::Open,
        otlp: None,
        log: None,
        log_json: false,
        file: FileConfig::default(),
    }
}

async fn serve(
    layers: Option<Range<u32>>,
    memory: u64,
    peers: Vec<String>,
) -> (SwarmNode, TempDir) {
    serve_all(&["demo"], layers, memory, peers).await
}

async fn serve_all(
    models: &[&str],
    layers: Option<Range<u32>>,
    memory: u64,
    peers: Vec<String>,
) -> (SwarmNode, TempDir) {
    let home = tempfile::tempdir().expect("temp dir");
    let config = NodeConfig {
        settings: settings(&home, peers),
        models: models.iter().map(|model| String::from(*model)).collect(),
        turn: Duration::from_secs(1),
        layers,
        memory: Some(memory),
        hold: Default::default(),
        island_rtt: Duration::from_micros(500),
        announce: Vec::new(),
        listen: vec!["/ip4/127.0.0.1/tcp/0".into()],
        threads: Some(1),
        transfer: Default::default(),
        cpu_share: Default::default(),
        quiet_hours: Default::default(),
        metrics: None,
    };
    (SwarmNode::start(config).await.expect("node starts"), home)
}

async fn client(node: &SwarmNode) -> Client {
    let config = NetConfig::client(Identity::generate(), "t".parse().expect("swarm id"));
    let config = NetConfig {
        bootstrap: node.net().listen_addrs(),
        ..config
    };
    Client::connect(config, Privacy::Open, None)
        .await
        .expect("client starts")
}

/// Waits until the client knows adverts of all these.
async fn hears(client: &Client, nodes: &[&SwarmNode]) {
    let wanted: HashSet<Peer> = nodes.iter().map(|node| node.peer()).collect();
    let mut changes = client.net().adverts().changes();
    let heard = async {
        loop {
            let live = |a: &swarm_proto::Advert| a.models.iter().any(|m| !m.live.is_empty());
            let known: HashSet<Peer> = client
                .adverts()
                .adverts
                .iter()
                .filter(|a| live(a))
                .map(|a| a.peer)
                .collect();
            if known.is_superset(&wanted) {
                return;
            }
            changes.changed().await.expect("network lives");
        }
    };
    tokio::time::timeout(DEADLINE, heard)
        .await
        .expect("adverts in time");
}

const WANT: Want = Want {
    rows: WantRows::Last,
    form: Form::Top(8),
};

/// A session that was fed the beginning.
async fn begin(client: &Client, node: &SwarmNode, avoid: Vec<Peer>) -> Session {
    let model = node.hosted()[0].model;
    let manifest = client.manifest(&model).await.expect("manifest");
    let mut spec = SessionSpec::new(model, &manifest, 64);
    spec.avoid = avoid;
    let mut session = client.open(&spec).await.expect("session opens");
    session.feed(&[1, 2, 3, 4, 5], WANT).await.expect("feeds");
    session
}

/// So many greedy tokens more.
async fn go_on(session: &mut Session, n: usize) -> Vec<u32> {
    let mut tokens = Vec::new();
    while tokens.len() < n {
        let row = session.next_logits().await.expect("answers");
        let token = row.argmax().expect("finite");
        tokens.push(token);
        session.feed(&[token], WANT).await.expect("feeds");
    }
    tokens
}

/// Greedy tokens, and the peers of the route.
async fn greedy(client: &Client, node: &SwarmNode, avoid: Vec<Peer>) -> (Vec<u32>, Vec<Peer>) {
    let mut session = begin(client, node, avoid).await;
    let route = session.route().iter().map(|hop| hop.peer).collect();
    let tokens = go_on(&mut session, 12).await;
    session.close().await;
    (tokens, route)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_answer_as_one_that_holds_everything_and_leave_in_good_order() {
    let (first, _a) = serve(Some(0..3), MEMORY, Vec::new()).await;
    let peers = first.net().listen_addrs();
    let (second, _b) = serve(Some(3..6), MEMORY, peers.clone()).await;
    let (third, _c) = serve(Some(6..8), MEMORY, peers.clone()).await;
    let (whole, _d) = serve(Some(0..8), MEMORY, peers).await;
    let client = client(&first).await;
    hears(&client, &[&first, &second, &third, &whole]).await;
    let parts = [&first, &second, &third].map(SwarmNode::peer);
    let (staged, route) = greedy(&client, &first, vec![whole.peer()]).await;
    assert_eq!(route, parts);
    let (alone, route) = greedy(&client, &first, parts.to_vec()).await;
    assert_eq!(route, [whole.peer()]);
    assert_eq!(staged, alone);
    let start = std::time::Instant::now();
    for node in [second, third, whole] {
        node.shutdown().await;
    }
    assert!(
        start.elapsed() < 3 * Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
    let mut changes = client.net().adverts().changes();
    let left = async {
        while client.adverts().adverts.len() > 1 {
            changes.changed().await.expect("network lives");
        }
    };
    tokio::time::timeout(DEADLINE, left)
        .await
        .expect("withdrawn before the adverts expire");
    let manifest = client
        .manifest(&first.hosted()[0].model)
        .await
        .expect("manifest");
    let spec = SessionSpec::new(first.hosted()[0].model, &manifest, 64);
    let error = client
        .open(&spec)
        .await
        .map(drop)
        .expect_err("layers 3..8 are gone")
        .to_string();
    assert!(error.contains("3..8"), "{error}");
    first.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_with_small_budgets_cover_the_model_between_them() {
    const THREE_LAYERS: u64 = 4 << 20;
    let (first, _a) = serve(None, THREE_LAYERS, Vec::new()).await;
    let mut nodes = vec![(first, _a)];
    let mut covered: HashSet<u32> = nodes[0].0.hosted()[0].layers.clone().collect();
    assert_eq!(covered.len(), 3);
    // One after the other: each takes what is covered worst, so four of them cover eight layers.
    for _ in 0..3 {
        let peers = nodes[0].0.net().listen_addrs();
        let (node, home) = serve(None, THREE_LAYERS, peers).await;
        assert_eq!(node.hosted()[0].layers.len(), 3);
        covered.extend(node.hosted()[0].layers.clone());
        nodes.push((node, home));
    }
    assert_eq!(
        covered.len(),
        8,
        "{:?}",
        nodes
            .iter()
            .map(|(n, _)| n.hosted()[0].layers.clone())
            .collect::<Vec<_>>()
    );
    for (node, _) in nodes {
        node.shutdown().await;
    }
}

/// Waits until the client hears that a node serves exactly these layers.
async fn serves(client: &Client, node: &SwarmNode, layers: LayerRange) {
    let mut changes = client.net().adverts().changes();
    let there = |advert: &swarm_proto::Advert| {
        let live = advert.models.iter().map(|model| &model.live[..]);
        advert.peer == node.peer() && live.into_iter().any(|live| live == [layers])
    };
    let heard = async {
        while !client.adverts().adverts.iter().any(|a| there(a)) {
            changes.changed().await.expect("network lives");
        }
    };
    tokio::time::timeout(DEADLINE, heard)
        .await
        .expect("it moves in time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_moves_where_it_is_needed_and_its_sessions_lose_nothing() {
    const FOUR_LAYERS: u64 = 9 << 19;
    let (ends, first_half) = (
        LayerRange { start: 4, end: 8 },
        LayerRange { start: 0, end: 4 },
    );
    let (last, _a) = serve(Some(4..8), MEMORY, Vec::new()).await;
    let peers = last.net().listen_addrs();
    let (mover, _b) = serve(None, FOUR_LAYERS, peers.clone()).await;
    let client = client(&last).await;
    serves(&client, &mover, first_half).await;
    serves(&client, &last, ends).await;
    let (expected, _) = greedy(&client, &last, Vec::new()).await;
    let mut session = begin(&client, &last, Vec::new()).await;
    let route: Vec<Peer> = session.route().iter().map(|hop| hop.peer).collect();
    assert_eq!(route, [mover.peer(), last.peer()]);
    let mut tokens = go_on(&mut session, 5).await;
    // With others where it is, it is needed where only one is.
    let mut others = Vec::new();
    for _ in 0..3 {
        others.push(serve(Some(0..4), MEMORY, peers.clone()).await);
    }
    serves(&client, &mover, ends).await;
    tokens.extend(go_on(&mut session, 7).await);
    assert_eq!(tokens, expected);
    let lost: Vec<&str> = session.recoveries().iter().map(|r| &r.lost[..]).collect();
    assert!(
        lost.len() == 1 && lost[0].contains("no longer served here"),
        "{lost:?}"
    );
    let entries = client.book().entries();
    assert!(
        entries.iter().all(|entry| entry.failures == 0),
        "{entries:?}"
    );
    session.close().await;
    let (again, _) = greedy(&client, &last, vec![last.peer()]).await;
    assert_eq!(again, expected, "the layers that were loaded on the way");
    for (node, _home) in others {
        node.shutdown().await;
    }
    mover.shutdown().await;
    last.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_serves_several_models_within_one_budget() {
    let folder = tempfile::tempdir().expect("temp dir");
    let file = folder.path().join("tiny.gguf");
    let weights = RandomWeights::One(gguf::TensorType::Q8_0);
    random_model("qwen3", &RandomShape::tiny(), weights, 7, &file).expect("a model");
    let models = ["demo", file.to_str().expect("a path"), "demo"];
    let (both, _a) = serve_all(&models, None, MEMORY, Vec::new()).await;
    let hosted = both.hosted().to_vec();
    assert_eq!(hosted.len(), 2, "each once: {hosted:?}");
    let client = client(&both).await;
    hears(&client, &[&both]).await;
    for one in &hosted {
        let manifest = client.manifest(&one.model).await.expect("manifest");
        assert_eq!(one.layers, 0..u32::from(manifest.n_layer));
        let spec = SessionSpec::new(one.model, &manifest, 64);
        let mut session = client.open(&spec).await.expect("session opens");
        session.feed(&[1, 2, 3], WANT).await.expect("feeds");
        go_on(&mut session, 3).await;
        session.close().await;
    }
    both.shutdown().await;
}
