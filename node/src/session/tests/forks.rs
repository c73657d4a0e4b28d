//! Sessions that begin with another's beginning: they say what they say alone, the other one does not notice, and what
//! hops lack of it is sent again or computed, never guessed.

use swarm_proto::{Dtype, Hop, LayerRange, Numerics};
use tokio::sync::watch;

use super::{
    lost::{computed, decode_over},
    middle::{Mode, interpose},
    swarm::*,
};
use crate::session::{Beginning, ClientSession, Kind, Opener, SessionLimits};

const CUTS: [u32; 4] = [0, 4, 9, 12];
const KIND: Kind = Kind {
    model: MODEL,
    n_ctx: 512,
    dtype: Dtype::F32,
    n_embd: N_EMBD,
    numerics: Numerics::Exact,
    n_vocab: N_VOCAB,
};

type Lent = watch::Receiver<Option<Beginning>>;

/// A session that has said something, and where it says its beginning.
async fn running(swarm: &Swarm, hops: usize) -> (ClientSession, Vec<u32>, Lent) {
    let (to, lent) = watch::channel(None);
    let mut session = swarm.open_route(hops).await;
    session.lend(to);
    let mut all = Vec::new();
    decode(&mut session, &mut all, &prompt(75, 1), 7).await;
    (session, all, lent)
}

fn beginning(lent: &Lent) -> Beginning {
    lent.borrow().clone().unwrap()
}

async fn fork(opener: &Opener, route: &[Hop], of: &Beginning, positions: u32) -> ClientSession {
    opener.fork(KIND, route, of, positions).await.unwrap()
}

/// Feeds what is its own, and decodes.
async fn decode_fork(session: &mut ClientSession, n: usize) -> Vec<u32> {
    let mut all = session.tokens().to_vec();
    decode(session, &mut all, &prompt(20, 9), n).await;
    all
}

#[tokio::test(start_paused = true)]
async fn forks_of_a_running_session_compute_only_what_is_their_own() {
    let _clock = Clock::start();
    for cuts in [&CUTS[..], &[0, 12], &[0, 1, 2, 3, 12]] {
        let swarm = Swarm::new(cuts);
        let hops = cuts.len() - 1;
        let (mut source, mut all, lent) = running(&swarm, hops).await;
        assert_eq!(beginning(&lent).tokens(), &all[..64], "whole frames");
        assert_eq!(beginning(&lent).computed(), 64);
        let mut forks = Vec::new();
        for _ in 0..3 {
            let before = computed(&swarm);
            let mut fork = fork(&swarm.opener(), &swarm.route(), &beginning(&lent), 70).await;
            assert_eq!((fork.spared(), fork.pos()), (64, 64));
            decode_fork(&mut fork, 5).await;
            for (before, after) in before.iter().zip(computed(&swarm)) {
                assert_eq!(after - before, 20 + 5, "its own rows only");
            }
            decode(&mut source, &mut all, &[7], 2).await;
            forks.push(fork);
        }
        // It is a session like any other when the first is gone.
        source.close().await;
        for fork in &mut forks {
            let mut all = fork.tokens().to_vec();
            decode(fork, &mut all, &[3], 3).await;
            fork.truncate(40).unwrap();
            all.truncate(40);
            decode(fork, &mut all, &prompt(30, 4), 3).await;
        }
        for fork in forks {
            fork.close().await;
        }
        swarm.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_hop_that_does_not_know_the_session_is_fed_or_computes() {
    let _clock = Clock::start();
    for other in 0..3 {
        let mut swarm = Swarm::new(&CUTS);
        let stand_in = swarm.stand_in(50, swarm.nodes[other].layers.clone());
        let (source, all, lent) = running(&swarm, 3).await;
        let mut route = swarm.route()[..3].to_vec();
        route[other] = stand_in;
        let before = computed(&swarm);
        let mut fork = fork(&swarm.opener(), &route, &beginning(&lent), 64).await;
        assert_eq!(fork.pos(), 64);
        let spared = if other == 0 { 0 } else { 64 };
        assert_eq!(fork.spared(), spared, "the first hop's");
        assert_eq!(decode_fork(&mut fork, 5).await[..64], all[..64]);
        let rows: Vec<u64> = computed(&swarm)
            .iter()
            .zip(&before)
            .map(|(after, before)| after - before)
            .collect();
        // Who is above another peer than before gets nothing from the first session, either.
        for (at, rows) in rows[..3].iter().enumerate() {
            let own = match at {
                at if at == other => 0,
                at if at == other + 1 => 64 + 25,
                _ => 25,
            };
            assert_eq!(*rows, own, "hop {at} without {other}");
        }
        assert_eq!(rows[3], 64 + 25);
        drop((source, fork));
        swarm.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn any_hop_may_be_lost_right_after_a_fork() {
    let _clock = Clock::start();
    for (lost, mode) in (0..3).flat_map(|at| [(at, Mode::Cut), (at, Mode::Hang)]) {
        let mut swarm = Swarm::new(&CUTS);
        let stand_in = swarm.stand_in(50, swarm.nodes[lost].layers.clone());
        let switch = interpose(&swarm, lost);
        let (mut source, mut said, lent) = running(&swarm, 3).await;
        let route = swarm.route()[..3].to_vec();
        let mut again = route.clone();
        again[lost] = stand_in;
        let mut fork = fork(&swarm.opener(), &route, &beginning(&lent), 64).await;
        assert_eq!(fork.spared(), 64);
        switch.send(mode).unwrap();
        let before = computed(&swarm);
        let mut all = fork.tokens().to_vec();
        all.extend(prompt(20, 9));
        let _ = fork.feed(&prompt(20, 9), TOP1).await;
        let mut routes = vec![again.clone().into()];
        decode_over(&swarm, &mut fork, &mut all, 6, &mut routes).await;
        assert!(routes.is_empty(), "hop {lost} was not lost");
        let after = computed(&swarm);
        for at in (0..3).filter(|at| *at != lost) {
            let more = after[at] - before[at];
            assert!(more <= 2 * 20 + 8, "hop {at} computed {more} rows");
        }
        // The first one goes on around it as well.
        said.push(reference().expected(&said));
        let _ = source.feed(&said[said.len() - 1..], TOP1).await;
        decode_over(&swarm, &mut source, &mut said, 4, &mut vec![again.into()]).await;
        drop((source, fork));
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_gone_or_was_opened_again_is_not_taken_over() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&CUTS);
    let (mut source, mut all, lent) = running(&swarm, 3).await;
    let (opener, route) = (swarm.opener(), swarm.route());
    let old = beginning(&lent);
    opener.reopen(&mut source, route.clone()).await.unwrap();
    let mut late = fork(&opener, &route, &old, 64).await;
    assert_eq!(
        (late.spared(), late.pos()),
        (0, 64),
        "an epoch that is over"
    );
    decode_fork(&mut late, 3).await;
    let mut now = fork(&opener, &route, &beginning(&lent), 64).await;
    assert_eq!(now.spared(), 64);
    decode_fork(&mut now, 3).await;

    // What was taken back is not lent before something came of what was written instead.
    source.truncate(40).unwrap();
    all.truncate(40);
    let lends = beginning(&lent);
    assert_eq!((lends.tokens(), lends.computed()), (&all[..32], 32));
    source.feed(&prompt(24, 5), TOP1).await.unwrap();
    source.feed(&prompt(32, 6), TOP1).await.unwrap();
    assert_eq!(beginning(&lent).computed(), 32);

    let gone = beginning(&lent);
    source.close().await;
    assert!(lent.has_changed().is_err(), "it says so");
    let mut orphan = fork(&opener, &route, &gone, 32).await;
    assert_eq!((orphan.spared(), orphan.pos()), (0, 32));
    decode_fork(&mut orphan, 3).await;
    drop((late, now, orphan));
    swarm.assert_empty().await;
}

/// What its frames were: whole ones only, for the bits to be the same.
#[tokio::test(start_paused = true)]
async fn only_whole_frames_from_the_beginning_are_lent() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&[0, 12]);
    let mut session = swarm.open().await;
    let (to, lent) = watch::channel(None);
    session.lend(to);
    let mut all = Vec::new();
    decode(&mut session, &mut all, &prompt(40, 1), 3).await;
    decode(&mut session, &mut all, &prompt(100, 2), 3).await;
    assert_eq!(beginning(&lent).tokens(), &all[..32]);
    assert_eq!(Beginning::common(&all, &all[..64]), 32, "never all of it");
    assert_eq!(Beginning::common(&all, &all[..65]), 64);
    assert_eq!(Beginning::common(&all, &[]), 0);
}

#[tokio::test(start_paused = true)]
async fn frames_that_find_no_budget_are_not_taken_over() {
    let _clock = Clock::start();
    let limits = SessionLimits {
        // For the first session's frames, and no others.
        retained_memory: 256 * 1024,
        retained_disk: 0,
        ..SessionLimits::default()
    };
    let swarm = Swarm::with(&CUTS, limits, |stage| stage);
    let (source, _, lent) = running(&swarm, 3).await;
    let mut fork = fork(&swarm.opener(), &swarm.route(), &beginning(&lent), 64).await;
    assert_eq!(fork.spared(), 0);
    decode_fork(&mut fork, 5).await;
    drop((source, fork));
    swarm.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn nobody_forks_what_is_not_its_own() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&CUTS);
    let (source, _, lent) = running(&swarm, 3).await;
    let (thief, route) = (peer(99), swarm.route());
    let opener = swarm.wires.opener(thief, swarm.limits.deadlines);
    let mut stolen = fork(&opener, &route, &beginning(&lent), 64).await;
    assert_eq!(stolen.spared(), 0, "another client's");
    decode_fork(&mut stolen, 3).await;

    // Another dtype.
    let opener = swarm.opener();
    let kind = Kind {
        dtype: Dtype::Q8_0,
        ..KIND
    };
    let forked = opener.fork(kind, &route[..], &beginning(&lent), 64).await;
    assert_eq!(forked.unwrap().spared(), 0);

    // No more than fits.
    let kind = Kind { n_ctx: 60, ..KIND };
    let short = opener.fork(kind, &route[..], &beginning(&lent), 64).await;
    assert_eq!(short.unwrap().spared(), 32);
    drop((source, stolen));
    swarm.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_session_on_other_layers_of_a_peer_is_another() {
    let _clock = Clock::start();
    let mut swarm = Swarm::new(&CUTS);
    let wide = swarm.stand_in(50, 4..12);
    let part = |start, end| Hop {
        layers: LayerRange { start, end },
        ..wide.clone()
    };
    let nodes = swarm.route();
    let (to, lent) = watch::channel(None);
    let route = [nodes[0].clone(), part(4, 9), nodes[2].clone()];
    let mut source = swarm.open_over(CLIENT, 512, Dtype::F32, &route).await;
    source.lend(to);
    let mut all = Vec::new();
    decode(&mut source, &mut all, &prompt(75, 1), 7).await;
    let before = computed(&swarm);
    let route = [nodes[0].clone(), part(4, 12)];
    let mut fork = fork(&swarm.opener(), &route, &beginning(&lent), 64).await;
    assert_eq!(fork.spared(), 64);
    decode_fork(&mut fork, 5).await;
    let after = computed(&swarm);
    assert_eq!((after[0] - before[0], after[3] - before[3]), (25, 64 + 25));
    drop((source, fork));
    swarm.assert_empty().await;
}
