//! One answer: candidates in, tokens chosen, text out as it comes, and why it ended.

use std::time::{Duration, Instant};

use engine::{Candidates, SampleError, Sampler, Vocab};
use swarm_proto::Form;

use super::cancel::Cancel;
use super::fed::Fed;
use super::source::{Row, Source, SourceError};
use super::text_out::TextOut;

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
    /// Whoever asked does not want more of it.
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
    /// The stop text that ended it.
    pub stop_text: Option<String>,
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
#[derive(Clone, Copy)]
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

/// Candidates to ask for, for a draw among the best `top_k` at this temperature: one where the best is taken anyway.
pub fn top(temp: f32, top_k: u32) -> u16 {
    if temp == 0.0 {
        return 1;
    }
    u16::try_from(top_k).unwrap_or(TOP_MAX).clamp(TOP, TOP_MAX)
}

/// How many tokens of `held` a source may keep for `wanted`: their common beginning, but never all of `wanted`,
/// because the logits of its last token are needed.
pub fn keep(held: &[u32], wanted: &[u32]) -> usize {
    let common = held.iter().zip(wanted).take_while(|(a, b)| a == b).count();
    common.min(wanted.len().saturating_sub(1))
}

/// What is to be answered, and how.
pub struct Question<'a> {
    /// The whole prompt.
    pub prompt: &'a [u32],
    /// How tokens become text.
    pub words: Words<'a>,
    /// Tokens of the answer at most.
    pub max_tokens: u32,
    /// Texts before which it ends.
    pub stops: Vec<String>,
    /// The candidates that are needed.
    pub form: Form,
    /// Tokens of the answer that another process had chosen.
    pub said: Vec<u32>,
    /// What follows the prompt, where the source holds all of it already: of another answer to it.
    pub first: Option<Row>,
    /// Ends the answer with what there is.
    pub cancel: &'a Cancel,
}

/// A part of an answer.
#[derive(Debug)]
pub struct Piece {
    /// The token that was chosen; none where only text was left to show, at the end.
    pub token: Option<u32>,
    /// The text that can be shown now.
    pub text: String,
    /// What the token was chosen from; none for those of another process.
    pub row: Option<Row>,
}

/// An answer under way.
pub struct Answering<'a> {
    source: &'a mut Source,
    sampler: &'a mut Sampler,
    question: Question<'a>,
    out: TextOut,
    tokens: Vec<u32>,
    /// To be fed for the next candidates.
    next: Vec<u32>,
    begun: Instant,
    first: Option<Instant>,
    last: Instant,
    stop: Option<Stop>,
}

impl<'a> Answering<'a> {
    /// Nothing is fed yet. What of the prompt the source holds already is not fed again.
    pub fn new(
        source: &'a mut Source,
        sampler: &'a mut Sampler,
        mut question: Question<'a>,
    ) -> Self {
        let begun = Instant::now();
        Self {
            source,
            sampler,
            out: TextOut::new(std::mem::take(&mut question.stops)),
            question,
            tokens: Vec::new(),
            next: Vec::new(),
            begun,
            first: None,
            last: begun,
            stop: None,
        }
    }

    /// Chooses the next token; at the end comes the text that was held back, and then nothing more.
    ///
    /// # Errors
    /// The session failed, or nothing can be chosen.
    pub async fn next(&mut self) -> Result<Option<Piece>, SourceError> {
        if self.stop.is_some() {
            return Ok(None);
        }
        if let Some(&token) = self.question.said.get(self.tokens.len()) {
            // As it was chosen, so that the dice are where they were.
            self.sampler.sample(&Candidates::new(vec![(token, 0.0)])?)?;
            return Ok(Some(self.take(token, None)));
        }
        match self.choose().await {
            Ok((token, _)) if self.question.words.ends(token) => Ok(self.over(Stop::EndOfText)),
            Ok((token, row)) => {
                self.next.clear();
                self.next.push(token);
                Ok(Some(self.take(token, Some(row))))
            }
            Err(Ended::By(stop)) => Ok(self.over(stop)),
            Err(Ended::Failed(SourceError::Interrupted)) => Ok(self.over(Stop::Interrupted)),
            Err(Ended::Failed(error)) => Err(error),
        }
    }

    /// What it comes from.
    pub fn source(&self) -> &Source {
        self.source
    }

    /// What came of it, when nothing more comes.
    pub fn end(self) -> Answer {
        let first = self.first.unwrap_or(self.last);
        Answer {
            stop_text: self.out.stop_text().map(str::to_owned),
            text: self.out.into_text(),
            tokens: self.tokens,
            said: self.question.said.len(),
            stop: self.stop.unwrap_or(Stop::Interrupted),
            to_first: first - self.begun,
            decode: self.last - first,
        }
    }

    async fn choose(&mut self) -> Result<(u32, Row), Ended> {
        if self.out.stopped() {
            return Err(Ended::By(Stop::Text));
        }
        if self.tokens.len() >= self.question.max_tokens as usize {
            return Err(Ended::By(Stop::Length));
        }
        let row = match self.question.first.take() {
            Some(row) => {
                self.source.truncate(self.question.prompt.len())?;
                row
            }
            None => self.step().await?,
        };
        let (token, row) = match self.sampler.sample(&row.candidates) {
            Err(SampleError::NotAllowed) if self.question.form != Form::Full => {
                let row = self.last_in_full().await?;
                let token = self.sampler.sample(&row.candidates);
                (token.map_err(SourceError::from)?, row)
            }
            token => (token.map_err(SourceError::from)?, row),
        };
        self.last = Instant::now();
        self.first.get_or_insert(self.last);
        Ok((token, row))
    }

    /// The last row again, whole: a grammar may allow only what is not among the likeliest.
    async fn last_in_full(&mut self) -> Result<Row, Ended> {
        let held = self.source.held();
        let Some(&last) = held.last() else {
            return Err(SourceError::from(SampleError::NotAllowed).into());
        };
        let before = held.len() - 1;
        self.source.truncate(before)?;
        let cancel = self.question.cancel;
        Ok(self.source.step(&[last], Form::Full, cancel).await?)
    }

    async fn step(&mut self) -> Result<Row, Ended> {
        if self.next.is_empty() {
            self.next = self.begin().await?;
        }
        if self.next.len() > self.source.room() as usize {
            return Err(Ended::By(Stop::ContextFull));
        }
        let (form, cancel) = (self.question.form, self.question.cancel);
        Ok(self.source.step(&self.next, form, cancel).await?)
    }

    /// Feeds what must be there before the first candidates; gives what is to be fed with them.
    async fn begin(&mut self) -> Result<Vec<u32>, SourceError> {
        let prompt = self.question.prompt;
        if let Some(last) = self.tokens.last() {
            let fed = Fed::answer(prompt, &self.tokens);
            self.source.replay(fed, self.question.cancel).await?;
            return Ok(vec![*last]);
        }
        let keep = keep(self.source.held(), prompt);
        self.source.truncate(keep)?;
        Ok(prompt[keep..].to_vec())
    }

    fn take(&mut self, token: u32, row: Option<Row>) -> Piece {
        let bytes = self.question.words.piece(token, self.tokens.is_empty());
        self.tokens.push(token);
        Piece {
            token: Some(token),
            text: self.out.push(&bytes).to_owned(),
            row,
        }
    }

    fn over(&mut self, stop: Stop) -> Option<Piece> {
        self.stop = Some(stop);
        Some(Piece {
            token: None,
            text: self.out.finish().to_owned(),
            row: None,
        })
    }
}

/// Why no token follows.
enum Ended {
    By(Stop),
    Failed(SourceError),
}

impl From<SourceError> for Ended {
    fn from(error: SourceError) -> Self {
        Ended::Failed(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_common_beginning_is_kept_but_never_everything() {
        assert_eq!(keep(&[], &[1, 2]), 0);
        assert_eq!(keep(&[1, 2, 3], &[1, 2, 4, 5]), 2);
        assert_eq!(keep(&[1, 2, 3, 9], &[1, 2, 3]), 2);
        assert_eq!(keep(&[1, 2], &[1, 2, 3]), 2);
        assert_eq!(keep(&[1], &[]), 0);
    }
}
