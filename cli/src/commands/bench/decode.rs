//! `shoal bench decode`: a node that holds everything against the library's plain decode loop, in
//! alternating rounds of one run, so that a busy machine slows both.

use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use engine::WholeModel;
use node::{Session, runtime};
use serde::Serialize;
use swarm_proto::{Form, Want, WantRows};

use super::nodes::Nodes;
use super::{Measured, percentile, sameness, say_title, temporary};
use crate::local_models;
use crate::model_facts::ModelFacts;
use crate::swarm::Ask;
use crate::terminal;

/// Measure decode speed: a node holding everything against a plain loop.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal bench decode                          the demo model
  shoal bench decode --one-billion            a random model of 1.1 billion weights in Q4_K_M
  shoal bench decode --model llama-1b --threads 8 --json

Both sides decode the same prompt greedily; that they chose the same tokens is part of the report.")]
pub struct Args {
    #[command(flatten)]
    model: Measured,
    /// Tokens decoded in a round.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// Rounds of each side.
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Compute threads of both.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=512))]
    threads: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    model: String,
    threads: u32,
    rounds: u32,
    tokens_per_round: u32,
    plain_tokens_per_s: f64,
    node_tokens_per_s: f64,
    /// Median over rounds of the node's speed over the plain loop's of the same round.
    ratio: f64,
    plain_us_per_token: f64,
    node_us_per_token: f64,
    added_us_per_token: f64,
    same_tokens: bool,
}

/// Token ids of the prompt: any will do, but not one alone.
pub(super) const PROMPT: [u32; 8] = [1, 17, 33, 65, 97, 129, 161, 193];

/// Makes the model where asked to, starts the node, measures, prints.
pub fn main(args: Args) -> anyhow::Result<()> {
    let temp = temporary()?;
    let file = args.model.file(temp.path())?;
    let facts = ModelFacts::new(&local_models::header_of_file(&file)?)?;
    let nodes = Nodes::start(
        &file,
        std::slice::from_ref(&(0..facts.n_layer)),
        args.threads,
    )?;
    let json = args.json;
    let report = runtime::run(async move { measure(&args, &nodes, &file).await })??;
    if json {
        terminal::say_json(&report)
    } else {
        print(&report)
    }
}

/// The context that a round of `tokens` needs.
pub(super) fn context(tokens: u32) -> u32 {
    tokens.saturating_add(PROMPT.len() as u32)
}

/// Tokens chosen and microseconds of each.
#[derive(Default)]
pub(super) struct Round {
    /// What was chosen, in order.
    pub(super) tokens: Vec<u32>,
    us: Vec<f64>,
}

impl Round {
    pub(super) fn add(&mut self, token: u32, begun: Instant) {
        self.tokens.push(token);
        self.us.push(begun.elapsed().as_secs_f64() * 1e6);
    }

    /// Of each token.
    pub(super) fn us(&self) -> &[f64] {
        &self.us
    }

    /// Of one token, the middle one.
    pub(super) fn p50_us(&self) -> f64 {
        median(self.us.iter().copied())
    }

    /// Of one token.
    pub(super) fn mean_us(&self) -> f64 {
        self.us.iter().sum::<f64>() / self.us.len() as f64
    }
}

async fn measure(args: &Args, nodes: &Nodes, file: &Path) -> anyhow::Result<Report> {
    let member = nodes.client().join_quietly().await?;
    let model = member.model(None).await?;
    let n_ctx = context(args.tokens).min(model.n_ctx_max);
    let mut session = member.open(&model, Ask::plain(n_ctx)).await?;
    let mut whole = WholeModel::load(file, n_ctx, args.threads)?;
    let n = n_ctx - PROMPT.len() as u32;
    let bar = terminal::bar_of(u64::from(args.rounds) + 1, "rounds");
    let (mut plain, mut node) = (Vec::new(), Vec::new());
    for round in 0..=args.rounds {
        let of_plain = tokio::task::block_in_place(|| plain_round(&mut whole, n))?;
        let of_node = node_round(&mut session, n).await?;
        // The first round warms both up.
        if round > 0 {
            plain.push(of_plain);
            node.push(of_node);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    session.close().await;
    member.leave().await;
    let ratios = plain
        .iter()
        .zip(&node)
        .map(|(plain, node)| plain.mean_us() / node.mean_us());
    let (plain_us, node_us) = (
        median(plain.iter().map(Round::mean_us)),
        median(node.iter().map(Round::mean_us)),
    );
    Ok(Report {
        model: model.name,
        threads: args.threads,
        rounds: args.rounds,
        tokens_per_round: n,
        plain_tokens_per_s: 1e6 / plain_us,
        node_tokens_per_s: 1e6 / node_us,
        ratio: median(ratios),
        plain_us_per_token: plain_us,
        node_us_per_token: node_us,
        added_us_per_token: median(
            plain
                .iter()
                .zip(&node)
                .map(|(plain, node)| node.mean_us() - plain.mean_us()),
        ),
        same_tokens: plain
            .iter()
            .zip(&node)
            .all(|(plain, node)| plain.tokens == node.tokens),
    })
}

pub(super) fn plain_round(whole: &mut WholeModel, n: u32) -> anyhow::Result<Round> {
    let mut round = Round::default();
    let mut row = Vec::new();
    whole.feed(0, &PROMPT, &mut row)?;
    let mut token = best(&row)?;
    for i in 0..n {
        let begun = Instant::now();
        whole.feed(PROMPT.len() as u32 + i, &[token], &mut row)?;
        token = best(&row)?;
        round.add(token, begun);
    }
    Ok(round)
}

/// `n` tokens after the prompt, greedily.
pub(super) async fn node_round(session: &mut Session, n: u32) -> anyhow::Result<Round> {
    let want = Want {
        rows: WantRows::Last,
        form: Form::Top(1),
    };
    let mut round = Round::default();
    session.truncate(0)?;
    session.feed(&PROMPT, want).await?;
    let mut token = session
        .next_logits()
        .await?
        .argmax()
        .context("an empty row")?;
    for _ in 0..n {
        let begun = Instant::now();
        session.feed(&[token], want).await?;
        let row = session.next_logits().await?;
        token = row.argmax().context("an empty row")?;
        round.add(token, begun);
        session.recycle(row);
    }
    Ok(round)
}

/// The likeliest token, as cheaply as a plain loop would.
pub(super) fn best(row: &[f32]) -> anyhow::Result<u32> {
    let first = (0u32, *row.first().context("an empty row")?);
    Ok((0u32..)
        .zip(row.iter().copied())
        .fold(
            first,
            |best, next| if next.1 > best.1 { next } else { best },
        )
        .0)
}

pub(super) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    percentile(&sorted, 0.5)
}

fn print(report: &Report) -> anyhow::Result<()> {
    let about = format!(
        "{} rounds of {} tokens, {} threads",
        report.rounds, report.tokens_per_round, report.threads
    );
    say_title(&report.model, about)?;
    terminal::say(format!(
        "  plain loop  {:>10.1} tokens/s  {:>10.1} µs a token",
        report.plain_tokens_per_s, report.plain_us_per_token
    ))?;
    terminal::say(format!(
        "  node        {:>10.1} tokens/s  {:>10.1} µs a token",
        report.node_tokens_per_s, report.node_us_per_token
    ))?;
    let same = sameness(report.same_tokens);
    terminal::say(format!(
        "  ratio       {:>10.4}           {:>+10.1} µs a token, {same}",
        report.ratio, report.added_us_per_token
    ))?;
    Ok(())
}
