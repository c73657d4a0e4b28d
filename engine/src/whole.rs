//! The reference: the user's file, whole, in stock llama.cpp.

use std::path::Path;

use gguf::Header;

use crate::PREFILL_CHUNK;
use crate::blueprint::Blueprint;
use crate::llama::{self, Context, ContextOptions, FileModel, Model, Output, Rows, ThreadPool};
use crate::stage::{EngineError, Want};

/// One `llama_model` of a whole file with one session. Token ids in, logits
/// out; in the same chunks it gives the same bits as stages do.
pub struct WholeModel {
    context: Context,
    n_vocab: u32,
    n_ctx: u32,
    end: u32,
}

impl WholeModel {
    /// Loads a file for a context of `n_ctx` positions.
    ///
    /// # Errors
    /// The file is not a GGUF or llama.cpp does not take it.
    pub fn load(path: &Path, n_ctx: u32, n_threads: u32) -> Result<WholeModel, EngineError> {
        let backend = |why: &dyn std::fmt::Display| EngineError::Backend(why.to_string());
        let file = std::fs::File::open(path).map_err(|e| backend(&e))?;
        let len = file.metadata().map_err(|e| backend(&e))?.len();
        let header = Header::read(&mut &file, len).map_err(|e| backend(&e))?;
        let model = FileModel::from_path(path).map_err(EngineError::Backend)?;
        WholeModel::of(&model, &header, n_ctx, n_threads)
    }

    /// A session on a loaded model with this header.
    pub(crate) fn of(
        model: &Model,
        header: &Header,
        n_ctx: u32,
        n_threads: u32,
    ) -> Result<WholeModel, EngineError> {
        // Where the architecture can be cut, the same context as a stage's.
        let n_ctx_class = match Blueprint::new(header) {
            Ok(blueprint) => blueprint.context_class(n_ctx),
            Err(_) => n_ctx.clamp(256, 1 << 27).next_power_of_two(),
        };
        let n_threads = n_threads.clamp(1, 512);
        let options = ContextOptions {
            n_ctx: n_ctx_class,
            lanes: 1,
            n_batch: PREFILL_CHUNK,
            n_threads,
            enter: 0,
            leave: None,
        };
        let context = ThreadPool::new(n_threads)
            .and_then(|threads| Context::new(model, &options, &threads))
            .map_err(EngineError::Backend)?;
        let n_vocab = context.n_vocab();
        Ok(WholeModel {
            context,
            n_vocab,
            n_ctx,
            end: 0,
        })
    }

    /// Floats in a logits row.
    pub fn n_vocab(&self) -> u32 {
        self.n_vocab
    }

    /// Positions there are.
    pub fn n_ctx(&self) -> u32 {
        self.n_ctx
    }

    /// Bytes of its tensors that are in this process.
    pub fn tensor_bytes(&self) -> u64 {
        self.context.model().bytes()
    }

    /// Positions held.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// Writes `tokens` at `pos0`, dropping what was there, and fills `out` with
    /// the rows wanted. One call is one batch: at most
    /// [`PREFILL_CHUNK`] tokens.
    ///
    /// # Errors
    /// As [`crate::Stage::run`].
    pub fn run(
        &mut self,
        pos0: u32,
        tokens: &[u32],
        want: Want,
        out: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        let n_rows = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
        if n_rows == 0 || n_rows > PREFILL_CHUNK {
            return Err(EngineError::RowCount {
                n_rows,
                max: PREFILL_CHUNK,
            });
        }
        if pos0 > self.end {
            return Err(EngineError::Gap {
                pos0,
                end: self.end,
                layer: 0,
            });
        }
        let end = u64::from(pos0) + u64::from(n_rows);
        if end > self.n_ctx.into() {
            return Err(EngineError::ContextFull {
                end,
                n_ctx: self.n_ctx,
            });
        }
        if let Some(&token) = tokens.iter().find(|&&token| token >= self.n_vocab) {
            return Err(EngineError::Token {
                token,
                n_vocab: self.n_vocab,
            });
        }
        if pos0 < self.end {
            self.context
                .truncate(0, pos0)
                .map_err(EngineError::Backend)?;
            self.end = pos0;
        }
        let output = match want {
            Want::None => Output::None,
            Want::Last => Output::Last,
            Want::All => Output::All,
            Want::Normed => Output::Normed,
        };
        let at: Vec<_> = (pos0..pos0 + n_rows).map(|pos| (0, pos)).collect();
        self.context
            .run(&Rows::Tokens(tokens), &at, output, out)
            .map_err(EngineError::Backend)?;
        self.end = pos0 + n_rows;
        Ok(())
    }

    /// [`WholeModel::run`] in chunks of [`PREFILL_CHUNK`], with the logits of
    /// the last token.
    ///
    /// # Errors
    /// As [`WholeModel::run`].
    pub fn feed(
        &mut self,
        pos0: u32,
        tokens: &[u32],
        out: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        let mut pos = pos0;
        let mut chunks = tokens.chunks(PREFILL_CHUNK as usize).peekable();
        while let Some(chunk) = chunks.next() {
            let want = if chunks.peek().is_some() {
                Want::None
            } else {
                Want::Last
            };
            self.run(pos, chunk, want, out)?;
            pos += chunk.len() as u32;
        }
        Ok(())
    }
}

/// What llama.cpp itself makes of a text with a model that embeds: its own pooling, not brought to length 1. One call,
/// so at most [`PREFILL_CHUNK`] tokens.
///
/// # Errors
/// llama.cpp does not take the file or the tokens, or it is no model that embeds.
pub fn whole_embedding(path: &Path, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
    if tokens.is_empty() || tokens.len() > PREFILL_CHUNK as usize {
        return Err(EngineError::RowCount {
            n_rows: u32::try_from(tokens.len()).unwrap_or(u32::MAX),
            max: PREFILL_CHUNK,
        });
    }
    let model = FileModel::from_path(path).map_err(EngineError::Backend)?;
    llama::pooled(&model, tokens).map_err(EngineError::Backend)
}
