//! How long planning takes, as JSON: 1000 peers, 80 layers, spans and neighbours as in a real swarm,
//! the worst case, in which every peer holds every layer, and peers with room for a few layers only.
//!
//! cargo run --release -p shard-registry --example plan_bench
//! … -- '16 neighbours' 'plan and standbys'    only what has these words: for a profile

use std::{
    io::Write,
    sync::Arc,
    time::{Duration, Instant},
};

use shard_registry::{
    Snapshot,
    route::{NoRoute, Query, Route, plan, spread, standbys},
};
use swarm_proto::{Advert, Hash, Hop, LayerRange, Measured, ModelAdvert, ModelId, Peer};

const MODEL: ModelId = ModelId(Hash([7; 32]));
const N_LAYER: u16 = 80;

/// A plain linear congruential generator: the same swarm every time.
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

/// Positions of the session that is planned for.
const N_CTX: u32 = 4096;

/// Peers with room for `room` layers of a session each.
fn swarm(n_peers: u64, span_max: u64, n_rtts: u64, room: u64) -> Snapshot {
    let mut draw = Draw(1);
    let peer = |n: u64| {
        Peer(
            *Hash::of(&n.to_le_bytes())
                .0
                .first_chunk()
                .unwrap_or(&[0; 32]),
        )
    };
    let advert = |n| {
        let len = if span_max == u64::from(N_LAYER) {
            span_max
        } else {
            4 + draw.below(span_max - 3)
        };
        let start = draw.below(u64::from(N_LAYER) - len + 1) as u16;
        Arc::new(Advert {
            peer: peer(n),
            seq: 1,
            ttl_ms: 30_000,
            addrs: vec!["/ip4/127.0.0.1/tcp/1".into()],
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
                    value: 500.0 + draw.below(5000) as f32,
                    age_s: 0,
                }),
                n_ctx_max: N_CTX,
                free_cells: room * u64::from(N_CTX),
                n_embd: 8192,
                numerics: 0,
                stored: Vec::new(),
                layer_bytes_max: None,
                experts: None,
            }],
            uplink_bytes_s: Some(Measured {
                value: 1e6 + draw.below(50_000_000) as f32,
                age_s: 0,
            }),
            queue: draw.below(3) as u16,
            rtts: (0..n_rtts)
                .map(|_| (peer(draw.below(n_peers)), 1000 + draw.below(60_000) as u32))
                .collect(),
            leaving: false,
            agent: String::new(),
        })
    };
    Snapshot::new((0..n_peers).map(advert).collect())
}

/// What is timed: one search and who stands by; the same where nothing of the adverts was looked up before,
/// as after a quarter of them changed; and what a client does before it opens a session, which is three searches,
/// one of them over everybody.
const WAYS: [(&str, Way); 3] = [
    ("plan and standbys", |swarm, query| {
        backed(swarm, query, plan(swarm, query)?)
    }),
    ("plan and standbys, all new", |swarm, query| {
        let swarm = Snapshot::new(swarm.adverts.clone());
        backed(&swarm, query, plan(&swarm, query)?)
    }),
    ("spread and standbys", |swarm, query| {
        backed(swarm, query, spread(swarm, query)?)
    }),
];
type Way = fn(&Snapshot, &Query) -> Result<Vec<Hop>, NoRoute>;

fn backed(swarm: &Snapshot, query: &Query, route: Route) -> Result<Vec<Hop>, NoRoute> {
    let calm = Query {
        jitter: 0.0,
        ..query.clone()
    };
    std::hint::black_box(standbys(swarm, &calm, &route.hops));
    Ok(route.hops)
}

fn measure(name: &str, swarm: &Snapshot) -> std::io::Result<()> {
    // Round trips to those the client is connected to.
    let rtts = swarm.adverts.iter().step_by(31);
    let rtts: Vec<(Peer, u32)> = rtts.zip(1..).map(|(a, n)| (a.peer, n * 2000)).collect();
    let query = Query {
        jitter: 0.3,
        n_ctx: N_CTX,
        rtts: &rtts,
        ..Query::new(MODEL, N_LAYER)
    };
    for (what, way) in WAYS {
        let mut args = std::env::args().skip(1);
        let asked = |name: &str, arg: Option<String>| arg.is_none_or(|arg| name.ends_with(&arg));
        if !asked(name, args.next()) || !asked(what, args.next()) {
            continue;
        }
        let mut times: Vec<Duration> = Vec::new();
        let mut hops = 0;
        for seed in 0..100 {
            let query = Query {
                seed,
                ..query.clone()
            };
            let start = Instant::now();
            let route = way(swarm, &query);
            times.push(start.elapsed());
            hops = route.map_or(0, |hops| hops.len());
        }
        times.sort_unstable();
        writeln!(
            std::io::stdout(),
            "{{\"case\":\"{name}\",\"what\":\"{what}\",\"peers\":{},\"layers\":{N_LAYER},\"hops\":{hops},\"min_us\":{},\"p50_us\":{},\"p90_us\":{}}}",
            swarm.adverts.len(),
            times[0].as_micros(),
            times[50].as_micros(),
            times[90].as_micros(),
        )?;
    }
    Ok(())
}

fn main() -> std::io::Result<()> {
    let all = u64::from(N_LAYER);
    measure("spans of 4 to 20, 16 neighbours", &swarm(1000, 20, 16, 20))?;
    measure("spans of 4 to 20, 64 neighbours", &swarm(1000, 20, 64, 20))?;
    measure(
        "every peer holds all, 64 neighbours",
        &swarm(1000, all, 64, all),
    )?;
    measure("every peer holds all, room for 3", &swarm(1000, all, 64, 3))
}
