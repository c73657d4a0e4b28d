//! `POST /v1/chat/completions`.

use std::collections::HashSet;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Value, json};

use crate::answers::{Begun, Chance, Choice, Ended, Event, Whole};
use crate::ask::Ask;
use crate::body::{self, Shape};
use crate::error::ApiError;
use crate::frame::{self, Frame};
use crate::guard::caller;
use crate::state::State as Shared;
use crate::tools::Call;

/// Answers a chat.
pub async fn chat(
    State(state): State<Arc<Shared>>,
    request: Request,
) -> Result<Response, ApiError> {
    let caller = caller(&request);
    let ask = Ask::chat(&body::read(request, &state).await?)?.of(caller);
    let whole = |whole: &Whole| {
        Frame::new("chatcmpl-", "chat.completion", &whole.begun).whole(whole, choice_json)
    };
    let stream = |begun: &Begun, include_usage| ChatStream {
        frame: Frame::new("chatcmpl-", "chat.completion.chunk", begun),
        include_usage,
        begun: HashSet::new(),
    };
    frame::respond(&state, ask, whole, stream).await
}

fn choice_json(index: usize, choice: &Choice) -> Value {
    json!({
        "index": index,
        "message": message_json(choice),
        "logprobs": logprobs_json(&choice.chances),
        "finish_reason": choice.ended.reason(),
    })
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
            Event::Over(usage) if self.include_usage => vec![self.frame.usage(usage)],
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
