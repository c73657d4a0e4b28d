//! From text to the token ids of a prompt, by the model's chat template or as it is, and the context it needs.

use engine::{ChatError, Message, Vocab, VocabError, render_chat};

/// Why there are no token ids.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// Nothing follows nothing.
    #[error("the prompt is empty")]
    Empty,
    /// The tokenizer does not take it.
    #[error(transparent)]
    Vocab(#[from] VocabError),
    /// The chat template does not take it.
    #[error(transparent)]
    Chat(#[from] ChatError),
}

/// Text as it is, with the special tokens the model wants around it.
///
/// # Errors
/// See [`PromptError`].
pub fn of_text(vocab: &Vocab, text: &str) -> Result<Vec<u32>, PromptError> {
    not_empty(vocab.tokenize(text, true, false)?)
}

/// A conversation through the model's own template, ready for its next answer; `tools` are what the model may call.
///
/// # Errors
/// See [`PromptError`].
pub fn of_chat(
    vocab: &Vocab,
    template: &str,
    messages: &[Message],
    tools: &[serde_json::Value],
) -> Result<Vec<u32>, PromptError> {
    let special = |token: Option<u32>| {
        token
            .map(|token| vocab.token_text(token))
            .unwrap_or_default()
    };
    let (bos, eos) = (special(vocab.bos()), special(vocab.eos()));
    let text = render_chat(template, messages, tools, true, &bos, &eos)?;
    // Many templates write the first token out, and the tokenizer would add it again.
    let written = vocab.adds_bos() && !bos.is_empty() && text.starts_with(&bos);
    let text = if written { &text[bos.len()..] } else { &text };
    not_empty(vocab.tokenize(text, true, true)?)
}

/// The same ids, where there are any.
///
/// # Errors
/// There are none.
pub fn not_empty(tokens: Vec<u32>) -> Result<Vec<u32>, PromptError> {
    if tokens.is_empty() {
        return Err(PromptError::Empty);
    }
    Ok(tokens)
}

/// Positions to open for a prompt and its answer, within `limit`. It is chosen the same way for a swarm and for the
/// whole model here: some models choose their rope by it.
pub fn n_ctx(prompt: usize, max_tokens: u32, limit: u32) -> u32 {
    u32::try_from(prompt)
        .unwrap_or(u32::MAX)
        .saturating_add(max_tokens)
        .checked_next_multiple_of(CTX_STEP)
        .unwrap_or(limit)
        .min(limit)
}

/// Contexts are opened in steps of this many tokens: llama.cpp pads its KV to 256 cells anyway.
const CTX_STEP: u32 = 256;
