//! Draws that every node makes alike: hashes of ids.

use swarm_proto::Peer;

/// A number drawn for a peer and a matter; where many peers draw, all differ.
pub(super) fn draw(what: &str, peer: Peer, number: u64) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key("shoal placement draw 1");
    hasher.update(&peer.0);
    hasher.update(&number.to_le_bytes());
    hasher.update(what.as_bytes());
    let mut out = [0; 8];
    hasher.finalize_xof().fill(&mut out);
    u64::from_le_bytes(out)
}
