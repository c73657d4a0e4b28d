//! A session that decodes, and goes on while another computes a long prompt.

use std::time::{Duration, Instant};

use node::Session;
use serde::Serialize;

use super::{Args, Gaps, answer, open, prompt};
use crate::swarm::Member;
use crate::terminal;

/// Of the prompt that is computed with nobody else.
const ALONE_TOKENS: u32 = 256;
/// Usual gaps that are measured before the prompt, and again behind it.
const USUAL: usize = 20;
/// Positions of the session that decodes; it takes tokens back when they are used up. Making room for all that a
/// model can hold would take longer than the rest.
const RUNNING_MAX: u32 = 1024;
/// How long gaps are measured beside the prompt: some hundreds, also where it takes longer.
const BESIDE_MAX: Duration = Duration::from_secs(40);
/// The aim: p95 of the gaps over the usual one.
const TARGET: f64 = 2.0;

/// One session while the prompt of another is computed.
#[derive(Serialize)]
pub struct Beside {
    prompt_tokens: u32,
    /// Until the prompt's first token; none where that was not waited for.
    prompt_s: Option<f64>,
    /// How long gaps were measured beside it.
    measured_s: f64,
    /// Tokens of a prompt: the first of it with nobody else, and all of it beside the session.
    prompt_alone_tokens_per_s: f64,
    prompt_tokens_per_s: Option<f64>,
    /// Between two tokens while no prompt is computed.
    usual_gap_ms: Gaps,
    gap_ms: Gaps,
    /// The 95th percentile of gaps beside the prompt over the usual gap, which is the median.
    p95_over_usual: f64,
    /// And over the usual 95th percentile.
    p95_over_usual_p95: f64,
    target: f64,
}

/// Measures with a prompt of `n` tokens.
pub async fn measure(args: &Args, member: &Member, n: u32) -> anyhow::Result<Beside> {
    let bar = terminal::bar_of(3, "rounds beside a prompt");
    let mut long = open(args, member, n + 1).await?;
    let prompt = prompt(n, 77);
    let few = &prompt[..n.min(ALONE_TOKENS) as usize];
    let begun = Instant::now();
    answer(&mut long, few).await?;
    let alone = few.len() as f64 / begun.elapsed().as_secs_f64();
    bar.inc(1);
    let mut running = open(args, member, RUNNING_MAX).await?;
    let (mut token, _) = answer(&mut running, &[1, 2, 3, 4]).await?;
    let mut usual = Vec::new();
    token = usual_gaps(&mut running, token, &mut usual).await?;
    bar.inc(1);
    long.truncate(0)?;
    let begun = Instant::now();
    let (mut gaps, mut took) = (Vec::new(), None);
    {
        let prompted = answer(&mut long, &prompt);
        tokio::pin!(prompted);
        while took.is_none() && begun.elapsed() < BESIDE_MAX {
            if running.pos() >= running.n_ctx() {
                running.truncate(4)?;
            }
            let last = Instant::now();
            let next = [token];
            let decoded = answer(&mut running, &next);
            tokio::pin!(decoded);
            // The prompt's end does not cut a gap short.
            (token, _) = loop {
                tokio::select! {
                    biased;
                    token = &mut decoded => break token?,
                    done = &mut prompted, if took.is_none() => {
                        done?;
                        took = Some(begun.elapsed());
                    }
                }
            };
            gaps.push(last.elapsed());
        }
    }
    let measured = begun.elapsed();
    // What is left of the prompt goes with its session, before usual gaps are measured again.
    long.close().await;
    usual_gaps(&mut running, token, &mut usual).await?;
    bar.finish_and_clear();
    running.close().await;
    let (usual_gap_ms, gap_ms) = (Gaps::of(&usual), Gaps::of(&gaps));
    let prompt_s = took.map(|took: Duration| took.as_secs_f64());
    Ok(Beside {
        prompt_tokens: n,
        prompt_s,
        measured_s: measured.as_secs_f64(),
        prompt_alone_tokens_per_s: alone,
        prompt_tokens_per_s: prompt_s.map(|took| f64::from(n) / took),
        p95_over_usual: gap_ms.p95 / usual_gap_ms.p50,
        p95_over_usual_p95: gap_ms.p95 / usual_gap_ms.p95,
        usual_gap_ms,
        gap_ms,
        target: TARGET,
    })
}

/// Some tokens of a session with nobody else; the last of them.
async fn usual_gaps(
    running: &mut Session,
    mut token: u32,
    gaps: &mut Vec<Duration>,
) -> anyhow::Result<u32> {
    for _ in 0..USUAL {
        if running.pos() >= running.n_ctx() {
            running.truncate(4)?;
        }
        let last = Instant::now();
        (token, _) = answer(running, &[token]).await?;
        gaps.push(last.elapsed());
    }
    Ok(token)
}

impl Beside {
    /// For people.
    pub fn print(&self) -> anyhow::Result<()> {
        terminal::say(format!(
            "  beside a prompt of {} tokens a token every {:.1} ms (p95 {:.1}, longest {:.1}), usually {:.1} (p95 {:.1})",
            self.prompt_tokens,
            self.gap_ms.p50,
            self.gap_ms.p95,
            self.gap_ms.max,
            self.usual_gap_ms.p50,
            self.usual_gap_ms.p95,
        ))?;
        let prompt = match (self.prompt_s, self.prompt_tokens_per_s) {
            (Some(took), Some(rate)) => format!("the prompt took {took:.1} s, {rate:.0} tokens/s"),
            _ => format!(
                "measured for {:.0} s, not to the prompt's end",
                self.measured_s
            ),
        };
        Ok(terminal::say(format!(
            "    p95 then over the usual gap {:.2}, over the usual p95 {:.2} (aim: {} at most); {prompt}; {:.0} tokens/s \
             alone",
            self.p95_over_usual,
            self.p95_over_usual_p95,
            self.target,
            self.prompt_alone_tokens_per_s,
        ))?)
    }
}
