//! Whether a client does better that draws two routes, asks the peers of both how busy they are, and takes the
//! better one, as JSON: many clients open sessions between two adverts, so all plan with the same stale view.
//!
//! cargo run --release -p shard-registry --example two_routes
//!
//! A model of it, with the product's planner: a session goes round and round, a token at a time; at each peer it waits
//! for those of others that are there just then. What a peer is asked is how many that is on average.

use std::{io::Write, sync::Arc, time::Duration};

use shard_registry::{
    Snapshot,
    route::{Query, estimate, plan, spread},
};
use swarm_proto::{Advert, Hash, Hop, LayerRange, Measured, ModelAdvert, ModelId, Peer};

const MODEL: ModelId = ModelId(Hash([7; 32]));
const N_LAYER: u16 = 32;
const N_PEERS: u64 = 60;
const N_CTX: u32 = 2048;
const SEEDS: u64 = 40;

/// A plain linear congruential generator: the same swarms every time.
struct Draw(u64);

impl Draw {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

fn peer(n: u64) -> Peer {
    Peer(
        *Hash::of(&n.to_le_bytes())
            .0
            .first_chunk()
            .unwrap_or(&[0; 32]),
    )
}

/// Peers whose round trips are `rtt_us` at most.
fn swarm(seed: u64, rtt_us: u64) -> Vec<Advert> {
    let mut draw = Draw(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let advert = |n| {
        let len = 4 + draw.below(13);
        let start = draw.below(u64::from(N_LAYER) - len + 1) as u16;
        Advert {
            peer: peer(n),
            seq: 1,
            ttl_ms: 30_000,
            addrs: vec![],
            models: vec![ModelAdvert {
                model: MODEL,
                name: String::new(),
                n_layer: N_LAYER,
                live: vec![LayerRange {
                    start,
                    end: start + len as u16,
                }],
                intended: vec![],
                layer_tokens_s: Some(Measured {
                    value: 300.0 + draw.below(3000) as f32,
                    age_s: 0,
                }),
                n_ctx_max: N_CTX,
                free_cells: 400 * u64::from(N_CTX),
                n_embd: 4096,
                numerics: 0,
                stored: Vec::new(),
                layer_bytes_max: None,
                experts: None,
            }],
            uplink_bytes_s: Some(Measured {
                value: 20e6,
                age_s: 0,
            }),
            queue: 0,
            rtts: (0..N_PEERS)
                .map(|n| (peer(n), 100 + draw.below(rtt_us) as u32))
                .collect(),
            leaving: false,
            agent: String::new(),
        }
    };
    (0..N_PEERS).map(advert).collect()
}

/// What runs: of each session its hops, what its token takes at each without anybody else, and besides.
struct Load {
    sessions: Vec<(Vec<(usize, f64)>, f64)>,
}

impl Load {
    /// Seconds a token of each session, and how many of others' are at each peer on average.
    fn settled(&self) -> (Vec<f64>, Vec<f64>) {
        let alone = |(hops, besides): &(Vec<(usize, f64)>, f64)| {
            hops.iter().map(|hop| hop.1).sum::<f64>() + besides
        };
        let mut times: Vec<f64> = self.sessions.iter().map(alone).collect();
        let mut busy = vec![0.0; N_PEERS as usize];
        for _ in 0..60 {
            busy.fill(0.0);
            for ((hops, _), time) in self.sessions.iter().zip(&times) {
                for (at, work) in hops {
                    busy[*at] += work / time;
                }
            }
            for ((hops, besides), time) in self.sessions.iter().zip(&mut times) {
                let there = |(at, work): &(usize, f64)| {
                    let others: f64 = busy[*at] - work / *time;
                    work * (1.0 + others.max(0.0))
                };
                let next = hops.iter().map(there).sum::<f64>() + besides;
                *time = f64::midpoint(*time, next);
            }
        }
        (times, busy)
    }
}

/// How a client chooses.
#[derive(Clone, Copy)]
enum Way {
    Cheapest,
    Drawn,
    TwoDrawn,
    Fresh,
}

const WAYS: [(&str, Way); 4] = [
    ("the cheapest by the stale view", Way::Cheapest),
    ("one drawn", Way::Drawn),
    ("two drawn, the better by fresh queues", Way::TwoDrawn),
    ("as if all adverts were fresh", Way::Fresh),
];

fn clients(seed: u64, rtt_us: u64, n_clients: u64, way: Way) -> Option<Vec<f64>> {
    let adverts = swarm(seed, rtt_us);
    let of = |adverts: &[Advert]| Snapshot::new(adverts.iter().cloned().map(Arc::new).collect());
    let stale = of(&adverts);
    let mut load = Load {
        sessions: Vec::new(),
    };
    for client in 0..n_clients {
        let mut draw = Draw(seed * 1000 + client);
        let rtts: Vec<(Peer, u32)> = (0..N_PEERS)
            .map(|n| (peer(n), 100 + draw.below(rtt_us) as u32))
            .collect();
        let calm = Query {
            n_ctx: N_CTX,
            rtts: &rtts,
            ..Query::new(MODEL, N_LAYER)
        };
        let drawn = |seed| Query {
            jitter: 0.3,
            seed,
            ..calm.clone()
        };
        let mut fresh = adverts.clone();
        for (advert, busy) in fresh.iter_mut().zip(load.settled().1) {
            advert.queue = busy.round() as u16;
        }
        let fresh = of(&fresh);
        let hops = match way {
            Way::Cheapest => plan(&stale, &calm).ok()?.hops,
            Way::Drawn => spread(&stale, &drawn(client)).ok()?.hops,
            Way::Fresh => spread(&fresh, &drawn(client)).ok()?.hops,
            Way::TwoDrawn => {
                let two = [client, client + (1 << 40)].map(|seed| spread(&stale, &drawn(seed)));
                let [a, b] = two.map(|route| route.ok().map(|route| route.hops));
                let cost = |hops: &Vec<Hop>| estimate(&fresh, &calm, hops);
                [a?, b?].into_iter().min_by_key(cost)?
            }
        };
        let estimated = estimate(&stale, &calm, &hops)?;
        let speed = |hop: &Hop| {
            let at = adverts.iter().position(|advert| advert.peer == hop.peer)?;
            let speed = adverts[at].models[0].layer_tokens_s?.value;
            Some((at, f64::from(hop.layers.len()) / f64::from(speed)))
        };
        let hops: Vec<(usize, f64)> = hops.iter().map(speed).collect::<Option<_>>()?;
        // What the planner counts for compute is half more than it takes.
        let work: f64 = hops.iter().map(|hop| hop.1).sum();
        let besides = (estimated.saturating_sub(Duration::from_secs_f64(1.5 * work))).as_secs_f64();
        load.sessions.push((hops, besides));
    }
    Some(load.settled().0)
}

fn main() -> std::io::Result<()> {
    for (place, rtt_us) in [("one building", 1_000), ("a country", 40_000)] {
        for n_clients in [8, 24, 72] {
            for (name, way) in WAYS {
                let mut all: Vec<f64> = (1..=SEEDS)
                    .filter_map(|seed| clients(seed, rtt_us, n_clients, way))
                    .flatten()
                    .collect();
                all.sort_unstable_by(f64::total_cmp);
                let mean = all.iter().sum::<f64>() / all.len().max(1) as f64;
                let p95 = all.get(all.len() * 95 / 100).copied().unwrap_or_default();
                writeln!(
                    std::io::stdout(),
                    "{{\"place\":\"{place}\",\"clients\":{n_clients},\"way\":\"{name}\",\"sessions\":{},\"mean_ms\":{:.1},\"p95_ms\":{:.1}}}",
                    all.len(),
                    mean * 1e3,
                    p95 * 1e3,
                )?;
            }
        }
    }
    Ok(())
}
