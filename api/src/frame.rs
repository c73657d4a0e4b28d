//! What OpenAI's two ways to ask for an answer have in common: how it is given, whole or as a stream, and what every
//! part says besides.

use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use node::net::now_ms;
use serde_json::{Value, json};

use crate::answers::{Answers, Begun, Choice, Usage, Whole};
use crate::ask::Ask;
use crate::body::{self, Shape};
use crate::error::ApiError;
use crate::state::State;

/// Answers, as was asked for: `whole` makes one response of everything, `stream` the dialect of the parts; the latter
/// is told whether they are to say what the answers took.
///
/// # Errors
/// Nothing was answered; what fails in the middle of a stream is told in it.
pub async fn respond<S: Shape>(
    state: &Arc<State>,
    ask: Ask,
    whole: impl FnOnce(&Whole) -> Value,
    stream: impl FnOnce(&Begun, bool) -> S,
) -> Result<Response, ApiError> {
    let (streamed, include_usage) = (ask.stream, ask.include_usage);
    let mut answers = Answers::begin(state, ask)?;
    if !streamed {
        return Ok(axum::Json(whole(&answers.whole().await?)).into_response());
    }
    let begun = answers.begun().await?;
    Ok(body::events(answers, stream(&begun, include_usage)))
}

/// What is the same in all parts of a response.
pub struct Frame {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    fingerprint: String,
}

impl Frame {
    /// For a response of this kind; `prefix` begins its id.
    pub fn new(prefix: &str, object: &'static str, begun: &Begun) -> Self {
        let short: String = begun.model_id.chars().take(12).collect();
        Self {
            id: format!("{prefix}{:032x}", rand::random::<u128>()),
            object,
            created: now_ms() / 1000,
            model: begun.model.clone(),
            fingerprint: format!("shoal-{short}"),
        }
    }

    /// The response, or a part of it.
    pub fn with(&self, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        })
    }

    /// All of a response that was not streamed; `choice` makes what it says of one answer.
    pub fn whole(&self, whole: &Whole, choice: impl Fn(usize, &Choice) -> Value) -> Value {
        let choices = whole.choices.iter().enumerate();
        let mut json = self.with(choices.map(|(index, of)| choice(index, of)).collect());
        json["usage"] = usage_json(whole.usage);
        json["x_shoal"] = json!(whole.choices.last().map(|choice| &choice.ended.extra));
        json
    }

    /// The part of a stream that says what all of it took.
    pub fn usage(&self, usage: Usage) -> Value {
        let mut part = self.with(json!([]));
        part["usage"] = usage_json(usage);
        part
    }
}

/// As OpenAI's API counts.
fn usage_json(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    })
}
