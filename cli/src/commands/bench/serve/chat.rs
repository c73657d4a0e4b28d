//! The second turn of a chat: what the server still knows of the first need not be computed again.

use super::Plan;
use super::ask::{Answer, Prompt, Refusal, Reply, Server};
use super::report::{Chat, Spread, ratio};
use super::words::Words;
use crate::commands::bench::decode::median;

/// Tokens of an answer: what is compared comes before them.
const ANSWER_TOKENS: u32 = 16;
/// Words of what is asked in turn two.
const QUESTION_WORDS: usize = 8;
/// The aim.
const TARGET: f64 = 0.3;

/// Measures some chats, one after the other.
pub fn measure(plan: &Plan, words: &mut Words) -> anyhow::Result<Chat> {
    let template = has_template(&plan.server)?;
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for _ in 0..plan.chats {
        let mut said = vec![words.tokens(plan.history_tokens)];
        let answer = ask(&plan.server, &said, template)?;
        said.extend([answer.text.clone(), words.words(QUESTION_WORDS)]);
        second.push(ask(&plan.server, &said, template)?);
        first.push(answer);
    }
    let pairs = first.iter().zip(&second);
    let ratios = pairs.filter_map(|(first, second)| {
        let (first, second) = (first.to_first()?, second.to_first()?);
        Some(second.as_secs_f64() / first.as_secs_f64())
    });
    let history = first.iter().filter_map(|answer| answer.prompt_tokens);
    Ok(Chat {
        template,
        history_tokens: history.max().unwrap_or(0),
        chats: first.len(),
        ratio: ratio(median(ratios), 1.0),
        first_ttft_ms: Spread::of(first.iter().filter_map(Answer::to_first)),
        second_ttft_ms: Spread::of(second.iter().filter_map(Answer::to_first)),
        target: TARGET,
    })
}

/// Whether the model has a chat template: a server says so by refusing.
fn has_template(server: &Server) -> anyhow::Result<bool> {
    match server.ask(&Prompt::Chat(vec!["hello".into()]), 1, |_| true) {
        Ok(_) => Ok(true),
        Err(error) => match error.downcast_ref::<Refusal>() {
            Some(refusal) if matches!(refusal.status, 400 | 404) => Ok(false),
            _ => Err(error),
        },
    }
}

fn ask(server: &Server, said: &[String], template: bool) -> anyhow::Result<Answer> {
    let prompt = if template {
        Prompt::Chat(said.to_vec())
    } else {
        Prompt::Text(said.join(" "))
    };
    loop {
        match server.ask(&prompt, ANSWER_TOKENS, |_| true)? {
            Reply::Answer(answer) => return Ok(answer),
            Reply::Refused(after) => std::thread::sleep(after),
        }
    }
}
