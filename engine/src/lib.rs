//! Runs stages of a model: the only crate that knows llama.cpp, and the only
//! one with `unsafe`. It never sees a peer and knows no async.
//!
//! ```text
//! gguf::Header ─▶ Blueprint ─┐
//! TensorSource (bytes) ──────┴▶ LlamaStage ─▶ Worker (a thread, a queue)
//! ```

mod arch;
mod blueprint;
mod chain;
mod chat;
mod embedding;
mod experts;
mod json_schema;
#[allow(unsafe_code)]
mod llama;
mod llama_stage;
mod load;
mod memory;
mod noise;
mod pooling;
mod random_model;
mod sampler;
mod source;
mod stage;
mod system;
mod vocab;
mod whole;
mod worker;

pub use blueprint::{Blueprint, UnsupportedModel};
pub use chain::ChainStage;
pub use chat::{ChatError, Message, render_chat};
pub use experts::{
    Activation, ExpertCall, ExpertError, ExpertHolder, ExpertHolders, ExpertLayout, ExpertReply,
    ExpertSource, ExpertUse, ExpertWorker, Form, Group, HolderId, HolderReply, HolderStats,
    InProcess, LoadedExpert, Parts, Placement, Rest,
};
pub use json_schema::{Grammar, SchemaError};
pub use llama_stage::{LlamaStage, LoadOptions};
pub use load::{LoadError, Loaded};
pub use noise::BatchNoise;
pub use pooling::{NoPooling, Pool, Pooling};
pub use random_model::{
    QuantType, RandomModelError, RandomShape, RandomWeights, quantize, random_model,
};
pub use sampler::{Candidates, Penalties, SampleError, Sampler, SamplerOptions};
pub use source::{FileSource, TensorSource};
pub use stage::{
    Bench, EngineError, Fault, Held, Input, Slot, Stage, StageShape, StageStats, Step, Want,
};
pub use system::{
    Device, SystemInfo, expert_numerics_class, numerics_class, physical_cores, system_info,
    threads_for,
};
pub use vocab::{Detokenizer, TEXT_BYTES_MAX, Vocab, VocabError};
pub use whole::{WholeModel, whole_embedding};
pub use worker::{Busy, Done, Job, Reply, Rows, Share, SlotWaiter, Worker, WorkerByHand};

/// Most rows in one step. Below 64, where flash attention begins to tile, so
/// that replaying a prompt on its chunks gives the same bits.
pub const PREFILL_CHUNK: u32 = 32;
