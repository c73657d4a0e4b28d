//! Whom to ask for a snapshot of the adverts: the first few peers we meet, others where these fail, and
//! again after having been alone. Pure: time is passed in, requests are asked for.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use swarm_proto::Peer;

/// Snapshots taken: one would do, unless it came from somebody who has just started.
const WANTED: usize = 3;
/// A peer that gave none is asked again after this.
const RETRY: Duration = Duration::from_secs(30);

enum State {
    Fresh,
    Asked,
    Given,
    Failed(Instant),
}

/// The connected peers that serve snapshots, and what came of asking them.
pub(super) struct Snapshots {
    peers: HashMap<Peer, State>,
    /// Taken since we were last alone.
    taken: usize,
    /// Nobody has been connected since then.
    alone: Option<Instant>,
    /// After being alone for so long all that was known has expired.
    forgotten: Duration,
}

impl Snapshots {
    pub(super) fn new(forgotten: Duration) -> Self {
        Self {
            peers: HashMap::new(),
            taken: 0,
            alone: None,
            forgotten,
        }
    }

    pub(super) fn connected(&mut self, peer: Peer, now: Instant) {
        if self
            .alone
            .take()
            .is_some_and(|at| now >= at + self.forgotten)
        {
            self.taken = 0;
        }
        self.peers.entry(peer).or_insert(State::Fresh);
    }

    /// A peer that leaves while it is asked gives its turn back.
    pub(super) fn disconnected(&mut self, peer: &Peer, now: Instant) {
        if self.peers.remove(peer).is_some() && self.peers.is_empty() {
            self.alone = Some(now);
        }
    }

    pub(super) fn answered(&mut self, peer: &Peer, given: bool, now: Instant) {
        self.taken += usize::from(given);
        if let Some(state) = self.peers.get_mut(peer) {
            *state = match given {
                true => State::Given,
                false => State::Failed(now),
            };
        }
    }

    /// Whom to ask now; ask each of them.
    pub(super) fn next(&mut self, now: Instant) -> Vec<Peer> {
        let asked = |state: &&State| matches!(state, State::Asked);
        let under_way = self.peers.values().filter(asked).count();
        let open = WANTED.saturating_sub(self.taken + under_way);
        let due = |state: &State| match state {
            State::Fresh => true,
            State::Failed(at) => now >= *at + RETRY,
            State::Asked | State::Given => false,
        };
        let due = self.peers.iter_mut().filter(|(_, state)| due(state));
        let ask = due.take(open).map(|(peer, state)| {
            *state = State::Asked;
            *peer
        });
        ask.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORGOTTEN: Duration = Duration::from_secs(40);

    fn peer(n: u8) -> Peer {
        Peer([n; 32])
    }

    /// Snapshots with peers 1 to 4 connected, of which three are asked.
    fn asking(now: Instant) -> (Snapshots, Vec<Peer>) {
        let mut snapshots = Snapshots::new(FORGOTTEN);
        (1..5).for_each(|n| snapshots.connected(peer(n), now));
        let asked = snapshots.next(now);
        assert_eq!((asked.len(), snapshots.next(now).len()), (WANTED, 0));
        (snapshots, asked)
    }

    #[test]
    fn a_failure_and_a_peer_that_leaves_give_their_turn_to_another() {
        let now = Instant::now();
        let (mut snapshots, asked) = asking(now);
        snapshots.answered(&asked[0], false, now);
        let other = snapshots.next(now);
        assert!(other.len() == 1 && !asked.contains(&other[0]));
        snapshots.disconnected(&asked[1], now);
        assert!(snapshots.next(now).is_empty(), "nobody is left to ask yet");
        snapshots.connected(peer(9), now);
        assert_eq!(snapshots.next(now), [peer(9)]);
        for given in [asked[2], other[0], peer(9)] {
            snapshots.answered(&given, true, now);
        }
        assert!(snapshots.next(now + RETRY).is_empty(), "enough");
    }

    #[test]
    fn who_failed_is_asked_again_later() {
        let now = Instant::now();
        let (mut snapshots, asked) = asking(now);
        for peer in &asked {
            snapshots.answered(peer, false, now);
        }
        assert_eq!(snapshots.next(now).len(), 1, "the fourth");
        let mut again = snapshots.next(now + RETRY);
        assert_eq!(again.len(), WANTED - 1);
        again.retain(|peer| !asked.contains(peer));
        assert!(again.is_empty());
    }

    #[test]
    fn after_being_alone_for_long_peers_are_asked_again() {
        let start = Instant::now();
        for (away, again) in [(FORGOTTEN / 2, 0), (FORGOTTEN, 1)] {
            let (mut snapshots, asked) = asking(start);
            for peer in &asked {
                snapshots.answered(peer, true, start);
            }
            (1..5).for_each(|n| snapshots.disconnected(&peer(n), start));
            snapshots.connected(peer(1), start + away);
            assert_eq!(snapshots.next(start + away).len(), again, "{away:?}");
        }
    }
}
