//! Shards between networks in one process, over loopback: from several holders, from bad ones, on from where it was
//! broken off, and not from the first holder alone.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic)] // helpers of tests

#[path = "../../shard-registry/tests/support/mod.rs"]
mod support;

use std::{path::PathBuf, time::Duration};

use gguf::TensorType;
use node::{
    Identity, Net, NetConfig, PeerBook, Proto, Stream, Transfer, TransferError, net::Announcement,
    transfer::Limits,
};
use shard_registry::{Manifest, ShardEntry, ShardKind, Store, blobs::encoded_len};
use support::Model;
use swarm_proto::{
    Ask, FrameDecoder, FrameLimits, Give, Hash, LayerRange, Message, ModelAdvert, ModelId, Peer,
    ShardId, decode_header, encode_frame, transfer::PART_BYTES_MAX,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{Instant, timeout},
};

const DEADLINE: Duration = Duration::from_secs(60);
const BIG: ShardKind = ShardKind::Layer(1);

/// A model with one layer of 6 MiB, imported in the folder of whoever seeds it.
struct World {
    temp: tempfile::TempDir,
    id: ModelId,
    manifest: Manifest,
    described: (Vec<u8>, Vec<u8>),
}

fn world() -> World {
    let temp = tempfile::tempdir().unwrap();
    let mut model = Model::dense(2);
    model.tensor("blk.1.big.weight", &[32, 49_152], TensorType::F32);
    model.write(&temp.path().join("model.gguf"));
    let store = Store::open(&temp.path().join("seed")).unwrap();
    let id = store
        .import(&temp.path().join("model.gguf"), None, &mut |_| {})
        .unwrap()
        .id;
    World {
        id,
        manifest: store.manifest(id).unwrap(),
        described: (
            store.manifest_bytes(id).unwrap(),
            store.metadata(id).unwrap(),
        ),
        temp,
    }
}

impl World {
    fn store(&self, name: &str) -> Store {
        let store = Store::open(&self.temp.path().join(name)).unwrap();
        store
            .put_fetched(&self.described.0, &self.described.1)
            .unwrap();
        store
    }

    fn big(&self) -> &ShardEntry {
        self.manifest.shard(BIG).unwrap()
    }

    fn blob(&self, name: &str) -> PathBuf {
        let blobs = self.temp.path().join(name).join("blobs");
        blobs.join(self.big().id.to_string())
    }

    fn advert(&self, layers: &[LayerRange]) -> Announcement {
        let model = ModelAdvert {
            model: self.id,
            name: "tiny".into(),
            n_layer: 2,
            live: Vec::new(),
            intended: Vec::new(),
            layer_tokens_s: None,
            n_ctx_max: 0,
            free_cells: 0,
            n_embd: 32,
            numerics: 0,
            stored: layers.to_vec(),
            layer_bytes_max: None,
        };
        Announcement {
            models: vec![model],
            ..Announcement::default()
        }
    }
}

async fn network(near: Option<&Net>) -> Net {
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

/// A peer of the world: `seed` has everything, others what they fetch.
async fn peer(
    world: &World,
    name: &str,
    near: Option<&Net>,
    limits: Limits,
) -> (Net, Transfer, PeerBook) {
    let net = network(near).await;
    let book = PeerBook::default();
    let store = world.store(name);
    let transfer = Transfer::new(net.clone(), store, limits, book.clone(), true);
    transfer.serve().expect("nobody serves yet");
    (net, transfer, book)
}

async fn seed(world: &World, limits: Limits) -> (Net, Transfer) {
    let (net, transfer, _) = peer(world, "seed", None, limits).await;
    net.publish(world.advert(&[LayerRange { start: 0, end: 2 }]))
        .await;
    (net, transfer)
}

async fn knows(net: &Net, wanted: &[Peer]) {
    let mut changes = net.adverts().changes();
    let seen = async {
        while !wanted
            .iter()
            .all(|peer| !net.adverts().addrs(peer).is_empty())
        {
            changes.changed().await.unwrap();
        }
    };
    timeout(DEADLINE, seen).await.expect("in time");
}

async fn fetch(world: &World, transfer: &Transfer, kind: ShardKind) -> Result<(), TransferError> {
    let shard = world.manifest.shard(kind).unwrap();
    let mut last = 0;
    let mut progress = |here: u64| {
        assert!(here >= last, "{here} after {last}");
        last = here;
    };
    let fetching = transfer.fetch(world.id, &world.manifest, shard, &mut progress);
    timeout(DEADLINE, fetching).await.expect("in time")?;
    assert_eq!(last, shard.bytes);
    Ok(())
}

fn is_right(world: &World, name: &str) {
    let bytes = std::fs::read(world.blob(name)).unwrap();
    assert_eq!(ShardId::of(&bytes), world.big().id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fresh_peer_knows_an_address_and_an_id_and_gets_every_shard() {
    let world = world();
    let (seed, giving) = seed(&world, Limits::default()).await;
    struct Description(Vec<u8>, Vec<u8>);
    impl node::net::Shelf for Description {
        fn manifest(&self, _: &ModelId) -> std::io::Result<Option<Vec<u8>>> {
            Ok(Some(self.0.clone()))
        }
        fn shard(&self, _: &ShardId) -> std::io::Result<Option<Vec<u8>>> {
            Ok(Some(self.1.clone()))
        }
    }
    let (manifest, metadata) = world.described.clone();
    seed.serve_fetch(std::sync::Arc::new(Description(manifest, metadata)));
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

/// Takes transfer streams and says what `say` makes of each request.
fn serve_badly(net: &Net, say: impl Fn(&Ask) -> Vec<u8> + Send + Sync + 'static) {
    let mut streams = net.accept(Proto::Transfer).expect("nobody serves yet");
    let say = std::sync::Arc::new(say);
    tokio::spawn(async move {
        while let Some((_, stream)) = streams.recv().await {
            let say = say.clone();
            tokio::spawn(async move {
                let mut stream = stream;
                while let Some(ask) = next_ask(&mut stream).await {
                    if stream.write_all(&say(&ask)).await.is_err() {
                        return;
                    }
                    let _ = stream.flush().await;
                }
            });
        }
    });
}

async fn next_ask(stream: &mut Stream) -> Option<Ask> {
    let mut prefix = [0; 6];
    stream.read_exact(&mut prefix).await.ok()?;
    let mut header = vec![0; usize::from(u16::from_le_bytes([prefix[4], prefix[5]]))];
    stream.read_exact(&mut header).await.ok()?;
    decode_header(&header).ok()
}

fn frame(give: &Give, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    encode_frame(give, &mut out, |out| out.extend_from_slice(payload)).unwrap();
    out
}

fn parts(bytes: &[u8]) -> Vec<u8> {
    bytes
        .chunks(PART_BYTES_MAX)
        .flat_map(|part| frame(&Give::Part, part))
        .collect()
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

async fn next_give(stream: &mut Stream) -> (Give, Vec<u8>) {
    let mut decoder = FrameDecoder::new(FrameLimits {
        header_max: Give::BYTES_MAX,
        payload_max: PART_BYTES_MAX,
    });
    let mut bytes = vec![0; 1 << 16];
    loop {
        if let Some((header, payload)) = decoder.next().unwrap() {
            let give = decode_header(decoder.bytes(header)).unwrap();
            return (give, decoder.bytes(payload).to_vec());
        }
        let n = timeout(DEADLINE, stream.read(&mut bytes))
            .await
            .unwrap()
            .unwrap();
        assert_ne!(n, 0, "it closed the stream");
        decoder.push(&bytes[..n]);
    }
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
