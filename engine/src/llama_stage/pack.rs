//! Sessions that run together: a context for each group of layers, and a lane in each for every session.
//!
//! ```text
//! lane      0    1    2    3
//! group a  KV   KV    ·   KV     a row of each session: one call, the gap filled or left out
//! group b  KV   KV    ·   KV
//! ```

use std::ops::Range;
use std::time::Instant;

use super::costs::Costs;
use super::{Group, Kind};
use crate::blueprint::Blueprint;
use crate::llama::{self, Context, Output};
use crate::memory::Need;
use crate::stage::{EngineError, Slot, Step, Want, check_end};

/// What fills a gap between lanes: finite, and not so small that the processor is slow with it.
const FILLER: f32 = 0.5;

/// Sessions of the same layers and size class.
pub(super) struct Pack {
    pub layers: Range<u32>,
    pub class: u32,
    /// Whether other sessions may join.
    pub open: bool,
    pub lanes: Vec<Option<Slot>>,
    pub parts: Vec<Part>,
    pub costs: Costs,
    /// Rows of a call: those that go into a group, and those that come out.
    hidden: Vec<f32>,
    out: Vec<f32>,
}

/// The pack in one group.
pub(super) struct Part {
    /// The id of the stage's, which may be gone.
    pub group: u64,
    /// Of the group.
    layers: Range<u32>,
    pub kind: Kind,
    pub context: Context,
    /// Positions held, by lane.
    pub ends: Vec<u32>,
}

/// A row of one session on its way through the pack.
pub(super) struct Row<'a> {
    pub lane: u32,
    pub step: &'a Step,
    pub hidden: &'a [f32],
    pub out: &'a mut Vec<f32>,
    pub result: Result<(), EngineError>,
}

impl Pack {
    pub(super) fn new(
        layers: Range<u32>,
        class: u32,
        open: bool,
        lanes: u32,
        parts: Vec<Part>,
    ) -> Pack {
        Pack {
            layers,
            class,
            open,
            lanes: vec![None; lanes as usize],
            parts,
            costs: Costs::default(),
            hidden: Vec::new(),
            out: Vec::new(),
        }
    }

    pub(super) fn used(&self) -> u32 {
        self.lanes.iter().flatten().count() as u32
    }

    /// Seconds that so many rows take in one call, which may take along lanes that do not run.
    pub(super) fn cost(&self, rows: usize) -> f32 {
        let calls = rows..=self.lanes.len().max(rows);
        calls
            .map(|rows| self.costs.of(rows))
            .fold(f32::INFINITY, f32::min)
    }

    /// A lane that nobody uses.
    pub(super) fn free_lane(&self) -> Option<u32> {
        let at = self.lanes.iter().position(Option::is_none)?;
        u32::try_from(at).ok()
    }

    /// What the pack takes.
    pub(super) fn need(&self, blueprint: &Blueprint) -> Need {
        let (used, all) = (self.used(), self.lanes.len() as u32);
        let parts = self.parts.iter();
        parts
            .map(|part| pack_need(blueprint, &part.layers, self.class, used, all))
            .sum()
    }

    /// Holds a step against what its session holds in every group.
    pub(super) fn check_end(&self, lane: u32, step: &Step) -> Result<(), EngineError> {
        let ends = self.parts.iter();
        let mut ends = ends.map(|part| (part.kind.layers.0, part.ends[lane as usize]));
        ends.try_for_each(|(layer, end)| check_end(step, layer, end))
    }

    /// Runs a step of the session in `lane`, from `between` to `out`; both are overwritten.
    pub(super) fn run(
        &mut self,
        lane: u32,
        step: &Step,
        mut hidden: Option<&[f32]>,
        between: &mut Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        let begun = Instant::now();
        let last = self.parts.len() - 1;
        let positions = step.pos0..step.pos0 + step.n_rows;
        let at: Vec<_> = positions.map(|pos| (lane, pos)).collect();
        let output = match step.want {
            Want::None => Output::None,
            Want::Last => Output::Last,
            Want::All => Output::All,
            Want::Normed => Output::Normed,
        };
        for (i, part) in self.parts.iter_mut().enumerate() {
            part.rewind(lane, step.pos0)?;
            let rows = llama::Rows::Hidden(hidden.take().unwrap_or(between));
            let ran = part.context.run(&rows, &at, output, out);
            if let Err(why) = ran {
                part.drop_behind_the_end(lane);
                return Err(EngineError::Backend(why));
            }
            part.ends[lane as usize] = step.pos0 + step.n_rows;
            if i < last {
                std::mem::swap(between, out);
            }
        }
        if step.n_rows == 1 {
            self.costs.saw(1, begun.elapsed());
        }
        Ok(())
    }

    /// Runs one row of each of these sessions, whose lanes ascend.
    pub(super) fn run_rows(&mut self, rows: &mut [Row<'_>]) {
        let lanes: Vec<u32> = rows.iter().map(|row| row.lane).collect();
        // A lane is filled behind its end: there must be room.
        let (parts, class) = (&self.parts, self.class);
        let end = |lane: u32| parts.iter().map(|part| part.ends[lane as usize]).max();
        let fills = |lane: u32| end(lane).is_some_and(|end| end < class);
        let calls = self.costs.calls(&lanes, self.lanes.len() as u32, fills);
        let mut rest = rows;
        for (first, last) in calls {
            let n = rest.partition_point(|row| row.lane <= last);
            let (of_call, later) = rest.split_at_mut(n);
            rest = later;
            let begun = Instant::now();
            if let Err(why) = self.call((first, last), of_call) {
                for row in of_call {
                    row.result = Err(why.clone());
                }
            }
            let n_rows = (last - first) as usize + 1;
            self.costs.saw(n_rows, begun.elapsed());
        }
    }

    /// One call in every group, of the lanes from `first` to `last`.
    fn call(&mut self, (first, last): (u32, u32), rows: &mut [Row<'_>]) -> Result<(), EngineError> {
        let n = (last - first) as usize + 1;
        let n_embd = rows.first().map_or(0, |row| row.hidden.len());
        let mut running = vec![None; n];
        self.hidden.clear();
        self.hidden.resize(n * n_embd, FILLER);
        for row in &*rows {
            let at = (row.lane - first) as usize;
            running[at] = Some(row.step.pos0);
            self.hidden[at * n_embd..(at + 1) * n_embd].copy_from_slice(row.hidden);
        }
        let wanted = rows.iter().any(|row| row.step.want != Want::None);
        let output = if wanted { Output::All } else { Output::None };
        for part in &mut self.parts {
            part.call(first, &running, &self.hidden, output, &mut self.out)?;
            std::mem::swap(&mut self.hidden, &mut self.out);
        }
        let width = self.hidden.len() / n;
        let ends = self.parts.last().is_some_and(|part| !part.context.leaves());
        for row in rows {
            // Where others want logits, the call gives them for every row.
            if ends && row.step.want == Want::None {
                continue;
            }
            let at = (row.lane - first) as usize;
            row.out
                .extend_from_slice(&self.hidden[at * width..(at + 1) * width]);
        }
        Ok(())
    }

    /// Drops what the session in `lane` holds from `pos` on, in every group.
    pub(super) fn rewind(&mut self, lane: u32, pos: u32) -> Result<(), EngineError> {
        let mut parts = self.parts.iter_mut();
        parts.try_for_each(|part| part.rewind(lane, pos))
    }

    /// The session in `lane` is over.
    pub(super) fn leave(&mut self, lane: u32) {
        self.lanes[lane as usize] = None;
        for part in &mut self.parts {
            part.ends[lane as usize] = 0;
            // A lane that could not be emptied is not used again: its first row would be refused.
            if part.context.truncate(lane, 0).is_ok() {
                part.context.release(lane);
            }
        }
    }
}

impl Part {
    pub(super) fn new(group: &Group, kind: Kind, context: Context) -> Part {
        Part {
            group: group.id,
            layers: group.layers.clone(),
            kind,
            context,
            ends: vec![0; kind.lanes as usize],
        }
    }

    /// A row in each lane from `first` on: of the session there, at the position given, or one that is dropped
    /// again.
    fn call(
        &mut self,
        first: u32,
        running: &[Option<u32>],
        hidden: &[f32],
        output: Output,
        out: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        let mut at = Vec::with_capacity(running.len());
        for (lane, pos) in (first..).zip(running) {
            if let Some(pos) = pos {
                self.rewind(lane, *pos)?;
            }
            at.push((lane, self.ends[lane as usize]));
        }
        let rows = llama::Rows::Hidden(hidden);
        let ran = self.context.run(&rows, &at, output, out);
        for ((lane, pos), running) in at.into_iter().zip(running) {
            if ran.is_ok() && running.is_some() {
                self.ends[lane as usize] = pos + 1;
            } else {
                self.drop_behind_the_end(lane);
            }
        }
        ran.map_err(EngineError::Backend)
    }

    /// Drops what the lane holds from `pos` on.
    fn rewind(&mut self, lane: u32, pos: u32) -> Result<(), EngineError> {
        let end = &mut self.ends[lane as usize];
        if pos < *end {
            let done = self.context.truncate(lane, pos);
            done.map_err(EngineError::Backend)?;
        }
        *end = pos;
        Ok(())
    }

    /// After a failed call nobody knows what the KV holds behind the end.
    fn drop_behind_the_end(&mut self, lane: u32) {
        let end = &mut self.ends[lane as usize];
        if self.context.truncate(lane, *end).is_err() {
            *end = 0;
        }
    }
}

/// What a context of `lanes` lanes takes while `used` of them are.
pub(super) fn pack_need(
    blueprint: &Blueprint,
    group: &Range<u32>,
    class: u32,
    used: u32,
    lanes: u32,
) -> Need {
    let used_lanes: Need = (0..used).map(|_| blueprint.lane_need(group, class)).sum();
    let empty: Need = (used..lanes)
        .map(|_| blueprint.empty_lane_need(class))
        .sum();
    let several = match lanes {
        0 | 1 => Need::default(),
        _ => blueprint.several_lanes_need(),
    };
    blueprint.base_need(group) + several + used_lanes + empty
}
