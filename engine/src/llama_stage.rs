//! The llama.cpp stage: one model per layer, one context per layer and session.
//!
//! ```text
//! ids ─▶ embedding (ours) ─▶ layer a ─▶ layer a+1 ─▶ … ─▶ layer b-1 [─▶ head]
//!                             └ model, and per session a context with its KV
//! ```
//!
//! Layers on their own let a session enter and leave at any of them, and a node
//! gain and lose them one by one. Contexts come in size classes and are kept
//! for the next session.

use std::collections::BTreeMap;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::sync::Arc;

use gguf::TensorType;

use crate::PREFILL_CHUNK;
use crate::blueprint::{Blueprint, Fill, StageFile, UnsupportedModel};
use crate::llama::{self, Context, ContextOptions, FileModel, Model, Output, ThreadPool};
use crate::source::TensorSource;
use crate::stage::{EngineError, Input, Slot, Stage, StageShape, StageStats, Step, Want};
use crate::stage::{check_end, check_layers, check_step};

/// Bytes beyond KV that contexts without a session may hold: a whole idle node is
/// promised to stay within 64 MB of its tensors and KV.
const IDLE_BYTES_MAX: u64 = 16 << 20;
/// Bytes of a context of the smallest model beyond KV: graphs and tables.
const CONTEXT_BYTES: u64 = 1_300_000;

/// How to load a stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Compute threads. ggml's threads wait busily: more than the free cores
    /// is many times slower than one.
    pub n_threads: u32,
    /// Longest context of a session; `None`: what the model was trained on.
    pub n_ctx_max: Option<u32>,
    /// Bytes of KV that sessions may hold together, kept contexts included.
    pub kv_bytes_max: u64,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            n_threads: crate::system::physical_cores(),
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
    #[error("reading tensor `{name}`: {source}")]
    Tensor {
        /// Which.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// A tensor has another length than its shape says.
    #[error("tensor `{name}` has {len} bytes, its shape takes {expected}")]
    TensorLength {
        /// Which.
        name: String,
        /// Bytes read.
        len: u64,
        /// Bytes expected.
        expected: u64,
    },
    /// The private file a layer is loaded from could not be written.
    #[error("writing the stage file of layer {layer}: {source}")]
    StageFile {
        /// Which layer.
        layer: u32,
        /// Why: usually no room in the temporary directory (`TMPDIR`).
        source: std::io::Error,
    },
    /// The layer's header does not come together.
    #[error(transparent)]
    Model(#[from] UnsupportedModel),
    /// llama.cpp refused it.
    #[error("llama.cpp refused layer {layer}: {why}")]
    Backend {
        /// Which layer.
        layer: u32,
        /// What it logged.
        why: String,
    },
}

/// Layers of a model in llama.cpp.
pub struct LlamaStage {
    shape: StageShape,
    blueprint: Blueprint,
    options: LoadOptions,
    embedding: Option<Embedding>,
    layers: Vec<Layer>,
    threads: Option<Arc<ThreadPool>>,
    sessions: BTreeMap<Slot, Session>,
    next_slot: u64,
    /// Hidden rows between layers: written by one, read by the next.
    between: Vec<f32>,
    steps: u64,
    rows: u64,
}

/// One layer's model and the contexts that no session uses just now.
struct Layer {
    index: u32,
    model: Model,
    idle: BTreeMap<u32, Vec<Context>>,
}

/// The embedding as the file has it, looked up row by row.
struct Embedding {
    ty: TensorType,
    row_bytes: usize,
    n_embd: usize,
    scale: f32,
    bytes: Vec<u8>,
    scratch: Vec<u64>,
}

struct Session {
    n_ctx: u32,
    class: u32,
    layers: Range<u32>,
    kv_bytes: u64,
    parts: Vec<Part>,
}

/// A session in one layer.
struct Part {
    context: Context,
    /// Positions held.
    end: u32,
}

impl LlamaStage {
    /// Loads `layers`, calling `progress` after each.
    ///
    /// # Errors
    /// Tensors that cannot be read or that llama.cpp refuses, and no room for
    /// the largest layer in the temporary directory.
    pub fn load(
        blueprint: &Blueprint,
        layers: Range<u32>,
        source: &dyn TensorSource,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u32),
    ) -> Result<LlamaStage, LoadError> {
        let n_layer = blueprint.n_layer();
        if layers.start >= layers.end || layers.end > n_layer {
            return Err(LoadError::Layers {
                asked: layers,
                n_layer,
            });
        }
        llama::start();
        let embedding = match layers.start {
            0 => Some(Embedding::load(blueprint, source)?),
            _ => None,
        };
        let mut loaded = Vec::with_capacity(layers.len());
        for index in layers.clone() {
            let model = load_layer(blueprint, index, source)?;
            loaded.push(Layer {
                index,
                model,
                idle: BTreeMap::new(),
            });
            progress(index);
        }
        let shape = StageShape {
            n_embd: blueprint.n_embd(),
            n_vocab: blueprint.n_vocab(),
            n_layer,
            layers,
            n_ctx_max: options.n_ctx_max.unwrap_or(blueprint.n_ctx_train()).max(1),
        };
        let options = LoadOptions {
            n_threads: options.n_threads.clamp(1, 512),
            ..options.clone()
        };
        Ok(LlamaStage {
            shape,
            blueprint: blueprint.clone(),
            threads: ThreadPool::new(options.n_threads),
            options,
            embedding,
            layers: loaded,
            sessions: BTreeMap::new(),
            next_slot: 0,
            between: Vec::new(),
            steps: 0,
            rows: 0,
        })
    }

    /// Bytes of a session's KV: the class's positions in each of its layers.
    fn session_bytes(&self, class: u32, layers: &Range<u32>) -> u64 {
        let cell: u64 = layers
            .clone()
            .map(|i| self.blueprint.kv_cell_bytes(i))
            .sum();
        cell.saturating_mul(class.into())
    }

    fn used_bytes(&self) -> u64 {
        self.sessions.values().map(|session| session.kv_bytes).sum()
    }

    fn idle_bytes(&self) -> u64 {
        self.layers
            .iter()
            .map(|layer| layer.idle_bytes(&self.blueprint))
            .sum()
    }

    /// About what a context takes beyond KV: measured at two sizes, where it
    /// follows the rows of a chunk through the feed-forward part.
    fn context_bytes(&self) -> u64 {
        let row = 4 * u64::from(self.blueprint.n_ff()) + 6 * u64::from(self.shape.n_embd);
        CONTEXT_BYTES + u64::from(PREFILL_CHUNK) * row * 4
    }

    fn idle_contexts(&self) -> u64 {
        self.layers.iter().map(Layer::idle_len).sum()
    }

    /// Frees idle contexts until `needed` more bytes fit the budget.
    fn make_room(&mut self, needed: u64) {
        let room = |stage: &Self| {
            let taken = stage.used_bytes() + stage.idle_bytes();
            taken.saturating_add(needed) <= stage.options.kv_bytes_max
                && stage.idle_contexts() * stage.context_bytes() <= IDLE_BYTES_MAX
        };
        let mut freed = false;
        while !room(self) {
            let fullest = self.layers.iter_mut().max_by_key(|layer| layer.idle_len());
            if !fullest.is_some_and(Layer::drop_one) {
                break;
            }
            freed = true;
        }
        if freed {
            llama::trim();
        }
    }

    fn part(&mut self, index: u32, class: u32) -> Result<Part, EngineError> {
        let first = self.shape.layers.start;
        let Some(layer) = self.layers.get_mut((index - first) as usize) else {
            return Err(EngineError::Backend(format!("layer {index} is not loaded")));
        };
        if let Some(mut context) = layer.take(class) {
            context.truncate(0).map_err(EngineError::Backend)?;
            return Ok(Part { context, end: 0 });
        }
        let options = ContextOptions {
            n_ctx: class,
            n_batch: PREFILL_CHUNK,
            n_threads: self.options.n_threads,
            tap: index + 1 < self.shape.n_layer,
        };
        Context::new(&layer.model, &options, self.threads.as_ref())
            .map(|context| Part { context, end: 0 })
            .map_err(EngineError::Backend)
    }

    fn run_in(
        &mut self,
        session: &mut Session,
        step: &Step,
        input: &Input<'_>,
        out: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        check_step(&self.shape, &session.layers, session.n_ctx, step, input)?;
        let first = session.layers.start;
        let at = |layer: u32| (layer - first) as usize;
        for layer in step.layers.clone() {
            check_end(step, layer, session.parts[at(layer)].end)?;
        }
        let hidden = &mut self.between;
        hidden.clear();
        match *input {
            Input::Hidden(rows) => hidden.extend_from_slice(rows),
            Input::Tokens(tokens) => match &mut self.embedding {
                Some(embedding) => embedding.look_up(tokens, hidden)?,
                None => return Err(EngineError::Backend("no embedding loaded".into())),
            },
        }
        for layer in step.layers.clone() {
            let part = &mut session.parts[at(layer)];
            let last = layer + 1 == self.shape.n_layer;
            let output = match step.want {
                _ if !last => Output::All,
                Want::None => Output::None,
                Want::Last => Output::Last,
                Want::All => Output::All,
            };
            part.run(hidden, step, output, out)?;
            // The next layer reads as many floats as it was given rows for.
            if !last && out.len() != hidden.len() {
                let (got, wanted) = (out.len(), hidden.len());
                let why = format!("layer {layer} gave {got} values, {wanted} are due");
                return Err(EngineError::Backend(why));
            }
            if layer + 1 < step.layers.end {
                std::mem::swap(hidden, out);
            }
        }
        // Broken weights show here rather than at the next hop.
        if step.layers.end < self.shape.n_layer && !out.iter().all(|value| value.is_finite()) {
            let layers = &step.layers;
            let why = format!(
                "layers {}..{} gave values not finite",
                layers.start, layers.end
            );
            return Err(EngineError::Backend(why));
        }
        Ok(())
    }
}

impl Part {
    fn run(
        &mut self,
        hidden: &[f32],
        step: &Step,
        output: Output,
        out: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        if step.pos0 < self.end {
            self.context
                .truncate(step.pos0)
                .map_err(EngineError::Backend)?;
        }
        self.end = step.pos0;
        let rows = llama::Rows::Hidden(hidden);
        self.context
            .run(&rows, step.n_rows as usize, step.pos0, output, out)
            .map_err(|why| self.repair(why))?;
        self.end = step.pos0 + step.n_rows;
        Ok(())
    }

    /// After a failed call nobody knows what the KV holds behind `end`.
    fn repair(&mut self, why: String) -> EngineError {
        if self.context.truncate(self.end).is_err() {
            self.end = 0;
        }
        EngineError::Backend(why)
    }
}

impl Layer {
    fn take(&mut self, class: u32) -> Option<Context> {
        let idle = self.idle.get_mut(&class)?;
        let context = idle.pop();
        if idle.is_empty() {
            self.idle.remove(&class);
        }
        context
    }

    fn idle_len(&self) -> u64 {
        self.idle.values().map(|idle| idle.len() as u64).sum()
    }

    /// Drops an idle context; whether there was one.
    fn drop_one(&mut self) -> bool {
        let Some(class) = self.idle.keys().next().copied() else {
            return false;
        };
        self.take(class).is_some()
    }

    fn idle_bytes(&self, blueprint: &Blueprint) -> u64 {
        let cells: u64 = self
            .idle
            .iter()
            .map(|(&class, n)| u64::from(class) * n.len() as u64)
            .sum();
        cells * blueprint.kv_cell_bytes(self.index)
    }
}

impl Embedding {
    fn load(blueprint: &Blueprint, source: &dyn TensorSource) -> Result<Embedding, LoadError> {
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

    /// Appends the rows of `tokens`, which are within the vocabulary.
    fn look_up(&mut self, tokens: &[u32], out: &mut Vec<f32>) -> Result<(), EngineError> {
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

fn read_tensor(
    source: &dyn TensorSource,
    name: &str,
    expected: u64,
    bytes: &mut Vec<u8>,
) -> Result<(), LoadError> {
    source
        .read(name, bytes)
        .map_err(|source| LoadError::Tensor {
            name: name.into(),
            source,
        })?;
    let len = bytes.len() as u64;
    if len != expected {
        return Err(LoadError::TensorLength {
            name: name.into(),
            len,
            expected,
        });
    }
    Ok(())
}

/// Writes the layer's file, unlinked from the start, and loads it.
fn load_layer(
    blueprint: &Blueprint,
    layer: u32,
    source: &dyn TensorSource,
) -> Result<Model, LoadError> {
    let stage_file = blueprint.stage_file(layer)?;
    let broken = |source| LoadError::StageFile { layer, source };
    let mut file = tempfile::tempfile().map_err(broken)?;
    write_stage_file(&stage_file, layer, source, &mut file)?;
    file.seek(SeekFrom::Start(0)).map_err(broken)?;
    FileModel::from_file(file, false).map_err(|why| LoadError::Backend { layer, why })
}

fn write_stage_file(
    stage_file: &StageFile,
    layer: u32,
    source: &dyn TensorSource,
    file: &mut std::fs::File,
) -> Result<(), LoadError> {
    let broken = |source| LoadError::StageFile { layer, source };
    let header = &stage_file.header;
    let mut bytes = Vec::new();
    {
        let mut writer = BufWriter::new(&mut *file);
        header.write(&mut writer).map_err(UnsupportedModel::from)?;
        writer.flush().map_err(broken)?;
    }
    let mut end = header.data_offset;
    for (tensor, fill) in header.tensors.iter().zip(&stage_file.fills) {
        let n_bytes = tensor.n_bytes().map_err(UnsupportedModel::from)?;
        match fill {
            Fill::Hole => bytes.clear(),
            Fill::Ones => {
                bytes.clear();
                (0..n_bytes / 4).for_each(|_| bytes.extend(1f32.to_le_bytes()));
            }
            Fill::Source(name) => read_tensor(source, name, n_bytes, &mut bytes)?,
        }
        file.seek(SeekFrom::Start(header.data_offset + tensor.offset))
            .map_err(broken)?;
        file.write_all(&bytes).map_err(broken)?;
        end = header.data_offset + tensor.offset + n_bytes;
    }
    file.set_len(end + header.padding(end)).map_err(broken)
}

impl Stage for LlamaStage {
    fn shape(&self) -> StageShape {
        self.shape.clone()
    }

    fn open(&mut self, n_ctx: u32, layers: Range<u32>) -> Result<Slot, EngineError> {
        check_layers(&layers, &self.shape.layers)?;
        if n_ctx == 0 || n_ctx > self.shape.n_ctx_max {
            return Err(EngineError::ContextLength {
                n_ctx,
                max: self.shape.n_ctx_max,
            });
        }
        let class = self.blueprint.context_class(n_ctx);
        let needed = self.session_bytes(class, &layers);
        let used = self.used_bytes();
        if used.saturating_add(needed) > self.options.kv_bytes_max {
            return Err(EngineError::Full {
                needed,
                used,
                budget: self.options.kv_bytes_max,
                sessions: self.sessions.len() as u32,
                largest: self
                    .sessions
                    .values()
                    .map(|s| s.kv_bytes)
                    .max()
                    .unwrap_or(0),
            });
        }
        let mut parts = Vec::with_capacity(layers.len());
        let idle: u64 = layers
            .clone()
            .filter(|i| {
                self.layers[(i - self.shape.layers.start) as usize]
                    .idle
                    .contains_key(&class)
            })
            .map(|i| self.blueprint.kv_cell_bytes(i) * u64::from(class))
            .sum();
        self.make_room(needed.saturating_sub(idle));
        for index in layers.clone() {
            parts.push(self.part(index, class)?);
        }
        let slot = Slot(self.next_slot);
        self.next_slot += 1;
        self.sessions.insert(
            slot,
            Session {
                n_ctx,
                class,
                layers,
                kv_bytes: needed,
                parts,
            },
        );
        Ok(slot)
    }

    fn close(&mut self, slot: Slot) {
        let Some(session) = self.sessions.remove(&slot) else {
            return;
        };
        let first = self.shape.layers.start;
        for (index, part) in session.layers.zip(session.parts) {
            if let Some(layer) = self.layers.get_mut((index - first) as usize) {
                layer
                    .idle
                    .entry(session.class)
                    .or_default()
                    .push(part.context);
            }
        }
        self.make_room(0);
    }

    fn run(
        &mut self,
        step: &Step,
        input: &Input<'_>,
        out: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        out.clear();
        let mut session = self
            .sessions
            .remove(&step.slot)
            .ok_or(EngineError::BadSlot(step.slot))?;
        let result = self.run_in(&mut session, step, input, out);
        self.sessions.insert(step.slot, session);
        match &result {
            Ok(()) => {
                self.steps += 1;
                self.rows += u64::from(step.n_rows);
            }
            Err(_) => out.clear(),
        }
        result
    }

    fn stats(&self) -> StageStats {
        let used = self.used_bytes();
        let cell = self.session_bytes(1, &self.shape.layers).max(1);
        let tensors: u64 = self.layers.iter().map(|layer| layer.model.bytes()).sum();
        StageStats {
            sessions: self.sessions.len() as u32,
            kv_bytes: used,
            kv_bytes_max: self.options.kv_bytes_max,
            free_cells: self.options.kv_bytes_max.saturating_sub(used) / cell,
            tensor_bytes: tensors + self.embedding.as_ref().map_or(0, |e| e.bytes.len() as u64),
            steps: self.steps,
            rows: self.rows,
        }
    }
}
