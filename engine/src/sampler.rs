//! Choosing the next token with llama.cpp's samplers, from candidates alone: a
//! tail may send the best of a row instead of all of it.

use std::borrow::Cow;

use crate::json_schema::Grammar;
use crate::llama::{Chain, GrammarState, Link};
use crate::vocab::Vocab;

/// How to choose.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Logits are divided by it; 0 takes the best.
    pub temp: f32,
    /// Only the best `k` are drawn from; 0 for all candidates.
    pub top_k: u32,
    /// Only the smallest set of this probability; 1 for all.
    pub top_p: f32,
    /// Only what has this share of the best's probability; 0 for all.
    pub min_p: f32,
    /// Seed of the draws.
    pub seed: u32,
    /// Penalties for what was said lately.
    pub penalties: Option<Penalties>,
    /// Added to the logits of these tokens, before anything else.
    pub bias: Vec<(u32, f32)>,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        // llama.cpp's defaults.
        SamplerOptions {
            temp: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            seed: 0,
            penalties: None,
            bias: Vec::new(),
        }
    }
}

/// Penalties on tokens among the last ones.
#[derive(Clone, Debug, PartialEq)]
pub struct Penalties {
    /// How many tokens back.
    pub last: u32,
    /// Divides the logit; 1 for none.
    pub repeat: f32,
    /// Subtracted per occurrence.
    pub frequency: f32,
    /// Subtracted once.
    pub presence: f32,
}

/// Why nothing was chosen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// An option that cannot be.
    #[error("{name} is {value}, {wanted} is possible")]
    Option {
        /// Which.
        name: &'static str,
        /// What it is.
        value: f32,
        /// What it may be.
        wanted: &'static str,
    },
    /// A logit that is NaN or infinite.
    #[error("the logit of token {0} is not finite")]
    NotFinite(u32),
    /// No candidates.
    #[error("no candidates to choose from")]
    Empty,
    /// The grammar allows none of the candidates; one that was not among them it may.
    #[error("the grammar allows none of the candidates")]
    NotAllowed,
    /// llama.cpp did not take the grammar.
    #[error("llama.cpp does not take the grammar")]
    Grammar,
    /// llama.cpp had no memory, or chose nothing.
    #[error("llama.cpp's samplers chose nothing")]
    Backend,
}

/// The best tokens of a logits row, best first; of equals the lower id.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Candidates {
    pairs: Vec<(u32, f32)>,
}

impl Candidates {
    /// From pairs in any order.
    ///
    /// # Errors
    /// None, or one that is not finite.
    pub fn new(mut pairs: Vec<(u32, f32)>) -> Result<Candidates, SampleError> {
        if pairs.is_empty() {
            return Err(SampleError::Empty);
        }
        if let Some((id, _)) = pairs.iter().find(|(_, logit)| !logit.is_finite()) {
            return Err(SampleError::NotFinite(*id));
        }
        pairs.sort_unstable_by(best_first);
        Ok(Candidates { pairs })
    }

    /// The best `k` of a whole row.
    ///
    /// # Errors
    /// An empty row, or a value that is not finite.
    pub fn top_of_row(row: &[f32], k: usize) -> Result<Candidates, SampleError> {
        if let Some(id) = row.iter().position(|logit| !logit.is_finite()) {
            return Err(SampleError::NotFinite(id as u32));
        }
        let mut pairs: Vec<(u32, f32)> = (0u32..).zip(row.iter().copied()).collect();
        if k < pairs.len() && k > 0 {
            pairs.select_nth_unstable_by(k - 1, best_first);
            pairs.truncate(k);
        }
        Self::new(pairs)
    }

    /// The pairs of id and logit.
    pub fn pairs(&self) -> &[(u32, f32)] {
        &self.pairs
    }
}

fn best_first(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    // -0 and 0 are equal logits.
    b.1.partial_cmp(&a.1)
        .unwrap_or(std::cmp::Ordering::Equal)
        .then(a.0.cmp(&b.0))
}

/// Chooses tokens. Its state (draws so far, recent tokens) belongs to one
/// generation.
pub struct Sampler {
    chain: Chain,
    sorted: bool,
    bias: Vec<(u32, f32)>,
    grammar: Option<GrammarState>,
}

impl Sampler {
    /// A sampler for a vocabulary of `n_vocab`.
    ///
    /// # Errors
    /// Options that cannot be.
    pub fn new(options: &SamplerOptions, n_vocab: u32) -> Result<Sampler, SampleError> {
        check("temp", options.temp, 0.0..=100.0, "0 to 100")?;
        check("top_p", options.top_p, 0.0..=1.0, "0 to 1")?;
        check("min_p", options.min_p, 0.0..=1.0, "0 to 1")?;
        for (_, bias) in &options.bias {
            check("logit bias", *bias, -100.0..=100.0, "-100 to 100")?;
        }
        let mut links = Vec::new();
        if let Some(Penalties {
            last,
            repeat,
            frequency,
            presence,
        }) = options.penalties
        {
            check("repeat penalty", repeat, 0.01..=100.0, "0.01 to 100")?;
            check(
                "frequency penalty",
                frequency,
                -100.0..=100.0,
                "-100 to 100",
            )?;
            check("presence penalty", presence, -100.0..=100.0, "-100 to 100")?;
            let last = last.min(1 << 20);
            links.push(Link::Penalties {
                n_vocab,
                last,
                repeat,
                frequency,
                presence,
            });
        }
        if options.temp == 0.0 {
            links.push(Link::Greedy);
        } else {
            links.push(Link::TopK(options.top_k.min(1 << 30).cast_signed()));
            links.push(Link::TopP(options.top_p));
            links.push(Link::MinP(options.min_p));
            links.push(Link::Temperature(options.temp));
            // llama.cpp takes the highest seed for "any".
            links.push(Link::Draw(options.seed.min(u32::MAX - 1)));
        }
        let chain = Chain::new(&links).ok_or(SampleError::Backend)?;
        Ok(Sampler {
            chain,
            sorted: options.penalties.is_none() && options.bias.is_empty(),
            bias: options.bias.clone(),
            grammar: None,
        })
    }

    /// The same, which chooses only what `grammar` allows, from here on.
    ///
    /// # Errors
    /// llama.cpp does not take it.
    pub fn within(mut self, grammar: &Grammar, vocab: &Vocab) -> Result<Sampler, SampleError> {
        self.grammar = Some(vocab.begin(grammar).ok_or(SampleError::Grammar)?);
        Ok(self)
    }

    /// Chooses among `candidates` and remembers the choice. Every choice costs one draw, also that of the
    /// only candidate: choosing each token of an answer from itself alone rebuilds the state it left.
    ///
    /// # Errors
    /// No candidates, or none that is allowed: nothing has changed then.
    pub fn sample(&mut self, candidates: &Candidates) -> Result<u32, SampleError> {
        let mut pairs = Cow::Borrowed(candidates.pairs());
        if pairs.is_empty() {
            return Err(SampleError::Empty);
        }
        if let Some(grammar) = &mut self.grammar {
            pairs = Cow::Owned(grammar.allowed(&pairs));
            if pairs.is_empty() {
                return Err(SampleError::NotAllowed);
            }
        }
        if !self.bias.is_empty() {
            pairs = Cow::Owned(self.biased(&pairs));
        }
        let chosen = self.chain.choose(&pairs, self.sorted);
        let chosen = chosen.ok_or(SampleError::Backend)?;
        self.chain.accept(chosen);
        if let Some(grammar) = &mut self.grammar {
            grammar.accept(chosen);
        }
        Ok(chosen)
    }

    fn biased(&self, pairs: &[(u32, f32)]) -> Vec<(u32, f32)> {
        let of = |id| self.bias.iter().filter(move |(token, _)| *token == id);
        let biased =
            |&(id, logit): &(u32, f32)| (id, logit + of(id).map(|(_, by)| by).sum::<f32>());
        pairs.iter().map(biased).collect()
    }

    /// Takes note of a token that was not sampled here: of the prompt.
    pub fn accept(&mut self, token: u32) {
        self.chain.accept(token);
    }

    /// Forgets everything, draws included, but not how far a grammar has come.
    pub fn reset(&mut self) {
        self.chain.reset();
    }
}

fn check(
    name: &'static str,
    value: f32,
    range: std::ops::RangeInclusive<f32>,
    wanted: &'static str,
) -> Result<(), SampleError> {
    // NaN is in no range.
    if range.contains(&value) {
        Ok(())
    } else {
        Err(SampleError::Option {
            name,
            value,
            wanted,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(options: SamplerOptions) -> Sampler {
        Sampler::new(&options, 100).unwrap()
    }

    #[test]
    fn greedy_takes_the_best_and_of_equals_the_first() {
        let row = [0.0, 3.0, -1.0, 3.0, 2.0];
        let mut greedy = sampler(SamplerOptions {
            temp: 0.0,
            ..SamplerOptions::default()
        });
        for k in 1..=5 {
            let candidates = Candidates::top_of_row(&row, k).unwrap();
            assert_eq!(candidates.pairs().len(), k);
            assert_eq!(greedy.sample(&candidates), Ok(1), "k = {k}");
        }
    }

    #[test]
    fn a_seed_names_the_draws_and_all_come_from_the_candidates() {
        let pairs: Vec<_> = (0..50).map(|i| (i * 2, (i % 7) as f32 / 3.0)).collect();
        let candidates = Candidates::new(pairs).unwrap();
        let options = SamplerOptions {
            temp: 1.5,
            seed: 5,
            ..SamplerOptions::default()
        };
        let draw = |options: &SamplerOptions| -> Vec<u32> {
            let mut sampler = sampler(options.clone());
            (0..200)
                .map(|_| sampler.sample(&candidates).unwrap())
                .collect()
        };
        let draws = draw(&options);
        assert_eq!(draws, draw(&options));
        assert_ne!(draws, draw(&SamplerOptions { seed: 6, ..options }));
        assert!(draws.iter().all(|id| id % 2 == 0 && *id < 100));
        assert!(draws.iter().collect::<std::collections::HashSet<_>>().len() > 10);
    }

    #[test]
    fn choosing_each_token_from_itself_alone_rebuilds_the_state() {
        // Rows of one clear winner, which the filters leave alone, and rows that leave many.
        let row = |n: u32| {
            let best = if n.is_multiple_of(3) { 40.0 } else { 1.0 };
            let pairs = (0..50).map(|i| (i, if i == 7 { best } else { (i % 5) as f32 / 3.0 }));
            Candidates::new(pairs.collect()).unwrap()
        };
        let options = SamplerOptions {
            seed: 11,
            ..SamplerOptions::default()
        };
        let mut undisturbed = sampler(options.clone());
        let said: Vec<u32> = (0..60)
            .map(|n| undisturbed.sample(&row(n)).unwrap())
            .collect();
        assert!(said.iter().any(|token| *token != 7));
        for cut in [1, 2, 3, 31, 59] {
            let mut resumed = sampler(options.clone());
            for token in &said[..cut] {
                let alone = Candidates::new(vec![(*token, 0.0)]).unwrap();
                assert_eq!(resumed.sample(&alone), Ok(*token));
            }
            let rest: Vec<u32> = (cut as u32..60)
                .map(|n| resumed.sample(&row(n)).unwrap())
                .collect();
            assert_eq!(rest, said[cut..], "cut at {cut}");
        }
    }

    #[test]
    fn top_k_of_one_and_small_top_p_are_greedy() {
        let candidates = Candidates::new(vec![(7, 1.0), (9, 3.0), (2, 2.0)]).unwrap();
        let base = SamplerOptions {
            top_p: 1.0,
            min_p: 0.0,
            temp: 5.0,
            ..Default::default()
        };
        let narrow = [
            SamplerOptions {
                top_k: 1,
                ..base.clone()
            },
            SamplerOptions {
                top_p: 0.01,
                ..base.clone()
            },
            SamplerOptions { min_p: 1.0, ..base },
        ];
        for options in narrow {
            let mut sampler = sampler(options);
            assert!((0..20).all(|_| sampler.sample(&candidates) == Ok(9)));
        }
    }

    #[test]
    fn penalties_move_on_from_what_was_said() {
        let penalties = Penalties {
            last: 8,
            repeat: 1.0,
            frequency: 0.0,
            presence: 5.0,
        };
        let options = SamplerOptions {
            temp: 0.0,
            penalties: Some(penalties),
            ..Default::default()
        };
        let mut sampler = sampler(options);
        sampler.accept(1);
        let candidates = Candidates::new(vec![(1, 4.0), (2, 3.0), (3, 2.0)]).unwrap();
        let chosen: Vec<_> = (0..2)
            .map(|_| sampler.sample(&candidates).unwrap())
            .collect();
        assert_eq!(chosen, [2, 3]);
        sampler.reset();
        assert_eq!(sampler.sample(&candidates), Ok(1));
    }

    #[test]
    fn a_bias_moves_the_choice() {
        let candidates = Candidates::new(vec![(1, 4.0), (2, 3.0), (3, 2.0)]).unwrap();
        let chosen = |bias: &[(u32, f32)]| {
            let mut greedy = sampler(SamplerOptions {
                temp: 0.0,
                bias: bias.to_vec(),
                ..Default::default()
            });
            greedy.sample(&candidates)
        };
        assert_eq!(chosen(&[(9, 100.0)]), Ok(1));
        assert_eq!(chosen(&[(3, 2.5)]), Ok(3));
        assert_eq!(chosen(&[(1, -100.0), (2, -100.0)]), Ok(3));
        let nan = SamplerOptions {
            bias: vec![(1, f32::NAN)],
            ..Default::default()
        };
        assert!(Sampler::new(&nan, 10).is_err());
    }

    #[test]
    fn nonsense_is_refused() {
        assert_eq!(Candidates::new(vec![]), Err(SampleError::Empty));
        let nan = Candidates::new(vec![(1, 0.0), (4, f32::NAN)]);
        assert_eq!(nan, Err(SampleError::NotFinite(4)));
        assert!(Candidates::top_of_row(&[0.0, f32::INFINITY], 1).is_err());
        for options in [
            SamplerOptions {
                temp: f32::NAN,
                ..Default::default()
            },
            SamplerOptions {
                temp: -1.0,
                ..Default::default()
            },
            SamplerOptions {
                top_p: 1.1,
                ..Default::default()
            },
        ] {
            assert!(matches!(
                Sampler::new(&options, 10),
                Err(SampleError::Option { .. })
            ));
        }
    }
}
