//! From what the user typed to token ids: by the chat template, as it is, or as ids.

use engine::{Message, Vocab, VocabError};
use gguf::Header;
use node::answer::{self as prompt, PromptError};

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
    prompt::of_text(vocab, text).map_err(explained)
}

/// A conversation through the model's own template, ready for its next answer.
pub fn of_chat(vocab: &Vocab, template: &str, messages: &[Message]) -> anyhow::Result<Vec<u32>> {
    prompt::of_chat(vocab, template, messages, &[]).map_err(explained)
}

/// Nothing follows nothing.
pub fn not_empty(tokens: Vec<u32>) -> anyhow::Result<Vec<u32>> {
    prompt::not_empty(tokens).map_err(explained)
}

fn explained(error: PromptError) -> anyhow::Error {
    match error {
        PromptError::Empty => nothing_asked()
            .try_this("`shoal run \"Once upon a time\"`")
            .into(),
        other => other.into(),
    }
}

/// What is said of an empty prompt.
pub fn nothing_asked() -> Failure {
    Failure::usage("the prompt is empty")
}
