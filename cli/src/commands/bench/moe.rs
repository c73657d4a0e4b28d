//! `shoal bench moe`: a mixture whose experts are with several holders against the same model in one
//! piece, in alternating rounds of one run. Holders are threads of this process: what is measured is
//! what it costs that experts are asked for at all; with `--wire` each is behind a network of its own,
//! over loopback and encrypted as always.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use engine::{
    ExpertCall, ExpertError, ExpertHolder, ExpertHolders, ExpertLayout, ExpertReply, ExpertWorker,
    FileSource, HolderId, InProcess, RandomShape, RandomWeights, WholeModel,
};
use node::experts::Loopback;
use serde::Serialize;

mod grid;

use super::decode::{Round, context, median, plain_round};
use super::{sameness, say_title, temporary};
use crate::failure::Failure;
use crate::home::Home;
use crate::{local_models, terminal};

/// Calls that may wait at a holder: one trunk has one at a time.
const CALLS_MAX: usize = 64;

/// Measure what it costs that experts of a mixture are computed elsewhere.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal bench moe                               a random mixture of 32 million weights
  shoal bench moe --model models/demo-moe.gguf  which experts are used, too
  shoal bench moe --olmoe --holders 4           a random model of OLMoE's width (2 GB of temporary disk)
  shoal bench moe --wire                        each holder behind a network of its own, over loopback
  shoal bench moe --olmoe --wire --rtt-ms 0.25  and what a round trip costs that takes so much longer
  shoal bench moe --grid --rounds 2             whether the planner chooses the faster way
  shoal bench moe --json

Both sides decode the same prompt greedily; that they chose the same tokens is part of the report.")]
pub struct Args {
    /// A model with experts, in one file: a name, the beginning of an id, or a GGUF file.
    #[arg(short, long, value_name = "NAME|ID|FILE", conflicts_with = "olmoe")]
    model: Option<String>,
    #[command(flatten)]
    home: Home,
    /// A random model of OLMoE's shape with 16 experts, 8 for each token, made for this run.
    #[arg(long)]
    olmoe: bool,
    /// Holders that the experts are dealt out to.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    holders: u32,
    /// Ask the holders over loopback networks, as other machines are asked.
    #[arg(long)]
    wire: bool,
    /// Measure as well with the answers of each layer held back by so many milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 0.0)]
    rtt_ms: f64,
    /// Whether the planner chooses the faster of an island and a pipeline, for 48 injected round trips and bandwidths; some minutes.
    #[arg(long, conflicts_with_all = ["rtt_ms", "wire"])]
    grid: bool,
    /// Tokens decoded in a round.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// Rounds of each side.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    model: String,
    holders: u32,
    moe_layers: usize,
    wire: bool,
    rtt_ms: f64,
    rounds: u32,
    tokens_per_round: u32,
    whole_tokens_per_s: f64,
    trunk_tokens_per_s: f64,
    /// Median over rounds of the trunk's speed over the whole model's of the same round.
    ratio: f64,
    /// What the middle token of a round takes longer, over the layers that have experts; the median of rounds.
    added_us_per_layer: f64,
    /// With the answers held back.
    delayed_tokens_per_s: Option<f64>,
    /// The trunk's middle token over that with the answers held back, of the same round; the median of rounds.
    delayed_ratio: Option<f64>,
    same_tokens: bool,
    whole_tensor_bytes: u64,
    trunk_tensor_bytes: u64,
    holder_tensor_bytes: Vec<u64>,
    /// Rows of each expert, by layer; where each is.
    used: BTreeMap<u32, Vec<Used>>,
}

#[derive(Serialize)]
struct Used {
    expert: u32,
    holder: u32,
    rows: u64,
}

/// Holders whose answers come later, at times.
struct Far {
    near: Arc<dyn ExpertHolders>,
    rtt_us: AtomicU64,
}

impl ExpertHolders for Far {
    fn holder_of(&self, layer: u32, expert: u32) -> Option<HolderId> {
        self.near.holder_of(layer, expert)
    }

    fn place(&self, layer: u32, experts: &[(u32, u32)]) -> Vec<Option<HolderId>> {
        self.near.place(layer, experts)
    }

    fn ask(&self, calls: Vec<(HolderId, ExpertCall)>) -> Result<Vec<ExpertReply>, ExpertError> {
        let replies = self.near.ask(calls)?;
        // Spun: a sleep takes a good part of such a time longer than it was told.
        let held = Duration::from_micros(self.rtt_us.load(Ordering::Relaxed));
        let begun = Instant::now();
        while begun.elapsed() < held {
            std::hint::spin_loop();
        }
        Ok(replies)
    }
}

/// Makes the model where asked to, deals its experts out, measures, prints.
pub fn main(args: Args) -> anyhow::Result<()> {
    let temp = temporary()?;
    let (name, file) = model(&args, temp.path())?;
    let source = FileSource::open(&file)?;
    let layout = ExpertLayout::new(source.header()).map_err(|why| {
        Failure::new(format!("{name}: {why}"))
            .try_this("`shoal bench moe` without --model makes a mixture of its own")
    })?;
    if args.grid {
        return grid::main(&args, name, &file, &layout, &source);
    }
    let layout = Arc::new(layout);
    let workers = deal_out(&layout, &source, args.holders)?;
    let json = args.json;
    let report = match args.wire {
        false => {
            let near = Arc::new(InProcess::new(Arc::clone(&layout), workers.clone()));
            let mut report = measure(&args, &name, &file, &layout, &workers, near.clone())?;
            let used = near.used().into_iter();
            report.used = by_layer(used.map(|e| (e.layer, e.expert, e.rows)), args.holders);
            report
        }
        true => node::runtime::run(async move {
            let wired = Loopback::start(&layout, workers.clone()).await?;
            let island = wired.island();
            let measured = tokio::task::spawn_blocking(move || {
                let mut report = measure(&args, &name, &file, &layout, &workers, island.clone())?;
                let used = island.used().into_iter();
                let used = used.map(|(layer, expert, rows)| (layer.into(), expert.into(), rows));
                report.used = by_layer(used, args.holders);
                anyhow::Ok(report)
            });
            let report = measured.await?;
            wired.stop().await;
            report
        })??,
    };
    match json {
        true => terminal::say_json(&report),
        false => print(&report),
    }
}

/// Rounds of all sides, in turn.
fn measure(
    args: &Args,
    name: &str,
    file: &Path,
    layout: &ExpertLayout,
    workers: &[Arc<ExpertWorker>],
    near: Arc<dyn ExpertHolders>,
) -> anyhow::Result<Report> {
    let rtt = Duration::try_from_secs_f64(args.rtt_ms / 1e3).context("--rtt-ms")?;
    let rtt_us = u64::try_from(rtt.as_micros()).context("--rtt-ms")?;
    let far = Arc::new(Far {
        near,
        rtt_us: AtomicU64::new(0),
    });
    let n_ctx = context(args.tokens);
    let mut whole = WholeModel::load(file, n_ctx, 1)?;
    let mut trunk = WholeModel::load_trunk(file, n_ctx, 1, far.clone())?;
    let bar = terminal::bar_of(u64::from(args.rounds) + 1, "rounds");
    let (mut of_whole, mut of_trunk, mut of_far) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=args.rounds {
        let a = plain_round(&mut whole, args.tokens)?;
        let b = plain_round(&mut trunk, args.tokens)?;
        let mut c = None;
        if rtt_us > 0 {
            far.rtt_us.store(rtt_us, Ordering::Relaxed);
            c = Some(plain_round(&mut trunk, args.tokens)?);
            far.rtt_us.store(0, Ordering::Relaxed);
        }
        // The first round warms all of them up.
        if round > 0 {
            of_whole.push(a);
            of_trunk.push(b);
            of_far.extend(c);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let moe_layers = layout.layers().count();
    let speed = |rounds: &[Round]| 1e6 / median(rounds.iter().map(Round::mean_us));
    let delayed = !of_far.is_empty();
    let sides = of_trunk
        .iter()
        .zip(&of_whole)
        .chain(of_far.iter().zip(&of_whole));
    Ok(Report {
        model: name.into(),
        holders: args.holders,
        moe_layers,
        wire: args.wire,
        rtt_ms: args.rtt_ms,
        rounds: args.rounds,
        tokens_per_round: args.tokens,
        whole_tokens_per_s: speed(&of_whole),
        trunk_tokens_per_s: speed(&of_trunk),
        ratio: of_both(&of_whole, &of_trunk, |whole, trunk| {
            whole.mean_us() / trunk.mean_us()
        }),
        added_us_per_layer: of_both(&of_whole, &of_trunk, |whole, trunk| {
            (trunk.p50_us() - whole.p50_us()) / moe_layers as f64
        }),
        delayed_tokens_per_s: delayed.then(|| speed(&of_far)),
        delayed_ratio: delayed.then(|| {
            of_both(&of_trunk, &of_far, |trunk, far| {
                trunk.p50_us() / far.p50_us()
            })
        }),
        same_tokens: sides.into_iter().all(|(a, b)| a.tokens == b.tokens),
        whole_tensor_bytes: whole.tensor_bytes(),
        trunk_tensor_bytes: trunk.tensor_bytes(),
        holder_tensor_bytes: workers
            .iter()
            .map(|worker| worker.stats().tensor_bytes)
            .collect(),
        used: BTreeMap::new(),
    })
}

/// Loads every expert at one of `holders` holders, in turn.
fn deal_out(
    layout: &Arc<ExpertLayout>,
    source: &FileSource,
    holders: u32,
) -> anyhow::Result<Vec<Arc<ExpertWorker>>> {
    let _wheel = terminal::wheel(format!("dealing experts out to {holders} holders"));
    let mut workers = Vec::new();
    for holder in 0..holders {
        let mut held = ExpertHolder::new(Arc::clone(layout), 1)?;
        for layer in layout.layers() {
            for expert in (0..layout.n_expert()).filter(|e| (layer + e) % holders == holder) {
                held.load(layer, expert, source)?;
            }
        }
        workers.push(Arc::new(ExpertWorker::spawn(held, CALLS_MAX)?));
    }
    Ok(workers)
}

fn model(args: &Args, temp: &Path) -> anyhow::Result<(String, PathBuf)> {
    if let Some(model) = &args.model {
        let home = args.home.dir()?;
        let path = local_models::whole_file(&home, model)?.into_path(temp)?;
        return Ok((model.clone(), path));
    }
    let (name, shape) = match args.olmoe {
        true => ("random OLMoE", olmoe()),
        false => ("random mixture", small()),
    };
    let path = temp.join("random-moe.gguf");
    let _wheel = terminal::wheel(format!("making a {name}"));
    let weights = RandomWeights::One(gguf::TensorType::Q8_0);
    engine::random_model("olmoe", &shape, weights, 1, &path)?;
    Ok((name.into(), path))
}

/// 8 layers of 16 experts of 0.2 MB.
fn small() -> RandomShape {
    RandomShape {
        n_layer: 8,
        n_head_kv: 8,
        n_expert: 16,
        n_expert_used: 4,
        ..RandomShape::tiny()
    }
}

/// 16 layers of 16 experts of 6.7 MB, 8 for each token.
fn olmoe() -> RandomShape {
    RandomShape {
        n_layer: 16,
        n_embd: 2048,
        n_ff: 1024,
        n_head: 16,
        n_head_kv: 16,
        head_dim: 128,
        n_vocab: 4096,
        n_expert: 16,
        n_expert_used: 8,
        ..RandomShape::tiny()
    }
}

/// The median over rounds of what `of` makes of both sides of one.
fn of_both(whole: &[Round], trunk: &[Round], of: impl Fn(&Round, &Round) -> f64) -> f64 {
    let rounds = whole.iter().zip(trunk);
    median(rounds.map(|(whole, trunk)| of(whole, trunk)))
}

fn by_layer(used: impl Iterator<Item = (u32, u32, u64)>, holders: u32) -> BTreeMap<u32, Vec<Used>> {
    let mut by_layer: BTreeMap<u32, Vec<Used>> = BTreeMap::new();
    for (layer, expert, rows) in used {
        by_layer.entry(layer).or_default().push(Used {
            expert,
            // As they were dealt out.
            holder: (layer + expert) % holders,
            rows,
        });
    }
    by_layer
}

fn print(report: &Report) -> anyhow::Result<()> {
    let about = format!(
        "{} layers with experts, {} holders{}, {} rounds of {} tokens",
        report.moe_layers,
        report.holders,
        if report.wire { " over loopback" } else { "" },
        report.rounds,
        report.tokens_per_round
    );
    say_title(&report.model, about)?;
    let mb = |bytes: u64| bytes as f64 / 1e6;
    terminal::say(format!(
        "  whole   {:>10.1} tokens/s  {:>10.1} MB of tensors",
        report.whole_tokens_per_s,
        mb(report.whole_tensor_bytes)
    ))?;
    let fullest = report.holder_tensor_bytes.iter().max().copied();
    terminal::say(format!(
        "  trunk   {:>10.1} tokens/s  {:>10.1} MB, at most {:.1} MB at a holder",
        report.trunk_tokens_per_s,
        mb(report.trunk_tensor_bytes),
        mb(fullest.unwrap_or(0))
    ))?;
    let same = sameness(report.same_tokens);
    terminal::say(format!(
        "  ratio   {:>10.4}           {:>+10.1} µs a layer and token, {same}",
        report.ratio, report.added_us_per_layer
    ))?;
    if let (Some(speed), Some(ratio)) = (report.delayed_tokens_per_s, report.delayed_ratio) {
        terminal::say(format!(
            "  {:<7} {speed:>10.1} tokens/s  {ratio:>10.4} of the trunk, answers {} ms later",
            "later", report.rtt_ms
        ))?;
    }
    for (layer, experts) in &report.used {
        let all: u64 = experts.iter().map(|expert| expert.rows).sum();
        let share = |expert: &Used| {
            let percent = 100.0 * expert.rows as f64 / all.max(1) as f64;
            format!("{percent:.0}@{}", expert.holder)
        };
        let shares: Vec<_> = experts.iter().map(share).collect();
        terminal::say(format!(
            "  layer {layer:>3}, % of rows @ holder: {}",
            shares.join(" ")
        ))?;
    }
    Ok(())
}
