//! One answer of a command: what is shown of it as it comes, and what the journal notes.

use engine::{Sampler, SamplerOptions};
use node::answer::{self, Answer, Answering, Cancel, Source, Words};
use swarm_proto::Form;

use crate::generation::Generation;
use crate::journal::Journal;

/// A sampler for these flags.
pub fn sampler(generation: &Generation, seed: u32, n_vocab: u32) -> anyhow::Result<Sampler> {
    let options = SamplerOptions {
        temp: generation.temp,
        top_k: generation.top_k,
        top_p: generation.top_p,
        min_p: generation.min_p,
        seed,
        ..SamplerOptions::default()
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
    pub cancel: &'a Cancel,
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
        cancel,
        mut journal,
    } = question;
    let said = journal.as_ref().map(|journal| journal.said.clone());
    let question = answer::Question {
        prompt,
        words,
        max_tokens: generation.max_tokens,
        stops: generation.stop.clone(),
        form: Form::Top(answer::top(generation.temp, generation.top_k)),
        said: said.unwrap_or_default(),
        first: None,
        cancel,
    };
    let mut answering = Answering::new(source, sampler, question);
    while let Some(piece) = answering.next().await? {
        let chosen_now = piece.token.filter(|_| piece.row.is_some());
        if let (Some(journal), Some(token)) = (&mut journal, chosen_now) {
            journal.push(token);
        }
        show(piece.token, &piece.text)?;
    }
    Ok(answering.end())
}
