//! A whole swarm in virtual time, from a seed: the product's session, recovery, planning and advert code
//! over simulated machines, with faults. A seed gives the same run every time.
//!
//! ```text
//! seed ─▶ specs (peer), places (network), requests, faults
//!          Routes, Session (node) ─▶ Dialer, View ─▶ network, wire ─▶ Sessions (node) ─▶ Worker by hand
//!                                     tap: reads every frame ─▶ rules ─▶ log: hash, first rule broken
//! ```
//!
//! | file | what |
//! |---|---|
//! | `dice`, `log` | draws; what happened, as a hash and as text |
//! | `wire`, `network`, `tap` | streams that take time, what is cut, the rules of what passes |
//! | `peer`, `gossip` | nodes that die and come back; adverts on their way |
//! | `request`, `faults` | what clients ask, what goes wrong |
//! | `seeds` | many seeds on all cores, and what they add up to |
//!
//! One thread runs one seed: tokio's paused clock jumps to the next timer whenever every task waits, and
//! everything that is drawn comes from the seed. Signatures are not made, processes are tasks, a frozen
//! one is cut off and its stage gets no time.

mod dice;
mod faults;
mod gossip;
#[cfg(test)]
mod liar;
mod log;
mod network;
mod peer;
mod request;
mod seeds;
mod tap;
mod wire;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use node::session::Opener;
use node::{Privacy, Random, Routes, SessionSpec};
use serde::Serialize;
use swarm_proto::{Dtype, Hash, ModelId, Peer, SwarmId};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use dice::{Dice, part_seed};
use faults::Faults;
use gossip::Known;
use log::{Log, lock};
use network::Network;
use peer::Node;
use request::{Ended, Progress, Request};

pub use log::{Violation, virtual_time};
pub use seeds::{Stuck, Summary, run_seeds, stalls_ms};

const MODEL: ModelId = ModelId(Hash([7; 32]));
/// Who was well for so long and has room can be used; a request that ends without is wrong to do so.
const WELL: Duration = Duration::from_secs(15);
/// Longer than who waits for room pauses between two looks.
const ROOM: Duration = Duration::from_secs(5);
/// Longer than the longest lease: after it nothing may be held any more.
const EMPTY_AFTER: Duration = Duration::from_secs(700);

/// What a run is like, besides its seed.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Nodes.
    pub nodes: usize,
    /// Requests, each of a client of its own.
    pub sessions: usize,
    /// Tokens of each answer.
    pub tokens: usize,
    /// Faults.
    pub faults: usize,
    /// Virtual time in which requests begin and faults happen.
    pub span: Duration,
}

/// The model of a run.
#[derive(Debug, Clone, Copy)]
struct Model {
    n_layer: u32,
    n_embd: u32,
    n_vocab: u32,
    n_ctx: u32,
    seed: u64,
}

/// What became of a run.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Outcome {
    /// Its seed.
    pub seed: u64,
    /// A hash of everything that happened, and when.
    pub hash: String,
    /// The first rule that was broken.
    pub violation: Option<Violation>,
    /// Faults by name.
    pub faults: BTreeMap<&'static str, usize>,
    /// Requests that got their answer.
    pub answered: usize,
    /// Requests that their client gave up.
    pub given_up: usize,
    /// Requests that failed while some layer had no holder to be used.
    pub failed: usize,
    /// Rows that came, all of them right.
    pub rows: u64,
    /// For each time something was lost and got over, how long the next row took, in virtual ms.
    pub stalls_ms: Vec<u64>,
    /// Virtual time until the last request ended.
    pub virtual_s: u64,
}

/// Runs one seed, on this thread.
pub fn run_seed(seed: u64, settings: &Settings) -> Outcome {
    start(seed, settings).unwrap_or_else(|error| Outcome {
        seed,
        violation: Some(Violation {
            at_ms: 0,
            invariant: "the simulation starts".into(),
            detail: error.to_string(),
        }),
        ..Outcome::default()
    })
}

fn start(seed: u64, settings: &Settings) -> anyhow::Result<Outcome> {
    let swarm: SwarmId = "sim".parse()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()?;
    Ok(runtime.block_on(async { World::new(seed, settings, &swarm).run().await }))
}

/// Everything there is in a run.
struct World {
    seed: u64,
    settings: Settings,
    model: Model,
    log: Arc<Log>,
    network: Arc<Network>,
    nodes: Vec<Arc<Node>>,
    clients: Vec<Arc<Known>>,
    progress: Vec<Arc<Progress>>,
    faults: Arc<Faults>,
}

impl World {
    fn new(seed: u64, settings: &Settings, swarm: &SwarmId) -> Self {
        let dice = Dice::new(seed, 0);
        let model = Model {
            n_layer: 6 + dice.below(19) as u32,
            n_embd: 32,
            n_vocab: 64,
            n_ctx: 256,
            seed,
        };
        let specs = peer::specs(&dice, settings.nodes, model.n_layer);
        Self::of(seed, settings, swarm, (model, specs, &dice))
    }

    /// A world of these nodes.
    fn of(
        seed: u64,
        settings: &Settings,
        swarm: &SwarmId,
        (model, specs, dice): (Model, Vec<peer::Spec>, &Dice),
    ) -> Self {
        let log = Arc::new(Log::new());
        let machines = specs.len() + settings.sessions;
        let name = |machine: usize| {
            let mut peer = *blake3::hash(&part_seed(seed, machine as u64).to_le_bytes()).as_bytes();
            // For people who read the log.
            peer[0] = machine as u8;
            Peer(peer)
        };
        let network = Network::new(log.clone(), dice, (0..machines).map(name).collect());
        let node = |(number, spec): (usize, peer::Spec)| {
            Node::new(number, spec, model, log.clone(), network.clone())
        };
        let nodes: Vec<_> = specs.into_iter().enumerate().map(node).collect();
        let client = |machine| {
            let near = (0..nodes.len()).filter(|_| dice.percent(30)).collect();
            Known::new(machine, swarm.clone(), log.clone(), network.clone(), near)
        };
        let clients: Vec<_> = (nodes.len()..machines).map(client).collect();
        let progress: Vec<Arc<Progress>> = clients.iter().map(|_| Arc::default()).collect();
        let faults = Arc::new(Faults {
            log: log.clone(),
            network: network.clone(),
            nodes: nodes.clone(),
            clients: clients.clone(),
            requests: progress.clone(),
            dice: Dice::new(seed, 1),
            well: Mutex::new(vec![Some(Instant::now()); machines]),
            done: Mutex::default(),
        });
        Self {
            seed,
            settings: *settings,
            model,
            log,
            network,
            nodes,
            clients,
            progress,
            faults,
        }
    }

    async fn run(self) -> Outcome {
        let gossip = self.gossip();
        let (n, span) = (self.settings.faults, self.settings.span);
        let faults = tokio::spawn(self.faults.clone().run(n, span));
        let mut outcome = Outcome {
            seed: self.seed,
            ..Outcome::default()
        };
        let mut requests = self.requests();
        while let Some(ended) = requests.join_next().await {
            match ended {
                Ok((_, Ended::Answered)) => outcome.answered += 1,
                Ok((_, Ended::GivenUp)) => outcome.given_up += 1,
                Ok((number, Ended::Failed(error))) => {
                    outcome.failed += 1;
                    self.judge(number, &error);
                }
                Ok((_, Ended::Broken)) => {}
                Err(error) => self.log.broken("nothing panics", format_args!("{error}")),
            }
        }
        outcome.virtual_s = self.log.elapsed().as_secs();
        if let Err(error) = faults.await {
            self.log.broken("nothing panics", format_args!("{error}"));
        }
        drop(gossip);
        self.faults.heal();
        sleep(EMPTY_AFTER).await;
        self.nodes.iter().for_each(|node| node.check_empty());
        let done = lock(&self.faults.done).clone();
        outcome.faults = done.into_iter().map(|(kind, n)| (kind.name(), n)).collect();
        for progress in &self.progress {
            outcome.rows += *lock(&progress.rows);
            let stalls = lock(&progress.stalls);
            let millis = stalls.iter().map(|stall| stall.as_millis() as u64);
            outcome.stalls_ms.extend(millis);
        }
        outcome.violation = self.log.violation();
        outcome.hash = self.log.hash();
        outcome
    }

    /// Lets the nodes say that they are there, until it is dropped.
    fn gossip(&self) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        for node in &self.nodes {
            tasks.spawn(gossip::publish(
                node.clone(),
                self.clients.clone(),
                self.network.clone(),
                self.log.clone(),
                Dice::new(self.seed, 1000 + node.number as u64),
            ));
        }
        tasks.spawn(gossip::sweep(self.clients.clone()));
        tasks
    }

    /// Starts the requests, one after the other, within the first third of the time.
    fn requests(&self) -> JoinSet<(usize, Ended)> {
        let mut tasks = JoinSet::new();
        let last = self.settings.span.as_millis() as u64 / 3;
        for (number, client) in self.clients.iter().enumerate() {
            let dice = Dice::new(self.seed, 2000 + number as u64);
            let (me, dialer) = (
                self.network.peer(client.number),
                self.network.dialer(client.number),
            );
            let opener = Opener {
                random: Random::seeded(part_seed(self.seed, 3000 + number as u64)),
                ..Opener::new(me, dialer)
            };
            let dtypes = [Dtype::F32, Dtype::Bf16, Dtype::Q8_0];
            let request = Request {
                number,
                tokens: self.settings.tokens,
                model: self.model,
                routes: Routes::new(client.clone(), Privacy::Open, opener),
                spec: SessionSpec {
                    model: MODEL,
                    n_layer: self.model.n_layer as u16,
                    n_embd: self.model.n_embd,
                    n_vocab: self.model.n_vocab,
                    n_ctx: self.model.n_ctx,
                    dtype: dice.pick(&dtypes).unwrap_or(Dtype::F32),
                    numerics: swarm_proto::Numerics::Exact,
                    avoid: Vec::new(),
                    standby: true,
                    batch: 16,
                    patience: SessionSpec::PATIENCE,
                },
                dice,
                log: self.log.clone(),
                progress: self.progress[number].clone(),
            };
            tasks.spawn(async move {
                sleep(request.dice.millis(0, last)).await;
                (number, request.run().await)
            });
        }
        tasks
    }

    /// A request may fail only while nobody could have served it.
    fn judge(&self, number: usize, error: &node::ClientError) {
        let client = &self.clients[number];
        // Who failed while a session opens is not asked again by the same opening.
        let opening = *lock(&self.progress[number].opening);
        let long = opening.map_or(WELL, |since| since.elapsed().max(WELL));
        let usable = |node: &&Arc<Node>| {
            node.is_alive()
                && node.has_room(ROOM)
                && self.faults.is_well(node.number, long)
                && client.knows(&self.network.peer(node.number))
        };
        let holders: Vec<_> = self.nodes.iter().filter(usable).collect();
        let mut layers = 0..self.model.n_layer;
        let covered = layers.all(|l| holders.iter().any(|node| node.spec.layers.contains(&l)));
        if covered && self.faults.is_well(client.number, long) {
            let detail = format_args!("request {number}: {error}");
            self.log
                .broken("a request fails only for want of holders", detail);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Settings = Settings {
        nodes: 12,
        sessions: 10,
        tokens: 8,
        faults: 0,
        span: Duration::from_secs(60),
    };

    /// What a run notices when something is wrong from its beginning.
    fn notices(spoil: impl FnOnce(&mut World)) -> Option<String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        let outcome = runtime.block_on(async {
            let swarm = "test".parse().expect("a swarm id");
            let mut world = World::new(5, &SMALL, &swarm);
            spoil(&mut world);
            world.run().await
        });
        outcome.violation.map(|violation| violation.invariant)
    }

    #[test]
    fn a_small_run_breaks_no_rule() {
        assert_eq!(notices(|_| ()), None);
    }

    #[test]
    fn another_chain_is_noticed() {
        let rule = notices(|world| world.model.seed += 1);
        assert_eq!(
            rule.as_deref(),
            Some("each layer exactly once for each token")
        );
    }

    #[test]
    fn kv_that_is_never_given_back_is_noticed() {
        let rule = notices(|world| {
            let node = world.nodes[0].clone();
            tokio::spawn(async move { node.fill(Duration::from_secs(1_000_000)).await });
        });
        assert_eq!(rule.as_deref(), Some("everything is given back"));
    }

    #[test]
    fn a_request_may_fail_only_where_a_layer_has_no_holder() {
        // One more layer than there is: nobody holds it.
        assert_eq!(notices(|world| world.model.n_layer += 1), None);
        // A longer context than anybody grants, with holders that have room.
        let rule = notices(|world| world.model.n_ctx = 1 << 21);
        assert_eq!(
            rule.as_deref(),
            Some("a request fails only for want of holders")
        );
    }
}
