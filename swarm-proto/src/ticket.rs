//! A ticket: all that a machine needs to join a swarm, as one word that survives being pasted.
//!
//! `shoal1` and base58 of: the encoding, then the first four bytes of its hash. A ticket with a key
//! is a secret: it is not in `Debug`.

use std::{fmt, str::FromStr};

use bincode::{Decode, Encode};

use crate::{
    SwarmId,
    codec::{CheckError, CodecError, Message, at_most, decode, encode, wrong},
};

const PREFIX: &str = "shoal1";
const CHECKSUM_LEN: usize = 4;
/// Most addresses: two or three nodes with several interfaces.
pub const TICKET_ADDRS_MAX: usize = 16;
/// Longest address: one with a relay in it, and two peer ids.
pub const TICKET_ADDR_BYTES_MAX: usize = 256;
/// Longest text: beyond it nobody pasted a ticket.
const TEXT_MAX: usize = 8192;

/// What lets a machine join a swarm.
#[derive(Clone, PartialEq, Eq)]
pub struct Ticket {
    /// The swarm.
    pub swarm: SwarmId,
    /// The pre-shared key of a private swarm.
    pub key: Option<[u8; 32]>,
    /// Peers to begin with: multiaddresses that end in `/p2p/…`.
    pub addrs: Vec<String>,
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket")
            .field("swarm", &self.swarm)
            .field("key", &self.key.map(|_| "secret"))
            .field("addrs", &self.addrs)
            .finish()
    }
}

#[derive(Encode, Decode)]
struct Record {
    swarm: String,
    key: Option<[u8; 32]>,
    addrs: Vec<String>,
}

impl Message for Record {
    const NAME: &'static str = "ticket";
    const BYTES_MAX: usize = 5 * 1024;

    fn check(&self) -> Result<(), CheckError> {
        at_most("addresses of a ticket", self.addrs.len(), TICKET_ADDRS_MAX)?;
        for addr in &self.addrs {
            at_most("bytes of an address", addr.len(), TICKET_ADDR_BYTES_MAX)?;
            if !addr.contains("/p2p/") {
                return Err(wrong(format!("address {addr:?} names no peer (/p2p/…)")));
            }
        }
        Ok(())
    }
}

/// Why a text is no ticket, or a ticket cannot be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// It does not begin like one.
    #[error("not a ticket: one begins with {PREFIX}; ask for it with: shoal invite")]
    Prefix,
    /// Letters are missing, added or wrong.
    #[error("the ticket is damaged (its checksum is wrong); copy it again, whole")]
    Damaged,
    /// Too long to be one.
    #[error("ticket of {len} letters, the limit is {TEXT_MAX}")]
    Large {
        /// Its length.
        len: usize,
    },
    /// Whole, and not one of this version.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// Its swarm id is none.
    #[error("ticket: {0}")]
    Swarm(#[from] crate::SwarmIdError),
}

impl Ticket {
    /// The text form.
    ///
    /// # Errors
    /// Too many addresses, or one too long, or without a peer.
    pub fn to_text(&self) -> Result<String, TicketError> {
        let record = Record {
            swarm: self.swarm.to_string(),
            key: self.key,
            addrs: self.addrs.clone(),
        };
        let mut bytes = Vec::new();
        encode(&record, &mut bytes)?;
        let checksum = checksum(&bytes);
        bytes.extend_from_slice(&checksum);
        Ok(format!("{PREFIX}{}", bs58::encode(bytes).into_string()))
    }
}

impl FromStr for Ticket {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<Self, TicketError> {
        let text = text.trim();
        let len = text.len();
        if len > TEXT_MAX {
            return Err(TicketError::Large { len });
        }
        let body = text.strip_prefix(PREFIX).ok_or(TicketError::Prefix)?;
        let bytes = bs58::decode(body)
            .into_vec()
            .map_err(|_| TicketError::Damaged)?;
        let (bytes, sum) = bytes
            .split_last_chunk::<CHECKSUM_LEN>()
            .ok_or(TicketError::Damaged)?;
        if *sum != checksum(bytes) {
            return Err(TicketError::Damaged);
        }
        let record: Record = decode(bytes)?;
        Ok(Ticket {
            swarm: record.swarm.parse()?,
            key: record.key,
            addrs: record.addrs,
        })
    }
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_LEN] {
    let hash = blake3::derive_key("shoal ticket 1", bytes);
    std::array::from_fn(|i| hash[i])
}
