//! Plans and slides: the same everywhere, worth it, and nothing gets scarcer than two holders.

use proptest::prelude::*;

use super::super::{
    plan::{GAIN_MIN, HOME_PEERS_MAX, local, movers, plan},
    slide::{OTHERS_MIN, Slide, Step, step},
    throughput::throughput,
};
use super::*;

fn tokens_s(swarm: &Holdings) -> f64 {
    throughput(swarm.n_layer, &swarm.supplies(Count::Held)).tokens_s
}

/// Two hold the first half, one the second: a better swarm is one slide away.
fn lopsided() -> Holdings {
    holdings(
        4,
        &[
            (10.0, 99.0, 0..2, 0..0),
            (10.0, 99.0, 0..2, 0..0),
            (10.0, 99.0, 0..2, 0..0),
            (10.0, 99.0, 2..4, 0..0),
        ],
    )
}

#[test]
fn a_plan_moves_who_is_spare_and_nobody_else() {
    let found = plan(&lopsided(), &facts(&[1; 4]), 0).unwrap();
    assert_eq!((found.now, found.then), (5.0, 10.0));
    assert_eq!(found.moves.len(), 1);
    assert_eq!(found.moves[0].from, [LayerRange { start: 0, end: 2 }]);
    assert_eq!(found.moves[0].to, 2..4);
}

#[test]
fn a_layer_that_nobody_holds_is_repaired_however_little_is_gained() {
    let swarm = holdings(
        4,
        &[
            (9.0, 99.0, 0..2, 0..0),
            (9.0, 99.0, 0..2, 0..0),
            (9.0, 99.0, 0..2, 0..0),
        ],
    );
    let found = plan(&swarm, &facts(&[1; 4]), 0).unwrap();
    assert_eq!(found.now, 0.0);
    assert_eq!(found.moves[0].to, 2..4);
}

#[test]
fn who_stays_where_it_is_moves_in_no_plan_and_counts_in_all() {
    let mut swarm = lopsided();
    for holder in &mut swarm.holders[..2] {
        holder.layer_bytes_max = None;
    }
    let found = plan(&swarm, &facts(&[1; 4]), 0).unwrap();
    assert_eq!((found.now, found.then), (5.0, 10.0));
    assert_eq!(found.moves[0].peer, swarm.holders[2].peer);
    swarm.holders[2].layer_bytes_max = None;
    assert_eq!(plan(&swarm, &facts(&[1; 4]), 0), None);
    swarm.holders[3].layer_bytes_max = None;
    assert!((0..9).all(|turn| movers(&swarm, turn).is_empty()));
}

#[test]
fn what_gains_little_is_left_alone_and_so_is_a_swarm_too_large() {
    let even = holdings(
        4,
        &[
            (10.0, 99.0, 0..2, 0..0),
            (10.0, 99.0, 2..4, 0..0),
            (10.0, 99.0, 0..2, 0..0),
            (9.0, 99.0, 2..4, 0..0),
        ],
    );
    assert_eq!(plan(&even, &facts(&[1; 4]), 0), None);
    let large = holdings(4, &vec![(10.0, 99.0, 0..2, 0..0); HOME_PEERS_MAX + 1]);
    assert_eq!(plan(&large, &facts(&[1; 4]), 0), None);
    let empty = holdings(0, &[]);
    assert_eq!(plan(&empty, &facts(&[]), 0), None);
}

#[test]
fn with_two_holders_of_everything_nobody_moves() {
    // The plan would gain, but each layer has two holders, who must stay.
    let swarm = holdings(
        4,
        &[
            (90.0, 99.0, 0..2, 0..0),
            (90.0, 99.0, 0..2, 0..0),
            (1.0, 99.0, 2..4, 0..0),
            (1.0, 99.0, 2..4, 0..0),
        ],
    );
    assert_eq!(plan(&swarm, &facts(&[1; 4]), 0), None);
    // Before anybody serves they are free to.
    let intended = holdings(
        4,
        &[
            (90.0, 99.0, 0..0, 0..2),
            (90.0, 99.0, 0..0, 0..2),
            (1.0, 99.0, 0..0, 2..4),
            (1.0, 99.0, 0..0, 2..4),
        ],
    );
    assert!(plan(&intended, &facts(&[1; 4]), 0).unwrap().then > 40.0);
}

#[test]
fn whoever_does_not_move_does_not_hold_up_the_others() {
    let firsts: BTreeSet<Peer> = (0..32)
        .filter_map(|turn| {
            Some(
                plan(
                    &holdings(8, &vec![(10.0, 99.0, 0..4, 0..0); 6]),
                    &facts(&[1; 8]),
                    turn,
                )?
                .moves
                .first()?
                .peer,
            )
        })
        .collect();
    assert!(firsts.len() > 1, "{firsts:?}");
}

#[test]
fn in_a_large_swarm_a_few_move_and_only_where_that_helps() {
    let mut specs: Vec<Spec> = vec![(10.0, 99.0, 0..2, 0..0); 60];
    specs.extend(vec![(10.0, 99.0, 2..4, 0..0); 20]);
    let swarm = holdings(4, &specs);
    let turns: Vec<Vec<Peer>> = (0..8).map(|turn| movers(&swarm, turn)).collect();
    assert!(turns.iter().all(|movers| movers.len() == 3), "{turns:?}");
    assert_ne!(turns[0], turns[1]);
    let windows = windows(&[1; 4], 2);
    assert_eq!(local(&swarm, &windows, peer(1), |_| false), Some(2..4));
    assert_eq!(
        local(&swarm, &windows, peer(70), |_| false),
        None,
        "it is there already"
    );
    let even = holdings(
        4,
        &[
            vec![(10.0, 99.0, 0..2, 0..0); 40],
            vec![(10.0, 99.0, 2..4, 0..0); 40],
        ]
        .concat(),
    );
    assert_eq!(movers(&even, 0), []);
}

fn slide<'a>(live: &'a [u16], window: Range<u16>, room: u64) -> Slide<'a> {
    Slide {
        me: peer(1),
        live,
        window,
        layer_bytes: &[1; 8],
        room_bytes: room,
    }
}

#[test]
fn a_slide_makes_before_it_breaks_and_ends() {
    let (mut live, others, mut seen) = (vec![0u16, 1, 2], [3, 3, 3, 2, 1, 0, 0, 0], Vec::new());
    loop {
        let next = step(&slide(&live, 3..6, 4), &others, &[0.0; 8]);
        match next {
            Step::Load(layer) => live.push(layer),
            Step::Drop(layer) => live.retain(|l| *l != layer),
            Step::Wait | Step::Done => break,
        }
        assert!((3..=4).contains(&live.len()), "{live:?}");
        seen.push(next);
    }
    live.sort_unstable();
    assert_eq!(live, [3, 4, 5]);
    assert_eq!(seen.len(), 6);
}

#[test]
fn a_layer_with_two_holders_stays_and_what_fits_beside_it_is_loaded() {
    let others = [1, 1, 1, 9, 9, 9, 9, 9];
    assert!(matches!(
        step(&slide(&[0, 1], 2..4, 3), &others, &[0.0; 8]),
        Step::Load(_)
    ));
    assert_eq!(
        step(&slide(&[0, 1, 2], 2..4, 3), &others, &[0.0; 8]),
        Step::Wait
    );
    assert_eq!(
        step(&slide(&[2, 3], 2..4, 3), &others, &[0.0; 8]),
        Step::Done
    );
    assert_eq!(
        step(&slide(&[0, 2, 3], 2..4, 3), &others, &[0.0; 8]),
        Step::Wait,
        "it serves on"
    );
    assert_eq!(
        step(&slide(&[3, 2, 4], 2..4, 2), &others, &[0.0; 8]),
        Step::Drop(4)
    );
}

/// Home swarms: some live, some about to be.
fn homes() -> impl Strategy<Value = Vec<Spec>> {
    let peer = (1.0..1e3f64, 1.0..3e2f64, 0..12u16, 1..8u16, any::<bool>());
    let spec = |(speed, rows_s, start, len, live): (f64, f64, u16, u16, bool)| {
        let window = start..(start + len).min(12);
        if live {
            (speed, rows_s, window, 0..0)
        } else {
            (speed, rows_s, 0..0, window)
        }
    };
    prop::collection::vec(peer.prop_map(spec), 1..9)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_node_makes_the_same_plan_of_the_same_snapshot(specs in homes(), seed: u64) {
        let swarm = holdings(12, &specs);
        let advert = |holder: &Holder| {
            let spans = |layers: &[u16]| layers.iter().map(|l| LayerRange { start: *l, end: l + 1 }).collect();
            let mut advert = (*super::advert(holder.peer, Some(holder.layer_tokens_s as f32), Some(50.0), LayerRange { start: 0, end: 1 })).clone();
            advert.models[0].n_layer = 12;
            advert.models[0].live = spans(&holder.live);
            advert.models[0].intended = spans(&holder.held);
            Arc::new(advert)
        };
        let adverts: Vec<_> = swarm.holders.iter().map(advert).collect();
        let mut shuffled = adverts.clone();
        shuffled.sort_by_key(|advert| super::super::draw::draw("shuffle", advert.peer, seed));
        let of = |adverts| plan(&Holdings::of(&Snapshot::new(adverts), &facts(&[1; 12])), &facts(&[1; 12]), seed);
        let here = of(adverts);
        let there = std::thread::spawn(move || plan(&Holdings::of(&Snapshot::new(shuffled), &facts(&[1; 12])), &facts(&[1; 12]), seed)).join().unwrap();
        prop_assert_eq!(here, there);
    }

    #[test]
    fn a_plan_carried_out_step_by_step_gains_and_leaves_two_holders(specs in homes(), turn: u64) {
        let mut swarm = holdings(12, &specs);
        let before = swarm.others(Count::Live, Peer([255; 32]));
        let (now, Some(found)) = (tokens_s(&swarm), plan(&swarm, &facts(&[1; 12]), turn)) else {
            return Ok(());
        };
        prop_assert!(found.then >= found.now * GAIN_MIN || now == 0.0);
        for next in &found.moves {
            let own = swarm.holders.iter().position(|holder| holder.peer == next.peer).unwrap();
            let room = swarm.holders[own].held.len() as u64 + 1;
            loop {
                let others = swarm.others(Count::Live, next.peer);
                let coverage = swarm.coverage(Count::Live, next.peer, |_| false);
                let live = swarm.holders[own].live.clone();
                let at = Slide { me: next.peer, live: &live, window: next.to.clone(), layer_bytes: &[1; 12], room_bytes: room };
                let live = &mut swarm.holders[own].live;
                match step(&at, &others, &coverage) {
                    Step::Load(layer) => live.insert(live.partition_point(|l| *l < layer), layer),
                    Step::Drop(layer) => {
                        prop_assert!(others[usize::from(layer)] >= OTHERS_MIN);
                        live.retain(|l| *l != layer);
                    }
                    Step::Wait => return Err(TestCaseError::fail("a move that cannot be made")),
                    Step::Done => break,
                }
            }
            swarm.holders[own].held = swarm.holders[own].live.clone();
        }
        let after = swarm.others(Count::Live, Peer([255; 32]));
        for (before, after) in before.iter().zip(&after) {
            prop_assert!(after >= before || *after >= 2, "{before} holders, then {after}");
        }
        prop_assert!((tokens_s(&swarm) - found.then).abs() <= 1e-6 * found.then);
    }
}
