//! Holders that stall, dribble, break off and send other bytes than they were asked for, models that cannot be, and
//! blobs that the disk damages under a node that runs: nobody waits long, nothing wrong is kept or given.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic)] // helpers of tests

mod world;

use std::{os::unix::fs::FileExt, path::Path, sync::Arc, time::Duration};

use gguf::{TensorType, Value};
use node::{Net, PeerBook, Stream, Transfer, TransferError, net::FetchError, transfer::Limits};
use shard_registry::{Manifest, ShardKind, Store, Tensor};
use swarm_proto::{Give, transfer::GROUP_BYTES};
use tokio::{
    io::AsyncWriteExt,
    sync::mpsc,
    time::{Instant, timeout},
};
use world::{
    BIG, DEADLINE, Described, World, ask_once, behave_badly, fetch, frame, is_right, knows,
    network, next_ask, parts, peer, seed, serve_badly, world, world_of,
};

/// With it a shard of 6 MiB takes 0.75 s: time for others to be asked for ranges, too.
fn rather_slow() -> Limits {
    Limits {
        upload_bytes_s: Some(8 << 20),
        ..Limits::default()
    }
}

/// A peer that says to have everything and gives as `behave` does.
async fn bad_holder<F: Future<Output = ()> + Send + 'static>(
    world: &World,
    near: &Net,
    behave: impl Fn(Stream) -> F + Send + Sync + 'static,
) -> Net {
    let net = network(Some(near)).await;
    behave_badly(&net, behave);
    net.publish(world.advert(&[world.manifest.layers()])).await;
    net
}

/// Takes requests and never says a word.
async fn stall(mut stream: Stream) {
    while next_ask(&mut stream).await.is_some() {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_stalls_costs_one_wait_and_not_one_for_each_shard() {
    let world = world_of(3);
    let (seed, _giving) = seed(&world, rather_slow()).await;
    let staller = bad_holder(&world, &seed, stall).await;
    let (net, transfer, _) = peer(&world, "fresh", Some(&seed), Limits::default()).await;
    knows(&net, &[seed.me(), staller.me()]).await;
    let begin = Instant::now();
    fetch(&world, &transfer, BIG).await.unwrap();
    let first = begin.elapsed();
    assert!(first > Duration::from_secs(2), "it held some: {first:?}");
    let begin = Instant::now();
    fetch(&world, &transfer, ShardKind::Layer(2)).await.unwrap();
    let second = begin.elapsed();
    assert!(second < Duration::from_millis(1900), "{second:?}");
    is_right(&world, "fresh");
}

/// Right bytes, one in each part, a thousand a second: a range would take a quarter of an hour.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_dribbles_without_end_is_left() {
    let world = world();
    let (seed, _giving) = seed(&world, rather_slow()).await;
    let (left, mut was_left) = mpsc::channel(1);
    let from = world.store("seed");
    let open = from.open_shard(world.id, world.big().id).unwrap().unwrap();
    let open = Arc::new(open);
    let dribbler = bad_holder(&world, &seed, move |mut stream| {
        let (left, open) = (left.clone(), open.clone());
        async move {
            let Some(ask) = next_ask(&mut stream).await else {
                return;
            };
            let mut right = Vec::new();
            open.give(&ask.range(), &mut right).unwrap();
            for byte in right {
                let part = frame(&Give::Part, &[byte]);
                if stream.write_all(&part).await.is_err() || stream.flush().await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let _ = left.send(()).await;
        }
    })
    .await;
    let (net, transfer, book) = peer(&world, "fresh", Some(&seed), Limits::default()).await;
    knows(&net, &[seed.me(), dribbler.me()]).await;
    let begin = Instant::now();
    fetch(&world, &transfer, BIG).await.unwrap();
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(8), "{took:?}");
    is_right(&world, "fresh");
    assert_eq!(book.entries(), [], "slow is no lie");
    let left = timeout(Duration::from_secs(20), was_left.recv()).await;
    left.expect("its stream is closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_breaks_off_in_mid_part_is_no_liar_and_others_are_asked() {
    let world = world();
    let (seed, _giving) = seed(&world, rather_slow()).await;
    let (broke, mut broke_off) = mpsc::channel(8);
    let breaker = bad_holder(&world, &seed, move |mut stream| {
        let broke = broke.clone();
        async move {
            if next_ask(&mut stream).await.is_none() {
                return;
            }
            let part = frame(&Give::Part, &[7; 100_000]);
            let _ = stream.write_all(&part[..60_000]).await;
            let _ = stream.flush().await;
            drop(stream);
            let _ = broke.send(()).await;
        }
    })
    .await;
    let (net, transfer, book) = peer(&world, "fresh", Some(&seed), Limits::default()).await;
    knows(&net, &[seed.me(), breaker.me()]).await;
    fetch(&world, &transfer, BIG).await.unwrap();
    is_right(&world, "fresh");
    assert!(broke_off.try_recv().is_ok(), "it was asked");
    assert_eq!(book.entries(), []);
}

/// Right bytes of the shard, and not those that were asked for; names that lead nowhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_ranges_bytes_are_refused_and_names_that_lead_nowhere_hold_up_nobody() {
    let world = world();
    let (seed, _giving) = seed(&world, rather_slow()).await;
    let from = world.store("seed");
    let open = from.open_shard(world.id, world.big().id).unwrap().unwrap();
    let liar = network(Some(&seed)).await;
    serve_badly(&liar, move |ask| {
        let len = ask.groups;
        let other = if ask.first == 0 { len } else { 0 };
        let mut bytes = Vec::new();
        open.give(&(other..other + len), &mut bytes).unwrap();
        parts(&bytes)
    });
    liar.publish(world.advert(&[world.manifest.layers()])).await;
    let sender = network(Some(&seed)).await;
    let nowhere: Vec<_> = (0..7).map(|n| swarm_proto::Peer([n; 32])).collect();
    let me = sender.me();
    serve_badly(&sender, move |_| {
        let peers = nowhere.iter().copied().chain([me]).collect();
        frame(&Give::Elsewhere { peers }, &[])
    });
    sender
        .publish(world.advert(&[world.manifest.layers()]))
        .await;
    let (net, transfer, book) = peer(&world, "fresh", Some(&seed), Limits::default()).await;
    knows(&net, &[seed.me(), liar.me(), sender.me()]).await;
    let begin = Instant::now();
    fetch(&world, &transfer, BIG).await.unwrap();
    assert!(
        begin.elapsed() < Duration::from_secs(8),
        "{:?}",
        begin.elapsed()
    );
    is_right(&world, "fresh");
    let entries = book.entries();
    let entry = entries.iter().find(|entry| entry.peer == liar.me());
    let entry = entry.unwrap_or_else(|| panic!("{entries:?}"));
    // The last range of the shard is short: bytes from elsewhere are then too many, and are refused before their hash is.
    let refused = ["has another hash", "bytes of a range that takes"];
    assert!(
        refused.iter().any(|why| entry.last.contains(why)),
        "{}",
        entry.last
    );
    assert!(entries.iter().all(|entry| entry.peer != seed.me()));
}

/// More of them than holders may fail.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_describes_another_model_is_written_down_and_others_are_asked() {
    let world = world();
    let (seed, _giving) = seed(&world, Limits::default()).await;
    let (manifest, metadata) = world.described.clone();
    seed.serve_fetch(Arc::new(Described(manifest.clone(), metadata.clone())));
    let mut liars = Vec::new();
    for n in 0..7 {
        let liar = network(Some(&seed)).await;
        let mut other = manifest.clone();
        other[100 + n] ^= 1;
        liar.serve_fetch(Arc::new(Described(other, metadata.clone())));
        liar.publish(world.advert(&[world.manifest.layers()])).await;
        liars.push(liar);
    }
    let (net, book) = (network(Some(&seed)).await, PeerBook::default());
    let all: Vec<_> = liars.iter().map(Net::me).chain([seed.me()]).collect();
    knows(&net, &all).await;
    let store = Store::open(&world.temp.path().join("bare")).unwrap();
    let transfer = Transfer::new(net, store, Limits::default(), book.clone(), false);
    let described = timeout(DEADLINE, transfer.describe(world.id))
        .await
        .unwrap();
    assert_eq!(*described.unwrap(), world.manifest);
    let entries = book.entries();
    assert!(
        entries
            .iter()
            .all(|entry| entry.last.contains("other bytes"))
    );
    assert!(entries.iter().all(|entry| entry.peer != seed.me()));
}

fn set(manifest: &mut Manifest, key: &str, value: u64) {
    let key = format!("llama.{key}");
    manifest.kv.retain(|(other, _)| *other != key);
    manifest.kv.push((key, Value::U64(value)));
}

fn with_tensor(manifest: &mut Manifest, name: &str, elements: u64) {
    let bytes = elements * 4;
    manifest.tensors.push(Tensor {
        name: name.into(),
        dims: vec![elements.min(1 << 20), elements.div_ceil(1 << 20)],
        ty: TensorType::F32,
        bytes,
    });
    let kind = ShardKind::Layer(1);
    let shard = manifest.shards.iter_mut().find(|shard| shard.kind == kind);
    shard.unwrap().bytes += bytes;
}

type Change = Box<dyn Fn(&mut Manifest)>;

/// Manifests whose hash is right: nothing is reserved for what they say, and nobody else is asked for the same bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_of_absurd_dimensions_is_refused_by_name_and_costs_nothing() {
    let world = world();
    let cases: Vec<(&str, Change)> = vec![
        (
            "llama.block_count is 65535",
            Box::new(|m| set(m, "block_count", 65_535)),
        ),
        (
            "llama.embedding_length is 2147483648",
            Box::new(|m| set(m, "embedding_length", 1 << 31)),
        ),
        (
            "expert_count is",
            Box::new(|m| set(m, "expert_count", 1 << 40)),
        ),
        (
            "`blk.1.huge.weight`: f32 rows",
            Box::new(|m| with_tensor(m, "blk.1.huge.weight", 1 << 61)),
        ),
        (
            "bytes of layer 1 is 46116860184",
            Box::new(|m| with_tensor(m, "blk.1.huge.weight", 1 << 60)),
        ),
        (
            "bytes of layer 1 is",
            Box::new(|m| with_tensor(m, "blk.1.huge.weight", 1 << 40)),
        ),
        (
            "tensors for every layer",
            Box::new(|m| (0..5000).for_each(|n| with_tensor(m, &format!("shared.{n}"), 1))),
        ),
        (
            "number of shards is",
            Box::new(|m| {
                set(m, "block_count", 1000);
                set(m, "expert_count", 4000);
            }),
        ),
    ];
    let before = peak_bytes();
    for (why, change) in cases {
        let mut absurd = world.manifest.clone();
        change(&mut absurd);
        let bytes = absurd.encode().unwrap();
        let id = Manifest::id_of(&bytes);
        let holder = network(None).await;
        holder.serve_fetch(Arc::new(Described(bytes, Vec::new())));
        let mut advert = world.advert(&[world.manifest.layers()]);
        advert.models[0].model = id;
        holder.publish(advert).await;
        let (net, transfer, book) = peer(&world, "fresh", Some(&holder), Limits::default()).await;
        knows(&net, &[holder.me()]).await;
        let begin = Instant::now();
        let refused = transfer.describe(id).await.unwrap_err();
        assert!(begin.elapsed() < Duration::from_secs(5), "{why}");
        let said = refused.to_string();
        assert!(said.contains(why), "{why}: {said}");
        let of_the_model = TransferError::Fetch(FetchError::Manifest {
            model: id,
            source: Manifest::decode(&absurd.encode().unwrap()).unwrap_err(),
        });
        assert_eq!(said, of_the_model.to_string());
        assert_eq!(book.entries(), [], "it sent what was asked for");
        net.shutdown().await;
        holder.shutdown().await;
    }
    let grown = peak_bytes().saturating_sub(before);
    assert!(grown < 300 << 20, "{grown} bytes more at the highest");
}

/// The most memory that this process had, where the system tells it.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

async fn until(what: &str, mut seen: impl FnMut() -> bool) {
    let looking = async {
        while !seen() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, looking).await.expect(what);
}

fn damage(path: &Path, how: usize) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    match how {
        0 => file
            .write_all_at(&[0xa5, 0x5a], 3 * GROUP_BYTES + 9)
            .unwrap(),
        _ => file.set_len(2 * GROUP_BYTES).unwrap(),
    }
}

/// The blob was opened and given before: one flipped byte, then a file cut off, each while the node runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_damaged_under_a_running_node_is_not_given_and_is_fetched_again() {
    let world = world();
    let (seed, _giving) = seed(&world, Limits::default()).await;
    let (holder, transfer, _) = peer(&world, "holder", Some(&seed), Limits::default()).await;
    knows(&holder, &[seed.me()]).await;
    fetch(&world, &transfer, BIG).await.unwrap();
    let asker = network(Some(&seed)).await;
    for how in 0..2 {
        let given = ask_once(&asker, &holder, world.ask(8)).await;
        assert_eq!(given.0, Give::Part);
        let good = std::fs::read(world.blob("holder")).unwrap();
        damage(&world.blob("holder"), how);
        let mut refused = ask_once(&asker, &holder, world.ask(8)).await;
        if let (Give::Part, before) = &refused {
            // What comes before the first wrong group is right.
            assert!(before.len() < 4 * GROUP_BYTES as usize + 4096, "{how}");
            refused = ask_once(&asker, &holder, world.ask(8)).await;
        }
        assert!(
            matches!(refused.0, Give::Failed(_) | Give::Later | Give::Part),
            "{refused:?}"
        );
        let mended = || std::fs::read(world.blob("holder")).is_ok_and(|now| now == good);
        until("it is fetched again", mended).await;
        until_given(&asker, &holder, &world).await;
    }
    is_right(&world, "holder");
}

async fn until_given(asker: &Net, holder: &Net, world: &World) {
    let given = async {
        while ask_once(asker, holder, world.ask(8)).await.0 != Give::Part {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, given).await.expect("it is given again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_uplink_is_measured_on_shards_that_nothing_of_ours_holds_back() {
    let world = world();
    for limits in [Limits::default(), rather_slow()] {
        let limited = limits.upload_bytes_s.is_some();
        let (seed, giving) = seed(&world, limits).await;
        let name = format!("fresh-{limited}");
        let (net, transfer, _) = peer(&world, &name, Some(&seed), Limits::default()).await;
        knows(&net, &[seed.me()]).await;
        assert_eq!(seed.uplink(), None);
        fetch(&world, &transfer, BIG).await.unwrap();
        assert!(giving.given_bytes() > 6 << 20);
        if !limited {
            until("the uplink is measured", || seed.uplink().is_some()).await;
            let measured = seed.uplink().unwrap().value;
            assert!(measured > 1e6, "{measured} bytes a second over loopback");
            continue;
        }
        // Its streams are gone with it.
        let (mut peers, gone) = (seed.peers(), net.me());
        net.shutdown().await;
        let left = peers.wait_for(|peers| !peers.contains(&gone));
        timeout(DEADLINE, left).await.expect("in time").unwrap();
        assert_eq!(seed.uplink(), None, "that was the limit's speed");
    }
}
