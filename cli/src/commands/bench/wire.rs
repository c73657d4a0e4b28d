//! `shoal bench wire`: what a smaller wire type costs, as perplexity on a text, in pairs with f32.
//!
//! One stage holds the whole model and is run in segments; between two segments the hidden rows go
//! through the wire's codec, exactly as they would between two hops. So the figures are about the
//! codec alone and repeat to the bit; no network is involved.

use std::ops::Range;
use std::path::PathBuf;

use anyhow::Context;
use engine::{
    Blueprint, Input, LlamaStage, LoadOptions, PREFILL_CHUNK, Slot, Stage, Step, Vocab, Want,
};
use serde::Serialize;
use swarm_proto::{Dtype, activation};

use super::{Named, say_title, share_out};
use crate::failure::Failure;
use crate::local_models;
use crate::terminal::{self, DIM, paint};
use crate::tokens;

/// Measure perplexity with f32, bf16 and q8_0 between hops, in pairs on one text.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal bench wire --text held-out.txt
  shoal bench wire --text held-out.txt --model llama-1b --hops 4 --ctx 1024 --windows 20
  shoal bench wire --text held-out.txt --json")]
pub struct Args {
    /// The text; one the model was not trained on.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    #[command(flatten)]
    model: Named,
    /// Hops of the route; the layers are shared out evenly.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    hops: u32,
    /// Tokens of a window.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(8..))]
    ctx: u32,
    /// Windows at most; all of the text by default.
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Compute threads.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    threads: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// The types compared; the first is what the others are held against.
const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::Q8_0];

#[derive(Serialize)]
struct Report {
    model: String,
    hops: u32,
    n_ctx: u32,
    windows: usize,
    tokens: usize,
    wires: Vec<WireReport>,
}

#[derive(Serialize)]
struct WireReport {
    wire: String,
    bytes_per_token_and_hop: usize,
    perplexity: f64,
    /// Against f32 on the same windows.
    perplexity_ratio: f64,
    /// Standard error of the difference in log-perplexity, over windows.
    log_difference_se: f64,
}

/// A stage that holds everything, run as a route would run it.
struct Segments<'a> {
    stage: &'a mut dyn Stage,
    /// The layers of each hop, and its session.
    hops: Vec<(Range<u32>, Slot)>,
    n_layer: u32,
    n_embd: u32,
    wire: Vec<u8>,
}

/// Loads the model, runs every window with every wire type, prints.
pub fn main(args: Args) -> anyhow::Result<()> {
    let home = args.model.home.dir()?;
    let store = local_models::store(&home)?;
    let id = local_models::find(&home, &args.model.model)?;
    let manifest = store.manifest(id)?;
    let vocab = tokens::vocab(&manifest.vocab_header(&store.metadata(id)?)?)?
        .ok_or_else(tokens::no_tokenizer)?;
    let blueprint = Blueprint::new(&manifest.header()?)?;
    let n_ctx = args.ctx.min(blueprint.n_ctx_train());
    let windows = windows(&args, &vocab, n_ctx as usize)?;
    let options = LoadOptions {
        n_threads: args.threads,
        ..LoadOptions::default()
    };
    let bar = terminal::bar_of(blueprint.n_layer().into(), "loading layers");
    let source = node::load::Verified(store.reader(id)?);
    let all = 0..blueprint.n_layer();
    let mut stage = LlamaStage::load(&blueprint, all, &source, &options, &mut |_| bar.inc(1))?;
    bar.finish_and_clear();
    let hops = share_out(blueprint.n_layer(), args.hops);
    let hops = hops
        .into_iter()
        .map(|layers| Ok((layers.clone(), stage.open(n_ctx, layers)?)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut segments = Segments {
        hops,
        n_layer: blueprint.n_layer(),
        n_embd: blueprint.n_embd(),
        stage: &mut stage,
        wire: Vec::new(),
    };
    let mut report = Report {
        model: args.model.model.clone(),
        hops: u32::try_from(segments.hops.len())?,
        n_ctx,
        windows: windows.len(),
        tokens: windows.iter().map(|window| window.len() - 1).sum(),
        wires: Vec::new(),
    };
    let nats = measure(&mut segments, &windows)?;
    let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
    for (dtype, of_dtype) in DTYPES.into_iter().zip(&nats) {
        let (difference, se) = paired(&nats[0], of_dtype);
        report.wires.push(WireReport {
            wire: dtype.to_string(),
            bytes_per_token_and_hop: dtype.row_len(segments.n_embd),
            perplexity: mean(of_dtype).exp(),
            perplexity_ratio: difference.exp(),
            log_difference_se: se,
        });
    }
    if args.json {
        terminal::say_json(&report)
    } else {
        print(&report)
    }
}

/// The text as token ids in windows of `n_ctx`, each beginning as a prompt would.
fn windows(args: &Args, vocab: &Vocab, n_ctx: usize) -> anyhow::Result<Vec<Vec<u32>>> {
    let bytes =
        std::fs::read(&args.text).with_context(|| format!("reading {}", args.text.display()))?;
    let text = String::from_utf8_lossy(&bytes);
    let end = (0..=text.len().min(engine::TEXT_BYTES_MAX))
        .rev()
        .find(|&at| text.is_char_boundary(at))
        .unwrap_or(0);
    let ids = vocab.tokenize(&text[..end], false, false)?;
    let bos = vocab.bos().filter(|_| vocab.adds_bos());
    let room = n_ctx - usize::from(bos.is_some());
    let whole = ids
        .chunks_exact(room)
        .map(|chunk| bos.into_iter().chain(chunk.iter().copied()).collect());
    let windows: Vec<Vec<u32>> = whole.take(args.windows.unwrap_or(usize::MAX)).collect();
    if windows.len() < 2 {
        return Err(Failure::new(format!(
            "{} has {} tokens, two windows of {n_ctx} are the least",
            args.text.display(),
            ids.len()
        ))
        .try_this("a longer text, or a smaller --ctx")
        .into());
    }
    Ok(windows)
}

/// Mean surprise of each window's tokens, by wire type.
fn measure(segments: &mut Segments<'_>, windows: &[Vec<u32>]) -> anyhow::Result<[Vec<f64>; 3]> {
    let bar = terminal::bar_of((windows.len() * DTYPES.len()) as u64, "windows");
    let mut nats = [Vec::new(), Vec::new(), Vec::new()];
    let mut rows = Vec::new();
    for window in windows {
        for (dtype, nats) in DTYPES.into_iter().zip(&mut nats) {
            let mut sum = 0.0;
            for (index, chunk) in window.chunks(PREFILL_CHUNK as usize).enumerate() {
                let pos0 = index * PREFILL_CHUNK as usize;
                segments.run(chunk, u32::try_from(pos0)?, dtype, &mut rows)?;
                let n_vocab = rows.len() / chunk.len();
                for (row, next) in rows.chunks_exact(n_vocab).zip(&window[pos0 + 1..]) {
                    sum += surprise(row, *next).context("a logit is not finite")?;
                }
            }
            nats.push(sum / (window.len() - 1) as f64);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(nats)
}

fn print(report: &Report) -> anyhow::Result<()> {
    let about = format!(
        "{} hops, {} windows of {} tokens",
        report.hops, report.windows, report.n_ctx
    );
    say_title(&report.model, about)?;
    terminal::say(paint(
        DIM,
        "  wire    bytes a token and hop   perplexity   against f32",
    ))?;
    for wire in &report.wires {
        let percent = (wire.perplexity_ratio - 1.0) * 100.0;
        let error = wire.log_difference_se * 100.0;
        let WireReport {
            wire: name,
            bytes_per_token_and_hop: bytes,
            perplexity,
            ..
        } = wire;
        terminal::say(format!(
            "  {name:<7} {bytes:>21} {perplexity:>12.4}   {percent:+.4} % ± {error:.4}"
        ))?;
    }
    Ok(())
}

impl Segments<'_> {
    /// Logits rows of one chunk of tokens, every hidden row between two segments having been through
    /// `dtype`.
    fn run(
        &mut self,
        tokens: &[u32],
        pos0: u32,
        dtype: Dtype,
        rows: &mut Vec<f32>,
    ) -> anyhow::Result<()> {
        let n_rows = u32::try_from(tokens.len())?;
        let mut entering: Vec<f32> = Vec::new();
        for (layers, slot) in self.hops.clone() {
            let input = if layers.start == 0 {
                Input::Tokens(tokens)
            } else {
                Input::Hidden(&entering)
            };
            let step = Step {
                slot,
                layers,
                pos0,
                n_rows,
                want: Want::All,
            };
            self.stage.run(&step, &input, rows)?;
            if step.layers.end < self.n_layer {
                self.wire.clear();
                activation::encode(rows, self.n_embd, dtype, &mut self.wire);
                entering.clear();
                activation::decode(&self.wire, self.n_embd, dtype, &mut entering)?;
            }
        }
        Ok(())
    }
}

/// −ln p(token) from a row of logits.
fn surprise(logits: &[f32], token: u32) -> Option<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits
        .iter()
        .map(|&logit| f64::from(logit - largest).exp())
        .sum();
    let of_token = f64::from(logits.get(token as usize)? - largest);
    let nats = sum.ln() - of_token;
    nats.is_finite().then_some(nats)
}

/// Mean and standard error of the paired differences.
fn paired(of_f32: &[f64], of_other: &[f64]) -> (f64, f64) {
    let n = of_f32.len().max(1) as f64;
    let differences: Vec<f64> = of_f32.iter().zip(of_other).map(|(a, b)| b - a).collect();
    let mean = differences.iter().sum::<f64>() / n;
    let variance = differences.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, (variance / n).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn surprise_is_minus_the_log_of_the_probability() {
        let even = [0.0f32; 8];
        assert!((surprise(&even, 3).unwrap() - 8f64.ln()).abs() < 1e-12);
        assert!(surprise(&even, 8).is_none());
        assert!(surprise(&[f32::NAN, 0.0], 1).is_none());
    }

    #[test]
    fn pairs_that_differ_by_a_constant_have_no_error() {
        let (mean, se) = paired(&[1.0, 2.0, 3.0], &[1.5, 2.5, 3.5]);
        assert!((mean - 0.5).abs() < 1e-12 && se < 1e-12);
    }
}
