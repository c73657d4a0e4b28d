//! Flags that `run` and `chat` share: how tokens are chosen and when to stop.

use node::answer;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// How the next token is chosen and when the answer ends.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[command(next_help_heading = "Generation")]
pub struct Generation {
    /// Tokens of the answer at most.
    #[arg(
        short = 'n',
        long = "max-tokens",
        value_name = "N",
        default_value_t = 256,
        allow_negative_numbers = true
    )]
    pub max_tokens: u32,

    /// Temperature; 0 always takes the likeliest token.
    #[arg(long, value_name = "T", default_value_t = 0.8, allow_negative_numbers = true, value_parser = temperature)]
    pub temp: f32,

    /// Keep the likeliest tokens that make up this share of the probability; 1 keeps all.
    #[arg(long, value_name = "P", default_value_t = 0.95, allow_negative_numbers = true, value_parser = share)]
    pub top_p: f32,

    /// Keep this many of the likeliest tokens; 0 keeps all the tail of the route sends.
    #[arg(long, value_name = "K", default_value_t = 40)]
    pub top_k: u32,

    /// Drop tokens less likely than this share of the likeliest one.
    #[arg(long, value_name = "P", default_value_t = 0.05, allow_negative_numbers = true, value_parser = share)]
    pub min_p: f32,

    /// Seed of the dice; the same seed, model and prompt give the same answer. Random by default.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub seed: Option<u32>,

    /// Stop before this text; may be given several times.
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub stop: Vec<String>,

    /// Tokens the context has room for, prompt and answer together. As many as needed by default.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub ctx: Option<u32>,
}

/// The sampler's limit.
const TEMP_MAX: f32 = 100.0;

fn temperature(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if (0.0..=TEMP_MAX).contains(&value) => Ok(value),
        _ => Err(format!("expected a number from 0 to {TEMP_MAX}")),
    }
}

fn share(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err("expected a number from 0 to 1".into()),
    }
}

impl Generation {
    /// The context to open: what was asked for, else as much as this prompt and answer need, within
    /// what the model and the peers allow. It is chosen the same way for a swarm and for `--local`:
    /// some models choose their rope by it.
    pub fn n_ctx(&self, prompt: usize, limit: u32) -> Result<u32, Failure> {
        let prompt = u32::try_from(prompt).unwrap_or(u32::MAX);
        let n_ctx = match self.ctx {
            Some(asked) if asked > limit => {
                return Err(Failure::new(format!(
                    "a context of {asked} tokens was asked for, the limit here is {limit}"
                ))
                .try_this(format!("--ctx {limit}")));
            }
            Some(asked) => asked,
            None => answer::n_ctx(prompt as usize, self.max_tokens, limit),
        };
        if prompt >= n_ctx {
            let failure = Failure::new(format!(
                "the prompt has {prompt} tokens, the context has room for {n_ctx}"
            ));
            return Err(if n_ctx < limit {
                failure.try_this(format!("--ctx {limit}, or a shorter prompt"))
            } else {
                failure.try_this("a shorter prompt: this is all the model and the peers allow")
            });
        }
        Ok(n_ctx)
    }

    /// The seed to use and to report.
    pub fn seed(&self) -> u32 {
        self.seed.unwrap_or_else(rand::random)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generation(max_tokens: u32, ctx: Option<u32>) -> Generation {
        Generation {
            max_tokens,
            temp: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: None,
            stop: Vec::new(),
            ctx,
        }
    }

    #[test]
    fn the_context_fits_the_prompt_and_the_answer() {
        assert_eq!(generation(100, None).n_ctx(10, 4096).unwrap(), 256);
        assert_eq!(generation(256, None).n_ctx(10, 4096).unwrap(), 512);
        assert_eq!(generation(5000, None).n_ctx(10, 1000).unwrap(), 1000);
        assert_eq!(generation(u32::MAX, None).n_ctx(10, 1024).unwrap(), 1024);
        assert_eq!(generation(100, Some(77)).n_ctx(10, 4096).unwrap(), 77);
    }

    #[test]
    fn what_does_not_fit_is_said() {
        assert!(
            generation(1, Some(9))
                .n_ctx(9, 4096)
                .unwrap_err()
                .to_string()
                .contains("9 tokens")
        );
        assert!(
            generation(1, Some(5000))
                .n_ctx(9, 4096)
                .unwrap_err()
                .to_string()
                .contains("limit here is 4096")
        );
        assert!(generation(1, None).n_ctx(4096, 4096).is_err());
    }
}
