//! Peers that this home has met, for the day when those given by hand do not answer: one small file
//! for each swarm. Nothing in it is believed but that an address may be worth a dial: who answers
//! there is settled by the handshake, whether it may be talked to by the access list.
//!
//! ```text
//! $home/known-peers/<swarm>.json   {"version": 1, "peers": [{"peer", "addrs", "seen_s"}, …]}
//! ```

use std::{fs, io, path::Path, time::Duration};

use serde::{Deserialize, Serialize};
use swarm_proto::{
    Peer, SwarmId,
    ticket::{TICKET_ADDR_BYTES_MAX, TICKET_ADDRS_MAX},
};

use crate::{
    net::{Net, now_ms},
    swarm_file::SwarmFile,
};

/// Folder in the home directory.
const FOLDER: &str = "known-peers";
/// Peers kept, those met last: as many as a ticket has addresses.
const PEERS_MAX: usize = TICKET_ADDRS_MAX;
/// Addresses of one peer: its best on a LAN, for both transports and both kinds of IP.
const ADDRS_PER_PEER: usize = 4;
/// The most that this much can come to, and some room.
const FILE_BYTES_MAX: u64 = 64 * 1024;
/// A peer that was not met for a month has moved or gone.
const FORGET_AFTER_S: u64 = 30 * 24 * 3600;
/// Peers given by hand have this long to answer first.
const GIVEN_FIRST: Duration = Duration::from_secs(2);
/// How often a node writes down whom it is connected to.
const REFRESH: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    peer: Peer,
    addrs: Vec<String>,
    /// Seconds since 1970.
    seen_s: u64,
}

/// The peers that one home has met in one swarm.
#[derive(Debug, Clone)]
pub struct KnownPeers {
    file: SwarmFile,
}

impl KnownPeers {
    /// Those of `swarm`; nothing is read yet.
    pub fn new(home: &Path, swarm: &SwarmId) -> Self {
        Self {
            file: SwarmFile::new(home, FOLDER, swarm, FILE_BYTES_MAX),
        }
    }

    /// Their addresses, each with the peer it must be, those met last first. What cannot be read is as
    /// good as nothing.
    pub fn addrs(&self) -> Vec<String> {
        let peers = self.read(now_s()).into_iter();
        peers
            .flat_map(|known| {
                let named = move |addr: String| format!("{addr}/p2p/{}", known.peer);
                known.addrs.into_iter().map(named)
            })
            .collect()
    }

    /// Writes down whom `net` is connected to and where they say they listen; clients listen nowhere.
    ///
    /// # Errors
    /// The home cannot be written.
    pub fn remember(&self, net: &Net) -> io::Result<()> {
        let peers = net.peers().borrow().clone().into_iter();
        let met = peers.map(|peer| (peer, net.adverts().addrs(&peer)));
        self.add(met.collect(), now_s())
    }

    /// Dials them where nobody given by hand (`given`) hands over adverts soon.
    ///
    /// # Cancel safety
    /// Dials that have begun go on.
    pub async fn fall_back(&self, net: &Net, given: bool) {
        let addrs = self.addrs();
        if addrs.is_empty() || given && net.synced(GIVEN_FIRST).await {
            return;
        }
        tracing::debug!(addresses = addrs.len(), "dialling peers met before");
        for addr in addrs {
            if let Err(error) = net.dial(&addr).await {
                tracing::debug!(%error, "an address that was remembered is none");
            }
        }
    }

    /// Keeps the file fresh while a node runs.
    pub async fn keep(self, net: Net) {
        loop {
            tokio::time::sleep(REFRESH).await;
            if let Err(error) = self.remember(&net) {
                tracing::debug!(%error, "peers are not remembered");
            }
        }
    }

    fn add(&self, mut met: Vec<(Peer, Vec<String>)>, now_s: u64) -> io::Result<()> {
        met.retain(|(_, addrs)| !addrs.is_empty());
        if met.is_empty() {
            return Ok(());
        }
        let mut peers = self.read(now_s);
        peers.retain(|known| met.iter().all(|(peer, _)| known.peer != *peer));
        let fresh = met.into_iter().map(|(peer, addrs)| Known {
            peer,
            addrs,
            seen_s: now_s,
        });
        let mut peers: Vec<Known> = fresh.chain(peers).collect();
        peers.iter_mut().for_each(bound);
        peers.truncate(PEERS_MAX);
        self.file.write(peers)
    }

    fn read(&self, now_s: u64) -> Vec<Known> {
        let mut peers: Vec<Known> = self.file.read();
        peers.retain(|known| now_s.saturating_sub(known.seen_s) < FORGET_AFTER_S);
        peers.truncate(PEERS_MAX);
        peers.iter_mut().for_each(bound);
        peers
    }
}

/// As many addresses as are dialled, none of them endless.
fn bound(known: &mut Known) {
    known
        .addrs
        .retain(|addr| addr.len() <= TICKET_ADDR_BYTES_MAX);
    known.addrs.truncate(ADDRS_PER_PEER);
}

/// The swarms of which a home knows peers, and how many.
pub fn swarms(home: &Path) -> Vec<(SwarmId, usize)> {
    let entries = fs::read_dir(home.join(FOLDER)).into_iter().flatten();
    let swarm = |entry: fs::DirEntry| -> Option<SwarmId> {
        let name = entry.file_name();
        name.to_str()?.strip_suffix(".json")?.parse().ok()
    };
    let mut swarms: Vec<_> = entries
        .filter_map(|entry| swarm(entry.ok()?))
        .map(|swarm| {
            let count = KnownPeers::new(home, &swarm).read(now_s()).len();
            (swarm, count)
        })
        .filter(|(_, count)| *count > 0)
        .collect();
    swarms.sort();
    swarms
}

fn now_s() -> u64 {
    now_ms() / 1000
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::swarm_file::SWARMS_MAX;

    fn peer(n: u8) -> Peer {
        Peer([n; 32])
    }

    fn one_of(home: &Path, swarm: &str) -> KnownPeers {
        KnownPeers::new(home, &swarm.parse().expect("swarm id"))
    }

    fn met(n: u8) -> (Peer, Vec<String>) {
        (peer(n), vec![format!("/ip4/10.0.0.{n}/tcp/1")])
    }

    #[test]
    fn peers_are_kept_by_swarm_the_last_first_and_forgotten_after_a_month() {
        let home = tempfile::tempdir().expect("temp dir");
        let known = one_of(home.path(), "a");
        assert!(known.addrs().is_empty());
        let now = now_s();
        known
            .add(
                vec![met(1), (peer(9), Vec::new())],
                now - FORGET_AFTER_S / 2,
            )
            .expect("writes");
        known.add(vec![met(2)], now).expect("writes");
        let addr = |n| format!("/ip4/10.0.0.{n}/tcp/1/p2p/{}", peer(n));
        assert_eq!(known.addrs(), [addr(2), addr(1)]);
        assert!(one_of(home.path(), "b").addrs().is_empty());
        assert_eq!(swarms(home.path()), [("a".parse().expect("swarm id"), 2)]);
        let later = known.read(now + FORGET_AFTER_S / 2 + 1);
        assert_eq!(later.iter().map(|k| k.peer).collect::<Vec<_>>(), [peer(2)]);
        known.add(vec![met(1)], now).expect("writes");
        assert_eq!(known.addrs(), [addr(1), addr(2)], "once, and first");
    }

    #[test]
    fn swarms_do_not_pile_up() {
        let home = tempfile::tempdir().expect("temp dir");
        for n in 0..SWARMS_MAX + 3 {
            let known = one_of(home.path(), &format!("test-{n}"));
            known.add(vec![met(1)], now_s()).expect("writes");
            assert!(!known.addrs().is_empty(), "the latest stays");
        }
        assert_eq!(swarms(home.path()).len(), SWARMS_MAX);
    }

    #[test]
    fn the_file_is_bounded_and_what_is_wrong_in_it_counts_as_nothing() {
        let home = tempfile::tempdir().expect("temp dir");
        let known = one_of(home.path(), "a");
        let many = (0..100).map(|n| (peer(n), vec!["/ip4/10.0.0.1/tcp/1".into(); 50]));
        known.add(many.collect(), now_s()).expect("writes");
        assert_eq!(known.addrs().len(), PEERS_MAX * ADDRS_PER_PEER);
        known
            .add(vec![(peer(1), vec!["x".repeat(10_000)])], now_s())
            .expect("writes");
        assert!(known.addrs().iter().all(|addr| addr.len() < 400));
        let good = fs::read_to_string(known.file.path()).expect("reads");
        let newer = good.replace("\"version\": 1", "\"version\": 2");
        let long = format!("{good}{}", " ".repeat(1 << 20));
        let endless = format!("{{\"version\": 1, \"peers\": [{}", "[".repeat(1 << 20));
        for wrong in [
            "",
            "{}",
            "[1]",
            "\u{0}",
            &good[..good.len() / 2],
            &newer,
            &endless,
        ] {
            fs::write(known.file.path(), wrong).expect("writes");
            assert!(known.addrs().is_empty(), "{wrong:.40}");
        }
        // Only the beginning is read.
        fs::write(known.file.path(), long).expect("writes");
        assert_eq!(known.read(now_s()).len(), PEERS_MAX);
    }
}
