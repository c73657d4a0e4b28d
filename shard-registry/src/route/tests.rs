//! Routes are as cheap as the cheapest, on random swarms of several kinds, and found again when adverts change.

use std::{sync::Arc, time::Duration};

use swarm_proto::{Advert, Hash, Hop, LayerRange, Measured, ModelAdvert, ModelId, Peer};

use super::{
    Query, doubts, estimate, plan, reference::cheapest, seen_at_least, spread, table::scramble,
};
use crate::adverts::Snapshot;

const MODEL: ModelId = ModelId(Hash([7; 32]));
const N_CTX: u32 = 4096;
const TOWNS: u64 = 8;

/// How far peers are from each other.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Space {
    /// In towns on a map.
    Map,
    /// As far as dice say, each pair.
    Dice,
    /// In one building.
    Building,
}

/// A kind of swarm.
#[derive(Debug, Clone, Copy)]
struct Kind {
    space: Space,
    n_peers: u64,
    n_layer: u16,
    /// Layers of a peer, from and to.
    span: (u64, u64),
    /// Neighbours that a peer measured, about.
    near: u64,
    /// Layers of the session that each has room for.
    room: u64,
    /// The client measured one peer of so many.
    seen_of: u64,
}

const MAP: Kind = Kind {
    space: Space::Map,
    n_peers: 240,
    n_layer: 24,
    span: (3, 14),
    near: 16,
    room: 100,
    seen_of: 3,
};

/// More holders of a layer than are searched without a bound.
const CROWD: Kind = Kind {
    n_peers: 260,
    span: (24, 24),
    near: 48,
    ..MAP
};

const KINDS: [Kind; 15] = [
    CROWD,
    // Whose nearest giver holds other layers, and whom the client does not know.
    Kind {
        n_peers: 420,
        span: (8, 24),
        seen_of: 30,
        ..CROWD
    },
    // Nobody holds everything, and the client knows nobody.
    Kind {
        n_peers: 460,
        span: (8, 16),
        space: Space::Building,
        seen_of: u64::MAX,
        ..CROWD
    },
    Kind {
        seen_of: 30,
        ..CROWD
    },
    Kind {
        space: Space::Dice,
        ..CROWD
    },
    MAP,
    Kind { near: 64, ..MAP },
    Kind {
        near: 64,
        seen_of: 30,
        ..MAP
    },
    Kind {
        span: (1, 5),
        near: 32,
        ..MAP
    },
    Kind {
        space: Space::Dice,
        ..MAP
    },
    Kind {
        space: Space::Dice,
        near: 64,
        ..MAP
    },
    Kind {
        space: Space::Building,
        ..MAP
    },
    Kind {
        space: Space::Building,
        span: (24, 24),
        ..MAP
    },
    Kind {
        room: 3,
        near: 32,
        ..MAP
    },
    Kind {
        room: 4,
        space: Space::Building,
        ..MAP
    },
];

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        scramble(self.0) % n
    }
}

fn peer(n: u64) -> Peer {
    let mut key = [0; 32];
    for (i, part) in (0u64..).zip(key.chunks_exact_mut(8)) {
        part.copy_from_slice(&scramble(n * 4 + i).to_le_bytes());
    }
    Peer(key)
}

impl Kind {
    /// A swarm of this kind, and the round trips that its client measured.
    fn swarm(self, seed: u64) -> (Snapshot, Vec<(Peer, u32)>) {
        let mut dice = Dice(seed);
        let n = self.n_peers;
        let towns: Vec<[u64; 2]> = (0..TOWNS)
            .map(|_| [(); 2].map(|()| dice.below(60_000)))
            .collect();
        // The last is the client.
        let home = |_| towns[dice.below(TOWNS) as usize].map(|at| at + dice.below(1000));
        let homes: Vec<[u64; 2]> = (0..=n).map(home).collect();
        let rtt_us = |a: u64, b: u64| -> u32 {
            let mut dice = Dice(seed ^ scramble(a.min(b) << 32 | a.max(b)));
            let us = match self.space {
                Space::Map => {
                    let [x, y] =
                        [0, 1].map(|i| homes[a as usize][i].abs_diff(homes[b as usize][i]));
                    600 + x.max(y) + dice.below(1000)
                }
                Space::Dice => 1000 + dice.below(60_000),
                Space::Building => 150 + dice.below(500),
            };
            us as u32
        };
        let mut near: Vec<Vec<u64>> = vec![Vec::new(); n as usize];
        for a in 0..n {
            for i in 0..self.near / 2 {
                // Half of them are looked for nearby.
                let tries = if i % 2 == 0 { 8 } else { 1 };
                let tried = (0..tries).map(|_| dice.below(n)).filter(|b| *b != a);
                let Some(b) = tried.min_by_key(|b| rtt_us(a, *b)) else {
                    continue;
                };
                near[a as usize].push(b);
                near[b as usize].push(a);
            }
        }
        let measured = |a: u64| {
            let near = near[a as usize].iter().take(64);
            near.map(|b| (peer(*b), rtt_us(a, *b))).collect()
        };
        let adverts = (0..n).map(|a| Arc::new(self.advert(a, measured(a), &mut dice)));
        let adverts = adverts.collect();
        let seen = (0..n).filter(|_| dice.below(self.seen_of) == 0);
        let rtts = seen.map(|a| (peer(a), rtt_us(a, n))).collect();
        (Snapshot::new(adverts), rtts)
    }

    fn advert(self, n: u64, rtts: Vec<(Peer, u32)>, dice: &mut Dice) -> Advert {
        let (from, to) = self.span;
        let len = from + dice.below(to - from + 1);
        let start = dice.below(u64::from(self.n_layer) - len + 1) as u16;
        let figure = |value| Some(Measured { value, age_s: 0 });
        Advert {
            peer: peer(n),
            seq: 1,
            ttl_ms: 30_000,
            addrs: Vec::new(),
            models: vec![ModelAdvert {
                model: MODEL,
                name: String::new(),
                n_layer: self.n_layer,
                live: vec![LayerRange {
                    start,
                    end: start + len as u16,
                }],
                intended: Vec::new(),
                layer_tokens_s: figure(500.0 + dice.below(5000) as f32),
                n_ctx_max: N_CTX,
                free_cells: self.room * u64::from(N_CTX),
                n_embd: 8192,
                numerics: 0,
                stored: Vec::new(),
                layer_bytes_max: None,
                experts: None,
            }],
            uplink_bytes_s: figure(1e6 + dice.below(50_000_000) as f32),
            queue: dice.below(3) as u16,
            rtts,
            leaving: false,
            agent: String::new(),
        }
    }

    fn query(self, rtts: &[(Peer, u32)]) -> Query<'_> {
        Query {
            n_ctx: N_CTX,
            rtts,
            ..Query::new(MODEL, self.n_layer)
        }
    }
}

/// A client's question, with the round trips it measured.
pub(super) struct Asked(Kind, Vec<(Peer, u32)>);

impl Asked {
    pub(super) fn ask(&self) -> Query<'_> {
        self.0.query(&self.1)
    }
}

/// Swarms in which very many hold each layer.
pub(super) fn crowds() -> Vec<(Snapshot, Asked)> {
    let kinds = KINDS.iter().filter(|kind| kind.n_peers > MAP.n_peers);
    let swarm = |kind: &Kind| {
        let (swarm, rtts) = kind.swarm(1);
        (swarm, Asked(*kind, rtts))
    };
    kinds.map(swarm).collect()
}

/// `SHOAL_PLAN_SEEDS=from..to` tries these instead.
fn seeds() -> std::ops::Range<u64> {
    let asked = std::env::var("SHOAL_PLAN_SEEDS").ok();
    let asked = asked.and_then(|text| {
        let (from, to) = text.split_once("..")?;
        Some(from.parse().ok()?..to.parse().ok()?)
    });
    asked.unwrap_or(0..5)
}

#[test]
fn no_route_is_a_hundredth_dearer_than_a_search_over_everybody() {
    for kind in KINDS {
        for seed in seeds() {
            let (swarm, rtts) = kind.swarm(seed);
            let query = kind.query(&rtts);
            let least = cheapest(&swarm, &query);
            let route = plan(&swarm, &query).ok();
            let found = route.as_ref().map(|route| route.estimate.as_nanos() as u64);
            let as_good = match (found, least) {
                (Some(found), Some(least)) if kind.room < 100 => found <= least,
                (found, least) => found == least,
            };
            assert!(
                as_good,
                "{kind:?}, seed {seed}: {found:?} ns, not {least:?}"
            );
            let hops = route.map(|route| route.hops).unwrap_or_default();
            let priced = estimate(&swarm, &query, &hops).map(|priced| priced.as_nanos() as u64);
            assert_eq!(priced, found, "{kind:?}, seed {seed}");
        }
    }
}

/// Links are kept from one plan to the next: they may be older than the adverts, what is planned is not.
#[test]
fn what_is_kept_from_plan_to_plan_changes_no_price() {
    let kind = Kind { near: 32, ..MAP };
    let (swarm, rtts) = kind.swarm(3);
    let query = kind.query(&rtts);
    let first = plan(&swarm, &query).expect("a route");
    assert_eq!(plan(&swarm, &query), Ok(first.clone()));
    let on_route = |peer: &Peer| first.hops.iter().any(|hop| hop.peer == *peer);
    // Whoever was on the route is slow now, and says so in a newer advert.
    let slower = swarm.with(|advert| {
        if on_route(&advert.peer) {
            advert.seq += 1;
            advert.queue = 500;
        }
    });
    let second = plan(&slower, &query).expect("a route");
    assert!(!second.hops.iter().any(|hop| on_route(&hop.peer)));
    let anew = Snapshot::new(slower.adverts.clone());
    assert_eq!(plan(&anew, &query), Ok(second.clone()));
    assert_eq!(estimate(&anew, &query, &second.hops), Some(second.estimate));
    // Who comes is found, who goes is not, also before links are looked up anew.
    let mut adverts = swarm.adverts.clone();
    adverts.retain(|advert| !on_route(&advert.peer));
    let mut best = Advert::clone(&swarm.adverts[0]);
    best.peer = peer(1_000_000);
    best.queue = 0;
    best.models[0].live = vec![LayerRange {
        start: 0,
        end: kind.n_layer,
    }];
    best.models[0].layer_tokens_s = Some(Measured {
        value: 1e6,
        age_s: 0,
    });
    let came = best.peer;
    adverts.push(Arc::new(best));
    adverts.sort_unstable_by_key(|advert| advert.peer);
    let mut later = swarm.with(|_| {});
    later.adverts = adverts;
    let third = plan(&later, &query).expect("a route");
    assert_eq!(
        third.hops.iter().map(|hop| hop.peer).collect::<Vec<_>>(),
        [came]
    );
    assert_eq!(estimate(&later, &query, &third.hops), Some(third.estimate));
}

#[test]
fn what_is_drawn_is_not_much_dearer() {
    for seed in seeds() {
        let (swarm, rtts) = MAP.swarm(seed);
        let query = MAP.query(&rtts);
        let least = plan(&swarm, &query).expect("a route").estimate;
        for draw in 0..10 {
            let drawn = Query {
                jitter: 0.3,
                seed: draw,
                ..query.clone()
            };
            let route = spread(&swarm, &drawn).expect("a route");
            assert_eq!(estimate(&swarm, &query, &route.hops), Some(route.estimate));
            // Compute is up to 1.3 times as dear, and a hop may save 3 % and not be taken.
            let n_hops = route.hops.len() as f64;
            assert!(
                route.estimate <= least.mul_f64(1.3 + 0.03 * n_hops),
                "seed {seed}"
            );
        }
    }
}

/// Three peers of one building: two that hold the first half and one that holds the second; all claim 1000.
fn halves() -> (Snapshot, Vec<(Peer, u32)>) {
    let kind = Kind {
        space: Space::Building,
        n_peers: 3,
        ..MAP
    };
    let (swarm, _) = kind.swarm(1);
    let near: Vec<(Peer, u32)> = (0..3).map(|n| (peer(n), 200)).collect();
    let swarm = swarm.with(|advert| {
        let second = advert.peer == peer(2);
        let (start, end) = if second { (12, 24) } else { (0, 12) };
        advert.models[0].live = vec![LayerRange { start, end }];
        advert.models[0].layer_tokens_s = Some(Measured {
            value: 1000.0,
            age_s: 0,
        });
        advert.queue = 0;
        advert.rtts = near.clone();
    });
    (swarm, near)
}

#[test]
fn a_slow_token_is_shared_by_nobody_who_is_fast_elsewhere() {
    let (swarm, near) = halves();
    let query = MAP.query(&near);
    let hop = |n: u64, start, end| Hop {
        peer: peer(n),
        addrs: Vec::new(),
        layers: LayerRange { start, end },
    };
    let seen = |first: u64, step_ms: u64| {
        let hops = [hop(first, 0, 12), hop(2, 12, 24)];
        seen_at_least(&swarm, &query, &hops, Duration::from_millis(step_ms))
    };
    // As fast as they say: 24 layers, and a little for the ways between.
    for (_, speed) in seen(1, 25) {
        assert!((900.0..=1000.0).contains(&speed), "{speed}");
    }
    // The first is slow: nobody can tell which of them, so both are at least as fast as this.
    let slow = seen(0, 412);
    for (_, speed) in &slow {
        assert!((29.0..32.0).contains(speed), "{speed}");
    }
    // Less than no time is left where the ways are dearer than the token: they are as fast as they say.
    assert!(seen(1, 0).iter().all(|(_, speed)| *speed <= 1001.0));
    // With the best that was seen of each, the slow one is left.
    let best = [slow[0], seen(1, 25)[0], seen(1, 25)[1]];
    let wiser = Query {
        seen: &best,
        ..query.clone()
    };
    let doubted = doubts(&swarm, &wiser);
    assert_eq!(doubted.len(), 1);
    assert_eq!((doubted[0].peer, doubted[0].claimed), (peer(0), 1000.0));
    assert!((doubted[0].counted - 2.0 * doubted[0].seen).abs() < 0.01);
    assert_eq!(plan(&swarm, &wiser).expect("a route").hops[0].peer, peer(1));
    // What is claimed below what was seen stays.
    let more = best.map(|(peer, speed)| (peer, speed * 1e6));
    let faster = Query {
        seen: &more,
        ..query.clone()
    };
    assert_eq!(plan(&swarm, &faster), plan(&swarm, &query));
    let stranger = [hop(9, 0, 24)];
    assert!(seen_at_least(&swarm, &query, &stranger, Duration::from_secs(1)).is_empty());
}
