//! What can be wrong with a GGUF header.

use std::io;

/// Why a header was refused, or could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The reader or writer itself failed.
    #[error("reading or writing the gguf header")]
    Io(#[from] io::Error),
    /// The first four bytes are something else.
    #[error("not a gguf file: it begins with {0:02x?}")]
    Magic([u8; 4]),
    /// A version this reader does not know.
    #[error("gguf version {0} is not supported (2 and 3 are)")]
    Version(u32),
    /// A big-endian file.
    #[error("big-endian gguf files are not supported")]
    BigEndian,
    /// The file ends inside the header.
    #[error("truncated: {needed} bytes needed at offset {at}, the file has {file_len}")]
    Truncated {
        /// Where the read began.
        at: u64,
        /// How many bytes were needed there.
        needed: u64,
        /// Length of the file.
        file_len: u64,
    },
    /// A count or a length beyond its limit.
    #[error("{what} is {value}, the limit is {max}")]
    TooMany {
        /// What was counted.
        what: &'static str,
        /// What the file says.
        value: u64,
        /// What is accepted.
        max: u64,
    },
    /// A type tag that does not exist.
    #[error("unknown {what} type {id}")]
    UnknownType {
        /// What kind of type.
        what: &'static str,
        /// The tag found.
        id: u32,
    },
    /// A bool that is neither 0 nor 1.
    #[error("a bool holds {0}")]
    Bool(u8),
    /// A key or a name that is empty, too long or not UTF-8.
    #[error("bad {what}: {why}")]
    Name {
        /// Key or tensor name.
        what: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The same key or tensor name twice.
    #[error("{what} `{name}` occurs twice")]
    Duplicate {
        /// Key or tensor.
        what: &'static str,
        /// Which.
        name: String,
    },
    /// An alignment that is not a power of two within the limit.
    #[error("alignment {0} is not a power of two from 1 to {max}", max = crate::ALIGNMENT_MAX)]
    Alignment(u64),
    /// A tensor whose shape, size or place cannot be.
    #[error("tensor `{name}`: {why}")]
    Tensor {
        /// Which tensor.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// Two tensors share bytes.
    #[error("tensors `{0}` and `{1}` overlap")]
    Overlap(String, String),
    /// A key that has to be there is not.
    #[error("key `{0}` is missing")]
    Missing(String),
    /// A key holds a value of another type than asked for.
    #[error("key `{key}` holds {found}, {wanted} expected")]
    Kind {
        /// Which key.
        key: String,
        /// The type found.
        found: &'static str,
        /// The type asked for.
        wanted: &'static str,
    },
}
