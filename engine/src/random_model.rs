//! Models of random weights, for tests and benches: real architectures, real
//! files, no meaning. Also llama.cpp's quantiser, for the same purpose.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use gguf::{GgufError, Header, TensorInfo, TensorType, Text, Value};

use crate::llama;

mod mixtures;

/// Distinct rows in a tensor; longer ones repeat them in random order, so that
/// a billion weights take seconds and no memory.
const ROWS_DISTINCT: u64 = 256;
/// Tokens of the byte tokenizer: three special ones, every byte and the space.
const BYTE_TOKENS: u32 = 260;

/// Dimensions of a random model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RandomShape {
    /// Layers.
    pub n_layer: u32,
    /// Floats in a hidden row.
    pub n_embd: u32,
    /// Width of the feed-forward part (of each expert, where there are some).
    pub n_ff: u32,
    /// Heads.
    pub n_head: u32,
    /// Heads of keys and values.
    pub n_head_kv: u32,
    /// Width of a head; usually `n_embd / n_head`.
    pub head_dim: u32,
    /// Tokens. From 260 on the file has a tokenizer of bytes.
    pub n_vocab: u32,
    /// Context it claims to be trained on.
    pub n_ctx_train: u32,
    /// Experts; 0 for a dense model, where the architecture has both.
    pub n_expert: u32,
    /// Experts used per token.
    pub n_expert_used: u32,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Sliding window of architectures that have one; 0 for none.
    pub window: u32,
    /// Whether gate and up of an expert are one matrix.
    pub gate_up: bool,
    /// Whether experts' matrices have scales.
    pub scales: bool,
    /// `<arch>.pooling_type`, of models that embed text; 0 for none.
    pub pooling: u32,
}

impl RandomShape {
    /// A model of some hundred kilobytes; rows are multiples of 256, so that
    /// every quantisation applies.
    pub fn tiny() -> RandomShape {
        RandomShape {
            n_layer: 3,
            n_embd: 256,
            n_ff: 256,
            n_head: 8,
            n_head_kv: 4,
            head_dim: 32,
            n_vocab: 320,
            n_ctx_train: 1024,
            n_expert: 0,
            n_expert_used: 0,
            tied: false,
            window: 0,
            gate_up: false,
            scales: false,
            pooling: 0,
        }
    }

    /// The shape of Llama 3.2 1B with a vocabulary of 32 000: 1.1 billion
    /// weights.
    pub fn one_billion() -> RandomShape {
        RandomShape {
            n_layer: 16,
            n_embd: 2048,
            n_ff: 8192,
            n_head: 32,
            n_head_kv: 8,
            head_dim: 64,
            n_vocab: 32_000,
            n_ctx_train: 8192,
            n_expert: 0,
            n_expert_used: 0,
            tied: true,
            window: 0,
            gate_up: false,
            scales: false,
            pooling: 0,
        }
    }

    /// The shape of the demo model.
    pub fn demo() -> RandomShape {
        RandomShape {
            n_layer: 8,
            n_embd: 256,
            n_ff: 768,
            n_head: 8,
            n_head_kv: 4,
            head_dim: 32,
            n_vocab: 4096,
            n_ctx_train: 1024,
            n_expert: 0,
            n_expert_used: 0,
            tied: true,
            window: 0,
            gate_up: false,
            scales: false,
            pooling: 0,
        }
    }
}

/// Types of a random model's matrices; vectors are f32 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RandomWeights {
    /// One type; f32 where a row is not whole blocks.
    One(TensorType),
    /// As llama.cpp's Q4_K_M: Q4_K with some Q6_K.
    Q4KM,
}

/// Why a random model was not written.
#[derive(Debug, thiserror::Error)]
pub enum RandomModelError {
    /// No generator for it.
    #[error("no random models of architecture `{0}`")]
    Arch(String),
    /// The header does not come together.
    #[error(transparent)]
    Header(#[from] GgufError),
    /// The file could not be written.
    #[error("writing the random model")]
    Io(#[from] io::Error),
    /// ggml refused.
    #[error("quantising: {0}")]
    Quantize(String),
}

/// A file type of llama.cpp's quantiser.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantType {
    /// Not quantised at all.
    F32,
    /// Eight bits, blocks of 32.
    Q8_0,
    /// Four bits, blocks of 32.
    Q4_0,
    /// Four bits, blocks of 256, some tensors six.
    Q4KM,
}

/// Quantises a GGUF with llama.cpp.
///
/// # Errors
/// What llama.cpp logged.
pub fn quantize(input: &Path, output: &Path, ty: QuantType) -> Result<(), RandomModelError> {
    let ftype = match ty {
        QuantType::F32 => 0,
        QuantType::Q4_0 => 2,
        QuantType::Q8_0 => 7,
        QuantType::Q4KM => 15,
    };
    llama::quantize_file(input, output, ftype).map_err(RandomModelError::Quantize)
}

/// Writes a GGUF of architecture `arch` with random weights that `seed` names.
///
/// # Errors
/// An architecture without a generator, a shape that cannot be, a full disk.
pub fn random_model(
    arch: &str,
    shape: &RandomShape,
    weights: RandomWeights,
    seed: u64,
    path: &Path,
) -> Result<(), RandomModelError> {
    let traits = ArchTraits::of(arch).ok_or_else(|| RandomModelError::Arch(arch.into()))?;
    let mut plan = Plan {
        shape,
        traits,
        weights,
        tensors: Vec::new(),
    };
    plan.model();
    let tensors = plan.tensors;
    let header = Header::new(gguf::ALIGNMENT_DEFAULT, keys(arch, shape, &traits), tensors)?;
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    header.write(&mut file)?;
    let mut rows = RowPool {
        rng: Rng(seed),
        pools: HashMap::new(),
    };
    for tensor in &header.tensors {
        rows.write(tensor, &mut file)?;
        let padding = header.padding(tensor.n_bytes()?);
        file.write_all(&vec![0; padding as usize])?;
    }
    file.flush()?;
    Ok(())
}

/// What distinguishes the tensors of an architecture.
#[derive(Clone, Copy)]
struct ArchTraits {
    qkv_bias: bool,
    qkv_fused: bool,
    /// Norms of queries and keys: per head, or over all heads.
    qk_norm: Option<QkNorm>,
    norms_before: bool,
    norms_after: bool,
    moe: bool,
    shared_expert: bool,
    gated_in_up: bool,
    /// deepseek2's attention, and its shared experts without a gate of their own.
    mla: bool,
    /// gpt-oss: biases everywhere, sinks, and its name for the second norm.
    biases: bool,
    rope_factors: RopeFactors,
}

#[derive(Clone, Copy)]
enum QkNorm {
    Head,
    All,
}

#[derive(Clone, Copy, PartialEq)]
enum RopeFactors {
    None,
    One,
    LongShort,
}

impl ArchTraits {
    fn of(arch: &str) -> Option<ArchTraits> {
        let plain = ArchTraits {
            qkv_bias: false,
            qkv_fused: false,
            qk_norm: None,
            norms_before: true,
            norms_after: false,
            moe: false,
            shared_expert: false,
            gated_in_up: false,
            mla: false,
            biases: false,
            rope_factors: RopeFactors::None,
        };
        Some(match arch {
            "llama" => ArchTraits {
                rope_factors: RopeFactors::One,
                ..plain
            },
            "mistral3" | "granite" => plain,
            "qwen2" => ArchTraits {
                qkv_bias: true,
                ..plain
            },
            "qwen2moe" => ArchTraits {
                qkv_bias: true,
                moe: true,
                shared_expert: true,
                ..plain
            },
            "qwen3" => ArchTraits {
                qk_norm: Some(QkNorm::Head),
                ..plain
            },
            "qwen3moe" => ArchTraits {
                qk_norm: Some(QkNorm::Head),
                moe: true,
                ..plain
            },
            "gemma3" => ArchTraits {
                qk_norm: Some(QkNorm::Head),
                norms_after: true,
                ..plain
            },
            "phi3" => ArchTraits {
                qkv_fused: true,
                gated_in_up: true,
                rope_factors: RopeFactors::LongShort,
                ..plain
            },
            "olmo2" => ArchTraits {
                qk_norm: Some(QkNorm::All),
                norms_before: false,
                norms_after: true,
                ..plain
            },
            "olmoe" => ArchTraits {
                qk_norm: Some(QkNorm::All),
                moe: true,
                ..plain
            },
            _ => return mixtures::traits(arch, plain),
        })
    }
}

fn keys(arch: &str, shape: &RandomShape, traits: &ArchTraits) -> Vec<(String, Value)> {
    let mut kv: Vec<(String, Value)> = vec![
        ("general.architecture".into(), arch.into()),
        ("general.name".into(), "random".into()),
    ];
    let mut key = |name: &str, value: Value| kv.push((format!("{arch}.{name}"), value));
    key("context_length", shape.n_ctx_train.into());
    key("embedding_length", shape.n_embd.into());
    key("block_count", shape.n_layer.into());
    key("feed_forward_length", shape.n_ff.into());
    key("attention.head_count", shape.n_head.into());
    // deepseek2's keys and values are one row for all heads.
    let n_head_kv = if traits.mla { 1 } else { shape.n_head_kv };
    key("attention.head_count_kv", n_head_kv.into());
    if !traits.mla {
        key("attention.key_length", shape.head_dim.into());
        key("attention.value_length", shape.head_dim.into());
    }
    key("attention.layer_norm_rms_epsilon", 1e-6f32.into());
    let rope = if traits.mla {
        mixtures::ROPE
    } else {
        shape.head_dim
    };
    key("rope.dimension_count", rope.into());
    key("rope.freq_base", 10_000f32.into());
    key("vocab_size", shape.n_vocab.into());
    if shape.n_expert > 0 {
        key("expert_count", shape.n_expert.into());
        key("expert_used_count", shape.n_expert_used.into());
        if traits.moe {
            key("expert_feed_forward_length", shape.n_ff.into());
        }
        if traits.shared_expert {
            key("expert_shared_feed_forward_length", shape.n_ff.into());
        }
    }
    if shape.pooling > 0 {
        key("pooling_type", shape.pooling.into());
    }
    if shape.window > 0 {
        key("attention.sliding_window", shape.window.into());
    }
    match arch {
        "deepseek2" => mixtures::mla_keys(shape, &mut key),
        "granite" => {
            key("logit_scale", 8f32.into());
            key("residual_scale", 0.22f32.into());
            key("embedding_scale", 12f32.into());
            key("attention.scale", 0.015625f32.into());
        }
        "mistral3" => {
            key("attention.temperature_scale", 0.1f32.into());
            key("rope.scaling.original_context_length", 16u32.into());
        }
        "phi3" => key("rope.scaling.original_context_length", 512u32.into()),
        _ => {}
    }
    kv.extend(tokenizer(shape.n_vocab));
    kv
}

fn tokenizer(n_vocab: u32) -> Vec<(String, Value)> {
    let key = |name: &str, value: Value| (format!("tokenizer.ggml.{name}"), value);
    if n_vocab < BYTE_TOKENS {
        return vec![key("model", "none".into())];
    }
    let mut tokens: Vec<Text> = ["<unk>", "<s>", "</s>"].map(Text::from).to_vec();
    tokens.extend((0..256).map(|byte| Text::from(format!("<0x{byte:02X}>"))));
    tokens.push(Text::from("\u{2581}"));
    tokens.extend((BYTE_TOKENS..n_vocab).map(|id| Text::from(format!("\u{2581}t{id}"))));
    let types: Vec<i32> = (0..n_vocab)
        .map(|id| match id {
            0 => 2,
            1 | 2 => 3,
            3..=258 => 6,
            _ => 1,
        })
        .collect();
    let scores: Vec<f32> = (0..n_vocab).map(|id| -(id as f32)).collect();
    vec![
        key("model", "llama".into()),
        key("tokens", tokens.into()),
        key("scores", scores.into()),
        key("token_type", types.into()),
        key("bos_token_id", 1u32.into()),
        key("eos_token_id", 2u32.into()),
        key("unknown_token_id", 0u32.into()),
    ]
}

/// Collects a model's tensors.
struct Plan<'a> {
    shape: &'a RandomShape,
    traits: ArchTraits,
    weights: RandomWeights,
    tensors: Vec<TensorInfo>,
}

impl Plan<'_> {
    fn push(&mut self, name: String, dims: &[u32], ty: TensorType) {
        let dims: Vec<u64> = dims.iter().map(|&dim| dim.into()).collect();
        let ty = if ty.row_bytes(dims[0]).is_some() {
            ty
        } else {
            TensorType::F32
        };
        self.tensors.push(TensorInfo {
            name,
            dims,
            ty,
            offset: 0,
        });
    }

    fn vector(&mut self, name: String, n: u32) {
        self.push(name, &[n], TensorType::F32);
    }

    fn matrix(&mut self, name: String, dims: &[u32], more_bits: bool) {
        let ty = match self.weights {
            RandomWeights::One(ty) => ty,
            RandomWeights::Q4KM if more_bits => TensorType::Q6K,
            RandomWeights::Q4KM => TensorType::Q4K,
        };
        self.push(name, dims, ty);
    }

    fn model(&mut self) {
        let RandomShape {
            n_embd,
            n_vocab,
            head_dim,
            n_layer,
            ..
        } = *self.shape;
        self.matrix("token_embd.weight".into(), &[n_embd, n_vocab], true);
        self.vector("output_norm.weight".into(), n_embd);
        if !self.shape.tied {
            self.matrix("output.weight".into(), &[n_embd, n_vocab], true);
        }
        match self.traits.rope_factors {
            RopeFactors::None => {}
            RopeFactors::One => self.vector("rope_freqs.weight".into(), head_dim / 2),
            RopeFactors::LongShort => {
                self.vector("rope_factors_long.weight".into(), head_dim / 2);
                self.vector("rope_factors_short.weight".into(), head_dim / 2);
            }
        }
        for i in 0..n_layer {
            self.attention(i);
            self.feed_forward(i);
        }
    }

    fn attention(&mut self, i: u32) {
        let RandomShape {
            n_embd,
            n_head,
            n_head_kv,
            head_dim,
            n_layer,
            ..
        } = *self.shape;
        let (q, kv) = (n_head * head_dim, n_head_kv * head_dim);
        let name = |part: &str| format!("blk.{i}.{part}");
        let more = i < n_layer / 8 || i % 3 == 2;
        if self.traits.norms_before {
            self.vector(name("attn_norm.weight"), n_embd);
        }
        if self.traits.mla {
            return self.mla_attention(i);
        }
        if self.traits.qkv_fused {
            self.matrix(name("attn_qkv.weight"), &[n_embd, q + 2 * kv], false);
        } else {
            for (part, n) in [("attn_q", q), ("attn_k", kv), ("attn_v", kv)] {
                let more = more && part == "attn_v";
                self.matrix(name(&format!("{part}.weight")), &[n_embd, n], more);
                if self.traits.qkv_bias {
                    self.vector(name(&format!("{part}.bias")), n);
                }
            }
        }
        match self.traits.qk_norm {
            None => {}
            Some(QkNorm::Head) => {
                self.vector(name("attn_q_norm.weight"), head_dim);
                self.vector(name("attn_k_norm.weight"), head_dim);
            }
            Some(QkNorm::All) => {
                self.vector(name("attn_q_norm.weight"), q);
                self.vector(name("attn_k_norm.weight"), kv);
            }
        }
        self.matrix(name("attn_output.weight"), &[q, n_embd], false);
        if self.traits.biases {
            self.vector(name("attn_output.bias"), n_embd);
            self.vector(name("attn_sinks.weight"), n_head);
            return self.vector(name("post_attention_norm.weight"), n_embd);
        }
        if self.traits.norms_after {
            self.vector(name("post_attention_norm.weight"), n_embd);
            self.vector(name("post_ffw_norm.weight"), n_embd);
        }
        if self.traits.norms_before {
            self.vector(name("ffn_norm.weight"), n_embd);
        }
    }

    fn feed_forward(&mut self, i: u32) {
        let RandomShape {
            n_embd,
            n_ff,
            n_expert,
            n_layer,
            ..
        } = *self.shape;
        let name = |part: &str| format!("blk.{i}.{part}.weight");
        let more = i < n_layer / 8 || i % 3 == 2;
        // deepseek2's first layer is dense.
        if n_expert > 0 && !(self.traits.mla && i == 0) {
            return self.experts(i);
        }
        if self.traits.gated_in_up {
            self.matrix(name("ffn_up"), &[n_embd, 2 * n_ff], false);
        } else {
            self.matrix(name("ffn_gate"), &[n_embd, n_ff], false);
            self.matrix(name("ffn_up"), &[n_embd, n_ff], false);
        }
        self.matrix(name("ffn_down"), &[n_ff, n_embd], more);
    }
}

/// Quantised rows by type and length.
struct RowPool {
    rng: Rng,
    pools: HashMap<(TensorType, u64), Vec<Vec<u8>>>,
}

impl RowPool {
    fn write(
        &mut self,
        tensor: &TensorInfo,
        file: &mut impl Write,
    ) -> Result<(), RandomModelError> {
        let n = tensor.dims[0];
        if tensor.dims.len() == 1 {
            for value in self.vector(&tensor.name, n) {
                file.write_all(&value.to_le_bytes())?;
            }
            return Ok(());
        }
        let n_rows = tensor.n_elements()? / n;
        if n_rows <= ROWS_DISTINCT {
            for _ in 0..n_rows {
                file.write_all(&self.row(tensor.ty, n)?)?;
            }
            return Ok(());
        }
        let mut pool = self.pools.remove(&(tensor.ty, n)).unwrap_or_default();
        while (pool.len() as u64) < ROWS_DISTINCT {
            pool.push(self.row(tensor.ty, n)?);
        }
        for _ in 0..n_rows {
            let at = self.rng.next() % ROWS_DISTINCT;
            file.write_all(&pool[at as usize])?;
        }
        self.pools.insert((tensor.ty, n), pool);
        Ok(())
    }

    fn vector(&mut self, name: &str, n: u64) -> Vec<f32> {
        // Norms and rope factors lie about one, biases about zero.
        let centre = if name.ends_with(".bias") { 0.0 } else { 1.0 };
        (0..n).map(|_| centre + 0.2 * self.rng.uniform()).collect()
    }

    /// Values of variance 1/n, so that a row's product with a normalised row
    /// has variance one.
    fn row(&mut self, ty: TensorType, n: u64) -> Result<Vec<u8>, RandomModelError> {
        let scale = (3.0 / n as f32).sqrt();
        let row: Vec<f32> = (0..n).map(|_| scale * self.rng.uniform()).collect();
        if ty == TensorType::F32 {
            return Ok(row.iter().flat_map(|value| value.to_le_bytes()).collect());
        }
        llama::quantize_rows(ty, &row, n as usize).map_err(RandomModelError::Quantize)
    }
}

/// SplitMix64: small, seeded, good enough for weights.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From -1 to 1.
    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}
