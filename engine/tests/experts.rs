//! Experts elsewhere give the whole model's logits, bit by bit: every kind of
//! mixture, any placement, prefill and decode, several types of weights.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use engine::{
    Activation, ExpertCall, ExpertError, ExpertHolder, ExpertHolders, ExpertLayout, ExpertReply,
    ExpertWorker, FileSource, Form, Group, HolderId, InProcess, LlamaStage, LoadOptions, Loaded,
    LoadedExpert, PREFILL_CHUNK, QuantType, RandomShape, RandomWeights, Stage, Want, WholeModel,
    quantize, random_model,
};
use gguf::TensorType;
use support::{Chain, N_CTX, cuts, greedy, same, tiny};

const SEED: u64 = 20_261_130;
const DECODED: usize = 12;

/// A model file and what its experts are.
struct Mixture {
    source: FileSource,
    path: std::path::PathBuf,
    layout: Arc<ExpertLayout>,
    dir: tempfile::TempDir,
}

impl Mixture {
    fn random(arch: &str, shape: &RandomShape, weights: RandomWeights) -> Mixture {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        random_model(arch.trim_end_matches("-moe"), shape, weights, SEED, &path).unwrap();
        Mixture::open(path, dir)
    }

    fn open(path: std::path::PathBuf, dir: tempfile::TempDir) -> Mixture {
        let source = FileSource::open(&path).unwrap();
        let layout = Arc::new(ExpertLayout::new(source.header()).unwrap());
        Mixture {
            source,
            path,
            layout,
            dir,
        }
    }

    fn quantized(&self, ty: QuantType) -> Mixture {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        quantize(&self.path, &path, ty).unwrap();
        Mixture::open(path, dir)
    }

    /// `n` holders that have all experts, each where `seed` puts it.
    fn placed(&self, n: u32, seed: u32) -> Arc<InProcess> {
        let place = move |layer: u32, expert: u32| {
            let mixed = (layer * 131 + expert + 1).wrapping_mul(2_654_435_761 ^ seed);
            Some((mixed >> 9) % n)
        };
        let layout = Arc::clone(&self.layout);
        Arc::new(InProcess::load(layout, &self.source, n, 1, &place).unwrap())
    }

    fn whole(&self) -> WholeModel {
        WholeModel::load(&self.path, N_CTX, 1).unwrap()
    }

    fn trunk(&self, holders: Arc<dyn ExpertHolders>) -> WholeModel {
        WholeModel::load_trunk(&self.path, N_CTX, 1, holders).unwrap()
    }

    fn same(&self, what: &str) {
        let expected = generate(&mut self.whole());
        assert!(expected.iter().flatten().all(|value| value.is_finite()));
        let different = |rows: &[Vec<f32>]| rows.windows(2).any(|two| two[0] != two[1]);
        assert!(different(&expected), "{what}: a model that says one thing");
        for (holders, seed) in [(1, 0), (3, 7), (4, 8)] {
            let placed = self.placed(holders, seed);
            let got = generate(&mut self.trunk(placed.clone()));
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let bits = |row: &[f32]| row.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert!(
                    bits(got) == bits(expected),
                    "{what}, {holders} holders: row {i}"
                );
            }
            let used: u64 = placed.used().iter().map(|used| used.rows).sum();
            let stats = placed.stats();
            assert_eq!(used, stats.iter().map(|s| s.rows).sum::<u64>(), "{what}");
            assert!(used > 0 && stats.iter().filter(|s| s.calls > 0).count() as u32 > holders / 2);
        }
    }
}

/// The logits of a prompt of several chunks, all rows of one of them, and of
/// greedy tokens.
fn generate(model: &mut WholeModel) -> Vec<Vec<f32>> {
    let n_vocab = model.n_vocab();
    let prompt: Vec<u32> = (1..=2 * PREFILL_CHUNK + 5)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 7) % n_vocab)
        .collect();
    let mut out = Vec::new();
    model.run(0, &prompt[..32], Want::All, &mut out).unwrap();
    let mut rows = vec![out.clone()];
    model.feed(32, &prompt[32..], &mut out).unwrap();
    for i in 0..DECODED {
        rows.push(out.clone());
        let pos = (prompt.len() + i) as u32;
        model
            .run(pos, &[greedy(&out)], Want::Last, &mut out)
            .unwrap();
    }
    rows
}

fn shape(arch: &str) -> RandomShape {
    let mut shape = tiny(arch);
    (shape.n_expert, shape.n_expert_used) = (8, 3);
    if arch == "gpt-oss" {
        shape.window = 16;
    }
    shape
}

fn check(arch: &str) {
    let model = Mixture::random(arch, &shape(arch), RandomWeights::One(TensorType::F32));
    model.same(arch);
    for ty in [QuantType::Q8_0, QuantType::Q4_0, QuantType::Q4KM] {
        model.quantized(ty).same(&format!("{arch} {ty:?}"));
    }
}

#[test]
fn llama_moe() {
    check("llama-moe");
}

#[test]
fn olmoe() {
    check("olmoe");
}

#[test]
fn qwen2moe_with_shared_experts() {
    check("qwen2moe");
}

#[test]
fn qwen3moe() {
    check("qwen3moe");
}

#[test]
fn deepseek2_with_shared_experts_and_a_biased_sigmoid_gate() {
    check("deepseek2");
}

#[test]
fn gpt_oss_with_biases_and_clamped_activation() {
    check("gpt-oss");
}

#[test]
fn scales_and_merged_matrices() {
    let f32s = RandomWeights::One(TensorType::F32);
    let mut scaled = shape("qwen3moe");
    scaled.scales = true;
    Mixture::random("qwen3moe", &scaled, f32s).same("scales");
    let mut merged = shape("deepseek2");
    merged.gate_up = true;
    let merged = Mixture::random("deepseek2", &merged, f32s);
    merged.same("merged");
    merged.quantized(QuantType::Q4KM).same("merged Q4_K_M");
}

#[test]
fn every_type_that_experts_come_in() {
    for ty in [
        TensorType::F16,
        TensorType::Bf16,
        TensorType::Q4_1,
        TensorType::Q5_0,
        TensorType::Q2K,
        TensorType::Q3K,
        TensorType::Q5K,
        TensorType::Q6K,
        TensorType::Iq4Nl,
        TensorType::Iq4Xs,
        TensorType::Mxfp4,
    ] {
        let shape = shape("qwen3moe");
        Mixture::random("qwen3moe", &shape, RandomWeights::One(ty)).same(&ty.to_string());
    }
}

#[test]
fn the_demo_mixture() {
    let dir = tempfile::tempdir().unwrap();
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo-moe.gguf");
    let demo = Mixture::open(path, dir);
    demo.same("demo");
    demo.quantized(QuantType::Q4KM).same("demo Q4_K_M");
}

/// A stage of the trunk's layers: cut anywhere, entered and left between layers.
#[test]
fn trunks_are_cut_like_whole_layers() {
    let model = support::Model::random("qwen3moe", &shape("qwen3moe"), SEED);
    let prompt = model.prompt(PREFILL_CHUNK as usize + 3, 3);
    let expected = model.reference(&prompt, DECODED, N_CTX);
    let layout = Arc::new(ExpertLayout::new(model.source.header()).unwrap());
    let place = |layer, expert| Some((layer + expert) % 3);
    let holders: Arc<dyn ExpertHolders> =
        Arc::new(InProcess::load(layout.clone(), &model.source, 3, 1, &place).unwrap());
    let n_layer = model.blueprint.n_layer();
    let options = LoadOptions {
        n_threads: 1,
        ..LoadOptions::default()
    };
    let mut stage = LlamaStage::new(&model.blueprint, &options).unwrap();
    let trunk = Loaded::read_trunk(
        &model.blueprint,
        std::slice::from_ref(&(0..n_layer)),
        &model.source,
        &holders,
        &mut |_| (),
    );
    stage.add(trunk.unwrap()).unwrap();

    // Its experts are not in its memory.
    let experts: u64 = layout
        .layers()
        .map(|layer| layout.expert_bytes(layer) * u64::from(layout.n_expert()))
        .sum();
    let all: u64 = (0..n_layer).map(|i| model.blueprint.layer_bytes(i)).sum();
    let all = all + model.blueprint.embedding_bytes() + model.blueprint.head_bytes();
    let held = stage.stats().tensor_bytes;
    assert!(experts > all / 2, "{experts} of {all} bytes are experts");
    assert!(
        held + experts < all + all / 10,
        "{held} of {all}, {experts} are experts"
    );

    let mut chain = Chain::of(stage, &[0, n_layer]);
    for cuts in cuts(n_layer) {
        chain.cut(&cuts);
        let got = chain.generate(&prompt, DECODED, N_CTX);
        same(&got, &expected, &format!("{cuts:?}"));
    }
}

/// Holders of which one fails at times.
struct Failing {
    inner: Arc<InProcess>,
    fails: std::sync::atomic::AtomicBool,
}

impl ExpertHolders for Failing {
    fn holder_of(&self, layer: u32, expert: u32) -> Option<HolderId> {
        self.inner.holder_of(layer, expert)
    }

    fn ask(&self, calls: Vec<(HolderId, ExpertCall)>) -> Result<Vec<ExpertReply>, ExpertError> {
        let fails = self.fails.load(std::sync::atomic::Ordering::Relaxed);
        match calls.first() {
            Some((_, call)) if fails && call.layer == 1 => Err(ExpertError::NotHeld {
                layer: 1,
                expert: call.groups[0].expert,
            }),
            _ => self.inner.ask(calls),
        }
    }
}

#[test]
fn a_step_whose_experts_fail_is_an_error_and_runs_again() {
    let f32s = RandomWeights::One(TensorType::F32);
    let model = Mixture::random("olmoe", &shape("olmoe"), f32s);
    let expected = generate(&mut model.whole());
    let failing = Arc::new(Failing {
        inner: model.placed(2, 1),
        fails: true.into(),
    });
    let mut trunk = model.trunk(failing.clone());
    let mut out = Vec::new();
    let why = trunk.run(0, &[1, 2, 3], Want::Last, &mut out).unwrap_err();
    let why = why.to_string();
    assert!(why.contains("of layer 1 is held by nobody"), "{why}");
    failing
        .fails
        .store(false, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(generate(&mut trunk), expected);
}

/// Experts come and go between calls: each call meets those that were there when it was put into the queue.
#[test]
fn experts_come_and_go_while_calls_wait() {
    let f32s = RandomWeights::One(TensorType::F32);
    let model = Mixture::random("olmoe", &shape("olmoe"), f32s);
    let holder = ExpertHolder::new(Arc::clone(&model.layout), 1).unwrap();
    let worker = ExpertWorker::spawn(holder, 64).unwrap();
    let call = |expert| ExpertCall {
        layer: 1,
        form: Form {
            activation: Activation::SwiGlu,
            parts: model.layout.parts(1),
        },
        n_embd: model.layout.n_embd(),
        groups: vec![Group {
            expert,
            rows: vec![0],
        }],
        hidden: vec![0.25; model.layout.n_embd() as usize],
    };
    let load = |expert| LoadedExpert::read(&model.layout, 1, expert, &model.source).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let ask = |expert| {
        let tell = tell.clone();
        let reply = Box::new(move |answer| drop(tell.send(answer)));
        worker.submit(call(expert), reply).unwrap();
    };
    ask(3);
    worker.add(load(3)).unwrap();
    worker.add(load(5)).unwrap();
    ask(3);
    ask(5);
    assert!(worker.remove(1, 3).unwrap() && !worker.remove(1, 3).unwrap());
    ask(3);
    ask(5);
    assert_eq!(worker.held(), [(1, 5)]);
    let answers: Vec<_> = told.iter().take(5).collect();
    let none = ExpertError::NotHeld {
        layer: 1,
        expert: 3,
    };
    assert_eq!(answers[0], Err(none.clone()));
    assert_eq!(answers[3], Err(none));
    let rows = |at: usize| &answers[at].as_ref().unwrap().rows;
    assert!(rows(2) == rows(4) && rows(1) != rows(2));
    let (rows_s, _) = worker.stats().rows_s.unwrap();
    assert!(rows_s.is_finite() && rows_s > 0.0);
    assert!(LoadedExpert::read(&model.layout, 1, 99, &model.source).is_err());
}

#[test]
fn calls_together_get_what_they_get_alone_and_wrong_ones_are_refused() {
    for ty in [TensorType::Q6K, TensorType::Q4K, TensorType::F32] {
        let model = Mixture::random("qwen3moe", &shape("qwen3moe"), RandomWeights::One(ty));
        let mut holder = ExpertHolder::new(Arc::clone(&model.layout), 1).unwrap();
        for expert in [0, 2, 5] {
            holder.load(1, expert, &model.source).unwrap();
        }
        let call = |rows: u32, experts: &[u32], seed: f32| ExpertCall {
            layer: 1,
            form: engine::Form {
                activation: engine::Activation::SwiGlu,
                parts: model.layout.parts(1),
            },
            n_embd: 256,
            groups: experts
                .iter()
                .map(|&expert| engine::Group {
                    expert,
                    rows: (0..rows).collect(),
                })
                .collect(),
            hidden: (0..256 * rows).map(|i| (i as f32 * seed).sin()).collect(),
        };
        // Rows of 8 and more take another kernel of some types.
        let calls = [
            call(1, &[0, 5], 0.1),
            call(9, &[0], 0.3),
            call(2, &[2, 5], 0.7),
        ];
        let alone: Vec<_> = calls
            .iter()
            .flat_map(|call| holder.compute(std::slice::from_ref(call)))
            .collect();
        assert_eq!(holder.compute(&calls), alone, "{ty}");
        assert_eq!(alone[1].as_ref().unwrap().rows.len(), 9 * 256);

        let mut narrow = call(1, &[0], 0.1);
        (narrow.n_embd, narrow.hidden) = (128, vec![0.5; 128]);
        let mut other = call(1, &[0], 0.1);
        other.form.parts = engine::Parts::default();
        let mut plain = call(1, &[0], 0.1);
        plain.form.activation = engine::Activation::Relu;
        let missing = call(1, &[0, 1], 0.1);
        let mut layer = call(1, &[0], 0.1);
        layer.layer = 77;
        let wrong = [narrow, other, plain, missing, layer, calls[0].clone()];
        let answers = holder.compute(&wrong);
        assert!(answers[..5].iter().all(Result::is_err));
        let not_held = ExpertError::NotHeld {
            layer: 1,
            expert: 1,
        };
        assert_eq!(answers[3], Err(not_held));
        assert_eq!(answers[5], alone[0], "the right one among them");

        let bytes = holder.stats().tensor_bytes;
        assert!(bytes >= 3 * model.layout.expert_bytes(1));
        assert!(holder.unload(1, 2) && !holder.unload(1, 2));
        assert!(holder.stats().tensor_bytes < bytes && !holder.holds(1, 2));
        assert!(holder.load(1, 8, &model.source).is_err());
    }
}

#[test]
fn a_model_without_experts_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let f32s = RandomWeights::One(TensorType::F32);
    random_model("llama", &tiny("llama"), f32s, SEED, &path).unwrap();
    let source = FileSource::open(&path).unwrap();
    assert!(ExpertLayout::new(source.header()).is_err());
    let model = Mixture::random("olmoe", &shape("olmoe"), f32s);
    let refused = WholeModel::load_trunk(&path, N_CTX, 1, model.placed(1, 0));
    assert!(refused.is_err_and(|why| why.to_string().contains("no tensors of experts")));
    drop(model.dir);
}
