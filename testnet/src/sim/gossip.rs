//! Adverts on their way to the clients: late, sometimes lost, never signed. The table they end in is the
//! product's. (Nodes have no table here: sessions do not look at one.)

use std::sync::{Arc, Mutex};
use std::time::Duration;

use node::View;
use shard_registry::{AdvertTable, Snapshot};
use swarm_proto::{Advert, Peer, SignedAdvert, SwarmId};
use tokio::sync::watch;
use tokio::time::sleep;

use super::dice::Dice;
use super::log::{Log, lock};
use super::network::Network;
use super::peer::Node;

/// How often a node says that it is there, and expired adverts are swept out: as the product does.
const PUBLISH: Duration = Duration::from_secs(10);
const SWEEP: Duration = Duration::from_secs(5);
/// Of a hundred adverts so many are lost.
const LOST_OF_100: usize = 8;
/// The clock that all share, in ms since 1970, when a run begins.
const EPOCH_MS: u64 = 1_800_000_000_000;

/// What one client knows.
pub(super) struct Known {
    pub(super) number: usize,
    log: Arc<Log>,
    network: Arc<Network>,
    table: Mutex<AdvertTable>,
    version: watch::Sender<u64>,
    /// Nothing comes in.
    deaf: watch::Sender<bool>,
    /// Nodes that it measured its round trip to.
    near: Vec<usize>,
}

impl Known {
    pub(super) fn new(
        number: usize,
        swarm: SwarmId,
        log: Arc<Log>,
        network: Arc<Network>,
        near: Vec<usize>,
    ) -> Arc<Self> {
        Arc::new(Self {
            number,
            log,
            network,
            table: Mutex::new(AdvertTable::new(swarm)),
            version: watch::Sender::new(0),
            deaf: watch::Sender::new(false),
            near,
        })
    }

    /// Takes an advert in.
    pub(super) fn hear(&self, advert: Advert) {
        let signed = SignedAdvert {
            bytes: Vec::new(),
            signature: [0; 64],
        };
        let now = now_ms(&self.log);
        lock(&self.table).insert_verified(advert, signed, now);
        self.version.send_modify(|version| *version += 1);
    }

    /// Whether it hears nothing of what others say.
    pub(super) fn set_deaf(&self, deaf: bool) {
        self.deaf.send_replace(deaf);
    }

    /// Whether it believes that this peer is there.
    pub(super) fn knows(&self, peer: &Peer) -> bool {
        lock(&self.table).get(peer, now_ms(&self.log)).is_some()
    }

    fn sweep(&self) {
        if !lock(&self.table).expire(now_ms(&self.log)).is_empty() {
            self.version.send_modify(|version| *version += 1);
        }
    }
}

impl View for Known {
    fn adverts(&self) -> Snapshot {
        lock(&self.table).snapshot(now_ms(&self.log))
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    fn rtts(&self) -> Vec<(Peer, Duration)> {
        let both = |node: usize| {
            self.network.delay(self.number, node) + self.network.delay(node, self.number)
        };
        let near = self.near.iter();
        near.map(|node| (self.network.peer(*node), both(*node)))
            .collect()
    }

    /// In this swarm peers that are gone are found out by asking them.
    fn unreachable(&self) -> Vec<Peer> {
        Vec::new()
    }

    fn look_for(&self, _: Peer) {}
}

/// Lets a node say every ten seconds that it is there, to all clients.
pub(super) async fn publish(
    node: Arc<Node>,
    clients: Vec<Arc<Known>>,
    network: Arc<Network>,
    log: Arc<Log>,
    dice: Dice,
) {
    // Those who are there from the beginning gave the clients a snapshot.
    if let Some(advert) = node.advert(now_ms(&log)) {
        clients
            .iter()
            .filter(|_| !dice.percent(LOST_OF_100))
            .for_each(|client| client.hear(advert.clone()));
    }
    sleep(dice.millis(0, PUBLISH.as_millis() as u64)).await;
    loop {
        if let Some(advert) = node.advert(now_ms(&log)) {
            let mut to: Vec<_> = clients
                .iter()
                .filter(|_| !dice.percent(LOST_OF_100))
                .map(|client| (dice.millis(20, 2000), client.clone()))
                .collect();
            to.sort_by_key(|(delay, client)| (*delay, client.number));
            let (network, number) = (network.clone(), node.number);
            tokio::spawn(async move {
                let mut passed = Duration::ZERO;
                for (delay, client) in to {
                    sleep(delay - passed).await;
                    passed = delay;
                    if !network.blocked(number, client.number) && !*client.deaf.borrow() {
                        client.hear(advert.clone());
                    }
                }
            });
        }
        sleep(PUBLISH).await;
    }
}

/// Lets every client forget whom it did not hear of for long.
pub(super) async fn sweep(clients: Vec<Arc<Known>>) {
    loop {
        sleep(SWEEP).await;
        clients.iter().for_each(|client| client.sweep());
    }
}

fn now_ms(log: &Log) -> u64 {
    EPOCH_MS + log.elapsed().as_millis() as u64
}
