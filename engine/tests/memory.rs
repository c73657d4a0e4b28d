//! What sessions take of the machine's memory, as the system sees it. Linux only:
//! others do not say. One test, because the whole process is measured.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod support;

use std::ops::Range;

use engine::{Input, LlamaStage, PREFILL_CHUNK, Slot, Stage, Step, Want};
use support::{Model, process_bytes, tiny};

fn held(stage: &LlamaStage) -> Range<u32> {
    stage.stats().held.spans()[0].clone()
}

fn chunk(stage: &mut LlamaStage, slot: Slot) {
    let shape = stage.shape();
    let n_rows = PREFILL_CHUNK;
    let step = Step {
        slot,
        layers: held(stage),
        pos0: 0,
        n_rows,
        want: Want::All,
    };
    let tokens: Vec<u32> = (0..n_rows).collect();
    let rows = vec![0.5; (n_rows * shape.n_embd) as usize];
    let input = match held(stage).start {
        0 => Input::Tokens(&tokens),
        _ => Input::Hidden(&rows),
    };
    stage.run(&step, &input, &mut Vec::new()).unwrap();
}

#[test]
fn sessions_take_about_what_they_are_said_to() {
    const SESSIONS: u64 = 24;
    let mut wide = tiny("llama");
    (wide.n_ff, wide.n_vocab) = (4096, 8192);
    for (arch, shape, n_ctx, inner, beside) in [
        ("llama", tiny("llama"), 256, false),
        ("llama", tiny("llama"), 1024, true),
        ("llama", wide.clone(), 256, false),
        ("llama", wide, 256, true),
        ("qwen3moe", tiny("qwen3moe"), 256, true),
        ("gemma3", tiny("gemma3"), 1024, true),
    ]
    .into_iter()
    .flat_map(|(arch, shape, n_ctx, inner)| {
        // Alone, and beside others.
        [false, true].map(|beside| (arch, shape.clone(), n_ctx, inner, beside))
    }) {
        let model = Model::random(arch, &shape, 1);
        let mut stage = model.stage(if inner { 1..2 } else { 0..shape.n_layer });
        let layers = held(&stage);
        let open = |stage: &mut LlamaStage| match beside {
            true => stage.open_beside(n_ctx, layers.clone(), true).unwrap(),
            false => stage.open(n_ctx, layers.clone()).unwrap(),
        };
        // The first pays for what is shared.
        let first = open(&mut stage);
        chunk(&mut stage, first);
        let (before, said) = (process_bytes("status", "VmRSS:"), stage.stats().kv_bytes);
        for _ in 0..SESSIONS {
            let slot = open(&mut stage);
            chunk(&mut stage, slot);
        }
        let taken = (process_bytes("status", "VmRSS:") - before) / SESSIONS;
        let said = (stage.stats().kv_bytes - said) / SESSIONS;
        let what = format!(
            "{arch} {layers:?} of {n_ctx}, beside others {beside}: {taken} bytes a session, said {said}"
        );
        eprintln!("{what}");
        assert!(taken < said + said / 20, "{what}");
        assert!(taken > said / 2, "{what}");
    }
}
