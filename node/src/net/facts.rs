//! What the driver knows and everybody may read: our addresses, who is connected, round trips.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use libp2p::Multiaddr;
use swarm_proto::Peer;
use tokio::sync::watch;

use super::stream::OpenError;

/// Round trips kept per peer: the minimum of them is the path, the rest is queueing.
const RTT_SAMPLES: usize = 16;

/// Strangers remembered: enough to say why nobody of ours is there.
const STRANGERS_MAX: usize = 16;

/// The facts.
pub(super) struct Facts {
    addrs: watch::Sender<Vec<Multiaddr>>,
    peers: watch::Sender<Vec<Peer>>,
    rtts: Mutex<HashMap<Peer, Vec<Duration>>>,
    strangers: Mutex<Vec<OpenError>>,
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

    pub(super) fn rtt(&self, peer: Peer, rtt: Duration) {
        let mut rtts = lock(&self.rtts);
        let samples = rtts.entry(peer).or_default();
        if samples.len() == RTT_SAMPLES {
            samples.remove(0);
        }
        samples.push(rtt);
    }

    /// The minimum round trip to each connected peer, nearest first.
    pub(super) fn rtts(&self) -> Vec<(Peer, Duration)> {
        let rtts = lock(&self.rtts);
        let least =
            |(peer, samples): (&Peer, &Vec<Duration>)| Some((*peer, *samples.iter().min()?));
        let mut least: Vec<_> = rtts.iter().filter_map(least).collect();
        least.sort_by_key(|(_, rtt)| *rtt);
        least
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
