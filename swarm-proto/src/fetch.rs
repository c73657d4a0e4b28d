//! The fetch stream: one request, one reply. Everything comes back as bytes, so that the same
//! reader serves a snapshot of the adverts, a manifest and a shard.
//!
//! ```text
//! ──Fetch──▶   ◀── Found::Bytes { len } ◀── Found::Chunk + payload ≤ 1 MiB ◀── …   until len
//! ```

use bincode::{Decode, Encode};

use crate::{
    CodecError, ModelId, ShardId, SignedAdvert,
    advert::ADVERT_BYTES_MAX,
    codec::{CheckError, Message, at_most},
};

/// Largest payload of one chunk.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;
/// Largest reply: this version serves metadata shards, not weights.
pub const FETCH_BYTES_MAX: u64 = 64 << 20;
/// Most adverts in a snapshot.
pub const SNAPSHOT_ADVERTS_MAX: usize = 4096;
/// Largest snapshot.
pub const SNAPSHOT_BYTES_MAX: usize = 16 << 20;
/// Largest header of a fetch stream.
pub const FETCH_HEADER_MAX: usize = 1024;

const SIGNATURE_LEN: usize = 64;

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Fetch {
    /// The adverts known, as [`encode_snapshot`] writes them.
    Snapshot,
    /// A manifest, in its canonical encoding.
    Manifest(ModelId),
    /// A metadata shard.
    Shard(ShardId),
}

impl Message for Fetch {
    const NAME: &'static str = "fetch request";
    const BYTES_MAX: usize = 64;
}

/// A reply.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Found {
    /// It is here; so many bytes follow in chunks.
    Bytes {
        /// Their number, at most [`FETCH_BYTES_MAX`].
        len: u64,
    },
    /// Some of the bytes, as the payload.
    Chunk,
    /// It is not here.
    Missing,
    /// It is here, and cannot be given.
    Failed(String),
}

impl Message for Found {
    const NAME: &'static str = "fetch reply";
    const BYTES_MAX: usize = FETCH_HEADER_MAX;

    fn check(&self) -> Result<(), CheckError> {
        match self {
            Found::Bytes { len } if *len > FETCH_BYTES_MAX => Err(CheckError::TooMany {
                what: "bytes of a reply",
                value: *len,
                max: FETCH_BYTES_MAX,
            }),
            Found::Failed(why) => at_most("bytes of a failure's text", why.len(), 512),
            Found::Bytes { .. } | Found::Chunk | Found::Missing => Ok(()),
        }
    }
}

/// Writes adverts one after the other, as many as a snapshot may hold.
pub fn encode_snapshot<'a>(adverts: impl IntoIterator<Item = &'a SignedAdvert>) -> Vec<u8> {
    let mut out = Vec::new();
    for advert in adverts.into_iter().take(SNAPSHOT_ADVERTS_MAX) {
        let room = SNAPSHOT_BYTES_MAX.saturating_sub(out.len());
        let Ok(len) = u16::try_from(advert.bytes.len()) else {
            continue;
        };
        if 2 + advert.bytes.len() + SIGNATURE_LEN > room {
            break;
        }
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(&advert.signature);
        out.extend_from_slice(&advert.bytes);
    }
    out
}

/// Cuts a snapshot into its adverts. Nothing is verified here.
///
/// # Errors
/// Bytes that are not whole adverts, too many of them, or one over its limit.
pub fn decode_snapshot(mut bytes: &[u8]) -> Result<Vec<SignedAdvert>, CodecError> {
    const NAME: &str = "snapshot of adverts";
    let large = |len, max| CodecError::Large {
        name: NAME,
        len,
        max,
    };
    if bytes.len() > SNAPSHOT_BYTES_MAX {
        return Err(large(bytes.len(), SNAPSHOT_BYTES_MAX));
    }
    let short = CodecError::Short {
        name: NAME,
        len: bytes.len(),
    };
    let mut adverts = Vec::new();
    while !bytes.is_empty() {
        if adverts.len() == SNAPSHOT_ADVERTS_MAX {
            return Err(large(adverts.len() + 1, SNAPSHOT_ADVERTS_MAX));
        }
        let (len, rest) = bytes.split_first_chunk().ok_or_else(|| short.clone())?;
        let (signature, rest) = rest.split_first_chunk().ok_or_else(|| short.clone())?;
        let len = usize::from(u16::from_le_bytes(*len));
        if len > ADVERT_BYTES_MAX {
            return Err(large(len, ADVERT_BYTES_MAX));
        }
        let (advert, rest) = rest.split_at_checked(len).ok_or_else(|| short.clone())?;
        adverts.push(SignedAdvert {
            bytes: advert.to_vec(),
            signature: *signature,
        });
        bytes = rest;
    }
    Ok(adverts)
}
