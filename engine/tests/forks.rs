//! A session that begins with a copy of another's beginning gives what it would have computed itself, bit for bit.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use engine::{EngineError, PREFILL_CHUNK, QuantType, Slot, Stage};
use support::{Chain, Model, same, tiny};

const SEED: u64 = 99;
/// What the sessions begin with: three whole frames.
const COMMON: u32 = 3 * PREFILL_CHUNK;
/// More than one bench of four.
const FORKS: u32 = 6;

fn llama() -> Model {
    Model::random("llama", &tiny("llama"), SEED)
}

fn prompt(model: &Model, of: u32) -> Vec<u32> {
    let common = model.prompt(COMMON as usize, 1);
    let own = model.prompt(9 + of as usize, 100 + of);
    common.into_iter().chain(own).collect()
}

/// Forks a session that decodes, again and again, into lanes beside it, other benches and another size class.
fn forks(model: &Model, what: &str) {
    let n_layer = model.blueprint.n_layer();
    let mut chain = Chain::together(model, &[0, 1, n_layer]);
    let mut source = chain.open_beside(256);
    let first = prompt(model, 0);
    chain.feed(&mut source, 0, &first);
    let mut at = first.len() as u32;
    let (mut tokens, mut rows) = chain.decode(&mut source, at, 2);
    let mut open = Vec::new();
    for of in 1..=FORKS {
        let n_ctx = if of % 3 == 0 { 512 } else { 256 };
        let mine = prompt(model, of);
        let (mut fork, held) = chain.fork(&source, n_ctx, COMMON);
        assert_eq!(held, [COMMON; 2], "{what} {of}");
        // The source goes on meanwhile.
        at += 2;
        let more = chain.decode(&mut source, at, 2);
        tokens.extend(more.0);
        rows.extend(more.1.into_iter().skip(1));
        chain.feed(&mut fork, COMMON, &mine[COMMON as usize..]);
        let got = chain.decode(&mut fork, mine.len() as u32, 6);
        same(
            &got,
            &model.reference(&mine, 6, n_ctx),
            &format!("{what} {of}"),
        );
        open.push(fork);
    }
    let said = tokens.len();
    same(&(tokens, rows), &model.reference(&first, said, 256), what);
    // And a fork of a fork.
    let mine = prompt(model, 50);
    let (mut fork, held) = chain.fork(&open[2], 512, COMMON);
    assert_eq!(held, [COMMON; 2], "{what}");
    chain.feed(&mut fork, COMMON, &mine[COMMON as usize..]);
    let got = chain.decode(&mut fork, mine.len() as u32, 3);
    same(&got, &model.reference(&mine, 3, 512), what);
}

#[test]
fn a_fork_says_what_it_says_alone() {
    let model = llama();
    forks(&model, "f32");
    forks(&model.quantized(QuantType::Q8_0), "q8_0");
    for arch in ["qwen2", "qwen3moe"] {
        forks(&Model::random(arch, &tiny(arch), SEED), arch);
    }
}

/// The memory of windowed layers gives out only what the window still sees.
#[test]
fn what_a_window_forgot_is_not_copied() {
    for arch in ["gemma3", "olmo2"] {
        let model = Model::random(arch, &tiny(arch), SEED);
        let n_layer = model.blueprint.n_layer();
        let mut chain = Chain::together(&model, &[0, n_layer]);
        let mut source = chain.open_beside(256);
        let first = prompt(&model, 0);
        // All within a window of 16.
        chain.feed(&mut source, 0, &first[..12]);
        let (mut fork, held) = chain.fork(&source, 256, 8);
        assert_eq!(held, [8], "{arch}");
        let mine: Vec<u32> = first[..8].iter().chain(&first[20..24]).copied().collect();
        chain.feed(&mut fork, 8, &mine[8..]);
        let again = chain.decode(&mut fork, 12, 20);
        let mut alone = chain.open_beside(256);
        chain.feed(&mut alone, 0, &mine[..8]);
        chain.feed(&mut alone, 8, &mine[8..]);
        same(&again, &chain.decode(&mut alone, 12, 20), arch);

        chain.feed(&mut source, 12, &first[12..]);
        let (mut fork, held) = chain.fork(&source, 256, COMMON);
        assert_eq!(held, [0], "{arch}");
        chain.feed(&mut fork, 0, &first);
        let got = chain.decode(&mut fork, first.len() as u32, 4);
        same(&got, &model.reference(&first, 4, 256), arch);
    }
}

#[test]
fn what_cannot_be_copied_leaves_the_session_empty() {
    let model = llama();
    let n_layer = model.blueprint.n_layer();
    let mut stage = model.stage(0..n_layer);
    let mut open = |n_ctx, layers| stage.open_beside(n_ctx, layers, false).unwrap();
    let (all, other, part) = (
        open(256, 0..n_layer),
        open(256, 0..n_layer),
        open(256, 0..1),
    );
    let mut chain = Chain::of(stage, &[0, n_layer]);
    let mut long = chain.open_beside(1024);
    chain.feed(&mut long, 0, &model.prompt(300, 1));
    let (mut fork, held) = chain.fork(&long, 256, COMMON);
    assert_eq!(held, [0], "more than fits");
    chain.feed(&mut fork, 0, &model.prompt(40, 2));
    let got = chain.decode(&mut fork, 40, 3);
    same(
        &got,
        &model.reference(&model.prompt(40, 2), 3, 256),
        "then on its own",
    );
    let (_, held) = chain.fork(&long, 1024, u32::MAX);
    assert_eq!(held, [300], "no more than there is");
    let stage = &mut chain.stages[0];
    for (from, to) in [(all, other), (part, all), (all, part), (all, all)] {
        assert_eq!(stage.copy(from, to, 32).unwrap(), 0, "{from} {to}");
    }
    let closed = Slot(999);
    for (from, to) in [(closed, all), (all, closed)] {
        let copied = stage.copy(from, to, 1);
        assert_eq!(copied, Err(EngineError::BadSlot(closed)));
    }
}

/// Its rope differs between short contexts and long ones.
#[test]
fn a_rope_by_context_is_not_copied_to_another_size() {
    let model = Model::random("phi3", &tiny("phi3"), SEED);
    let n_layer = model.blueprint.n_layer();
    let mut chain = Chain::together(&model, &[0, n_layer]);
    let mut source = chain.open_beside(256);
    let first = prompt(&model, 0);
    chain.feed(&mut source, 0, &first);
    let (_, held) = chain.fork(&source, 512, COMMON);
    assert_eq!(held, [0]);
    let (mut fork, held) = chain.fork(&source, 256, COMMON);
    assert_eq!(held, [COMMON]);
    chain.feed(&mut fork, COMMON, &first[COMMON as usize..]);
    let got = chain.decode(&mut fork, first.len() as u32, 4);
    same(&got, &model.reference(&first, 4, 256), "phi3");
}
