//! `POST /v1/embeddings`: a vector for each text, from models whose file says how their rows are pooled.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use data_encoding::BASE64;
use node::answer::{Cancel, Source, n_ctx};
use serde_json::{Value, json};

use crate::answers::{Usage, place, tokenize};
use crate::ask::{Prompt, prompts};
use crate::body;
use crate::error::ApiError;
use crate::extra::Extra;
use crate::fields::Fields;
use crate::models::{Embeds, Found};
use crate::observe::told_later;
use crate::state::State as Shared;
use crate::tools::Tools;

/// Texts of one request at most, as OpenAI has it.
const INPUTS_MAX: usize = 2048;
/// Numbers of all vectors of one request at most: they wait here until the last is there. 2,048 of 4,096.
const NUMBERS_MAX: usize = 8 << 20;

/// What is asked.
#[derive(Debug, PartialEq)]
struct Ask {
    model: Option<String>,
    inputs: Vec<Prompt>,
    base64: bool,
    dimensions: Option<u32>,
}

impl Ask {
    fn read(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let inputs = prompts(fields.need("input")?, "input", INPUTS_MAX)?;
        let format = fields.text("encoding_format")?;
        let base64 = match format.as_deref() {
            None | Some("float") => false,
            Some("base64") => true,
            Some(_) => {
                let why = "`encoding_format` must be float or base64";
                return Err(ApiError::field("encoding_format", why));
            }
        };
        Ok(Self {
            model: fields.text("model")?,
            inputs,
            base64,
            dimensions: fields.count("dimensions", 1)?,
        })
    }
}

/// A vector for each input.
pub async fn embed(
    State(state): State<Arc<Shared>>,
    request: Request,
) -> Result<Response, ApiError> {
    let ask = Ask::read(&body::read(request, &state).await?)?;
    let _place = place(&state)?;
    let _running = state.metrics.running();
    // Who hangs up drops this, and with it the session on every hop.
    tokio::select! {
        done = embedded(&state, ask) => done,
        () = state.ending.wait() => Err(ApiError::stopping()),
    }
}

async fn embedded(state: &Shared, ask: Ask) -> Result<Response, ApiError> {
    let asked = Instant::now();
    let model = state.models.find(ask.model.as_deref()).await?;
    let embeds = embeds(&model, &ask)?;
    let (base64, inputs) = (ask.base64, ask.inputs);
    let inputs = tokenize(inputs, "input", Tools::default(), &model).await?;
    let longest = inputs.iter().map(Vec::len).max().unwrap_or(1);
    let positions = n_ctx(longest, 0, model.n_ctx_max);
    let waiting = state.metrics.waiting();
    let mut source = state.models.open(&model, positions).await?;
    waiting.opened();
    let _session = state.metrics.session();
    let opened = Instant::now();
    let vectors = vectors(&mut source, &inputs, embeds).await;
    let tokens: usize = inputs.iter().map(Vec::len).sum();
    let times = (asked, opened);
    let extra = Extra::of_embeddings(&*state.models, &model, &source, times);
    source.close().await;
    let vectors = vectors?;
    state.metrics.used(Usage {
        prompt_tokens: tokens,
        ..Usage::default()
    });
    told_later();
    tracing::info!(
        status = 200,
        prompt_tokens = tokens,
        texts = vectors.len(),
        ms = asked.elapsed().as_millis() as u64,
        "request"
    );
    let data: Vec<Value> = vectors
        .iter()
        .enumerate()
        .map(|(index, vector)| {
            json!({"object": "embedding", "index": index, "embedding": written(vector, base64)})
        })
        .collect();
    Ok(axum::Json(json!({
        "object": "list",
        "data": data,
        "model": model.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "x_shoal": extra,
    }))
    .into_response())
}

/// How this model embeds, if it does and as was asked for.
fn embeds(model: &Found, ask: &Ask) -> Result<Embeds, ApiError> {
    let embeds = model.embeds.clone().map_err(|why| {
        let why = format!("{} gives no embeddings: {why}", model.name);
        ApiError::field("model", why)
    })?;
    if let Some(dimensions) = ask.dimensions
        && dimensions != embeds.n_embd
    {
        let why = format!(
            "vectors of {} have {} numbers, and its file does not say that their beginning alone means anything: \
             leave `dimensions` out, or shorten them yourself",
            model.name, embeds.n_embd
        );
        return Err(ApiError::field("dimensions", why));
    }
    let numbers = ask.inputs.len().saturating_mul(embeds.n_embd as usize);
    if numbers > NUMBERS_MAX {
        let why = format!(
            "{} vectors of {} numbers are more than one request gets: at most {}",
            ask.inputs.len(),
            embeds.n_embd,
            NUMBERS_MAX / embeds.n_embd.max(1) as usize
        );
        return Err(ApiError::field("input", why));
    }
    Ok(embeds)
}

/// One after the other in one session: each begins at position 0.
async fn vectors(
    source: &mut Source,
    inputs: &[Vec<u32>],
    embeds: Embeds,
) -> Result<Vec<Vec<f32>>, ApiError> {
    let never = Cancel::new();
    let mut vectors = Vec::with_capacity(inputs.len());
    for tokens in inputs {
        vectors.push(source.embed(tokens, embeds.pooling, &never).await?);
    }
    Ok(vectors)
}

/// As numbers, or as their bytes (f32, little endian).
fn written(vector: &[f32], base64: bool) -> Value {
    if !base64 {
        return json!(vector);
    }
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    json!(BASE64.encode(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: Value) -> Result<Ask, ApiError> {
        Ask::read(value.to_string().as_bytes())
    }

    #[test]
    fn texts_and_token_ids_one_or_many() {
        let text = |text: &str| Prompt::Text(text.into());
        let inputs = |value| read(json!({"input": value})).unwrap().inputs;
        assert_eq!(inputs(json!("a")), [text("a")]);
        assert_eq!(inputs(json!(["a", "b"])), [text("a"), text("b")]);
        assert_eq!(inputs(json!([1, 2])), [Prompt::Ids(vec![1, 2])]);
        assert_eq!(inputs(json!([[1], [2]])).len(), 2);
        assert_eq!(inputs(json!(vec!["a"; INPUTS_MAX])).len(), INPUTS_MAX);
    }

    #[test]
    fn mistakes_name_their_field() {
        for (field, value) in [
            ("input", json!({})),
            ("input", json!({"input": []})),
            ("input", json!({"input": vec!["a"; INPUTS_MAX + 1]})),
            ("input[1]", json!({"input": ["a", 1]})),
            ("input[1][0]", json!({"input": [[1], [-1]]})),
            (
                "encoding_format",
                json!({"input": "a", "encoding_format": "int8"}),
            ),
            ("dimensions", json!({"input": "a", "dimensions": 0})),
            ("model", json!({"input": "a", "model": 7})),
        ] {
            let error = read(value.clone()).err().unwrap().json();
            assert_eq!(error["error"]["param"], field, "{value}");
        }
    }

    #[test]
    fn what_a_model_cannot_do_is_said() {
        let found = |embeds| Found {
            id: "ab".repeat(32),
            name: "m".into(),
            vocab: None,
            n_ctx_max: 64,
            embeds,
        };
        let ask = |dimensions| Ask {
            dimensions,
            ..read(json!({"input": "a"})).unwrap()
        };
        let pooling = engine::Pooling::Last;
        let can = found(Ok(Embeds {
            pooling,
            n_embd: 32,
        }));
        assert!(embeds(&can, &ask(None)).is_ok() && embeds(&can, &ask(Some(32))).is_ok());
        let error = embeds(&can, &ask(Some(16))).unwrap_err().to_string();
        assert!(error.contains("have 32 numbers"), "{error}");
        let cannot = found(Err("it ranks texts".into()));
        let error = embeds(&cannot, &ask(None)).unwrap_err().to_string();
        assert_eq!(error, "m gives no embeddings: it ranks texts");
        let large = found(Ok(Embeds {
            pooling,
            n_embd: 1 << 20,
        }));
        let many = read(json!({"input": vec!["a"; 9]})).unwrap();
        assert!(embeds(&large, &many).is_err());
    }

    #[test]
    fn base64_is_the_bytes() {
        assert_eq!(written(&[1.0, -2.0], false), json!([1.0, -2.0]));
        assert_eq!(written(&[1.0, -2.0], true), json!("AACAPwAAAMA="));
    }
}
