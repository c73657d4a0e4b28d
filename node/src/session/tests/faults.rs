//! What breaks: peers that die or hang while opening and while running, clients that vanish, nodes
//! that go down. Whoever is left frees its KV, and the client learns whose fault it was. Clocks are
//! paused: a deadline takes no time.

use std::time::Duration;

use engine::ChainStage;
use swarm_proto::{
    Content, Down, Dtype, Epoch, FailureCode, Fault, Form, Peer, Rows, Up, Want, WantRows,
};
use tokio::time::Instant;

use super::{
    middle::{Mode, interpose},
    swarm::*,
};
use crate::session::{ClientError, Deadlines, Kind, SessionLimits};

const KIND: Kind = Kind {
    model: MODEL,
    n_ctx: 256,
    dtype: Dtype::F32,
    numerics: swarm_proto::Numerics::Exact,
    n_vocab: N_VOCAB,
};

#[track_caller]
fn named(error: &ClientError, at: usize, fault: Fault, code: FailureCode) -> String {
    let ClientError::Hop { hop, failure } = error else {
        panic!("{error:?}")
    };
    assert_eq!(
        (hop.at, failure.fault, failure.code),
        (at, fault, code),
        "{error}"
    );
    error.to_string()
}

#[tokio::test(start_paused = true)]
async fn a_hop_that_cannot_be_reached_is_named() {
    let _clock = Clock::start();
    for at in 0..3u8 {
        let swarm = Swarm::new(&[0, 4, 9, 12]);
        swarm.wires.set(peer(at + 1), Behaviour::Dead);
        let error = swarm
            .opener()
            .open_route(KIND, swarm.route())
            .await
            .err()
            .unwrap();
        let text = named(
            &error,
            usize::from(at),
            Fault::Peer,
            FailureCode::DownstreamLost,
        );
        assert!(
            text.contains(&peer(at + 1).to_string()) && text.contains("layers"),
            "{text}"
        );
        swarm.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_hop_that_never_answers_an_opening_is_named_within_the_deadline() {
    let _clock = Clock::start();
    for at in 0..3u8 {
        let swarm = Swarm::new(&[0, 4, 9, 12]);
        swarm.wires.set(peer(at + 1), Behaviour::Hangs);
        let begin = Instant::now();
        let error = swarm
            .opener()
            .open_route(KIND, swarm.route())
            .await
            .err()
            .unwrap();
        named(&error, usize::from(at), Fault::Peer, FailureCode::Deadline);
        assert!(
            begin.elapsed() <= Deadlines::default().opened(3),
            "{:?}",
            begin.elapsed()
        );
        swarm.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn another_route_is_taken_without_the_peer_that_failed() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&[0, 4, 9, 12]);
    let spare = Swarm::new(&[0, 4, 9, 12]);
    let stand_in = peer(50);
    let sessions = crate::session::Sessions::new(
        stand_in,
        swarm.wires.dialer(stand_in),
        SessionLimits::default(),
    );
    sessions.serve(crate::session::Served::new(
        MODEL,
        spare.nodes[1].worker.clone(),
    ));
    swarm.wires.set(stand_in, Behaviour::Serves(sessions));
    swarm.wires.set(peer(2), Behaviour::Dead);
    let mut asked: Vec<Vec<Peer>> = Vec::new();
    let mut session = swarm
        .opener()
        .open(KIND, |avoid| {
            asked.push(avoid.to_vec());
            let mut route = swarm.route();
            if avoid.contains(&peer(2)) {
                route[1].peer = stand_in;
            }
            Ok(route)
        })
        .await
        .unwrap();
    assert_eq!(asked, [vec![], vec![peer(2)]]);
    decode(&mut session, &mut Vec::new(), &prompt(40, 1), 3).await;
}

#[tokio::test(start_paused = true)]
async fn when_no_route_is_left_the_failure_is_told_and_not_its_consequence() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&[0, 4, 12]);
    swarm.wires.set(peer(2), Behaviour::Dead);
    let plan = |avoid: &[Peer]| match avoid {
        [] => Ok(swarm.route()),
        _ => Err(ClientError::NothingAsked),
    };
    let error = swarm.opener().open(KIND, plan).await.err().unwrap();
    named(&error, 1, Fault::Peer, FailureCode::DownstreamLost);
}

#[tokio::test(start_paused = true)]
async fn a_hop_that_dies_while_running_is_named_and_everybody_frees() {
    let _clock = Clock::start();
    for at in 0..3 {
        let swarm = Swarm::new(&[0, 4, 9, 12]);
        let mode = interpose(&swarm, at);
        let mut session = swarm.open().await;
        decode(&mut session, &mut Vec::new(), &prompt(40, 1), 3).await;
        mode.send(Mode::Cut).unwrap();
        // Perhaps the first frame is still taken; the failure is told at the latest with its row.
        let _ = session.feed(&[1], TOP1).await;
        let error = session.next_logits().await.unwrap_err();
        let text = named(&error, at, Fault::Peer, FailureCode::DownstreamLost);
        assert!(text.contains(&swarm.nodes[at].peer.to_string()), "{text}");
        assert_eq!(
            session.next_logits().await.unwrap_err(),
            error,
            "a failure is final"
        );
        swarm.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_hop_that_hangs_while_running_is_named_within_the_deadline() {
    let _clock = Clock::start();
    for at in 0..3 {
        let swarm = Swarm::new(&[0, 4, 9, 12]);
        let mode = interpose(&swarm, at);
        let mut session = swarm.open().await;
        decode(&mut session, &mut Vec::new(), &prompt(40, 1), 3).await;
        mode.send(Mode::Hang).unwrap();
        let begin = Instant::now();
        session.feed(&[1], TOP1).await.unwrap();
        let error = session.next_logits().await.unwrap_err();
        named(&error, at, Fault::Peer, FailureCode::Deadline);
        assert!(
            begin.elapsed() <= Deadlines::default().acked(32, 3),
            "{:?}",
            begin.elapsed()
        );
        drop(session);
        mode.send(Mode::Cut).unwrap();
        swarm.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_hop_that_hangs_during_a_long_prompt_is_named() {
    let _clock = Clock::start();
    for at in 0..3 {
        let swarm = Swarm::new(&[0, 4, 9, 12]);
        let mode = interpose(&swarm, at);
        let mut session = swarm.open().await;
        decode(&mut session, &mut Vec::new(), &prompt(40, 1), 1).await;
        mode.send(Mode::Hang).unwrap();
        let error = match session.feed(&prompt(900, 2), TOP1).await {
            Ok(()) => session.next_logits().await.unwrap_err(),
            Err(e) => e,
        };
        named(&error, at, Fault::Peer, FailureCode::Deadline);
        drop(session);
        mode.send(Mode::Cut).unwrap();
        swarm.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_vanishes_leaves_no_kv() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&[0, 4, 9, 12]);
    // In the middle of decoding, of a prompt, and before the first token.
    let mut one = swarm.open().await;
    decode(&mut one, &mut Vec::new(), &prompt(40, 1), 3).await;
    let mut two = swarm.open().await;
    let feeding = two.feed(&[3; 1000], TOP1);
    let _ = futures::poll!(std::pin::pin!(feeding));
    let three = swarm.open().await;
    assert_eq!(swarm.nodes[0].sessions.count(), 3);
    drop((one, two, three));
    swarm.assert_empty().await;
    // While opening: the last hop hangs, the client does not wait.
    swarm.wires.set(peer(3), Behaviour::Hangs);
    let opener = swarm.opener();
    let route = swarm.route();
    let opening = tokio::time::timeout(
        Duration::from_secs(1),
        opener.open_route(KIND, route.clone()),
    );
    assert!(opening.await.is_err());
    swarm.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn no_kv_is_set_up_for_a_client_that_left_the_queue() {
    let _clock = Clock::start();
    let pace = Duration::from_millis(10);
    let swarm = Swarm::with(&[0, 12], SessionLimits::default(), |stage| {
        stage.with_pace(pace)
    });
    let mut one = swarm.open().await;
    // An eighth of a second in the worker, six in the test's time.
    one.feed(&[1], TOP1).await.unwrap();
    let (opener, route) = (swarm.opener(), swarm.route());
    let opening = tokio::time::timeout(
        Duration::from_secs(1),
        opener.open_route(KIND, route.clone()),
    );
    assert!(opening.await.is_err());
    one.next_logits().await.unwrap();
    drop(one);
    swarm.assert_empty().await;
    let (to, slot) = tokio::sync::oneshot::channel();
    let reply: engine::Reply<engine::Slot> = Box::new(|slot| drop(to.send(slot)));
    swarm.nodes[0].worker.open(8, 0..12, reply).unwrap();
    assert_eq!(
        slot.await.unwrap(),
        Ok(engine::Slot(1)),
        "one was opened before"
    );
}

#[tokio::test(start_paused = true)]
async fn an_idle_session_loses_its_lease() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&[0, 4, 12]);
    let mut session = swarm.open().await;
    decode(&mut session, &mut Vec::new(), &prompt(5, 1), 1).await;
    // The last acknowledgement is on its way: a leap over its deadline would be a hang.
    tokio::time::sleep(Duration::from_secs(1)).await;
    tokio::time::advance(Deadlines::default().idle).await;
    swarm.assert_empty().await;
    let _ = session.feed(&[1], TOP1).await;
    let error = session.next_logits().await.unwrap_err();
    assert!(error.to_string().contains("lease"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_session_that_nothing_runs_on_gives_way() {
    let _clock = Clock::start();
    let limits = SessionLimits::default();
    let swarm = Swarm::with(&[0, 12], limits, |stage| stage.with_cells(12 * 2000));
    let switch = interpose(&swarm, 0);
    let large = Kind {
        n_ctx: 1500,
        ..KIND
    };
    let mut session = swarm
        .opener()
        .open_route(large, swarm.route())
        .await
        .unwrap();
    decode(&mut session, &mut Vec::new(), &prompt(5, 1), 1).await;
    let other = swarm.wires.opener(peer(90), limits.deadlines);
    let error = other.open_route(large, swarm.route()).await.err().unwrap();
    named(&error, 0, Fault::Local, FailureCode::Full);
    // Its client is cut off: it is kept, until somebody needs the room.
    switch.send(Mode::Cut).unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    switch.send(Mode::Pass).unwrap();
    let begin = tokio::time::Instant::now();
    let second = other.open_route(large, swarm.route()).await.unwrap();
    assert!(begin.elapsed() < limits.deadlines.keep / 2);
    second.close().await;
}

#[tokio::test(start_paused = true)]
async fn a_session_that_rests_gives_way_and_one_that_works_does_not() {
    let _clock = Clock::start();
    let limits = SessionLimits::default();
    let swarm = Swarm::with(&[0, 12], limits, |stage| stage.with_cells(12 * 2000));
    let large = Kind {
        n_ctx: 1500,
        ..KIND
    };
    let opener = swarm.opener();
    let mut session = opener.open_route(large, swarm.route()).await.unwrap();
    let other = swarm.wires.opener(peer(90), limits.deadlines);
    let mut all = Vec::new();
    for token in 0..12 {
        decode(&mut session, &mut all, &[token], 0).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let error = other.open_route(large, swarm.route()).await.err().unwrap();
    named(&error, 0, Fault::Local, FailureCode::Full);
    // Nobody asks it anything for a while.
    tokio::time::sleep(Duration::from_secs(11)).await;
    let second = other.open_route(large, swarm.route()).await.unwrap();
    let fed = session.feed(&[1], TOP1).await;
    let error = match fed {
        Ok(()) => session.next_logits().await.unwrap_err(),
        Err(error) => error,
    };
    named(&error, 0, Fault::Local, FailureCode::HandedOver);
    second.close().await;
}

#[tokio::test(start_paused = true)]
async fn limits_are_told_and_given_back() {
    let _clock = Clock::start();
    let limits = SessionLimits {
        sessions_max: 3,
        per_client_max: 2,
        ..SessionLimits::default()
    };
    let swarm = Swarm::with(&[0, 12], limits, |stage| stage.with_cells(12 * 2000));
    let (a, b) = (
        swarm.open().await,
        swarm.open_as(CLIENT, 100, Dtype::F32).await,
    );
    let error = swarm
        .opener()
        .open_route(KIND, swarm.route())
        .await
        .err()
        .unwrap();
    let text = named(&error, 0, Fault::Local, FailureCode::Full);
    assert!(text.contains("limit here is 2"), "{text}");
    let other = swarm.wires.opener(peer(90), limits.deadlines);
    let large = Kind {
        n_ctx: 1500,
        ..KIND
    };
    let error = other.open_route(large, swarm.route()).await.err().unwrap();
    named(&error, 0, Fault::Local, FailureCode::Full);
    let c = other.open_route(KIND, swarm.route()).await.unwrap();
    let error = other.open_route(KIND, swarm.route()).await.err().unwrap();
    assert!(named(&error, 0, Fault::Local, FailureCode::Full).contains("limit here is 3"));
    drop((a, b, c));
    swarm.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_node_that_goes_down_refuses_finishes_and_then_says_so() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&[0, 4, 9, 12]);
    let mut session = swarm.open().await;
    let mut all = Vec::new();
    decode(&mut session, &mut all, &prompt(5, 1), 1).await;
    let going = swarm.nodes[1].sessions.clone();
    let down = tokio::spawn(async move { going.shutdown(Duration::from_secs(5)).await });
    tokio::task::yield_now().await;
    let error = swarm
        .opener()
        .open_route(KIND, swarm.route())
        .await
        .err()
        .unwrap();
    named(&error, 1, Fault::Local, FailureCode::ShuttingDown);
    decode(&mut session, &mut all, &[1], 2).await;
    down.await.unwrap();
    let _ = session.feed(&[1], TOP1).await;
    let error = session.next_logits().await.unwrap_err();
    named(&error, 1, Fault::Local, FailureCode::ShuttingDown);
    swarm.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_paused_node_refuses_new_sessions_and_goes_on_with_those_it_has() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&[0, 4, 9, 12]);
    let mut session = swarm.open().await;
    let mut all = Vec::new();
    decode(&mut session, &mut all, &prompt(5, 1), 1).await;
    let sessions = &swarm.nodes[1].sessions;
    sessions.pause(true);
    let refused = swarm.opener().open_route(KIND, swarm.route()).await;
    let said = named(
        &refused.err().unwrap(),
        1,
        Fault::Local,
        FailureCode::ShuttingDown,
    );
    assert!(said.contains("paused by its owner"), "{said}");
    decode(&mut session, &mut all, &[1], 5).await;
    sessions.pause(false);
    let another = swarm
        .opener()
        .open_route(KIND, swarm.route())
        .await
        .unwrap();
    drop((session, another));
    swarm.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_reads_nothing_is_stopped_and_then_ended() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&[0, 4, 12]);
    let mut session = swarm.open().await;
    let rows = Rows {
        session: session.id(),
        epoch: Epoch(0),
        pos0: 0,
        n_rows: 32,
        content: Content::Tokens,
        want: Want {
            rows: WantRows::All,
            form: Form::Full,
        },
        spent_us: 0,
    };
    let mut sent = 0;
    loop {
        session
            .up
            .push_with(&Down::Rows(rows), |out| out.extend([0; 128]));
        match tokio::time::timeout(Duration::from_secs(3), session.up.flush()).await {
            Ok(flushed) => flushed.unwrap(),
            Err(_) => break,
        }
        sent += 1;
        assert!(sent < 200, "nothing stops a client that reads nothing");
    }
    let failure = loop {
        match session.up.frame::<Up>().await.unwrap() {
            Some(Up::Lost { failure, .. }) => break failure,
            Some(Up::Ack { .. } | Up::Working) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((failure.at, failure.fault), (1, Fault::Caller), "{failure}");
    assert_eq!(failure.code, FailureCode::Deadline, "{failure}");
    swarm.assert_empty().await;
}

/// A vocabulary of which 32 whole rows are more than one frame may ask for.
const LARGE_VOCAB: u32 = 50_000;
const ALL_WHOLE: Want = Want {
    rows: WantRows::All,
    form: Form::Full,
};

async fn large() -> (Swarm, crate::session::ClientSession) {
    let large = |_| ChainStage::new(N_LAYER, N_EMBD, LARGE_VOCAB, 0..N_LAYER, SEED);
    let swarm = Swarm::with(&[0, 12], SessionLimits::default(), large);
    let kind = Kind {
        n_vocab: LARGE_VOCAB,
        ..KIND
    };
    let opening = swarm.opener();
    let session = opening.open_route(kind, swarm.route()).await.unwrap();
    (swarm, session)
}

#[tokio::test(start_paused = true)]
async fn whole_rows_of_a_large_vocabulary_come_in_smaller_frames() {
    let _clock = Clock::start();
    let (swarm, mut session) = large().await;
    session.feed(&[1; 50], ALL_WHOLE).await.unwrap();
    for pos in 0..50 {
        let row = session.next_logits().await.unwrap();
        assert_eq!((row.pos, row.full.len()), (pos, LARGE_VOCAB as usize));
        session.recycle(row);
    }
    drop(session);
    swarm.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn logits_that_nobody_reads_are_bounded() {
    let _clock = Clock::start();
    let (swarm, mut session) = large().await;
    let n_rows = ALL_WHOLE.rows_max(LARGE_VOCAB);
    for frame in 0..8 {
        let rows = Rows {
            session: session.id(),
            epoch: Epoch(0),
            pos0: frame * u32::from(n_rows),
            n_rows,
            content: Content::Tokens,
            want: ALL_WHOLE,
            spent_us: 0,
        };
        session.up.push_with(&Down::Rows(rows), |out| {
            out.extend(vec![0; 4 * usize::from(n_rows)]);
        });
    }
    session.up.flush().await.unwrap();
    let failed =
        async { while let Some(Up::Ack { .. }) = session.up.frame::<Up>().await.unwrap() {} };
    failed.await;
    // Each row computed was kept for the client: two frames' worth, by the byte limit.
    let computed = swarm.nodes[0].worker.stats().rows;
    assert!(computed <= 2 * u64::from(n_rows), "{computed} rows wait");
    swarm.assert_empty().await;
}
