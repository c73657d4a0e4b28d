//! A running answer, and long prompts that arrive beside it: how much longer its tokens take meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::Plan;
use super::ask::{Answer, Prompt, Reply};
use super::report::{Arrival, Spread, ratio};
use super::words::Words;
use crate::failure::Failure;

/// Gaps of the running answer are compared from so many on.
const GAPS_MIN: usize = 20;
/// The aim: p95 of the gaps over the usual ones.
const TARGET: f64 = 2.0;

/// Measures for about twice the plan's time: without a prompt, and with one after the other.
pub fn measure(plan: &Plan, words: &mut Words) -> anyhow::Result<Arrival> {
    let over = AtomicBool::new(false);
    let (running, arrivals) = std::thread::scope(|scope| {
        let own = words.apart();
        let running = scope.spawn(|| run(plan, own, &over));
        let arrivals = arrive(plan, words);
        over.store(true, Ordering::Relaxed);
        let running = running
            .join()
            .map_err(|_| anyhow::anyhow!("a client ended"))??;
        anyhow::Ok((running, arrivals?))
    })?;
    let computed: Vec<(Instant, Instant)> = arrivals.iter().filter_map(computed).collect();
    let gaps = running.iter().flat_map(Answer::gaps);
    let (during, usual): (Vec<_>, Vec<_>) = gaps.partition(|gap| beside(gap, &computed));
    if usual.len() < GAPS_MIN || during.is_empty() {
        let why = format!(
            "the running answer had {} tokens without a prompt beside it and {} with one",
            usual.len(),
            during.len()
        );
        return Err(Failure::new(why)
            .try_this("--seconds with a larger number")
            .into());
    }
    let spread =
        |gaps: &[(Instant, Instant)]| Spread::of(gaps.iter().map(|(from, to)| *to - *from));
    let (usual, during) = (spread(&usual), spread(&during));
    let p95 = during.p95.unwrap_or(f64::NAN);
    let prompts = arrivals.iter().filter_map(|answer| answer.prompt_tokens);
    Ok(Arrival {
        prompt_tokens: prompts.max().unwrap_or(0),
        prompts: computed.len(),
        prompt_ttft_ms: Spread::of(arrivals.iter().filter_map(Answer::to_first)),
        p95_over_usual_p50: ratio(p95, usual.p50.unwrap_or(f64::NAN)),
        p95_over_usual_p95: ratio(p95, usual.p95.unwrap_or(f64::NAN)),
        usual_gap_ms: usual,
        gap_ms: during,
        target: TARGET,
    })
}

/// Answers one after the other until it is over; the last is hung up on.
fn run(plan: &Plan, mut words: Words, over: &AtomicBool) -> anyhow::Result<Vec<Answer>> {
    let mut answers = Vec::new();
    while !over.load(Ordering::Relaxed) {
        let prompt = Prompt::Text(words.tokens(plan.prompt_tokens));
        let going_on = |_| !over.load(Ordering::Relaxed);
        match plan.server.ask(&prompt, plan.running_tokens, going_on)? {
            Reply::Answer(answer) => answers.push(answer),
            Reply::Refused(after) => std::thread::sleep(after),
        }
    }
    Ok(answers)
}

/// Waits for usual gaps, then asks with long prompts, at least one.
fn arrive(plan: &Plan, words: &mut Words) -> anyhow::Result<Vec<Answer>> {
    std::thread::sleep(plan.lasting);
    let end = Instant::now() + plan.lasting;
    let mut arrivals = Vec::new();
    while arrivals.is_empty() || Instant::now() < end {
        let prompt = Prompt::Text(words.tokens(plan.long_tokens));
        match plan.server.ask(&prompt, 1, |_| true)? {
            Reply::Answer(answer) => arrivals.push(answer),
            Reply::Refused(after) => std::thread::sleep(after),
        }
        // So that the running answer has usual gaps between two of them, too.
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(arrivals)
}

/// From when to when a prompt was computed.
fn computed(answer: &Answer) -> Option<(Instant, Instant)> {
    Some((answer.asked, answer.parts.first()?.0))
}

/// Whether a gap lies, in part, in one of these times.
fn beside((from, to): &(Instant, Instant), computed: &[(Instant, Instant)]) -> bool {
    computed
        .iter()
        .any(|(since, until)| from < until && to > since)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_belongs_to_the_prompt_that_it_touches() {
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        let computed = [(at(100), at(200))];
        assert!(!beside(&(at(0), at(100)), &computed));
        assert!(beside(&(at(90), at(110)), &computed), "it begins before");
        assert!(beside(&(at(190), at(300)), &computed), "it ends after");
        assert!(beside(&(at(50), at(400)), &computed), "it lasts longer");
        assert!(!beside(&(at(200), at(210)), &computed));
    }
}
