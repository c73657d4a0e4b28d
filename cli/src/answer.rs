//! One answer: candidates in, tokens chosen, text out as it comes, and why it ended.

use std::time::{Duration, Instant};

use engine::{Sampler, SamplerOptions, Vocab};

use crate::generation::Generation;
use crate::interrupt::Interrupt;
use crate::source::{Source, SourceError};
use crate::text_out::TextOut;

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// As many tokens as asked for.
    Length,
    /// The model said so.
    EndOfText,
    /// A stop text came.
    Text,
    /// The context has no room left.
    ContextFull,
    /// Ctrl-C.
    Interrupted,
}

impl Stop {
    /// As JSON has it.
    pub fn name(self) -> &'static str {
        match self {
            Stop::Length => "length",
            Stop::EndOfText => "end_of_text",
            Stop::Text => "stop_text",
            Stop::ContextFull => "context_full",
            Stop::Interrupted => "interrupted",
        }
    }
}

/// What came of it.
#[derive(Debug)]
pub struct Answer {
    /// The text, or the token ids in decimal where there is no tokenizer.
    pub text: String,
    /// The tokens, without one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop: Stop,
    /// From sending the prompt to the first token.
    pub to_first: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}

impl Answer {
    /// Speed after the first token; of the first one when there is no other.
    pub fn tokens_per_s(&self) -> f64 {
        let (n, time) = match self.tokens.len() {
            0 => return 0.0,
            1 => (1, self.to_first),
            n => (n - 1, self.decode),
        };
        n as f64 / time.as_secs_f64().max(1e-9)
    }
}

/// How token ids become text.
pub enum Words<'a> {
    /// By the model's tokenizer.
    Text(&'a Vocab),
    /// As decimal numbers; a tokenizer, where there is one, only says which ids end the answer.
    Ids(Option<&'a Vocab>),
}

impl Words<'_> {
    fn ends(&self, token: u32) -> bool {
        match self {
            Words::Text(vocab) | Words::Ids(Some(vocab)) => vocab.is_eog(token),
            Words::Ids(None) => false,
        }
    }

    fn piece(&self, token: u32, first: bool) -> Vec<u8> {
        match self {
            Words::Text(vocab) => vocab.piece(token),
            Words::Ids(_) if first => token.to_string().into_bytes(),
            Words::Ids(_) => format!(" {token}").into_bytes(),
        }
    }
}

/// Best candidates that the tail sends: what is left out of a usual `top_k` is never chosen.
const TOP: u16 = 256;
/// The most a tail sends.
const TOP_MAX: u16 = swarm_proto::session::TOP_MAX;

/// Candidates to ask for: one where the best is taken anyway.
pub fn top(generation: &Generation) -> u16 {
    if generation.temp == 0.0 {
        return 1;
    }
    u16::try_from(generation.top_k)
        .unwrap_or(TOP_MAX)
        .clamp(TOP, TOP_MAX)
}

/// A sampler for these flags.
pub fn sampler(generation: &Generation, seed: u32, n_vocab: u32) -> anyhow::Result<Sampler> {
    let options = SamplerOptions {
        temp: generation.temp,
        top_k: generation.top_k,
        top_p: generation.top_p,
        min_p: generation.min_p,
        seed,
        penalties: None,
    };
    Ok(Sampler::new(&options, n_vocab)?)
}

/// Feeds what of the prompt is not held yet, then chooses tokens until the answer ends. `show` gets
/// each token and the text that can be shown with it, and at the end the text that was held back. Ctrl-C ends it with what there is.
pub async fn generate(
    source: &mut Source,
    prompt: &[u32],
    words: &Words<'_>,
    generation: &Generation,
    sampler: &mut Sampler,
    interrupt: &Interrupt,
    mut show: impl FnMut(Option<u32>, &str) -> anyhow::Result<()>,
) -> anyhow::Result<Answer> {
    let begun = Instant::now();
    let (mut first, mut last) = (None, begun);
    let mut out = TextOut::new(generation.stop.clone());
    let mut tokens: Vec<u32> = Vec::new();
    let keep = crate::conversation::keep(source.held(), prompt);
    source.truncate(keep)?;
    let mut next = prompt[keep..].to_vec();
    let stop = loop {
        if tokens.len() >= generation.max_tokens as usize {
            break Stop::Length;
        }
        if next.len() > source.room() as usize {
            break Stop::ContextFull;
        }
        let candidates = match source.step(&next, interrupt).await {
            Err(SourceError::Interrupted) => break Stop::Interrupted,
            other => other?,
        };
        let token = sampler.sample(&candidates)?;
        last = Instant::now();
        first.get_or_insert(last);
        if words.ends(token) {
            break Stop::EndOfText;
        }
        show(
            Some(token),
            out.push(&words.piece(token, tokens.is_empty())),
        )?;
        tokens.push(token);
        if out.stopped() {
            break Stop::Text;
        }
        next.clear();
        next.push(token);
    };
    show(None, out.finish())?;
    let first = first.unwrap_or(last);
    Ok(Answer {
        text: out.into_text(),
        tokens,
        stop,
        to_first: first - begun,
        decode: last - first,
    })
}
