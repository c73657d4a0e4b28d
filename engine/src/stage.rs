//! What a stage is to its callers: rows in, rows out.
//!
//! ```text
//! token ids ─▶ [layer 0 … layer k) ─▶ hidden rows ─▶ [k … n_layer) ─▶ logits rows
//! ```
//!
//! A row is one position of one session. Rows are addressed by position:
//! writing at `pos0` drops what the session held from `pos0` on, so a step may
//! be sent twice, replayed, or take back rejected drafts.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::PREFILL_CHUNK;
use crate::load::Loaded;

/// One session's KV in one stage. Never reused, so a late step for a closed
/// session is refused rather than written into another's KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u64);

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}", self.0)
    }
}

/// Sessions of a stage that can run together. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bench(pub u64);

/// Layers that a stage holds: spans in ascending order that do not touch. Holding layer 0 implies the
/// embedding, holding the last implies the head. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held(Arc<[Range<u32>]>);

impl Held {
    /// These layers, given in any order and any pieces.
    pub fn of(pieces: impl IntoIterator<Item = Range<u32>>) -> Held {
        let mut pieces: Vec<_> = pieces.into_iter().filter(|p| !p.is_empty()).collect();
        pieces.sort_unstable_by_key(|piece| piece.start);
        let mut spans: Vec<Range<u32>> = Vec::new();
        for piece in pieces {
            match spans.last_mut() {
                Some(last) if piece.start <= last.end => last.end = last.end.max(piece.end),
                _ => spans.push(piece),
            }
        }
        Held(spans.into())
    }

    /// The spans.
    pub fn spans(&self) -> &[Range<u32>] {
        &self.0
    }

    /// How many layers.
    pub fn n_layers(&self) -> u32 {
        self.0.iter().map(|span| span.end - span.start).sum()
    }

    /// Whether `layers` are not empty and all held, in one span.
    pub fn covers(&self, layers: &Range<u32>) -> bool {
        let within = |span: &Range<u32>| span.start <= layers.start && layers.end <= span.end;
        layers.start < layers.end && self.0.iter().any(within)
    }
}

/// As `0..3, 5..8`, or `none`.
impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Range { start, end }) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{start}..{end}")?;
        }
        if self.0.is_empty() {
            f.write_str("none")?;
        }
        Ok(())
    }
}

/// The dimensions of a stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageShape {
    /// Floats in a hidden row.
    pub n_embd: u32,
    /// Floats in a logits row.
    pub n_vocab: u32,
    /// Layers of the whole model.
    pub n_layer: u32,
    /// Longest context a session may ask for.
    pub n_ctx_max: u32,
}

/// What a stage has done and what it has left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StageStats {
    /// Layers held now.
    pub held: Held,
    /// Open sessions.
    pub sessions: u32,
    /// Bytes that open sessions hold: KV and working buffers.
    pub kv_bytes: u64,
    /// Bytes that sessions may hold together.
    pub kv_bytes_max: u64,
    /// Positions that still fit when a session uses every layer held here.
    pub free_cells: u64,
    /// Bytes of tensors held.
    pub tensor_bytes: u64,
    /// Steps that ended well.
    pub steps: u64,
    /// Rows in those steps.
    pub rows: u64,
}

/// One step of one session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Which session.
    pub slot: Slot,
    /// Layers to run: those the session was opened for.
    pub layers: Range<u32>,
    /// Position of the first row. At most the session's end; what lies behind
    /// it is dropped first.
    pub pos0: u32,
    /// Number of rows, 1 to [`PREFILL_CHUNK`].
    pub n_rows: u32,
    /// Which logits rows to return, when the last layer runs.
    pub want: Want,
}

/// Which rows of logits a step returns, or what instead. It does not matter to a step that ends
/// before the last layer: that one returns every hidden row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// None: prefill.
    None,
    /// That of the last row.
    Last,
    /// One for every row.
    All,
    /// No logits: every hidden row behind the last norm (`n_rows × n_embd`), from which embeddings are made.
    Normed,
}

impl Want {
    /// Rows returned by the last layer for `n_rows` rows.
    pub fn rows(self, n_rows: u32) -> u32 {
        match self {
            Want::None => 0,
            Want::Last => n_rows.min(1),
            Want::All | Want::Normed => n_rows,
        }
    }
}

/// Rows that enter a step.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Token ids, one a row: only where layer 0 begins.
    Tokens(&'a [u32]),
    /// Hidden rows, `n_rows × n_embd`, row after row: only beyond layer 0. The
    /// caller has seen that they are finite, where they came from the wire.
    Hidden(&'a [f32]),
}

/// Runs layers for several sessions. Owned by one [`crate::Worker`] thread.
pub trait Stage: Send {
    /// Its dimensions.
    fn shape(&self) -> StageShape;

    /// Takes KV for `n_ctx` positions of one session in `layers`.
    ///
    /// # Errors
    /// Layers that are not held, a context beyond the longest, or no room.
    fn open(&mut self, n_ctx: u32, layers: Range<u32>) -> Result<Slot, EngineError>;

    /// As [`Stage::open`], for a session whose single rows may run together with those of others, where the stage
    /// can do that: with the same bits as alone, or, where it is `fast`, with others within the noise of the
    /// model's kernels.
    ///
    /// # Errors
    /// As [`Stage::open`].
    fn open_beside(
        &mut self,
        n_ctx: u32,
        layers: Range<u32>,
        fast: bool,
    ) -> Result<Slot, EngineError> {
        let _ = fast;
        self.open(n_ctx, layers)
    }

    /// Which sessions this one can run together with: those of the same bench. None: it runs alone, and its
    /// steps as they come. The steps of the others may also be run in parts.
    fn bench(&self, slot: Slot) -> Option<Bench> {
        let _ = slot;
        None
    }

    /// How long a pass of so many rows of a bench takes, where waiting for so many is worth it: they take at most
    /// half of what they take one by one. None where it is not, or nothing is known yet.
    fn worth_waiting(&self, bench: Bench, rows: u32) -> Option<Duration> {
        let _ = (bench, rows);
        None
    }

    /// Runs single rows of different sessions of one bench, each as [`Stage::run`] would. There are as many inputs
    /// and outs as steps; each step has its result.
    fn run_rows(
        &mut self,
        steps: &[Step],
        inputs: &[Input<'_>],
        outs: &mut [Vec<f32>],
    ) -> Vec<Result<(), EngineError>> {
        let each = steps.iter().zip(inputs).zip(outs);
        each.map(|((step, input), out)| self.run(step, input, out))
            .collect()
    }

    /// Copies the first `n` positions of a session into one of the same layers that holds nothing; how many it has
    /// then. They are all that `from` has of them, or 0 where they cannot be copied: never others than `to` would
    /// have computed.
    ///
    /// # Errors
    /// A slot that is not open.
    fn copy(&mut self, from: Slot, to: Slot, n: u32) -> Result<u32, EngineError>;

    /// Gives a session's KV back. An unknown slot is no error.
    fn close(&mut self, slot: Slot);

    /// Runs a step: `out` is cleared and filled with hidden rows, which are finite
    /// (`n_rows × n_embd`), or, when the last layer ran, logits rows
    /// ([`Want::rows`] `× n_vocab`; `× n_embd` and finite for [`Want::Normed`]).
    ///
    /// # Errors
    /// A step that does not fit the session or the stage leaves the session as
    /// it was. After [`EngineError::Backend`] the session ends at `pos0`.
    fn run(
        &mut self,
        step: &Step,
        input: &Input<'_>,
        out: &mut Vec<f32>,
    ) -> Result<(), EngineError>;

    /// Takes more layers in. They may replace held ones; what was loaded together with those, and is not
    /// among these, leaves with them. Sessions go on with what they were opened on, new ones get the new.
    ///
    /// # Errors
    /// Weights of another kind of stage.
    fn add(&mut self, loaded: Loaded) -> Result<(), EngineError>;

    /// Holds these layers no more; layers that were loaded together leave together, or stay. Sessions on
    /// them go on, and their weights go with the last.
    fn remove(&mut self, layers: &Range<u32>);

    /// How many bytes sessions may hold together from now on. Those that are open keep what they have.
    fn limit(&mut self, kv_bytes_max: u64);

    /// Counters and layers, for adverts.
    fn stats(&self) -> StageStats;
}

/// Whose doing an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Whoever sent the step.
    Caller,
    /// This machine.
    Local,
}

/// Why a stage did not do as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// Layers outside those held, or others than those opened.
    #[error("layers {}..{} asked for, {held} are held", asked.start, asked.end)]
    LayersNotHeld {
        /// What the caller wants.
        asked: Range<u32>,
        /// What there is.
        held: Held,
    },
    /// A slot that is not open.
    #[error("{0} is not open")]
    BadSlot(Slot),
    /// No room for another session.
    #[error(
        "kv cache full: {needed} bytes needed, {used} of {budget} in use by {sessions} sessions \
         (the largest holds {largest})"
    )]
    Full {
        /// Bytes the session would take.
        needed: u64,
        /// Bytes in use.
        used: u64,
        /// Bytes there are.
        budget: u64,
        /// Sessions that are open.
        sessions: u32,
        /// Bytes of the largest of them.
        largest: u64,
    },
    /// A context longer than the model or the operator allows, or of no length.
    #[error("a context of {n_ctx} positions asked for, 1 to {max} are possible")]
    ContextLength {
        /// What the caller wants.
        n_ctx: u32,
        /// What there is.
        max: u32,
    },
    /// A step that would leave a gap in the KV.
    #[error("rows begin at position {pos0}, layer {layer} of the session ends at {end}")]
    Gap {
        /// Where the step begins.
        pos0: u32,
        /// Where the session ends.
        end: u32,
        /// In which layer.
        layer: u32,
    },
    /// The session's context is used up.
    #[error("rows end at position {end}, the session's context has {n_ctx}")]
    ContextFull {
        /// Where the step would end.
        end: u64,
        /// The session's context.
        n_ctx: u32,
    },
    /// No rows, or more than fit one step.
    #[error("{n_rows} rows in one step, 1 to {max} are possible")]
    RowCount {
        /// Rows in the step.
        n_rows: u32,
        /// Most rows.
        max: u32,
    },
    /// Fewer or more values than the step says.
    #[error("{what}: {len} values, {expected} expected")]
    InputLength {
        /// Tokens or hidden rows.
        what: &'static str,
        /// Values there are.
        len: usize,
        /// Values there should be.
        expected: usize,
    },
    /// Tokens beyond layer 0, or hidden rows at layer 0.
    #[error("layer {layer} takes {takes}")]
    InputKind {
        /// First layer of the step.
        layer: u32,
        /// What it takes.
        takes: &'static str,
    },
    /// A token id outside the vocabulary.
    #[error("token {token} is outside the vocabulary of {n_vocab}")]
    Token {
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        n_vocab: u32,
    },
    /// llama.cpp did not do it.
    #[error("engine: {0}")]
    Backend(String),
    /// The worker's thread has ended.
    #[error("the stage worker has stopped")]
    Stopped,
}

impl EngineError {
    /// Whose doing it is.
    pub fn fault(&self) -> Fault {
        match self {
            EngineError::Full { .. } | EngineError::Backend(_) | EngineError::Stopped => {
                Fault::Local
            }
            _ => Fault::Caller,
        }
    }
}

/// Whether `layers` are held.
pub(crate) fn check_layers(layers: &Range<u32>, held: &Held) -> Result<(), EngineError> {
    if held.covers(layers) {
        return Ok(());
    }
    Err(EngineError::LayersNotHeld {
        asked: layers.clone(),
        held: held.clone(),
    })
}

/// Holds a step and its input against the stage and the session's context.
/// What depends on the session's end is checked by [`check_end`].
pub(crate) fn check_step(
    shape: &StageShape,
    opened: &Range<u32>,
    n_ctx: u32,
    step: &Step,
    input: &Input<'_>,
) -> Result<(), EngineError> {
    if step.layers != *opened {
        return Err(EngineError::LayersNotHeld {
            asked: step.layers.clone(),
            held: Held::of([opened.clone()]),
        });
    }
    if step.n_rows == 0 || step.n_rows > PREFILL_CHUNK {
        return Err(EngineError::RowCount {
            n_rows: step.n_rows,
            max: PREFILL_CHUNK,
        });
    }
    let end = u64::from(step.pos0) + u64::from(step.n_rows);
    if end > n_ctx.into() {
        return Err(EngineError::ContextFull { end, n_ctx });
    }
    check_input(shape, step, input)
}

fn check_input(shape: &StageShape, step: &Step, input: &Input<'_>) -> Result<(), EngineError> {
    let n_rows = step.n_rows as usize;
    let length = |what, len, expected| {
        if len == expected {
            Ok(())
        } else {
            Err(EngineError::InputLength {
                what,
                len,
                expected,
            })
        }
    };
    match *input {
        Input::Tokens(tokens) if step.layers.start == 0 => {
            length("tokens", tokens.len(), n_rows)?;
            match tokens.iter().find(|&&token| token >= shape.n_vocab) {
                Some(&token) => Err(EngineError::Token {
                    token,
                    n_vocab: shape.n_vocab,
                }),
                None => Ok(()),
            }
        }
        Input::Hidden(rows) if step.layers.start > 0 => {
            length("hidden rows", rows.len(), n_rows * shape.n_embd as usize)
        }
        _ => Err(EngineError::InputKind {
            layer: step.layers.start,
            takes: if step.layers.start == 0 {
                "token ids"
            } else {
                "hidden rows"
            },
        }),
    }
}

/// Without a branch a value, so that it becomes vector code: it runs on every step.
pub(crate) fn all_finite(rows: &[f32]) -> bool {
    rows.iter().fold(true, |all, value| all & value.is_finite())
}

/// Whether the step begins within what layer `layer` of the session holds.
pub(crate) fn check_end(step: &Step, layer: u32, end: u32) -> Result<(), EngineError> {
    if step.pos0 > end {
        return Err(EngineError::Gap {
            pos0: step.pos0,
            end,
            layer,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_layers_are_spans_that_do_not_touch() {
        let held = Held::of([6..7, 0..2, 5..6, 2..3, 9..9]);
        assert_eq!(held.spans(), [0..3, 5..7]);
        assert_eq!(
            (held.to_string(), held.n_layers()),
            ("0..3, 5..7".into(), 5)
        );
        assert!(held.covers(&(1..3)) && held.covers(&(5..7)));
        assert!(!held.covers(&(2..6)) && !held.covers(&(1..1)));
        assert_eq!(Held::default().to_string(), "none");
    }
}
