//! `shoal bench batch`: many sessions over one route of nodes, together and one alone, in one run; and what a long
//! prompt does to the tokens of a session that runs.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use engine::Blueprint;
use futures::future::try_join_all;
use node::{Session, runtime};
use serde::Serialize;
use swarm_proto::{Form, Numerics, Want, WantRows};

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
is fast. One session alone is measured before and after the others, in the same run.")]
pub struct Args {
    #[command(flatten)]
    model: Measured,
    /// Nodes on the route, one thread each.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=16))]
    hops: u32,
    /// Sessions at once.
    #[arg(
        long,
        value_name = "N,N,…",
        value_delimiter = ',',
        default_value = "1,2,4,8",
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

#[derive(Serialize)]
struct Report {
    model: String,
    hops: u32,
    numerics: Numerics,
    tokens_each: u32,
    at_once: Vec<Crowd>,
    beside_a_prompt: Option<Beside>,
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
}

/// One session while the prompt of another is computed.
#[derive(Serialize)]
struct Beside {
    prompt_tokens: u32,
    /// Until the prompt's first token: with nobody else, and beside the session.
    prompt_alone_s: f64,
    prompt_s: f64,
    usual_gap_ms: Gaps,
    gap_ms: Gaps,
    /// The 95th percentile of gaps beside the prompt over the usual median.
    p95_over_usual: f64,
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
    let spans = share_out(blueprint.n_layer(), args.hops);
    let nodes = Nodes::start(file, &spans, 1)?;
    let member = nodes.client().join_quietly().await?;
    let model = member.model(None).await?;
    let most = args.sessions.iter().copied().max().unwrap_or(1);
    let n_ctx = (PROMPT_MAX + args.tokens).min(model.n_ctx_max);
    let mut sessions = Vec::new();
    for _ in 0..most {
        sessions.push(open(args, &member, n_ctx).await?);
    }
    let at_once = crowds(args, &mut sessions).await?;
    for session in sessions {
        session.close().await;
    }
    let beside_a_prompt = match args.prompt {
        0 => None,
        prompt => Some(beside(args, &member, prompt.min(model.n_ctx_max / 8 * 7)).await?),
    };
    member.leave().await;
    Ok(Report {
        model: model.name,
        hops: args.hops,
        numerics: args.numerics,
        tokens_each: args.tokens,
        at_once,
        beside_a_prompt,
    })
}

/// Prompts of the sessions that run together differ in length by one each.
const PROMPT_MAX: u32 = 24;

async fn crowds(args: &Args, sessions: &mut [Session]) -> anyhow::Result<Vec<Crowd>> {
    let bar = terminal::bar_of(args.sessions.len() as u64 + 3, "rounds");
    let mut alone = Vec::new();
    for (i, session) in sessions.iter_mut().enumerate() {
        // The first warms all up; what each says alone is what it should say in company.
        alone.push(texts(run(args, &mut [session], i).await?));
        if i < 2 {
            bar.inc(1);
        }
    }
    let one = async |sessions: &mut [Session]| -> anyhow::Result<f64> {
        let first = sessions.first_mut().context("no session")?;
        Ok(run(args, &mut [first], 0).await?.rate())
    };
    let before = one(sessions).await?;
    let mut rounds = Vec::new();
    for n in &args.sessions {
        let mut some: Vec<&mut Session> = sessions.iter_mut().take(*n as usize).collect();
        rounds.push((*n, run(args, &mut some, 0).await?));
        bar.inc(1);
    }
    let after = one(sessions).await?;
    bar.finish_and_clear();
    let single = f64::midpoint(before, after);
    let crowds = rounds.into_iter().map(|(n, round)| {
        let texts = round.texts.iter().zip(alone.iter().flatten());
        Crowd {
            sessions: n,
            tokens_per_s: round.rate(),
            ratio: round.rate() / single,
            gap_ms: Gaps::of(&round.gaps),
            same_text: texts.filter(|(text, alone)| text == alone).count() as u32,
        }
    });
    Ok(crowds.collect())
}

/// What sessions did together.
struct Together {
    texts: Vec<Vec<u32>>,
    gaps: Vec<Duration>,
    took: Duration,
}

impl Together {
    fn rate(&self) -> f64 {
        self.gaps.len() as f64 / self.took.as_secs_f64()
    }
}

fn texts(together: Together) -> Vec<Vec<u32>> {
    together.texts
}

/// Each session answers a prompt of its own; the clock runs while they decode. `first` is the number of the first.
async fn run(args: &Args, sessions: &mut [&mut Session], first: usize) -> anyhow::Result<Together> {
    let prompts = sessions.iter_mut().enumerate().map(async |(i, session)| {
        session.truncate(0)?;
        let prompt = prompt(8 + (first + i) as u32 % 16, (first + i) as u32);
        answer(session, &prompt).await
    });
    let tokens = try_join_all(prompts).await?;
    let begun = Instant::now();
    let decoded = sessions
        .iter_mut()
        .zip(tokens)
        .map(async |(session, token)| {
            let (mut text, mut gaps) = (vec![token], Vec::new());
            for _ in 0..args.tokens {
                let last = Instant::now();
                let token = answer(session, &[text[text.len() - 1]]).await?;
                gaps.push(last.elapsed());
                text.push(token);
            }
            anyhow::Ok((text, gaps))
        });
    let decoded = try_join_all(decoded).await?;
    let took = begun.elapsed();
    let (texts, gaps): (Vec<_>, Vec<_>) = decoded.into_iter().unzip();
    let gaps = gaps.into_iter().flatten().collect();
    Ok(Together { texts, gaps, took })
}

/// The likeliest token after these.
async fn answer(session: &mut Session, tokens: &[u32]) -> anyhow::Result<u32> {
    let want = Want {
        rows: WantRows::Last,
        form: Form::Top(1),
    };
    session.feed(tokens, want).await?;
    let row = session.next_logits().await?;
    let token = row.argmax().context("an empty row")?;
    session.recycle(row);
    Ok(token)
}

/// One session decodes, and goes on while another computes a long prompt.
async fn beside(args: &Args, member: &Member, n: u32) -> anyhow::Result<Beside> {
    let bar = terminal::bar_of(3, "rounds beside a prompt");
    let mut long = open(args, member, n + 1).await?;
    let prompt = prompt(n, 77);
    let begun = Instant::now();
    answer(&mut long, &prompt).await?;
    let prompt_alone = begun.elapsed();
    bar.inc(1);
    let n_ctx = member.model(None).await?.n_ctx_max;
    let mut running = open(args, member, n_ctx).await?;
    let mut token = answer(&mut running, &[1, 2, 3, 4]).await?;
    let mut usual = Vec::new();
    for _ in 0..args.tokens.max(20) {
        let last = Instant::now();
        token = answer(&mut running, &[token]).await?;
        usual.push(last.elapsed());
    }
    bar.inc(1);
    long.truncate(0)?;
    let begun = Instant::now();
    let (mut gaps, mut prompt_took) = (Vec::new(), None);
    {
        let prompted = answer(&mut long, &prompt);
        tokio::pin!(prompted);
        while prompt_took.is_none() {
            if running.pos() >= running.n_ctx() {
                running.truncate(4)?;
            }
            let last = Instant::now();
            let next = [token];
            let decoded = answer(&mut running, &next);
            tokio::pin!(decoded);
            // The prompt's end does not cut a gap short.
            token = loop {
                tokio::select! {
                    biased;
                    token = &mut decoded => break token?,
                    done = &mut prompted, if prompt_took.is_none() => {
                        done?;
                        prompt_took = Some(begun.elapsed());
                    }
                }
            };
            gaps.push(last.elapsed());
        }
    }
    bar.finish_and_clear();
    running.close().await;
    long.close().await;
    let (usual_gap_ms, gap_ms) = (Gaps::of(&usual), Gaps::of(&gaps));
    Ok(Beside {
        prompt_tokens: n,
        prompt_alone_s: prompt_alone.as_secs_f64(),
        prompt_s: prompt_took.unwrap_or_default().as_secs_f64(),
        p95_over_usual: gap_ms.p95 / usual_gap_ms.p50,
        usual_gap_ms,
        gap_ms,
    })
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
    let about = format!(
        "{} hops of one thread, {} tokens each, {}",
        report.hops, report.tokens_each, report.numerics
    );
    say_title(&report.model, about)?;
    for crowd in &report.at_once {
        terminal::say(format!(
            "  {:>2} at once {:>9.1} tokens/s, {:>5.2} times one; a token every {:.0} ms (p95 {:.0}); {} of {} say \
             what they say alone",
            crowd.sessions,
            crowd.tokens_per_s,
            crowd.ratio,
            crowd.gap_ms.p50,
            crowd.gap_ms.p95,
            crowd.same_text,
            crowd.sessions,
        ))?;
    }
    if let Some(beside) = &report.beside_a_prompt {
        terminal::say(format!(
            "  beside a prompt of {} tokens a token every {:.0} ms (p95 {:.0}, longest {:.0}), usually {:.0} (p95 \
             {:.0}): p95 is {:.2} times the usual; the prompt took {:.1} s, alone {:.1} s",
            beside.prompt_tokens,
            beside.gap_ms.p50,
            beside.gap_ms.p95,
            beside.gap_ms.max,
            beside.usual_gap_ms.p50,
            beside.usual_gap_ms.p95,
            beside.p95_over_usual,
            beside.prompt_s,
            beside.prompt_alone_s,
        ))?;
    }
    Ok(())
}
