//! Models and chains of stages for the engine's tests.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::ops::Range;
use std::path::{Path, PathBuf};

use engine::{
    Blueprint, FileSource, Input, LlamaStage, LoadOptions, PREFILL_CHUNK, QuantType, RandomShape,
    RandomWeights, Slot, Stage, Step, Want, WholeModel, quantize, random_model,
};
use gguf::TensorType;

/// Every architecture with a random model.
pub const ARCHS: &[&str] = &[
    "gemma3",
    "granite",
    "llama",
    "llama-moe",
    "mistral3",
    "olmo2",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen2moe",
    "qwen3",
    "qwen3moe",
];

pub const N_CTX: u32 = 256;

/// A tiny shape for `arch`, with what makes it special.
pub fn tiny(arch: &str) -> RandomShape {
    let mut shape = RandomShape::tiny();
    match arch {
        // Layer 5 is the first that looks at everything.
        "gemma3" => (shape.n_layer, shape.window, shape.tied) = (7, 16, true),
        "olmo2" => (shape.n_layer, shape.window) = (4, 16),
        "llama-moe" | "qwen3moe" => (shape.n_expert, shape.n_expert_used) = (4, 2),
        "olmoe" => {
            (shape.n_expert, shape.n_expert_used) = (4, 2);
            shape.n_head_kv = shape.n_head;
        }
        "qwen2moe" => (shape.n_expert, shape.n_expert_used) = (4, 2),
        "qwen3" => (shape.head_dim, shape.tied) = (64, true),
        _ => {}
    }
    shape
}

/// A model file, and its directory while it is a temporary one.
pub struct Model {
    pub path: PathBuf,
    pub blueprint: Blueprint,
    pub source: FileSource,
    _dir: Option<tempfile::TempDir>,
}

impl Model {
    pub fn random(arch: &str, shape: &RandomShape, seed: u64) -> Model {
        Self::random_of(arch, shape, RandomWeights::One(TensorType::F32), seed)
    }

    pub fn random_of(arch: &str, shape: &RandomShape, ty: RandomWeights, seed: u64) -> Model {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        random_model(arch.trim_end_matches("-moe"), shape, ty, seed, &path).unwrap();
        Self::open(path, Some(dir))
    }

    pub fn quantized(&self, ty: QuantType) -> Model {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        quantize(&self.path, &path, ty).unwrap();
        Self::open(path, Some(dir))
    }

    pub fn open(path: PathBuf, dir: Option<tempfile::TempDir>) -> Model {
        let source = FileSource::open(&path).unwrap();
        let blueprint = Blueprint::new(source.header()).unwrap();
        Model {
            path,
            blueprint,
            source,
            _dir: dir,
        }
    }

    pub fn stage(&self, layers: Range<u32>) -> LlamaStage {
        let options = LoadOptions {
            n_threads: 1,
            ..LoadOptions::default()
        };
        LlamaStage::load(&self.blueprint, layers, &self.source, &options, &mut |_| ()).unwrap()
    }

    pub fn whole(&self, n_ctx: u32) -> WholeModel {
        WholeModel::load(&self.path, n_ctx, 1).unwrap()
    }

    pub fn prompt(&self, len: usize, seed: u32) -> Vec<u32> {
        let n_vocab = self.blueprint.n_vocab();
        let token = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 7) % n_vocab;
        (1..=len as u32).map(token).collect()
    }

    /// The whole model's logits for a prompt and `n` greedy tokens.
    pub fn reference(&self, prompt: &[u32], n: usize, n_ctx: u32) -> (Vec<u32>, Vec<Vec<f32>>) {
        let mut whole = self.whole(n_ctx);
        let mut out = Vec::new();
        whole.feed(0, prompt, &mut out).unwrap();
        let (mut tokens, mut rows) = (Vec::new(), vec![out.clone()]);
        for i in 0..n {
            let token = greedy(&out);
            tokens.push(token);
            whole
                .run((prompt.len() + i) as u32, &[token], Want::Last, &mut out)
                .unwrap();
            rows.push(out.clone());
        }
        (tokens, rows)
    }

    /// Every cut into one to three stages and into single layers, each through
    /// stages that hold only their layers, and one stage entered and left at
    /// every boundary.
    pub fn check_cuts(&self, n: usize) {
        let prompt = self.prompt(PREFILL_CHUNK as usize * 2 + 5, 7);
        let (tokens, rows) = self.reference(&prompt, n, N_CTX);
        assert!(
            rows.iter().flatten().all(|v| v.is_finite()),
            "the reference is not finite"
        );
        let n_layer = self.blueprint.n_layer();
        for cuts in cuts(n_layer) {
            let mut chain = Chain::apart(self, &cuts);
            let got = chain.generate(&prompt, n, N_CTX);
            same(
                &got,
                &(tokens.clone(), rows.clone()),
                &format!("apart {cuts:?}"),
            );
        }
        let mut chain = Chain::together(self, &[0, n_layer]);
        for cuts in cuts(n_layer) {
            chain.cut(&cuts);
            let got = chain.generate(&prompt, n, N_CTX);
            same(
                &got,
                &(tokens.clone(), rows.clone()),
                &format!("together {cuts:?}"),
            );
        }
    }
}

/// Boundaries of cuts: all into one, two and three parts, and into layers.
pub fn cuts(n_layer: u32) -> Vec<Vec<u32>> {
    let mut all = vec![vec![0, n_layer], (0..=n_layer).collect()];
    for a in 1..n_layer {
        all.push(vec![0, a, n_layer]);
        // Of a deep model only narrow middles: the cut into layers has every
        // boundary already.
        let end = if n_layer > 4 {
            n_layer.min(a + 2)
        } else {
            n_layer
        };
        all.extend((a + 1..end).map(|b| vec![0, a, b, n_layer]));
    }
    all.dedup();
    all
}

pub fn same(got: &(Vec<u32>, Vec<Vec<f32>>), expected: &(Vec<u32>, Vec<Vec<f32>>), what: &str) {
    for (i, (got, expected)) in got.1.iter().zip(&expected.1).enumerate() {
        let differ = got
            .iter()
            .zip(expected)
            .position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(got.len(), expected.len(), "{what}: row {i}");
        if let Some(at) = differ {
            panic!(
                "{what}: row {i} differs at {at}: {} and {}",
                got[at], expected[at]
            );
        }
    }
    assert_eq!(got.0, expected.0, "{what}");
}

pub fn greedy(row: &[f32]) -> u32 {
    (0..row.len())
        .rev()
        .max_by(|&a, &b| row[a].total_cmp(&row[b]))
        .unwrap() as u32
}

/// Stages one after the other, or one stage run several times.
pub struct Chain {
    pub stages: Vec<LlamaStage>,
    hops: Vec<(usize, Range<u32>)>,
}

/// One session through a chain.
pub struct Session {
    slots: Vec<Slot>,
    pub out: Vec<f32>,
    rows: Vec<f32>,
}

impl Chain {
    pub fn apart(model: &Model, cuts: &[u32]) -> Chain {
        let spans: Vec<_> = cuts.windows(2).map(|w| w[0]..w[1]).collect();
        Chain {
            stages: spans.iter().map(|span| model.stage(span.clone())).collect(),
            hops: spans.into_iter().enumerate().collect(),
        }
    }

    pub fn together(model: &Model, cuts: &[u32]) -> Chain {
        let mut chain = Chain::apart(model, &[0, model.blueprint.n_layer()]);
        chain.cut(cuts);
        chain
    }

    /// One stage of all layers.
    pub fn of(stage: LlamaStage, cuts: &[u32]) -> Chain {
        let mut chain = Chain {
            stages: vec![stage],
            hops: Vec::new(),
        };
        chain.cut(cuts);
        chain
    }

    pub fn cut(&mut self, cuts: &[u32]) {
        self.hops = cuts.windows(2).map(|w| (0, w[0]..w[1])).collect();
    }

    pub fn open(&mut self, n_ctx: u32) -> Session {
        let slots = self
            .hops
            .iter()
            .map(|(at, span)| self.stages[*at].open(n_ctx, span.clone()).unwrap())
            .collect();
        Session {
            slots,
            out: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// One that others may run beside, with the first `n` positions of another; how many it has in each stage.
    pub fn fork(&mut self, from: &Session, n_ctx: u32, n: u32) -> (Session, Vec<u32>) {
        let session = self.open_beside(n_ctx);
        let mut held = Vec::new();
        for ((at, _), (from, to)) in self.hops.iter().zip(from.slots.iter().zip(&session.slots)) {
            held.push(self.stages[*at].copy(*from, *to, n).unwrap());
        }
        (session, held)
    }

    /// One that others may run beside.
    pub fn open_beside(&mut self, n_ctx: u32) -> Session {
        let hops = self.hops.iter();
        let slots = hops.map(|(at, span)| {
            let stage = &mut self.stages[*at];
            stage.open_beside(n_ctx, span.clone(), false).unwrap()
        });
        Session {
            slots: slots.collect(),
            out: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// Greedy tokens behind what was fed, and the rows they were chosen from.
    pub fn decode(&mut self, session: &mut Session, pos: u32, n: u32) -> (Vec<u32>, Vec<Vec<f32>>) {
        let (mut tokens, mut rows) = (Vec::new(), vec![session.out.clone()]);
        for pos in pos..pos + n {
            let token = greedy(&session.out);
            tokens.push(token);
            self.frame(session, pos, &[token], Want::Last);
            rows.push(session.out.clone());
        }
        (tokens, rows)
    }

    pub fn close(&mut self, session: Session) {
        for ((at, _), slot) in self.hops.iter().zip(session.slots) {
            self.stages[*at].close(slot);
        }
    }

    /// One frame through every hop; the logits wanted lie in `session.out`.
    pub fn frame(&mut self, session: &mut Session, pos0: u32, tokens: &[u32], want: Want) {
        for ((at, span), slot) in self.hops.iter().zip(&session.slots) {
            let n_rows = tokens.len() as u32;
            let step = Step {
                slot: *slot,
                layers: span.clone(),
                pos0,
                n_rows,
                want,
            };
            let input = match span.start {
                0 => Input::Tokens(tokens),
                _ => Input::Hidden(&session.rows),
            };
            self.stages[*at]
                .run(&step, &input, &mut session.out)
                .unwrap();
            std::mem::swap(&mut session.rows, &mut session.out);
        }
        std::mem::swap(&mut session.rows, &mut session.out);
    }

    pub fn feed(&mut self, session: &mut Session, pos0: u32, tokens: &[u32]) {
        let n = tokens.chunks(PREFILL_CHUNK as usize).len();
        for (i, chunk) in tokens.chunks(PREFILL_CHUNK as usize).enumerate() {
            let want = if i + 1 == n { Want::Last } else { Want::None };
            self.frame(session, pos0 + i as u32 * PREFILL_CHUNK, chunk, want);
        }
    }

    pub fn generate(&mut self, prompt: &[u32], n: usize, n_ctx: u32) -> (Vec<u32>, Vec<Vec<f32>>) {
        let mut session = self.open(n_ctx);
        self.feed(&mut session, 0, prompt);
        let (mut tokens, mut rows) = (Vec::new(), vec![session.out.clone()]);
        for i in 0..n {
            let token = greedy(&session.out);
            tokens.push(token);
            self.frame(
                &mut session,
                (prompt.len() + i) as u32,
                &[token],
                Want::Last,
            );
            rows.push(session.out.clone());
        }
        self.close(session);
        (tokens, rows)
    }
}

/// The committed demo model, where it is there.
pub fn demo() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo.gguf");
    path.exists().then_some(path)
}

/// A figure of this process, from a file in `/proc/self` that counts in KiB.
pub fn process_bytes(file: &str, key: &str) -> u64 {
    let text = std::fs::read_to_string(Path::new("/proc/self").join(file)).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.map_or(0, |kib| kib.parse::<u64>().unwrap() << 10)
}
