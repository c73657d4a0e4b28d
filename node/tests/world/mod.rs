//! Networks in one process over loopback that give and fetch the shards of one small model, and bad holders of it.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic)] // helpers of tests
#![allow(dead_code)] // each test binary uses its part

#[path = "../../../shard-registry/tests/support/mod.rs"]
mod support;

use std::{path::PathBuf, sync::Arc, time::Duration};

use gguf::TensorType;
use node::{
    Identity, Net, NetConfig, PeerBook, Proto, Stream, Transfer, TransferError,
    net::{Announcement, Shelf},
    transfer::Limits,
};
use shard_registry::{Manifest, ShardEntry, ShardKind, Store};
use support::Model;
use swarm_proto::{
    Ask, FrameDecoder, FrameLimits, Give, LayerRange, Message, ModelAdvert, ModelId, Peer, ShardId,
    decode_header, encode_frame, transfer::PART_BYTES_MAX,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

/// How long anything may take.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// The first layer of 6 MiB.
pub const BIG: ShardKind = ShardKind::Layer(1);

/// A model with a layer of 6 MiB, imported in the folder of whoever seeds it.
pub struct World {
    pub temp: tempfile::TempDir,
    pub id: ModelId,
    pub manifest: Manifest,
    pub described: (Vec<u8>, Vec<u8>),
}

/// The model has two layers, the second of 6 MiB.
pub fn world() -> World {
    world_of(2)
}

/// All layers but the first have 6 MiB.
pub fn world_of(n_layer: u32) -> World {
    let mut model = Model::dense(n_layer);
    for layer in 1..n_layer {
        let name = format!("blk.{layer}.big.weight");
        model.tensor(&name, &[32, 49_152], TensorType::F32);
    }
    world_with(&model)
}

/// Of two layers of four experts each.
pub fn world_of_experts() -> World {
    world_with(&Model::moe(2, 4))
}

fn world_with(model: &Model) -> World {
    let temp = tempfile::tempdir().unwrap();
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
    pub fn store(&self, name: &str) -> Store {
        let store = Store::open(&self.temp.path().join(name)).unwrap();
        store
            .put_fetched(&self.described.0, &self.described.1)
            .unwrap();
        store
    }

    pub fn big(&self) -> &ShardEntry {
        self.manifest.shard(BIG).unwrap()
    }

    pub fn blob(&self, name: &str) -> PathBuf {
        let blobs = self.temp.path().join(name).join("blobs");
        blobs.join(self.big().id.to_string())
    }

    pub fn advert(&self, layers: &[LayerRange]) -> Announcement {
        let model = ModelAdvert {
            model: self.id,
            name: "tiny".into(),
            n_layer: self.manifest.n_layer,
            live: Vec::new(),
            intended: Vec::new(),
            layer_tokens_s: None,
            n_ctx_max: 0,
            free_cells: 0,
            n_embd: 32,
            numerics: 0,
            stored: layers.to_vec(),
            layer_bytes_max: None,
            experts: None,
        };
        Announcement {
            models: vec![model],
            ..Announcement::default()
        }
    }
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

/// A peer of the world: `seed` has everything, others what they fetch.
pub async fn peer(
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

pub async fn seed(world: &World, limits: Limits) -> (Net, Transfer) {
    let (net, transfer, _) = peer(world, "seed", None, limits).await;
    net.publish(world.advert(&[world.manifest.layers()])).await;
    (net, transfer)
}

pub async fn knows(net: &Net, wanted: &[Peer]) {
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

pub async fn fetch(
    world: &World,
    transfer: &Transfer,
    kind: ShardKind,
) -> Result<(), TransferError> {
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

pub fn is_right(world: &World, name: &str) {
    let bytes = std::fs::read(world.blob(name)).unwrap();
    assert_eq!(ShardId::of(&bytes), world.big().id);
}

/// Takes transfer streams and says what `say` makes of each request.
pub fn serve_badly(net: &Net, say: impl Fn(&Ask) -> Vec<u8> + Send + Sync + 'static) {
    let say = Arc::new(say);
    behave_badly(net, move |mut stream| {
        let say = say.clone();
        async move {
            while let Some(ask) = next_ask(&mut stream).await {
                if stream.write_all(&say(&ask)).await.is_err() {
                    return;
                }
                let _ = stream.flush().await;
            }
        }
    });
}

pub async fn next_ask(stream: &mut Stream) -> Option<Ask> {
    let mut prefix = [0; 6];
    stream.read_exact(&mut prefix).await.ok()?;
    let mut header = vec![0; usize::from(u16::from_le_bytes([prefix[4], prefix[5]]))];
    stream.read_exact(&mut header).await.ok()?;
    decode_header(&header).ok()
}

pub fn frame(give: &Give, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    encode_frame(give, &mut out, |out| out.extend_from_slice(payload)).unwrap();
    out
}

pub fn parts(bytes: &[u8]) -> Vec<u8> {
    bytes
        .chunks(PART_BYTES_MAX)
        .flat_map(|part| frame(&Give::Part, part))
        .collect()
}

pub async fn next_give(stream: &mut Stream) -> (Give, Vec<u8>) {
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

/// What describes one model, as somebody made it.
pub struct Described(pub Vec<u8>, pub Vec<u8>);

impl Shelf for Described {
    fn manifest(&self, _: &ModelId) -> std::io::Result<Option<Vec<u8>>> {
        Ok(Some(self.0.clone()))
    }

    fn shard(&self, _: &ShardId) -> std::io::Result<Option<Vec<u8>>> {
        Ok(Some(self.1.clone()))
    }
}

/// Takes transfer streams and does with each what `behave` does.
pub fn behave_badly<F: Future<Output = ()> + Send + 'static>(
    net: &Net,
    behave: impl Fn(Stream) -> F + Send + Sync + 'static,
) {
    let mut streams = net.accept(Proto::Transfer).expect("nobody serves yet");
    tokio::spawn(async move {
        while let Some((_, stream)) = streams.recv().await {
            tokio::spawn(behave(stream));
        }
    });
}

/// Asks one holder for groups of a shard, as a request on a stream of its own; what it says first.
pub async fn ask_once(net: &Net, holder: &Net, ask: Ask) -> (Give, Vec<u8>) {
    let addrs = holder.listen_addrs();
    let opened = net.open(holder.me(), &addrs, Proto::Transfer, DEADLINE);
    let mut stream = opened.await.unwrap();
    let mut bytes = Vec::new();
    encode_frame(&ask, &mut bytes, |_| {}).unwrap();
    stream.write_all(&bytes).await.unwrap();
    stream.flush().await.unwrap();
    next_give(&mut stream).await
}

impl World {
    /// A request for the first groups of the big shard.
    pub fn ask(&self, groups: u32) -> Ask {
        Ask {
            model: self.id,
            shard: self.big().id,
            first: 0,
            groups,
            shares: false,
            in_vain: false,
        }
    }
}
