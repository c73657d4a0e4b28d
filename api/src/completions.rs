//! `POST /v1/completions`: a text goes on, without a chat template.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Map, Value, json};

use crate::answers::{Begun, Chance, Choice, Ended, Event, Whole};
use crate::ask::Ask;
use crate::body::{self, Shape};
use crate::error::ApiError;
use crate::frame::{self, Frame};
use crate::guard::caller;
use crate::state::State as Shared;

/// Goes on with a text.
pub async fn complete(
    State(state): State<Arc<Shared>>,
    request: Request,
) -> Result<Response, ApiError> {
    let caller = caller(&request);
    let ask = Ask::completion(&body::read(request, &state).await?)?.of(caller);
    let frame = |begun: &Begun| Frame::new("cmpl-", "text_completion", begun);
    let whole = |whole: &Whole| frame(&whole.begun).whole(whole, choice_json);
    let stream = |begun: &Begun, include_usage| TextStream {
        frame: frame(begun),
        include_usage,
        offsets: HashMap::new(),
    };
    frame::respond(&state, ask, whole, stream).await
}

fn choice_json(index: usize, choice: &Choice) -> Value {
    json!({
        "index": index,
        "text": choice.text,
        "logprobs": logprobs_json(&choice.chances, &mut 0),
        "finish_reason": choice.ended.reason(),
    })
}

/// `offset`: characters of the text before these.
fn logprobs_json(chances: &[Chance], offset: &mut usize) -> Value {
    if chances.is_empty() {
        return Value::Null;
    }
    let (mut tokens, mut logprobs) = (Vec::new(), Vec::new());
    let (mut tops, mut offsets) = (Vec::new(), Vec::new());
    for chance in chances {
        let text = String::from_utf8_lossy(&chance.bytes);
        offsets.push(*offset);
        *offset += text.chars().count();
        tokens.push(text);
        logprobs.push(chance.logprob);
        let top = chance.top.iter();
        let named = |(bytes, p): &(Vec<u8>, f32)| (String::from_utf8_lossy(bytes).into(), json!(p));
        tops.push(top.map(named).collect::<Map<String, Value>>());
    }
    json!({
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    })
}

struct TextStream {
    frame: Frame,
    include_usage: bool,
    /// Of each answer, characters said so far.
    offsets: HashMap<u32, usize>,
}

impl Shape for TextStream {
    fn parts(&mut self, event: Event) -> Vec<Value> {
        match event {
            Event::Begun(_) | Event::Failed(_) => Vec::new(),
            Event::Piece {
                index,
                text,
                chance,
            } => {
                let offset = self.offsets.entry(index).or_default();
                let logprobs = chance.map(|chance| logprobs_json(&[chance], offset));
                vec![self.part(index, &text, logprobs, None)]
            }
            Event::Ended { index, ended } => vec![self.part(index, "", None, Some(&ended))],
            Event::Over(usage) if self.include_usage => vec![self.frame.usage(usage)],
            Event::Over(_) => Vec::new(),
        }
    }
}

impl TextStream {
    fn part(
        &self,
        index: u32,
        text: &str,
        logprobs: Option<Value>,
        ended: Option<&Ended>,
    ) -> Value {
        let mut part = self.frame.with(json!([{
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": ended.map(Ended::reason),
        }]));
        if let Some(ended) = ended {
            part["x_shoal"] = json!(ended.extra);
        }
        part
    }
}
