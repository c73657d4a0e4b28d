//! One answer: candidates in, tokens chosen, text out as it comes, and why it ended.

use std::time::{Duration, Instant};

use engine::{Candidates, Sampler, SamplerOptions, Vocab};

use crate::fed::Fed;
use crate::generation::Generation;
use crate::interrupt::Interrupt;
use crate::journal::Journal;
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
    /// How many of them another process had chosen before.
    pub said: usize,
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
        let (n, time) = match self.tokens.len() - self.said {
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

/// What is to be answered, and how.
pub struct Question<'a> {
    /// The whole prompt.
    pub prompt: &'a [u32],
    /// How tokens become text.
    pub words: Words<'a>,
    /// How tokens are chosen and when to stop.
    pub generation: &'a Generation,
    /// Ends the answer with what there is.
    pub interrupt: &'a Interrupt,
    /// Where tokens are noted, and what was said already.
    pub journal: Option<&'a mut Journal>,
}

/// Feeds what of the prompt is not held yet, then chooses tokens until the answer ends. `show` gets
/// each token and the text that can be shown with it, those that were said already too, and at the end the
/// text that was held back.
pub async fn generate(
    source: &mut Source,
    sampler: &mut Sampler,
    question: Question<'_>,
    mut show: impl FnMut(Option<u32>, &str) -> anyhow::Result<()>,
) -> anyhow::Result<Answer> {
    let Question {
        prompt,
        words,
        generation,
        interrupt,
        mut journal,
    } = question;
    let begun = Instant::now();
    let (mut first, mut last) = (None, begun);
    let mut out = TextOut::new(generation.stop.clone());
    let said = journal.as_ref().map(|journal| journal.said.clone());
    let mut tokens = Vec::new();
    for token in said.unwrap_or_default() {
        // As it was chosen, so that the dice are where they were.
        sampler.sample(&Candidates::new(vec![(token, 0.0)])?)?;
        let text = out.push(&words.piece(token, tokens.is_empty()));
        show(Some(token), text)?;
        tokens.push(token);
    }
    let said = tokens.len();
    let mut next = Vec::new();
    let stop = loop {
        if out.stopped() {
            break Stop::Text;
        }
        if tokens.len() >= generation.max_tokens as usize {
            break Stop::Length;
        }
        if next.is_empty() {
            next = match begin(source, prompt, &tokens, interrupt).await {
                Err(SourceError::Interrupted) => break Stop::Interrupted,
                other => other?,
            };
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
        if let Some(journal) = &mut journal {
            journal.push(token);
        }
        let text = out.push(&words.piece(token, tokens.is_empty()));
        show(Some(token), text)?;
        tokens.push(token);
        next.clear();
        next.push(token);
    };
    show(None, out.finish())?;
    let first = first.unwrap_or(last);
    Ok(Answer {
        text: out.into_text(),
        tokens,
        said,
        stop,
        to_first: first - begun,
        decode: last - first,
    })
}

/// Feeds what must be there before the first candidates; gives what is to be fed with them.
async fn begin(
    source: &mut Source,
    prompt: &[u32],
    said: &[u32],
    interrupt: &Interrupt,
) -> Result<Vec<u32>, SourceError> {
    if let Some(last) = said.last() {
        source.replay(Fed::answer(prompt, said), interrupt).await?;
        return Ok(vec![*last]);
    }
    let keep = crate::conversation::keep(source.held(), prompt);
    source.truncate(keep)?;
    Ok(prompt[keep..].to_vec())
}
