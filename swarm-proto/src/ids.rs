//! Names of peers and swarms.

use std::{fmt, str::FromStr};

/// What stands before the 32 key bytes in a libp2p peer id: identity multihash of 36 bytes, then
/// the protobuf of an ed25519 public key.
const PEER_PREFIX: [u8; 6] = [0x00, 0x24, 0x08, 0x01, 0x12, 0x20];
/// Longest swarm id.
const SWARM_ID_MAX: usize = 32;

/// A peer: its ed25519 public key; displayed and parsed as libp2p does ("12D3KooW…").
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    serde::Serialize,
    serde::Deserialize,
    bincode::Encode,
    bincode::Decode,
)]
#[serde(into = "String", try_from = "String")]
pub struct Peer(pub [u8; 32]);

/// Why a text is no peer id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a peer id; one looks like 12D3KooW…")]
pub struct PeerError {
    /// What was given, shortened.
    pub text: String,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = [0; 38];
        bytes[..6].copy_from_slice(&PEER_PREFIX);
        bytes[6..].copy_from_slice(&self.0);
        f.write_str(&bs58::encode(bytes).into_string())
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Peer({self})")
    }
}

impl FromStr for Peer {
    type Err = PeerError;

    fn from_str(text: &str) -> Result<Self, PeerError> {
        let mut bytes = [0; 38];
        let len = bs58::decode(text).onto(&mut bytes[..]).unwrap_or(0);
        let key = bytes[..len]
            .strip_prefix(&PEER_PREFIX)
            .and_then(|key| key.try_into().ok());
        key.map(Peer).ok_or_else(|| PeerError {
            text: text.chars().take(64).collect(),
        })
    }
}

impl From<Peer> for String {
    fn from(peer: Peer) -> String {
        peer.to_string()
    }
}

impl TryFrom<String> for Peer {
    type Error = PeerError;

    fn try_from(text: String) -> Result<Self, PeerError> {
        text.parse()
    }
}

/// The name of a swarm: 1 to 32 of `a-z 0-9 -`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SwarmId(String);

/// Why a text is no swarm id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a swarm id: 1 to {SWARM_ID_MAX} of a-z, 0-9 and -")]
pub struct SwarmIdError {
    /// What was given, shortened.
    pub text: String,
}

impl SwarmId {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SwarmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SwarmId {
    type Err = SwarmIdError;

    fn from_str(text: &str) -> Result<Self, SwarmIdError> {
        let fits = (1..=SWARM_ID_MAX).contains(&text.len());
        let plain = text
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        if fits && plain {
            Ok(Self(text.into()))
        } else {
            Err(SwarmIdError {
                text: text.chars().take(64).collect(),
            })
        }
    }
}
