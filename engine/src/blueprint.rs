//! What a model is made of, from its header alone.

use gguf::Header;

/// Why a model is not run.
#[derive(Debug, thiserror::Error)]
pub enum UnsupportedModel {
    /// The header lacks something or it does not fit together.
    #[error("{0}")]
    Header(String),
}

/// A model's dimensions and the place of each tensor.
#[derive(Clone, Debug)]
pub struct Blueprint {
    n_layer: u32,
}

impl Blueprint {
    /// Reads a model's header: all key-values but perhaps the tokenizer's, and
    /// every tensor.
    ///
    /// # Errors
    /// Architectures and dimensions not known to be exact when cut.
    pub fn new(_header: &Header) -> Result<Blueprint, UnsupportedModel> {
        Err(UnsupportedModel::Header("not written yet".into()))
    }

    /// The architecture, as `general.architecture` has it.
    pub fn arch(&self) -> &str {
        "llama"
    }

    /// Layers.
    pub fn n_layer(&self) -> u32 {
        self.n_layer
    }

    /// Floats in a hidden row.
    pub fn n_embd(&self) -> u32 {
        0
    }

    /// Tokens in the vocabulary.
    pub fn n_vocab(&self) -> u32 {
        0
    }

    /// Context the model was trained on.
    pub fn n_ctx_train(&self) -> u32 {
        0
    }

    /// Bytes of layer `i`'s tensors.
    pub fn layer_bytes(&self, _i: u32) -> u64 {
        0
    }

    /// Bytes that holding layer 0 adds: the embedding.
    pub fn embedding_bytes(&self) -> u64 {
        0
    }

    /// Bytes that holding the last layer adds: final norm and head.
    pub fn head_bytes(&self) -> u64 {
        0
    }

    /// Bytes of KV that one position of layer `i` takes.
    pub fn kv_cell_bytes(&self, _i: u32) -> u64 {
        0
    }
}
