//! Holders that were asked for a range and gave nothing while others did. They are asked again, and nobody waits for
//! them: who is merely slow loses nothing, who stalls on purpose costs one wait and not one for each shard.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use swarm_proto::Peer;

/// How long it is remembered.
const REMEMBERED: Duration = Duration::from_secs(120);
/// Peers that are remembered.
const PEERS_MAX: usize = 256;

#[derive(Default)]
pub(super) struct Silent(Mutex<HashMap<Peer, Instant>>);

impl Silent {
    pub(super) fn note(&self, peer: Peer) {
        let mut peers = self.lock();
        peers.retain(|_, at| at.elapsed() < REMEMBERED);
        if peers.len() < PEERS_MAX {
            peers.insert(peer, Instant::now());
        }
    }

    pub(super) fn spoke(&self, peer: &Peer) {
        self.lock().remove(peer);
    }

    pub(super) fn is(&self, peer: &Peer) -> bool {
        let noted = self.lock().get(peer).copied();
        noted.is_some_and(|at| at.elapsed() < REMEMBERED)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Peer, Instant>> {
        // Every change is one call: no invariant spans a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
