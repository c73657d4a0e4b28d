//! Models that are not run, each refused with its reason before llama.cpp sees
//! anything.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::too_many_lines)]

mod support;

use engine::{Blueprint, UnsupportedModel};
use gguf::{Header, TensorInfo, TensorType, Value};
use support::{ARCHS, Model, tiny};

fn header(arch: &str) -> Header {
    Model::random(arch, &tiny(arch), 1).source.header().clone()
}

fn refusal(header: &Header) -> String {
    Blueprint::new(header).expect_err("refused").to_string()
}

fn with(arch: &str, key: &str, value: impl Into<Value>) -> Header {
    let mut header = header(arch);
    header.set(&format!("{arch}.{key}"), value);
    header
}

#[test]
fn unknown_architectures_are_told_what_is_known() {
    for arch in ["gemma2", "mamba", "grok", "smollm3", ""] {
        let mut header = header("llama");
        header.set("general.architecture", arch);
        let error = Blueprint::new(&header).unwrap_err();
        assert!(matches!(&error, UnsupportedModel::Arch { arch: a, .. } if a == arch));
        for known in ARCHS.iter().filter(|known| !known.ends_with("-moe")) {
            assert!(error.to_string().contains(known), "{error}");
        }
    }
}

#[test]
fn layer_counts_that_change_the_mathematics() {
    let mut shape = tiny("gemma3");
    shape.n_layer = 62;
    (shape.n_embd, shape.n_ff, shape.n_vocab) = (32, 32, 32);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let weights = engine::RandomWeights::One(TensorType::F32);
    engine::random_model("gemma3", &shape, weights, 1, &path).unwrap();
    let source = engine::FileSource::open(&path).unwrap();
    let error = Blueprint::new(source.header()).unwrap_err();
    assert!(
        matches!(error, UnsupportedModel::LayerCount { n_layer: 62, .. }),
        "{error}"
    );
}

#[test]
fn dimensions_that_cannot_be() {
    let cases = [
        (with("llama", "block_count", 0u32), "1 to 512"),
        (with("llama", "block_count", u32::MAX), "1 to 512"),
        (with("llama", "block_count", 2u32), "the model has 2 layers"),
        (with("llama", "block_count", 4u32), "blk.3"),
        (with("llama", "embedding_length", 0u32), "embedding_length"),
        (
            with("llama", "embedding_length", 512u32),
            "token_embd.weight",
        ),
        (with("llama", "context_length", 0u32), "context_length"),
        (with("llama", "attention.head_count", 0u32), "heads"),
        (with("llama", "attention.head_count", "eight"), "string"),
        (
            with("llama", "attention.head_count_kv", 3u32),
            "8 heads on 3",
        ),
        (
            with("llama", "attention.head_count_kv", 0u32),
            "8 heads on 0",
        ),
        (
            with("llama", "attention.head_count_kv", vec![4u32, 4]),
            "2 values, not 3",
        ),
        (
            with("llama", "attention.key_length", u32::MAX),
            "key_length",
        ),
        (
            with("llama", "rope.dimension_count", 16u32),
            "rope.dimension_count",
        ),
        (
            with("llama", "rope.dimension_count", 33u32),
            "rope.dimension_count",
        ),
        (
            with("llama", "rope.scaling.type", "sideways"),
            "rope.scaling.type",
        ),
        (with("llama", "vocab_size", 7u32), "vocab_size"),
        (with("llama", "expert_count", 5000u32), "expert_count"),
        (with("llama", "expert_used_count", 2u32), "2 of 0 experts"),
        (
            with("qwen3moe", "expert_used_count", 5u32),
            "5 of 4 experts",
        ),
        (with("llama", "expert_group_count", 4u32), "groups"),
        (
            with("llama", "nextn_predict_layers", 1u32),
            "nextn_predict_layers",
        ),
        (with("llama", "pooling_type", 4u32), "ranks texts"),
        (with("llama", "pooling_type", 9u32), "pooling_type"),
        (
            with("llama", "embedding_length_out", 512u32),
            "embedding_length_out",
        ),
        (with("llama", "attention.causal", false), "causal"),
        (with("llama", "rope.freq_base", f32::NAN), "not finite"),
        (
            with("llama", "something.new", vec![1u32, 2, 3]),
            "per layer",
        ),
        (with("llama", "something.new", vec![1u32; 9]), "9 values"),
        (
            with("gemma3", "attention.sliding_window_pattern", vec![true; 3]),
            "3 values",
        ),
        (
            with("granite", "embedding_scale", f32::INFINITY),
            "embedding_scale",
        ),
    ];
    for (header, why) in cases {
        let error = refusal(&header);
        assert!(error.contains(why), "{error:?} does not say {why:?}");
    }
}

#[test]
fn tensors_that_are_strange_or_missing() {
    let edit = |change: &dyn Fn(&mut Vec<TensorInfo>)| {
        let mut header = header("llama");
        change(&mut header.tensors);
        refusal(&header)
    };
    let rename = |from: &'static str, to: &'static str| {
        edit(&move |tensors| {
            tensors
                .iter_mut()
                .filter(|t| t.name == from)
                .for_each(|t| t.name = to.into());
        })
    };
    assert!(rename("token_embd.weight", "other").contains("not known"));
    assert!(rename("output_norm.weight", "output_norm.bias").contains("missing"));
    assert!(rename("blk.1.attn_q.weight", "blk.01.attn_q.weight").contains("3 layers"));
    assert!(rename("blk.1.attn_q.weight", "blk.3.attn_q.weight").contains("3 layers"));
    assert!(rename("blk.1.attn_q.weight", "blk.x").contains("3 layers"));
    assert!(edit(&|t| t.retain(|t| t.name != "token_embd.weight")).contains("missing"));
    let rows = |name: &'static str, rows: u64| {
        edit(&move |tensors| {
            tensors
                .iter_mut()
                .filter(|t| t.name == name)
                .for_each(|t| t.dims[1] = rows);
        })
    };
    assert!(rows("output.weight", 64).contains("320 rows"));
    assert!(rows("token_embd.weight", 1 << 30).contains("at most"));
}

#[test]
fn layers_that_llama_cpp_refuses_are_errors() {
    for (tensor, what) in [
        ("blk.1.ffn_down.weight", "missing"),
        ("blk.1.attn_q.weight", "shape"),
    ] {
        let model = Model::random("llama", &tiny("llama"), 1);
        let mut header = model.source.header().clone();
        match what {
            "missing" => header.tensors.retain(|t| t.name != tensor),
            _ => header
                .tensors
                .iter_mut()
                .filter(|t| t.name == tensor)
                .for_each(|t| t.dims.swap(0, 1)),
        }
        if what == "shape" {
            let t = header
                .tensors
                .iter_mut()
                .find(|t| t.name == tensor)
                .unwrap();
            t.dims = vec![t.dims[0] * 2, t.dims[1] / 2];
        }
        let blueprint = Blueprint::new(&header).unwrap();
        let options = engine::LoadOptions {
            n_threads: 1,
            ..Default::default()
        };
        let loaded =
            engine::LlamaStage::load(&blueprint, 0..3, &model.source, &options, &mut |_| ());
        let error = loaded.err().expect(what).to_string();
        assert!(error.contains("refused layers 1..2"), "{error}");
    }
}

#[test]
fn sizes_add_up() {
    let model = Model::random("llama", &tiny("llama"), 1);
    let blueprint = &model.blueprint;
    let layers: u64 = (0..3).map(|i| blueprint.layer_bytes(i)).sum();
    let all: u64 = model
        .source
        .header()
        .tensors
        .iter()
        .map(|t| t.n_bytes().unwrap())
        .sum();
    let rope = 16 * 4;
    assert_eq!(
        layers + blueprint.embedding_bytes() + blueprint.head_bytes() + rope,
        all
    );
    assert_eq!(blueprint.kv_cell_bytes(0), 4 * 2 * 32 * 2);
    assert_eq!(blueprint.context_class(1), 256);
    assert_eq!(blueprint.context_class(257), 512);
    // Rope factors of phi3 change beyond 512 positions: no class crosses that.
    let phi3 = Model::random("phi3", &tiny("phi3"), 1).blueprint;
    assert_eq!(
        (phi3.context_class(300), phi3.context_class(513)),
        (512, 1024)
    );
}
