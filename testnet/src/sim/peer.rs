//! A simulated node: the product's session service and stage queue over a hash chain, which dies and
//! comes back; and what it says of itself.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use engine::{ChainStage, EngineError, Reply, Slot, Worker, WorkerByHand};
use node::session::{Served, SessionLimits, Sessions};
use swarm_proto::{Advert, LayerRange, Measured, ModelAdvert};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

use super::dice::Dice;
use super::log::{Log, lock};
use super::network::{Door, Network};
use super::{MODEL, Model};

/// How long an advert holds, as the product has it.
const TTL_MS: u32 = 40_000;
/// How long the stage takes to make or free a session's KV.
const OPENING: Duration = Duration::from_millis(4);

/// What a node is, before it runs.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    pub(super) layers: Range<u32>,
    /// Sessions whose KV fits, if each uses all of its layers.
    pub(super) sessions: u64,
    /// One row through one layer.
    pub(super) pace: Duration,
    /// What it says that is.
    pub(super) claims: Duration,
    pub(super) limits: SessionLimits,
}

/// A node, dead or alive.
pub(super) struct Node {
    pub(super) number: usize,
    pub(super) spec: Spec,
    model: Model,
    log: Arc<Log>,
    network: Arc<Network>,
    running: Mutex<Option<Running>>,
    /// What ran here before it died.
    gone: Mutex<Vec<Sessions>>,
    /// Since when it has had room for one more session.
    room: Mutex<Option<Instant>>,
    /// Its stage does not get any time.
    frozen: watch::Sender<bool>,
}

struct Running {
    sessions: Sessions,
    worker: Worker,
    stage: AbortHandle,
}

impl Node {
    pub(super) fn new(
        number: usize,
        spec: Spec,
        model: Model,
        log: Arc<Log>,
        network: Arc<Network>,
    ) -> Arc<Self> {
        let node = Arc::new(Self {
            number,
            spec,
            model,
            log,
            network,
            running: Mutex::default(),
            gone: Mutex::default(),
            room: Mutex::new(Some(Instant::now())),
            frozen: watch::Sender::new(false),
        });
        node.start();
        node
    }

    /// Starts it, with nothing in its memory.
    pub(super) fn start(self: &Arc<Self>) {
        let cells = self.spec.sessions * self.model.session_cells(self.spec.layers.len() as u64);
        let stage = self.model.stage(self.spec.layers.clone()).with_cells(cells);
        let woken = Arc::new(Notify::new());
        let wake = woken.clone();
        let queue = self.spec.limits.worker_queue();
        let (worker, hand) = Worker::by_hand(Box::new(stage), queue, move || wake.notify_one());
        let dialer = self.network.dialer(self.number);
        let sessions = Sessions::new(self.network.peer(self.number), dialer, self.spec.limits);
        sessions.serve(Served::new(MODEL, worker.clone()));
        let node = self.clone();
        let driven = (worker.clone(), sessions.clone());
        let stage = tokio::spawn(async move { node.drive(hand, woken, driven).await });
        let door = Door::Serves(sessions.clone());
        *lock(&self.running) = Some(Running {
            sessions,
            worker,
            stage: stage.abort_handle(),
        });
        self.network.set_door(self.number, door);
    }

    /// Ends it without a word of its own. `heard`: its neighbours are told by its system.
    pub(super) fn die(&self, heard: bool) {
        let Some(running) = lock(&self.running).take() else {
            return;
        };
        self.network.die(self.number, heard);
        running.stage.abort();
        lock(&self.gone).push(running.sessions.clone());
        // What still runs of it finds dead streams.
        tokio::spawn(async move { running.sessions.shutdown(Duration::ZERO).await });
    }

    pub(super) fn is_alive(&self) -> bool {
        lock(&self.running).is_some()
    }

    /// Stops it in the middle of whatever it does, or lets it go on.
    pub(super) fn freeze(&self, frozen: bool) {
        self.network.set_off(self.number, frozen);
        self.frozen.send_replace(frozen);
    }

    /// Takes all KV that is left for `long`.
    pub(super) async fn fill(&self, long: Duration) {
        let Some(worker) = lock(&self.running).as_ref().map(|r| r.worker.clone()) else {
            return;
        };
        let mut taken = Vec::new();
        loop {
            let (to, slot) = tokio::sync::oneshot::channel::<Result<Slot, EngineError>>();
            let reply: Reply<Slot> = Box::new(move |slot| drop(to.send(slot)));
            let opened = worker.open(self.model.n_ctx, self.spec.layers.clone(), reply);
            match (opened, slot.await) {
                (Ok(()), Ok(Ok(slot))) => taken.push(slot),
                _ => break,
            }
        }
        sleep(long).await;
        taken.into_iter().for_each(|slot| worker.close(slot));
    }

    /// Whether one more session finds its place here, with KV for all its layers, and has for so long.
    pub(super) fn has_room(&self, long: Duration) -> bool {
        self.look_for_room();
        lock(&self.room).is_some_and(|since| since.elapsed() >= long)
    }

    fn look_for_room(&self) {
        let room = lock(&self.running).as_ref().is_some_and(|running| {
            running.worker.stats().free_cells >= u64::from(self.model.n_ctx)
                && running.sessions.count() < self.spec.limits.sessions_max
        });
        let mut since = lock(&self.room);
        *since = room.then(|| since.unwrap_or_else(Instant::now));
    }

    /// What it says of itself; nothing when it is dead.
    pub(super) fn advert(&self, now_ms: u64) -> Option<Advert> {
        let running = lock(&self.running);
        let worker = &running.as_ref()?.worker;
        let n_layers = self.spec.layers.len() as u64;
        let layers = LayerRange {
            start: self.spec.layers.start as u16,
            end: self.spec.layers.end as u16,
        };
        let model = ModelAdvert {
            model: MODEL,
            name: "chain".into(),
            n_layer: self.model.n_layer as u16,
            live: vec![layers],
            intended: vec![layers],
            layer_tokens_s: Some(Measured {
                value: 1.0 / self.spec.claims.as_secs_f32(),
                age_s: 0,
            }),
            n_ctx_max: worker.shape().n_ctx_max,
            // As the product counts them.
            free_cells: worker.stats().free_cells * n_layers,
            n_embd: self.model.n_embd,
            numerics: 0,
            stored: Vec::new(),
            layer_bytes_max: None,
            experts: None,
        };
        Some(Advert {
            peer: self.network.peer(self.number),
            seq: now_ms,
            ttl_ms: TTL_MS,
            addrs: Vec::new(),
            models: vec![model],
            uplink_bytes_s: None,
            queue: worker.queued() as u16,
            rtts: Vec::new(),
            leaving: false,
            agent: "sim".into(),
        })
    }

    /// Holds what sessions hold against what was granted to them.
    pub(super) fn check_budgets(&self) {
        self.look_for_room();
        let running = lock(&self.running);
        let Some(Running {
            sessions, worker, ..
        }) = running.as_ref()
        else {
            return;
        };
        let (held, limits, stats) = (sessions.holdings(), &self.spec.limits, worker.stats());
        let within = held.sessions <= limits.sessions_max
            && held.pairing <= limits.parked_max
            && held.retained_memory <= limits.retained_memory
            && held.retained_disk <= limits.retained_disk
            && stats.kv_bytes <= stats.kv_bytes_max;
        if !within {
            let detail = format_args!("node {}: {held:?}, {stats:?}", self.number);
            self.log
                .broken("leases and retained bytes are within budget", detail);
        }
    }

    /// Long after everybody left: nothing may be held any more.
    pub(super) fn check_empty(&self) {
        let rule = "everything is given back";
        for sessions in lock(&self.gone).iter() {
            if sessions.holdings() != node::session::Holdings::default() {
                let detail = format_args!("node {}, dead: {:?}", self.number, sessions.holdings());
                self.log.broken(rule, detail);
            }
        }
        let running = lock(&self.running);
        let Some(Running {
            sessions, worker, ..
        }) = running.as_ref()
        else {
            return;
        };
        let (held, stats) = (sessions.holdings(), worker.stats());
        if held != node::session::Holdings::default() || stats.kv_bytes > 0 || worker.queued() > 0 {
            let detail = format_args!("node {}: {held:?}, {stats:?}", self.number);
            self.log.broken(rule, detail);
        }
    }

    /// Gives the stage its time: one item after the other, each as long as it takes.
    async fn drive(
        self: Arc<Self>,
        mut hand: WorkerByHand,
        woken: Arc<Notify>,
        driven: (Worker, Sessions),
    ) {
        // Held so that the queue does not end while the node lives.
        let _driven = driven;
        let mut frozen = self.frozen.subscribe();
        loop {
            let Some(cells) = hand.take() else {
                woken.notified().await;
                continue;
            };
            let took = match u32::try_from(cells) {
                Ok(0) => OPENING,
                cells => self.spec.pace * cells.unwrap_or(u32::MAX),
            };
            sleep(took).await;
            let _ = frozen.wait_for(|frozen| !frozen).await;
            hand.run(took);
            self.check_budgets();
        }
    }
}

/// What nodes of a seed are like.
pub(super) fn specs(dice: &Dice, n: usize, n_layer: u32) -> Vec<Spec> {
    // In some swarms a part of the model is held by two nodes only.
    let rare = dice
        .percent(15)
        .then(|| dice.below(n_layer as usize) as u32);
    let mut specs = Vec::with_capacity(n);
    for number in 0..n {
        let len = (2 + dice.below(7) as u32).min(n_layer);
        let mut start = dice.below((n_layer - len + 1) as usize) as u32;
        let mut end = start + len;
        // The first ones cover the model, whatever is drawn.
        let covering = n_layer.div_ceil(4) as usize;
        if number < 2 * covering {
            start = 4 * (number % covering) as u32;
            end = (start + 4).min(n_layer);
        } else if let Some(rare) = rare.filter(|rare| (start..end).contains(rare)) {
            if rare > start {
                end = rare;
            } else {
                start = rare + 1;
            }
            if start >= end {
                continue;
            }
        }
        let sessions = 2 + dice.below(12) as u64;
        let pace = Duration::from_micros(200 + dice.below(3000) as u64);
        specs.push(Spec {
            layers: start..end,
            sessions,
            pace,
            claims: pace,
            limits: limits(dice),
        });
    }
    specs
}

/// Small budgets, so that they are reached.
fn limits(dice: &Dice) -> SessionLimits {
    let bytes = |dice: &Dice| dice.pick(&[0, 256 << 10, 1 << 30]).unwrap_or(0);
    SessionLimits {
        sessions_max: 4 + dice.below(20),
        retained_memory: bytes(dice).max(256 << 10),
        retained_disk: bytes(dice),
        ..SessionLimits::default()
    }
}

impl Model {
    /// The chain from `layers`.
    pub(super) fn stage(&self, layers: Range<u32>) -> ChainStage {
        ChainStage::new(self.n_layer, self.n_embd, self.n_vocab, layers, self.seed)
    }

    /// KV of a session in so many layers.
    pub(super) fn session_cells(&self, n_layers: u64) -> u64 {
        u64::from(self.n_ctx) * n_layers
    }
}
