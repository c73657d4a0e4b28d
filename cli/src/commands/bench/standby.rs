//! `shoal bench standby`: what it costs that others stand by, while nothing fails: the same prompt with and
//! without, in alternating rounds of one run.

use std::path::Path;

use anyhow::Context;
use engine::Blueprint;
use node::{Session, runtime};
use serde::Serialize;
use swarm_proto::Dtype;

use super::decode::{Round, context, median, node_round};
use super::nodes::Nodes;
use super::{Measured, sameness, say_title, share_out, temporary};
use crate::local_models;
use crate::swarm::{Ask, Member};
use crate::terminal;

/// Measure what standbys cost: throughput, bytes, KV.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal bench standby
  shoal bench standby --hops 3 --json
  shoal bench standby --one-billion

Two nodes hold each span, so that somebody stands by for every hop. All share this machine's cores: on
machines of their own a standby takes time from nobody.")]
pub struct Args {
    #[command(flatten)]
    model: Measured,
    /// Hops of the route; as many nodes stand by.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    hops: u32,
    /// Tokens decoded in a round.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// Rounds of each.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    model: String,
    hops: usize,
    standbys: usize,
    rounds: u32,
    tokens_per_round: u32,
    off_tokens_per_s: f64,
    auto_tokens_per_s: f64,
    /// Median over rounds of the speed with standbys over that without.
    ratio: f64,
    /// Sent to standbys, beside headers.
    bytes_per_token: usize,
    /// Positions times layers of KV that they hold for a session of this length.
    kv_cells: u64,
    /// The answer is the same with them.
    same_tokens: bool,
}

/// Starts the nodes, measures, prints.
pub fn main(args: Args) -> anyhow::Result<()> {
    let temp = temporary()?;
    let file = args.model.file(temp.path())?;
    let blueprint = Blueprint::new(&local_models::header_of_file(&file)?)?;
    let json = args.json;
    let report = runtime::run(async move { measure(&args, &file, &blueprint).await })??;
    if json {
        terminal::say_json(&report)
    } else {
        print(&report)
    }
}

async fn measure(args: &Args, file: &Path, blueprint: &Blueprint) -> anyhow::Result<Report> {
    let spans = share_out(blueprint.n_layer(), args.hops);
    let nodes = Nodes::start(file, &[spans.clone(), spans].concat(), 1)?;
    let member = nodes.client().join_quietly().await?;
    let mut off = open(args, &member, false).await?;
    let mut auto = open(args, &member, true).await?;
    let standbys = auto.standbys();
    let (mut plain, mut fed, mut same_tokens) = (Vec::new(), Vec::new(), true);
    let bar = terminal::bar_of(u64::from(args.rounds) + 1, "rounds");
    for round in 0..=args.rounds {
        let without = node_round(&mut off, args.tokens).await?;
        let with = node_round(&mut auto, args.tokens).await?;
        // The first round warms both up.
        if round > 0 {
            same_tokens &= with.tokens == without.tokens;
            plain.push(without);
            fed.push(with);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let row = |first: bool| match first {
        true => size_of::<u32>(),
        false => Dtype::F32.row_len(blueprint.n_embd()),
    };
    let layers: u64 = standbys.iter().map(|hop| u64::from(hop.layers.len())).sum();
    let report = Report {
        model: member.model(None).await?.name,
        hops: auto.route().len(),
        standbys: standbys.len(),
        rounds: args.rounds,
        tokens_per_round: args.tokens,
        off_tokens_per_s: 1e6 / median(plain.iter().map(Round::mean_us)),
        auto_tokens_per_s: 1e6 / median(fed.iter().map(Round::mean_us)),
        ratio: median(
            plain
                .iter()
                .zip(&fed)
                .map(|(a, b)| a.mean_us() / b.mean_us()),
        ),
        bytes_per_token: standbys.iter().map(|hop| row(hop.layers.start == 0)).sum(),
        kv_cells: layers * u64::from(context(args.tokens)),
        same_tokens,
    };
    for session in [off, auto] {
        session.close().await;
    }
    member.leave().await;
    Ok(report)
}

async fn open(args: &Args, member: &Member, standby: bool) -> anyhow::Result<Session> {
    let model = member.model(None).await?;
    let n_ctx = context(args.tokens).min(model.n_ctx_max);
    let ask = Ask {
        standby,
        ..Ask::plain(n_ctx)
    };
    member.open(&model, ask).await.context("opening a session")
}

fn print(report: &Report) -> anyhow::Result<()> {
    let about = format!(
        "{} hops, {} standbys, {} rounds of {} tokens, all on this machine",
        report.hops, report.standbys, report.rounds, report.tokens_per_round
    );
    say_title(&report.model, about)?;
    let same = sameness(report.same_tokens);
    for line in [
        format!(
            "  nobody stands by        {:>10.1} tokens/s",
            report.off_tokens_per_s
        ),
        format!(
            "  somebody for every hop  {:>10.1} tokens/s",
            report.auto_tokens_per_s
        ),
        format!("  ratio                   {:>10.2}  {same}", report.ratio),
        format!(
            "  sent to standbys        {:>10} bytes a token",
            report.bytes_per_token
        ),
        format!(
            "  KV at standbys          {:>10} positions of a layer",
            report.kv_cells
        ),
    ] {
        terminal::say(line)?;
    }
    Ok(())
}
