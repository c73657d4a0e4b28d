//! What a model is made of, from its header alone.
//!
//! Everything llama.cpp would assert on (and abort the process) is checked
//! here, before it sees anything.

mod stage_file;

use std::collections::BTreeMap;

use gguf::{Array, GgufError, Header, TensorInfo, TensorType, Value};

pub(crate) use stage_file::{Fill, StageFile};

use crate::Pooling;
use crate::arch::{
    self, Arch, EmbeddingScale, HEAD_TENSORS, PER_LAYER_KEYS, SHARED_TENSORS, Window,
};
use crate::experts::is_expert;

/// Most layers: llama.cpp's tables end there.
const LAYERS_MAX: u32 = 512;
/// Most experts: llama.cpp's tables end there.
const EXPERTS_MAX: u32 = 1024;
/// Largest dimension believed: ten times the largest known.
const DIM_MAX: u32 = 1 << 20;
/// Largest vocabulary believed: ten times the largest known.
const VOCAB_MAX: u64 = 1 << 22;
/// Longest context believed.
const CTX_MAX: u32 = 1 << 27;
/// Bytes of a KV value: f16.
const KV_VALUE_BYTES: u64 = 2;
/// llama.cpp pads contexts to this.
const CTX_PAD: u32 = 256;

const EMBEDDING: &str = "token_embd.weight";
const OUTPUT: &str = "output.weight";

/// Why a model is not run.
#[derive(Debug, thiserror::Error)]
pub enum UnsupportedModel {
    /// Not in the table.
    #[error("architecture `{arch}` is not known to be exact when cut; supported are {supported}")]
    Arch {
        /// The model's.
        arch: String,
        /// The table.
        supported: String,
    },
    /// In the table, but not with so many layers.
    #[error(
        "architecture `{arch}` with {n_layer} layers computes differently than its layers alone"
    )]
    LayerCount {
        /// The model's.
        arch: &'static str,
        /// The model's.
        n_layer: u32,
    },
    /// A key is missing or of the wrong type.
    #[error(transparent)]
    Header(#[from] GgufError),
    /// A key's value cannot be, or is not known to be exact when cut.
    #[error("key `{key}`: {why}")]
    Key {
        /// Which.
        key: String,
        /// What is wrong.
        why: String,
    },
    /// A tensor is missing, unknown or of the wrong shape.
    #[error("tensor `{name}`: {why}")]
    Tensor {
        /// Which.
        name: String,
        /// What is wrong.
        why: String,
    },
}

/// A model's dimensions and tensors, ready to be cut between any two layers.
#[derive(Clone, Debug)]
pub struct Blueprint {
    arch: &'static Arch,
    n_layer: u32,
    n_embd: u32,
    n_vocab: u32,
    n_ff: u64,
    n_expert_used: u32,
    n_ctx_train: u32,
    n_ctx_orig: u32,
    rope_by_context: bool,
    embedding_scale: f32,
    kv_cell_bytes: Vec<u64>,
    /// Keys of stage files but those that differ by layer.
    kv: Vec<(String, Value)>,
    /// Per-layer arrays, by key.
    arrays: Vec<(String, Array)>,
    /// Whether each layer's attention is local, where there are windows.
    local: Option<Vec<bool>>,
    layers: Vec<Vec<TensorInfo>>,
    shared: Vec<TensorInfo>,
    embedding: TensorInfo,
    head: Vec<TensorInfo>,
    tied: bool,
    /// Its experts are computed elsewhere.
    trunk: bool,
}

impl Blueprint {
    /// Reads a model's header: all key-values but perhaps the tokenizer's, and
    /// every tensor.
    ///
    /// # Errors
    /// Architectures and dimensions not known to be exact when cut, and
    /// headers that do not fit together.
    pub fn new(header: &Header) -> Result<Blueprint, UnsupportedModel> {
        let name = header.get_str("general.architecture")?;
        let arch = arch::find(name).ok_or_else(|| UnsupportedModel::Arch {
            arch: name.chars().take(64).collect(),
            supported: arch::names(),
        })?;
        let keys = Keys { header, arch };
        let n_layer = keys.dim("block_count", LAYERS_MAX)?;
        if arch.refused_layer_counts.contains(&n_layer) {
            return Err(UnsupportedModel::LayerCount {
                arch: arch.name,
                n_layer,
            });
        }
        let n_embd = keys.dim("embedding_length", DIM_MAX)?;
        let n_ctx_train = keys.dim("context_length", CTX_MAX)?;
        let n_ctx_orig = keys
            .optional("rope.scaling.original_context_length")?
            .unwrap_or(n_ctx_train)
            .clamp(1, CTX_MAX);
        keys.refuse_what_is_not_decoding()?;
        let n_expert_used = keys.check_experts()?;
        keys.check_rope_scaling()?;
        let kv_cell_bytes = keys.attention(n_layer, n_embd)?;
        let tensors = Tensors::sort(header, n_layer, n_embd)?;
        let n_vocab = tensors.embedding.dims[1] as u32;
        keys.check_vocab(n_vocab)?;
        let (kv, arrays) = keys.stage_keys(n_layer)?;
        let tied = !tensors.head.iter().any(|t| t.name == OUTPUT);
        let long = |t: &TensorInfo| t.name.starts_with("rope_factors_");
        Ok(Blueprint {
            arch,
            n_layer,
            n_embd,
            n_vocab,
            n_ff: keys.feed_forward(n_layer, n_expert_used)?,
            n_expert_used,
            n_ctx_train,
            n_ctx_orig,
            rope_by_context: tensors.shared.iter().any(long),
            embedding_scale: keys.embedding_scale(n_embd)?,
            kv_cell_bytes,
            kv,
            arrays,
            local: keys.local_layers(n_layer)?,
            layers: tensors.layers,
            shared: tensors.shared,
            embedding: tensors.embedding,
            head: tensors.head,
            tied,
            trunk: false,
        })
    }

    /// The same without the experts, for [`crate::Loaded::read_trunk`]: its layers have as many bytes less, and each
    /// is a group of its own.
    pub fn without_experts(&self) -> Blueprint {
        Blueprint {
            trunk: true,
            ..self.clone()
        }
    }

    /// Whether its experts are computed elsewhere.
    pub fn is_trunk(&self) -> bool {
        self.trunk
    }

    /// The architecture, as `general.architecture` has it.
    pub fn arch(&self) -> &str {
        self.arch.name
    }

    /// Layers.
    pub fn n_layer(&self) -> u32 {
        self.n_layer
    }

    /// Floats in a hidden row.
    pub fn n_embd(&self) -> u32 {
        self.n_embd
    }

    /// Tokens in the vocabulary.
    pub fn n_vocab(&self) -> u32 {
        self.n_vocab
    }

    /// Context the model was trained on.
    pub fn n_ctx_train(&self) -> u32 {
        self.n_ctx_train
    }

    /// Bytes of layer `i`'s tensors; 0 for a layer that is not there.
    pub fn layer_bytes(&self, i: u32) -> u64 {
        let held = |tensor: &&TensorInfo| !self.trunk || !is_expert(&tensor.name);
        self.layers
            .get(i as usize)
            .map_or(0, |tensors| sum(tensors.iter().filter(held)))
    }

    /// Bytes that holding layer 0 adds: the embedding.
    pub fn embedding_bytes(&self) -> u64 {
        self.embedding.n_bytes().unwrap_or(0)
    }

    /// Bytes that holding the last layer adds: final norm and head.
    pub fn head_bytes(&self) -> u64 {
        sum(&self.head) + if self.tied { self.embedding_bytes() } else { 0 }
    }

    /// Bytes of KV that one position of layer `i` takes.
    pub fn kv_cell_bytes(&self, i: u32) -> u64 {
        self.kv_cell_bytes.get(i as usize).copied().unwrap_or(0)
    }

    /// The context size allocated for a session of `n_ctx`: a power of two, so
    /// that contexts can be reused, and the same on every hop of a session.
    pub fn context_class(&self, n_ctx: u32) -> u32 {
        let class = n_ctx.clamp(CTX_PAD, CTX_MAX).next_power_of_two();
        let short = self.n_ctx_orig / CTX_PAD * CTX_PAD;
        if self.rope_by_context && n_ctx <= short {
            // Beyond this size the long rope factors apply.
            return class.min(short);
        }
        class
    }

    /// Whether the rope depends on the context's size.
    pub(crate) fn rope_by_context(&self) -> bool {
        self.rope_by_context
    }

    /// The token embedding: rows of `n_embd`, `n_vocab` of them.
    pub(crate) fn embedding(&self) -> &TensorInfo {
        &self.embedding
    }

    /// Whether rows in one call get the same bits as one by one, by the kernels of this build: seen in calls of
    /// less than 64 rows of these types, not of the K quants.
    pub fn rows_are_exact(&self) -> bool {
        let layers = self.layers.iter().flatten();
        let mut all = layers.chain(&self.shared).chain(&self.head);
        let exact =
            |t: &TensorInfo| matches!(t.ty, TensorType::F32 | TensorType::Q8_0 | TensorType::Q4_0);
        all.all(exact) && exact(&self.embedding)
    }

    /// Floats of a row inside the widest feed-forward part, in all the experts
    /// it meets.
    pub(crate) fn n_ff(&self) -> u64 {
        self.n_ff
    }

    /// Experts that a row meets; 0 without experts.
    pub(crate) fn n_expert_used(&self) -> u32 {
        self.n_expert_used
    }

    /// Whether layers may have windows: llama.cpp then keeps two tables of cells.
    pub(crate) fn has_windows(&self) -> bool {
        self.local.is_some()
    }

    /// What embeddings are multiplied by before layer 0; 1 is nothing.
    pub(crate) fn embedding_scale(&self) -> f32 {
        self.embedding_scale
    }
}

fn sum<'a>(tensors: impl IntoIterator<Item = &'a TensorInfo>) -> u64 {
    tensors.into_iter().map(|t| t.n_bytes().unwrap_or(0)).sum()
}

fn bad_tensor(name: &str, why: impl Into<String>) -> UnsupportedModel {
    UnsupportedModel::Tensor {
        name: name.into(),
        why: why.into(),
    }
}

/// The model's tensors by what reads them.
struct Tensors {
    layers: Vec<Vec<TensorInfo>>,
    shared: Vec<TensorInfo>,
    embedding: TensorInfo,
    head: Vec<TensorInfo>,
}

impl Tensors {
    fn sort(header: &Header, n_layer: u32, n_embd: u32) -> Result<Tensors, UnsupportedModel> {
        let mut by_layer: BTreeMap<u32, Vec<TensorInfo>> = BTreeMap::new();
        let (mut shared, mut head, mut embedding) = (Vec::new(), Vec::new(), None);
        for tensor in &header.tensors {
            tensor.n_bytes()?;
            let name = tensor.name.as_str();
            if let Some(rest) = name.strip_prefix("blk.") {
                let index = rest
                    .split('.')
                    .next()
                    .and_then(|index| index.parse::<u32>().ok());
                match index {
                    // `blk.007.x` would not be found again under its own name.
                    Some(index) if index < n_layer && rest.starts_with(&format!("{index}.")) => {
                        by_layer.entry(index).or_default().push(tensor.clone());
                    }
                    _ => return Err(bad_tensor(name, format!("the model has {n_layer} layers"))),
                }
            } else if name == EMBEDDING {
                embedding = Some(tensor.clone());
            } else if name == OUTPUT || HEAD_TENSORS.contains(&name) {
                head.push(tensor.clone());
            } else if SHARED_TENSORS.contains(&name) {
                shared.push(tensor.clone());
            } else {
                return Err(bad_tensor(name, "not known to this engine"));
            }
        }
        let embedding = embedding.ok_or_else(|| bad_tensor(EMBEDDING, "missing"))?;
        let n_vocab = check_matrix(&embedding, n_embd)?;
        if let Some(output) = head.iter().find(|t| t.name == OUTPUT)
            && check_matrix(output, n_embd)? != n_vocab
        {
            return Err(bad_tensor(
                OUTPUT,
                format!("it does not have {n_vocab} rows"),
            ));
        }
        if !head.iter().any(|t| t.name == "output_norm.weight") {
            return Err(bad_tensor("output_norm.weight", "missing"));
        }
        if let Some(i) = (0..n_layer).find(|i| !by_layer.contains_key(i)) {
            return Err(bad_tensor(&format!("blk.{i}"), "the layer has no tensors"));
        }
        Ok(Tensors {
            layers: by_layer.into_values().collect(),
            shared,
            embedding,
            head,
        })
    }
}

fn check_matrix(tensor: &TensorInfo, n_embd: u32) -> Result<u64, UnsupportedModel> {
    match tensor.dims[..] {
        [row, rows] if row == u64::from(n_embd) && rows <= VOCAB_MAX => Ok(rows),
        _ => {
            let why = format!("{:?} is not {n_embd} by at most {VOCAB_MAX}", tensor.dims);
            Err(bad_tensor(&tensor.name, why))
        }
    }
}

/// The architecture's keys of a header.
struct Keys<'a> {
    header: &'a Header,
    arch: &'static Arch,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.arch.name)
    }

    fn bad(&self, key: &str, why: impl Into<String>) -> UnsupportedModel {
        UnsupportedModel::Key {
            key: self.key(key),
            why: why.into(),
        }
    }

    fn dim(&self, key: &str, max: u32) -> Result<u32, UnsupportedModel> {
        let value = self.header.get_u32(&self.key(key))?;
        if value == 0 || value > max {
            return Err(self.bad(key, format!("{value}, 1 to {max} is possible")));
        }
        Ok(value)
    }

    fn optional(&self, key: &str) -> Result<Option<u32>, UnsupportedModel> {
        let key = self.key(key);
        match self.header.get(&key) {
            None => Ok(None),
            Some(_) => Ok(Some(self.header.get_u32(&key)?)),
        }
    }

    /// One value per layer, from a number or an array of them.
    fn per_layer(&self, key: &str, n_layer: u32) -> Result<Option<Vec<u32>>, UnsupportedModel> {
        match self.header.get(&self.key(key)) {
            None => Ok(None),
            Some(Value::Array(array)) => {
                if array.len() != n_layer as usize {
                    return Err(self.bad(key, format!("{} values, not {n_layer}", array.len())));
                }
                (0..array.len())
                    .map(|i| array.get(i)?.as_u64()?.try_into().ok())
                    .collect::<Option<_>>()
                    .map(Some)
                    .ok_or_else(|| self.bad(key, "not an array of unsigned numbers"))
            }
            Some(_) => Ok(self
                .optional(key)?
                .map(|value| vec![value; n_layer as usize])),
        }
    }

    fn feed_forward(&self, n_layer: u32, n_expert_used: u32) -> Result<u64, UnsupportedModel> {
        let plain = self.widest("feed_forward_length", n_layer)?;
        if n_expert_used == 0 {
            return Ok(plain);
        }
        let expert = match self.widest("expert_feed_forward_length", n_layer)? {
            0 => plain,
            expert => expert,
        };
        let shared = self.widest("expert_shared_feed_forward_length", n_layer)?;
        Ok(plain.max(expert * u64::from(n_expert_used) + shared))
    }

    /// The largest of one value per layer; 0 where there is none.
    fn widest(&self, key: &str, n_layer: u32) -> Result<u64, UnsupportedModel> {
        let widths = self.per_layer(key, n_layer)?.unwrap_or_default();
        match widths.iter().max() {
            Some(&width) if width > DIM_MAX => {
                Err(self.bad(key, format!("{width}, at most {DIM_MAX}")))
            }
            width => Ok(width.copied().unwrap_or(0).into()),
        }
    }

    fn refuse_what_is_not_decoding(&self) -> Result<(), UnsupportedModel> {
        Pooling::of(self.header, self.arch.name)
            .map_err(|error| self.bad("pooling_type", error.to_string()))?;
        for key in [
            "embedding_length_out",
            "nextn_predict_layers",
            "leading_dense_block_count",
        ] {
            if self.optional(key)?.is_some_and(|value| value != 0) {
                return Err(self.bad(key, "not supported but as 0"));
            }
        }
        let key = self.key("attention.causal");
        if self.header.get(&key).is_some() && !self.header.get_bool(&key)? {
            return Err(self.bad("attention.causal", "only causal attention is supported"));
        }
        Ok(())
    }

    /// Checks what is said of experts; gives how many of them a row meets.
    fn check_experts(&self) -> Result<u32, UnsupportedModel> {
        let n_expert = self.optional("expert_count")?.unwrap_or(0);
        if n_expert > EXPERTS_MAX {
            return Err(self.bad("expert_count", format!("{n_expert}, at most {EXPERTS_MAX}")));
        }
        let used = self.optional("expert_used_count")?.unwrap_or(0);
        if used > n_expert || (n_expert > 0 && used == 0) {
            return Err(self.bad("expert_used_count", format!("{used} of {n_expert} experts")));
        }
        for key in ["expert_group_count", "expert_group_used_count"] {
            if self.optional(key)?.unwrap_or(0) > 1 {
                return Err(self.bad(key, "groups of experts are not supported"));
            }
        }
        Ok(used)
    }

    fn check_rope_scaling(&self) -> Result<(), UnsupportedModel> {
        let key = self.key("rope.scaling.type");
        if self.header.get(&key).is_some() {
            let kind = self.header.get_str(&key)?;
            if !["none", "linear", "yarn", "longrope"].contains(&kind) {
                return Err(self.bad("rope.scaling.type", "none of none, linear, yarn, longrope"));
            }
        }
        Ok(())
    }

    /// Bytes of a KV cell of each layer; checks the heads on the way.
    fn attention(&self, n_layer: u32, n_embd: u32) -> Result<Vec<u64>, UnsupportedModel> {
        let missing = || self.bad("attention.head_count", "missing");
        let heads = self
            .per_layer("attention.head_count", n_layer)?
            .ok_or_else(missing)?;
        let heads_kv = self.per_layer("attention.head_count_kv", n_layer)?;
        let heads_kv = heads_kv.unwrap_or_else(|| heads.clone());
        for (&n, &n_kv) in heads.iter().zip(&heads_kv) {
            if n == 0 || n_kv == 0 || n > DIM_MAX || n % n_kv != 0 {
                let why = format!("{n} heads on {n_kv} of keys cannot be");
                return Err(self.bad("attention.head_count", why));
            }
        }
        // llama.cpp derives the width of heads from layer 0.
        let width = n_embd / heads.first().copied().unwrap_or(1).max(1);
        let key = self.optional("attention.key_length")?.unwrap_or(width);
        let value = self.optional("attention.value_length")?.unwrap_or(width);
        let rope = self.optional("rope.dimension_count")?.unwrap_or(key);
        for (name, dim) in [
            ("attention.key_length", key),
            ("attention.value_length", value),
        ] {
            if dim == 0 || dim > DIM_MAX {
                return Err(self.bad(name, format!("{dim}, 1 to {DIM_MAX} is possible")));
            }
        }
        if key != value || rope > key || rope == 0 || rope % 2 != 0 {
            let why = format!("{rope} with keys of {key} and values of {value} cannot be");
            return Err(self.bad("rope.dimension_count", why));
        }
        if self.arch.rope_spans_head && rope != key {
            return Err(self.bad("rope.dimension_count", format!("{rope}, must be {key}")));
        }
        for other in ["attention.key_length_swa", "attention.value_length_swa"] {
            if self.optional(other)?.is_some_and(|dim| dim != key) {
                return Err(self.bad(other, "windows with heads of their own are not supported"));
            }
        }
        let cell = u64::from(key + value) * KV_VALUE_BYTES;
        Ok(heads_kv
            .iter()
            .map(|&n_kv| u64::from(n_kv) * cell)
            .collect())
    }

    fn check_vocab(&self, n_vocab: u32) -> Result<(), UnsupportedModel> {
        if let Some(size) = self.optional("vocab_size")?
            && size != n_vocab
        {
            return Err(self.bad("vocab_size", format!("{size}, the embedding has {n_vocab}")));
        }
        match self
            .header
            .get("tokenizer.ggml.tokens")
            .and_then(Value::as_array)
        {
            Some(tokens) if !tokens.is_empty() && tokens.len() != n_vocab as usize => {
                Err(UnsupportedModel::Key {
                    key: "tokenizer.ggml.tokens".into(),
                    why: format!("{} tokens, the embedding has {n_vocab}", tokens.len()),
                })
            }
            _ => Ok(()),
        }
    }

    fn embedding_scale(&self, n_embd: u32) -> Result<f32, UnsupportedModel> {
        let key = self.key("embedding_scale");
        match self.arch.embedding_scale {
            EmbeddingScale::None => Ok(1.0),
            EmbeddingScale::Root => Ok((n_embd as f32).sqrt()),
            EmbeddingScale::Key if self.header.get(&key).is_none() => Ok(1.0),
            EmbeddingScale::Key => match self.header.get_f32(&key)? {
                0.0 => Ok(1.0),
                scale if scale.is_finite() => Ok(scale),
                scale => Err(self.bad("embedding_scale", format!("{scale}"))),
            },
        }
    }

    /// Which layers have a sliding window, if any may have one.
    fn local_layers(&self, n_layer: u32) -> Result<Option<Vec<bool>>, UnsupportedModel> {
        let window = self.optional("attention.sliding_window")?;
        let period = match self.arch.window {
            Window::None => return Ok(None),
            Window::Pattern { .. } if window.unwrap_or(0) == 0 => return Ok(None),
            Window::Pattern { period } => period,
        };
        let key = "attention.sliding_window_pattern";
        if let Some(Value::Array(array)) = self.header.get(&self.key(key)) {
            let local = |i| match array.get(i)? {
                Value::Bool(local) => Some(local),
                other => other.as_u64().map(|local| local != 0),
            };
            if array.len() != n_layer as usize {
                return Err(self.bad(key, format!("{} values, not {n_layer}", array.len())));
            }
            let local: Option<Vec<_>> = (0..array.len()).map(local).collect();
            return local
                .map(Some)
                .ok_or_else(|| self.bad(key, "neither bools nor numbers"));
        }
        let period = self.optional(key)?.unwrap_or(period);
        // As llama.cpp: a period of zero makes every layer local.
        Ok(Some(
            (0..n_layer)
                .map(|i| period == 0 || i % period < period - 1)
                .collect(),
        ))
    }

    /// The keys of stage files: scalars as they are, arrays to be sliced.
    #[allow(clippy::type_complexity)]
    fn stage_keys(
        &self,
        n_layer: u32,
    ) -> Result<(Vec<(String, Value)>, Vec<(String, Array)>), UnsupportedModel> {
        let mut kv = vec![
            ("general.architecture".into(), self.arch.name.into()),
            ("tokenizer.ggml.model".into(), "none".into()),
        ];
        let mut arrays = Vec::new();
        let prefix = self.key("");
        for (key, value) in &self.header.kv {
            let Some(name) = key.strip_prefix(&prefix) else {
                continue;
            };
            match name {
                "block_count" | "vocab_size" | "embedding_scale" | "pooling_type" => {}
                "attention.sliding_window_pattern" => {}
                _ => match value {
                    Value::Array(array) if array.len() != n_layer as usize => {
                        return Err(self.bad(name, format!("{} values", array.len())));
                    }
                    Value::Array(array) if PER_LAYER_KEYS.contains(&name) => {
                        arrays.push((key.clone(), array.clone()));
                    }
                    Value::Array(_) => {
                        return Err(self.bad(name, "not known to hold one value per layer"));
                    }
                    Value::F32(v) if !v.is_finite() => return Err(self.bad(name, "not finite")),
                    scalar => kv.push((key.clone(), scalar.clone())),
                },
            }
        }
        Ok((kv, arrays))
    }
}
