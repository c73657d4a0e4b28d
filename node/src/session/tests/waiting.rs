//! Clients that wait their turn: peers without room are asked again, peers that failed are not, and
//! nobody waits longer than told. Clocks are paused: a pause takes no time.

use std::{cell::RefCell, time::Duration};

use swarm_proto::{Dtype, Hop, LayerRange, Peer};
use tokio::{sync::oneshot, time::Instant};

use super::swarm::*;
use crate::session::{ClientError, Kind, SessionLimits};

const KIND: Kind = Kind {
    model: MODEL,
    n_ctx: 256,
    dtype: Dtype::F32,
    n_embd: N_EMBD,
    numerics: swarm_proto::Numerics::Exact,
    n_vocab: N_VOCAB,
};
const HOUR: Duration = Duration::from_secs(3600);

/// Two nodes with room for one session each.
fn narrow() -> Swarm {
    let limits = SessionLimits {
        sessions_max: 1,
        ..SessionLimits::default()
    };
    Swarm::with(&[0, 4, 12], limits, |stage| stage)
}

fn avoiding(route: &[Hop], avoid: &[Peer]) -> Result<Vec<Hop>, ClientError> {
    if route.iter().any(|hop| avoid.contains(&hop.peer)) {
        return Err(ClientError::NothingAsked);
    }
    Ok(route.to_vec())
}

#[tokio::test(start_paused = true)]
async fn a_client_waits_for_the_place_of_another_and_is_told_once_for_which_layers() {
    let _clock = Clock::start();
    let swarm = narrow();
    let first = swarm.open_as(peer(90), 256, Dtype::F32).await;
    let (tell, told) = oneshot::channel();
    let (opener, route) = (swarm.opener(), swarm.route());
    let waiting = tokio::spawn(async move {
        let plan = |avoid: &[Peer]| avoiding(&route, avoid);
        let busy = |layers: &[LayerRange]| drop(tell.send(layers.to_vec()));
        opener.open_waiting(KIND, HOUR, plan, busy).await
    });
    let layers = told.await.unwrap();
    assert_eq!(layers, [swarm.route()[0].layers]);
    assert!(!waiting.is_finished(), "there is no place yet");
    drop(first);
    let mut second = waiting.await.unwrap().unwrap();
    decode(&mut second, &mut Vec::new(), &prompt(5, 1), 3).await;
    drop(second);
    swarm.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn patience_ends_and_none_fails_at_once() {
    let _clock = Clock::start();
    let swarm = narrow();
    let first = swarm.open_as(peer(90), 256, Dtype::F32).await;
    let route = swarm.route();
    for patience in [Duration::ZERO, Duration::from_secs(9)] {
        let begun = Instant::now();
        let plan = |avoid: &[Peer]| avoiding(&route, avoid);
        let error = swarm
            .opener()
            .open_waiting(KIND, patience, plan, |_| {})
            .await;
        let error = error.err().unwrap();
        let ClientError::Busy { waited, .. } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(*waited, patience);
        assert!(begun.elapsed() >= patience, "{:?}", begun.elapsed());
        let text = error.to_string();
        assert!(
            text.contains("every holder of layers 0..4 is busy")
                && text.contains("limit here is 1"),
            "{text}"
        );
        assert_eq!(text.contains("9 s of waiting"), !patience.is_zero());
    }
    drop(first);
}

/// A peer that failed is no longer asked; one without room is, in the next round.
#[tokio::test(start_paused = true)]
async fn only_peers_that_failed_are_avoided_for_good() {
    let _clock = Clock::start();
    let swarm = narrow();
    let other = Swarm::new(&[0, 12]);
    let dead = peer(77);
    swarm.wires.set(dead, Behaviour::Dead);
    let dead_route = [Hop {
        peer: dead,
        ..other.route()[0].clone()
    }];
    let first = RefCell::new(Some(swarm.open_as(peer(90), 256, Dtype::F32).await));
    let (rounds, route) = (RefCell::new(Vec::new()), swarm.route());
    let plan = |avoid: &[Peer]| {
        rounds.borrow_mut().push(avoid.to_vec());
        // The second round finds the place free.
        if rounds.borrow().len() > 3 {
            first.borrow_mut().take();
        }
        avoiding(&dead_route, avoid).or_else(|_| avoiding(&route, avoid))
    };
    let opened = swarm.opener().open_waiting(KIND, HOUR, plan, |_| {}).await;
    assert_eq!(opened.unwrap().route().hops.len(), 2);
    let rounds = rounds.into_inner();
    assert_eq!(
        rounds[..4],
        [vec![], vec![dead], vec![dead, peer(1)], vec![dead]]
    );
}

#[tokio::test(start_paused = true)]
async fn a_session_that_never_fits_is_not_waited_for() {
    let _clock = Clock::start();
    let swarm = narrow();
    let large = Kind {
        n_ctx: u32::MAX,
        ..KIND
    };
    let route = swarm.route();
    let plan = |avoid: &[Peer]| avoiding(&route, avoid);
    let error = swarm.opener().open_waiting(large, HOUR, plan, |_| {}).await;
    let error = error.err().unwrap();
    assert!(matches!(error, ClientError::Hop { .. }), "{error:?}");
}
