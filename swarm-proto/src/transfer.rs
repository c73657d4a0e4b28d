//! The transfer stream: parts of shards, each verified as it comes. A stream lasts for as long as two peers
//! have something for each other; requests are answered in the order they came in.
//!
//! ```text
//! ──Ask { shard, groups }──▶   ◀── Give::Part + payload ≤ 256 KiB ◀── …   until the range's length
//!                              ◀── Give::Missing, Later, Elsewhere or Failed instead
//! ```
//! The payloads of one range, one after the other, are the hashes on the way to its groups and the groups
//! themselves, in BLAKE3's own tree (`docs/decisions/0080`). Their number follows from the shard's length,
//! which the manifest says, so nothing is announced that could lie.

use std::ops::Range;

use bincode::{Decode, Encode};

use crate::{
    ModelId, Peer, ShardId,
    codec::{CheckError, Message, at_most, wrong},
};

/// What is verified at once: a wrong byte is found within so many.
pub const GROUP_BYTES: u64 = 16 * 1024;
/// Most groups of one request: 4 MiB.
pub const RANGE_GROUPS_MAX: u32 = 256;
/// Largest payload of one frame.
pub const PART_BYTES_MAX: usize = 256 * 1024;
/// Most peers named instead of an answer.
pub const ELSEWHERE_MAX: usize = 8;
/// Longest text of a failure.
const WHY_BYTES_MAX: usize = 512;

/// How many groups a shard of `bytes` bytes has; one that has too many for the wire has none.
pub fn groups_of(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(GROUP_BYTES)).unwrap_or(0)
}

/// A request for some groups of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Ask {
    /// A model that has the shard.
    pub model: ModelId,
    /// Which shard.
    pub shard: ShardId,
    /// The first group.
    pub first: u32,
    /// How many, 1 to [`RANGE_GROUPS_MAX`].
    pub groups: u32,
    /// Whether the asker will give to others what it gets.
    pub shares: bool,
    /// Whether those that we named ([`Give::Elsewhere`]) did not give it.
    pub in_vain: bool,
}

impl Ask {
    /// The groups asked for.
    pub fn range(&self) -> Range<u32> {
        self.first..self.first.saturating_add(self.groups)
    }
}

impl Message for Ask {
    const NAME: &'static str = "transfer request";
    const BYTES_MAX: usize = 96;

    fn check(&self) -> Result<(), CheckError> {
        if self.groups == 0 {
            return Err(wrong("a range of no groups"));
        }
        at_most(
            "groups of a range",
            self.groups as usize,
            RANGE_GROUPS_MAX as usize,
        )?;
        match self.first.checked_add(self.groups) {
            Some(_) => Ok(()),
            None => Err(wrong(format!("a range from group {}", self.first))),
        }
    }
}

/// An answer to an [`Ask`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Give {
    /// Some of the range, as the payload.
    Part,
    /// It is not here.
    Missing,
    /// It is on its way here, or there is no place free: ask again in a moment.
    Later,
    /// We gave it already: these have it, or are getting it.
    Elsewhere {
        /// At most [`ELSEWHERE_MAX`].
        peers: Vec<Peer>,
    },
    /// It is here, and cannot be given.
    Failed(String),
}

impl Message for Give {
    const NAME: &'static str = "transfer reply";
    const BYTES_MAX: usize = 1024;

    fn check(&self) -> Result<(), CheckError> {
        match self {
            Give::Elsewhere { peers } => at_most("peers named", peers.len(), ELSEWHERE_MAX),
            Give::Failed(why) => at_most("bytes of a failure's text", why.len(), WHY_BYTES_MAX),
            Give::Part | Give::Missing | Give::Later => Ok(()),
        }
    }
}
