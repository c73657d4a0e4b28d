//! Finds peers in a list by their keys, which are as good as random: their first bits choose a bucket.

use swarm_proto::Peer;

/// Where each peer of a list is.
pub(super) struct Index {
    /// The beginning of each key and where it is in the list, sorted.
    keys: Vec<(u64, usize)>,
    peers: Vec<Peer>,
    /// Where each bucket begins in `keys`; one more for the end.
    buckets: Vec<usize>,
    /// Bits of a beginning that do not choose the bucket.
    shift: u32,
}

impl Index {
    pub(super) fn of<'p>(peers: impl Iterator<Item = &'p Peer>) -> Self {
        let peers: Vec<Peer> = peers.copied().collect();
        let mut keys: Vec<(u64, usize)> = peers.iter().map(beginning).zip(0..).collect();
        keys.sort_unstable();
        let bits = keys.len().max(2).next_power_of_two().trailing_zeros();
        let shift = u64::BITS - bits;
        let mut buckets = vec![0; (1 << bits) + 1];
        for (key, _) in &keys {
            buckets[(key >> shift) as usize + 1] += 1;
        }
        for at in 1..buckets.len() {
            buckets[at] += buckets[at - 1];
        }
        Self {
            keys,
            peers,
            buckets,
            shift,
        }
    }

    /// Where a peer is first in the list.
    pub(super) fn find(&self, peer: &Peer) -> Option<usize> {
        let key = beginning(peer);
        let bucket = (key >> self.shift) as usize;
        let keys = &self.keys[self.buckets[bucket]..self.buckets[bucket + 1]];
        // Halving: keys that somebody made to share a bucket cost little more.
        let from = keys.partition_point(|(other, _)| *other < key);
        let alike = keys[from..].iter().take_while(|(other, _)| *other == key);
        let mut at = alike.map(|(_, at)| *at);
        at.find(|at| self.peers[*at] == *peer)
    }
}

fn beginning(peer: &Peer) -> u64 {
    peer.0
        .first_chunk()
        .map_or(0, |key| u64::from_be_bytes(*key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_peer_is_found_where_it_is_and_nobody_else() {
        let peer = |n: u16, last: u8| {
            let mut key = [0; 32];
            key[..2].copy_from_slice(&n.wrapping_mul(40_503).to_be_bytes());
            key[31] = last;
            Peer(key)
        };
        for count in [0, 1, 2, 3, 300] {
            // Of each beginning two keys, and the first of them twice.
            let of = |n| [peer(n, 0), peer(n, 1), peer(n, 0)];
            let peers: Vec<Peer> = (0..count).flat_map(of).collect();
            let index = Index::of(peers.iter());
            for (at, peer) in peers.iter().enumerate() {
                let first = if at % 3 == 2 { at - 2 } else { at };
                assert_eq!(index.find(peer), Some(first));
            }
            assert_eq!(index.find(&peer(0, 2)), None);
            assert_eq!(index.find(&Peer([0xff; 32])), None);
        }
    }
}
