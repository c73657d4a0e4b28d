//! A trunk whose experts are on other nodes gives the whole model's bits, whatever becomes of them.

#![allow(clippy::unwrap_used)]

mod islands;

use std::time::Duration;

use islands::*;
use node::{PeerBook, Proto};
use swarm_proto::ExpertGive;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{Instant, timeout},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_holders_give_the_whole_models_bits_and_so_do_experts_that_move() {
    let mixture = mixture();
    let expected = mixture.expected();
    let net = network(None).await;
    let even = holder(&mixture, &net, |layer, e| (layer + e) % 2 == 0).await;
    let odd = holder(&mixture, &net, |layer, e| (layer + e) % 2 == 1).await;
    // Another machine's bits are not ours.
    let other = network(Some(&net)).await;
    advertise(&other, all(), NUMERICS + 1).await;
    let island = island(&mixture, &net);
    up(&island, 2).await;
    assert!(island.covers(0) && island.missing().is_empty());
    assert_eq!(mixture.run(&island, |_| ()).await.unwrap(), expected);
    let calls = |node: &HolderNode| node.service.stats().calls;
    assert!(calls(&even) > 0 && calls(&odd) > 0);
    let used: u64 = island.used().iter().map(|(.., rows)| rows).sum();
    // Of a prompt the last layer computes the last row only.
    assert_eq!(used, 3 * (2 * 39 + 1) + 3 * 3 * DECODED as u64);
    assert!(even.worker.stats().rows_s.is_some());

    // Some of them are computed here now; one holder has no more of them.
    let local = mixture.worker(|layer, e| (layer + e) % 2 == 0 && e < 4);
    island.set_local(Some(local.clone()));
    for (layer, expert) in local.held() {
        even.worker.remove(layer, expert).unwrap();
    }
    advertise(&even.net, even.worker.held(), NUMERICS).await;
    let before = calls(&even);
    assert_eq!(mixture.run(&island, |_| ()).await.unwrap(), expected);
    assert!(calls(&even) > before && local.stats().rows > 0);
    let placed = island.placed();
    let of = |layer, expert| {
        let placed = placed
            .iter()
            .find(|p| (p.layer, p.expert) == (layer, expert));
        placed.unwrap().holders[0]
    };
    assert_eq!(of(0, 0), None);
    assert_eq!(of(0, 1), Some(odd.net.me()));
    assert_eq!(of(1, 5), Some(even.net.me()));
    // An advert that is too late to be true costs nothing but an answer.
    let all_of = mixture.worker(|_, _| true);
    odd.service.offer(islands::MODEL, all_of);
    for (layer, expert) in even.worker.held() {
        even.worker.remove(layer, expert).unwrap();
    }
    advertise(&odd.net, all(), NUMERICS).await;
    assert_eq!(mixture.run(&island, |_| ()).await.unwrap(), expected);
}

/// Holders die while they are asked, one after the other; the last has half of what they had, a fourth the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holders_that_die_cost_no_token() {
    let mixture = mixture();
    let expected = mixture.expected();
    let net = network(None).await;
    let mut mortal = Vec::new();
    for _ in 0..2 {
        mortal.push(holder(&mixture, &net, |_, _| true).await);
    }
    let _low = holder(&mixture, &net, |_, e| e < 4).await;
    let _high = holder(&mixture, &net, |_, e| e >= 4).await;
    let island = island(&mixture, &net);
    up(&island, 4).await;
    let runtime = tokio::runtime::Handle::current();
    let dies = move |i: usize| {
        if i % 3 == 1
            && let Some(node) = mortal.pop()
        {
            runtime.spawn(async move { node.net.shutdown().await });
        }
    };
    assert_eq!(mixture.run(&island, dies).await.unwrap(), expected);
    up(&island, 2).await;
}

/// One that greets and then says nothing, and one that says it works and never ends: a deadline each, once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_holder_costs_a_deadline_and_one_that_never_ends_too() {
    let mixture = mixture();
    let expected = mixture.expected();
    let misdeeds: [(bool, Misdeed); 2] = [
        (true, |_, _| Vec::new()),
        (false, |_, _| said(&ExpertGive::Working, &[])),
    ];
    for (silent, misdeed) in misdeeds {
        let net = network(None).await;
        let frozen = bad_holder(&net, all(), misdeed).await;
        let island = island(&mixture, &net);
        up(&island, 1).await;
        // It is asked first, and nobody else is there.
        let run = tokio::spawn({
            let (mixture, island) = (mixture.clone(), island.clone());
            async move { mixture.run(&island, |_| ()).await }
        });
        until(&island, "asked", |island| {
            island.used().iter().any(|(.., rows)| *rows > 0)
        })
        .await;
        let _good = holder(&mixture, &net, |_, _| true).await;
        assert_eq!(run.await.unwrap().unwrap(), expected);
        let view = |island: &node::Island| {
            let stats = island.stats();
            let view = stats.iter().find(|view| view.peer == Some(frozen.me()));
            view.expect("it says that it is there").clone()
        };
        // Once it was late it is asked no more while there are others.
        let seen = view(&island);
        assert!(seen.calls == 0 && seen.hedges <= 2, "{seen:?}");
        match silent {
            true => until(&island, "silent", |island| view(island).losses > 0).await,
            false => assert!(seen.hedges > 0 && seen.losses == 0, "{seen:?}"),
        }
    }
}

/// Answers that are none go into the peer book, and the call to somebody else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_lies_is_struck_and_no_token_is_wrong() {
    let mixture = mixture();
    let expected = mixture.expected();
    let misdeeds: [(&str, Misdeed); 6] = [
        ("bytes for", |id, n| {
            said(
                &ExpertGive::Rows { id, spent_us: 9 },
                &vec![0.5; 256 * (n + 1)],
            )
        }),
        ("bytes for", |id, _| {
            said(&ExpertGive::Rows { id, spent_us: 9 }, &[])
        }),
        ("finite", |id, n| {
            let mut values = vec![0.5; 256 * n];
            values[3] = f32::NAN;
            said(&ExpertGive::Rows { id, spent_us: 9 }, &values)
        }),
        ("waits for none", |id, n| {
            let id = id + 1;
            said(&ExpertGive::Rows { id, spent_us: 9 }, &vec![0.5; 256 * n])
        }),
        ("pong", |id, _| said(&ExpertGive::Pong(id), &[])),
        ("limit", |_, _| vec![0xff; 64]),
    ];
    for (why, misdeed) in misdeeds {
        let net = network(None).await;
        let liar = bad_holder(&net, all(), misdeed).await;
        let book = PeerBook::default();
        let island = island_with(&mixture, &net, &book, DEADLINE);
        up(&island, 1).await;
        let run = tokio::spawn({
            let (mixture, island) = (mixture.clone(), island.clone());
            async move { mixture.run(&island, |_| ()).await }
        });
        until(&island, "struck", |_| !book.entries().is_empty()).await;
        let _good = holder(&mixture, &net, |_, _| true).await;
        assert_eq!(run.await.unwrap().unwrap(), expected, "{why}");
        let entry = &book.entries()[0];
        assert_eq!(entry.peer, liar.me());
        assert!(entry.last.contains(why), "{why}: {}", entry.last);
        let good = island.peers();
        assert!(good.len() == 1 && good[0] != liar.me(), "{why}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expert_that_nobody_has_is_waited_for_and_then_named() {
    let mixture = mixture();
    let expected = mixture.expected();
    let net = network(None).await;
    let most = holder(&mixture, &net, |layer, e| layer != 1 || e < 6).await;
    let wait = Duration::from_millis(300);
    let hasty = island_with(&mixture, &net, &PeerBook::default(), wait);
    up(&hasty, 1).await;
    assert_eq!(hasty.missing(), [(1, 6), (1, 7)]);
    assert!(hasty.covers(0) && !hasty.covers(1));
    let begun = Instant::now();
    let why = mixture.run(&hasty, |_| ()).await.unwrap_err();
    assert!(begun.elapsed() >= wait);
    assert!(why.contains("of layer 1 is held by nobody"), "{why}");
    assert!(
        why.contains("expert 6") || why.contains("expert 7"),
        "{why}"
    );
    assert!(!hasty.wanted().is_empty() && hasty.wanted().iter().all(|(l, _)| *l == 1));

    // Somebody takes it up while a step waits.
    let patient = island(&mixture, &net);
    up(&patient, 1).await;
    let run = tokio::spawn({
        let (mixture, island) = (mixture.clone(), patient.clone());
        async move { mixture.run(&island, |_| ()).await }
    });
    until(&patient, "wanted", |island| !island.wanted().is_empty()).await;
    for expert in [6, 7] {
        let loaded = engine::LoadedExpert::read(&mixture.layout, 1, expert, &*mixture.source);
        most.worker.add(loaded.unwrap()).unwrap();
    }
    advertise(&most.net, most.worker.held(), NUMERICS).await;
    assert_eq!(run.await.unwrap().unwrap(), expected);
    assert!(patient.wanted().is_empty() && patient.missing().is_empty());

    // And a step that waits ends with its island.
    let lonely = network(None).await;
    let closing = island(&mixture, &lonely);
    let run = tokio::spawn({
        let (mixture, island) = (mixture.clone(), closing.clone());
        async move { mixture.run(&island, |_| ()).await }
    });
    until(&closing, "wanted", |island| !island.wanted().is_empty()).await;
    closing.close();
    let why = run.await.unwrap().unwrap_err();
    assert!(why.contains("going down"), "{why}");
}

/// What a trunk never sends ends the stream, and nobody else notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_ends_the_stream_and_nothing_else() {
    let mixture = mixture();
    let expected = mixture.expected();
    let net = network(None).await;
    let node = holder(&mixture, &net, |_, _| true).await;
    let island = island(&mixture, &net);
    up(&island, 1).await;
    let hello = |model| frame(&swarm_proto::ExpertAsk::Hello { model }, &[]);
    let call = |n_embd, expert, values: usize| {
        let call = swarm_proto::ExpertRows {
            id: 1,
            layer: 0,
            form: swarm_proto::ExpertForm {
                activation: 0,
                alpha: 0.0,
                limit: 0.0,
                parts: 0,
            },
            n_embd,
            n_rows: 1,
            groups: vec![swarm_proto::ExpertGroup { expert, rows: 1 }],
            rows: vec![0],
        };
        frame(&swarm_proto::ExpertAsk::Call(call), &vec![0.25; values])
    };
    let ping = frame(&swarm_proto::ExpertAsk::Ping(1), &[]);
    let good = hello(MODEL);
    let cases: [(&str, Vec<u8>); 8] = [
        ("noise", vec![0xa5; 300]),
        ("a call first", call(256, 0, 256)),
        ("a ping first", ping),
        ("two hellos", [good.clone(), good.clone()].concat()),
        ("other rows", [good.clone(), call(128, 0, 128)].concat()),
        ("too few values", [good.clone(), call(256, 0, 255)].concat()),
        ("a huge frame", [good.clone(), vec![0xff; 6]].concat()),
        (
            "another model",
            hello(swarm_proto::ModelId(swarm_proto::Hash([1; 32]))),
        ),
    ];
    for (what, bytes) in cases {
        let opened = net.open(node.net.me(), &[], Proto::Experts, DEADLINE);
        let mut stream = opened.await.unwrap();
        let _ = stream.write_all(&bytes).await;
        let _ = stream.flush().await;
        let mut said = Vec::new();
        let ended = timeout(DEADLINE, stream.read_to_end(&mut said)).await;
        assert!(ended.is_ok(), "{what}: it stays open");
        assert!(said.len() < 200, "{what}: {} bytes", said.len());
    }
    // A call that a well-meaning trunk of another graph might send is answered, and refused.
    let opened = net.open(node.net.me(), &[], Proto::Experts, DEADLINE);
    let mut stream = opened.await.unwrap();
    let both = [hello(MODEL), call(256, 99, 256)].concat();
    stream.write_all(&both).await.unwrap();
    stream.flush().await.unwrap();
    let mut said = vec![0; 16];
    let read = timeout(DEADLINE, stream.read_exact(&mut said)).await;
    assert!(read.unwrap().is_ok());
    assert!(node.service.stats().refused >= 1);
    assert_eq!(mixture.run(&island, |_| ()).await.unwrap(), expected);
}

fn frame(ask: &swarm_proto::ExpertAsk, values: &[f32]) -> Vec<u8> {
    let mut out = Vec::new();
    let payload = |out: &mut Vec<u8>| values.iter().for_each(|v| out.extend(v.to_le_bytes()));
    swarm_proto::encode_frame(ask, &mut out, payload).unwrap();
    out
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_picked_more_than_its_share_is_called_hot() {
    let mixture = mixture();
    let net = network(None).await;
    let _node = holder(&mixture, &net, |_, _| true).await;
    let island = island(&mixture, &net);
    up(&island, 1).await;
    let (layout, asker) = (mixture.layout.clone(), island.clone());
    let ask = move || {
        use engine::{Activation, ExpertCall, ExpertHolders, Form, Group};
        for round in 0..200u32 {
            let cold = (round % N_EXPERT).max(1);
            let group = |expert| Group {
                expert,
                rows: vec![0],
            };
            let call = ExpertCall {
                layer: 1,
                form: Form {
                    activation: Activation::SwiGlu,
                    parts: layout.parts(1),
                },
                n_embd: 256,
                groups: vec![group(0), group(cold)],
                hidden: vec![0.1; 256],
            };
            let holder = asker.holder_of(1, 0).unwrap();
            let replies = asker.ask(vec![(holder, call)]).unwrap();
            assert_eq!(replies[0].rows.len(), 512);
        }
    };
    tokio::task::spawn_blocking(ask).await.unwrap();
    let hot = island.hot();
    assert_eq!(hot.len(), 1, "{hot:?}");
    assert_eq!((hot[0].layer, hot[0].expert, hot[0].per_mille), (1, 0, 500));
    let stats = island.stats();
    assert_eq!((stats[0].calls, stats[0].rows), (200, 400));
    assert!(stats[0].wire_us.is_some() && stats[0].row_us.is_some());
}
