//! The token embedding: rows of the file, looked up one by one.

use gguf::TensorType;

use crate::blueprint::Blueprint;
use crate::llama;
use crate::load::{LoadError, read_tensor};
use crate::source::TensorSource;
use crate::stage::EngineError;

/// The embedding as the file has it, looked up row by row.
pub(crate) struct Embedding {
    ty: TensorType,
    row_bytes: usize,
    n_embd: usize,
    scale: f32,
    bytes: Vec<u8>,
    scratch: Vec<u64>,
}

impl Embedding {
    pub(crate) fn load(
        blueprint: &Blueprint,
        source: &dyn TensorSource,
    ) -> Result<Embedding, LoadError> {
        let tensor = blueprint.embedding();
        let mut bytes = Vec::new();
        read_tensor(
            source,
            &tensor.name,
            blueprint.embedding_bytes(),
            &mut bytes,
        )?;
        bytes.shrink_to_fit();
        let n_embd = blueprint.n_embd() as usize;
        Ok(Embedding {
            ty: tensor.ty,
            row_bytes: bytes.len() / (blueprint.n_vocab() as usize).max(1),
            n_embd,
            scale: blueprint.embedding_scale(),
            bytes,
            scratch: Vec::new(),
        })
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Appends the rows of `tokens`, which are within the vocabulary.
    pub(crate) fn look_up(
        &mut self,
        tokens: &[u32],
        out: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        let begin = out.len();
        out.resize(begin + tokens.len() * self.n_embd, 0.0);
        for (row, &token) in out[begin..].chunks_exact_mut(self.n_embd).zip(tokens) {
            let at = token as usize * self.row_bytes;
            let bytes = self.bytes.get(at..at + self.row_bytes).unwrap_or_default();
            llama::dequantize_row(self.ty, bytes, &mut self.scratch, row)
                .map_err(EngineError::Backend)?;
            if self.scale != 1.0 {
                row.iter_mut().for_each(|value| *value *= self.scale);
            }
        }
        Ok(())
    }
}
