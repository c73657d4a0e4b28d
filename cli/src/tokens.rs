//! From what the user typed to token ids: by the chat template, as it is, or as ids.

use engine::{Message, Vocab, VocabError, render_chat};
use gguf::Header;

use crate::failure::Failure;

/// The tokenizer of a header; none where the model has none.
pub fn vocab(header: &Header) -> anyhow::Result<Option<Vocab>> {
    match Vocab::from_header(header) {
        Ok(vocab) => Ok(Some(vocab)),
        Err(VocabError::None) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What to do about a model without one.
pub fn no_tokenizer() -> Failure {
    Failure::new("this model has no tokenizer")
        .try_this("give token ids: `shoal run --tokens \"1 2 3\"`")
}

/// Text as it is, with the special tokens the model wants around it.
pub fn of_text(vocab: &Vocab, text: &str) -> anyhow::Result<Vec<u32>> {
    not_empty(vocab.tokenize(text, true, false)?)
}

/// A conversation through the model's own template, ready for its next answer.
pub fn of_chat(vocab: &Vocab, template: &str, messages: &[Message]) -> anyhow::Result<Vec<u32>> {
    let special = |token: Option<u32>| {
        token
            .map(|token| vocab.token_text(token))
            .unwrap_or_default()
    };
    let (bos, eos) = (special(vocab.bos()), special(vocab.eos()));
    let text = render_chat(template, messages, true, &bos, &eos)?;
    // Many templates write the first token out, and the tokenizer would add it again.
    let written = vocab.adds_bos() && !bos.is_empty() && text.starts_with(&bos);
    let tokens = vocab.tokenize(if written { &text[bos.len()..] } else { &text }, true, true)?;
    not_empty(tokens)
}

/// Nothing follows nothing.
pub fn not_empty(tokens: Vec<u32>) -> anyhow::Result<Vec<u32>> {
    if tokens.is_empty() {
        return Err(nothing_asked()
            .try_this("`shoal run \"Once upon a time\"`")
            .into());
    }
    Ok(tokens)
}

/// What is said of an empty prompt.
pub fn nothing_asked() -> Failure {
    Failure::usage("the prompt is empty")
}
