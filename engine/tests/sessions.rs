//! Sessions in a llama.cpp stage: apart from each other, bounded, taken back,
//! and every mistake an error with a name.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::too_many_lines)]

mod support;

use std::io;

use engine::{
    EngineError, Fault, Input, LlamaStage, LoadError, LoadOptions, Loaded, PREFILL_CHUNK, Slot,
    Stage, Step, TensorSource, Want,
};
use support::{Chain, Model, greedy, same, tiny};

const SEED: u64 = 77;

fn llama() -> Model {
    Model::random("llama", &tiny("llama"), SEED)
}

fn with(model: &Model, options: &LoadOptions) -> LlamaStage {
    let layers = 0..model.blueprint.n_layer();
    LlamaStage::load(
        &model.blueprint,
        layers,
        &model.source,
        options,
        &mut |_| (),
    )
    .unwrap()
}

#[test]
fn writing_at_an_earlier_position_takes_back() {
    for arch in ["llama", "gemma3", "phi3", "qwen3moe"] {
        let model = Model::random(arch, &tiny(arch), SEED);
        let (first, second) = (model.prompt(75, 1), model.prompt(50, 2));
        let keep = PREFILL_CHUNK as usize;
        // What a fresh session says to the kept part and the second text.
        let fresh: Vec<u32> = first[..keep].iter().chain(&second).copied().collect();
        let expected = model.reference(&fresh, 8, 256);
        let n_layer = model.blueprint.n_layer();
        let mut chain = Chain::apart(&model, &[0, 1, n_layer]);
        let mut session = chain.open(256);
        chain.feed(&mut session, 0, &first);
        for step in 0..3 {
            let token = greedy(&session.out);
            chain.frame(&mut session, 75 + step, &[token], Want::Last);
        }
        chain.feed(&mut session, keep as u32, &second);
        let (mut tokens, mut rows) = (Vec::new(), vec![session.out.clone()]);
        for step in 0..8 {
            let token = greedy(&session.out);
            tokens.push(token);
            // Each frame twice: the second replaces the first.
            let pos = (fresh.len() + step) as u32;
            chain.frame(&mut session, pos, &[token], Want::Last);
            chain.frame(&mut session, pos, &[token], Want::Last);
            rows.push(session.out.clone());
        }
        same(&(tokens, rows), &expected, arch);
    }
}

#[test]
fn interleaved_sessions_do_not_see_each_other() {
    let model = llama();
    let n_layer = model.blueprint.n_layer();
    let prompts = [model.prompt(40, 3), model.prompt(61, 4), model.prompt(3, 5)];
    let expected: Vec<_> = prompts
        .iter()
        .map(|p| model.reference(p, 12, 256))
        .collect();
    let mut chain = Chain::apart(&model, &[0, 2, n_layer]);
    let mut sessions: Vec<_> = prompts.iter().map(|_| chain.open(256)).collect();
    let mut got = vec![(Vec::new(), Vec::new()); prompts.len()];
    for (session, prompt) in sessions.iter_mut().zip(&prompts) {
        chain.feed(session, 0, prompt);
    }
    for step in 0..=12 {
        for (i, session) in sessions.iter_mut().enumerate() {
            got[i].1.push(session.out.clone());
            if step < 12 {
                let token = greedy(&session.out);
                got[i].0.push(token);
                let pos = (prompts[i].len() + step) as u32;
                chain.frame(session, pos, &[token], Want::Last);
            }
        }
    }
    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
        same(got, expected, &format!("session {i}"));
    }
}

#[test]
fn kept_contexts_give_what_fresh_ones_do() {
    let model = llama();
    let expected = model.reference(&model.prompt(70, 6), 10, 256);
    let mut chain = Chain::together(&model, &[0, 1, 3]);
    for round in 0..4 {
        let mut other = chain.open(256);
        chain.feed(&mut other, 0, &model.prompt(90, 100 + round));
        chain.close(other);
        let got = chain.generate(&model.prompt(70, 6), 10, 256);
        same(&got, &expected, &format!("round {round}"));
    }
}

#[test]
fn layers_come_and_go_while_sessions_run() {
    let model = llama();
    let read =
        |layers| Loaded::read(&model.blueprint, &[layers], &model.source, &mut |_| ()).unwrap();
    let prompt = model.prompt(40, 11);
    let expected = model.reference(&prompt, 6, 256);
    let mut chain = Chain::apart(&model, &[0, 1]);
    let stage = &mut chain.stages[0];
    // Not in the order of the layers, and each a model of its own.
    for (layer, held) in [(2, "0..1, 2..3"), (1, "0..3")] {
        stage.add(read(layer..layer + 1)).unwrap();
        assert_eq!(stage.stats().held.to_string(), held);
    }
    chain.cut(&[0, 1, 3]);
    same(&chain.generate(&prompt, 6, 256), &expected, "one by one");
    let mut old = chain.open(256);
    chain.feed(&mut old, 0, &prompt);
    let first = vec![old.out.clone()];
    // Replaced by one model of all, then taken away: who is at work does not notice.
    let stage = &mut chain.stages[0];
    stage.add(read(0..3)).unwrap();
    same(&chain.generate(&prompt, 6, 256), &expected, "in one");
    let stage = &mut chain.stages[0];
    stage.remove(&(0..2));
    assert_eq!(
        stage.stats().held.to_string(),
        "0..3",
        "loaded together, leave together"
    );
    stage.add(read(1..3)).unwrap();
    let stats = stage.stats();
    assert_eq!(
        stats.held.to_string(),
        "1..3",
        "without those that replace it"
    );
    let free = stats.free_cells;
    stage.limit(stats.kv_bytes_max / 2);
    let less = stage.stats().free_cells;
    assert!(0 < less && less < free, "{less} of {free}");
    stage.remove(&(1..3));
    let stats = stage.stats();
    assert_eq!((stats.held.n_layers(), stats.free_cells), (0, 0));
    assert!(matches!(
        stage.open(256, 0..1),
        Err(EngineError::LayersNotHeld { .. })
    ));
    let (mut tokens, mut rows) = (Vec::new(), first);
    for step in 0..6 {
        let token = greedy(&old.out);
        tokens.push(token);
        chain.frame(&mut old, (prompt.len() + step) as u32, &[token], Want::Last);
        rows.push(old.out.clone());
    }
    same(&(tokens, rows), &expected, "with layers that left");
    chain.close(old);
    assert_eq!(
        chain.stages[0].stats().tensor_bytes,
        0,
        "the embedding, too"
    );
}

#[test]
fn logits_of_every_row_are_those_of_each() {
    let model = llama();
    let tokens = model.prompt(PREFILL_CHUNK as usize, 9);
    let mut whole = model.whole(256);
    let (mut all, mut staged) = (Vec::new(), Vec::new());
    whole.run(0, &tokens, Want::All, &mut all).unwrap();
    let n_vocab = model.blueprint.n_vocab() as usize;
    assert_eq!(all.len(), tokens.len() * n_vocab);
    let mut chain = Chain::apart(&model, &[0, 2, 3]);
    let mut session = chain.open(256);
    chain.frame(&mut session, 0, &tokens, Want::All);
    staged.clone_from(&session.out);
    assert_eq!(staged, all);
    chain.frame(&mut session, 0, &tokens, Want::None);
    assert!(session.out.is_empty());
}

/// What `n` sessions of 256 positions in all three layers count as.
fn sessions_bytes(model: &Model, n: u64) -> u64 {
    let mut stage = model.stage(0..3);
    for _ in 0..n {
        stage.open(256, 0..3).unwrap();
    }
    let bytes = stage.stats().kv_bytes;
    assert!(
        bytes
            > n * (0..3)
                .map(|i| model.blueprint.kv_cell_bytes(i) * 256)
                .sum::<u64>()
    );
    bytes
}

#[test]
fn a_full_cache_says_who_holds_it() {
    let model = llama();
    let session = sessions_bytes(&model, 1);
    // Sixteen MB of working buffers are free, what lies beyond counts.
    let many = 24;
    let options = LoadOptions {
        n_threads: 1,
        n_ctx_max: None,
        kv_bytes_max: sessions_bytes(&model, many) - (16 << 20),
    };
    let mut stage = with(&model, &options);
    assert!(stage.stats().free_cells > 256);
    let mut slots: Vec<_> = (0..many).map(|_| stage.open(200, 0..3).unwrap()).collect();
    let full = stage.open(1, 0..1).unwrap_err();
    let expected = EngineError::Full {
        needed: session,
        used: many * session,
        budget: options.kv_bytes_max,
        sessions: many as u32,
        largest: session,
    };
    assert_eq!(full, expected);
    assert_eq!(full.fault(), Fault::Local);
    assert_eq!(stage.stats().free_cells, 0);
    // The kept context is reused, or gives way to another size.
    let last = slots.pop().unwrap();
    stage.close(last);
    stage.close(last);
    let short = stage.open(100, 0..3).unwrap();
    stage.close(short);
    for slot in slots.drain(..) {
        stage.close(slot);
    }
    stage.open(512, 0..3).unwrap();
    assert_eq!(stage.stats().sessions, 1);
}

#[test]
fn a_session_in_part_of_a_group_pays_for_the_group() {
    let model = llama();
    let mut stage = model.stage(0..3);
    stage.open(256, 0..3).unwrap();
    let whole = stage.stats().kv_bytes;
    stage.open(256, 1..2).unwrap();
    assert_eq!(stage.stats().kv_bytes, 2 * whole);
}

#[test]
fn mistakes_are_named_and_leave_the_session_as_it_was() {
    let model = llama();
    let mut stage = with(
        &model,
        &LoadOptions {
            n_threads: 1,
            ..LoadOptions::default()
        },
    );
    assert!(matches!(
        stage.open(8, 0..4),
        Err(EngineError::LayersNotHeld { .. })
    ));
    assert!(matches!(
        stage.open(8, 2..2),
        Err(EngineError::LayersNotHeld { .. })
    ));
    assert!(matches!(
        stage.open(0, 0..3),
        Err(EngineError::ContextLength { max: 1024, .. })
    ));
    assert!(matches!(
        stage.open(1025, 0..3),
        Err(EngineError::ContextLength { .. })
    ));
    let slot = stage.open(40, 0..2).unwrap();
    let mut out = Vec::new();
    let step = Step {
        slot,
        layers: 0..2,
        pos0: 0,
        n_rows: 2,
        want: Want::None,
    };
    stage.run(&step, &Input::Tokens(&[5, 6]), &mut out).unwrap();
    let before = out.clone();
    let n_embd = model.blueprint.n_embd() as usize;
    let rows = vec![0.5; n_embd * 2];
    let many = vec![1; PREFILL_CHUNK as usize + 1];
    use EngineError as E;
    let mut refused = |step: Step, input: Input<'_>| {
        let mut out = vec![1.0];
        let error = stage.run(&step, &input, &mut out).unwrap_err();
        assert!(out.is_empty());
        assert_eq!(error.fault(), Fault::Caller, "{error}");
        error
    };
    let tokens = Input::Tokens(&[5, 6]);
    let at = |pos0| Step {
        pos0,
        ..step.clone()
    };
    let over = |layers| Step {
        layers,
        ..step.clone()
    };
    let n = |n_rows| Step {
        n_rows,
        ..step.clone()
    };
    assert!(matches!(
        refused(at(3), tokens),
        E::Gap {
            pos0: 3,
            end: 2,
            layer: 0
        }
    ));
    assert!(matches!(
        refused(at(39), tokens),
        E::ContextFull { end: 41, n_ctx: 40 }
    ));
    assert!(matches!(
        refused(at(u32::MAX), tokens),
        E::ContextFull { .. }
    ));
    assert!(matches!(
        refused(over(0..3), tokens),
        E::LayersNotHeld { .. }
    ));
    assert!(matches!(
        refused(over(1..2), Input::Hidden(&rows)),
        E::LayersNotHeld { .. }
    ));
    assert!(matches!(
        refused(at(0), Input::Hidden(&rows)),
        E::InputKind { layer: 0, .. }
    ));
    assert!(matches!(
        refused(at(0), Input::Tokens(&[5, 320])),
        E::Token { token: 320, .. }
    ));
    assert!(matches!(
        refused(at(0), Input::Tokens(&[5])),
        E::InputLength { .. }
    ));
    assert!(matches!(refused(n(0), tokens), E::RowCount { .. }));
    assert!(matches!(
        refused(n(many.len() as u32), Input::Tokens(&many)),
        E::RowCount { .. }
    ));
    let stranger = Step {
        slot: Slot(slot.0 + 1),
        ..step.clone()
    };
    assert!(matches!(refused(stranger, tokens), E::BadSlot(_)));
    stage.run(&step, &tokens, &mut out).unwrap();
    assert_eq!(out, before);
    stage.close(slot);
    assert_eq!(stage.run(&step, &tokens, &mut out), Err(E::BadSlot(slot)));
}

#[test]
fn hidden_rows_are_counted_before_llama_cpp_reads_them() {
    let model = llama();
    let mut stage = model.stage(1..3);
    let slot = stage.open(64, 1..3).unwrap();
    let step = Step {
        slot,
        layers: 1..3,
        pos0: 0,
        n_rows: 2,
        want: Want::Last,
    };
    let rows = vec![0.5; model.blueprint.n_embd() as usize * 2];
    let mut run = |input: Input<'_>| stage.run(&step, &input, &mut Vec::new());
    assert!(matches!(
        run(Input::Hidden(&rows[1..])),
        Err(EngineError::InputLength { .. })
    ));
    assert!(matches!(
        run(Input::Tokens(&[1, 2])),
        Err(EngineError::InputKind { layer: 1, .. })
    ));
    run(Input::Hidden(&rows)).unwrap();
}

/// A source that lies.
struct Lying<'a> {
    model: &'a Model,
    about: &'static str,
    lie: fn(&mut Vec<u8>) -> io::Result<()>,
}

impl TensorSource for Lying<'_> {
    fn read(&self, name: &str, out: &mut Vec<u8>) -> io::Result<()> {
        self.model.source.read(name, out)?;
        if name == self.about {
            (self.lie)(out)
        } else {
            Ok(())
        }
    }
}

fn load_lying(
    about: &'static str,
    lie: fn(&mut Vec<u8>) -> io::Result<()>,
) -> Result<LlamaStage, LoadError> {
    let model = llama();
    let source = Lying {
        model: &model,
        about,
        lie,
    };
    let options = LoadOptions {
        n_threads: 1,
        ..LoadOptions::default()
    };
    LlamaStage::load(&model.blueprint, 0..3, &source, &options, &mut |_| ())
}

#[test]
fn tensors_that_are_missing_or_of_another_length() {
    let name = "blk.1.attn_q.weight";
    let missing = load_lying(name, |_| Err(io::Error::other("disk on fire")))
        .err()
        .unwrap();
    assert!(
        matches!(&missing, LoadError::Tensor { name: n, .. } if n == name),
        "{missing}"
    );
    assert!(missing.to_string().contains("disk on fire"));
    let short = load_lying(name, |bytes| {
        bytes.pop();
        Ok(())
    });
    assert!(matches!(
        short.err().unwrap(),
        LoadError::TensorLength { len: 262143, .. }
    ));
    let embedding = load_lying("token_embd.weight", |bytes| {
        bytes.clear();
        Ok(())
    });
    assert!(matches!(
        embedding.err().unwrap(),
        LoadError::TensorLength { len: 0, .. }
    ));
}

#[test]
fn broken_weights_are_an_error_not_an_abort() {
    let mut stage = load_lying("blk.1.ffn_down.weight", |bytes| {
        bytes.fill(0xff); // NaN in f32
        Ok(())
    })
    .unwrap();
    let slot = stage.open(64, 0..2).unwrap();
    let step = Step {
        slot,
        layers: 0..2,
        pos0: 0,
        n_rows: 2,
        want: Want::None,
    };
    let error = stage
        .run(&step, &Input::Tokens(&[1, 2]), &mut Vec::new())
        .unwrap_err();
    assert!(error.to_string().contains("not finite"), "{error}");
    assert_eq!(error.fault(), Fault::Local);
}

#[test]
fn layers_that_are_not_there() {
    let model = llama();
    let options = LoadOptions::default();
    for layers in [0..0, 3..4, 2..5] {
        let loaded = LlamaStage::load(
            &model.blueprint,
            layers,
            &model.source,
            &options,
            &mut |_| (),
        );
        assert!(matches!(
            loaded.err().unwrap(),
            LoadError::Layers { n_layer: 3, .. }
        ));
    }
}

#[test]
fn progress_names_each_layer() {
    let model = llama();
    let mut seen = Vec::new();
    let options = LoadOptions {
        n_threads: 1,
        ..LoadOptions::default()
    };
    LlamaStage::load(&model.blueprint, 1..3, &model.source, &options, &mut |i| {
        seen.push(i)
    })
    .unwrap();
    assert_eq!(seen, [1, 2]);
}
