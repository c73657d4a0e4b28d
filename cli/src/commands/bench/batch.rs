//! `shoal bench batch`: many sessions over one route of nodes, together and one alone, in one run; what company
//! changes in their logits; and what a long prompt does to the tokens of a session that runs.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use engine::{BatchNoise, Blueprint};
use futures::future::try_join_all;
use node::session::LogitsRow;
use node::{Session, runtime};
use serde::Serialize;
use swarm_proto::{Form, Numerics, Want, WantRows};

mod noise;
mod prompted;

use self::noise::Noise;
use self::prompted::Beside;
use super::nodes::Nodes;
use super::{Measured, percentile, say_title, share_out, temporary};
use crate::local_models;
use crate::swarm::{Ask, Member};
use crate::terminal;

/// Measure what many sessions over one route share, and what a long prompt does to one that runs.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal bench batch                       the demo model over 4 hops
  shoal bench batch --one-billion         a random model of 1.1 billion weights in Q4_K_M
  shoal bench batch --numerics exact --json

Nodes run the rows of several sessions in one pass where the model's types give the same bits so, or the session
is fast. One session alone is measured before and after the others, in the same run. What company changes in the
logits is the model's batch noise here: a fast session may say something else only where two tokens were as close
as that. Then a long prompt arrives beside a session that runs, whose tokens should come within twice their usual
gap. With --one-billion all of it takes about two minutes on two quiet cores.")]
pub struct Args {
    #[command(flatten)]
    model: Measured,
    /// Nodes on the route, one thread each.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=16))]
    hops: u32,
    /// Sessions at once [default: 1,2,4,8; with --one-billion 8].
    #[arg(
        long,
        value_name = "N,N,…",
        value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(1..=16)
    )]
    sessions: Vec<u32>,
    /// Tokens that each decodes.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// Tokens of the prompt that arrives beside a session that runs; 0 leaves that out.
    #[arg(long, value_name = "N", default_value_t = 2000)]
    prompt: u32,
    /// As `shoal serve --numerics`.
    #[arg(long, value_name = "exact|fast", default_value_t = Numerics::Fast)]
    numerics: Numerics,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Args {
    /// How many at once: fewer numbers for a model that takes its time.
    fn crowds(&self) -> Vec<u32> {
        match (&self.sessions[..], self.model.one_billion) {
            ([], false) => vec![1, 2, 4, 8],
            ([], true) => vec![8],
            (some, _) => some.to_vec(),
        }
    }
}

#[derive(Serialize)]
struct Report {
    model: String,
    hops: u32,
    numerics: Numerics,
    tokens_each: u32,
    /// One session alone, before and after the others.
    alone_tokens_per_s: [f64; 2],
    at_once: Vec<Crowd>,
    batch_noise: Option<Noise>,
    beside_a_prompt: Option<Beside>,
    took_s: f64,
}

/// So many sessions at once.
#[derive(Serialize)]
struct Crowd {
    sessions: u32,
    /// Of all together.
    tokens_per_s: f64,
    /// Over one session's: the mean of before and after.
    ratio: f64,
    /// Between two tokens of a session.
    gap_ms: Gaps,
    /// Sessions that said what one alone said.
    same_text: u32,
    /// And those that parted from it where noise explains that.
    within_noise: u32,
}

#[derive(Clone, Serialize)]
struct Gaps {
    p50: f64,
    p95: f64,
    max: f64,
}

impl Gaps {
    fn of(gaps: &[Duration]) -> Self {
        let mut ms: Vec<f64> = gaps.iter().map(|gap| gap.as_secs_f64() * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        Self {
            p50: percentile(&ms, 0.5),
            p95: percentile(&ms, 0.95),
            max: percentile(&ms, 1.0),
        }
    }
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
    let begun = Instant::now();
    let spans = share_out(blueprint.n_layer(), args.hops);
    let nodes = Nodes::start(file, &spans, 1)?;
    let member = nodes.client().join_quietly().await?;
    let model = member.model(None).await?;
    let most = args.crowds().into_iter().max().unwrap_or(1);
    let n_ctx = (PROMPT_MAX + args.tokens.max(noise::TOKENS)).min(model.n_ctx_max);
    let mut sessions = Vec::new();
    for _ in 0..most {
        sessions.push(open(args, &member, n_ctx).await?);
    }
    let noise = noise::measure(&mut sessions).await?;
    let (alone_tokens_per_s, at_once) = crowds(args, &mut sessions, &noise).await?;
    for session in sessions {
        session.close().await;
    }
    let room = model.n_ctx_max / 8 * 7;
    let beside_a_prompt = match args.prompt {
        0 => None,
        prompt => Some(prompted::measure(args, &member, prompt.min(room)).await?),
    };
    member.leave().await;
    Ok(Report {
        model: model.name,
        hops: args.hops,
        numerics: args.numerics,
        tokens_each: args.tokens,
        alone_tokens_per_s,
        at_once,
        batch_noise: Noise::of(&noise),
        beside_a_prompt,
        took_s: begun.elapsed().as_secs_f64(),
    })
}

/// Prompts of the sessions that run together differ in length by one each.
const PROMPT_MAX: u32 = 24;

async fn crowds(
    args: &Args,
    sessions: &mut [Session],
    noise: &BatchNoise,
) -> anyhow::Result<([f64; 2], Vec<Crowd>)> {
    let numbers = args.crowds();
    let bar = terminal::bar_of((numbers.len() + sessions.len()) as u64 + 1, "rounds");
    // What each says alone is what it should say in company.
    let mut alone: Vec<Together> = Vec::new();
    for (i, session) in sessions.iter_mut().enumerate() {
        alone.push(run(args, &mut [session], i).await?);
        bar.inc(1);
    }
    let mut rounds = Vec::new();
    for n in numbers {
        let mut some: Vec<&mut Session> = sessions.iter_mut().take(n as usize).collect();
        rounds.push((n, run(args, &mut some, 0).await?));
        bar.inc(1);
    }
    let first = sessions.first_mut().context("no session")?;
    let after = run(args, &mut [first], 0).await?.rate();
    bar.finish_and_clear();
    let tokens: usize = alone.iter().map(|one| one.gaps.len()).sum();
    let took: Duration = alone.iter().map(|one| one.took).sum();
    let before = tokens as f64 / took.as_secs_f64();
    let single = f64::midpoint(before, after);
    let said: Vec<&Said> = alone.iter().flat_map(|one| &one.said).collect();
    let crowds = rounds.into_iter().map(|(n, round)| {
        let parted = || {
            round
                .said
                .iter()
                .zip(&said)
                .map(|(said, alone)| said.parted(alone))
        };
        Crowd {
            sessions: n,
            tokens_per_s: round.rate(),
            ratio: round.rate() / single,
            gap_ms: Gaps::of(&round.gaps),
            same_text: parted().filter(Option::is_none).count() as u32,
            within_noise: parted()
                .flatten()
                .filter(|apart| noise.explains(*apart))
                .count() as u32,
        }
    });
    Ok(([before, after], crowds.collect()))
}

/// What a session said, and how far apart the two likeliest tokens were each time.
struct Said {
    text: Vec<u32>,
    apart: Vec<f32>,
}

impl Said {
    /// Where the text is another one than alone: how far apart the two likeliest tokens were there.
    fn parted(&self, alone: &Said) -> Option<f32> {
        let at = self
            .text
            .iter()
            .zip(&alone.text)
            .position(|(a, b)| a != b)?;
        alone.apart.get(at).copied()
    }
}

/// What sessions did together.
struct Together {
    said: Vec<Said>,
    gaps: Vec<Duration>,
    took: Duration,
}

impl Together {
    fn rate(&self) -> f64 {
        self.gaps.len() as f64 / self.took.as_secs_f64()
    }
}

/// Each session answers a prompt of its own; the clock runs while they decode. `first` is the number of the first.
async fn run(args: &Args, sessions: &mut [&mut Session], first: usize) -> anyhow::Result<Together> {
    let prompts = sessions.iter_mut().enumerate().map(async |(i, session)| {
        session.truncate(0)?;
        answer(session, &short_prompt(first + i)).await
    });
    let tokens = try_join_all(prompts).await?;
    let begun = Instant::now();
    let decoded = sessions
        .iter_mut()
        .zip(tokens)
        .map(async |(session, (token, apart))| {
            let (mut text, mut apart, mut gaps) = (vec![token], vec![apart], Vec::new());
            for _ in 0..args.tokens {
                let last = Instant::now();
                let (token, by) = answer(session, &[text[text.len() - 1]]).await?;
                gaps.push(last.elapsed());
                text.push(token);
                apart.push(by);
            }
            anyhow::Ok((Said { text, apart }, gaps))
        });
    let decoded = try_join_all(decoded).await?;
    let took = begun.elapsed();
    let (said, gaps): (Vec<_>, Vec<_>) = decoded.into_iter().unzip();
    let gaps = gaps.into_iter().flatten().collect();
    Ok(Together { said, gaps, took })
}

/// The likeliest token after these, and by how much.
async fn answer(session: &mut Session, tokens: &[u32]) -> anyhow::Result<(u32, f32)> {
    let row = row(session, tokens, Form::Top(2)).await?;
    let apart = match row.top[..] {
        [(_, first), (_, second), ..] => first - second,
        _ => f32::INFINITY,
    };
    let token = row.argmax().context("an empty row")?;
    session.recycle(row);
    Ok((token, apart))
}

/// The row of the last of these tokens.
async fn row(session: &mut Session, tokens: &[u32], form: Form) -> anyhow::Result<LogitsRow> {
    let want = Want {
        rows: WantRows::Last,
        form,
    };
    session.feed(tokens, want).await?;
    Ok(session.next_logits().await?)
}

/// The prompt of the session with this number.
fn short_prompt(i: usize) -> Vec<u32> {
    prompt(8 + i as u32 % 16, i as u32)
}

/// `n` tokens that every vocabulary has, others for another `seed`.
fn prompt(n: u32, seed: u32) -> Vec<u32> {
    let token = |i: u32| {
        let mixed = i
            .wrapping_add(seed.wrapping_mul(97))
            .wrapping_mul(2_654_435_761);
        3 + (mixed >> 20) % 200
    };
    (0..n).map(token).collect()
}

async fn open(args: &Args, member: &Member, n_ctx: u32) -> anyhow::Result<Session> {
    let model = member.model(None).await?;
    let ask = Ask {
        numerics: args.numerics,
        ..Ask::plain(n_ctx.min(model.n_ctx_max))
    };
    let opened = member.open(&model, ask).await;
    opened.context("opening a session")
}

fn print(report: &Report) -> anyhow::Result<()> {
    let [before, after] = report.alone_tokens_per_s;
    let about = format!(
        "{} hops of one thread, {} tokens each, {}; {:.0} s",
        report.hops, report.tokens_each, report.numerics, report.took_s
    );
    say_title(&report.model, about)?;
    terminal::say(format!(
        "   alone {before:>12.1} tokens/s before the others, {after:.1} after"
    ))?;
    for crowd in &report.at_once {
        let noisy = match crowd.sessions - crowd.same_text {
            0 => String::new(),
            n => format!(
                ", {} of the other {n} within the batch noise",
                crowd.within_noise
            ),
        };
        terminal::say(format!(
            "  {:>2} at once {:>9.1} tokens/s, {:>5.2} times one; a token every {:.0} ms (p95 {:.0}); {} of {} say \
             what they say alone{noisy}",
            crowd.sessions,
            crowd.tokens_per_s,
            crowd.ratio,
            crowd.gap_ms.p50,
            crowd.gap_ms.p95,
            crowd.same_text,
            crowd.sessions,
        ))?;
    }
    if let Some(noise) = &report.batch_noise {
        noise.print()?;
    }
    match &report.beside_a_prompt {
        Some(beside) => beside.print(),
        None => Ok(()),
    }
}
