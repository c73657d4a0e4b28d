//! The only place that knows how headers become bytes: bincode 2, standard configuration.
//!
//! Three bounds hold for whatever a peer sends: the number of bytes given (checked here, before
//! decoding), the memory that decoding may claim (bincode's limit, checked before each
//! allocation), and the meaning (`Message::check`). Bytes after a message are refused.

use bincode::{Decode, Encode, config, error::DecodeError};

/// Most memory that decoding one message may claim. A message's own limit is on its bytes; a
/// decoded list can be some times larger than its bytes.
const CLAIM_BYTES_MAX: usize = 256 * 1024;

/// What travels as a header or as a whole record.
pub trait Message: Encode + Decode<()> {
    /// The word for messages of this type in errors.
    const NAME: &'static str;
    /// Most bytes of its encoding.
    const BYTES_MAX: usize;

    /// What the types cannot say: counts, lengths of texts, finite numbers.
    ///
    /// # Errors
    /// The first rule broken, with value and limit.
    fn check(&self) -> Result<(), CheckError> {
        Ok(())
    }
}

/// A well-formed message that breaks a rule. The sender's fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// Too much of something.
    #[error("{what}: {value}, the limit is {max}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How much there is.
        value: u64,
        /// How much there may be.
        max: u64,
    },
    /// Anything else.
    #[error("{0}")]
    Wrong(String),
}

pub(crate) fn at_most(what: &'static str, value: usize, max: usize) -> Result<(), CheckError> {
    if value <= max {
        return Ok(());
    }
    Err(CheckError::TooMany {
        what,
        value: value as u64,
        max: max as u64,
    })
}

/// Cuts a text to at most `max` bytes, between two characters.
pub fn cut_text(text: &mut String, max: usize) {
    let fits = (0..=max.min(text.len()))
        .rev()
        .find(|i| text.is_char_boundary(*i));
    text.truncate(fits.unwrap_or(0));
}

pub(crate) fn wrong(why: impl Into<String>) -> CheckError {
    CheckError::Wrong(why.into())
}

/// Why a message cannot be encoded or decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// Longer than such a message may be.
    #[error("{name} of {len} bytes, the limit is {max}")]
    Large {
        /// Which message.
        name: &'static str,
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// It ends too early.
    #[error("{name} ends after {len} bytes, more were announced")]
    Short {
        /// Which message.
        name: &'static str,
        /// Bytes there are.
        len: usize,
    },
    /// A list or a text in it is longer than memory is given for.
    #[error("{name} announces more than {max} bytes of memory")]
    Claim {
        /// Which message.
        name: &'static str,
        /// The limit.
        max: usize,
    },
    /// A kind that this version does not know.
    #[error("{name}: unknown kind {found} of {of}; is the sender newer?")]
    UnknownKind {
        /// Which message.
        name: &'static str,
        /// Which enum.
        of: &'static str,
        /// The tag.
        found: u32,
    },
    /// Bytes after its end.
    #[error("{name} of {used} bytes is followed by {extra} more")]
    Trailing {
        /// Which message.
        name: &'static str,
        /// Bytes of the message.
        used: usize,
        /// Bytes after it.
        extra: usize,
    },
    /// Anything else that no encoder of ours writes.
    #[error("{name} is malformed: {why}")]
    Malformed {
        /// Which message.
        name: &'static str,
        /// What is wrong.
        why: String,
    },
    /// Well-formed, and against the rules.
    #[error("{name}: {why}")]
    Check {
        /// Which message.
        name: &'static str,
        /// The rule.
        why: CheckError,
    },
}

/// Decodes a message from exactly these bytes.
///
/// # Errors
/// Anything that an honest sender of this version does not send.
pub fn decode<M: Message>(bytes: &[u8]) -> Result<M, CodecError> {
    let message: M = decode_record::<M, CLAIM_BYTES_MAX>(M::NAME, bytes, M::BYTES_MAX)?;
    let check = message.check();
    check.map_err(|why| CodecError::Check { name: M::NAME, why })?;
    Ok(message)
}

/// Appends a message's encoding to `out`; on an error `out` is as before.
///
/// # Errors
/// The message is longer than the limit, or breaks a rule of its own.
pub fn encode<M: Message>(message: &M, out: &mut Vec<u8>) -> Result<(), CodecError> {
    let check = message.check();
    check.map_err(|why| CodecError::Check { name: M::NAME, why })?;
    encode_record(M::NAME, message, out, M::BYTES_MAX)
}

/// Decodes any record from exactly these bytes, at most `bytes_max` of them, claiming at most
/// `CLAIM` bytes of memory. For records that are stored; what a peer sends is a [`Message`].
///
/// # Errors
/// As [`decode`], without the message's own rules.
pub fn decode_record<T: Decode<()>, const CLAIM: usize>(
    name: &'static str,
    bytes: &[u8],
    bytes_max: usize,
) -> Result<T, CodecError> {
    let len = bytes.len();
    if len > bytes_max {
        let max = bytes_max;
        return Err(CodecError::Large { name, len, max });
    }
    let limited = config::standard().with_limit::<CLAIM>();
    let (record, used) = bincode::decode_from_slice(bytes, limited).map_err(|e| match e {
        DecodeError::UnexpectedEnd { .. } => CodecError::Short { name, len },
        DecodeError::LimitExceeded => CodecError::Claim { name, max: CLAIM },
        DecodeError::UnexpectedVariant {
            type_name, found, ..
        } => CodecError::UnknownKind {
            name,
            of: type_name,
            found,
        },
        DecodeError::OtherString(why) => CodecError::Malformed { name, why },
        other => CodecError::Malformed {
            name,
            why: other.to_string(),
        },
    })?;
    if used != len {
        let extra = len - used;
        return Err(CodecError::Trailing { name, used, extra });
    }
    Ok(record)
}

/// Appends any record's encoding to `out`; on an error `out` is as before.
///
/// # Errors
/// The encoding is longer than `bytes_max`.
pub fn encode_record<T: Encode>(
    name: &'static str,
    record: &T,
    out: &mut Vec<u8>,
    bytes_max: usize,
) -> Result<(), CodecError> {
    let start = out.len();
    let done = bincode::encode_into_std_write(record, out, config::standard());
    let len = out.len() - start;
    let result = match done {
        Ok(_) if len <= bytes_max => return Ok(()),
        Ok(_) => Err(CodecError::Large {
            name,
            len,
            max: bytes_max,
        }),
        Err(e) => Err(CodecError::Malformed {
            name,
            why: e.to_string(),
        }),
    };
    out.truncate(start);
    result
}
