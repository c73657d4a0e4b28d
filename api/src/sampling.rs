//! How tokens are chosen: the fields that all requests share. Pure.

use engine::{Penalties, SamplerOptions};
use node::answer;
use serde_json::Value;
use swarm_proto::{Form, session::TOP_MAX};

use crate::error::ApiError;
use crate::fields::{Fields, wrong};

/// How tokens are chosen. What a request does not say is as `shoal run` has it, so that both answer the same.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// For the sampler; the seed is set for each answer.
    pub options: SamplerOptions,
    /// Where the dice begin; drawn where it is not said.
    pub seed: Option<u32>,
    /// Likeliest tokens to tell of at each step, beside the chosen one; none where nothing is to be told.
    pub top_logprobs: Option<u16>,
}

/// Most of them, as OpenAI has it.
const TOP_LOGPROBS_MAX: u16 = 20;
/// Most tokens with a bias of their own.
const BIASES_MAX: usize = 1024;
/// Candidates that remain to be drawn from when some are pushed down.
const SPARE: u32 = 256;

impl Sampling {
    /// Reads what every dialect has.
    ///
    /// # Errors
    /// A field is wrong.
    pub fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let usual = SamplerOptions::default();
        let f32 = |n: Option<f64>, usual: f32| n.map_or(usual, |n| n as f32);
        Ok(Self {
            options: SamplerOptions {
                temp: f32(fields.number("temperature", 0.0..=2.0)?, usual.temp),
                top_p: f32(fields.number("top_p", 0.0..=1.0)?, usual.top_p),
                top_k: fields.count("top_k", 0)?.unwrap_or(usual.top_k),
                min_p: f32(fields.number("min_p", 0.0..=1.0)?, usual.min_p),
                penalties: penalties(fields)?,
                bias: biases(fields)?,
                seed: 0,
            },
            // Any whole number is a seed: its low bits are.
            seed: fields
                .integer("seed", i64::MIN..=i64::MAX)?
                .map(|seed| (seed & i64::from(u32::MAX)) as u32),
            top_logprobs: None,
        })
    }

    /// `logprobs: true` with `top_logprobs: N`, as chats have it.
    ///
    /// # Errors
    /// A field is wrong.
    pub fn read_chat_logprobs(&mut self, fields: &mut Fields) -> Result<(), ApiError> {
        let wanted = fields.flag("logprobs")?;
        let top = fields.integer("top_logprobs", 0..=TOP_LOGPROBS_MAX.into())?;
        if top.is_some_and(|top| top > 0) && !wanted {
            return Err(ApiError::field(
                "top_logprobs",
                "`top_logprobs` needs `logprobs` to be true",
            ));
        }
        self.top_logprobs = wanted.then(|| top.unwrap_or(0) as u16);
        Ok(())
    }

    /// `logprobs: N`, as completions have it.
    ///
    /// # Errors
    /// The field is wrong.
    pub fn read_logprobs(&mut self, fields: &mut Fields) -> Result<(), ApiError> {
        let top = fields.integer("logprobs", 0..=TOP_LOGPROBS_MAX.into())?;
        self.top_logprobs = top.map(|top| top as u16);
        Ok(())
    }

    /// The candidates without which the choice could come out otherwise: all, where some are lifted from below.
    pub fn form(&self, max_tokens: u32, grammar: bool) -> Form {
        let options = &self.options;
        let lifts = options.bias.iter().any(|(_, by)| *by > 0.0)
            || options
                .penalties
                .as_ref()
                .is_some_and(|it| it.repeat < 1.0 || it.frequency < 0.0 || it.presence < 0.0);
        if lifts {
            return Form::Full;
        }
        let mut top = u32::from(answer::top(options.temp, options.top_k));
        if grammar {
            // The likeliest may not be allowed.
            top = top.max(SPARE);
        }
        let pushed = options
            .penalties
            .as_ref()
            .map_or(0, |it| it.last.min(max_tokens));
        let pushed = pushed.saturating_add(u32::try_from(options.bias.len()).unwrap_or(u32::MAX));
        if pushed > 0 {
            top = top.max(SPARE).saturating_add(pushed);
        }
        let told = self.top_logprobs.unwrap_or(0).into();
        Form::Top(u16::try_from(top.max(told)).unwrap_or(TOP_MAX).min(TOP_MAX))
    }
}

/// All three look at the answer alone, from its beginning.
fn penalties(fields: &mut Fields) -> Result<Option<Penalties>, ApiError> {
    let presence = fields
        .number("presence_penalty", -2.0..=2.0)?
        .unwrap_or(0.0);
    let frequency = fields
        .number("frequency_penalty", -2.0..=2.0)?
        .unwrap_or(0.0);
    let mut repeat = fields.number("repeat_penalty", 0.01..=10.0)?;
    if repeat.is_none() {
        // As vLLM and Hugging Face call it.
        repeat = fields.number("repetition_penalty", 0.01..=10.0)?;
    }
    let repeat = repeat.unwrap_or(1.0);
    let penalties = Penalties {
        last: LAST,
        repeat: repeat as f32,
        frequency: frequency as f32,
        presence: presence as f32,
    };
    let any = presence != 0.0 || frequency != 0.0 || repeat != 1.0;
    Ok(any.then_some(penalties))
}

/// How far back penalties look: longer than most answers.
const LAST: u32 = 4096;

/// An object of token ids and numbers.
fn biases(fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let at = fields.at("logit_bias");
    let map = match fields.take("logit_bias") {
        None => return Ok(Vec::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(wrong(&at, &other, "an object of token ids and numbers")),
    };
    if map.len() > BIASES_MAX {
        let message = format!(
            "`{at}` names {} tokens, at most {BIASES_MAX} are taken",
            map.len()
        );
        return Err(ApiError::field(at, message));
    }
    let mut biases = Vec::with_capacity(map.len());
    for (token, by) in map {
        let Ok(id) = token.parse() else {
            let token = crate::fields::printable(&token, 40);
            return Err(ApiError::field(
                &at,
                format!("`{at}`: `{token}` is not a token id"),
            ));
        };
        match by.as_f64().filter(|by| (-100.0..=100.0).contains(by)) {
            Some(by) => biases.push((id, by as f32)),
            None => {
                return Err(wrong(
                    &format!("{at}.{id}"),
                    &by,
                    "a number from -100 to 100",
                ));
            }
        }
    }
    Ok(biases)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: &Value) -> Result<Sampling, ApiError> {
        let mut fields = Fields::of_body(value.to_string().as_bytes())?;
        let mut sampling = Sampling::read(&mut fields)?;
        sampling.read_chat_logprobs(&mut fields)?;
        Ok(sampling)
    }

    #[test]
    fn what_is_not_said_is_as_the_command_has_it() {
        let sampling = read(&json!({})).unwrap();
        assert_eq!(sampling.options, SamplerOptions::default());
        assert_eq!(sampling.form(100, false), Form::Top(256));
        let greedy = read(&json!({"temperature": 0})).unwrap();
        assert_eq!(greedy.form(100, false), Form::Top(1));
        assert_eq!(greedy.form(100, true), Form::Top(256));
    }

    #[test]
    fn any_whole_number_is_a_seed() {
        for (given, seed) in [(0i64, 0u32), (-1, u32::MAX), (1 << 40 | 7, 7)] {
            assert_eq!(read(&json!({"seed": given})).unwrap().seed, Some(seed));
        }
        assert!(read(&json!({"seed": 1.5})).is_err());
        assert!(read(&json!({"seed": "x"})).is_err());
    }

    #[test]
    fn enough_candidates_are_asked_for() {
        let form = |value| read(&value).unwrap().form(100, false);
        assert_eq!(
            form(json!({"temperature": 0, "logprobs": true, "top_logprobs": 5})),
            Form::Top(5)
        );
        assert_eq!(
            form(json!({"temperature": 0, "frequency_penalty": 0.5})),
            Form::Top(356)
        );
        assert_eq!(form(json!({"logit_bias": {"5": -100}})), Form::Top(257));
        assert_eq!(form(json!({"logit_bias": {"5": 1}})), Form::Full);
        assert_eq!(form(json!({"presence_penalty": -1})), Form::Full);
        assert_eq!(form(json!({"top_k": 100_000})), Form::Top(TOP_MAX));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for bad in [
            json!({"temperature": 2.1}),
            json!({"temperature": "hot"}),
            json!({"top_p": -0.1}),
            json!({"top_k": -1}),
            json!({"presence_penalty": 3}),
            json!({"repeat_penalty": 0}),
            json!({"logit_bias": {"x": 1}}),
            json!({"logit_bias": {"1": 101}}),
            json!({"logit_bias": [1]}),
            json!({"top_logprobs": 3}),
            json!({"logprobs": true, "top_logprobs": 21}),
            json!({"logprobs": 1}),
        ] {
            assert!(read(&bad).is_err(), "{bad}");
        }
    }
}
