//! Views of swarms that never were.

use swarm_proto::Measured;

use super::*;

const NOW_MS: u64 = 1_000_000_000;

fn id(n: u16) -> Peer {
    let mut bytes = [0; 32];
    bytes[..2].copy_from_slice(&n.to_be_bytes());
    Peer(bytes)
}

fn layers(start: u16, end: u16) -> LayerRange {
    LayerRange { start, end }
}

fn held(model: u8, n_layer: u16, live: &[LayerRange]) -> ModelAdvert {
    ModelAdvert {
        model: ModelId(swarm_proto::Hash([model; 32])),
        name: "demo".into(),
        n_layer,
        live: live.to_vec(),
        intended: live.to_vec(),
        layer_tokens_s: Some(Measured {
            value: 800.0,
            age_s: 7,
        }),
        n_ctx_max: 4096,
        free_cells: 1000,
        n_embd: 64,
        numerics: 3,
        stored: Vec::new(),
        layer_bytes_max: None,
        experts: None,
    }
}

fn advert(n: u16, models: Vec<ModelAdvert>) -> Advert {
    Advert {
        peer: id(n),
        seq: NOW_MS - 2500,
        ttl_ms: 40_000,
        addrs: vec!["/ip4/10.0.0.1/tcp/1".into()],
        models,
        uplink_bytes_s: None,
        queue: n,
        rtts: Vec::new(),
        leaving: false,
        agent: "shoal-node/0".into(),
    }
}

#[test]
fn who_holds_what_and_what_nobody_holds() {
    let adverts = [
        advert(1, vec![held(1, 8, &[layers(0, 2), layers(1, 4)])]),
        advert(2, vec![held(1, 8, &[layers(2, 6)])]),
        advert(3, vec![]),
        Advert {
            leaving: true,
            ..advert(4, vec![held(1, 8, &[layers(0, 8)])])
        },
    ];
    let facts = Facts {
        rtts: vec![(id(2), Duration::from_micros(1500))],
        connected: vec![id(2)],
        unreachable: vec![id(3)],
        book: vec![Entry {
            peer: id(1),
            failures: 2,
            last: "it was\u{7} silent".into(),
            at_s: NOW_MS / 1000 - 5,
            until_s: NOW_MS / 1000 + 30,
        }],
    };
    let view = SwarmView::new(&adverts, &facts, NOW_MS);
    let model = &view.models[0];
    assert_eq!((model.name.as_str(), model.n_layer), ("demo", 8));
    assert_eq!(model.copies, [1, 1, 2, 2, 1, 1, 0, 0]);
    assert_eq!((model.complete, &model.gaps[..]), (false, &[[6, 8]][..]));
    assert_eq!(model.holders.len(), 2, "who leaves holds nothing");
    assert_eq!(model.holders[0].live, [[0, 4]], "spans are merged");
    assert_eq!(model.holders[0].measured_s_ago, Some(7));
    let peer = |n: usize| &view.peers[n];
    assert_eq!((peer(0).heard_s_ago, peer(0).left_alone_s), (2.5, 30));
    assert_eq!((peer(1).rtt_ms, peer(1).connected), (Some(1.5), true));
    assert!(peer(2).idle && peer(2).unreachable && !peer(0).idle);
    let failed = &view.failed[0];
    assert_eq!(
        (failed.failures, failed.s_ago, failed.left_alone_s),
        (2, 5, 30)
    );
    assert_eq!(failed.last, "it was  silent");
    // What a server says is what `shoal top` reads.
    let said = serde_json::to_string(&view).expect("JSON");
    assert_eq!(
        serde_json::from_str::<SwarmView>(&said).expect("the same"),
        view
    );
}

#[test]
fn whoever_lies_about_a_model_does_not_change_it() {
    let liar = |n, mut model: ModelAdvert| {
        model.name = "\u{1b}[2Jevil".into();
        advert(n, vec![model])
    };
    let adverts = [
        advert(1, vec![held(1, 4, &[layers(0, 4)])]),
        advert(2, vec![held(1, 4, &[layers(0, 4)])]),
        liar(3, held(1, 60_000, &[layers(0, 60_000)])),
        liar(4, held(2, 60_000, &[layers(0, 60_000)])),
    ];
    let view = SwarmView::new(&adverts, &Facts::default(), NOW_MS);
    let model = &view.models[0];
    assert_eq!((model.name.as_str(), model.n_layer), ("demo", 4));
    assert_eq!(
        (model.copies.as_slice(), model.complete),
        (&[2u32; 4][..], true)
    );
    let absurd = &view.models[1];
    assert_eq!(absurd.n_layer, LAYERS_MAX);
    assert!(absurd.holders.is_empty() && !absurd.complete);
    assert!(!absurd.name.contains('\u{1b}'));
}

/// As large as the advert table lets it be, each peer with as many models and spans as an advert takes.
#[test]
fn a_swarm_of_liars_is_cut_to_a_size_that_can_be_sent() {
    let spans: Vec<LayerRange> = (0..64).map(|n| layers(n * 16, n * 16 + 1)).collect();
    let models = |n: u16| -> Vec<ModelAdvert> {
        let model = |m: u8| ModelAdvert {
            name: "\u{2028}\"<b>".repeat(10),
            ..held(m.wrapping_add((n % 200) as u8), 1024, &spans)
        };
        (0..16).map(model).collect()
    };
    let adverts: Vec<Advert> = (0..4096).map(|n| advert(n, models(n))).collect();
    let begin = std::time::Instant::now();
    let view = SwarmView::new(&adverts, &Facts::default(), NOW_MS);
    assert_eq!(
        (view.peers.len(), view.peers_left_out),
        (PEERS_MAX, 4096 - PEERS_MAX)
    );
    assert_eq!(view.models.len(), MODELS_MAX);
    assert!(view.models_left_out > 100);
    let holders: usize = view.models.iter().map(|model| model.holders.len()).sum();
    assert_eq!(holders, HOLDERS_MAX);
    assert!(view.models.iter().any(|model| model.holders_left_out > 0));
    let said = serde_json::to_string(&view).expect("JSON").len();
    assert!(said < 4 << 20, "{said} bytes");
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
}

#[test]
fn a_large_honest_swarm_is_seen_whole() {
    let span = |n: u16| layers(n % 10 * 8, n % 10 * 8 + 8);
    let adverts: Vec<Advert> = (0..1000)
        .map(|n| advert(n, vec![held(1, 80, &[span(n)])]))
        .collect();
    let view = SwarmView::new(&adverts, &Facts::default(), NOW_MS);
    assert_eq!(
        (view.peers.len(), view.models[0].holders.len()),
        (1000, 1000)
    );
    assert_eq!(view.models[0].copies, [100; 80]);
    let said = serde_json::to_string(&view).expect("JSON").len();
    assert!(said < 700_000, "{said} bytes");
}
