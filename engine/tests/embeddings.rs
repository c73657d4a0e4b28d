//! The rows behind the last norm are llama.cpp's own, whichever way the model is cut, and pooled as it pools.

mod support;

use engine::{PREFILL_CHUNK, Pool, Pooling, QuantType, Want, whole_embedding};
use support::{Chain, Model, N_CTX, cuts, tiny};

const SEED: u64 = 20_261_130;

fn model(arch: &str, pooling: u32) -> Model {
    let mut shape = tiny(arch);
    shape.pooling = pooling;
    Model::random(arch, &shape, SEED)
}

/// All rows behind the last norm, in frames of a prompt, through a chain of stages.
fn staged(chain: &mut Chain, tokens: &[u32]) -> Vec<f32> {
    let mut session = chain.open(N_CTX);
    let mut all = Vec::new();
    for (at, chunk) in tokens.chunks(PREFILL_CHUNK as usize).enumerate() {
        let pos = at as u32 * PREFILL_CHUNK;
        chain.frame(&mut session, pos, chunk, Want::Normed);
        all.extend_from_slice(&session.out);
    }
    chain.close(session);
    all
}

fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn the_last_and_the_first_row_are_llama_cpps_bit_by_bit() {
    for arch in ["qwen3", "llama", "gemma3", "phi3", "qwen3moe"] {
        for (pooling, key) in [(Pooling::First, 2), (Pooling::Last, 3)] {
            let model = model(arch, key);
            assert_eq!(
                Pooling::of(model.source.header(), model.blueprint.arch()),
                Ok(Some(pooling))
            );
            let tokens = model.prompt(PREFILL_CHUNK as usize - 3, 5);
            let whole = whole_embedding(&model.path, &tokens).unwrap();
            let n_embd = whole.len();
            for cut in cuts(model.blueprint.n_layer()) {
                let rows = staged(&mut Chain::apart(&model, &cut), &tokens);
                assert_eq!(rows.len(), tokens.len() * n_embd);
                let row = match pooling {
                    Pooling::First => &rows[..n_embd],
                    _ => &rows[rows.len() - n_embd..],
                };
                assert_eq!(bits(row), bits(&whole), "{arch} {pooling:?} {cut:?}");
            }
        }
    }
}

#[test]
fn the_mean_is_llama_cpps_but_for_the_order_of_the_sum() {
    let model = model("qwen3", 1);
    let tokens = model.prompt(29, 9);
    let whole = whole_embedding(&model.path, &tokens).unwrap();
    let rows = staged(&mut Chain::apart(&model, &[0, 1, 3]), &tokens);
    let mut pool = Pool::default();
    rows.chunks_exact(whole.len()).for_each(|row| pool.add(row));
    let unit = pool.unit();
    let length = whole
        .iter()
        .map(|x| f64::from(*x).powi(2))
        .sum::<f64>()
        .sqrt();
    for (ours, theirs) in unit.iter().zip(&whole) {
        let theirs = f64::from(*theirs) / length;
        assert!((f64::from(*ours) - theirs).abs() < 1e-6, "{ours} {theirs}");
    }
}

#[test]
fn long_texts_and_quantised_models_are_the_whole_models_rows() {
    let plain = model("qwen3", 3);
    for model in [
        plain.quantized(QuantType::Q8_0),
        plain.quantized(QuantType::Q4KM),
        plain,
    ] {
        let tokens = model.prompt(2 * PREFILL_CHUNK as usize + 5, 3);
        let mut whole = model.whole(N_CTX);
        let (mut rows, mut out) = (Vec::new(), Vec::new());
        for (at, chunk) in tokens.chunks(PREFILL_CHUNK as usize).enumerate() {
            let pos = at as u32 * PREFILL_CHUNK;
            whole.run(pos, chunk, Want::Normed, &mut out).unwrap();
            rows.extend_from_slice(&out);
        }
        for cut in [&[0, 3][..], &[0, 1, 2, 3]] {
            let ours = staged(&mut Chain::apart(&model, cut), &tokens);
            assert_eq!(bits(&ours), bits(&rows), "{cut:?}");
        }
    }
}

#[test]
fn a_context_that_gave_rows_gives_the_same_logits_after() {
    let model = model("qwen3", 3);
    let tokens = model.prompt(20, 3);
    let mut chain = Chain::apart(&model, &[0, 2, 3]);
    let logits = |chain: &mut Chain| {
        let mut session = chain.open(N_CTX);
        chain.frame(&mut session, 0, &tokens, Want::Last);
        let row = session.out.clone();
        chain.close(session);
        row
    };
    let before = logits(&mut chain);
    let rows = staged(&mut chain, &tokens);
    assert_eq!(rows.len() % model.blueprint.n_embd() as usize, 0);
    // The context of a session that is over serves the next one.
    assert_eq!(bits(&logits(&mut chain)), bits(&before));
    assert_eq!(bits(&staged(&mut chain, &tokens)), bits(&rows));
}
