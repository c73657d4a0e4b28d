//! What is said beside what OpenAI's API says, under `x_shoal`: who computed the answer, who could read the prompt,
//! and where the time went.

use std::time::{Duration, Instant};

use node::answer::{Answer, Source};
use serde::Serialize;

use crate::fields::printable;
use crate::models::{Found, Models};

/// Beside the answer.
#[derive(Clone, Debug, Serialize)]
pub struct Extra {
    /// The model's id: the hash of its bytes.
    model_id: String,
    /// Who computed what, in order.
    route: Vec<Hop>,
    /// Who stood by for which layers; they can read the prompt too.
    standbys: Vec<Hop>,
    /// Hops that were lost while it ran; `route` is the last one.
    recoveries: Vec<Recovery>,
    /// Who could read the prompt.
    privacy: &'static str,
    /// The same as a fact.
    peers_can_read_prompt: bool,
    /// Type of the activations between hops.
    wire: String,
    /// Tokens of the prompt that were computed for another answer to the same caller.
    kept_tokens: usize,
    /// Seed of the dice; embeddings are made without.
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u32>,
    /// Speed after the first token.
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens_per_s: Option<f64>,
    timings: Timings,
}

#[derive(Clone, Debug, Serialize)]
struct Hop {
    peer: String,
    layers: String,
}

#[derive(Clone, Debug, Serialize)]
struct Recovery {
    pos: u32,
    lost: String,
    took_ms: f64,
    exact: bool,
}

/// Milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
struct Timings {
    /// Reading the prompt, and opening the session on every hop.
    open_ms: f64,
    /// From sending the prompt to the first token, or of all texts to the last vector.
    prompt_ms: f64,
    /// From the first token to the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    decode_ms: Option<f64>,
    /// From the request to the end.
    total_ms: f64,
}

impl Extra {
    /// Of an answer that ended; `asked` and `opened` are when the request came and when its session was open.
    pub fn new(
        models: &dyn Models,
        model: &Found,
        source: &Source,
        answer: &Answer,
        seed: u32,
        times: (Instant, Instant),
    ) -> Self {
        let plain = Self::of_embeddings(models, model, source, times);
        Self {
            seed: Some(seed),
            tokens_per_s: Some((answer.tokens_per_s() * 10.0).round() / 10.0),
            timings: Timings {
                prompt_ms: ms(answer.to_first),
                decode_ms: Some(ms(answer.decode)),
                ..plain.timings
            },
            ..plain
        }
    }

    /// Of embeddings that are all there.
    pub fn of_embeddings(
        models: &dyn Models,
        model: &Found,
        source: &Source,
        (asked, opened): (Instant, Instant),
    ) -> Self {
        let hops = |hops: Vec<swarm_proto::Hop>| {
            let hop = |hop: swarm_proto::Hop| Hop {
                peer: hop.peer.to_string(),
                layers: hop.layers.to_string(),
            };
            hops.into_iter().map(hop).collect()
        };
        let recovery = |it: &node::Recovery| Recovery {
            pos: it.pos,
            lost: printable(&it.lost, 300),
            took_ms: ms(it.took),
            exact: it.exact,
        };
        let privacy = models.privacy();
        Self {
            model_id: model.id.clone(),
            route: hops(source.route()),
            standbys: hops(source.standbys()),
            recoveries: source.recoveries().iter().map(recovery).collect(),
            privacy,
            peers_can_read_prompt: privacy != "local",
            wire: models.wire(),
            kept_tokens: 0,
            seed: None,
            tokens_per_s: None,
            timings: Timings {
                open_ms: ms(opened - asked),
                prompt_ms: ms(opened.elapsed()),
                decode_ms: None,
                total_ms: ms(asked.elapsed()),
            },
        }
    }

    /// So many tokens of the prompt were there already.
    pub fn kept(self, kept_tokens: usize) -> Self {
        Self {
            kept_tokens,
            ..self
        }
    }
}

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
