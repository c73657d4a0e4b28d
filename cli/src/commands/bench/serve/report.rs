//! What `shoal bench serve` found out, as JSON and for people.

use std::time::Duration;

use serde::Serialize;

use super::super::{percentile, say_title};
use crate::figures;
use crate::terminal::{self, DIM, paint};

/// All of it; a part that was not measured is left out.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// What the server calls the model.
    pub model: String,
    /// The server that ran already, if it was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Nodes that were started, one thread each.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<u32>,
    /// Tokens of each prompt under load, as the server counts them.
    pub prompt_tokens: u64,
    /// Tokens of an answer at most.
    pub answer_tokens: u32,
    /// How long each part was measured.
    pub seconds: u32,
    /// Some clients at once, for each number of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub load: Vec<Level>,
    /// A long prompt beside a running answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arrival: Option<Arrival>,
    /// The second turn of a chat.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat: Option<Chat>,
}

/// So many clients, each of which asks again when it was answered.
#[derive(Debug, Serialize)]
pub struct Level {
    /// How many.
    pub concurrency: u32,
    /// Answers that began.
    pub answers: usize,
    /// Tokens of them.
    pub tokens: usize,
    /// Of all clients together.
    pub tokens_per_s: f64,
    /// Over that of the first number of clients.
    pub ratio: f64,
    /// From the question to the first token.
    pub ttft_ms: Spread,
    /// Between two tokens of an answer.
    pub gap_ms: Spread,
    /// Answers 429 and 503.
    pub refused: usize,
}

/// A running answer while a long prompt is computed.
#[derive(Debug, Serialize)]
pub struct Arrival {
    /// Tokens of the long prompt, as the server counts them.
    pub prompt_tokens: u64,
    /// How many there were, one after the other.
    pub prompts: usize,
    /// From such a prompt to its first token.
    pub prompt_ttft_ms: Spread,
    /// Between two tokens of the running answer while no prompt was computed.
    pub usual_gap_ms: Spread,
    /// And while one was.
    pub gap_ms: Spread,
    /// p95 while one was computed over the usual median.
    pub p95_over_usual_p50: f64,
    /// The same over the usual p95.
    pub p95_over_usual_p95: f64,
    /// Most that is aimed at.
    pub target: f64,
}

/// Times to the first token of two turns.
#[derive(Debug, Serialize)]
pub struct Chat {
    /// Whether the turns were a chat's; else the same as plain texts, for a model without a template.
    pub template: bool,
    /// Tokens of the first turn, as the server counts them.
    pub history_tokens: u64,
    /// Chats measured.
    pub chats: usize,
    /// Of the first turns.
    pub first_ttft_ms: Spread,
    /// Of the second turns.
    pub second_ttft_ms: Spread,
    /// Median over chats of the second over the first.
    pub ratio: f64,
    /// Most that is aimed at.
    pub target: f64,
}

/// Some samples, in milliseconds.
#[derive(Debug, Default, Serialize)]
pub struct Spread {
    /// How many there are.
    pub n: usize,
    /// The middle; none where there are no samples, as with the others.
    pub p50: Option<f64>,
    /// One in twenty is above.
    pub p95: Option<f64>,
    /// One in a hundred is above.
    pub p99: Option<f64>,
}

impl Spread {
    /// Of these samples.
    pub fn of(samples: impl IntoIterator<Item = Duration>) -> Self {
        let samples = samples.into_iter();
        let mut ms: Vec<f64> = samples.map(|sample| sample.as_secs_f64() * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        let at = |share| (!ms.is_empty()).then(|| (percentile(&ms, share) * 1e3).round() / 1e3);
        Self {
            n: ms.len(),
            p50: at(0.5),
            p95: at(0.95),
            p99: at(0.99),
        }
    }
}

/// `a / b`, to three digits after the point; 0 where there is no such ratio.
pub fn ratio(a: f64, b: f64) -> f64 {
    let ratio = a / b;
    if ratio.is_finite() {
        (ratio * 1e3).round() / 1e3
    } else {
        0.0
    }
}

/// The report for people.
pub fn print(report: &Report) -> anyhow::Result<()> {
    let over = match (report.nodes, &report.url) {
        (Some(nodes), _) => format!("{nodes} nodes of one thread, "),
        (None, Some(url)) => format!("{url}, "),
        (None, None) => String::new(),
    };
    let about = format!(
        "{over}prompts of {} tokens, answers of {} at most, {} s each",
        report.prompt_tokens, report.answer_tokens, report.seconds
    );
    say_title(&report.model, about)?;
    if !report.load.is_empty() {
        let heads = format!(
            "  {:>7} {:>9} {:>6} {:>20} {:>28} {:>8}",
            "clients", "tokens/s", "ratio", "first token p50 p95", "gap p50 p95 p99", "refused"
        );
        terminal::say(paint(DIM, heads))?;
    }
    for level in &report.load {
        let (ttft, gap) = (&level.ttft_ms, &level.gap_ms);
        terminal::say(format!(
            "  {:>7} {:>9.1} {:>6.2} {:>10} {:>9} {:>10} {:>8} {:>8} {:>8}",
            level.concurrency,
            level.tokens_per_s,
            level.ratio,
            shown(ttft.p50),
            shown(ttft.p95),
            shown(gap.p50),
            shown(gap.p95),
            shown(gap.p99),
            level.refused,
        ))?;
    }
    if let Some(arrival) = &report.arrival {
        terminal::say(format!(
            "  a running answer's gap p50 {}, p95 {}; while {} of {} tokens {} computed p50 {}, p95 {}",
            shown(arrival.usual_gap_ms.p50),
            shown(arrival.usual_gap_ms.p95),
            figures::plural(arrival.prompts, "prompt"),
            arrival.prompt_tokens,
            if arrival.prompts == 1 { "was" } else { "were" },
            shown(arrival.gap_ms.p50),
            shown(arrival.gap_ms.p95),
        ))?;
        terminal::say(format!(
            "    p95 then over the usual median {:.2}, over the usual p95 {:.2} (aim: {} at most); its first token came after {}",
            arrival.p95_over_usual_p50,
            arrival.p95_over_usual_p95,
            arrival.target,
            shown(arrival.prompt_ttft_ms.p50),
        ))?;
    }
    if let Some(chat) = &report.chat {
        terminal::say(format!(
            "  {} after {} tokens: first token after {} in turn one, {} in turn two, ratio {:.2} (aim: {} at most)",
            if chat.template {
                "a chat"
            } else {
                "a text that goes on"
            },
            chat.history_tokens,
            shown(chat.first_ttft_ms.p50),
            shown(chat.second_ttft_ms.p50),
            chat.ratio,
            chat.target,
        ))?;
    }
    Ok(())
}

fn shown(ms: Option<f64>) -> String {
    match ms {
        Some(ms) => figures::duration(Duration::from_secs_f64(ms.max(0.0) / 1e3)),
        None => "–".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_samples_are_no_figures() {
        let none = Spread::of([]);
        assert_eq!((none.n, none.p50, none.p99), (0, None, None));
        assert_eq!(shown(none.p50), "–");
        let some = Spread::of((1..=100).map(Duration::from_millis));
        assert_eq!(
            (some.p50, some.p95, some.p99),
            (Some(50.0), Some(95.0), Some(99.0))
        );
        assert_eq!(ratio(1.0, 0.0), 0.0);
        assert_eq!(ratio(1.0, 3.0), 0.333);
    }
}
