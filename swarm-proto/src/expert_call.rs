//! The experts' stream: a trunk has rows computed by a holder of experts. It stays open for as long as both
//! live; there are no sessions on it, a call is all that a holder needs to know.
//!
//! ```text
//! ──Hello { model }──▶            ◀── Serving, or Refused and the end
//! ──Call { id, groups } + rows──▶ ◀── Working …  ◀── Rows { id } + rows, or Failed { id }
//! ──Ping──▶                       ◀── Pong
//! ```
//! Rows are raw f32, little-endian: other types are not exact (`docs/decisions/0141`). Calls are answered in
//! any order.

use bincode::{Decode, Encode};

use crate::{
    ModelId, ROWS_MAX,
    codec::{CheckError, Message, at_most, wrong},
    experts::EXPERTS_MAX,
};

/// Most experts that a row meets.
pub const EXPERTS_USED_MAX: usize = 64;
/// Most rows of a call, and of its answer: each of a step's rows for each of its experts.
pub const EXPERT_ROWS_MAX: usize = ROWS_MAX as usize * EXPERTS_USED_MAX;
/// Largest header of a call: three bytes a row, five a group.
pub const EXPERT_HEADER_MAX: usize = 16 * 1024;
/// Activations that are known.
pub const ACTIVATIONS: u8 = 12;
/// Bits of a set of an expert's tensors.
const PARTS_BITS: u32 = 12;
/// Longest text of a refusal or a failure.
pub const WHY_BYTES_MAX: usize = 512;

/// What a trunk says.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum ExpertAsk {
    /// First: which model's experts are wanted.
    Hello {
        /// The model.
        model: ModelId,
    },
    /// Rows for experts, the rows as the payload.
    Call(ExpertRows),
    /// Answered at once.
    Ping(u32),
}

/// What an expert computes, as the trunk's own graph has it.
#[derive(Debug, Clone, Copy, PartialEq, Encode, Decode)]
pub struct ExpertForm {
    /// Which activation, below [`ACTIVATIONS`].
    pub activation: u8,
    /// Its numbers; 0 where it has none.
    pub alpha: f32,
    /// Where it clamps; 0 where it does not.
    pub limit: f32,
    /// Which tensors take part, a bit each.
    pub parts: u16,
}

/// All rows that a call has for one expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct ExpertGroup {
    /// Which expert.
    pub expert: u16,
    /// How many rows, 1 to [`ROWS_MAX`]: the next so many of [`ExpertRows::rows`].
    pub rows: u8,
}

/// A call.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct ExpertRows {
    /// Names it on this stream.
    pub id: u32,
    /// Layer of the whole model.
    pub layer: u16,
    /// What to compute.
    pub form: ExpertForm,
    /// Floats in a row.
    pub n_embd: u32,
    /// Rows of the payload.
    pub n_rows: u16,
    /// Experts in ascending order.
    pub groups: Vec<ExpertGroup>,
    /// The rows of each group, by their index in the payload.
    pub rows: Vec<u16>,
}

impl ExpertRows {
    /// Bytes of the payload; none where that overflows.
    pub fn payload_len(&self) -> Option<usize> {
        let row = usize::try_from(self.n_embd).ok()?.checked_mul(4)?;
        row.checked_mul(self.n_rows.into())
    }
}

impl Message for ExpertAsk {
    const NAME: &'static str = "call for experts";
    const BYTES_MAX: usize = EXPERT_HEADER_MAX;

    fn check(&self) -> Result<(), CheckError> {
        let ExpertAsk::Call(call) = self else {
            return Ok(());
        };
        let form = &call.form;
        if form.activation >= ACTIVATIONS || form.parts >> PARTS_BITS != 0 {
            let (activation, parts) = (form.activation, form.parts);
            return Err(wrong(format!(
                "activation {activation} of tensors {parts:#x}"
            )));
        }
        if !form.alpha.is_finite() || !form.limit.is_finite() {
            return Err(wrong("an activation's number that is not finite"));
        }
        let n_rows = usize::from(call.n_rows);
        at_most("rows of a call", n_rows, EXPERT_ROWS_MAX)?;
        at_most("rows of an answer", call.rows.len(), EXPERT_ROWS_MAX)?;
        at_most("experts of a call", call.groups.len(), EXPERTS_MAX)?;
        if n_rows == 0 || call.groups.is_empty() || call.n_embd == 0 {
            return Err(wrong("a call without rows"));
        }
        if !call.groups.is_sorted_by(|a, b| a.expert < b.expert) {
            return Err(wrong("experts that are not in order"));
        }
        let wild = |group: &&ExpertGroup| {
            usize::from(group.expert) >= EXPERTS_MAX
                || group.rows == 0
                || u16::from(group.rows) > ROWS_MAX
        };
        if let Some(ExpertGroup { expert, rows }) = call.groups.iter().find(wild) {
            return Err(wrong(format!("{rows} rows for expert {expert}")));
        }
        let said: usize = call
            .groups
            .iter()
            .map(|group| usize::from(group.rows))
            .sum();
        if said != call.rows.len() {
            let listed = call.rows.len();
            return Err(wrong(format!("groups of {said} rows, {listed} are listed")));
        }
        match call.rows.iter().find(|row| **row >= call.n_rows) {
            Some(row) => Err(wrong(format!("row {row} of {n_rows}"))),
            None => Ok(()),
        }
    }
}

/// What a holder says.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ExpertGive {
    /// It has experts of the model.
    Serving {
        /// Floats in a row.
        n_embd: u32,
    },
    /// It does not answer calls for the model, and why; the stream ends.
    Refused(String),
    /// The rows of a call as the payload: those of each group, in their order.
    Rows {
        /// Which call.
        id: u32,
        /// Microseconds from its arrival to this answer.
        spent_us: u32,
    },
    /// A call that gets no rows.
    Failed {
        /// Which call.
        id: u32,
        /// Why.
        why: ExpertRefusal,
    },
    /// It is at work on a call.
    Working,
    /// What a ping said.
    Pong(u32),
}

/// Why a call gets no rows.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ExpertRefusal {
    /// It does not hold this expert of the layer, not any more.
    NotHeld {
        /// Which.
        expert: u16,
    },
    /// Too many calls wait.
    Busy,
    /// Its owner wants it to do nothing for others just now.
    Paused,
    /// The call is wrong: the asker's fault.
    Call(String),
    /// It could not compute.
    Failed(String),
}

impl Message for ExpertGive {
    const NAME: &'static str = "answer of experts";
    const BYTES_MAX: usize = 1024;

    fn check(&self) -> Result<(), CheckError> {
        let why = match self {
            ExpertGive::Refused(why)
            | ExpertGive::Failed {
                why: ExpertRefusal::Call(why) | ExpertRefusal::Failed(why),
                ..
            } => why,
            _ => return Ok(()),
        };
        at_most("bytes of a failure's text", why.len(), WHY_BYTES_MAX)
    }
}
