//! What trunk and holders say to each other.

use crate::PREFILL_CHUNK;

use super::tensors::Parts;

/// Most experts that a row meets: llama.cpp's largest models take 32.
pub(super) const USED_MAX: usize = 64;

/// How an expert makes of what its first matrices give what its last one takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// silu(gate) · up.
    SwiGlu,
    /// gelu(gate) · up.
    GeGlu,
    /// relu(gate) · up.
    ReGlu,
    /// gelu(gate) · up, by the error function.
    GeGluErf,
    /// gelu(gate) · up, by the quick approximation.
    GeGluQuick,
    /// gpt-oss: gate and up clamped, gate · sigmoid(alpha · gate) · (up + 1).
    SwiGluOai {
        /// The factor inside the sigmoid.
        alpha: f32,
        /// Where both are clamped.
        limit: f32,
    },
    /// silu(gate) · up, clamped inside ggml's own operation.
    SwiGluClamp {
        /// Where.
        limit: f32,
    },
    /// silu(gate), at most `limit`, times up, clamped to ±`limit`.
    SiluLimited {
        /// Where.
        limit: f32,
    },
    /// silu(up): no gate.
    Silu,
    /// gelu(up): no gate.
    Gelu,
    /// relu(up): no gate.
    Relu,
    /// relu(up)²: no gate.
    ReluSquared,
}

impl Activation {
    /// Whether it has a gate.
    pub fn gated(self) -> bool {
        !matches!(
            self,
            Activation::Silu | Activation::Gelu | Activation::Relu | Activation::ReluSquared
        )
    }

    /// Whether its numbers can be.
    fn sane(self) -> bool {
        match self {
            Activation::SwiGluOai { alpha, limit } => alpha.is_finite() && limit.is_finite(),
            Activation::SwiGluClamp { limit } | Activation::SiluLimited { limit } => {
                limit.is_finite() && limit > 0.0
            }
            _ => true,
        }
    }
}

/// What an expert of a layer computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Form {
    /// Between its matrices.
    pub activation: Activation,
    /// Which tensors take part. A holder has these, or refuses.
    pub parts: Parts,
}

/// All rows that a call has for one expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Which expert.
    pub expert: u32,
    /// Its rows, by their index in [`ExpertCall::hidden`]; at least one.
    pub rows: Vec<u32>,
}

/// What one holder is asked: rows for some of its experts of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertCall {
    /// Layer of the whole model.
    pub layer: u32,
    /// What to compute.
    pub form: Form,
    /// Floats in a row.
    pub n_embd: u32,
    /// One element an expert, in ascending order of experts.
    pub groups: Vec<Group>,
    /// Rows of `n_embd` floats, each once however many experts take it; finite.
    pub hidden: Vec<f32>,
}

impl ExpertCall {
    /// Rows that come back: one for each row of each group.
    pub fn rows_out(&self) -> usize {
        self.groups.iter().map(|group| group.rows.len()).sum()
    }

    /// Holds the call against itself: bounds first, then what it refers to.
    ///
    /// # Errors
    /// [`ExpertError::Call`], which is the asker's fault.
    pub fn check(&self) -> Result<(), ExpertError> {
        let bad = |why: String| Err(ExpertError::Call(why));
        let rows_max = PREFILL_CHUNK as usize * USED_MAX;
        let n_embd = self.n_embd as usize;
        if n_embd == 0 || !self.hidden.len().is_multiple_of(n_embd) {
            return bad(format!("{} values in rows of {n_embd}", self.hidden.len()));
        }
        let n_rows = self.hidden.len() / n_embd;
        if n_rows == 0 || n_rows > rows_max {
            return bad(format!("{n_rows} rows, 1 to {rows_max} are possible"));
        }
        if self.groups.is_empty() || self.rows_out() > rows_max {
            let (n, out) = (self.groups.len(), self.rows_out());
            return bad(format!(
                "{n} experts for {out} rows, at most {rows_max} are possible"
            ));
        }
        if !self.groups.is_sorted_by(|a, b| a.expert < b.expert) {
            return bad("experts are not in ascending order".into());
        }
        for group in &self.groups {
            // No row meets an expert twice.
            if group.rows.is_empty() || group.rows.len() > PREFILL_CHUNK as usize {
                let (expert, n) = (group.expert, group.rows.len());
                return bad(format!(
                    "{n} rows for expert {expert}, 1 to {PREFILL_CHUNK} are possible"
                ));
            }
            if let Some(row) = group.rows.iter().find(|&&row| row as usize >= n_rows) {
                return bad(format!("row {row} of {n_rows}"));
            }
        }
        if !self.form.activation.sane() {
            return bad(format!("{:?} cannot be", self.form.activation));
        }
        if !crate::stage::all_finite(&self.hidden) {
            return bad("a value is not finite".into());
        }
        Ok(())
    }
}

/// What a holder answers: a row for each row of each group, in their order.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertReply {
    /// Rows of `n_embd` floats; finite.
    pub rows: Vec<f32>,
}

/// Why experts did not answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExpertError {
    /// The asker's fault: a call that cannot be.
    #[error("a call for experts that cannot be: {0}")]
    Call(String),
    /// Nobody has it.
    #[error("expert {expert} of layer {layer} is held by nobody who was asked")]
    NotHeld {
        /// Which layer.
        layer: u32,
        /// Which expert.
        expert: u32,
    },
    /// The holder has other tensors for the layer than the trunk's graph names.
    #[error("layer {layer}: the trunk computes with {asked}, the experts have {held}")]
    OtherTensors {
        /// Which layer.
        layer: u32,
        /// What the trunk's graph takes.
        asked: Parts,
        /// What the holder has.
        held: Parts,
    },
    /// The holder's fault: an answer that is no answer.
    #[error("the answer of {holder} for layer {layer} is wrong: {why}")]
    Reply {
        /// Who.
        holder: String,
        /// Which layer.
        layer: u32,
        /// What is wrong.
        why: String,
    },
    /// The holder takes no more for now.
    #[error("a queue of {max} calls for experts is full")]
    Busy {
        /// Its length.
        max: usize,
    },
    /// ggml did not do it, or the holder has gone.
    #[error("experts: {0}")]
    Backend(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> ExpertCall {
        ExpertCall {
            layer: 0,
            form: Form {
                activation: Activation::SwiGlu,
                parts: Parts::default(),
            },
            n_embd: 4,
            groups: vec![
                Group {
                    expert: 1,
                    rows: vec![0, 1],
                },
                Group {
                    expert: 3,
                    rows: vec![1],
                },
            ],
            hidden: vec![0.5; 8],
        }
    }

    #[test]
    fn calls_that_cannot_be_are_refused() {
        assert_eq!(call().check(), Ok(()));
        assert_eq!(call().rows_out(), 3);
        let wrong: [fn(&mut ExpertCall); 11] = [
            |c| c.n_embd = 0,
            |c| c.n_embd = 3,
            |c| c.hidden.clear(),
            |c| c.hidden = vec![0.0; 4 * (32 * 64 + 1)],
            |c| c.hidden[5] = f32::NAN,
            |c| c.groups.clear(),
            |c| c.groups.swap(0, 1),
            |c| c.groups[1].expert = 1,
            |c| c.groups[0].rows.clear(),
            |c| c.groups[0].rows[1] = 2,
            |c| c.form.activation = Activation::SiluLimited { limit: f32::NAN },
        ];
        for (i, wrong) in wrong.into_iter().enumerate() {
            let mut call = call();
            wrong(&mut call);
            assert!(matches!(call.check(), Err(ExpertError::Call(_))), "{i}");
        }
        let mut long = call();
        long.groups[0].rows = vec![0; 33];
        assert!(long.check().is_err());
    }
}
