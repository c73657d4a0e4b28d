//! Shards between networks in one process, over loopback: from several holders, from bad ones, on from where it was
//! broken off, and not from the first holder alone.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic)] // helpers of tests

mod world;

use std::time::Duration;

use node::{PeerBook, Proto, Transfer, TransferError, transfer::Limits};
use shard_registry::{ShardKind, Store, blobs::encoded_len};
use swarm_proto::{Ask, Give, Hash, LayerRange, Peer, ShardId, encode_frame};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{Instant, timeout},
};
use world::{
    BIG, DEADLINE, Described, ask_once, fetch, frame, is_right, knows, network, next_give, parts,
    peer, seed, serve_badly, world, world_of_experts,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fresh_peer_knows_an_address_and_an_id_and_gets_every_shard() {
    let world = world();
    let (seed, giving) = seed(&world, Limits::default()).await;
    let (manifest, metadata) = world.described.clone();
    seed.serve_fetch(std::sync::Arc::new(Described(manifest, metadata)));
    let net = network(Some(&seed)).await;
    knows(&net, &[seed.me()]).await;
    let store = Store::open(&world.temp.path().join("fresh")).unwrap();
    let transfer = Transfer::new(
        net,
        store.clone(),
        Limits::default(),
        PeerBook::default(),
        false,
    );
    let manifest = timeout(DEADLINE, transfer.describe(world.id))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(*manifest, world.manifest);
    for shard in &world.manifest.shards {
        fetch(&world, &transfer, shard.kind).await.unwrap();
    }
    assert!(store.here(world.id).unwrap().is_whole());
    is_right(&world, "fresh");
    let given = giving.given_bytes();
    for shard in &world.manifest.shards {
        fetch(&world, &transfer, shard.kind).await.unwrap();
    }
    assert_eq!(giving.given_bytes(), given, "it is all here");
    // A bit flips on the disk: only that shard is fetched again.
    let mut bytes = std::fs::read(world.blob("fresh")).unwrap();
    bytes[70_000] ^= 1;
    std::fs::write(world.blob("fresh"), bytes).unwrap();
    fetch(&world, &transfer, BIG).await.unwrap();
    is_right(&world, "fresh");
    assert!(giving.given_bytes() - given <= encoded_len(world.big().bytes, &(0..385)) + 500_000);
}

/// Transfers have a connection of their own, also for the side that is asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_travel_on_a_connection_of_their_own() {
    let world = world();
    let (seed, _giving) = seed(&world, Limits::default()).await;
    let (net, transfer, _) = peer(&world, "fresh", Some(&seed), Limits::default()).await;
    knows(&net, &[seed.me()]).await;
    assert_eq!(net.connections_to(&seed.me()).await, (1, 0));
    fetch(&world, &transfer, BIG).await.unwrap();
    assert_eq!(net.connections_to(&seed.me()).await, (1, 1));
    assert_eq!(seed.connections_to(&net.me()).await, (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_sends_wrong_bytes_is_refused_and_written_down_and_others_are_asked() {
    let world = world();
    let (seed, _giving) = seed(&world, Limits::default()).await;
    let from = world.store("seed");
    let open = std::sync::Arc::new(from.open_shard(world.id, world.big().id).unwrap().unwrap());
    type Say = Box<dyn Fn(&Ask) -> Vec<u8> + Send + Sync>;
    let flipped = {
        let open = open.clone();
        move |ask: &Ask| {
            let mut bytes = Vec::new();
            open.give(&ask.range(), &mut bytes).unwrap();
            let at = bytes.len() / 2;
            bytes[at] ^= 4;
            parts(&bytes)
        }
    };
    let too_long = move |ask: &Ask| {
        let mut bytes = Vec::new();
        open.give(&ask.range(), &mut bytes).unwrap();
        bytes.resize(bytes.len() + 300_000, 0);
        parts(&bytes)
    };
    let bad: Vec<(&str, Say)> = vec![
        ("has another hash", Box::new(flipped)),
        ("bytes of a range", Box::new(too_long)),
        (
            "has another hash",
            Box::new(|_: &Ask| parts(&vec![7; 512 << 10])),
        ),
        ("the limit here is", Box::new(|_: &Ask| vec![0xff; 4096])),
        (
            "bytes of a range",
            Box::new(|_: &Ask| frame(&Give::Part, &[])),
        ),
        (
            "beside a refusal",
            Box::new(|_: &Ask| frame(&Give::Missing, &[1])),
        ),
        (
            "unknown kind",
            Box::new(|_: &Ask| vec![3, 0, 0, 0, 1, 0, 77]),
        ),
    ];
    for (case, (why, say)) in bad.into_iter().enumerate() {
        let liar = network(Some(&seed)).await;
        serve_badly(&liar, say);
        liar.publish(world.advert(&[LayerRange { start: 0, end: 2 }]))
            .await;
        let name = format!("fresh{case}");
        let (net, transfer, book) = peer(&world, &name, Some(&seed), Limits::default()).await;
        knows(&net, &[seed.me(), liar.me()]).await;
        fetch(&world, &transfer, BIG)
            .await
            .unwrap_or_else(|e| panic!("{why}: {e}"));
        is_right(&world, &name);
        let entries = book.entries();
        let entry = entries.iter().find(|entry| entry.peer == liar.me());
        let entry = entry.unwrap_or_else(|| panic!("{why}: {entries:?}"));
        assert!(entry.last.contains(why), "{why}: {}", entry.last);
        assert!(
            entries.iter().all(|entry| entry.peer != seed.me()),
            "{entries:?}"
        );
        net.shutdown().await;
        liar.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_requests_and_absurd_ranges_end_the_stream_and_nothing_else() {
    let world = world();
    let (seed, _giving) = seed(&world, Limits::default()).await;
    let net = network(Some(&seed)).await;
    let addrs = seed.listen_addrs();
    let ask = |first, groups, shard| Ask {
        model: world.id,
        shard,
        first,
        groups,
        shares: false,
        in_vain: false,
    };
    let encoded = |ask: &Ask| {
        let mut out = Vec::new();
        encode_frame(ask, &mut out, |_| {}).unwrap();
        out
    };
    let big = world.big().id;
    let mut with_payload = Vec::new();
    encode_frame(&ask(0, 1, big), &mut with_payload, |out| out.push(1)).unwrap();
    let bad = [
        encoded(&ask(1 << 20, 4, big)),
        encoded(&ask(384, 256, big)),
        with_payload,
        vec![0xff; 1000],
        vec![0; 6],
    ];
    for (case, bytes) in bad.into_iter().enumerate() {
        let mut stream = net
            .open(seed.me(), &addrs, Proto::Transfer, DEADLINE)
            .await
            .unwrap();
        stream.write_all(&bytes).await.unwrap();
        stream.flush().await.unwrap();
        let mut said = Vec::new();
        let _ = timeout(DEADLINE, stream.read_to_end(&mut said))
            .await
            .expect("it ends");
        assert!(said.is_empty(), "{case}: {} bytes", said.len());
    }
    let mut stream = net
        .open(seed.me(), &addrs, Proto::Transfer, DEADLINE)
        .await
        .unwrap();
    let nothing = ask(0, 1, ShardId(Hash([9; 32])));
    let metadata = ask(0, 1, world.manifest.shards[0].id);
    for ask in [nothing, metadata] {
        stream.write_all(&encoded(&ask)).await.unwrap();
        stream.flush().await.unwrap();
        assert_eq!(next_give(&mut stream).await.0, Give::Missing);
    }
    stream.write_all(&encoded(&ask(384, 1, big))).await.unwrap();
    stream.flush().await.unwrap();
    assert_eq!(
        next_give(&mut stream).await.0,
        Give::Part,
        "the last group of it"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_broken_off_goes_on_from_where_it_was() {
    let world = world();
    let slow = Limits {
        upload_bytes_s: Some(4 << 20),
        ..Limits::default()
    };
    let (seed, giving) = seed(&world, slow).await;
    let (net, transfer, _) = peer(&world, "fresh", Some(&seed), Limits::default()).await;
    knows(&net, &[seed.me()]).await;
    let begin = Instant::now();
    let mut here = 0;
    let broken_off = {
        let mut progress = |bytes: u64| here = bytes;
        let fetching = transfer.fetch(world.id, &world.manifest, world.big(), &mut progress);
        timeout(Duration::from_millis(900), fetching).await
    };
    assert!(
        broken_off.is_err(),
        "4 MiB a second: {:?} for 6 MiB",
        begin.elapsed()
    );
    assert!(here > 1 << 20 && here < 5 << 20, "{here}");
    net.shutdown().await;
    drop((net, transfer));
    // As a new process finds it.
    let given = giving.given_bytes();
    let (net, transfer, _) = peer(&world, "fresh", Some(&seed), Limits::default()).await;
    knows(&net, &[seed.me()]).await;
    fetch(&world, &transfer, BIG).await.unwrap();
    is_right(&world, "fresh");
    let again = giving.given_bytes() - given;
    // Ranges that were on their way come again.
    assert!(
        again < world.big().bytes - here + (4 << 20),
        "{again} more after {here}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_shard_is_given_once_and_later_askers_go_to_those_that_have_it() {
    let world = world();
    let slow = Limits {
        upload_bytes_s: Some(3 << 20),
        ..Limits::default()
    };
    let (seed, giving) = seed(&world, slow).await;
    let mut fetching = Vec::new();
    let mut nets = Vec::new();
    for number in 0..4 {
        let name = format!("fresh{number}");
        let (net, transfer, _) = peer(&world, &name, Some(&seed), Limits::default()).await;
        net.publish(world.advert(&[])).await;
        nets.push((net, transfer, name));
    }
    for (net, ..) in &nets {
        let others: Vec<Peer> = nets
            .iter()
            .map(|(net, ..)| net.me())
            .chain([seed.me()])
            .collect();
        knows(net, &others).await;
    }
    let world = std::sync::Arc::new(world);
    for (_, transfer, _) in &nets {
        let (world, transfer) = (world.clone(), transfer.clone());
        fetching.push(tokio::spawn(async move {
            fetch(&world, &transfer, BIG)
                .await
                .map_err(|e| e.to_string())
        }));
    }
    for done in fetching {
        done.await.unwrap().unwrap();
    }
    for (.., name) in &nets {
        is_right(&world, name);
    }
    let copies = giving.given_bytes() as f64 / world.big().bytes as f64;
    assert!(copies < 2.0, "the seed gave {copies} copies to four peers");

    // Those that have it leave: the seed gives it again.
    for (net, ..) in &nets {
        net.shutdown().await;
    }
    let (net, transfer, _) = peer(&world, "late", Some(&seed), Limits::default()).await;
    knows(&net, &[seed.me()]).await;
    fetch(&world, &transfer, BIG).await.unwrap();
    is_right(&world, "late");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_sent_to_somebody_that_does_not_give_it_is_served() {
    let world = world();
    let (seed, giving) = seed(&world, Limits::default()).await;
    // Asks for one group, and will never give it on though it says so.
    let greedy = network(Some(&seed)).await;
    let mut stream = greedy
        .open(seed.me(), &seed.listen_addrs(), Proto::Transfer, DEADLINE)
        .await
        .unwrap();
    let ask = Ask {
        model: world.id,
        shard: world.big().id,
        first: 0,
        groups: 1,
        shares: true,
        in_vain: false,
    };
    let mut bytes = Vec::new();
    encode_frame(&ask, &mut bytes, |_| {}).unwrap();
    stream.write_all(&bytes).await.unwrap();
    stream.flush().await.unwrap();
    assert_eq!(next_give(&mut stream).await.0, Give::Part);
    serve_badly(&greedy, |_| frame(&Give::Later, &[]));
    let (net, transfer, _) = peer(&world, "fresh", Some(&seed), Limits::default()).await;
    knows(&net, &[seed.me()]).await;
    let begin = Instant::now();
    fetch(&world, &transfer, BIG).await.unwrap();
    assert!(
        begin.elapsed() > Duration::from_secs(2),
        "it was sent away first"
    );
    assert!(giving.given_bytes() > world.big().bytes);
    is_right(&world, "fresh");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_limit_is_kept() {
    let world = world();
    let slow = Limits {
        upload_bytes_s: Some(4 << 20),
        ..Limits::default()
    };
    let (seed, _giving) = seed(&world, slow).await;
    let (net, transfer, _) = peer(&world, "fresh", Some(&seed), Limits::default()).await;
    knows(&net, &[seed.me()]).await;
    let begin = Instant::now();
    fetch(&world, &transfer, BIG).await.unwrap();
    // 6 MiB, less the burst.
    assert!(
        begin.elapsed() > Duration::from_millis(1300),
        "{:?}",
        begin.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_limit_of_nothing_gives_nothing_and_says_so_at_once() {
    let world = world();
    let nothing = Limits {
        upload_bytes_s: Some(0),
        ..Limits::default()
    };
    let (seed, giving) = seed(&world, nothing).await;
    let asker = network(Some(&seed)).await;
    let said = ask_once(&asker, &seed, world.ask(1)).await;
    assert_eq!(said, (Give::Missing, Vec::new()));
    assert_eq!(giving.given_bytes(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_nobody_has_is_named() {
    let world = world();
    let seed = network(None).await;
    let (net, transfer, _) = peer(&world, "fresh", Some(&seed), Limits::default()).await;
    let mut peers = net.peers();
    timeout(DEADLINE, peers.wait_for(|peers| !peers.is_empty()))
        .await
        .unwrap()
        .unwrap();
    let error = fetch(&world, &transfer, BIG).await.unwrap_err();
    assert!(matches!(error, TransferError::NoHolder { .. }), "{error}");
    assert!(error.to_string().contains("layer 1"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_expert_is_fetched_and_read_without_the_others() {
    let world = world_of_experts();
    let (net, _transfer) = seed(&world, Limits::default()).await;
    let (other, transfer, _book) = peer(&world, "other", Some(&net), Limits::default()).await;
    knows(&other, &[net.me()]).await;
    let kind = |expert| ShardKind::Expert { layer: 1, expert };
    fetch(&world, &transfer, kind(2)).await.unwrap();
    fetch(&world, &transfer, ShardKind::Layer(1)).await.unwrap();

    let (name, mut here, mut there) = ("blk.1.ffn_down_exps.weight", Vec::new(), Vec::new());
    let reader = world.store("other").reader(world.id).unwrap();
    let all = world.store("seed").reader(world.id).unwrap();
    reader.read_expert(name, 2, &mut here).unwrap();
    all.read_expert(name, 2, &mut there).unwrap();
    assert!(!here.is_empty() && here == there);
    reader
        .read_tensor("blk.1.ffn_gate_inp.weight", &mut here)
        .unwrap();
    let absent = reader.read_expert(name, 1, &mut here).unwrap_err();
    let absent = absent.to_string();
    assert!(
        absent.starts_with("expert 1 of layer 1 of model"),
        "{absent}"
    );
    assert!(
        reader.read_tensor(name, &mut here).is_err(),
        "not all of it"
    );
}
