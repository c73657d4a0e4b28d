//! Sessions that a node gives up in good order: they go on elsewhere, and nobody is blamed.

use swarm_proto::FailureCode;

use super::{
    lost::{computed, decode_over},
    swarm::*,
};
use crate::session::ClientError;

#[tokio::test(start_paused = true)]
async fn a_session_on_layers_that_leave_goes_on_elsewhere_and_the_others_compute_nothing_again() {
    let _clock = Clock::start();
    for leaving in 0..3 {
        let mut swarm = Swarm::new(&[0, 4, 9, 12]);
        let layers = swarm.nodes[leaving].layers.clone();
        let stand_in = swarm.stand_in(50, layers.clone());
        let mut session = swarm.open_route(3).await;
        let mut all = prompt(70, 1);
        session.feed(&all.clone(), TOP1).await.unwrap();
        decode_over(&swarm, &mut session, &mut all, 5, &mut Vec::new()).await;
        let sessions = &swarm.nodes[leaving].sessions;
        assert_eq!(sessions.hand_over(&MODEL, |_| false), 0);
        let before = computed(&swarm);
        assert_eq!(
            sessions.hand_over(&MODEL, |span| u32::from(span.start) == layers.start),
            1
        );
        let lost = loop {
            match session.next_logits().await {
                Ok(row) => {
                    let next = row.argmax().unwrap();
                    all.push(next);
                    let _ = session.feed(&[next], TOP1).await;
                }
                Err(error) => break error,
            }
        };
        let ClientError::Hop { failure, .. } = &lost else {
            panic!("{lost}")
        };
        assert_eq!(failure.code, FailureCode::HandedOver, "{lost}");
        assert_eq!(usize::from(failure.at), leaving, "{lost}");
        let mut route = swarm.route()[..3].to_vec();
        route[leaving] = stand_in;
        let mut routes = vec![route.into()];
        decode_over(&swarm, &mut session, &mut all, 9, &mut routes).await;
        assert!(routes.is_empty(), "hop {leaving} still serves it");
        let after = computed(&swarm);
        for at in (0..3).filter(|at| *at != leaving) {
            let more = after[at] - before[at];
            assert!(
                more <= 24,
                "hop {at} computed {more} rows when {leaving} left"
            );
        }
        session.close().await;
        swarm.assert_empty().await;
    }
}
