//! Times against what can be worked out by hand or by trying every pick, and what is dealt out.

use std::{collections::BTreeMap, time::Duration};

use swarm_proto::{Advert, Hash, Hop, LayerRange, Measured, ModelAdvert, ModelId, Peer};

use super::{draws::Draws, *};
use crate::adverts::Snapshot;

const MODEL: ModelId = ModelId(Hash([7; 32]));

const MIB: u64 = 1 << 20;

/// Like OLMoE: 16 layers, 8 of 16 experts of 6 MiB for each row.
fn olmoe() -> MixtureShape {
    let layer = LayerShape {
        trunk_bytes: 16 * MIB,
        expert_bytes: 6 * MIB,
    };
    MixtureShape {
        n_embd: 2048,
        n_expert: 16,
        n_expert_used: 8,
        head_bytes: 50 * MIB,
        layers: vec![layer; 16],
    }
}

fn machine(gb_s: f64, memory_mib: u64) -> Machine {
    Machine {
        read_bytes_s: gb_s * 1e9,
        memory_bytes: memory_mib * MIB,
    }
}

fn link(rtt_us: u64) -> Link {
    Link {
        rtt: Duration::from_micros(rtt_us),
        bytes_s: 125e6,
    }
}

/// All experts over `n` holders.
fn holders(shape: &MixtureShape, n: usize, machine: Machine, link: Link) -> Vec<Holder> {
    let sets = assign_experts(shape, &ExpertUse::default(), &vec![machine; n]).expect("room");
    let holder = |experts| Holder {
        machine,
        link,
        experts,
    };
    sets.into_iter().map(holder).collect()
}

/// The same over `n` machines as whole layers.
fn stages(shape: &MixtureShape, n: u16, machine: Machine, link: Link) -> Vec<Stage> {
    let n_layer = shape.span().end;
    let stage = |i: u16| Stage {
        machine,
        link,
        layers: LayerRange {
            start: n_layer * i / n,
            end: n_layer * (i + 1) / n,
        },
    };
    (0..n).map(stage).collect()
}

const FREE: Overheads = Overheads {
    layer: Duration::ZERO,
    holder: Duration::ZERO,
    hop: Duration::ZERO,
};

/// Every set of `k` experts with how likely it is.
fn every_pick(odds: &[f64], k: usize, mut each: impl FnMut(&[usize], f64)) {
    let sets = (0u32..1 << odds.len()).filter(|set| set.count_ones() as usize == k);
    let picked =
        |set: u32| -> Vec<usize> { (0..odds.len()).filter(|i| set >> i & 1 == 1).collect() };
    let weight = |set: u32| -> f64 { picked(set).iter().map(|i| odds[*i]).product() };
    let all: f64 = sets.clone().map(weight).sum();
    for set in sets {
        each(&picked(set), weight(set) / all);
    }
}

#[test]
fn the_mean_of_the_largest_is_that_over_every_pick() {
    // Experts of each holder, with the picks that each gets on average; 3 picks.
    let cases: [&[&[f64]]; 3] = [
        &[&[0.375; 3], &[0.375; 3], &[0.375; 2]],
        &[&[0.9, 0.1], &[0.5, 0.5, 0.2], &[0.4, 0.4]],
        &[&[0.5; 6]],
    ];
    for shares in cases {
        let flat: Vec<f64> = shares.concat();
        let holder_of: Vec<usize> = shares
            .iter()
            .enumerate()
            .flat_map(|(holder, shares)| vec![holder; shares.len()])
            .collect();
        let odds: Vec<f64> = flat.iter().map(|share| share / (1.0 - share)).collect();
        let takes = |holder: usize, n: usize| [1.0, 0.7, 2.5][holder] * n as f64 + 0.3;
        let (mut mean, mut asked) = (0.0, vec![0.0; shares.len()]);
        every_pick(&odds, 3, |picked, weight| {
            let mut n = vec![0; shares.len()];
            picked.iter().for_each(|i| n[holder_of[*i]] += 1);
            let times = (0..n.len()).filter(|h| n[*h] > 0).map(|h| takes(h, n[h]));
            mean += weight * times.fold(0.0, f64::max);
            for (asked, n) in asked.iter_mut().zip(n) {
                *asked += weight * f64::from(u8::from(n > 0));
            }
        });
        let shares: Vec<Vec<f64>> = shares.iter().map(|shares| shares.to_vec()).collect();
        let draws = Draws::of(&shares, 3);
        let found = draws.mean_of_largest(takes);
        assert!(
            (found - mean).abs() < 1e-9,
            "{shares:?}: {found}, not {mean}"
        );
        for (holder, asked) in asked.iter().enumerate() {
            assert!((draws.asked(holder) - asked).abs() < 1e-9);
        }
    }
}

#[test]
fn the_largest_is_more_than_the_mean_of_each() {
    // 8 picks over 4 holders of 4 experts: 2 each, and 3.05 for the one with the most.
    let draws = Draws::of(&vec![vec![0.5; 4]; 4], 8);
    let most = draws.mean_of_largest(|_, n| n as f64);
    assert!((3.0..3.1).contains(&most), "{most}");
    // All there is in one place.
    assert_eq!(
        Draws::of(&[vec![0.5; 16]], 8).mean_of_largest(|_, n| n as f64),
        8.0
    );
    // A large one is no matter of minutes, nor of numbers too large.
    let large = Draws::of(&vec![vec![32.0 / 512.0; 16]; 32], 32);
    let most = large.mean_of_largest(|_, n| n as f64);
    assert!((2.0..5.0).contains(&most), "{most}");
}

#[test]
fn one_holder_takes_what_can_be_worked_out_by_hand() {
    let shape = olmoe();
    let (trunk, far) = (machine(10.0, 400), machine(20.0, 1600));
    let holders = holders(&shape, 1, far, link(250));
    let span = shape.span();
    let used = ExpertUse::default();
    let time = island_time(&shape, &used, span, &trunk, &holders, &FREE).expect("it fits");
    let row = 2048.0 * 4.0;
    let layer = 16.0 * MIB as f64 / 10e9 + 250e-6 + 9.0 * row / 125e6 + 48.0 * MIB as f64 / 20e9;
    let all = 16.0 * layer + 50.0 * MIB as f64 / 10e9;
    let found = time.total.as_secs_f64();
    assert!((found - all).abs() < 1e-6, "{found}, not {all}");
    let parts = time.trunk + time.experts + time.network + time.overhead;
    assert!(time.total.abs_diff(parts) < Duration::from_micros(1));
    assert_eq!((time.n_asked, time.n_holders, time.picks.1), (16, 1, 8));

    let stages = stages(&shape, 2, machine(10.0, 1000), link(2000));
    let time = pipeline_time(&shape, span, &stages, &FREE).expect("it fits");
    let all = (16.0 * 64.0 + 50.0) * MIB as f64 / 10e9 + 1e-3 + row / 125e6;
    let found = time.total.as_secs_f64();
    assert!((found - all).abs() < 1e-6, "{found}, not {all}");
}

#[test]
fn near_holders_make_an_island_and_far_ones_a_pipeline() {
    let shape = olmoe();
    let span = shape.span();
    let of = |rtt_us: u64, gb_s: f64, wish: Wish| {
        let each = machine(gb_s, 900);
        let used = ExpertUse::default();
        let holders = holders(&shape, 4, each, link(rtt_us));
        let over = Overheads::default();
        let island = island_time(&shape, &used, span, &each, &holders, &over);
        let stages = stages(&shape, 4, each, link(rtt_us));
        let pipeline = pipeline_time(&shape, span, &stages, &over);
        choose(island, pipeline, wish).expect("both fit")
    };
    // Slow memory: what four read at once is worth a round trip each layer.
    let near = of(250, 20.0, Wish::Near);
    assert_eq!(near.way, Way::Island, "{near}");
    assert!(matches!(near.reason, Reason::Faster { takes, other } if takes < other));
    // Fast memory: it is not.
    assert_eq!(of(250, 400.0, Wish::Near).way, Way::Pipeline);
    // It would be at 0.6 ms, but nobody asks for it.
    let far = of(600, 20.0, Wish::Near);
    assert_eq!(far.way, Way::Pipeline);
    let reason = far.reason.to_string();
    assert!(reason.contains("0.60 ms away"), "{reason}");
    assert_eq!(of(600, 20.0, Wish::FarHolders).way, Way::Island);
    // Slower and asked for.
    assert_eq!(of(600, 400.0, Wish::FarHolders).way, Way::Pipeline);
    assert_eq!(of(600, 400.0, Wish::Island).reason, Reason::Insisted);
    // The longer the way, the longer an island takes, and no other way round.
    let takes = |rtt| of(rtt, 20.0, Wish::Near).island.expect("it fits").total;
    assert!(takes(100) < takes(200) && takes(200) < takes(5000));
    assert!(takes(5000) > Duration::from_millis(16 * 5));
}

#[test]
fn what_does_not_fit_is_no_way() {
    let shape = olmoe();
    let span = shape.span();
    let used = ExpertUse::default();
    let over = Overheads::default();
    let each = machine(20.0, 500);
    let mut holders = holders(&shape, 4, each, link(200));
    // 16 layers of 112 MiB over two machines of 500.
    let stages = stages(&shape, 2, each, link(200));
    let pipeline = pipeline_time(&shape, span, &stages, &over);
    assert!(matches!(&pipeline, Err(Unfit::Memory { needs, .. }) if *needs == 8 * 112 * MIB));
    let island = island_time(&shape, &used, span, &each, &holders, &over);
    let choice = choose(island.clone(), pipeline.clone(), Wish::Near).expect("an island");
    assert_eq!(choice.way, Way::Island);
    // Too far to be taken unasked, and nothing else there is.
    let slow = island.map(|island| IslandTime {
        rtt_max: Duration::from_millis(20),
        ..island
    });
    let none = choose(slow.clone(), pipeline.clone(), Wish::Near);
    assert!(matches!(
        none,
        Err((Unfit::TooFar { .. }, Unfit::Memory { .. }))
    ));
    assert_eq!(
        choose(slow, pipeline, Wish::FarHolders)
            .expect("asked for")
            .way,
        Way::Island
    );
    // Whose only holder forgets it.
    let id = *holders[1].experts.first().expect("some");
    for holder in &mut holders {
        holder.experts.remove(&id);
    }
    let missing = island_time(&shape, &used, span, &each, &holders, &over);
    let ExpertId { layer, expert } = id;
    assert_eq!(missing, Err(Unfit::NotHeld { layer, expert }));
    // Stages with a gap, and figures that cannot be.
    let gap = pipeline_time(
        &shape,
        span,
        &self::stages(&shape, 2, each, link(1))[1..],
        &over,
    );
    assert_eq!(gap, Err(Unfit::Gap(0)));
    for figure in [0.0, -1.0, f64::NAN] {
        let none = Machine {
            read_bytes_s: figure,
            ..machine(1.0, 9000)
        };
        let time = island_time(&shape, &used, span, &none, &[], &over);
        assert!(matches!(time, Err(Unfit::Figure { .. })), "{time:?}");
    }
}

#[test]
fn every_expert_has_a_holder_and_every_layer_is_even() {
    let shape = olmoe();
    let used = ExpertUse::default();
    let even = [
        machine(20.0, 384),
        machine(20.0, 384),
        machine(20.0, 384),
        machine(20.0, 384),
    ];
    let sets = assign_experts(&shape, &used, &even).expect("room");
    for layer in 0..16 {
        for set in &sets {
            let n = set.iter().filter(|id| id.layer == layer).count();
            assert_eq!(n, 4, "layer {layer}");
        }
    }
    assert_eq!(assign_experts(&shape, &used, &even), Ok(sets));
    // Of uneven memory each layer gets its share, so that no layer is left to the large one alone.
    let uneven = [machine(20.0, 250), machine(20.0, 1400)];
    let sets = assign_experts(&shape, &used, &uneven).expect("room");
    let held: u64 = sets[0].len() as u64 * 6 * MIB;
    assert!(held <= 250 * MIB && held > 230 * MIB);
    for layer in 0..16 {
        assert!(sets[0].iter().any(|id| id.layer == layer), "layer {layer}");
        for expert in 0..16 {
            let id = ExpertId { layer, expert };
            assert!(sets.iter().any(|set| set.contains(&id)));
        }
    }
    let tight = [machine(20.0, 700), machine(20.0, 700)];
    let none = assign_experts(&shape, &used, &tight).expect_err("1536 MiB of experts");
    assert_eq!((none.bytes, none.n_holders), (1536 * MIB, 2));
}

#[test]
fn what_is_used_most_has_copies_and_is_spread() {
    let shape = olmoe();
    // Of layer 3 two experts get most picks; they come first in the file.
    let rows: Vec<u64> = (0..16).map(|e| if e < 2 { 700 } else { 100 }).collect();
    let used = ExpertUse(BTreeMap::from([(3, rows)]));
    assert!(used.share(&shape, 3, 0) > 0.9 && used.share(&shape, 4, 0) == 0.5);
    let holders = vec![machine(20.0, 384); 4];
    let sets = assign_experts(&shape, &used, &holders).expect("room");
    let holder = |expert| {
        let id = ExpertId { layer: 3, expert };
        sets.iter()
            .position(|set| set.contains(&id))
            .expect("a holder")
    };
    assert_ne!(holder(0), holder(1));
    let copies = |sets: &[ExpertSet], layer, expert| {
        let id = ExpertId { layer, expert };
        sets.iter().filter(|set| set.contains(&id)).count()
    };
    // Room for four more than all.
    let holders = vec![machine(20.0, 6 * 65); 4];
    let sets = assign_experts(&shape, &used, &holders).expect("room");
    assert_eq!(sets.iter().map(ExpertSet::len).sum::<usize>(), 256 + 4);
    assert_eq!((copies(&sets, 3, 0), copies(&sets, 3, 1)), (2, 2));
    assert_eq!(copies(&sets, 3, 9), 1);
    // Nobody holds one twice, and everybody may hold everything.
    let holders = vec![machine(20.0, 6 * 1000); 3];
    let sets = assign_experts(&shape, &used, &holders).expect("room");
    assert!(sets.iter().all(|set| set.len() == 256));
}

#[test]
fn a_copy_takes_picks_off_the_holder_that_has_too_many() {
    let shape = olmoe();
    let rows: Vec<u64> = (0..16).map(|e| if e < 4 { 700 } else { 100 }).collect();
    let used = ExpertUse((0..16).map(|layer| (layer, rows.clone())).collect());
    let each = machine(20.0, 6 * 80);
    let all = |even: bool| {
        let known = if even {
            ExpertUse::default()
        } else {
            used.clone()
        };
        let sets = assign_experts(&shape, &known, &[each; 4]).expect("room");
        let holder = |experts| Holder {
            machine: each,
            link: link(200),
            experts,
        };
        let holders: Vec<Holder> = sets.into_iter().map(holder).collect();
        let trunk = machine(20.0, 400);
        let time = island_time(&shape, &used, shape.span(), &trunk, &holders, &FREE);
        time.expect("it fits").experts
    };
    // Who counted deals better.
    assert!(all(false) <= all(true), "{:?}, {:?}", all(false), all(true));
    let in_turn = |n: u16| {
        // As they come: all that are hot with the first.
        let experts = |holder: u16| {
            let all =
                (0..16).flat_map(|layer| (0..16).map(move |expert| ExpertId { layer, expert }));
            all.filter(|id| id.expert / 4 == holder || n > 1 && holder == 3 && id.expert < 4)
                .collect()
        };
        let holder = |at| Holder {
            machine: machine(20.0, 1000),
            link: link(200),
            experts: experts(at),
        };
        let holders: Vec<Holder> = (0..4).map(holder).collect();
        let trunk = machine(20.0, 400);
        let time = island_time(&shape, &used, shape.span(), &trunk, &holders, &FREE);
        time.expect("it fits").experts
    };
    assert!(in_turn(2) < in_turn(1));
    assert!(all(false) < in_turn(1));
}

#[test]
fn a_shape_is_what_the_manifest_says() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo-moe.gguf");
    let mut file = std::fs::File::open(file).expect("the demo mixture");
    let len = file.metadata().expect("its length").len();
    let header = gguf::Header::read(&mut file, len).expect("its header");
    let shape = MixtureShape::of_header(&header)
        .expect("a manifest")
        .expect("a mixture");
    let tensors = |wanted: &dyn Fn(&str) -> bool| -> u64 {
        let tensors = header.tensors.iter().filter(|tensor| wanted(&tensor.name));
        tensors
            .map(|tensor| tensor.n_bytes().expect("a size"))
            .sum()
    };
    for (i, layer) in shape.layers.iter().enumerate() {
        let own = tensors(&|name| name.starts_with(&format!("blk.{i}.")));
        let experts =
            tensors(&|name| name.starts_with(&format!("blk.{i}.")) && name.contains("_exps."));
        assert_eq!(layer.expert_bytes * u64::from(shape.n_expert), experts);
        assert_eq!(layer.trunk_bytes, own - experts);
        assert_eq!(shape.layer_bytes(layer), own);
        assert!(shape.read_bytes(layer) < own);
    }
    assert!(shape.n_expert_used > 0 && shape.n_expert_used < shape.n_expert);
    assert!(shape.head_bytes > 0);
    // A machine that was seen at so many layers a second takes that long for them.
    let seen = Machine::of_layers_s(&shape, 1000.0, u64::MAX);
    let stages = [Stage {
        machine: seen,
        link: Link::NONE,
        layers: LayerRange {
            start: 0,
            end: shape.span().end - 1,
        },
    }];
    let time = pipeline_time(&shape, stages[0].layers, &stages, &FREE).expect("it fits");
    let layers = f64::from(shape.span().end - 1);
    assert!((time.total.as_secs_f64() * 1000.0 / layers - 1.0).abs() < 0.2);
    // A dense model is none.
    let dense = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo.gguf");
    let mut dense = std::fs::File::open(dense).expect("the demo model");
    let len = dense.metadata().expect("its length").len();
    let header = gguf::Header::read(&mut dense, len).expect("its header");
    assert_eq!(MixtureShape::of_header(&header).expect("a manifest"), None);
}

/// Two machines that hold half of the layers each, so far from each other.
fn two(rtt_us: Option<u32>) -> (Snapshot, Vec<Hop>) {
    let peer = |n: u16| Peer([n as u8 + 1; 32]);
    let layers = |n: u16| LayerRange {
        start: 8 * n,
        end: 8 * n + 8,
    };
    let figure = |value| Some(Measured { value, age_s: 0 });
    let advert = |n: u16| Advert {
        peer: peer(n),
        seq: 1,
        ttl_ms: 30_000,
        addrs: Vec::new(),
        models: vec![ModelAdvert {
            model: MODEL,
            name: String::new(),
            n_layer: 16,
            live: vec![layers(n)],
            intended: Vec::new(),
            layer_tokens_s: figure(200.0),
            n_ctx_max: 4096,
            free_cells: 1 << 20,
            n_embd: 2048,
            numerics: 0,
            stored: Vec::new(),
            layer_bytes_max: None,
            experts: None,
        }],
        uplink_bytes_s: figure(125e6),
        queue: 0,
        // Only one of them measured it.
        rtts: rtt_us
            .filter(|_| n == 0)
            .map(|us| (peer(1), us))
            .into_iter()
            .collect(),
        leaving: false,
        agent: String::new(),
    };
    let hop = |n| Hop {
        peer: peer(n),
        addrs: Vec::new(),
        layers: layers(n),
    };
    let snapshot = Snapshot::new(vec![advert(0).into(), advert(1).into()]);
    (snapshot, vec![hop(0), hop(1)])
}

#[test]
fn a_route_is_held_against_an_island_of_its_machines() {
    let shape = olmoe();
    let claim = |_: &Peer, claim: &ModelAdvert| claim.layer_tokens_s.map(|m| m.value);
    let of = |rtt_us| {
        let (snapshot, hops) = two(rtt_us);
        let compared = compare(&snapshot, MODEL, &shape, &hops, claim).expect("two machines");
        compared.choice.expect("the route is one")
    };
    // 5 ms a layer: two that read at once are worth 0.2.
    let near = of(Some(200));
    assert_eq!(near.way, Way::Island, "{near}");
    assert_eq!(near.island.expect("it fits").n_holders, 2);
    assert_eq!(of(Some(20_000)).way, Way::Pipeline);
    let unknown = of(None);
    assert_eq!(unknown.way, Way::Pipeline);
    assert!(matches!(unknown.island, Err(Unfit::Unmeasured(_))));
    // Nothing is said of one machine, nor of one that says nothing.
    let (snapshot, hops) = two(Some(200));
    assert_eq!(compare(&snapshot, MODEL, &shape, &hops[..1], claim), None);
    assert_eq!(compare(&snapshot, MODEL, &shape, &hops, |_, _| None), None);
}
