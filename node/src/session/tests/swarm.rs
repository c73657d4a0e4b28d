//! A swarm in memory: nodes that dial each other through pipes, with faults on demand.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex},
    time::Duration,
};

use engine::{ChainStage, Worker};
use futures::future::BoxFuture;
use swarm_proto::{Dtype, Form, Hash, Hop, LayerRange, ModelId, Peer, Want, WantRows};

use crate::net::{OpenError, Proto, Stream};
use crate::session::{
    ClientSession, Deadlines, Dialer, Kind, LogitsRow, Opener, Served, SessionLimits, Sessions,
};

pub(super) const N_LAYER: u32 = 12;
pub(super) const N_EMBD: u32 = 48;
pub(super) const N_VOCAB: u32 = 97;
pub(super) const SEED: u64 = 42;
pub(super) const MODEL: ModelId = ModelId(Hash([7; 32]));
pub(super) const TOP1: Want = Want {
    rows: WantRows::Last,
    form: Form::Top(1),
};

/// Bytes a pipe of the test swarm buffers: small, so that backpressure is felt.
const PIPE_BYTES: usize = 4096;

/// Lets paused time pass while the stage workers, which live in real time, get theirs: 50 virtual
/// milliseconds a real one. (Left alone, a paused clock jumps to the next deadline whenever the
/// runtime waits for a worker's thread.)
pub(super) struct Clock {
    ticks: tokio::task::JoinHandle<()>,
    _hold: std::sync::mpsc::Sender<()>,
}

impl Clock {
    pub(super) fn start() -> Self {
        let (hold, held) = std::sync::mpsc::channel();
        // A blocking task in flight keeps the clock from jumping.
        tokio::task::spawn_blocking(move || held.recv().is_ok());
        let ticks = tokio::spawn(async {
            loop {
                for _ in 0..16 {
                    tokio::task::yield_now().await;
                }
                std::thread::sleep(Duration::from_millis(1));
                tokio::time::advance(Duration::from_millis(50)).await;
            }
        });
        Self { ticks, _hold: hold }
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.ticks.abort();
    }
}

/// What a peer does with streams that are opened to it.
#[derive(Clone)]
pub(super) enum Behaviour {
    Serves(Sessions),
    /// The connection cannot be made.
    Dead,
    /// Streams open, and nothing ever happens on them. The ends are kept.
    Hangs,
    /// Streams go to the test.
    Test(tokio::sync::mpsc::UnboundedSender<(Peer, Proto, Stream)>),
}

#[derive(Clone, Default)]
pub(super) struct Wires {
    peers: Arc<Mutex<HashMap<Peer, Behaviour>>>,
    hung: Arc<Mutex<Vec<Stream>>>,
}

impl Wires {
    pub(super) fn set(&self, peer: Peer, behaviour: Behaviour) {
        self.peers.lock().unwrap().insert(peer, behaviour);
    }

    pub(super) fn dialer(&self, from: Peer) -> Arc<dyn Dialer> {
        Arc::new(From {
            from,
            wires: self.clone(),
        })
    }

    pub(super) fn opener(&self, from: Peer, deadlines: Deadlines) -> Opener {
        Opener {
            deadlines,
            ..Opener::new(from, self.dialer(from))
        }
    }
}

struct From {
    from: Peer,
    wires: Wires,
}

impl Dialer for From {
    fn open<'a>(
        &'a self,
        peer: Peer,
        _: &'a [String],
        proto: Proto,
    ) -> BoxFuture<'a, Result<Stream, OpenError>> {
        Box::pin(async move {
            let behaviour = self.wires.peers.lock().unwrap().get(&peer).cloned();
            let (near, far) = tokio::io::duplex(PIPE_BYTES);
            let (near, far) = (Stream::new(near), Stream::new(far));
            match behaviour {
                Some(Behaviour::Serves(sessions)) if proto == Proto::Answer => {
                    sessions.accept_answer(self.from, far);
                }
                Some(Behaviour::Serves(sessions)) => sessions.accept_session(self.from, far),
                Some(Behaviour::Hangs) => self.wires.hung.lock().unwrap().push(far),
                Some(Behaviour::Test(to)) => to.send((self.from, proto, far)).unwrap(),
                Some(Behaviour::Dead) | None => {
                    return Err(OpenError::Unreachable {
                        peer,
                        reason: "connection refused".into(),
                    });
                }
            }
            Ok(near)
        })
    }
}

pub(super) struct Node {
    pub(super) peer: Peer,
    pub(super) sessions: Sessions,
    pub(super) worker: Worker,
    pub(super) layers: Range<u32>,
}

pub(super) struct Swarm {
    pub(super) wires: Wires,
    pub(super) nodes: Vec<Node>,
    pub(super) limits: SessionLimits,
}

pub(super) fn peer(n: u8) -> Peer {
    Peer([n; 32])
}

pub(super) const CLIENT: Peer = Peer([200; 32]);

impl Swarm {
    /// Nodes cut at `cuts`: `[0, 4, 12]` are two.
    pub(super) fn new(cuts: &[u32]) -> Self {
        Self::with(cuts, SessionLimits::default(), |stage| stage)
    }

    pub(super) fn with(
        cuts: &[u32],
        limits: SessionLimits,
        tune: impl Fn(ChainStage) -> ChainStage,
    ) -> Self {
        let wires = Wires::default();
        let mut nodes = Vec::new();
        for (n, cut) in (1..).zip(cuts.windows(2)) {
            let layers = cut[0]..cut[1];
            let stage = tune(ChainStage::new(
                N_LAYER,
                N_EMBD,
                N_VOCAB,
                layers.clone(),
                SEED,
            ));
            let worker = Worker::spawn(Box::new(stage), limits.worker_queue()).unwrap();
            let sessions = Sessions::new(peer(n), wires.dialer(peer(n)), limits);
            sessions.serve(Served::new(MODEL, worker.clone()));
            wires.set(peer(n), Behaviour::Serves(sessions.clone()));
            nodes.push(Node {
                peer: peer(n),
                sessions,
                worker,
                layers,
            });
        }
        Self {
            wires,
            nodes,
            limits,
        }
    }

    pub(super) fn route(&self) -> Vec<Hop> {
        let hop = |n: &Node| Hop {
            peer: n.peer,
            addrs: Vec::new(),
            layers: LayerRange {
                start: n.layers.start as u16,
                end: n.layers.end as u16,
            },
        };
        self.nodes.iter().map(hop).collect()
    }

    /// Another node that holds `layers`.
    pub(super) fn stand_in(&mut self, n: u8, layers: Range<u32>) -> Hop {
        let stage = ChainStage::new(N_LAYER, N_EMBD, N_VOCAB, layers.clone(), SEED);
        let worker = Worker::spawn(Box::new(stage), self.limits.worker_queue()).unwrap();
        let sessions = Sessions::new(peer(n), self.wires.dialer(peer(n)), self.limits);
        sessions.serve(Served::new(MODEL, worker.clone()));
        self.wires.set(peer(n), Behaviour::Serves(sessions.clone()));
        let hop = Hop {
            peer: peer(n),
            addrs: Vec::new(),
            layers: LayerRange {
                start: layers.start as u16,
                end: layers.end as u16,
            },
        };
        self.nodes.push(Node {
            peer: peer(n),
            sessions,
            worker,
            layers,
        });
        hop
    }

    pub(super) fn opener(&self) -> Opener {
        self.wires.opener(CLIENT, self.limits.deadlines)
    }

    pub(super) async fn open(&self) -> ClientSession {
        self.open_as(CLIENT, 1024, Dtype::F32).await
    }

    pub(super) async fn open_as(&self, client: Peer, n_ctx: u32, dtype: Dtype) -> ClientSession {
        self.open_over(client, n_ctx, dtype, &self.route()).await
    }

    /// Over the first `hops` nodes, which hold everything.
    pub(super) async fn open_route(&self, hops: usize) -> ClientSession {
        let route = &self.route()[..hops];
        self.open_over(CLIENT, 1024, Dtype::F32, route).await
    }

    pub(super) async fn open_over(
        &self,
        client: Peer,
        n_ctx: u32,
        dtype: Dtype,
        route: &[Hop],
    ) -> ClientSession {
        let opener = self.wires.opener(client, self.limits.deadlines);
        let kind = Kind {
            model: MODEL,
            n_ctx,
            dtype,
            n_embd: N_EMBD,
            numerics: swarm_proto::Numerics::Exact,
            n_vocab: N_VOCAB,
        };
        opener.open_route(kind, route).await.unwrap()
    }

    /// Every hop forgot every session, and freed its KV.
    pub(super) async fn assert_empty(&self) {
        for node in &self.nodes {
            let freed = async {
                while node.sessions.count() > 0 || node.worker.stats().sessions > 0 {
                    tokio::task::yield_now().await;
                }
            };
            // Real time: the worker's thread does not know of paused clocks.
            let begin = std::time::Instant::now();
            tokio::pin!(freed);
            while futures::poll!(&mut freed).is_pending() {
                assert!(
                    begin.elapsed() < Duration::from_secs(20),
                    "{} keeps KV",
                    node.peer
                );
                tokio::task::yield_now().await;
                std::thread::yield_now();
            }
        }
    }
}

pub(super) fn reference() -> ChainStage {
    ChainStage::new(N_LAYER, N_EMBD, N_VOCAB, 0..N_LAYER, SEED)
}

pub(super) fn prompt(n: u32, salt: u32) -> Vec<u32> {
    (0..n)
        .map(|i| (i * 31 + salt * 17 + i * i) % N_VOCAB)
        .collect()
}

/// Feeds `tokens`, then decodes `n` greedily, each checked against the whole chain.
pub(super) async fn decode(
    session: &mut ClientSession,
    all: &mut Vec<u32>,
    tokens: &[u32],
    n: usize,
) {
    let whole = reference();
    session.feed(tokens, TOP1).await.unwrap();
    all.extend_from_slice(tokens);
    for _ in 0..n {
        let row: LogitsRow = session.next_logits().await.unwrap();
        assert_eq!(row.pos as usize + 1, all.len());
        let next = row.argmax().unwrap();
        assert_eq!(next, whole.expected(all), "after {} tokens", all.len());
        session.feed(&[next], TOP1).await.unwrap();
        all.push(next);
    }
    let row = session.next_logits().await.unwrap();
    assert_eq!(row.argmax().unwrap(), whole.expected(all));
}
