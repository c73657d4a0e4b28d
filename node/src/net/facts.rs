//! What the driver knows and everybody may read: our addresses, who is connected, round trips.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use libp2p::Multiaddr;
use swarm_proto::Peer;
use tokio::{sync::watch, time::Instant};

use super::stream::OpenError;

/// How long a round trip counts: the minimum of those within it is the path, the rest is queueing. Long
/// enough for a moment without load, short enough that another path shows.
const RTT_WINDOW: Duration = Duration::from_secs(160);
/// Of so long the least is kept: who opens many streams does not push out what was seen before.
const RTT_SLOT: Duration = Duration::from_secs(10);
/// Round trips without which there is no figure. The first comes while a connection is being set up, when
/// both ends have most to do: it would make a peer look farther than it is.
const RTTS_MIN: usize = 2;

/// Strangers remembered: enough to say why nobody of ours is there.
const STRANGERS_MAX: usize = 16;

/// The facts.
pub(super) struct Facts {
    addrs: watch::Sender<Vec<Multiaddr>>,
    peers: watch::Sender<Vec<Peer>>,
    rtts: Mutex<HashMap<Peer, VecDeque<Slot>>>,
    strangers: Mutex<Vec<OpenError>>,
}

/// Round trips of some seconds.
#[derive(Debug)]
struct Slot {
    begun: Instant,
    least: Duration,
    count: usize,
}

impl Facts {
    pub(super) fn new() -> Self {
        Self {
            addrs: watch::Sender::new(Vec::new()),
            peers: watch::Sender::new(Vec::new()),
            rtts: Mutex::default(),
            strangers: Mutex::default(),
        }
    }

    pub(super) fn listening(&self, new: Option<Multiaddr>, gone: Option<Multiaddr>) {
        self.addrs.send_modify(|addrs| {
            addrs.retain(|addr| Some(addr) != gone.as_ref() && Some(addr) != new.as_ref());
            addrs.extend(new);
        });
    }

    pub(super) fn connected(&self, peer: Peer) {
        self.peers.send_if_modified(|peers| {
            let new = !peers.contains(&peer);
            if new {
                peers.push(peer);
            }
            new
        });
    }

    pub(super) fn disconnected(&self, peer: &Peer) {
        self.peers.send_modify(|peers| peers.retain(|p| p != peer));
        lock(&self.rtts).remove(peer);
    }

    /// A ping took so long, or a word and its answer: the way there and back is no longer than that.
    pub(super) fn rtt(&self, peer: Peer, rtt: Duration) {
        let now = Instant::now();
        let mut rtts = lock(&self.rtts);
        let slots = rtts.entry(peer).or_default();
        match slots.back_mut().filter(|slot| now < slot.begun + RTT_SLOT) {
            Some(slot) => {
                slot.least = slot.least.min(rtt);
                slot.count += 1;
            }
            None => {
                slots.retain(|slot| now < slot.begun + RTT_WINDOW);
                slots.push_back(Slot {
                    begun: now,
                    least: rtt,
                    count: 1,
                });
            }
        }
    }

    /// The minimum round trip to each connected peer to which more than one was measured, nearest first.
    /// How much of it is the way there, nobody can measure who does not share a clock: half is assumed.
    pub(super) fn rtts(&self) -> Vec<(Peer, Duration)> {
        let rtts = lock(&self.rtts);
        let enough = rtts.iter().filter(|(_, slots)| {
            let count: usize = slots.iter().map(|slot| slot.count).sum();
            count >= RTTS_MIN
        });
        let least = enough.filter_map(|(peer, slots)| {
            let least = slots.iter().map(|slot| slot.least).min();
            Some((*peer, least?))
        });
        let mut least: Vec<_> = least.collect();
        least.sort_by_key(|(peer, rtt)| (*rtt, *peer));
        least
    }

    /// Whether a peer of our swarm is connected and has said who it is.
    pub(super) fn is_connected(&self, peer: &Peer) -> bool {
        self.peers.borrow().contains(peer)
    }

    /// A peer answered that is none of us.
    pub(super) fn stranger(&self, why: OpenError) {
        let mut strangers = lock(&self.strangers);
        if strangers.len() < STRANGERS_MAX {
            strangers.push(why);
        }
    }

    /// Why peers that answered are none of us, the first first.
    pub(super) fn strangers(&self) -> Vec<OpenError> {
        lock(&self.strangers).clone()
    }

    pub(super) fn addrs(&self) -> watch::Receiver<Vec<Multiaddr>> {
        self.addrs.subscribe()
    }

    /// Peers of our swarm that are connected and have said who they are.
    pub(super) fn peers(&self) -> watch::Receiver<Vec<Peer>> {
        self.peers.subscribe()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is one call: no invariant spans a panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[tokio::test(start_paused = true)]
    async fn the_least_round_trip_of_a_window_counts_and_one_alone_does_not() {
        let (facts, peer) = (Facts::new(), Peer([1; 32]));
        facts.rtt(peer, 40 * MS);
        assert!(facts.rtts().is_empty(), "measured while connecting");
        facts.rtt(peer, 2 * MS);
        assert_eq!(facts.rtts(), [(peer, 2 * MS)]);
        // Whoever measures a lot under load forgets nothing by it.
        for _ in 0..1000 {
            facts.rtt(peer, 90 * MS);
        }
        assert_eq!(facts.rtts(), [(peer, 2 * MS)]);
        // A longer path shows when the window is over.
        for _ in 0..20 {
            tokio::time::advance(RTT_SLOT).await;
            facts.rtt(peer, 7 * MS);
        }
        assert_eq!(facts.rtts(), [(peer, 7 * MS)]);
        let nearer = Peer([2; 32]);
        facts.rtt(nearer, MS);
        facts.rtt(nearer, MS);
        assert_eq!(facts.rtts(), [(nearer, MS), (peer, 7 * MS)]);
        facts.disconnected(&nearer);
        assert_eq!(facts.rtts().len(), 1);
    }
}
