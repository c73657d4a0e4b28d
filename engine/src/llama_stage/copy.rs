//! A session's beginning into another one: keys and values go from lane to lane, group by group.

use super::LlamaStage;
use super::pack::{Pack, Part};
use crate::stage::{Bench, EngineError, Slot};

/// A lane of a pack.
type Place = (Bench, u32);

impl LlamaStage {
    /// See [`crate::Stage::copy`]. A lane is copied whole, and then cut: what does not fit the other's size class is
    /// not copied, so that a long session is not moved for a short beginning.
    pub(super) fn copy_session(
        &mut self,
        from: Slot,
        to: Slot,
        n: u32,
    ) -> Result<u32, EngineError> {
        let source = self.sessions.get(&from).ok_or(EngineError::BadSlot(from))?;
        let target = self.sessions.get(&to).ok_or(EngineError::BadSlot(to))?;
        let n = n.min(target.n_ctx);
        let (from, to) = ((source.pack, source.lane), (target.pack, target.lane));
        let Some(end) = self.copyable(from, to).filter(|end| n > 0 && *end > 0) else {
            return Ok(0);
        };
        for part in 0..self.packs.get(&from.0).map_or(0, |pack| pack.parts.len()) {
            let copied = self.copy_part(part, from, to);
            if copied != Ok(true) {
                self.empty(to);
                copied.map_err(EngineError::Backend)?;
                return Ok(0);
            }
        }
        let n = n.min(end);
        if let Some(pack) = self.packs.get_mut(&to.0) {
            pack.rewind(to.1, n)?;
        }
        Ok(n)
    }

    /// Positions that all groups hold, if the lane `to` can take them.
    fn copyable(&self, (from, from_lane): Place, (to, to_lane): Place) -> Option<u32> {
        let (source, target) = (self.packs.get(&from)?, self.packs.get(&to)?);
        let ends = |pack: &Pack, lane: u32| -> Vec<u32> {
            let ends = pack.parts.iter();
            ends.map(|part| part.ends[lane as usize]).collect()
        };
        let same = |(a, b): (&Part, &Part)| {
            (a.group, a.kind.layers) == (b.group, b.kind.layers)
                && a.context.lanes() == b.context.lanes()
        };
        let parts = source.parts.len() == target.parts.len()
            && source.parts.iter().zip(&target.parts).all(same);
        let class = source.class == target.class || !self.blueprint.rope_by_context();
        let empty = ends(target, to_lane).iter().all(|end| *end == 0);
        let ends = ends(source, from_lane);
        let fits = ends.iter().all(|end| *end <= target.class);
        let can = parts && class && empty && fits && (from, from_lane) != (to, to_lane);
        ends.into_iter().min().filter(|_| can)
    }

    fn copy_part(&mut self, part: usize, from: Place, to: Place) -> Result<bool, String> {
        let source = self.packs.get_mut(&from.0);
        let Some(source) = source.and_then(|pack| pack.parts.get_mut(part)) else {
            return Ok(false);
        };
        let end = source.ends[from.1 as usize];
        let state = source.context.state(from.1)?;
        let target = self.packs.get_mut(&to.0);
        let Some(target) = target.and_then(|pack| pack.parts.get_mut(part)) else {
            return Ok(false);
        };
        let whole = target.context.put_state(to.1, &state, end)?;
        target.ends[to.1 as usize] = if whole { end } else { 0 };
        Ok(whole)
    }

    /// What was copied in vain.
    fn empty(&mut self, (pack, lane): Place) {
        if let Some(pack) = self.packs.get_mut(&pack) {
            // A lane that cannot be emptied refuses its first row.
            let _ = pack.rewind(lane, 0);
        }
    }
}
