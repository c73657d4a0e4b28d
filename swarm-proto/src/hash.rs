//! Names that are hashes: of a model's manifest, of a shard's bytes. Written as 64 hex digits.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A BLAKE3 hash.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    bincode::Encode,
    bincode::Decode,
)]
#[serde(into = "String", try_from = "String")]
pub struct Hash(pub [u8; 32]);

/// Why a text is no hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a hash of 64 hex digits")]
pub struct HashError {
    /// What was given, shortened.
    pub text: String,
}

impl Hash {
    /// The plain hash of `bytes`: how shards are named.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for Hash {
    type Err = HashError;

    fn from_str(text: &str) -> Result<Self, HashError> {
        let wrong = || HashError {
            text: text.chars().take(80).collect(),
        };
        let digits: &[u8; 64] = text.as_bytes().try_into().map_err(|_| wrong())?;
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let (high, low) = (hex_digit(pair[0]), hex_digit(pair[1]));
            *byte = (high.ok_or_else(wrong)? << 4) | low.ok_or_else(wrong)?;
        }
        Ok(Self(bytes))
    }
}

fn hex_digit(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|d| d.try_into().ok())
}

impl From<Hash> for String {
    fn from(hash: Hash) -> String {
        hash.to_string()
    }
}

impl TryFrom<String> for Hash {
    type Error = HashError;

    fn try_from(text: String) -> Result<Self, HashError> {
        text.parse()
    }
}

macro_rules! hash_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
            bincode::Encode, bincode::Decode,
        )]
        #[serde(transparent)]
        pub struct $name(pub Hash);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = HashError;

            fn from_str(text: &str) -> Result<Self, HashError> {
                text.parse().map(Self)
            }
        }
    };
}

hash_id! {
    /// A model: the hash of its manifest's canonical encoding.
    ModelId
}
hash_id! {
    /// A shard: the hash of its bytes.
    ShardId
}

impl ShardId {
    /// The name of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Hash::of(bytes))
    }
}

/// Shorter beginnings of an id are words, not ids.
const PREFIX_LEN_MIN: usize = 6;

impl ModelId {
    /// Whether `text` names this model by the beginning of its id: six digits and more, in either case.
    pub fn begins_with(&self, text: &str) -> bool {
        text.len() >= PREFIX_LEN_MIN && self.to_string().starts_with(&text.to_ascii_lowercase())
    }

    /// The first twelve hex digits: enough for people, and for `resolve`.
    pub fn short(&self) -> String {
        self.0.0[..6]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}
