//! A shard from one peer to another over loopback, against a copy over TLS (rustls) that hashes with BLAKE3 and
//! writes the same bytes, in alternating rounds of one run; and what a small frame's echo takes beside it.
//!
//! ```sh
//! cargo run --release --example transfer_bench -- [MiB] [rounds]
//! ```
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::indexing_slicing)] // a measurement that cannot go on says where

#[path = "../../shard-registry/tests/support/mod.rs"]
mod support;

use std::{
    fs::File,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use gguf::TensorType;
use node::{
    Identity, Net, NetConfig, PeerBook, Proto, Stream, Transfer, net::Announcement,
    transfer::Limits,
};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use shard_registry::{Manifest, ShardEntry, ShardKind, Store};
use swarm_proto::{LayerRange, ModelAdvert, ModelId};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::Handle,
};

/// What a hop sends for one token of a model with rows of 2,176 floats.
const ECHO_BYTES: usize = 8_704;
const ECHO_PAUSE: Duration = Duration::from_millis(2);

fn main() {
    let number = |n: usize, otherwise| {
        std::env::args()
            .nth(n)
            .map_or(otherwise, |text| text.parse().unwrap())
    };
    let (mib, rounds) = (number(1, 512), number(2, 5));
    let temp = tempfile::tempdir().unwrap();
    let mut model = support::Model::dense(2);
    model.tensor(
        "blk.1.big.weight",
        &[32, mib as u64 * 8192],
        TensorType::F32,
    );
    let path = temp.path().join("model.gguf");
    model.write(&path);
    drop(model);
    // As two processes would have them.
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(2).enable_all().build().unwrap()
    };
    let (giver, getter) = (runtime(), runtime());
    let (mut tls, mut ours) = (Vec::new(), Vec::new());
    getter.block_on(async {
        let swarm = Bench::start(giver.handle(), temp.path(), &path).await;
        println!(
            "echo of {ECHO_BYTES} bytes, idle:            {}",
            swarm.echo(Duration::from_secs(1)).await
        );
        let first = swarm.fetch().await;
        println!(
            "first fetch, hashed at the holder first: {:.0} MB/s",
            swarm.mb_s(first)
        );
        for round in 0..rounds {
            let (from, to) = (path.clone(), temp.path().join("copy"));
            let copied = tokio::task::spawn_blocking(move || tls_copy(&from, &to))
                .await
                .unwrap();
            let fetched = swarm.fetch().await;
            println!(
                "round {round}: TLS {:.0} MB/s, shard {:.0} MB/s",
                swarm.mb_s(copied),
                swarm.mb_s(fetched)
            );
            tls.push(copied.as_secs_f64());
            ours.push(fetched.as_secs_f64());
        }
        let (echo, fetched) = tokio::join!(swarm.echo(Duration::from_secs(2)), swarm.fetch());
        println!(
            "echo of {ECHO_BYTES} bytes beside a fetch:   {echo}  ({:.0} MB/s)",
            swarm.mb_s(fetched)
        );
    });
    let ratio = median(&mut tls) / median(&mut ours);
    println!("median: {ratio:.2} of the TLS copy's speed");
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

struct Bench {
    id: ModelId,
    manifest: Manifest,
    fresh: Store,
    near: Net,
    seed: Net,
    getting: Transfer,
    _giving: Transfer,
}

impl Bench {
    async fn start(giver: &Handle, folder: &Path, file: &Path) -> Bench {
        let store = Store::open(&folder.join("seed")).unwrap();
        let id = store.import(file, None, &mut |_| {}).unwrap().id;
        let fresh = Store::open(&folder.join("fresh")).unwrap();
        fresh
            .put_fetched(
                &store.manifest_bytes(id).unwrap(),
                &store.metadata(id).unwrap(),
            )
            .unwrap();
        let manifest = store.manifest(id).unwrap();
        let (seed, giving) = giver.spawn(serve(store, id)).await.unwrap();
        let near = network(seed.listen_addrs()).await;
        let mut changes = near.adverts().changes();
        while near.adverts().addrs(&seed.me()).is_empty() {
            changes.changed().await.unwrap();
        }
        let getting = Transfer::new(
            near.clone(),
            fresh.clone(),
            Limits::default(),
            PeerBook::default(),
            true,
        );
        Bench {
            id,
            manifest,
            fresh,
            near,
            seed,
            getting,
            _giving: giving,
        }
    }

    fn big(&self) -> &ShardEntry {
        self.manifest.shard(ShardKind::Layer(1)).unwrap()
    }

    fn mb_s(&self, took: Duration) -> f64 {
        self.big().bytes as f64 / took.as_secs_f64() / 1e6
    }

    async fn fetch(&self) -> Duration {
        let blob = self
            .fresh
            .dir()
            .join("blobs")
            .join(self.big().id.to_string());
        let _ = std::fs::remove_file(blob);
        let begin = Instant::now();
        self.getting
            .fetch(self.id, &self.manifest, self.big(), &mut |_| {})
            .await
            .unwrap();
        begin.elapsed()
    }

    /// p50 and p99 of a frame there and back.
    async fn echo(&self, lasting: Duration) -> String {
        let opened = self
            .near
            .open(self.seed.me(), &[], Proto::Session, Duration::from_secs(5));
        let mut stream = opened.await.unwrap();
        let (mut bytes, mut took) = (vec![7; ECHO_BYTES], Vec::new());
        let begin = Instant::now();
        while begin.elapsed() < lasting {
            let sent = Instant::now();
            stream.write_all(&bytes).await.unwrap();
            stream.flush().await.unwrap();
            stream.read_exact(&mut bytes).await.unwrap();
            took.push(sent.elapsed());
            tokio::time::sleep(ECHO_PAUSE).await;
        }
        took.sort_unstable();
        let at =
            |percent: usize| took[(took.len() * percent / 100).min(took.len() - 1)].as_micros();
        format!("p50 {} µs, p99 {} µs of {}", at(50), at(99), took.len())
    }
}

async fn serve(store: Store, id: ModelId) -> (Net, Transfer) {
    let seed = network(Vec::new()).await;
    let (limits, book) = (Limits::default(), PeerBook::default());
    let giving = Transfer::new(seed.clone(), store, limits, book, true);
    giving.serve().unwrap();
    seed.publish(announcement(id)).await;
    let mut echoed = seed.accept(Proto::Session).unwrap();
    tokio::spawn(async move {
        while let Some((_, stream)) = echoed.recv().await {
            tokio::spawn(echo(stream));
        }
    });
    (seed, giving)
}

async fn echo(mut stream: Stream) {
    let mut bytes = vec![0; ECHO_BYTES];
    while stream.read_exact(&mut bytes).await.is_ok() {
        if stream.write_all(&bytes).await.is_err() || stream.flush().await.is_err() {
            return;
        }
    }
}

fn announcement(id: ModelId) -> Announcement {
    let model = ModelAdvert {
        model: id,
        name: "bench".into(),
        n_layer: 2,
        live: Vec::new(),
        intended: Vec::new(),
        layer_tokens_s: None,
        n_ctx_max: 0,
        free_cells: 0,
        n_embd: 32,
        numerics: 0,
        stored: vec![LayerRange { start: 0, end: 2 }],
        layer_bytes_max: None,
        experts: None,
    };
    Announcement {
        models: vec![model],
        ..Announcement::default()
    }
}

async fn network(bootstrap: Vec<String>) -> Net {
    let config = NetConfig {
        listen: vec!["/ip4/127.0.0.1/tcp/0".into()],
        bootstrap,
        ..NetConfig::client(Identity::generate(), "bench".parse().unwrap())
    };
    Net::start(config).await.unwrap()
}

/// One thread reads and encrypts, the other decrypts, hashes and writes.
fn tls_copy(from: &Path, to: &Path) -> Duration {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let made = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.key_pair.serialize_der()));
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let mut source = File::open(from).unwrap();
    let len = source.metadata().unwrap().len();
    let begin = Instant::now();
    let sender = std::thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        let connection = ServerConnection::new(Arc::new(server)).unwrap();
        let mut tls = StreamOwned::new(connection, socket);
        let mut bytes = vec![0; 128 * 1024];
        loop {
            match source.read(&mut bytes).unwrap() {
                0 => break,
                n => tls.write_all(&bytes[..n]).unwrap(),
            }
        }
        tls.conn.send_close_notify();
        tls.flush().unwrap();
    });
    let connection =
        ClientConnection::new(Arc::new(client), "localhost".try_into().unwrap()).unwrap();
    let mut tls = StreamOwned::new(connection, TcpStream::connect(addr).unwrap());
    let mut out = File::create(to).unwrap();
    let mut hasher = blake3::Hasher::new();
    let (mut bytes, mut copied) = (vec![0; 128 * 1024], 0);
    loop {
        match tls.read(&mut bytes).unwrap() {
            0 => break,
            n => {
                hasher.update(&bytes[..n]);
                out.write_all(&bytes[..n]).unwrap();
                copied += n as u64;
            }
        }
    }
    let took = begin.elapsed();
    sender.join().unwrap();
    assert_eq!(copied, len, "{}", hasher.finalize());
    took
}
