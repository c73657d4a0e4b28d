//! When to dial the peers we were given by hand: at once, and again with growing pauses for as long
//! as we are not connected to them. Pure: time is passed in, dials are asked for.

use std::time::{Duration, Instant};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol, swarm::ConnectionId};

/// First pause after a failure: nodes of one testnet start within a second of each other.
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// Longest pause: a friend's machine that comes back is found within this.
const PAUSE_MAX: Duration = Duration::from_secs(60);

struct Entry {
    addr: Multiaddr,
    peer: Option<PeerId>,
    pause: Duration,
    state: State,
    /// The user was told that it is of no use.
    told: bool,
}

#[derive(PartialEq, Eq)]
enum State {
    Due(Instant),
    Dialling(ConnectionId),
    Connected,
    /// Answered, but is of no use to us (another swarm, not allowed): asked again at the longest
    /// pause, because such a peer may be reconfigured.
    Useless(Instant),
}

/// The list.
#[derive(Default)]
pub(super) struct Bootstrap {
    entries: Vec<Entry>,
}

impl Bootstrap {
    pub(super) fn new(addrs: impl IntoIterator<Item = Multiaddr>, now: Instant) -> Self {
        let entry = |addr: Multiaddr| Entry {
            peer: peer_in(&addr),
            addr,
            pause: PAUSE_MIN,
            state: State::Due(now),
            told: false,
        };
        Self {
            entries: addrs.into_iter().map(entry).collect(),
        }
    }

    /// When `due` has to be asked next.
    pub(super) fn next(&self) -> Option<Instant> {
        self.entries.iter().filter_map(Entry::due_at).min()
    }

    /// Addresses to dial now; the caller reports each dial's id by [`Self::dialling`].
    pub(super) fn due(&self, now: Instant) -> Vec<Multiaddr> {
        let due = |entry: &&Entry| entry.due_at().is_some_and(|at| at <= now);
        self.entries
            .iter()
            .filter(due)
            .map(|entry| entry.addr.clone())
            .collect()
    }

    pub(super) fn dialling(&mut self, addr: &Multiaddr, id: ConnectionId) {
        for entry in self.entries.iter_mut().filter(|entry| entry.addr == *addr) {
            entry.state = State::Dialling(id);
        }
    }

    pub(super) fn connected(&mut self, peer: PeerId, id: ConnectionId) {
        for entry in &mut self.entries {
            if entry.state == State::Dialling(id) {
                entry.peer = Some(peer);
            }
            if entry.peer == Some(peer) {
                entry.state = State::Connected;
            }
        }
    }

    /// The dial failed; true where the failure is a new one and worth telling the user.
    pub(super) fn failed(&mut self, id: ConnectionId, now: Instant) -> bool {
        let mut news = false;
        for entry in self
            .entries
            .iter_mut()
            .filter(|e| e.state == State::Dialling(id))
        {
            news |= entry.pause == PAUSE_MIN;
            entry.back_off(now);
        }
        news
    }

    /// The last connection to `peer` ended.
    pub(super) fn disconnected(&mut self, peer: PeerId, now: Instant) {
        for entry in self.entries.iter_mut().filter(|e| e.peer == Some(peer)) {
            if entry.state == State::Connected {
                entry.pause = PAUSE_MIN;
                entry.back_off(now);
            }
        }
    }

    /// The peer answered and is not one of us; true where the user gave it and has not been told.
    pub(super) fn useless(&mut self, peer: PeerId, now: Instant) -> bool {
        let mut news = false;
        for entry in self.entries.iter_mut().filter(|e| e.peer == Some(peer)) {
            entry.state = State::Useless(now + PAUSE_MAX);
            news |= !std::mem::replace(&mut entry.told, true);
        }
        news
    }
}

impl Entry {
    fn due_at(&self) -> Option<Instant> {
        match self.state {
            State::Due(at) | State::Useless(at) => Some(at),
            State::Dialling(_) | State::Connected => None,
        }
    }

    fn back_off(&mut self, now: Instant) {
        self.state = State::Due(now + self.pause);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }
}

/// The peer an address names, if it does.
pub(super) fn peer_in(addr: &Multiaddr) -> Option<PeerId> {
    match addr.iter().last() {
        Some(Protocol::P2p(peer)) => Some(peer),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(now: Instant) -> (Bootstrap, Multiaddr) {
        let addr: Multiaddr = "/ip4/127.0.0.1/tcp/1".parse().expect("addr");
        (Bootstrap::new([addr.clone()], now), addr)
    }

    #[test]
    fn failures_are_retried_with_growing_pauses_up_to_a_minute() {
        let mut now = Instant::now();
        let (mut list, addr) = one(now);
        let mut pauses = Vec::new();
        for n in 0..12 {
            assert_eq!(list.due(now), std::slice::from_ref(&addr));
            let id = ConnectionId::new_unchecked(n);
            list.dialling(&addr, id);
            assert!(list.due(now).is_empty(), "no second dial beside the first");
            assert_eq!(list.failed(id, now), n == 0, "told once");
            let next = list.next().expect("retried");
            pauses.push(next - now);
            now = next;
        }
        assert_eq!(pauses[0], PAUSE_MIN);
        assert_eq!(pauses[11], PAUSE_MAX);
        assert!(pauses.windows(2).all(|w| w[0] <= w[1]));
    }

    #[test]
    fn a_lost_peer_is_dialled_again_soon_and_a_stranger_late() {
        let now = Instant::now();
        let (mut list, addr) = one(now);
        let (id, peer) = (ConnectionId::new_unchecked(1), PeerId::random());
        list.dialling(&addr, id);
        list.connected(peer, id);
        assert_eq!(list.next(), None);
        list.disconnected(peer, now);
        assert_eq!(list.next(), Some(now + PAUSE_MIN));
        list.connected(peer, id);
        assert!(list.useless(peer, now));
        assert!(!list.useless(peer, now), "told once");
        assert!(!list.useless(PeerId::random(), now), "nobody asked for it");
        list.disconnected(peer, now);
        assert_eq!(list.next(), Some(now + PAUSE_MAX));
    }
}
