//! Nodes that claim to be faster than they are, and clients that see what they get.

use std::ops::Range;
use std::time::Duration;

use node::session::Opener;
use node::{Privacy, Random, Routes, SessionSpec};
use swarm_proto::{Dtype, Form, Numerics, Want, WantRows};
use tokio::time::sleep;

use super::dice::Dice;
use super::peer::Spec;
use super::{MODEL, Model, Settings, World};

const N_LAYER: u32 = 8;
/// Tokens of each answer: enough for two figures.
const TOKENS: usize = 40;
const HONEST: Duration = Duration::from_millis(2);
const SLOW: Duration = Duration::from_millis(60);
const CLAIMED: Duration = Duration::from_micros(200);

fn spec(layers: Range<u32>, pace: Duration, claims: Duration) -> Spec {
    Spec {
        layers,
        sessions: 8,
        pace,
        claims,
        limits: node::session::SessionLimits::default(),
    }
}

/// Asks one answer after the other of these nodes; which of them each went over.
fn routes_of(specs: Vec<Spec>, answers: usize, pause: Duration) -> Vec<Vec<usize>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let settings = Settings {
            nodes: specs.len(),
            sessions: 1,
            tokens: TOKENS,
            faults: 0,
            span: Duration::from_secs(60),
        };
        let model = Model {
            n_layer: N_LAYER,
            n_embd: 32,
            n_vocab: 64,
            n_ctx: 256,
            seed: 1,
        };
        let swarm = "test".parse().expect("a swarm id");
        let world = World::of(1, &settings, &swarm, (model, specs, &Dice::new(1, 0)));
        let gossip = world.gossip();
        // Some of the first adverts are lost.
        sleep(Duration::from_secs(30)).await;
        let client = world.clients[0].clone();
        let opener = Opener {
            random: Random::seeded(7),
            ..Opener::new(
                world.network.peer(client.number),
                world.network.dialer(client.number),
            )
        };
        let routes = Routes::new(client, Privacy::Open, opener);
        let spec = SessionSpec {
            model: MODEL,
            n_layer: N_LAYER as u16,
            n_embd: model.n_embd,
            n_vocab: model.n_vocab,
            n_ctx: model.n_ctx,
            dtype: Dtype::F32,
            numerics: Numerics::Exact,
            avoid: Vec::new(),
            standby: false,
            batch: 1,
            patience: SessionSpec::PATIENCE,
        };
        let want = Want {
            rows: WantRows::Last,
            form: Form::Full,
        };
        let mut went = Vec::new();
        for _ in 0..answers {
            let opened = routes.open_waiting(&spec, Duration::from_secs(60), |_| ());
            let mut session = opened.await.expect("a session");
            let hops = session.route().iter();
            let number = |hop: &swarm_proto::Hop| world.network.number(&hop.peer);
            went.push(hops.filter_map(number).collect());
            session.feed(&[1, 2, 3], want).await.expect("fed");
            for _ in 0..TOKENS {
                let row = session.next_logits().await.expect("a row");
                let token = row.argmax().expect("a token");
                session.feed(&[token], want).await.expect("fed");
            }
            session.next_logits().await.expect("the last row");
            session.close().await;
            sleep(pause).await;
        }
        drop(gossip);
        went
    })
}

const PAUSE: Duration = Duration::from_secs(5);

#[test]
fn a_slow_node_that_claims_to_be_fast_is_found_out() {
    let specs = vec![
        spec(0..N_LAYER, SLOW, CLAIMED),
        spec(0..N_LAYER, HONEST, HONEST),
        spec(0..N_LAYER, HONEST, HONEST),
    ];
    let went = routes_of(specs, 8, PAUSE);
    assert_eq!(went[0], [0], "it is believed at first");
    assert!(
        went[1..].iter().all(|route| !route.contains(&0)),
        "{went:?}"
    );
}

#[test]
fn who_shared_a_route_with_a_liar_is_asked_again() {
    let half = N_LAYER / 2;
    // Nobody else holds the second half.
    let specs = vec![
        spec(0..half, SLOW, CLAIMED),
        spec(0..half, HONEST, HONEST),
        spec(half..N_LAYER, HONEST, HONEST),
    ];
    let went = routes_of(specs, 8, PAUSE);
    assert_eq!(went[0], [0, 2], "it is believed at first");
    assert!(went[1..].iter().all(|route| *route == [1, 2]), "{went:?}");
}

#[test]
fn it_is_tried_again_when_what_was_seen_is_old() {
    let specs = vec![
        spec(0..N_LAYER, SLOW, CLAIMED),
        spec(0..N_LAYER, HONEST, HONEST),
        spec(0..N_LAYER, HONEST, HONEST),
    ];
    let went = routes_of(specs, 5, Duration::from_secs(250));
    let asked: Vec<bool> = went.iter().map(|route| route.contains(&0)).collect();
    assert_eq!(asked, [true, false, false, true, false], "{went:?}");
}
