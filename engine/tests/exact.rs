//! Staged equals whole: for every architecture in the table, every cut, bit by
//! bit.

mod support;

use engine::{QuantType, RandomWeights};
use support::{ARCHS, Model, demo, tiny};

const SEED: u64 = 20_261_121;
const DECODED: usize = 24;

fn check(arch: &str) {
    Model::random(arch, &tiny(arch), SEED).check_cuts(DECODED);
}

macro_rules! archs {
    ($($test:ident $arch:literal,)*) => {
        $(#[test] fn $test() { check($arch); })*

        #[test]
        fn every_architecture_has_a_test() {
            assert_eq!(ARCHS, &[$($arch),*]);
        }
    };
}

archs! {
    gemma3 "gemma3",
    granite "granite",
    llama "llama",
    llama_moe "llama-moe",
    mistral3 "mistral3",
    olmo2 "olmo2",
    olmoe "olmoe",
    phi3 "phi3",
    qwen2 "qwen2",
    qwen2moe "qwen2moe",
    qwen3 "qwen3",
    qwen3moe "qwen3moe",
}

#[test]
fn quantised_models_are_exact_too() {
    for arch in ["llama", "qwen2", "qwen3moe", "gemma3", "phi3"] {
        let model = Model::random(arch, &tiny(arch), SEED);
        for ty in [QuantType::Q8_0, QuantType::Q4_0, QuantType::Q4KM] {
            model.quantized(ty).check_cuts(DECODED);
        }
    }
}

#[test]
fn generated_q4_k_m_is_exact() {
    let shape = tiny("llama");
    Model::random_of("llama", &shape, RandomWeights::Q4KM, SEED).check_cuts(DECODED);
}

#[test]
fn sizes_that_are_no_multiples_of_32() {
    let mut shape = tiny("llama");
    (shape.n_embd, shape.n_ff, shape.n_vocab) = (72, 100, 101);
    (shape.n_head, shape.n_head_kv, shape.head_dim) = (6, 3, 12);
    Model::random("llama", &shape, SEED).check_cuts(DECODED);
}

#[test]
fn more_layers_than_share_a_model() {
    let mut shape = tiny("llama");
    shape.n_layer = 10;
    Model::random("llama", &shape, SEED).check_cuts(8);
}

#[test]
fn the_demo_model_in_every_quantisation() {
    let Some(path) = demo() else {
        eprintln!("models/demo.gguf is not there: not checked");
        return;
    };
    let model = Model::open(path, None);
    model.check_cuts(64);
    for ty in [QuantType::F32, QuantType::Q8_0, QuantType::Q4KM] {
        model.quantized(ty).check_cuts(64);
    }
}
