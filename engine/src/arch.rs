//! Which architectures may be cut between layers, and what each needs for it.
//!
//! One row an architecture; each has a test against the whole model
//! (`tests/exact.rs`). What is not in the table is refused by name: an
//! architecture whose layers follow their index, read the number of layers or
//! share tensors gives wrong text, not an error, when cut naively.

/// How token embeddings are scaled before layer 0. llama.cpp scales token ids
/// it looks up itself, and for some architectures hidden rows too; stages look
/// up and scale on their own, so stage files declare no scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EmbeddingScale {
    /// Not at all.
    None,
    /// By the root of `n_embd`.
    Root,
    /// By `<arch>.embedding_scale`, where it is there and not zero.
    Key,
}

/// How a layer's index decides between a sliding window and full attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Window {
    /// No windows, or windows that llama.cpp ignores.
    None,
    /// Local unless the index is the last of `period`, where the file has
    /// `attention.sliding_window`.
    Pattern {
        /// Layers in the pattern when the file does not say.
        period: u32,
    },
}

/// A row of the table.
#[derive(Debug)]
pub(crate) struct Arch {
    /// `general.architecture`.
    pub name: &'static str,
    /// Layer counts at which llama.cpp changes the mathematics of every layer:
    /// a stage of one layer would not.
    pub refused_layer_counts: &'static [u32],
    /// See [`EmbeddingScale`].
    pub embedding_scale: EmbeddingScale,
    /// See [`Window`].
    pub window: Window,
    /// llama.cpp asserts that key, value and rope dimensions are one number.
    pub rope_spans_head: bool,
}

const PLAIN: Arch = Arch {
    name: "",
    refused_layer_counts: &[],
    embedding_scale: EmbeddingScale::None,
    window: Window::None,
    rope_spans_head: true,
};

/// The table.
pub(crate) const ARCHS: &[Arch] = &[
    // gemma and gemma2 are missing because llama.cpp scales hidden rows that
    // enter them, by a factor that cannot be undone exactly.
    Arch {
        name: "gemma3",
        // 27B: the attention scale is another one.
        refused_layer_counts: &[62],
        embedding_scale: EmbeddingScale::Root,
        window: Window::Pattern { period: 6 },
        rope_spans_head: false,
    },
    Arch {
        name: "granite",
        embedding_scale: EmbeddingScale::Key,
        ..PLAIN
    },
    Arch {
        name: "llama",
        ..PLAIN
    },
    Arch {
        name: "mistral3",
        ..PLAIN
    },
    Arch {
        name: "olmo2",
        window: Window::Pattern { period: 4 },
        ..PLAIN
    },
    Arch {
        name: "olmoe",
        ..PLAIN
    },
    // Its windows are switched off in llama.cpp; its rope factors follow the
    // context size, which is a constant of the session.
    Arch {
        name: "phi3",
        rope_spans_head: false,
        ..PLAIN
    },
    Arch {
        name: "qwen2",
        ..PLAIN
    },
    Arch {
        name: "qwen2moe",
        ..PLAIN
    },
    Arch {
        name: "qwen3",
        ..PLAIN
    },
    Arch {
        name: "qwen3moe",
        ..PLAIN
    },
];

/// Keys (after the architecture's name) that hold one value per layer when they
/// hold an array.
pub(crate) const PER_LAYER_KEYS: &[&str] = &[
    "attention.head_count",
    "attention.head_count_kv",
    "attention.sliding_window_pattern",
    "expert_feed_forward_length",
    "expert_used_count",
    "feed_forward_length",
];

/// Tensors outside layers that every layer reads.
pub(crate) const SHARED_TENSORS: &[&str] = &[
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
];

/// Tensors outside layers that only the head reads, but for `output.weight`.
pub(crate) const HEAD_TENSORS: &[&str] = &["output_norm.weight", "output_norm.bias", "output.bias"];

/// The row for `name`.
pub(crate) fn find(name: &str) -> Option<&'static Arch> {
    ARCHS.iter().find(|arch| arch.name == name)
}

/// Every name in the table, for messages.
pub(crate) fn names() -> String {
    let names: Vec<_> = ARCHS.iter().map(|arch| arch.name).collect();
    names.join(", ")
}
