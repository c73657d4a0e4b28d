//! What mixtures of experts have beyond dense models, and deepseek2's attention.

use gguf::{TensorType, Value};

use super::{ArchTraits, Plan, RandomShape};

/// Ranks and widths of deepseek2's attention, for a tiny model.
const Q_RANK: u32 = 256;
const KV_RANK: u32 = 256;
pub(super) const ROPE: u32 = 32;

/// What is special about those that are not cut into stages.
pub(super) fn traits(arch: &str, plain: ArchTraits) -> Option<ArchTraits> {
    match arch {
        "deepseek2" => Some(ArchTraits {
            mla: true,
            moe: true,
            ..plain
        }),
        "gpt-oss" => Some(ArchTraits {
            qkv_bias: true,
            biases: true,
            moe: true,
            ..plain
        }),
        _ => None,
    }
}

/// Keys of deepseek2: a sigmoid gate that is normalised and scaled.
pub(super) fn mla_keys(shape: &RandomShape, key: &mut dyn FnMut(&str, Value)) {
    key("leading_dense_block_count", 1u32.into());
    key("attention.q_lora_rank", Q_RANK.into());
    key("attention.kv_lora_rank", KV_RANK.into());
    key("attention.key_length", (KV_RANK + ROPE).into());
    key("attention.value_length", KV_RANK.into());
    key("attention.key_length_mla", (shape.head_dim + ROPE).into());
    key("attention.value_length_mla", shape.head_dim.into());
    key("expert_shared_count", 1u32.into());
    key("expert_weights_scale", 2.5f32.into());
    key("expert_weights_norm", true.into());
    key("expert_gating_func", 2u32.into());
}

impl Plan<'_> {
    pub(super) fn mla_attention(&mut self, i: u32) {
        let RandomShape {
            n_embd,
            n_head,
            head_dim,
            ..
        } = *self.shape;
        let name = |part: &str| format!("blk.{i}.{part}.weight");
        let key = head_dim + ROPE;
        self.vector(name("attn_q_a_norm"), Q_RANK);
        self.vector(name("attn_kv_a_norm"), KV_RANK);
        self.matrix(name("attn_q_a"), &[n_embd, Q_RANK], false);
        self.matrix(name("attn_q_b"), &[Q_RANK, n_head * key], false);
        self.matrix(name("attn_kv_a_mqa"), &[n_embd, KV_RANK + ROPE], false);
        self.matrix(name("attn_k_b"), &[head_dim, KV_RANK, n_head], false);
        self.matrix(name("attn_v_b"), &[KV_RANK, head_dim, n_head], false);
        self.matrix(name("attn_output"), &[n_head * head_dim, n_embd], false);
        self.vector(name("ffn_norm"), n_embd);
    }

    /// A layer's router, its experts, and those that every row meets.
    pub(super) fn experts(&mut self, i: u32) {
        let RandomShape {
            n_embd,
            n_ff,
            n_expert,
            n_layer,
            gate_up,
            ..
        } = *self.shape;
        let name = |part: &str| format!("blk.{i}.{part}.weight");
        let more = i < n_layer / 8 || i % 3 == 2;
        self.push(name("ffn_gate_inp"), &[n_embd, n_expert], TensorType::F32);
        if self.traits.biases {
            self.vector(format!("blk.{i}.ffn_gate_inp.bias"), n_expert);
        }
        if self.traits.mla {
            self.vector(format!("blk.{i}.exp_probs_b.bias"), n_expert);
        }
        let first = match gate_up {
            true => vec![("ffn_gate_up_exps", 2 * n_ff)],
            false => vec![("ffn_gate_exps", n_ff), ("ffn_up_exps", n_ff)],
        };
        for (part, rows) in first {
            self.expert(i, part, [n_embd, rows], false);
        }
        self.expert(i, "ffn_down_exps", [n_ff, n_embd], more);
        if self.traits.shared_expert {
            self.vector(name("ffn_gate_inp_shexp"), n_embd);
        }
        if self.traits.shared_expert || self.traits.mla {
            self.matrix(name("ffn_gate_shexp"), &[n_embd, n_ff], false);
            self.matrix(name("ffn_up_shexp"), &[n_embd, n_ff], false);
            self.matrix(name("ffn_down_shexp"), &[n_ff, n_embd], more);
        }
    }

    fn expert(&mut self, i: u32, part: &str, [columns, rows]: [u32; 2], more: bool) {
        let n_expert = self.shape.n_expert;
        let name = |kind: &str| format!("blk.{i}.{part}.{kind}");
        self.matrix(name("weight"), &[columns, rows, n_expert], more);
        if self.traits.biases {
            self.push(name("bias"), &[rows, n_expert], TensorType::F32);
        }
        if self.shape.scales {
            self.vector(name("scale"), n_expert);
        }
    }
}
