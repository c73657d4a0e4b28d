//! Serving nodes in one process, the demo model, real sessions: the wiring from a name to tokens.
#![allow(clippy::expect_used)] // helpers of tests

use std::{collections::HashSet, ops::Range, time::Duration};

use node::{
    Access, Client, Identity, NetConfig, NodeConfig, Privacy, SessionSpec, SwarmNode,
    config::{FileConfig, Settings},
};
use swarm_proto::{Form, Peer, Want, WantRows};
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
    let home = tempfile::tempdir().expect("temp dir");
    let config = NodeConfig {
        settings: settings(&home, peers),
        model: "demo".into(),
        layers,
        memory: Some(memory),
        announce: Vec::new(),
        listen: vec!["/ip4/127.0.0.1/tcp/0".into()],
        threads: Some(1),
        transfer: Default::default(),
        cpu_share: Default::default(),
        quiet_hours: Default::default(),
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

/// Greedy tokens, and the peers of the route.
async fn greedy(client: &Client, node: &SwarmNode, avoid: Vec<Peer>) -> (Vec<u32>, Vec<Peer>) {
    let manifest = client.manifest(&node.model()).await.expect("manifest");
    let mut spec = SessionSpec::new(node.model(), &manifest, 64);
    spec.avoid = avoid;
    let mut session = client.open(&spec).await.expect("session opens");
    let want = Want {
        rows: WantRows::Last,
        form: Form::Top(8),
    };
    let route = session.route().iter().map(|hop| hop.peer).collect();
    let mut tokens = Vec::new();
    session.feed(&[1, 2, 3, 4, 5], want).await.expect("feeds");
    while tokens.len() < 12 {
        let row = session.next_logits().await.expect("answers");
        let token = row.argmax().expect("finite");
        tokens.push(token);
        session.feed(&[token], want).await.expect("feeds");
    }
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
    let manifest = client.manifest(&first.model()).await.expect("manifest");
    let spec = SessionSpec::new(first.model(), &manifest, 64);
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
    let mut covered: HashSet<u32> = nodes[0].0.layers().collect();
    assert_eq!(covered.len(), 3);
    // One after the other: each takes what is covered worst, so four of them cover eight layers.
    for _ in 0..3 {
        let peers = nodes[0].0.net().listen_addrs();
        let (node, home) = serve(None, THREE_LAYERS, peers).await;
        assert_eq!(node.layers().len(), 3);
        covered.extend(node.layers());
        nodes.push((node, home));
    }
    assert_eq!(
        covered.len(),
        8,
        "{:?}",
        nodes.iter().map(|(n, _)| n.layers()).collect::<Vec<_>>()
    );
    for (node, _) in nodes {
        node.shutdown().await;
    }
}
