//! `shoal bench pipeline`: two prompts in flight over two nodes that share the layers so that each reads
//! about as many bytes a token, against one prompt on one node that holds them all, in alternating rounds
//! of one run. What two nodes that hold them all manage side by side is what the machine can do at most:
//! cores that share a memory bus slow each other down.

use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use engine::Blueprint;
use node::{Session, runtime};
use serde::Serialize;

use super::decode::{Round, context, median, node_round};
use super::nodes::Nodes;
use super::{Measured, sameness, say_title, share_out, temporary};
use crate::local_models;
use crate::swarm::{Ask, Member};
use crate::terminal;

/// Measure throughput: two prompts over two nodes against one prompt on one node.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal bench pipeline                        the demo model
  shoal bench pipeline --one-billion          a random model of 1.1 billion weights in Q4_K_M
  shoal bench pipeline --model llama-1b --json

While one node computes the first half of one prompt's token, the other computes the second half of the
other's: with a free core for each node the throughput should come close to twice one node's, or to what
two separate nodes reach side by side where cores share too much for that.")]
pub struct Args {
    #[command(flatten)]
    model: Measured,
    /// Tokens of each prompt decoded in a round.
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
    rounds: u32,
    tokens_per_round: u32,
    one_node_tokens_per_s: f64,
    two_nodes_tokens_per_s: f64,
    /// Two nodes that hold everything, one prompt each.
    side_by_side_tokens_per_s: f64,
    /// Median over rounds of the throughput of two nodes over one node's of the same round.
    ratio: f64,
    /// The same of two nodes side by side: the most that this machine allows.
    ratio_side_by_side: f64,
    /// Each prompt gave the tokens that one node gives.
    same_tokens: bool,
}

/// Starts the three nodes, one thread each, measures, prints.
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

/// Tokens a second of each round.
#[derive(Default)]
struct Rates {
    single: Vec<f64>,
    pair: Vec<f64>,
    side_by_side: Vec<f64>,
    same_tokens: bool,
}

impl Rates {
    /// How many times one node's throughput `rates` are.
    fn ratio(&self, rates: &[f64]) -> f64 {
        median(
            rates
                .iter()
                .zip(&self.single)
                .map(|(rate, single)| rate / single),
        )
    }
}

async fn measure(args: &Args, file: &Path, blueprint: &Blueprint) -> anyhow::Result<Report> {
    let n_layer = blueprint.n_layer();
    let layer_bytes: Vec<u64> = (0..n_layer).map(|i| blueprint.layer_bytes(i)).collect();
    let cut = balanced_cut(&layer_bytes, blueprint.head_bytes());
    let whole = share_out(n_layer, 1);
    let nodes = [
        Nodes::start(file, &whole, 1)?,
        Nodes::start(file, &whole, 1)?,
        Nodes::start(file, &[0..cut, cut..n_layer], 1)?,
    ];
    let mut members = Vec::new();
    for nodes in &nodes {
        members.push(nodes.client().join_quietly().await?);
    }
    let mut sessions = Vec::new();
    for member in [0, 1, 2, 2] {
        sessions.push(open(args, &members[member]).await?);
    }
    let rates = rounds(args, &mut sessions).await?;
    for session in sessions {
        session.close().await;
    }
    let model = members[0].model(None).await?.name;
    for member in members {
        member.leave().await;
    }
    Ok(Report {
        model,
        rounds: args.rounds,
        tokens_per_round: args.tokens,
        ratio: rates.ratio(&rates.pair),
        ratio_side_by_side: rates.ratio(&rates.side_by_side),
        one_node_tokens_per_s: median(rates.single.into_iter()),
        two_nodes_tokens_per_s: median(rates.pair.into_iter()),
        side_by_side_tokens_per_s: median(rates.side_by_side.into_iter()),
        same_tokens: rates.same_tokens,
    })
}

/// Runs the rounds: two sessions on a whole node each, then two over the same two halves.
async fn rounds(args: &Args, sessions: &mut [Session]) -> anyhow::Result<Rates> {
    let [alone, beside, first, second] = sessions else {
        anyhow::bail!("four sessions are measured")
    };
    let bar = terminal::bar_of(u64::from(args.rounds) + 1, "rounds");
    let mut rates = Rates {
        same_tokens: true,
        ..Rates::default()
    };
    for round in 0..=args.rounds {
        let begun = Instant::now();
        let reference = node_round(alone, args.tokens).await?;
        let single = rate(&[&reference], begun);
        let begun = Instant::now();
        let (a, b) = tokio::try_join!(
            node_round(first, args.tokens),
            node_round(second, args.tokens)
        )?;
        let pair = rate(&[&a, &b], begun);
        let begun = Instant::now();
        let (c, d) = tokio::try_join!(
            node_round(alone, args.tokens),
            node_round(beside, args.tokens)
        )?;
        let side_by_side = rate(&[&c, &d], begun);
        // The first round warms all up.
        if round > 0 {
            rates.single.push(single);
            rates.pair.push(pair);
            rates.side_by_side.push(side_by_side);
            rates.same_tokens &= a.tokens == reference.tokens && b.tokens == reference.tokens;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(rates)
}

/// Where to cut so that both halves read about as many bytes a token: the second also reads the head.
fn balanced_cut(layer_bytes: &[u64], head_bytes: u64) -> u32 {
    let total = layer_bytes.iter().sum::<u64>() + head_bytes;
    let mut before = 0;
    let gap = |(_, before): &(u32, u64)| total.abs_diff(2 * before);
    let cuts = (1u32..).zip(layer_bytes).map(|(cut, bytes)| {
        before += bytes;
        (cut, before)
    });
    cuts.take(layer_bytes.len().saturating_sub(1))
        .min_by_key(gap)
        .map_or(1, |(cut, _)| cut)
}

async fn open(args: &Args, member: &Member) -> anyhow::Result<Session> {
    let model = member.model(None).await?;
    let n_ctx = context(args.tokens);
    member
        .open(&model, Ask::plain(n_ctx.min(model.n_ctx_max)))
        .await
        .context("opening a session")
}

/// Tokens a second of rounds that ran together since `begun`.
fn rate(rounds: &[&Round], begun: Instant) -> f64 {
    let tokens: usize = rounds.iter().map(|round| round.tokens.len()).sum();
    tokens as f64 / begun.elapsed().as_secs_f64()
}

fn print(report: &Report) -> anyhow::Result<()> {
    let about = format!(
        "{} rounds of {} tokens, one thread a node",
        report.rounds, report.tokens_per_round
    );
    say_title(&report.model, about)?;
    terminal::say(format!(
        "  one node, one prompt    {:>10.1} tokens/s",
        report.one_node_tokens_per_s
    ))?;
    terminal::say(format!(
        "  two nodes, two prompts  {:>10.1} tokens/s",
        report.two_nodes_tokens_per_s
    ))?;
    let same = sameness(report.same_tokens);
    terminal::say(format!(
        "  ratio                   {:>10.2}  {same}",
        report.ratio
    ))?;
    terminal::say(format!(
        "  two whole nodes side by side {:>5.1} tokens/s: the ratio that this machine allows is {:.2}",
        report.side_by_side_tokens_per_s, report.ratio_side_by_side
    ))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::balanced_cut;

    #[test]
    fn the_cut_counts_the_head() {
        assert_eq!(balanced_cut(&[10; 8], 0), 4);
        assert_eq!(balanced_cut(&[10; 16], 160), 15);
        assert_eq!(balanced_cut(&[10; 16], 80), 12);
        assert_eq!(balanced_cut(&[10; 2], 1000), 1);
    }
}
