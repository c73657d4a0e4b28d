//! Adverts and fetching between networks in one process, over loopback.
#![allow(clippy::expect_used)] // helpers of tests

use std::{collections::HashSet, io, sync::Arc, time::Duration};

use node::{
    Access, Identity, Net, NetConfig, PeerBook, Proto,
    net::{Announcement, FetchError, Shelf},
};
use swarm_proto::{
    Fetch, Found, FrameDecoder, FrameLimits, Hash, LayerRange, Message, ModelAdvert, ModelId, Peer,
    ShardId, decode_header, encode_frame,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const DEADLINE: Duration = Duration::from_secs(20);

fn config() -> NetConfig {
    let config = NetConfig::client(Identity::generate(), "t".parse().expect("swarm id"));
    NetConfig {
        listen: vec!["/ip4/127.0.0.1/tcp/0".into()],
        ..config
    }
}

async fn start(config: NetConfig) -> Net {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_test_writer()
        .try_init();
    Net::start(config).await.expect("network starts")
}

fn model() -> ModelId {
    ModelId(Hash([7; 32]))
}

fn announcement(free_cells: u64) -> Announcement {
    let span = LayerRange { start: 0, end: 4 };
    let model = ModelAdvert {
        model: model(),
        name: "tiny".into(),
        n_layer: 4,
        live: vec![span],
        intended: vec![span],
        layer_tokens_s: None,
        n_ctx_max: 64,
        free_cells,
        n_embd: 8,
        numerics: 1,
        stored: Vec::new(),
        layer_bytes_max: None,
        experts: None,
    };
    Announcement {
        models: vec![model],
        ..Announcement::default()
    }
}

/// Waits until `net` knows what `wanted` looks for.
async fn until(net: &Net, wanted: impl Fn(&Net) -> bool) {
    let mut changes = net.adverts().changes();
    let seen = async {
        while !wanted(net) {
            changes.changed().await.expect("network lives");
        }
    };
    tokio::time::timeout(DEADLINE, seen).await.expect("in time");
}

fn knows(peer: Peer) -> impl Fn(&Net) -> bool {
    move |net| {
        net.adverts()
            .holders(&model())
            .iter()
            .any(|(p, _)| *p == peer)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_advert_reaches_a_third_node_through_the_middle_one_and_so_does_its_withdrawal() {
    let middle = start(config()).await;
    // Neither end may talk to the other: what arrives came through the middle.
    let end = || {
        let access = Access::Listed(HashSet::from([middle.me()]));
        NetConfig {
            access,
            bootstrap: middle.listen_addrs(),
            ..config()
        }
    };
    let (left, right) = (start(end()).await, start(end()).await);
    left.publish(announcement(1)).await;
    until(&right, knows(left.me())).await;
    let holders = right.adverts().holders(&model());
    assert_eq!(holders.len(), 1);
    assert!(
        holders[0].1[0].starts_with("/ip4/127.0.0.1/tcp/"),
        "{holders:?}"
    );
    left.shutdown().await;
    until(&right, |net| net.adverts().holders(&model()).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_is_told_before_the_next_interval() {
    let first = start(config()).await;
    let second = start(NetConfig {
        bootstrap: first.listen_addrs(),
        ..config()
    })
    .await;
    second.publish(announcement(1)).await;
    until(&first, knows(second.me())).await;
    let start = std::time::Instant::now();
    second.publish(announcement(2)).await;
    let cells = |net: &Net| {
        let snapshot = net.adverts().snapshot();
        snapshot
            .adverts
            .iter()
            .any(|a| a.models.iter().any(|m| m.free_cells == 2))
    };
    until(&first, cells).await;
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newcomer_gets_a_snapshot_as_it_connects() {
    let (server, holder) = (start(config()).await, start(config()).await);
    server
        .serve_fetch(Arc::new(()))
        .expect("nobody else serves");
    holder
        .dial(&server.listen_addrs()[0])
        .await
        .expect("an address");
    holder.publish(announcement(1)).await;
    until(&server, knows(holder.me())).await;
    let client = NetConfig {
        listen: Vec::new(),
        bootstrap: server.listen_addrs(),
        ..config()
    };
    let client = start(client).await;
    assert!(client.synced(DEADLINE).await, "a snapshot arrives");
    assert!(knows(holder.me())(&client));
}

/// Peers that offer snapshots and give none do not use up the turn of one that does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_that_fail_do_not_keep_the_next_peer_from_being_asked() {
    let newcomer = start(config()).await;
    let addr = &newcomer.listen_addrs()[0];
    let mut bad = Vec::new();
    for _ in 0..3 {
        let net = start(config()).await;
        let mut requests = net.accept(Proto::Fetch).expect("free");
        net.dial(addr).await.expect("an address");
        let asked = tokio::time::timeout(DEADLINE, requests.recv());
        drop(asked.await.expect("it is asked"));
        bad.push((net, requests));
    }
    let good = start(config()).await;
    good.serve_fetch(Arc::new(())).expect("nobody else serves");
    good.dial(addr).await.expect("an address");
    assert!(newcomer.synced(DEADLINE).await, "the fourth is asked");
}

struct One {
    manifest: Vec<u8>,
    shard: Vec<u8>,
}

impl Shelf for One {
    fn manifest(&self, _: &ModelId) -> io::Result<Option<Vec<u8>>> {
        Ok(Some(self.manifest.clone()))
    }

    fn shard(&self, id: &ShardId) -> io::Result<Option<Vec<u8>>> {
        Ok((*id == ShardId::of(&self.shard) || id.0.0 == [9; 32]).then(|| self.shard.clone()))
    }
}

async fn holder_and_client(shelf: impl Shelf) -> (Net, Net) {
    let holder = start(config()).await;
    holder
        .serve_fetch(Arc::new(shelf))
        .expect("nobody else serves");
    let client = NetConfig {
        listen: Vec::new(),
        bootstrap: holder.listen_addrs(),
        ..config()
    };
    let client = start(client).await;
    holder.publish(announcement(1)).await;
    until(&client, knows(holder.me())).await;
    (holder, client)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_is_fetched_by_its_hash_and_other_bytes_are_refused() {
    let shard: Vec<u8> = (0..300_000u32).map(|i| i as u8).collect();
    let wanted = ShardId::of(&shard);
    let (holder, client) = holder_and_client(One {
        manifest: b"no manifest".to_vec(),
        shard: shard.clone(),
    })
    .await;
    assert_eq!(holder.uplink(), None, "nothing was uploaded yet");
    assert_eq!(
        client
            .fetch_shard(&model(), &wanted, &PeerBook::default())
            .await
            .expect("fetched"),
        shard
    );
    let measured = async {
        while holder.uplink().is_none() {
            tokio::task::yield_now().await;
        }
    };
    let measured = tokio::time::timeout(DEADLINE, measured).await;
    measured.expect("the uplink is measured by it");
    let lied = client
        .fetch_shard(&model(), &ShardId(Hash([9; 32])), &PeerBook::default())
        .await;
    assert!(
        matches!(&lied, Err(FetchError::Hash { peer, .. }) if *peer == holder.me()),
        "{lied:?}"
    );
    let missing = client
        .fetch_shard(&model(), &ShardId(Hash([8; 32])), &PeerBook::default())
        .await;
    assert!(
        matches!(missing, Err(FetchError::Missing { .. })),
        "{missing:?}"
    );
    let manifest = client
        .fetch_manifest(&model(), &PeerBook::default())
        .await
        .map(drop);
    assert!(
        matches!(manifest, Err(FetchError::Hash { .. })),
        "{manifest:?}"
    );
    let nobody = client
        .fetch_manifest(&ModelId(Hash([1; 32])), &PeerBook::default())
        .await
        .map(drop);
    assert!(
        matches!(nobody, Err(FetchError::NoHolder { .. })),
        "{nobody:?}"
    );
}

/// Silent requests are given up after ten seconds; until then they hold places, but only their own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_asks_slowly_and_often_keeps_nobody_waiting() {
    let shard = b"for everybody".to_vec();
    let wanted = ShardId::of(&shard);
    let (holder, client) = holder_and_client(One {
        manifest: Vec::new(),
        shard: shard.clone(),
    })
    .await;
    let greedy = start(NetConfig {
        listen: Vec::new(),
        ..config()
    })
    .await;
    let addrs = holder.listen_addrs();
    let mut silent = Vec::new();
    for _ in 0..40 {
        let stream = greedy.open(holder.me(), &addrs, Proto::Fetch, DEADLINE);
        silent.push(stream.await.expect("opens"));
    }
    let model = model();
    let book = PeerBook::default();
    let fetched = client.fetch_shard(&model, &wanted, &book);
    let fetched = tokio::time::timeout(Duration::from_secs(8), fetched).await;
    assert_eq!(fetched.expect("not kept waiting").expect("served"), shard);
}

/// Whatever a client writes, the server answers by closing, and goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_requests_close_the_stream_and_nothing_else() {
    let shard = b"still here".to_vec();
    let wanted = ShardId::of(&shard);
    let (holder, client) = holder_and_client(One {
        manifest: Vec::new(),
        shard: shard.clone(),
    })
    .await;
    let garbage: [&[u8]; 5] = [
        &[0xff; 4096],
        &[0, 0, 0, 0, 0, 0],
        &[1, 0, 0, 0, 9, 9, 9],
        &[5, 0, 0, 0, 3, 0, 99, 99, 99],
        b"GET / HTTP/1.1\r\n\r\n",
    ];
    for bytes in garbage {
        let stream = client.open(holder.me(), &[], Proto::Fetch, DEADLINE).await;
        let mut stream = stream.expect("opens");
        // The server may have closed before all is written: that is what is wanted.
        let _ = stream.write_all(bytes).await;
        let _ = stream.flush().await;
        let mut reply = Vec::new();
        let end = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut reply)).await;
        let _ = end.expect("closed in time");
        assert!(reply.is_empty(), "{reply:?}");
    }
    assert_eq!(
        client
            .fetch_shard(&model(), &wanted, &PeerBook::default())
            .await
            .expect("served"),
        shard
    );
}

/// Whatever a server writes, the client says what is wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_replies_are_refused() {
    let holder = start(config()).await;
    let mut requests = holder.accept(Proto::Fetch).expect("free");
    let frame = |header: &Found, payload: &[u8]| {
        let mut out = Vec::new();
        encode_frame(header, &mut out, |out| out.extend_from_slice(payload)).expect("a frame");
        out
    };
    let replies: Vec<Vec<u8>> = vec![
        vec![0xff; 64],
        frame(&Found::Chunk, b"early"),
        [
            frame(&Found::Bytes { len: 4 }, b""),
            frame(&Found::Chunk, b"too long"),
        ]
        .concat(),
        [
            frame(&Found::Bytes { len: 4 }, b""),
            frame(&Found::Missing, b""),
        ]
        .concat(),
        [
            frame(&Found::Bytes { len: 4 }, b""),
            frame(&Found::Chunk, b""),
        ]
        .concat(),
        frame(&Found::Bytes { len: 64 << 20 }, b""),
    ];
    let count = replies.len();
    tokio::spawn(async move {
        // The client asks once of itself, as it connects: the list goes round.
        for reply in replies.into_iter().cycle() {
            let Some((_, mut stream)) = requests.recv().await else {
                return;
            };
            let mut decoder = FrameDecoder::new(FrameLimits {
                header_max: Fetch::BYTES_MAX,
                payload_max: 0,
            });
            let mut buf = [0; 256];
            while let Ok(n @ 1..) = stream.read(&mut buf).await {
                decoder.push(&buf[..n]);
                if let Ok(Some((header, _))) = decoder.next() {
                    decode_header::<Fetch>(decoder.bytes(header)).expect("a request");
                    break;
                }
            }
            let _ = stream.write_all(&reply).await;
            let _ = stream.shutdown().await;
        }
    });
    let client = start(NetConfig {
        listen: Vec::new(),
        ..config()
    })
    .await;
    for n in 0..count {
        let bad = client
            .fetch_snapshot(holder.me(), &holder.listen_addrs())
            .await;
        assert!(
            matches!(bad, Err(FetchError::Reply { .. } | FetchError::Io { .. })),
            "{n}: {bad:?}"
        );
    }
}
