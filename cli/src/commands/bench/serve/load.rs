//! So many clients at once, each of which asks again as soon as it was answered, for a while.

use std::time::{Duration, Instant};

use super::Plan;
use super::ask::{Answer, Prompt, Reply, Server};
use super::report::{Level, Spread};
use super::words::Words;
use crate::failure::Failure;

/// What one client saw.
#[derive(Default)]
struct Seen {
    answers: Vec<Answer>,
    refused: usize,
}

/// Measures `clients` clients, and gives the prompts' tokens, too.
pub fn measure(plan: &Plan, words: &mut Words, clients: u32) -> anyhow::Result<(Level, u64)> {
    let begun = Instant::now();
    let end = begun + plan.lasting;
    let seen = std::thread::scope(|scope| {
        let client = |_| {
            let (server, words) = (plan.server.clone(), words.apart());
            scope.spawn(move || client(&server, plan, words, end))
        };
        let running: Vec<_> = (0..clients).map(client).collect();
        let mut all = Seen::default();
        for client in running {
            let seen = client
                .join()
                .map_err(|_| anyhow::anyhow!("a client ended"))??;
            all.answers.extend(seen.answers);
            all.refused += seen.refused;
        }
        anyhow::Ok(all)
    })?;
    let in_time = |at: &Instant| *at <= end;
    let parts = seen.answers.iter().flat_map(|answer| &answer.parts);
    let tokens: usize = parts.filter(|(at, _)| in_time(at)).map(|(_, n)| n).sum();
    if tokens == 0 {
        let why = format!(
            "no token came within {} s with {clients} at once ({} refused)",
            plan.lasting.as_secs(),
            seen.refused
        );
        return Err(Failure::new(why)
            .try_this("--seconds with a larger number, or --concurrency with a smaller one")
            .into());
    }
    let gaps = seen.answers.iter().flat_map(Answer::gaps);
    let gaps = gaps.filter(|(_, to)| in_time(to));
    let prompts = seen
        .answers
        .iter()
        .filter_map(|answer| answer.prompt_tokens);
    let level = Level {
        concurrency: clients,
        answers: seen.answers.len(),
        tokens,
        tokens_per_s: (tokens as f64 / plan.lasting.as_secs_f64() * 10.0).round() / 10.0,
        ratio: 1.0,
        ttft_ms: Spread::of(seen.answers.iter().filter_map(Answer::to_first)),
        gap_ms: Spread::of(gaps.map(|(from, to)| to - from)),
        refused: seen.refused,
    };
    Ok((level, prompts.max().unwrap_or(0)))
}

/// Asks until the end, and hangs up then.
fn client(server: &Server, plan: &Plan, mut words: Words, end: Instant) -> anyhow::Result<Seen> {
    let mut seen = Seen::default();
    while Instant::now() < end {
        let prompt = Prompt::Text(words.tokens(plan.prompt_tokens));
        match server.ask(&prompt, plan.answer_tokens, |now| now < end)? {
            Reply::Answer(answer) => seen.answers.push(answer),
            Reply::Refused(after) => {
                seen.refused += 1;
                pause(after, end);
            }
        }
    }
    Ok(seen)
}

/// Waits as the server asked, not beyond the end.
fn pause(after: Duration, end: Instant) {
    std::thread::sleep(after.min(end.saturating_duration_since(Instant::now())));
}
