//! `POST /v1/chat/completions`.

use std::collections::HashSet;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::answers::{Answers, Chance, Choice, Ended, Event, Usage, Whole};
use crate::ask::Ask;
use crate::body::{self, Shape};
use crate::error::ApiError;
use crate::state::State as Shared;
use crate::tools::Call;

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
    pub fn new(prefix: &str, object: &'static str, begun: &crate::answers::Begun) -> Self {
        let short: String = begun.model_id.chars().take(12).collect();
        Self {
            id: format!("{prefix}{:032x}", rand::random::<u128>()),
            object,
            created: body::now_s(),
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
}

/// As OpenAI's API counts.
pub fn usage_json(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    })
}

/// Answers a chat.
pub async fn chat(
    State(state): State<Arc<Shared>>,
    request: Request,
) -> Result<Response, ApiError> {
    let ask = Ask::chat(&body::read(request, &state).await?)?;
    let (stream, include_usage) = (ask.stream, ask.include_usage);
    let mut answers = Answers::begin(&state, ask)?;
    if !stream {
        return Ok(axum::Json(whole_json(&answers.whole().await?)).into_response());
    }
    let begun = answers.begun().await?;
    let frame = Frame::new("chatcmpl-", "chat.completion.chunk", &begun);
    let shape = ChatStream {
        frame,
        include_usage,
        begun: HashSet::new(),
    };
    Ok(body::events(answers, shape))
}

fn whole_json(whole: &Whole) -> Value {
    let choice = |(index, choice): (usize, &Choice)| {
        json!({
            "index": index,
            "message": message_json(choice),
            "logprobs": logprobs_json(&choice.chances),
            "finish_reason": choice.ended.reason(),
        })
    };
    let choices = whole.choices.iter().enumerate().map(choice).collect();
    let mut json = Frame::new("chatcmpl-", "chat.completion", &whole.begun).with(choices);
    json["usage"] = usage_json(whole.usage);
    json["x_shoal"] = json!(whole.choices.last().map(|choice| &choice.ended.extra));
    json
}

fn message_json(choice: &Choice) -> Value {
    let mut message = json!({"role": "assistant", "content": choice.text, "refusal": null});
    if !choice.ended.calls.is_empty() {
        if choice.text.is_empty() {
            message["content"] = Value::Null;
        }
        message["tool_calls"] = choice.ended.calls.iter().map(call_json).collect();
    }
    message
}

fn call_json(call: &Call) -> Value {
    let arguments = call.arguments.to_string();
    let function = json!({"name": call.name, "arguments": arguments});
    json!({"id": call.id, "type": "function", "function": function})
}

fn logprobs_json(chances: &[Chance]) -> Value {
    if chances.is_empty() {
        return Value::Null;
    }
    let one = |bytes: &[u8], logprob: f32| {
        json!({
            "token": String::from_utf8_lossy(bytes),
            "logprob": logprob,
            "bytes": bytes,
        })
    };
    let content = chances.iter().map(|chance| {
        let mut token = one(&chance.bytes, chance.logprob);
        let top = chance
            .top
            .iter()
            .map(|(bytes, logprob)| one(bytes, *logprob));
        token["top_logprobs"] = top.collect();
        token
    });
    json!({"content": content.collect::<Vec<_>>(), "refusal": null})
}

struct ChatStream {
    frame: Frame,
    include_usage: bool,
    /// Answers of which something was said.
    begun: HashSet<u32>,
}

impl Shape for ChatStream {
    fn parts(&mut self, event: Event) -> Vec<Value> {
        match event {
            Event::Begun(_) | Event::Failed(_) => Vec::new(),
            Event::Piece {
                index,
                text,
                chance,
            } => {
                let mut parts = self.first(index);
                let logprobs = chance.map(|chance| logprobs_json(&[chance]));
                let delta = json!({"content": text});
                parts.push(self.part(index, &delta, logprobs, None));
                parts
            }
            Event::Ended { index, ended } => {
                let mut parts = self.first(index);
                for (n, call) in ended.calls.iter().enumerate() {
                    let mut call = call_json(call);
                    call["index"] = json!(n);
                    let delta = json!({"tool_calls": [call]});
                    parts.push(self.part(index, &delta, None, None));
                }
                parts.push(self.part(index, &json!({}), None, Some(&ended)));
                parts
            }
            Event::Over(usage) if self.include_usage => {
                let mut part = self.frame.with(json!([]));
                part["usage"] = usage_json(usage);
                vec![part]
            }
            Event::Over(_) => Vec::new(),
        }
    }
}

impl ChatStream {
    /// Who speaks is said once.
    fn first(&mut self, index: u32) -> Vec<Value> {
        if !self.begun.insert(index) {
            return Vec::new();
        }
        let delta = json!({"role": "assistant", "content": ""});
        vec![self.part(index, &delta, None, None)]
    }

    fn part(
        &self,
        index: u32,
        delta: &Value,
        logprobs: Option<Value>,
        ended: Option<&Ended>,
    ) -> Value {
        let mut part = self.frame.with(json!([{
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": ended.map(Ended::reason),
        }]));
        if self.include_usage {
            part["usage"] = Value::Null;
        }
        if let Some(ended) = ended {
            part["x_shoal"] = json!(ended.extra);
        }
        part
    }
}
