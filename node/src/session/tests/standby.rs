//! Standbys: fed along, in place at once, in nobody's way.

use std::time::Duration;

use swarm_proto::{Hop, Standby, Standbys};

use super::{
    lost::{computed, decode_over},
    middle::{Mode, interpose},
    swarm::*,
};
use crate::session::{ClientSession, Kind, Route};

const CUTS: [u32; 4] = [0, 4, 9, 12];
const BATCH: u16 = 4;

fn standbys(hops: &[(u8, &Hop)]) -> Standbys {
    let standby = |(at, hop): &(u8, &Hop)| Standby {
        at: *at,
        peer: hop.peer,
        addrs: Vec::new(),
    };
    Standbys {
        peers: hops.iter().map(standby).collect(),
        batch: BATCH,
    }
}

async fn open(swarm: &Swarm, route: &Route) -> ClientSession {
    let kind = Kind {
        model: MODEL,
        n_ctx: 1024,
        dtype: swarm_proto::Dtype::Q8_0,
        n_embd: N_EMBD,
        numerics: swarm_proto::Numerics::Exact,
        n_vocab: N_VOCAB,
    };
    swarm
        .opener()
        .open_route(kind, route.clone())
        .await
        .unwrap()
}

/// Until a node has computed so many rows.
async fn until_computed(swarm: &Swarm, node: usize, rows: u64) {
    let begin = std::time::Instant::now();
    while swarm.nodes[node].worker.stats().rows < rows {
        let late = begin.elapsed() > Duration::from_secs(20);
        assert!(!late, "{} of {rows} rows", computed(swarm)[node]);
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_standby_takes_over_with_what_it_has() {
    let _clock = Clock::start();
    for (lost, mode) in (0..3).flat_map(|at| [(at, Mode::Cut), (at, Mode::Hang)]) {
        let mut swarm = Swarm::new(&CUTS);
        let all_layers: Vec<_> = swarm.nodes.iter().map(|n| n.layers.clone()).collect();
        let stand_ins: Vec<Hop> = (50u8..)
            .zip(all_layers)
            .map(|(n, layers)| swarm.stand_in(n, layers))
            .collect();
        let switch = interpose(&swarm, lost);
        let hops = swarm.route()[..3].to_vec();
        let named: Vec<(u8, &Hop)> = (0u8..).zip(&stand_ins).collect();
        let mut session = open(
            &swarm,
            &Route {
                hops: hops.clone(),
                standbys: standbys(&named),
            },
        )
        .await;
        let mut all = prompt(70, 1);
        session.feed(&all.clone(), TOP1).await.unwrap();
        decode_over(&swarm, &mut session, &mut all, 19, &mut Vec::new()).await;
        // Everything but what makes no batch yet.
        until_computed(&swarm, 3 + lost, 70 + 16).await;
        let before = computed(&swarm);
        switch.send(mode).unwrap();
        let mut again = hops.clone();
        again[lost] = stand_ins[lost].clone();
        let others: Vec<_> = named
            .into_iter()
            .filter(|(at, _)| usize::from(*at) != lost)
            .collect();
        let mut routes = vec![Route {
            hops: again,
            standbys: standbys(&others),
        }];
        decode_over(&swarm, &mut session, &mut all, 9, &mut routes).await;
        assert!(routes.is_empty(), "hop {lost} was not lost");
        let after = computed(&swarm);
        for node in (0..3).filter(|at| *at != lost).chain([3 + lost]) {
            let more = after[node] - before[node];
            let behind = if node < 3 { 0 } else { u64::from(BATCH) };
            assert!(
                more <= 12 + behind,
                "node {node} computed {more} rows for 9 tokens ({mode:?} of {lost})"
            );
        }
        session.close().await;
        if mode == Mode::Cut {
            swarm.assert_empty().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_taken_back_is_taken_back_at_the_standby() {
    let _clock = Clock::start();
    // Much that is new when the hop is lost, or less than a batch, of which the standby has heard nothing.
    for (fed, decoded) in [(9, 6), (1, 0)] {
        let mut swarm = Swarm::new(&CUTS);
        let stand_in = swarm.stand_in(50, 4..9);
        let switch = interpose(&swarm, 1);
        let hops = swarm.route()[..3].to_vec();
        let route = Route {
            hops: hops.clone(),
            standbys: standbys(&[(1, &stand_in)]),
        };
        let mut session = open(&swarm, &route).await;
        let mut all = Vec::new();
        decode(&mut session, &mut all, &prompt(40, 1), 14).await;
        until_computed(&swarm, 3, 40 + 12).await;
        session.truncate(45).unwrap();
        all.truncate(45);
        decode(&mut session, &mut all, &prompt(fed, 5), decoded).await;
        switch.send(Mode::Cut).unwrap();
        let mut again = hops;
        again[1] = stand_in;
        let next = reference().expected(&all);
        all.push(next);
        let _ = session.feed(&[next], TOP1).await;
        let mut routes = vec![again.into()];
        decode_over(&swarm, &mut session, &mut all, 6, &mut routes).await;
        assert!(routes.is_empty());
        let rows = swarm.nodes[3].worker.stats().rows;
        assert!(rows < 54 + 9 + 6 + 20, "it began again: {rows} rows");
        session.close().await;
        swarm.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_standby_that_fails_is_in_nobodys_way() {
    let _clock = Clock::start();
    for behaviour in [Behaviour::Dead, Behaviour::Hangs] {
        let swarm = Swarm::new(&CUTS);
        let absent = Hop {
            peer: peer(77),
            ..swarm.route()[1].clone()
        };
        swarm.wires.set(peer(77), behaviour);
        let mut session = open(
            &swarm,
            &Route {
                hops: swarm.route(),
                standbys: standbys(&[(1, &absent)]),
            },
        )
        .await;
        let mut all = Vec::new();
        decode(&mut session, &mut all, &prompt(40, 1), 20).await;
        session.close().await;
        swarm.assert_empty().await;
    }
}

/// It missed what was taken back, and what it holds is of no use when it is needed after all.
#[tokio::test(start_paused = true)]
async fn a_standby_that_was_cut_off_begins_anew() {
    let _clock = Clock::start();
    let mut swarm = Swarm::new(&CUTS);
    let stand_in = swarm.stand_in(50, 4..9);
    let (switch, off) = (interpose(&swarm, 1), interpose(&swarm, 3));
    let hops = swarm.route()[..3].to_vec();
    let mut session = open(
        &swarm,
        &Route {
            hops: hops.clone(),
            standbys: standbys(&[(1, &stand_in)]),
        },
    )
    .await;
    let mut all = Vec::new();
    decode(&mut session, &mut all, &prompt(40, 1), 14).await;
    until_computed(&swarm, 3, 40 + 12).await;
    off.send(Mode::Cut).unwrap();
    session.truncate(20).unwrap();
    all.truncate(20);
    decode(&mut session, &mut all, &prompt(30, 2), 6).await;
    off.send(Mode::Pass).unwrap();
    switch.send(Mode::Cut).unwrap();
    let mut again = hops;
    again[1] = stand_in;
    let next = reference().expected(&all);
    all.push(next);
    let _ = session.feed(&[next], TOP1).await;
    let mut routes = vec![again.into()];
    decode_over(&swarm, &mut session, &mut all, 6, &mut routes).await;
    assert!(routes.is_empty());
    session.close().await;
}

/// A standby goes on standing by when another hop is lost, and may be the next to be needed.
#[tokio::test(start_paused = true)]
async fn a_standby_follows_through_other_losses() {
    let _clock = Clock::start();
    let mut swarm = Swarm::new(&CUTS);
    let (first, second) = (swarm.stand_in(50, 0..4), swarm.stand_in(51, 4..9));
    let switches = [interpose(&swarm, 0), interpose(&swarm, 1)];
    let hops = swarm.route()[..3].to_vec();
    let mut session = open(
        &swarm,
        &Route {
            hops: hops.clone(),
            standbys: standbys(&[(0, &first), (1, &second)]),
        },
    )
    .await;
    let mut all = prompt(40, 1);
    session.feed(&all.clone(), TOP1).await.unwrap();
    decode_over(&swarm, &mut session, &mut all, 9, &mut Vec::new()).await;
    until_computed(&swarm, 3, 48).await;
    until_computed(&swarm, 4, 48).await;
    let mut again = hops;
    for (at, stand_in) in [first, second.clone()].into_iter().enumerate() {
        switches[at].send(Mode::Cut).unwrap();
        again[at] = stand_in;
        let mut routes = vec![Route {
            hops: again.clone(),
            standbys: if at == 0 {
                standbys(&[(1, &second)])
            } else {
                Standbys::default()
            },
        }];
        decode_over(&swarm, &mut session, &mut all, 9, &mut routes).await;
        assert!(routes.is_empty());
    }
    // The second is fed anew by the first, once: it cannot know what it missed.
    let rows = computed(&swarm);
    let once = 40 + 27 + 8;
    assert!(rows[3] <= once && rows[4] <= 2 * once, "{rows:?}");
    session.close().await;
    swarm.assert_empty().await;
}
