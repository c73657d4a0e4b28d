//! A row of logits as the client receives it, checked before anything samples from it. Pure.

use swarm_proto::{Form, Logits, LogitsForm};

use super::{chain::Shape, topk::log_sum_exp};

/// One row of logits.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LogitsRow {
    /// The position whose successor these logits predict.
    pub pos: u32,
    /// Microseconds that all hops together computed on this row's frame.
    pub spent_us: u32,
    /// Tokens in the vocabulary.
    pub n_vocab: u32,
    /// The largest (token, logit) pairs, descending; empty when the full row was asked for.
    pub top: Vec<(u32, f32)>,
    /// Every logit by token; empty when only the top was asked for.
    pub full: Vec<f32>,
    /// The hidden row behind the last norm, where that was asked for instead.
    pub normed: Vec<f32>,
    /// ln Σ exp(logit) over the whole vocabulary.
    pub log_sum_exp: f32,
}

/// What a row said: enough to know it again.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Answered {
    pub(super) pos: u32,
    pub(super) token: u32,
    pub(super) log_prob: f32,
}

/// What is wrong with a row. The tail's fault.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum BadRow {
    /// Another position or form than the next one asked for.
    #[error("logits for position {got}, position {asked} comes next")]
    NotAsked {
        /// As the answer says.
        got: u32,
        /// What was asked for.
        asked: u32,
    },
    /// The payload does not fit the header, or the header what was asked for.
    #[error("a payload of {bytes} bytes for {what}")]
    Length {
        /// Bytes received.
        bytes: usize,
        /// What the header says.
        what: String,
    },
    /// NaN, infinity, a token beyond the vocabulary, or pairs out of order.
    #[error("{0}")]
    Values(String),
}

impl Answered {
    pub(super) fn of(row: &LogitsRow) -> Option<Self> {
        let token = row.argmax()?;
        Some(Self {
            pos: row.pos,
            token,
            log_prob: row.log_prob(token)?,
        })
    }
}

impl LogitsRow {
    /// ln p(token), when the row tells.
    pub fn log_prob(&self, token: u32) -> Option<f32> {
        let of_top = || {
            self.top
                .iter()
                .find(|(id, _)| *id == token)
                .map(|(_, logit)| *logit)
        };
        let logit = self.full.get(token as usize).copied().or_else(of_top)?;
        Some(logit - self.log_sum_exp)
    }

    /// Bytes of what it holds; at least one, so that empty rows count too.
    pub(super) fn bytes(&self) -> usize {
        1 + (self.full.len() + self.normed.len()) * 4 + self.top.len() * 8
    }

    /// The most likely token; of equal ones that with the lowest id.
    pub fn argmax(&self) -> Option<u32> {
        if let Some((id, _)) = self.top.first() {
            return Some(*id);
        }
        let mut best: Option<(u32, f32)> = None;
        for (id, logit) in (0u32..).zip(&self.full) {
            if best.is_none_or(|(_, b)| *logit > b) {
                best = Some((id, *logit));
            }
        }
        best.map(|(id, _)| id)
    }

    /// Reads an answer for `asked`; the buffers of `self` are reused.
    pub(super) fn fill(
        &mut self,
        header: &Logits,
        payload: &[u8],
        asked: &Form,
        shape: Shape,
    ) -> Result<(), BadRow> {
        let n_vocab = shape.n_vocab;
        self.top.clear();
        self.full.clear();
        self.normed.clear();
        self.pos = header.pos;
        self.spent_us = header.spent_us;
        self.n_vocab = n_vocab;
        let wrong = |what: String| BadRow::Length {
            bytes: payload.len(),
            what,
        };
        let values = |what: String| Err(BadRow::Values(what));
        if let (LogitsForm::Normed, Form::Normed) = (header.form, asked) {
            let (words, rest) = payload.as_chunks::<4>();
            let n_embd = shape.n_embd;
            if words.len() != n_embd as usize || header.n_vocab != n_embd || !rest.is_empty() {
                return Err(wrong(format!("a hidden row of {n_embd}")));
            }
            let numbers = words.iter().map(|word| f32::from_le_bytes(*word));
            self.normed.extend(numbers);
            if !self.normed.iter().all(|number| number.is_finite()) {
                return values("a hidden row holds NaN or infinity".into());
            }
            return Ok(());
        }
        if header.n_vocab != n_vocab {
            return Err(wrong(format!(
                "a vocabulary of {}, it has {n_vocab}",
                header.n_vocab
            )));
        }
        match (header.form, asked) {
            (LogitsForm::Full, Form::Full) => {
                let (words, rest) = payload.as_chunks::<4>();
                if words.len() != n_vocab as usize || !rest.is_empty() {
                    return Err(wrong(format!("a full row of {n_vocab}")));
                }
                self.full
                    .extend(words.iter().map(|w| f32::from_le_bytes(*w)));
                match log_sum_exp(&self.full) {
                    Some(lse) => self.log_sum_exp = lse,
                    None => return values("logits hold NaN or infinity".into()),
                }
            }
            (LogitsForm::Top { k, lse }, Form::Top(wanted)) => {
                let (pairs, rest) = payload.as_chunks::<8>();
                let k_max = u32::from(*wanted).min(n_vocab);
                if pairs.len() != usize::from(k) || u32::from(k) != k_max || !rest.is_empty() {
                    return Err(wrong(format!(
                        "the top {k} of {n_vocab}, {wanted} were asked for"
                    )));
                }
                self.read_pairs(pairs, lse)?;
            }
            (got, _) => return Err(wrong(format!("{got:?}, asked for {asked:?}"))),
        }
        Ok(())
    }

    fn read_pairs(&mut self, pairs: &[[u8; 8]], lse: f32) -> Result<(), BadRow> {
        for pair in pairs {
            let [a, b, c, d, e, f, g, h] = *pair;
            let (id, logit) = (
                u32::from_le_bytes([a, b, c, d]),
                f32::from_le_bytes([e, f, g, h]),
            );
            let previous = self.top.last().map_or(f32::INFINITY, |(_, l)| *l);
            if id >= self.n_vocab || logit.is_nan() || logit > previous || logit == f32::INFINITY {
                let what = format!("token {id} with logit {logit} after one of {previous}");
                return Err(BadRow::Values(what));
            }
            self.top.push((id, logit));
        }
        let largest = self.top.first().map_or(f32::NEG_INFINITY, |(_, l)| *l);
        // A sum over more than the largest is not less than it, but for rounding.
        if !lse.is_finite() || lse < largest - 1e-3 * largest.abs().max(1.0) {
            return Err(BadRow::Values(format!(
                "a log-sum-exp of {lse} below the largest logit {largest}"
            )));
        }
        self.log_sum_exp = lse;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swarm_proto::Epoch;

    #[test]
    fn a_hidden_row_is_as_long_as_the_model_says_and_finite() {
        let shape = Shape {
            n_embd: 3,
            n_vocab: 5,
        };
        let fill = |n_vocab, row: &[f32], asked| {
            let header = Logits {
                epoch: Epoch(0),
                pos: 1,
                n_vocab,
                form: LogitsForm::Normed,
                spent_us: 0,
            };
            let payload: Vec<u8> = row.iter().flat_map(|x| x.to_le_bytes()).collect();
            let mut filled = LogitsRow::default();
            let done = filled.fill(&header, &payload, &asked, shape);
            done.map(|()| filled.normed)
        };
        let row = [1.0, -2.0, 0.5];
        assert_eq!(fill(3, &row, Form::Normed), Ok(row.to_vec()));
        assert!(fill(5, &row, Form::Normed).is_err(), "another width");
        assert!(fill(3, &row[..2], Form::Normed).is_err(), "too short");
        assert!(fill(3, &[1.0, f32::NAN, 0.0], Form::Normed).is_err());
        assert!(fill(3, &row, Form::Full).is_err(), "not asked for");
    }
}
