//! The llama.cpp stage.

use std::ops::Range;

use crate::blueprint::Blueprint;
use crate::source::TensorSource;
use crate::stage::{EngineError, Input, Slot, Stage, StageShape, StageStats, Step};

/// How to load a stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Compute threads. ggml's threads wait busily: more than the free cores
    /// is many times slower than one.
    pub n_threads: u32,
    /// Longest context of a session; `None`: what the model was trained on.
    pub n_ctx_max: Option<u32>,
    /// Bytes of KV that sessions may hold together.
    pub kv_bytes_max: u64,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            n_threads: 1,
            n_ctx_max: None,
            kv_bytes_max: 1 << 30,
        }
    }
}

/// Why a stage was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Layers the model does not have.
    #[error("layers {}..{} asked for, the model has {n_layer}", asked.start, asked.end)]
    Layers {
        /// What was asked for.
        asked: Range<u32>,
        /// What there is.
        n_layer: u32,
    },
    /// A tensor could not be read.
    #[error("reading tensor `{name}`")]
    Tensor {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// llama.cpp refused it.
    #[error("llama.cpp: {0}")]
    Backend(String),
}

/// Layers of a model in llama.cpp.
pub struct LlamaStage {
    shape: StageShape,
}

impl LlamaStage {
    /// Loads `layers`, calling `progress` after each.
    ///
    /// # Errors
    /// Tensors that cannot be read or that llama.cpp refuses.
    pub fn load(
        _blueprint: &Blueprint,
        _layers: Range<u32>,
        _source: &dyn TensorSource,
        _options: &LoadOptions,
        _progress: &mut dyn FnMut(u32),
    ) -> Result<LlamaStage, LoadError> {
        Err(LoadError::Backend("not written yet".into()))
    }
}

impl Stage for LlamaStage {
    fn shape(&self) -> StageShape {
        self.shape.clone()
    }

    fn open(&mut self, _n_ctx: u32, _layers: Range<u32>) -> Result<Slot, EngineError> {
        Err(EngineError::Stopped)
    }

    fn close(&mut self, _slot: Slot) {}

    fn run(
        &mut self,
        _step: &Step,
        _input: &Input<'_>,
        _out: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        Err(EngineError::Stopped)
    }

    fn stats(&self) -> StageStats {
        StageStats::default()
    }
}
