//! GGUF headers: a reader that believes nothing and a canonical writer.
//!
//! ```text
//! magic, version, counts │ key-values │ tensor table │ padding │ tensor data
//! └────────────────────── Header ───────────────────┘          └ the caller's
//! ```
//!
//! Every count and length is held against a limit and against the bytes that
//! are left before anything is allocated. Tensor data is never touched: a
//! [`TensorInfo`] says where it lies and how long it is.

mod error;
mod header;
mod read;
mod tensor_type;
mod value;
mod write;

pub use error::GgufError;
pub use header::{Header, TensorInfo};
pub use read::{
    ARRAY_LEN_MAX, KEY_LEN_MAX, KV_COUNT_MAX, METADATA_BYTES_MAX, STRING_ARRAY_LEN_MAX,
    STRING_LEN_MAX, TENSOR_COUNT_MAX, TENSOR_NAME_MAX,
};
pub use tensor_type::TensorType;
pub use value::{Array, Text, Value};

/// Alignment of tensor data when a file does not say otherwise.
pub const ALIGNMENT_DEFAULT: u32 = 32;
/// Largest alignment accepted: one large page; real files use 32.
pub const ALIGNMENT_MAX: u32 = 65_536;
/// The key that declares the alignment.
pub const ALIGNMENT_KEY: &str = "general.alignment";
