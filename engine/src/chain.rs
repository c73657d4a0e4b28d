//! A stage without C++: a keyed hash chain over layer, position and history.
//!
//! Every hidden row depends on every row before it in every layer before it, so
//! a skipped, repeated or misordered layer, a lost truncation or a foreign KV
//! shows as a wrong next token. The values are small integers that f32, bf16
//! and q8_0 carry exactly. It does not resemble a language model otherwise.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use crate::load::{Loaded, Weights};
use crate::stage::{EngineError, Held, Input, Slot, Stage, StageShape, StageStats, Step, Want};
use crate::stage::{check_end, check_layers, check_step};

/// Largest value in a row: the largest that a q8_0 block keeps exactly.
const VALUE_MAX: u8 = 127;
/// A q8_0 block, and where each one's largest value goes.
const BLOCK: usize = 32;
/// Bytes one position of one layer is said to take, for the budget.
const CELL_BYTES: u64 = 64;

type State = [u8; 32];

/// The hash-chain stage.
pub struct ChainStage {
    shape: StageShape,
    held: Held,
    key: [u8; 32],
    cells_max: u64,
    pace: Duration,
    next_slot: u64,
    slots: BTreeMap<Slot, Session>,
    steps: u64,
    rows: u64,
}

struct Session {
    n_ctx: u32,
    layers: Range<u32>,
    /// Per opened layer: the state after each position.
    history: Vec<Vec<State>>,
}

impl ChainStage {
    /// A stage of `layers` out of a model of `n_layer` that `seed` names.
    pub fn new(n_layer: u32, n_embd: u32, n_vocab: u32, layers: Range<u32>, seed: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        ChainStage {
            shape: StageShape {
                n_embd,
                n_vocab,
                n_layer,
                n_ctx_max: 1 << 20,
            },
            held: Held::of([layers]),
            key,
            cells_max: u64::MAX / CELL_BYTES,
            pace: Duration::ZERO,
            next_slot: 0,
            slots: BTreeMap::new(),
            steps: 0,
            rows: 0,
        }
    }

    /// The same with room for `cells` positions of one layer in all.
    pub fn with_cells(mut self, cells: u64) -> Self {
        self.cells_max = cells.min(u64::MAX / CELL_BYTES);
        self
    }

    /// The same, taking `pace` per row and layer, as a model would.
    pub fn with_pace(mut self, pace: Duration) -> Self {
        self.pace = pace;
        self
    }

    /// The token that a greedy reader of the whole model's logits sees next
    /// after `tokens`; 0 after none.
    pub fn expected(&self, tokens: &[u32]) -> u32 {
        let mut history = vec![[0; 32]; self.shape.n_layer as usize];
        let mut row = Vec::new();
        for (pos, &token) in tokens.iter().enumerate() {
            row.clear();
            self.embed(token, &mut row);
            for (layer, state) in history.iter_mut().enumerate() {
                *state = self.absorb(layer as u32, pos as u32, state, &row);
                row.clear();
                self.expand(state, &mut row);
            }
        }
        if tokens.is_empty() { 0 } else { self.top(&row) }
    }

    fn hash(&self, parts: &[&[u8]]) -> State {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        for part in parts {
            hasher.update(part);
        }
        hasher.finalize().into()
    }

    fn embed(&self, token: u32, out: &mut Vec<f32>) {
        self.expand(&self.hash(&[b"token", &token.to_le_bytes()]), out);
    }

    fn absorb(&self, layer: u32, pos: u32, before: &State, row: &[f32]) -> State {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher
            .update(b"layer")
            .update(&layer.to_le_bytes())
            .update(&pos.to_le_bytes());
        hasher.update(before);
        for value in row {
            hasher.update(&value.to_bits().to_le_bytes());
        }
        hasher.finalize().into()
    }

    fn expand(&self, state: &State, out: &mut Vec<f32>) {
        let mut reader = blake3::Hasher::new_keyed(&self.key)
            .update(state)
            .finalize_xof();
        let mut bytes = [0; BLOCK];
        let mut left = self.shape.n_embd as usize;
        while left > 0 {
            reader.fill(&mut bytes);
            bytes[0] = VALUE_MAX;
            let n = left.min(BLOCK);
            out.extend(bytes[..n].iter().map(|&byte| f32::from(byte & VALUE_MAX)));
            left -= n;
        }
    }

    fn top(&self, row: &[f32]) -> u32 {
        let state = self.absorb(self.shape.n_layer, 0, &[0; 32], row);
        let word = u64::from_le_bytes([
            state[0], state[1], state[2], state[3], state[4], state[5], state[6], state[7],
        ]);
        (word % u64::from(self.shape.n_vocab.max(1))) as u32
    }

    fn logits(&self, row: &[f32], out: &mut Vec<f32>) {
        let top = self.top(row);
        let n_vocab = self.shape.n_vocab;
        out.extend((0..n_vocab).map(|id| {
            // A gentle slope away from the top, so that the order is total.
            let distance = (id + n_vocab - top) % n_vocab;
            if distance == 0 {
                16.0
            } else {
                -(distance as f32) / n_vocab as f32
            }
        }));
    }

    fn used_bytes(&self) -> u64 {
        self.slots.values().map(Session::bytes).sum()
    }
}

impl Session {
    fn bytes(&self) -> u64 {
        u64::from(self.n_ctx) * self.history.len() as u64 * CELL_BYTES
    }
}

impl Stage for ChainStage {
    fn shape(&self) -> StageShape {
        self.shape.clone()
    }

    fn open(&mut self, n_ctx: u32, layers: Range<u32>) -> Result<Slot, EngineError> {
        check_layers(&layers, &self.held)?;
        if n_ctx == 0 || n_ctx > self.shape.n_ctx_max {
            return Err(EngineError::ContextLength {
                n_ctx,
                max: self.shape.n_ctx_max,
            });
        }
        let history = vec![Vec::new(); layers.len()];
        let session = Session {
            n_ctx,
            layers,
            history,
        };
        let (needed, used) = (session.bytes(), self.used_bytes());
        let budget = self.cells_max * CELL_BYTES;
        if used.saturating_add(needed) > budget {
            return Err(EngineError::Full {
                needed,
                used,
                budget,
                sessions: self.slots.len() as u32,
                largest: self.slots.values().map(Session::bytes).max().unwrap_or(0),
            });
        }
        let slot = Slot(self.next_slot);
        self.next_slot += 1;
        self.slots.insert(slot, session);
        Ok(slot)
    }

    fn copy(&mut self, from: Slot, to: Slot, n: u32) -> Result<u32, EngineError> {
        let source = self.slots.get(&from).ok_or(EngineError::BadSlot(from))?;
        let target = self.slots.get(&to).ok_or(EngineError::BadSlot(to))?;
        let empty = target.history.iter().all(Vec::is_empty);
        if source.layers != target.layers || !empty {
            return Ok(0);
        }
        let ends = source.history.iter().map(|layer| layer.len() as u32);
        let n = ends.min().unwrap_or(0).min(n).min(target.n_ctx);
        let states = source.history.iter();
        let history = states.map(|layer| layer[..n as usize].to_vec()).collect();
        if let Some(target) = self.slots.get_mut(&to) {
            target.history = history;
        }
        Ok(n)
    }

    fn close(&mut self, slot: Slot) {
        self.slots.remove(&slot);
    }

    fn run(
        &mut self,
        step: &Step,
        input: &Input<'_>,
        out: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        out.clear();
        let mut session = self
            .slots
            .remove(&step.slot)
            .ok_or(EngineError::BadSlot(step.slot))?;
        let result = self.run_in(&mut session, step, input, out);
        self.slots.insert(step.slot, session);
        if result.is_ok() {
            self.steps += 1;
            self.rows += u64::from(step.n_rows);
        }
        result
    }

    fn add(&mut self, loaded: Loaded) -> Result<(), EngineError> {
        match loaded.weights {
            Weights::None => {
                let held = self.held.spans().iter().cloned();
                self.held = Held::of(held.chain(loaded.layers.spans().iter().cloned()));
                Ok(())
            }
            Weights::Llama { .. } => Err(EngineError::Backend("weights for a hash chain".into())),
        }
    }

    fn remove(&mut self, layers: &Range<u32>) {
        let rest = self.held.spans().iter().flat_map(|span| {
            let below = span.start..span.end.min(layers.start);
            let above = span.start.max(layers.end)..span.end;
            [below, above]
        });
        self.held = Held::of(rest);
    }

    fn limit(&mut self, kv_bytes_max: u64) {
        self.cells_max = kv_bytes_max / CELL_BYTES;
    }

    fn stats(&self) -> StageStats {
        let used = self.used_bytes();
        let budget = self.cells_max * CELL_BYTES;
        let per_cell = CELL_BYTES * u64::from(self.held.n_layers().max(1));
        StageStats {
            held: self.held.clone(),
            sessions: self.slots.len() as u32,
            kv_bytes: used,
            kv_bytes_max: budget,
            free_cells: budget.saturating_sub(used) / per_cell,
            tensor_bytes: 0,
            steps: self.steps,
            rows: self.rows,
        }
    }
}

impl ChainStage {
    fn run_in(
        &self,
        session: &mut Session,
        step: &Step,
        input: &Input<'_>,
        out: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        check_step(&self.shape, &session.layers, session.n_ctx, step, input)?;
        let first = session.layers.start;
        for layer in step.layers.clone() {
            check_end(
                step,
                layer,
                session.history[(layer - first) as usize].len() as u32,
            )?;
        }
        if !self.pace.is_zero() {
            std::thread::sleep(self.pace * step.n_rows * step.layers.len() as u32);
        }
        let n_embd = self.shape.n_embd as usize;
        let mut rows = Vec::with_capacity(step.n_rows as usize * n_embd);
        match *input {
            Input::Tokens(tokens) => tokens.iter().for_each(|&t| self.embed(t, &mut rows)),
            Input::Hidden(hidden) => rows.extend_from_slice(hidden),
        }
        for layer in step.layers.clone() {
            let history = &mut session.history[(layer - first) as usize];
            history.truncate(step.pos0 as usize);
            let mut next = Vec::with_capacity(rows.len());
            for (row, pos) in rows.chunks_exact(n_embd).zip(step.pos0..) {
                let before = history.last().copied().unwrap_or([0; 32]);
                let state = self.absorb(layer, pos, &before, row);
                self.expand(&state, &mut next);
                history.push(state);
            }
            rows = next;
        }
        if step.layers.end < self.shape.n_layer {
            *out = rows;
            return Ok(());
        }
        if step.want == Want::Normed {
            *out = rows;
            return Ok(());
        }
        let skip = (step.n_rows - step.want.rows(step.n_rows)) as usize;
        rows.chunks_exact(n_embd)
            .skip(skip)
            .for_each(|row| self.logits(row, out));
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::too_many_lines)]
mod tests {
    use super::*;

    const N_EMBD: u32 = 48;

    fn stage(layers: Range<u32>) -> ChainStage {
        ChainStage::new(5, N_EMBD, 97, layers, 7)
    }

    fn argmax(row: &[f32]) -> u32 {
        (0..row.len())
            .max_by(|&a, &b| row[a].total_cmp(&row[b]))
            .unwrap() as u32
    }

    /// Runs `tokens` from `pos0` through stages cut at `cuts`; the last row's top.
    fn through(
        stages: &mut [(ChainStage, Slot)],
        pos0: u32,
        tokens: &[u32],
    ) -> Result<u32, EngineError> {
        let (mut rows, mut out) = (Vec::new(), Vec::new());
        for (stage, slot) in stages {
            let layers = stage.stats().held.spans()[0].clone();
            let step = Step {
                slot: *slot,
                layers,
                pos0,
                n_rows: tokens.len() as u32,
                want: Want::Last,
            };
            let first = step.layers.start == 0;
            let input = if first {
                Input::Tokens(tokens)
            } else {
                Input::Hidden(&rows)
            };
            stage.run(&step, &input, &mut out)?;
            std::mem::swap(&mut rows, &mut out);
        }
        Ok(argmax(&rows))
    }

    fn cut(cuts: &[u32]) -> Vec<(ChainStage, Slot)> {
        let one = |w: &[u32]| {
            let mut stage = stage(w[0]..w[1]);
            let slot = stage.open(64, w[0]..w[1]).unwrap();
            (stage, slot)
        };
        cuts.windows(2).map(one).collect()
    }

    #[test]
    fn every_cut_gives_the_expected_token() {
        let tokens = [3, 1, 4, 1, 5, 9, 2, 6];
        let expected = stage(0..5).expected(&tokens);
        for cuts in [
            vec![0, 5],
            vec![0, 1, 5],
            vec![0, 2, 3, 5],
            vec![0, 1, 2, 3, 4, 5],
        ] {
            let mut stages = cut(&cuts);
            assert_eq!(
                through(&mut stages, 0, &tokens).unwrap(),
                expected,
                "{cuts:?}"
            );
            // Once more from position 5 on: the same rows again.
            assert_eq!(
                through(&mut stages, 5, &tokens[5..]).unwrap(),
                expected,
                "{cuts:?}"
            );
        }
    }

    #[test]
    fn a_copied_session_goes_on_as_its_own() {
        let tokens = [3, 1, 4, 1, 5, 9];
        let mut stages = cut(&[0, 2, 5]);
        through(&mut stages, 0, &tokens).unwrap();
        let fork = |(stage, slot): &mut (ChainStage, Slot)| {
            let layers = stage.stats().held.spans()[0].clone();
            let to = stage.open(16, layers).unwrap();
            assert_eq!(stage.copy(*slot, to, 4).unwrap(), 4);
            assert_eq!(stage.copy(*slot, to, 4).unwrap(), 0, "it is not empty");
            assert!(stage.copy(Slot(99), to, 4).is_err());
            to
        };
        let forked: Vec<Slot> = stages.iter_mut().map(fork).collect();
        let own = std::mem::take(&mut stages).into_iter().zip(forked);
        let mut own: Vec<_> = own.map(|((stage, _), slot)| (stage, slot)).collect();
        let expected = stage(0..5).expected(&[3, 1, 4, 1, 7]);
        assert_eq!(through(&mut own, 4, &[7]).unwrap(), expected);
    }

    #[test]
    fn mistakes_show() {
        let tokens = [3, 1, 4, 1];
        let expected = stage(0..5).expected(&tokens);
        let mut skipped = cut(&[0, 2, 4, 5]);
        skipped.remove(1);
        assert_ne!(through(&mut skipped, 0, &tokens).unwrap(), expected);
        let mut swapped = cut(&[0, 1, 2, 3, 5]);
        swapped.swap(1, 2);
        assert_ne!(through(&mut swapped, 0, &tokens).unwrap(), expected);
        let mut repeated = cut(&[0, 2, 5]);
        repeated.insert(1, cut(&[1, 2]).remove(0));
        assert_ne!(through(&mut repeated, 0, &tokens).unwrap(), expected);
        let mut other = cut(&[0, 2, 5]);
        through(&mut other, 0, &[9]).unwrap();
        assert_ne!(through(&mut other, 1, &tokens[1..]).unwrap(), expected);
    }

    #[test]
    fn rows_survive_q8_0() {
        let mut row = Vec::new();
        stage(0..5).embed(1, &mut row);
        assert_eq!(row.len(), N_EMBD as usize);
        for block in row.chunks(BLOCK) {
            assert_eq!(block[0], 127.0);
            assert!(
                block
                    .iter()
                    .all(|v| (0.0..=127.0).contains(v) && v.fract() == 0.0)
            );
        }
    }

    #[test]
    fn bad_steps_leave_the_session_alone() {
        let mut stage = stage(1..4).with_cells(3 * 100);
        let slot = stage.open(64, 1..4).unwrap();
        assert!(matches!(
            stage.open(64, 1..4),
            Err(EngineError::Full { sessions: 1, .. })
        ));
        assert!(matches!(
            stage.open(8, 0..4),
            Err(EngineError::LayersNotHeld { .. })
        ));
        assert!(matches!(
            stage.open(0, 1..4),
            Err(EngineError::ContextLength { .. })
        ));
        let row = vec![1.0; N_EMBD as usize];
        let step = Step {
            slot,
            layers: 1..4,
            pos0: 0,
            n_rows: 1,
            want: Want::None,
        };
        let mut out = Vec::new();
        let mut run = |step: Step, input: Input<'_>| stage.run(&step, &input, &mut out);
        let hidden = Input::Hidden(&row);
        use EngineError as E;
        let at = |pos0| Step {
            pos0,
            ..step.clone()
        };
        assert!(matches!(
            run(at(1), hidden),
            Err(E::Gap {
                pos0: 1,
                end: 0,
                layer: 1
            })
        ));
        assert!(matches!(
            run(at(64), hidden),
            Err(E::ContextFull { end: 65, n_ctx: 64 })
        ));
        assert!(matches!(
            run(at(0), Input::Tokens(&[1])),
            Err(E::InputKind { .. })
        ));
        assert!(matches!(
            run(at(0), Input::Hidden(&row[1..])),
            Err(E::InputLength { .. })
        ));
        let layers = |layers| Step {
            layers,
            ..step.clone()
        };
        assert!(matches!(
            run(layers(0..2), hidden),
            Err(E::LayersNotHeld { .. })
        ));
        assert!(matches!(
            run(layers(2..2), hidden),
            Err(E::LayersNotHeld { .. })
        ));
        let none = Step {
            n_rows: 0,
            ..step.clone()
        };
        assert!(matches!(run(none, hidden), Err(E::RowCount { .. })));
        let closed = Step {
            slot: Slot(99),
            ..step.clone()
        };
        assert!(matches!(run(closed, hidden), Err(E::BadSlot(Slot(99)))));
        run(at(0), hidden).unwrap();
        run(at(1), hidden).unwrap();
        stage.close(slot);
        assert_eq!(stage.stats().free_cells, 100);
        assert_eq!((stage.stats().steps, stage.stats().rows), (2, 2));
    }
}
