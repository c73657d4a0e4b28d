//! A hop that comes back to a session which was written anew without it.

use super::swarm::*;

#[tokio::test(start_paused = true)]
async fn who_missed_what_was_written_anew_begins_anew() {
    let _clock = Clock::start();
    let mut swarm = Swarm::new(&[0, 4, 9, 12]);
    let stand_in = swarm.stand_in(50, 4..9);
    let route = swarm.route()[..3].to_vec();
    let mut around = route.clone();
    around[1] = stand_in;
    let mut session = swarm.open_route(3).await;
    let mut all = Vec::new();
    decode(&mut session, &mut all, &prompt(40, 1), 5).await;
    swarm.opener().reopen(&mut session, around).await.unwrap();
    session.truncate(20).unwrap();
    all.truncate(20);
    decode(&mut session, &mut all, &prompt(30, 2), 5).await;
    // Hop 1 still holds the first 45 positions as they were, 25 of which are others now.
    swarm.opener().reopen(&mut session, route).await.unwrap();
    decode(&mut session, &mut all, &prompt(3, 3), 5).await;
    session.close().await;
}
