//! `POST /v1/messages` and `/v1/messages/count_tokens`: the same answers as Anthropic's API gives them.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::sse::Event as Sse;
use axum::response::{IntoResponse, Response};
use node::answer::Stop;
use serde_json::{Value, json};

use crate::answers::{Answers, Begun, Ended, Event, Usage, prompt_tokens};
use crate::ask::Ask;
use crate::body::{self, Shape};
use crate::error::ApiError;
use crate::guard::caller;
use crate::state::State as Shared;
use crate::tools::Call;

/// Answers a conversation.
pub async fn message(
    State(state): State<Arc<Shared>>,
    request: Request,
) -> Result<Response, ApiError> {
    let caller = caller(&request);
    let ask = Ask::message(&body::read(request, &state).await?, true)?.of(caller);
    let stream = ask.stream;
    let mut answers = Answers::begin(&state, ask)?;
    if stream {
        let begun = answers.begun().await?;
        let shape = MessageStream { begun, ended: None };
        return Ok(body::events(answers, shape));
    }
    let whole = answers.whole().await?;
    let Some(choice) = whole.choices.first() else {
        return Err(ApiError::internal("there is no answer"));
    };
    let mut json = message_json(&whole.begun, whole.usage);
    let text = json!({"type": "text", "text": choice.text});
    let said = !choice.text.is_empty() || choice.ended.calls.is_empty();
    let calls = choice
        .ended
        .calls
        .iter()
        .map(|call| call_json(call, &call.arguments));
    json["content"] = said.then_some(text).into_iter().chain(calls).collect();
    json["stop_reason"] = json!(reason(&choice.ended));
    json["stop_sequence"] = json!(choice.ended.stop_text);
    json["x_shoal"] = json!(choice.ended.extra);
    Ok(axum::Json(json).into_response())
}

/// Counts the tokens of a conversation without answering it.
pub async fn count_tokens(
    State(state): State<Arc<Shared>>,
    request: Request,
) -> Result<Response, ApiError> {
    let ask = Ask::message(&body::read(request, &state).await?, false)?;
    let tokens = prompt_tokens(&state, ask).await?;
    Ok(axum::Json(json!({"input_tokens": tokens})).into_response())
}

fn message_json(begun: &Begun, usage: Usage) -> Value {
    json!({
        "id": format!("msg_{:032x}", rand::random::<u128>()),
        "type": "message",
        "role": "assistant",
        "model": begun.model,
        "content": [],
        "stop_reason": null,
        "stop_sequence": null,
        "usage": {
            // What was not computed counts apart.
            "input_tokens": begun.prompt_tokens.saturating_sub(begun.cached_tokens),
            "cache_read_input_tokens": begun.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.completion_tokens,
        },
    })
}

fn call_json(call: &Call, input: &Value) -> Value {
    json!({"type": "tool_use", "id": call.id, "name": call.name, "input": input})
}

fn reason(ended: &Ended) -> &'static str {
    match ended.stop {
        _ if !ended.calls.is_empty() => "tool_use",
        Stop::Length | Stop::ContextFull | Stop::Interrupted => "max_tokens",
        Stop::EndOfText => "end_turn",
        Stop::Text => "stop_sequence",
    }
}

/// A call as a block of its own, in one piece.
fn call_parts(at: u32, call: &Call) -> [Value; 3] {
    let block = call_json(call, &json!({}));
    let delta = json!({"type": "input_json_delta", "partial_json": call.arguments.to_string()});
    [
        json!({"type": "content_block_start", "index": at, "content_block": block}),
        json!({"type": "content_block_delta", "index": at, "delta": delta}),
        json!({"type": "content_block_stop", "index": at}),
    ]
}

struct MessageStream {
    begun: Begun,
    ended: Option<Ended>,
}

impl Shape for MessageStream {
    fn opening(&mut self) -> Vec<Value> {
        let message = message_json(&self.begun, Usage::default());
        let block = json!({"type": "text", "text": ""});
        vec![
            json!({"type": "message_start", "message": message}),
            json!({"type": "content_block_start", "index": 0, "content_block": block}),
        ]
    }

    fn parts(&mut self, event: Event) -> Vec<Value> {
        match event {
            Event::Begun(_) | Event::Failed(_) => Vec::new(),
            Event::Piece { text, .. } => {
                let delta = json!({"type": "text_delta", "text": text});
                vec![json!({"type": "content_block_delta", "index": 0, "delta": delta})]
            }
            Event::Ended { ended, .. } => {
                self.ended = Some(ended);
                Vec::new()
            }
            Event::Over(usage) => {
                let ended = self.ended.as_ref();
                let calls = ended.map_or(&[][..], |it| &it.calls);
                let mut parts = vec![json!({"type": "content_block_stop", "index": 0})];
                parts.extend(
                    (1u32..)
                        .zip(calls)
                        .flat_map(|(at, call)| call_parts(at, call)),
                );
                parts.extend([
                    json!({
                        "type": "message_delta",
                        "delta": {
                            "stop_reason": ended.map(reason),
                            "stop_sequence": ended.and_then(|it| it.stop_text.as_deref()),
                        },
                        "usage": {"output_tokens": usage.completion_tokens},
                        "x_shoal": ended.map(|it| &it.extra),
                    }),
                    json!({"type": "message_stop"}),
                ]);
                parts
            }
        }
    }

    fn line(&self, part: &Value) -> Sse {
        let kind = part["type"].as_str().unwrap_or("error");
        Sse::default().event(kind).data(part.to_string())
    }

    fn last(&self) -> Option<Sse> {
        None
    }
}
