//! What others can make a node say where nobody asked it to be talkative: next to nothing, however often
//! they try. In a process of its own, because the log belongs to the process.
#![allow(clippy::unwrap_used)] // helpers of tests

use std::{
    fmt::Debug,
    sync::{Arc, Mutex},
    time::Duration,
};

use engine::{ChainStage, Worker};
use node::{
    Identity, Net, NetConfig, OpenError, PeerBook, Proto, Transfer,
    session::{Kind, Opener, Served, SessionLimits, Sessions},
    telemetry::DEFAULT_FILTER,
    transfer::Limits,
};
use shard_registry::Store;
use swarm_proto::{Dtype, Form, Hash, Hop, LayerRange, ModelId, Want, WantRows};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tracing::field::{Field, Visit};
use tracing_subscriber::{EnvFilter, Layer, Registry, layer::SubscriberExt};

const DEADLINE: Duration = Duration::from_secs(20);
const MODEL: ModelId = ModelId(Hash([3; 32]));
const N_VOCAB: u32 = 50;

/// Each line that would be written.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0 += &format!("{field}={value:?} ");
    }
}

impl<S: tracing::Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        let mut text = Text(format!("{} ", event.metadata().level()));
        event.record(&mut text);
        self.0.lock().unwrap().push(text.0);
    }
}

async fn start(swarm: &str) -> Net {
    let config = NetConfig {
        listen: vec!["/ip4/127.0.0.1/tcp/0".into()],
        ..NetConfig::client(Identity::generate(), swarm.parse().unwrap())
    };
    Net::start(config).await.unwrap()
}

/// Serves a chain of two layers.
fn serve(net: &Net) -> Sessions {
    let limits = SessionLimits::default();
    let stage = ChainStage::new(2, 8, N_VOCAB, 0..2, 1);
    let worker = Worker::spawn(Box::new(stage), limits.worker_queue()).unwrap();
    let sessions = Sessions::new(net.me(), Arc::new(net.clone()), limits);
    sessions.serve(Served::new(MODEL, worker));
    let (down, answers) = (
        net.accept(Proto::Session).unwrap(),
        net.accept(Proto::Answer).unwrap(),
    );
    let service = sessions.clone();
    tokio::spawn(async move { service.run(down, answers).await });
    net.serve_fetch(Arc::new(())).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (store, limits) = (Store::open(folder.path()).unwrap(), Limits::default());
    let transfer = Transfer::new(net.clone(), store, limits, PeerBook::default(), true);
    transfer.serve().unwrap();
    node::ExpertService::new(None).serve(net).unwrap();
    sessions
}

/// A client that gets one row, and then closes the session or just goes.
async fn visit(client: &Net, server: &Net, closes: bool) {
    let opener = Opener::new(client.me(), Arc::new(client.clone()));
    let kind = Kind {
        model: MODEL,
        n_ctx: 64,
        dtype: Dtype::F32,
        n_embd: 8,
        numerics: swarm_proto::Numerics::Exact,
        n_vocab: N_VOCAB,
    };
    let hop = Hop {
        peer: server.me(),
        addrs: server.listen_addrs(),
        layers: LayerRange { start: 0, end: 2 },
    };
    let mut session = opener.open_route(kind, vec![hop]).await.unwrap();
    let want = Want {
        rows: WantRows::Last,
        form: Form::Top(1),
    };
    session.feed(&[1, 2, 3], want).await.unwrap();
    session.next_logits().await.unwrap();
    if closes {
        session.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_nonsense_and_goodbyes_do_not_fill_the_log() {
    let lines = Lines::default();
    let filter = EnvFilter::builder().parse(DEFAULT_FILTER).unwrap();
    let subscriber = Registry::default().with(lines.clone().with_filter(filter));
    tracing::subscriber::set_global_default(subscriber).unwrap();

    let (server, deaf, member) = (start("t").await, start("t").await, start("t").await);
    let addrs = server.listen_addrs();
    let sessions = serve(&server);
    for n in 0..10 {
        visit(&member, &server, n % 2 == 0).await;
    }
    for _ in 0..10 {
        let stranger = start("another").await;
        let refused = stranger.open(server.me(), &addrs, Proto::Session, DEADLINE);
        let refused = refused.await.unwrap_err();
        assert!(matches!(refused, OpenError::OtherSwarm { .. }), "{refused}");
        stranger.shutdown().await;
    }
    for proto in Proto::ALL {
        for bytes in [
            &[0xff; 300][..],
            &[10, 0, 0, 0, 4, 0, 9, 9, 9, 9, 9, 9, 9, 9],
        ] {
            let stream = member.open(server.me(), &addrs, proto, DEADLINE).await;
            let mut stream = stream.unwrap();
            // The server may have closed before all is written.
            let _ = stream.write_all(bytes).await;
            let _ = stream.shutdown().await;
            let _ = stream.read_to_end(&mut Vec::new()).await;
        }
    }
    // Nobody takes the streams of this one: most are refused.
    let _queue = deaf.accept(Proto::Session).unwrap();
    let addrs = deaf.listen_addrs();
    let mut kept = Vec::new();
    let mut refused = 0;
    for _ in 0..200 {
        let stream = member.open(deaf.me(), &addrs, Proto::Session, DEADLINE);
        match stream.await {
            Ok(stream) => kept.push(stream),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 100, "{refused}");
    let over = async {
        while sessions.count() > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, over).await.unwrap();
    for net in [server, deaf, member] {
        net.shutdown().await;
    }
    let said = lines.0.lock().unwrap();
    assert!(said.len() <= 1, "{said:#?}");
    assert!(said.iter().all(|line| line.contains("refused")), "{said:?}");
}
