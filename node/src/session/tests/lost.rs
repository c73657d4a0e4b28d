//! Hops that are lost in the middle of an answer: the rest goes on around them, nothing is lost,
//! changed or doubled, and who is left computes nothing again.

use std::time::Duration;

use swarm_proto::{Dtype, Epoch, Hop, LayerRange, Open, Standbys};
use tokio::time::Instant;

use super::{
    middle::{Mode, interpose},
    swarm::*,
};
use crate::{
    net::Proto,
    session::{
        ClientSession, Holdings, Kind, Route, SessionLimits,
        chain::{Shape, open_next},
    },
};

const CUTS: [u32; 4] = [0, 4, 9, 12];

/// Decodes `n` tokens greedily, each checked; on a failure the session goes on along `route`.
pub(super) async fn decode_over(
    swarm: &Swarm,
    session: &mut ClientSession,
    all: &mut Vec<u32>,
    n: usize,
    routes: &mut Vec<Route>,
) {
    let whole = reference();
    let mut answers = 0;
    while answers < n {
        let row = match session.next_logits().await {
            Ok(row) => row,
            Err(error) => {
                assert!(error.is_recoverable(), "{error}");
                let route = routes
                    .pop()
                    .unwrap_or_else(|| panic!("no other route: {error}"));
                swarm.opener().reopen(session, route).await.unwrap();
                continue;
            }
        };
        assert_eq!(
            row.pos as usize + 1,
            all.len(),
            "one row a position, in order"
        );
        let next = row.argmax().unwrap();
        assert_eq!(next, whole.expected(all), "after {} tokens", all.len());
        all.push(next);
        answers += 1;
        // What was fed when the route broke is fed again by the session itself.
        let _ = session.feed(&[next], TOP1).await;
    }
}

pub(super) fn computed(swarm: &Swarm) -> Vec<u64> {
    swarm
        .nodes
        .iter()
        .map(|node| node.worker.stats().rows)
        .collect()
}

#[tokio::test(start_paused = true)]
async fn any_hop_may_be_lost_and_the_others_compute_nothing_again() {
    let _clock = Clock::start();
    for (lost, mode) in (0..3).flat_map(|at| [(at, Mode::Cut), (at, Mode::Hang)]) {
        let mut swarm = Swarm::new(&CUTS);
        let layers = swarm.nodes[lost].layers.clone();
        let stand_in = swarm.stand_in(50, layers);
        let switch = interpose(&swarm, lost);
        let mut session = swarm.open_route(3).await;
        let mut all = prompt(70, 1);
        session.feed(&all.clone(), TOP1).await.unwrap();
        decode_over(&swarm, &mut session, &mut all, 9, &mut Vec::new()).await;
        switch.send(mode).unwrap();
        let before = computed(&swarm);
        let mut route = swarm.route()[..3].to_vec();
        route[lost] = stand_in;
        let mut routes = vec![route.into()];
        decode_over(&swarm, &mut session, &mut all, 9, &mut routes).await;
        assert!(routes.is_empty(), "hop {lost} was not lost");
        let after = computed(&swarm);
        for at in (0..3).filter(|at| *at != lost) {
            let more = after[at] - before[at];
            assert!(
                more <= 12,
                "hop {at} computed {more} rows for 9 tokens ({mode:?} of {lost})"
            );
        }
        assert!(after[3] >= 79, "the stand-in got everything: {}", after[3]);
        session.close().await;
        if mode == Mode::Cut {
            swarm.assert_empty().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn several_may_share_the_layers_of_one_and_two_neighbours_may_go_at_once() {
    let _clock = Clock::start();
    let mut swarm = Swarm::new(&[0, 3, 6, 9, 12]);
    let shared = [
        swarm.stand_in(50, 3..4),
        swarm.stand_in(51, 4..8),
        swarm.stand_in(52, 8..9),
    ];
    let (one, two) = (interpose(&swarm, 1), interpose(&swarm, 2));
    let mut session = swarm.open_route(4).await;
    let mut all = prompt(40, 2);
    session.feed(&all.clone(), TOP1).await.unwrap();
    decode_over(&swarm, &mut session, &mut all, 5, &mut Vec::new()).await;
    one.send(Mode::Cut).unwrap();
    two.send(Mode::Cut).unwrap();
    let whole = swarm.route();
    let mut route = vec![whole[0].clone()];
    route.extend(shared);
    route.push(whole[3].clone());
    decode_over(&swarm, &mut session, &mut all, 5, &mut vec![route.into()]).await;
    session.close().await;
}

#[tokio::test(start_paused = true)]
async fn a_neighbour_may_take_the_lost_layers_beside_its_own_or_together_with_them() {
    let _clock = Clock::start();
    for together in [false, true] {
        let mut swarm = Swarm::new(&CUTS);
        let wide = swarm.stand_in(50, 4..12);
        let part = |start, end| Hop {
            layers: LayerRange { start, end },
            ..wide.clone()
        };
        let mut route = swarm.route()[..3].to_vec();
        route[1] = part(4, 9);
        let switch = interpose(&swarm, 2);
        let mut session = swarm.open_over(CLIENT, 1024, Dtype::F32, &route).await;
        let mut all = prompt(40, 4);
        session.feed(&all.clone(), TOP1).await.unwrap();
        decode_over(&swarm, &mut session, &mut all, 5, &mut Vec::new()).await;
        switch.send(Mode::Cut).unwrap();
        route.truncate(1);
        if together {
            route.push(part(4, 12));
        } else {
            route.extend([part(4, 9), part(9, 12)]);
        }
        let begin = Instant::now();
        let mut routes = vec![route.into()];
        decode_over(&swarm, &mut session, &mut all, 9, &mut routes).await;
        assert!(begin.elapsed() < swarm.limits.deadlines.open, "it waited");
        session.close().await;
        tokio::time::sleep(swarm.limits.deadlines.keep * 2).await;
        swarm.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_whole_route_may_go_and_is_rebuilt_from_the_tokens() {
    let _clock = Clock::start();
    let mut swarm = Swarm::new(&CUTS);
    let others = vec![swarm.stand_in(50, 0..7), swarm.stand_in(51, 7..12)];
    let switches: Vec<_> = (0..3).map(|at| interpose(&swarm, at)).collect();
    let mut session = swarm.open_route(3).await;
    let mut all = prompt(100, 3);
    session.feed(&all.clone(), TOP1).await.unwrap();
    decode_over(&swarm, &mut session, &mut all, 3, &mut Vec::new()).await;
    for switch in &switches {
        switch.send(Mode::Cut).unwrap();
    }
    decode_over(&swarm, &mut session, &mut all, 5, &mut vec![others.into()]).await;
    session.close().await;
}

#[tokio::test(start_paused = true)]
async fn a_hop_lost_during_the_prompt_costs_only_its_own_part() {
    let _clock = Clock::start();
    for lost in 0..3 {
        let pace = Duration::from_micros(50);
        let mut swarm = Swarm::with(&CUTS, Default::default(), |stage| stage.with_pace(pace));
        let layers = swarm.nodes[lost].layers.clone();
        let stand_in = swarm.stand_in(50, layers);
        let switch = interpose(&swarm, lost);
        let mut session = swarm.open_route(3).await;
        let mut all = prompt(900, 4);
        let feeding = session.feed(&all, TOP1);
        tokio::select! {
            fed = feeding => fed.unwrap(),
            () = tokio::time::sleep(Duration::from_millis(300)) => {}
        }
        switch.send(Mode::Cut).unwrap();
        let mut route = swarm.route()[..3].to_vec();
        route[lost] = stand_in;
        decode_over(&swarm, &mut session, &mut all, 4, &mut vec![route.into()]).await;
        session.close().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_was_away_comes_back_to_what_it_had() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&CUTS);
    let switch = interpose(&swarm, 0);
    let mut session = swarm.open_route(3).await;
    let mut all = prompt(60, 5);
    session.feed(&all.clone(), TOP1).await.unwrap();
    decode_over(&swarm, &mut session, &mut all, 4, &mut Vec::new()).await;
    switch.send(Mode::Cut).unwrap();
    swarm
        .wires
        .set(peer(1), Behaviour::Serves(swarm.nodes[0].sessions.clone()));
    let before = computed(&swarm);
    decode_over(
        &swarm,
        &mut session,
        &mut all,
        4,
        &mut vec![swarm.route().into()],
    )
    .await;
    for (at, more) in computed(&swarm)
        .iter()
        .zip(before)
        .map(|(a, b)| a - b)
        .enumerate()
    {
        assert!(more <= 6, "hop {at} computed {more} rows for 4 tokens");
    }
    session.close().await;
    swarm.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn what_nobody_comes_back_to_is_freed() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&CUTS);
    let switch = interpose(&swarm, 0);
    let mut session = swarm.open_route(3).await;
    decode(&mut session, &mut Vec::new(), &prompt(40, 6), 2).await;
    switch.send(Mode::Cut).unwrap();
    let keep = swarm.limits.deadlines.keep;
    tokio::time::sleep(keep / 2).await;
    assert!(
        swarm.nodes.iter().all(|node| node.sessions.count() == 1),
        "kept for a while"
    );
    tokio::time::sleep(keep).await;
    swarm.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_hop_that_thaws_finds_its_place_taken() {
    let _clock = Clock::start();
    let mut swarm = Swarm::new(&CUTS);
    let stand_in = swarm.stand_in(50, 4..9);
    let switch = interpose(&swarm, 1);
    let mut session = swarm.open_route(3).await;
    let mut all = prompt(40, 7);
    session.feed(&all.clone(), TOP1).await.unwrap();
    decode_over(&swarm, &mut session, &mut all, 3, &mut Vec::new()).await;
    switch.send(Mode::Hang).unwrap();
    let mut route = swarm.route()[..3].to_vec();
    route[1] = stand_in;
    decode_over(&swarm, &mut session, &mut all, 3, &mut vec![route.into()]).await;
    switch.send(Mode::Pass).unwrap();
    decode_over(&swarm, &mut session, &mut all, 20, &mut Vec::new()).await;
    session.close().await;
    tokio::time::sleep(swarm.limits.deadlines.keep * 2).await;
    swarm.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn nobody_takes_over_the_session_of_another() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&CUTS);
    let mut session = swarm.open_route(3).await;
    let mut all = Vec::new();
    decode(&mut session, &mut all, &prompt(20, 8), 2).await;
    let shape = Shape {
        n_embd: N_EMBD,
        n_vocab: N_VOCAB,
    };
    let thefts = [
        (peer(99), Epoch(1), "expects its stream from"),
        (CLIENT, Epoch(0), "epoch 0, this session is at 0"),
    ];
    for (thief, epoch, why) in thefts {
        let open = Open {
            session: session.id(),
            epoch,
            resume: 0,
            since: Epoch(0),
            fork: None,
            client: CLIENT,
            model: MODEL,
            n_ctx: session.n_ctx(),
            dtype: session.dtype(),
            numerics: swarm_proto::Numerics::Exact,
            hops: swarm.route(),
            at: 0,
            standbys: Standbys::default(),
            standing_by: false,
            trace: None,
        };
        let dialer = swarm.wires.dialer(thief);
        let dial = async || dialer.open(peer(1), &[], Proto::Session).await;
        let deadline = Instant::now() + Duration::from_secs(5);
        let opened = open_next(&open, shape, None, deadline, dial).await;
        let failure = opened.err().unwrap();
        assert!(failure.message.contains(why), "{failure}");
    }
    decode(&mut session, &mut all, &[3], 4).await;
    session.close().await;
    swarm.assert_empty().await;
}

/// The loss comes before any hop has seen the first of several frames that were written anew.
#[tokio::test(start_paused = true)]
async fn what_was_taken_back_just_before_a_loss_is_written_anew_everywhere() {
    let _clock = Clock::start();
    for lost in 0..3 {
        let mut swarm = Swarm::new(&CUTS);
        let layers = swarm.nodes[lost].layers.clone();
        let stand_in = swarm.stand_in(50, layers);
        let switch = interpose(&swarm, lost);
        let mut session = swarm.open_route(3).await;
        let mut all = Vec::new();
        decode(&mut session, &mut all, &prompt(85, 1), 4).await;
        switch.send(Mode::Cut).unwrap();
        session.truncate(45).unwrap();
        all.truncate(45);
        let again = prompt(75, 3);
        all.extend_from_slice(&again);
        let _ = session.feed(&again, TOP1).await;
        let mut route = swarm.route()[..3].to_vec();
        route[lost] = stand_in;
        let mut routes = vec![route.into()];
        decode_over(&swarm, &mut session, &mut all, 5, &mut routes).await;
        assert!(routes.is_empty(), "hop {lost} was not lost");
        session.close().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_hundred_abandoned_sessions_stay_within_the_limits_and_leave_nothing() {
    let _clock = Clock::start();
    let limits = SessionLimits {
        retained_memory: 1 << 20,
        retained_disk: 1 << 20,
        ..SessionLimits::default()
    };
    let swarm = Swarm::with(&CUTS, limits, |stage| stage.with_cells(12 * 20_000));
    let switch = interpose(&swarm, 0);
    for n in 0..100 {
        // Whose client is new each time, and whose stream ends without a word.
        let opener = swarm.wires.opener(peer(100 + n), limits.deadlines);
        let kind = Kind {
            model: MODEL,
            n_ctx: 1024,
            dtype: Dtype::F32,
            n_embd: N_EMBD,
            numerics: swarm_proto::Numerics::Exact,
            n_vocab: N_VOCAB,
        };
        if let Ok(mut session) = opener.open_route(kind, swarm.route()).await {
            session.feed(&prompt(60, n.into()), TOP1).await.unwrap();
            session.next_logits().await.unwrap();
            switch.send(Mode::Cut).unwrap();
            tokio::time::sleep(Duration::from_millis(200)).await;
            switch.send(Mode::Pass).unwrap();
            drop(session);
        }
        for node in &swarm.nodes {
            let held = node.sessions.holdings();
            assert!(held.sessions <= limits.sessions_max, "{held:?}");
            assert!(held.retained_memory <= limits.retained_memory, "{held:?}");
            assert!(held.retained_disk <= limits.retained_disk, "{held:?}");
        }
    }
    tokio::time::sleep(limits.deadlines.keep * 3).await;
    swarm.assert_empty().await;
    for node in &swarm.nodes {
        assert_eq!(node.sessions.holdings(), Holdings::default());
    }
}
