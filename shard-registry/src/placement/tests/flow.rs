//! The flow evaluator against an LP solver, and against itself where that is too slow.

use microlp::{ComparisonOp, OptimizationDirection, Problem};
use proptest::prelude::*;

use super::super::throughput::{Supply, throughput, upper_bound};

type Peers = Vec<(f64, f64, Vec<u16>)>;

fn supplies(peers: &Peers) -> Vec<Supply<'_>> {
    let supplies = peers.iter().map(|peer| Supply {
        layer_tokens_s: peer.0,
        rows_s: peer.1,
        layers: &peer.2,
    });
    supplies.collect()
}

/// The same problem as a linear programme.
fn by_lp(n_layer: usize, peers: &Peers) -> f64 {
    let mut problem = Problem::new(OptimizationDirection::Maximize);
    let tokens = problem.add_var(1.0, (0.0, 1e9));
    let mut layers = vec![vec![(tokens, -1.0)]; n_layer];
    for (speed, rows_s, held) in peers {
        let mut own = Vec::new();
        for layer in held {
            let share = problem.add_var(0.0, (0.0, *rows_s));
            own.push((share, 1.0));
            layers[usize::from(*layer)].push((share, 1.0));
        }
        if !own.is_empty() {
            problem.add_constraint(own, ComparisonOp::Le, *speed);
        }
    }
    for given in layers {
        problem.add_constraint(given, ComparisonOp::Ge, 0.0);
    }
    problem
        .solve()
        .unwrap()
        .into_solution()
        .unwrap()
        .objective()
}

fn window(start: u16, len: u16) -> Vec<u16> {
    (start..start + len).collect()
}

#[test]
fn fixtures_agree_with_what_is_plain_to_see() {
    let value = |n_layer, peers: Peers| throughput(n_layer, &supplies(&peers)).tokens_s;
    assert_eq!(value(4, vec![(8.0, 99.0, window(0, 4))]), 2.0, "compute");
    assert_eq!(value(4, vec![(8.0, 1.0, window(0, 4))]), 1.0, "uplink");
    assert_eq!(
        value(4, vec![(8.0, 99.0, window(0, 3))]),
        0.0,
        "layer 3 is missing"
    );
    assert_eq!(value(0, vec![]), 0.0, "no layers");
    let uneven = vec![(6.0, 99.0, window(0, 2)), (2.0, 99.0, window(1, 2))];
    assert_eq!(value(3, uneven), 2.0, "the second has but 2 for layer 2");
    let absurd = vec![
        (f64::NAN, 1.0, window(0, 2)),
        (-1.0, 1.0, window(0, 2)),
        (4.0, f64::INFINITY, window(0, 9)),
    ];
    assert_eq!(
        value(2, absurd),
        2.0,
        "only the third gives, and only to layers that there are"
    );
    let bound = upper_bound(4, [(8.0, 99.0, 4), (8.0, 1.0, 4)].into_iter());
    assert_eq!(bound, (8.0 + 4.0) / 4.0);
}

#[test]
fn a_long_chain_of_overlaps_is_levelled_exactly() {
    // What the first has too much must go from one to the next along all of them.
    let mut peers: Peers = (0..39).map(|i| (10.0, 99.0, window(i, 2))).collect();
    peers.push((10.0, 99.0, window(0, 1)));
    let flow = throughput(40, &supplies(&peers));
    assert!((flow.tokens_s - 10.0).abs() < 1e-6, "{}", flow.tokens_s);
    assert!((by_lp(40, &peers) - 10.0).abs() < 1e-6);
}

/// Peers with windows, or any layers, of a model of so many.
fn swarms(n_layer: u16, n_peer: usize) -> impl Strategy<Value = Peers> {
    let any_layers = prop::collection::btree_set(0..n_layer, 0..usize::from(n_layer));
    let layers = prop_oneof![
        4 => (0..n_layer, 1..=n_layer).prop_map(move |(a, len)| (a..(a + len).min(n_layer)).collect()),
        1 => any_layers.prop_map(|set| set.into_iter().collect::<Vec<u16>>()),
    ];
    let peer = (1.0..1e4f64, 1.0..2e3f64, layers);
    prop::collection::vec(peer, 1..n_peer)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn it_agrees_with_a_linear_programme(peers in swarms(12, 14)) {
        let (flow, lp) = (throughput(12, &supplies(&peers)), by_lp(12, &peers));
        // What flows at all is a twelfth or more: below that the solver's zero is as good as any.
        prop_assert!((flow.tokens_s - lp).abs() <= 1e-6 * lp.max(1.0 / 12.0), "{} and {lp}", flow.tokens_s);
    }

    #[test]
    fn it_gives_no_more_than_there_is_and_proves_that_no_more_can_be(peers in swarms(40, 120)) {
        let flow = throughput(40, &supplies(&peers));
        let mut levels = vec![0.0; 40];
        for ((speed, rows_s, layers), shares) in peers.iter().zip(&flow.shares) {
            prop_assert!(shares.iter().sum::<f64>() <= speed * (1.0 + 1e-9));
            prop_assert!(shares.iter().all(|share| (0.0..=rows_s * (1.0 + 1e-9)).contains(share)));
            for (layer, share) in layers.iter().zip(shares) {
                levels[usize::from(*layer)] += share;
            }
        }
        let lowest = levels.iter().copied().fold(f64::INFINITY, f64::min);
        prop_assert!((flow.tokens_s - lowest).abs() <= 1e-9 * lowest);
        prop_assert!(flow.tokens_s <= flow.bound * (1.0 + 1e-9));
        prop_assert!(flow.tokens_s >= flow.bound * (1.0 - 1e-6), "{} of {}", flow.tokens_s, flow.bound);
    }
}
