//! Rows of several sessions in one pass: each gets what it would have got alone.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ops::Range;

use engine::{
    BatchNoise, Bench, EngineError, Input, LlamaStage, PREFILL_CHUNK, QuantType, Slot, Stage, Step,
    Want,
};
use support::{Model, greedy, tiny};

const SEED: u64 = 4711;
/// More than one bench of four.
const SESSIONS: usize = 6;
const N_CTX: u32 = 256;

/// The model in two stages, the second entered in the middle of its layers.
struct Stages {
    stages: Vec<LlamaStage>,
    spans: Vec<Range<u32>>,
    fast: bool,
}

struct Session {
    slots: Vec<Slot>,
    tokens: Vec<u32>,
    next: u32,
    rows: Vec<Vec<f32>>,
}

/// Some numbers, the same every time.
struct Dice(u32);

impl Dice {
    fn below(&mut self, n: u32) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) % n
    }
}

impl Stages {
    fn new(model: &Model, fast: bool) -> Stages {
        let n_layer = model.blueprint.n_layer();
        let spans = vec![0..1, 1..n_layer];
        Stages {
            // Both hold everything, so that sessions enter and leave inside.
            stages: spans.iter().map(|_| model.stage(0..n_layer)).collect(),
            spans,
            fast,
        }
    }

    fn open(&mut self, prompt: &[u32]) -> Session {
        let opened = self.stages.iter_mut().zip(&self.spans);
        let fast = self.fast;
        let slots = opened.map(|(s, span)| s.open_beside(N_CTX, span.clone(), fast).unwrap());
        let mut session = Session {
            slots: slots.collect(),
            tokens: Vec::new(),
            next: 0,
            rows: Vec::new(),
        };
        self.feed(&mut session, prompt);
        session
    }

    /// A prompt, in frames.
    fn feed(&mut self, session: &mut Session, prompt: &[u32]) {
        let mut out = Vec::new();
        for chunk in prompt.chunks(PREFILL_CHUNK as usize) {
            let mut hidden = Vec::new();
            for ((stage, span), slot) in self.stages.iter_mut().zip(&self.spans).zip(&session.slots)
            {
                let step = Step {
                    slot: *slot,
                    layers: span.clone(),
                    pos0: session.tokens.len() as u32,
                    n_rows: chunk.len() as u32,
                    want: Want::Last,
                };
                let input = match span.start {
                    0 => Input::Tokens(chunk),
                    _ => Input::Hidden(&hidden),
                };
                stage.run(&step, &input, &mut out).unwrap();
                hidden.clone_from(&out);
            }
            session.tokens.extend(chunk);
        }
        session.next = greedy(&out);
        session.rows.push(out);
    }

    /// The next token of each of these, in one pass a stage.
    fn decode(&mut self, sessions: &mut [&mut Session]) {
        let tokens: Vec<[u32; 1]> = sessions.iter().map(|s| [s.next]).collect();
        let mut hidden: Vec<Vec<f32>> = Vec::new();
        for (at, (stage, span)) in self.stages.iter_mut().zip(&self.spans).enumerate() {
            let steps: Vec<Step> = sessions
                .iter()
                .map(|session| Step {
                    slot: session.slots[at],
                    layers: span.clone(),
                    pos0: session.tokens.len() as u32,
                    n_rows: 1,
                    want: Want::Last,
                })
                .collect();
            let inputs: Vec<Input<'_>> = match span.start {
                0 => tokens.iter().map(|token| Input::Tokens(token)).collect(),
                _ => hidden.iter().map(|rows| Input::Hidden(rows)).collect(),
            };
            let mut outs = vec![vec![9.0]; steps.len()];
            let ran = stage.run_rows(&steps, &inputs, &mut outs);
            assert!(ran.iter().all(Result::is_ok), "{ran:?}");
            hidden = outs;
        }
        for (session, out) in sessions.iter_mut().zip(hidden) {
            session.tokens.push(session.next);
            session.next = greedy(&out);
            session.rows.push(out);
        }
    }

    fn close(&mut self, session: &Session) {
        for (stage, slot) in self.stages.iter_mut().zip(&session.slots) {
            stage.close(*slot);
        }
    }

    /// Sessions of each bench of the first stage.
    fn benches(&self, sessions: &[Session]) -> Vec<Bench> {
        let of = |session: &Session| self.stages[0].bench(session.slots[0]);
        let mut benches: Vec<_> = sessions.iter().filter_map(of).collect();
        benches.sort_unstable();
        benches
    }
}

/// What the whole model says to the same tokens in the same frames; `taken_back` is a position and what was there.
fn alone(model: &Model, prompt: &[u32], n: usize) -> Vec<Vec<f32>> {
    model.reference(prompt, n, N_CTX).1
}

/// Sessions that come and go, decode in changing company and take tokens back; the largest difference from each
/// alone.
fn crowd(model: &Model, fast: bool) -> f32 {
    let mut stages = Stages::new(model, fast);
    let mut dice = Dice(7);
    let mut worst = 0f32;
    let mut sessions: Vec<(Vec<u32>, Session)> = Vec::new();
    let mut opened = 0;
    let mut passes = 0;
    while opened < 2 * SESSIONS || !sessions.is_empty() {
        if sessions.len() < SESSIONS && opened < 2 * SESSIONS && dice.below(3) > 0 {
            opened += 1;
            let prompt = model.prompt(3 + dice.below(70) as usize, opened as u32);
            let session = stages.open(&prompt);
            sessions.push((prompt, session));
        }
        // Some of them have a row ready, in any order.
        let mut ready: Vec<&mut Session> = sessions
            .iter_mut()
            .filter_map(|(_, session)| (dice.below(4) > 0).then_some(session))
            .collect();
        if dice.below(2) == 0 {
            ready.reverse();
        }
        if !ready.is_empty() {
            passes += 1;
            stages.decode(&mut ready);
        }
        if passes % 5 == 4
            && let Some((prompt, session)) = sessions.first_mut()
            && session.rows.len() > 3
        {
            // Two tokens are taken back, and come again.
            let keep = session.tokens.len() - 2;
            session.next = session.tokens[keep];
            session.tokens.truncate(keep);
            session.rows.truncate(keep + 1 - prompt.len());
        }
        if let Some(at) = sessions.iter().position(|(_, s)| s.rows.len() > 12) {
            let (prompt, session) = sessions.remove(at);
            stages.close(&session);
            let expected = alone(model, &prompt, session.rows.len() - 1);
            for (row, expected) in session.rows.iter().zip(&expected) {
                assert_eq!(row.len(), expected.len());
                let off = row.iter().zip(expected).map(|(a, b)| (a - b).abs());
                worst = off.fold(worst, f32::max);
                if greedy(row) != greedy(expected) {
                    break; // the texts part from here on
                }
            }
        }
    }
    for stage in &stages.stages {
        let stats = stage.stats();
        assert_eq!((stats.sessions, stats.kv_bytes), (0, 0), "all is freed");
    }
    worst
}

#[test]
fn rows_of_several_sessions_have_the_bits_of_each_alone() {
    for arch in ["llama", "qwen3moe", "gemma3", "phi3"] {
        let model = Model::random(arch, &tiny(arch), SEED);
        assert_eq!(crowd(&model, false), 0.0, "{arch} in f32");
        for ty in [QuantType::Q8_0, QuantType::Q4_0] {
            assert_eq!(crowd(&model.quantized(ty), false), 0.0, "{arch} in {ty:?}");
        }
    }
}

/// The model's batch noise on this machine: four sessions are fed the same tokens alone and together.
fn batch_noise(model: &Model) -> BatchNoise {
    let rows = |together: bool| {
        let mut stages = Stages::new(model, true);
        let open = |i: u32| stages.open(&model.prompt(9 + i as usize, 1000 + i));
        let mut sessions: Vec<_> = (0..4).map(open).collect();
        for i in 0..24 {
            for (at, session) in (0..).zip(&mut sessions) {
                session.next = model.prompt(24, 2000 + at)[i];
            }
            if together {
                stages.decode(&mut sessions.iter_mut().collect::<Vec<_>>());
            } else {
                sessions.iter_mut().for_each(|s| stages.decode(&mut [s]));
            }
        }
        let rows = sessions.into_iter().flat_map(|session| session.rows);
        rows.collect::<Vec<_>>()
    };
    let mut noise = BatchNoise::default();
    let alone = rows(false);
    for (alone, together) in alone.iter().zip(rows(true)) {
        noise.compare(alone, &together);
    }
    noise
}

#[test]
fn the_k_quants_are_exact_alone_and_within_the_noise_together() {
    let model = Model::random("llama", &tiny("llama"), SEED);
    assert_eq!(batch_noise(&model).greatest(), 0.0, "f32");
    let model = model.quantized(QuantType::Q4KM);
    assert_eq!(crowd(&model, false), 0.0, "rows run one by one");
    let noise = batch_noise(&model);
    let off = crowd(&model, true);
    println!("{noise:?}, a crowd {off}");
    assert!(
        noise.rows() == 100 && off <= noise.limit(),
        "{off} {noise:?}"
    );
    // Noise, and not another text: logits of random weights are some units apart.
    assert!(noise.rms() < 0.05, "{noise:?}");
    let mut stages = Stages::new(&model, false);
    let sessions = [stages.open(&[1, 2, 3]), stages.open(&[1, 2, 3])];
    assert_eq!(stages.benches(&sessions), []);
}

#[test]
#[cfg(target_os = "linux")]
fn a_bench_takes_four_and_fills_again() {
    let model = Model::random("llama", &tiny("llama"), SEED);
    let mut stages = Stages::new(&model, false);
    let mut sessions: Vec<_> = (0..6).map(|_| stages.open(&[1, 2, 3])).collect();
    let benches = stages.benches(&sessions);
    let counts = benches.chunk_by(|a, b| a == b).map(<[_]>::len);
    assert_eq!(counts.collect::<Vec<_>>(), [4, 2]);
    stages.close(&sessions.remove(1));
    sessions.push(stages.open(&[1, 2, 3]));
    assert_eq!(stages.benches(&sessions), benches);
    // Others where they leave, and of another class.
    let stage = &mut stages.stages[0];
    let other = stage.open_beside(N_CTX, 0..2, false).unwrap();
    let longer = stage.open_beside(2 * N_CTX, 0..1, false).unwrap();
    let alone = stage.open(N_CTX, 0..1).unwrap();
    assert!(!benches.contains(&stage.bench(other).unwrap()));
    assert!(!benches.contains(&stage.bench(longer).unwrap()));
    assert_eq!(stage.bench(alone), None);
}

#[test]
fn a_bad_row_spoils_nothing_for_the_others() {
    let model = Model::random("llama", &tiny("llama"), SEED);
    let mut stages = Stages::new(&model, false);
    let (mut a, mut b) = (stages.open(&[1, 2, 3]), stages.open(&[4, 5]));
    let stage = &mut stages.stages[0];
    let step = |session: &Session, pos0| Step {
        slot: session.slots[0],
        layers: 0..1,
        pos0,
        n_rows: 1,
        want: Want::None,
    };
    let steps = [step(&a, 3), step(&b, 9), step(&a, 7)];
    let inputs = [
        Input::Tokens(&[7]),
        Input::Tokens(&[7]),
        Input::Tokens(&[99_999]),
    ];
    let mut outs = vec![Vec::new(); 3];
    let ran = stage.run_rows(&steps, &inputs, &mut outs);
    assert_eq!(ran[0], Ok(()));
    assert!(matches!(
        ran[1],
        Err(EngineError::Gap {
            pos0: 9,
            end: 2,
            ..
        })
    ));
    assert!(matches!(ran[2], Err(EngineError::Token { .. })));
    assert_eq!(outs[0].len(), model.blueprint.n_embd() as usize);
    assert!(outs[1].is_empty() && outs[2].is_empty());
    // The row that ran is written anew.
    stages.decode(&mut [&mut a, &mut b]);
    assert_eq!(a.rows, alone(&model, &[1, 2, 3], 1));
    assert_eq!(b.rows, alone(&model, &[4, 5], 1));
}

/// A row that is replayed beside others that decode: an answer that nobody asked for would be a lie.
#[test]
fn who_wants_no_logits_gets_none_in_company_either() {
    let model = Model::random("llama", &tiny("llama"), SEED);
    let mut stages = Stages::new(&model, false);
    let (mut a, mut b) = (stages.open(&[1, 2, 3]), stages.open(&[4, 5]));
    let (stage, layers) = (&mut stages.stages[1], stages.spans[1].clone());
    let step = |session: &Session, pos0, want| Step {
        slot: session.slots[1],
        layers: layers.clone(),
        pos0,
        n_rows: 1,
        want,
    };
    let steps = [step(&a, 3, Want::None), step(&b, 2, Want::Last)];
    let row = vec![0.5; model.blueprint.n_embd() as usize];
    let mut outs = vec![vec![9.0]; 2];
    let ran = stage.run_rows(
        &steps,
        &[Input::Hidden(&row), Input::Hidden(&row)],
        &mut outs,
    );
    assert_eq!(ran, [Ok(()), Ok(())]);
    assert!(outs[0].is_empty() && outs[1].len() == stage.shape().n_vocab as usize);
    stages.decode(&mut [&mut a, &mut b]);
    assert_eq!(a.rows, alone(&model, &[1, 2, 3], 1));
    assert_eq!(b.rows, alone(&model, &[4, 5], 1));
}

/// Frames of a prompt in parts of a multiple of four rows, as a stage runs them while others decode.
#[test]
fn a_frame_in_parts_has_the_bits_of_the_whole() {
    let run = |stage: &mut LlamaStage, slot: Slot, at: usize, rows: &[u32]| {
        let layers = 0..stage.shape().n_layer;
        let step = Step {
            slot,
            layers,
            pos0: at as u32,
            n_rows: rows.len() as u32,
            want: Want::All,
        };
        let mut out = Vec::new();
        stage.run(&step, &Input::Tokens(rows), &mut out).unwrap();
        out
    };
    for arch in ["llama", "qwen3moe", "gemma3", "phi3"] {
        let model = Model::random(arch, &tiny(arch), SEED);
        for ty in [QuantType::F32, QuantType::Q8_0] {
            let model = model.quantized(ty);
            assert!(model.blueprint.rows_are_exact());
            let prompt = model.prompt(PREFILL_CHUNK as usize * 2, 5);
            let mut stage = model.stage(0..model.blueprint.n_layer());
            let slot = stage.open_beside(N_CTX, 0..model.blueprint.n_layer(), true);
            let slot = slot.unwrap();
            let mut whole = Vec::new();
            for at in [0, 32] {
                whole.extend(run(&mut stage, slot, at, &prompt[at..at + 32]));
            }
            for lens in [
                [4, 28, 32, 0],
                [12, 20, 16, 16],
                [8, 24, 28, 4],
                [20, 12, 8, 24],
            ] {
                let (mut parts, mut at) = (Vec::new(), 0);
                for len in lens.into_iter().filter(|len| *len > 0) {
                    parts.extend(run(&mut stage, slot, at, &prompt[at..at + len]));
                    at += len;
                }
                let off = parts.iter().zip(&whole).map(|(a, b)| (a - b).abs());
                let off = off.fold(0.0, f32::max);
                assert_eq!(off, 0.0, "{arch} in {ty:?}: {lens:?}");
            }
        }
    }
}
