//! What exists and who has it: manifests, the content-addressed store, adverts, route planning.
//!
//! ```text
//! GGUF files ─import─▶ Store ─▶ Manifest (its hash is the model's id)
//! peers ─────fetch─────▶ │
//!                        └────▶ ShardReader: bytes of tensors, after their shard's hash was right
//! adverts ─▶ AdvertTable ─▶ Snapshot ─▶ route::plan ─▶ hops
//! ```
//!
//! No network. The table and the planner are plain structs: time and seeds are passed in. The only
//! I/O is the store's.

pub mod adverts;
mod assemble;
pub mod blobs;
pub mod experts;
mod files;
mod import;
mod layout;
mod manifest;
mod pins;
pub mod placement;
mod reader;
pub mod route;
mod signatures;
mod store;

pub use adverts::{AdvertTable, Coverage, Outcome, Refusal, Snapshot};
pub use assemble::AssembleError;
pub use files::GgufFiles;
pub use import::{ImportError, Imported, Progress, identify};
pub use layout::{Piece, ShardKind};
pub use manifest::{MANIFEST_BYTES_MAX, Manifest, ManifestError, ShardEntry, Tensor};
pub use reader::{ReadError, ShardReader};
pub use store::{AliasName, Problem, Resolved, Store, StoreError, Stored, UnknownModel};
