//! `GET /v1/models`, `/v1/models/NAME` and `/health`, and what is said of paths that are not there.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::models::Listed;
use crate::state::State as Shared;

/// What can be asked now.
pub async fn models(State(state): State<Arc<Shared>>) -> Response {
    let listed = state.models.listed();
    let all: Vec<Value> = listed
        .iter()
        .map(|model| model_json(model, &listed))
        .collect();
    axum::Json(json!({"object": "list", "data": all})).into_response()
}

/// One of them, by name or the beginning of its id.
pub async fn model(
    State(state): State<Arc<Shared>>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let listed = state.models.listed();
    let named = listed
        .iter()
        .find(|model| model.name == name || model.id == name);
    if let Some(model) = named {
        return Ok(axum::Json(model_json(model, &listed)).into_response());
    }
    let found = state.models.find(Some(&name)).await?;
    let model = Listed {
        id: found.id.clone(),
        name: found.name.clone(),
        n_layer: listed
            .iter()
            .find(|it| it.id == found.id)
            .map_or(0, |it| it.n_layer),
        n_ctx: found.n_ctx_max,
    };
    Ok(axum::Json(model_json(&model, &listed)).into_response())
}

/// A name that two models have, or none has, does not name one.
fn model_json(model: &Listed, listed: &[Listed]) -> Value {
    let same = listed
        .iter()
        .filter(|other| other.name == model.name)
        .count();
    let id = if model.name.is_empty() || same > 1 {
        &model.id
    } else {
        &model.name
    };
    json!({
        "id": id,
        "object": "model",
        "created": 0,
        "owned_by": "swarm",
        "x_shoal": {"model_id": model.id, "layers": model.n_layer, "n_ctx": model.n_ctx},
    })
}

/// That this process answers, and whether it has anybody to ask.
pub async fn health(State(state): State<Arc<Shared>>) -> Response {
    let models = state.models.listed().len();
    axum::Json(json!({
        "status": "ok",
        "ready": models > 0,
        "models": models,
        "peers": state.models.peers(),
        "answering": state.places_max.saturating_sub(state.places.available_permits()),
    }))
    .into_response()
}

/// A path that is not there.
pub async fn no_path(request: Request) -> ApiError {
    ApiError::no_path(request.uri().path())
}

/// A method that a path does not take.
pub async fn no_method(request: Request) -> ApiError {
    ApiError::no_method(request.method().as_str(), request.uri().path())
}
