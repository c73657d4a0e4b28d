//! Runs stages of a model: the only crate that knows llama.cpp, and the only
//! one with `unsafe`. It never sees a peer and knows no async.
//!
//! ```text
//! gguf::Header ─▶ Blueprint ─┐
//! TensorSource (bytes) ──────┴▶ LlamaStage ─▶ Worker (a thread, a queue)
//! ```

mod blueprint;
mod chain;
mod llama_stage;
mod source;
mod stage;
mod worker;

pub use blueprint::{Blueprint, UnsupportedModel};
pub use chain::ChainStage;
pub use llama_stage::{LlamaStage, LoadError, LoadOptions};
pub use source::{FileSource, TensorSource};
pub use stage::{EngineError, Fault, Input, Slot, Stage, StageShape, StageStats, Step, Want};
pub use worker::{Busy, Done, Job, Reply, Rows, Worker};

/// Most rows in one step. Below 64, where flash attention begins to tile, so
/// that replaying a prompt on its chunks gives the same bits.
pub const PREFILL_CHUNK: u32 = 32;
