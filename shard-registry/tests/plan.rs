//! The advert table and the planner against what they promise.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::{collections::HashSet, sync::Arc, time::Duration};

use proptest::prelude::*;
use shard_registry::{
    AdvertTable, Outcome, Refusal, Snapshot,
    adverts::{CLOCK_SKEW_MS, PEERS_MAX},
    route::{self, Query},
};
use swarm_proto::{
    Advert, Hash, Hop, LayerRange, Measured, ModelAdvert, ModelId, Peer, SignedAdvert, SwarmId,
};

const MODEL: ModelId = ModelId(Hash([7; 32]));
const NOW: u64 = 1_700_000_000_000;

fn peer(n: u8) -> Peer {
    Peer([n; 32])
}

fn span(start: u16, end: u16) -> LayerRange {
    LayerRange { start, end }
}

fn advert(peer: Peer, n_layer: u16, live: LayerRange, speed: f32) -> Advert {
    Advert {
        peer,
        seq: NOW,
        ttl_ms: 30_000,
        addrs: vec!["/ip4/127.0.0.1/tcp/1".into(), "x".repeat(129)],
        models: vec![ModelAdvert {
            model: MODEL,
            name: "demo".into(),
            n_layer,
            live: vec![live],
            intended: vec![span(0, n_layer)],
            layer_tokens_s: Some(Measured {
                value: speed,
                age_s: 1,
            }),
            n_ctx_max: 1024,
            free_cells: 100_000,
            n_embd: 64,
            numerics: 0,
            stored: Vec::new(),
            layer_bytes_max: None,
            experts: None,
        }],
        uplink_bytes_s: Some(Measured {
            value: 1e9,
            age_s: 1,
        }),
        queue: 0,
        rtts: vec![],
        leaving: false,
        agent: "test".into(),
    }
}

fn snapshot(adverts: Vec<Advert>) -> Snapshot {
    Snapshot::new(adverts.into_iter().map(Arc::new).collect())
}

fn spans(hops: &[Hop]) -> Vec<(u8, String)> {
    hops.iter()
        .map(|hop| (hop.peer.0[0], hop.layers.to_string()))
        .collect()
}

#[test]
fn a_route_enters_and_leaves_spans_where_it_is_cheapest() {
    let swarm = snapshot(vec![
        advert(peer(1), 6, span(0, 4), 1000.0),
        advert(peer(2), 6, span(2, 6), 4000.0),
        advert(peer(3), 6, span(0, 1), 9000.0),
    ]);
    let near = [(peer(1), 100), (peer(2), 100), (peer(3), 100)];
    let query = Query {
        rtts: &near,
        ..Query::new(MODEL, 6)
    };
    let route = route::plan(&swarm, &query).unwrap();
    assert_eq!(
        spans(&route.hops),
        [(3, "0..1".into()), (1, "1..2".into()), (2, "2..6".into())]
    );
    assert_eq!(
        route::estimate(&swarm, &query, &route.hops),
        Some(route.estimate)
    );
    assert_eq!(
        route.hops[0].addrs,
        ["/ip4/127.0.0.1/tcp/1"],
        "an address over the limit is left out"
    );
    // Far from each other, a hop saved is worth the slower peer.
    let route = route::plan(&swarm, &Query::new(MODEL, 6)).unwrap();
    assert_eq!(spans(&route.hops), [(1, "0..2".into()), (2, "2..6".into())]);
}

#[test]
fn more_nodes_are_never_slower() {
    let one = advert(peer(1), 8, span(0, 8), 1000.0);
    let near: Vec<_> = (1..20).map(|n| (peer(n), 50)).collect();
    let query = Query {
        rtts: &near,
        ..Query::new(MODEL, 8)
    };
    let alone = route::plan(&snapshot(vec![one.clone()]), &query).unwrap();
    let twins = (2..20).map(|n| advert(peer(n), 8, span(0, 8), 1000.0));
    let many = route::plan(&snapshot(twins.chain([one]).collect()), &query).unwrap();
    assert_eq!(many.hops.len(), 1, "equals do not make a pipeline");
    assert_eq!(many.estimate, alone.estimate);
}

#[test]
fn jitter_spreads_clients_and_buys_no_hops() {
    let near: Vec<_> = (1..=4).map(|n| (peer(n), 50)).collect();
    let routes =
        |swarm: &Snapshot, plan: fn(&Snapshot, &Query) -> Result<route::Route, route::NoRoute>| {
            let routes = (0..200).map(|seed| {
                let query = Query {
                    rtts: &near,
                    jitter: 0.3,
                    seed: seed * 1000,
                    ..Query::new(MODEL, 8)
                };
                let route = plan(swarm, &query).unwrap();
                route.hops.iter().map(|hop| hop.peer.0[0]).collect()
            });
            routes.collect::<HashSet<Vec<u8>>>()
        };
    let mut whole = advert(peer(1), 8, span(0, 8), 1000.0);
    whole.rtts = vec![(peer(2), 50), (peer(3), 50)];
    let mut half = advert(peer(2), 8, span(0, 4), 1000.0);
    half.rtts = vec![(peer(3), 50)];
    let halves = [half, advert(peer(3), 8, span(4, 8), 1000.0)];
    let swarm = snapshot(halves.into_iter().chain([whole.clone()]).collect());
    assert!(
        routes(&swarm, route::plan).len() > 1,
        "jitter alone takes two hops where one does"
    );
    assert_eq!(routes(&swarm, route::spread), HashSet::from([vec![1]]));
    // A little slower, and still one peer less to fail; much slower, and two are worth it.
    for (speed, hops) in [(980.0, 1), (500.0, 2)] {
        let mut slower = whole.clone();
        slower.models[0].layer_tokens_s = Some(Measured {
            value: speed,
            age_s: 1,
        });
        let others = swarm.adverts.iter().map(|advert| Advert::clone(advert));
        let others = others.filter(|advert| advert.peer != peer(1));
        let swarm = snapshot(others.chain([slower]).collect());
        let routes = routes(&swarm, route::spread);
        assert!(
            routes.iter().all(|route| route.len() == hops),
            "{speed}: {routes:?}"
        );
    }
    let twin = advert(peer(4), 8, span(0, 8), 1000.0);
    let twins = routes(&snapshot(vec![whole, twin]), route::spread);
    assert_eq!(twins, HashSet::from([vec![1], vec![4]]), "equals share");
}

#[test]
fn queues_speeds_and_known_distances_count() {
    let first = |change: fn(&mut Advert)| {
        let mut changed = advert(peer(1), 4, span(0, 4), 1000.0);
        change(&mut changed);
        let swarm = snapshot(vec![changed, advert(peer(2), 4, span(0, 4), 1000.0)]);
        route::plan(&swarm, &Query::new(MODEL, 4)).unwrap().hops[0]
            .peer
            .0[0]
    };
    assert_eq!(first(|_| {}), 1);
    assert_eq!(first(|a| a.queue = 1), 2);
    assert_eq!(
        first(|a| a.models[0].layer_tokens_s = None),
        2,
        "unmeasured is not trusted"
    );
    assert_eq!(first(|a| a.uplink_bytes_s = None), 2);
    assert_eq!(first(|a| a.leaving = true), 2);
    assert_eq!(
        first(|a| a.models[0].n_layer = 5),
        2,
        "another idea of the model"
    );
    // Two tails: the one that says it is near the head wins.
    let mut near = advert(peer(3), 4, span(2, 4), 1000.0);
    near.rtts = vec![(peer(1), 200), (peer(99), 1)];
    let swarm = snapshot(vec![
        advert(peer(1), 4, span(0, 2), 1000.0),
        advert(peer(2), 4, span(2, 4), 1000.0),
        near,
    ]);
    let route = route::plan(&swarm, &Query::new(MODEL, 4)).unwrap();
    assert_eq!(route.hops[1].peer, peer(3));
}

#[test]
fn a_peer_gets_no_more_layers_than_it_has_room_for() {
    let with_room = |n: u8, speed: f32, layers: u64| {
        let mut advert = advert(peer(n), 8, span(0, 8), speed);
        advert.models[0].free_cells = layers * 1024;
        advert
    };
    // A context of 600 takes 1,024 positions of each layer.
    let query = Query {
        n_ctx: 600,
        ..Query::new(MODEL, 8)
    };
    let planned = |adverts: Vec<Advert>| route::plan(&snapshot(adverts), &query);
    let fast = |layers| with_room(1, 4000.0, layers);
    let slow = |layers| with_room(2, 400.0, layers);
    let alone = |n: u8| vec![(n, "0..8".to_string())];
    let route = planned(vec![fast(8), slow(8)]).unwrap();
    assert_eq!(spans(&route.hops), alone(1));
    let route = planned(vec![fast(5), slow(3)]).unwrap();
    assert_eq!(route.hops.len(), 2, "both are needed: {:?}", route.hops);
    for hop in &route.hops {
        let room = if hop.peer == peer(1) { 5 } else { 3 };
        assert_eq!(hop.layers.len(), room, "{:?}", route.hops);
    }
    let route = planned(vec![fast(0), slow(8)]).unwrap();
    assert_eq!(spans(&route.hops), alone(2));
    // The adverts may be old: who has some room is asked, who has none is not.
    let route = planned(vec![fast(3), slow(3)]).unwrap();
    assert_eq!(spans(&route.hops), alone(1));
    let none = planned(vec![fast(0), slow(0)]).unwrap_err();
    assert_eq!(none.full, [span(0, 8)]);
}

#[test]
fn what_is_missing_is_named() {
    let swarm = snapshot(vec![
        advert(peer(1), 12, span(0, 3), 1.0),
        advert(peer(2), 12, span(2, 8), 1.0),
        advert(peer(3), 12, span(11, 12), 1.0),
    ]);
    let none = route::plan(&swarm, &Query::new(MODEL, 12)).unwrap_err();
    assert_eq!(none.missing, [span(8, 11)]);
    assert_eq!(
        none.to_string(),
        "no usable peer serves layers 8..11 (3 peers serve others of its layers)"
    );
    let avoid = [peer(2)];
    let none = route::plan(
        &swarm,
        &Query {
            avoid: &avoid,
            ..Query::new(MODEL, 12)
        },
    )
    .unwrap_err();
    assert_eq!(none.missing, [span(3, 11)]);
    assert!(
        none.to_string()
            .contains("peers that may not be used serve 3..8"),
        "{none}"
    );
    let allow = [peer(1)];
    let none = route::plan(
        &swarm,
        &Query {
            allow: Some(&allow),
            ..Query::new(MODEL, 12)
        },
    )
    .unwrap_err();
    assert_eq!(none.excluded, [span(3, 8), span(11, 12)]);
    let none = route::plan(
        &swarm,
        &Query {
            n_ctx: 2048,
            ..Query::new(MODEL, 12)
        },
    )
    .unwrap_err();
    assert_eq!(none.full, [span(0, 8), span(11, 12)]);
    let other = Query::new(ModelId(Hash([8; 32])), 12);
    assert!(
        route::plan(&swarm, &other)
            .unwrap_err()
            .to_string()
            .starts_with("no peer serves any layer")
    );
    assert!(route::plan(&swarm, &Query::new(MODEL, 0)).is_err());
}

prop_compose! {
    fn adverts(max: usize, n_layer: u16)(
        peers in prop::collection::vec(
            (0..n_layer, 1..=n_layer, 1f32..20_000.0, 1e5f32..1e9, 0u16..4,
             prop::collection::vec((0u8..max as u8, 0u32..100_000), 0..4), 0u64..2600),
            1..=max,
        ),
    ) -> Vec<Advert> {
        (0u8..).zip(peers).map(|(i, (start, len, speed, uplink, queue, rtts, cells))| {
            let live = span(start, (start + len).min(n_layer));
            let mut advert = advert(peer(i), n_layer, live, speed);
            advert.uplink_bytes_s = Some(Measured { value: uplink, age_s: 0 });
            advert.queue = queue;
            advert.models[0].free_cells = cells;
            advert.rtts = rtts.into_iter().map(|(n, us)| (peer(n), us)).collect();
            advert
        }).collect()
    }
}

/// Layers of the query's session that a peer has room for, by its advert.
fn room(swarm: &Snapshot, query: &Query, peer: Peer) -> u64 {
    let advert = swarm.adverts.iter().find(|a| a.peer == peer).unwrap();
    match query.n_ctx {
        0 => u64::MAX,
        n_ctx => advert.models[0].room(n_ctx),
    }
}

/// Whether no hop, and whether no peer, has more layers than there is room for.
fn fits(swarm: &Snapshot, query: &Query, hops: &[Hop]) -> [bool; 2] {
    let sum = |peer: Peer| -> u64 {
        let of_peer = hops.iter().filter(|hop| hop.peer == peer);
        of_peer.map(|hop| u64::from(hop.layers.len())).sum()
    };
    let room = |hop: &Hop| room(swarm, query, hop.peer);
    [
        hops.iter()
            .all(|hop| u64::from(hop.layers.len()) <= room(hop)),
        hops.iter().all(|hop| sum(hop.peer) <= room(hop)),
    ]
}

/// What the cheapest of some ways through the layers costs.
#[derive(Default)]
struct Cheapest {
    any: Option<Duration>,
    /// Of those in which every hop has room.
    hops_fit: Option<Duration>,
    /// Of those in which every peer has room.
    peers_fit: Option<Duration>,
}

/// All ways to give each layer to a holder, tried one by one.
fn brute_force(swarm: &Snapshot, query: &Query) -> Cheapest {
    let holders = swarm.coverage(&MODEL, query.n_layer).holders;
    let usable = |held: Vec<Peer>| -> Vec<Peer> {
        let usable = |peer: &Peer| room(swarm, query, *peer) > 0;
        held.into_iter().filter(usable).collect()
    };
    let holders: Vec<_> = holders.into_iter().map(usable).collect();
    let mut best = Cheapest::default();
    let mut hops: Vec<Hop> = Vec::new();
    fn descend(
        layer: u16,
        holders: &[Vec<Peer>],
        hops: &mut Vec<Hop>,
        swarm: &Snapshot,
        query: &Query,
        best: &mut Cheapest,
    ) {
        if layer == query.n_layer {
            let cost = route::estimate(swarm, query, hops).unwrap();
            let [hops_fit, peers_fit] = fits(swarm, query, hops);
            let of = [
                (&mut best.any, true),
                (&mut best.hops_fit, hops_fit),
                (&mut best.peers_fit, peers_fit),
            ];
            for (least, counts) in of {
                if counts && least.is_none_or(|least| cost < least) {
                    *least = Some(cost);
                }
            }
            return;
        }
        for peer in &holders[usize::from(layer)] {
            let before = hops.clone();
            match hops.last_mut() {
                Some(hop) if hop.peer == *peer => hop.layers.end += 1,
                _ => hops.push(Hop {
                    peer: *peer,
                    addrs: vec![],
                    layers: span(layer, layer + 1),
                }),
            }
            descend(layer + 1, holders, hops, swarm, query, best);
            *hops = before;
        }
    }
    descend(0, &holders, &mut hops, swarm, query, &mut best);
    best
}

proptest! {
    #[test]
    fn as_good_as_trying_everything(
        adverts in adverts(5, 5),
        rtts in prop::collection::vec((0u8..5, 0u32..50_000), 0..5),
        jitter in 0f32..0.5, seed: u64, n_ctx in prop::sample::select(vec![0, 1, 300]),
    ) {
        let swarm = snapshot(adverts);
        let rtts: Vec<_> = rtts.into_iter().map(|(n, us)| (peer(n), us)).collect();
        let query = Query { rtts: &rtts, jitter, seed, n_ctx, ..Query::new(MODEL, 5) };
        let best = brute_force(&swarm, &query);
        match route::plan(&swarm, &query) {
            Ok(route) => {
                let cost = Some(route.estimate);
                prop_assert_eq!(route::estimate(&swarm, &query, &route.hops), cost);
                prop_assert_eq!(&route::plan(&swarm, &query).unwrap(), &route);
                let [_, fits] = fits(&swarm, &query, &route.hops);
                if best.peers_fit == best.hops_fit {
                    // Also where there is neither: then room does not count.
                    prop_assert_eq!(cost, best.peers_fit.or(best.any));
                    prop_assert_eq!(fits, best.peers_fit.is_some());
                } else if fits {
                    prop_assert!(cost >= best.peers_fit);
                } else {
                    prop_assert_eq!(cost, best.any);
                }
            }
            Err(none) => {
                prop_assert_eq!(best.any, None);
                if n_ctx == 0 {
                    prop_assert_eq!(none.missing, swarm.coverage(&MODEL, 5).gaps());
                }
            }
        }
    }

    #[test]
    fn every_layer_once_and_only_by_whom_it_may(
        adverts in adverts(40, 30), avoided in prop::collection::hash_set(0u8..40, 0..6), seed: u64,
    ) {
        let swarm = snapshot(adverts);
        let avoid: Vec<_> = avoided.iter().map(|n| peer(*n)).collect();
        let allow: Vec<_> = (0..35).map(peer).collect();
        let query = Query { avoid: &avoid, allow: Some(&allow), jitter: 0.3, seed, ..Query::new(MODEL, 30) };
        let Ok(route) = route::plan(&swarm, &query) else { return Ok(()) };
        let mut next = 0;
        for hop in &route.hops {
            prop_assert_eq!(hop.layers.start, next);
            prop_assert!(hop.layers.end > next);
            next = hop.layers.end;
            prop_assert!(!avoid.contains(&hop.peer) && allow.contains(&hop.peer));
            let advert = swarm.adverts.iter().find(|a| a.peer == hop.peer).unwrap();
            prop_assert!(advert.models[0].serves(hop.layers));
        }
        prop_assert_eq!(next, 30);
    }

    /// A peer more is never a route that is worse.
    #[test]
    fn another_peer_never_hurts(mut adverts in adverts(12, 8)) {
        let all = route::plan(&snapshot(adverts.clone()), &Query::new(MODEL, 8));
        adverts.pop();
        if let Ok(fewer) = route::plan(&snapshot(adverts), &Query::new(MODEL, 8)) {
            prop_assert!(all.unwrap().estimate <= fewer.estimate);
        }
    }
}

fn signed(secret: u8, seq: u64, change: impl FnOnce(&mut Advert)) -> SignedAdvert {
    let secret = [secret; 32];
    let mut advert = advert(Peer::of_secret(&secret), 6, span(0, 3), 1.0);
    advert.seq = seq;
    change(&mut advert);
    advert.addrs.truncate(1);
    SignedAdvert::sign(&advert, &swarm_id(), &secret).unwrap()
}

fn swarm_id() -> SwarmId {
    "home".parse().unwrap()
}

#[test]
fn adverts_come_get_old_and_go() {
    let mut table = AdvertTable::new(swarm_id());
    let first = signed(1, NOW, |_| {});
    assert_eq!(table.insert(first.clone(), NOW), Outcome::Accepted);
    assert_eq!(
        table.insert(first.clone(), NOW + 1),
        Outcome::Stale,
        "the same again"
    );
    assert_eq!(
        table.insert(signed(1, NOW - 1, |_| {}), NOW + 1),
        Outcome::Stale,
        "an older one"
    );
    assert_eq!(
        table.insert(signed(1, NOW + 5, |a| a.queue = 3), NOW + 5),
        Outcome::Accepted
    );
    let one = Peer::of_secret(&[1; 32]);
    assert_eq!(table.get(&one, NOW + 6).unwrap().queue, 3);
    assert_eq!(
        table.insert(signed(2, NOW, |a| a.ttl_ms = 1000), NOW),
        Outcome::Accepted
    );
    assert_eq!(table.snapshot(NOW + 999).adverts.len(), 2);
    assert_eq!(table.snapshot(NOW + 1000).adverts.len(), 1, "expired");
    assert_eq!(table.signed(NOW + 1000).len(), 1);
    assert_eq!(table.expire(NOW + 1000), [Peer::of_secret(&[2; 32])]);
    assert_eq!(
        table.insert(signed(2, NOW, |a| a.ttl_ms = 1000), NOW + 1001),
        Outcome::Stale,
        "replayed"
    );
    // Leaving: gone at once, and what it said before does not bring it back.
    assert_eq!(
        table.insert(signed(1, NOW + 7, |a| a.leaving = true), NOW + 7),
        Outcome::Accepted
    );
    assert!(table.get(&one, NOW + 7).is_none());
    assert_eq!(table.insert(first, NOW + 8), Outcome::Stale);
    assert_eq!(
        table.insert(signed(1, NOW + 9, |_| {}), NOW + 9),
        Outcome::Accepted,
        "back again"
    );
}

#[test]
fn who_is_unreachable_is_not_passed_on_until_it_speaks_or_answers() {
    let mut table = AdvertTable::new(swarm_id());
    let [one, two] = [1, 2].map(|n| Peer::of_secret(&[n; 32]));
    table.insert(signed(1, NOW, |_| {}), NOW);
    table.insert(signed(2, NOW, |_| {}), NOW);
    table.note_reachable(&one, false);
    assert_eq!(table.unreachable(NOW), [one]);
    assert_eq!(table.signed(NOW), [signed(2, NOW, |_| {})]);
    assert_eq!(
        table.snapshot(NOW).adverts.len(),
        2,
        "for plans without another way"
    );
    table.note_reachable(&one, true);
    table.note_reachable(&two, false);
    assert_eq!(table.unreachable(NOW), [two]);
    table.insert(signed(2, NOW + 1, |_| {}), NOW + 1);
    assert_eq!(table.unreachable(NOW + 1), []);
    assert_eq!(table.signed(NOW + 1).len(), 2);
}

#[test]
fn wrong_adverts_are_refused_with_a_reason() {
    let mut table = AdvertTable::new(swarm_id());
    let mut forged = signed(1, NOW, |_| {});
    forged.signature[5] ^= 1;
    assert!(matches!(
        table.insert(forged, NOW),
        Outcome::Refused(Refusal::Advert(_))
    ));
    let elsewhere = {
        let advert = advert(Peer::of_secret(&[1; 32]), 6, span(0, 3), 1.0);
        let advert = Advert {
            addrs: vec![],
            ..advert
        };
        SignedAdvert::sign(&advert, &"work".parse().unwrap(), &[1; 32]).unwrap()
    };
    assert!(matches!(
        table.insert(elsewhere, NOW),
        Outcome::Refused(Refusal::Advert(_))
    ));
    let late = table.insert(signed(1, NOW, |_| {}), NOW + CLOCK_SKEW_MS + 1000);
    let Outcome::Refused(why) = late else {
        panic!("{late:?}")
    };
    assert!(
        why.to_string()
            .ends_with("was made 601 s ago; is a clock wrong?"),
        "{why}"
    );
    let early = table.insert(signed(1, NOW + CLOCK_SKEW_MS + 1, |_| {}), NOW);
    assert!(matches!(early, Outcome::Refused(Refusal::Clock { .. })));
    assert!(matches!(
        table.insert(signed(1, u64::MAX, |_| {}), NOW),
        Outcome::Refused(_)
    ));
    assert!(table.snapshot(NOW).adverts.is_empty());
}

#[test]
fn the_table_is_bounded() {
    let mut table = AdvertTable::new(swarm_id());
    let make = |n: usize, seq| {
        let mut secret = [0; 32];
        secret[..8].copy_from_slice(&(n as u64).to_le_bytes());
        let advert = advert(Peer::of_secret(&secret), 6, span(0, 3), 1.0);
        let advert = Advert {
            addrs: vec![],
            seq,
            ..advert
        };
        SignedAdvert::sign(&advert, &swarm_id(), &secret).unwrap()
    };
    for n in 0..PEERS_MAX {
        assert_eq!(table.insert(make(n, NOW), NOW), Outcome::Accepted);
    }
    let over = table.insert(make(PEERS_MAX, NOW), NOW);
    assert!(matches!(over, Outcome::Refused(Refusal::Full { .. })));
    assert_eq!(
        table.insert(make(0, NOW + 1), NOW),
        Outcome::Accepted,
        "who is known stays"
    );
    assert_eq!(
        table.insert(make(PEERS_MAX, NOW + 30_001), NOW + 30_001),
        Outcome::Accepted,
        "the expired make room"
    );
}

#[test]
fn coverage_and_models() {
    let swarm = snapshot(vec![
        advert(peer(1), 6, span(0, 3), 1.0),
        advert(peer(2), 6, span(2, 5), 1.0),
        advert(peer(3), 9, span(0, 9), 1.0),
    ]);
    let coverage = swarm.coverage(&MODEL, 6);
    assert_eq!(coverage.holders[2], [peer(1), peer(2)]);
    assert_eq!(coverage.gaps(), [span(5, 6)]);
    assert!(!coverage.is_complete());
    assert_eq!(swarm.models(), [(MODEL, 6, "demo".to_string())]);
    let peers: HashSet<_> = swarm.adverts.iter().map(|advert| advert.peer).collect();
    assert_eq!(peers.len(), 3);
}
