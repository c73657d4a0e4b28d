//! `shoal bench hops`: what a hop costs beyond compute.

use std::time::Instant;

use node::runtime;
use serde::Serialize;
use swarm_proto::{Dtype, Form, Want, WantRows};

use super::nodes::Nodes;
use super::{Measured, Quantiles, say_title, share_out, temporary};
use crate::local_models;
use crate::swarm::Ask;
use crate::terminal::{self, DIM, paint};

/// Measure the overhead of a hop beyond compute, on loopback, encrypted.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal bench hops
  shoal bench hops --hops 6 --steps 2000 --json
  shoal bench hops --model llama-1b --wire q8_0

A step is one token through all hops and back. Its overhead is its round trip less the compute time
that the hops report, shared among them: streams, encryption, wake-ups, queues.")]
pub struct Args {
    #[command(flatten)]
    model: Measured,
    /// Nodes on the route.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=64))]
    hops: u32,
    /// Steps measured.
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(10..))]
    steps: u32,
    /// How activations travel: f32, bf16 or q8_0.
    #[arg(long, value_name = "TYPE", default_value_t = Dtype::F32)]
    wire: Dtype,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    model: String,
    hops: usize,
    steps: usize,
    wire: String,
    encrypted: bool,
    overhead_us_per_hop: Quantiles,
    round_trip_us: Quantiles,
    compute_us: Quantiles,
    target_us_per_hop: Target,
}

/// What the project aims at on loopback.
#[derive(Serialize)]
struct Target {
    p50: f64,
    p99: f64,
}

/// Steps that are not measured: connections, caches and clocks settle.
const WARM_UP: u32 = 32;

/// Starts the nodes, measures, prints.
pub fn main(args: Args) -> anyhow::Result<()> {
    let temp = temporary()?;
    let file = args.model.file(temp.path())?;
    let n_layer = local_models::header_of_file(&file)
        .and_then(|header| crate::model_facts::ModelFacts::new(&header))?
        .n_layer;
    let nodes = Nodes::start(&file, &share_out(n_layer, args.hops), 1)?;
    let json = args.json;
    let report = runtime::run(async move { measure(&args, &nodes).await })??;
    if json {
        terminal::say_json(&report)
    } else {
        print(&report)
    }
}

async fn measure(args: &Args, nodes: &Nodes) -> anyhow::Result<Report> {
    let member = nodes.client().join_quietly().await?;
    let model = member.model(None).await?;
    let n_ctx = (args.steps + WARM_UP).min(model.n_ctx_max);
    let mut session = member
        .open(
            &model,
            Ask {
                dtype: args.wire,
                ..Ask::plain(n_ctx)
            },
        )
        .await?;
    let hops = session.route().len();
    let bar = terminal::bar_of(args.steps.into(), "steps");
    let (mut overheads, mut round_trips, mut computes) = (Vec::new(), Vec::new(), Vec::new());
    let want = Want {
        rows: WantRows::Last,
        form: Form::Top(1),
    };
    let mut token = 1;
    for step in 0..WARM_UP + args.steps {
        if session.pos() == n_ctx {
            session.truncate(0)?;
        }
        let begun = Instant::now();
        session.feed(&[token], want).await?;
        let row = session.next_logits().await?;
        let round_trip = begun.elapsed().as_secs_f64() * 1e6;
        token = row.argmax().unwrap_or(1);
        if step >= WARM_UP {
            let compute = f64::from(row.spent_us);
            round_trips.push(round_trip);
            computes.push(compute);
            overheads.push((round_trip - compute) / hops as f64);
            bar.inc(1);
        }
        session.recycle(row);
    }
    bar.finish_and_clear();
    session.close().await;
    member.leave().await;
    Ok(Report {
        model: model.name,
        hops,
        steps: overheads.len(),
        wire: args.wire.to_string(),
        encrypted: true,
        overhead_us_per_hop: Quantiles::of(overheads),
        round_trip_us: Quantiles::of(round_trips),
        compute_us: Quantiles::of(computes),
        target_us_per_hop: Target {
            p50: 80.0,
            p99: 250.0,
        },
    })
}

fn print(report: &Report) -> anyhow::Result<()> {
    let about = format!(
        "{} hops, {} steps, wire {}, encrypted, loopback",
        report.hops, report.steps, report.wire
    );
    say_title(&report.model, about)?;
    terminal::say(paint(
        DIM,
        format!("  {:<28} {:>10} {:>10}", "µs", "p50", "p99"),
    ))?;
    for (what, of) in [
        ("overhead of a hop", &report.overhead_us_per_hop),
        ("round trip of a token", &report.round_trip_us),
        ("compute in it", &report.compute_us),
    ] {
        terminal::say(format!("  {what:<28} {:>10.1} {:>10.1}", of.p50, of.p99))?;
    }
    Ok(())
}
