//! Swarms to test placement with, and what holds of windows, coverage and the join rule.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use proptest::prelude::*;
use swarm_proto::{Advert, Hash, Measured};

use super::*;

mod flow;
mod moving;

pub(super) const MODEL: ModelId = ModelId(Hash([7; 32]));
const ME: Peer = Peer([1; 32]);

/// A peer of a test: layer-tokens a second, rows a second, live layers, intended layers.
pub(super) type Spec = (f64, f64, Range<u16>, Range<u16>);

pub(super) fn peer(number: usize) -> Peer {
    Peer([number as u8; 32])
}

pub(super) fn holdings(n_layer: usize, specs: &[Spec]) -> Holdings {
    let holder = |(i, (speed, rows_s, live, intended)): (usize, &Spec)| {
        let held = if intended.is_empty() { live } else { intended };
        Holder {
            peer: peer(i + 1),
            layer_tokens_s: *speed,
            rows_s: *rows_s,
            live: live.clone().collect(),
            held: held.clone().collect(),
            layer_bytes_max: Some(held.len() as u64),
        }
    };
    Holdings {
        n_layer,
        holders: specs.iter().enumerate().map(holder).collect(),
    }
}

pub(super) fn facts(layer_bytes: &[u64]) -> Facts<'_> {
    Facts {
        model: MODEL,
        layer_bytes,
        frame_bytes: 100,
    }
}

fn advert(peer: Peer, speed: Option<f32>, uplink: Option<f32>, live: LayerRange) -> Arc<Advert> {
    let figure = |value| Measured { value, age_s: 1 };
    Arc::new(Advert {
        peer,
        seq: 1,
        ttl_ms: 30_000,
        addrs: Vec::new(),
        models: vec![ModelAdvert {
            model: MODEL,
            name: String::new(),
            n_layer: 4,
            live: vec![live],
            intended: vec![LayerRange { start: 0, end: 2 }],
            layer_tokens_s: speed.map(figure),
            n_ctx_max: 0,
            free_cells: 0,
            n_embd: 8,
            numerics: 0,
            stored: Vec::new(),
            layer_bytes_max: None,
            experts: None,
        }],
        uplink_bytes_s: uplink.map(figure),
        queue: 0,
        rtts: Vec::new(),
        leaving: false,
        agent: String::new(),
    })
}

#[test]
fn who_has_not_measured_itself_counts_as_the_median() {
    let live = LayerRange { start: 1, end: 3 };
    let adverts = [
        (1, Some(10.0), Some(500.0)),
        (2, None, None),
        (3, Some(30.0), None),
        (4, Some(20.0), None),
    ];
    let adverts = adverts.map(|(n, speed, uplink)| advert(peer(n), speed, uplink, live));
    let other_length = Facts {
        layer_bytes: &[1; 5],
        ..facts(&[1; 4])
    };
    let snapshot = Snapshot::new(adverts.to_vec());
    assert_eq!(Holdings::of(&snapshot, &other_length).holders, []);
    let found = Holdings::of(&snapshot, &facts(&[1; 4]));
    let speeds: Vec<f64> = found
        .holders
        .iter()
        .map(|holder| holder.layer_tokens_s)
        .collect();
    assert_eq!(speeds, [10.0, 20.0, 30.0, 20.0]);
    assert!(found.holders.iter().all(|holder| holder.rows_s == 5.0));
    assert_eq!(
        (&found.holders[0].live, &found.holders[0].held),
        (&vec![1, 2], &vec![0, 1])
    );
}

#[test]
fn coverage_is_an_even_share_within_the_uplink_and_twice_where_near() {
    let swarm = holdings(
        4,
        &[
            (8.0, 99.0, 0..4, 0..0),
            (8.0, 1.0, 2..3, 3..4),
            (50.0, 9.0, 0..4, 0..0),
        ],
    );
    let live = swarm.coverage(Count::Live, peer(3), |_| false);
    assert_eq!(live, [2.0, 2.0, 3.0, 2.0]);
    let held = swarm.coverage(Count::Held, peer(3), |near| *near == peer(2));
    assert_eq!(held, [2.0, 2.0, 2.0, 4.0]);
    assert_eq!(swarm.others(Count::Live, peer(1)), [1, 1, 2, 1]);
}

#[test]
fn near_is_who_answers_fast() {
    let near = near(vec![
        (peer(1), Duration::from_millis(5)),
        (peer(2), Duration::from_millis(90)),
    ]);
    assert_eq!([1, 2, 3].map(|n| near(&peer(n))), [true, false, false]);
}

#[test]
fn the_weakest_window_is_chosen_and_a_longer_one_before_a_shorter() {
    let windows = [0..3, 1..4, 2..5, 3..6];
    let chosen = join::choose(&windows, &[5.0, 5.0, 5.0, 1.0, 1.0, 0.0], ME);
    assert_eq!(chosen, Some(3..6));
    assert_eq!(join::choose(&[0..2, 1..4], &[0.0; 4], ME), Some(1..4));
    assert_eq!(join::choose(&[], &[], ME), None);
}

#[test]
fn nodes_that_start_together_spread() {
    let windows: Vec<_> = (0..14).map(|start| start..start + 3).collect();
    let starts: BTreeSet<_> = (0..24)
        .filter_map(|n| join::choose(&windows, &[0.0; 16], peer(n)))
        .map(|window| window.start)
        .collect();
    assert!(starts.len() >= 8, "{starts:?}");
}

#[test]
fn the_scarcest_layer_is_loaded_first_and_equals_in_an_order_of_ones_own() {
    let coverage = [3.0, 0.5, 2.0, 0.5, 0.0];
    assert_eq!(join::scarcest(&[0, 2, 3], &coverage, ME), Some(3));
    assert_eq!(
        join::scarcest(&[0, 9], &coverage, ME),
        Some(9),
        "nobody is known to have it"
    );
    assert_eq!(join::scarcest(&[], &coverage, ME), None);
    let firsts: BTreeSet<_> = (0..20)
        .map(|n| join::scarcest(&[1, 3], &coverage, peer(n)))
        .collect();
    assert_eq!(firsts.len(), 2);
}

proptest! {
    #[test]
    fn windows_fit_and_cannot_grow(bytes in prop::collection::vec(1..9u64, 0..40), room in 0..40u64) {
        let windows = windows(&bytes, room);
        let sum = |window: Range<usize>| bytes[window].iter().sum::<u64>();
        for w in &windows {
            let (start, end) = (usize::from(w.start), usize::from(w.end));
            prop_assert!(start < end && sum(start..end) <= room);
            prop_assert!(end == bytes.len() || sum(start..end + 1) > room);
            prop_assert!(start == 0 || sum(start - 1..end) > room);
        }
        let held: BTreeSet<u16> = windows.iter().cloned().flatten().collect();
        let fitting = bytes.iter().filter(|bytes| **bytes <= room).count();
        prop_assert_eq!(held.len(), fitting, "every layer that fits is in some window");
    }
}
