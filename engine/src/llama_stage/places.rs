//! Where a session of a stage lies: a lane beside others, or contexts of its own.

use std::ops::Range;

use super::pack::{Pack, Part};
use super::{Group, Kind, LlamaStage, Session};
use crate::PREFILL_CHUNK;
use crate::llama::{Context, ContextOptions, LANES_MAX};
use crate::memory::Need;
use crate::stage::{Bench, EngineError, Slot, check_layers};

/// Bytes of keys and values that are made, and given back, as a pack is opened: a quarter of a second's work.
const AT_ONCE_MAX: u64 = 1 << 30;

impl LlamaStage {
    /// Where a session of these layers may join others: the fullest pack with a lane left.
    fn joined(
        &self,
        parts: &[(usize, Range<u32>)],
        layers: &Range<u32>,
        class: u32,
    ) -> Option<Bench> {
        let groups = || parts.iter().map(|(at, _)| self.groups[*at].id);
        let fits = |pack: &Pack| {
            let held = pack.parts.iter().map(|part| part.group);
            pack.open
                && pack.free_lane().is_some()
                && (&pack.layers, pack.class) == (layers, class)
                && held.eq(groups())
        };
        let packs = self.packs.iter().filter(|(_, pack)| fits(pack));
        let fullest = packs.max_by_key(|(id, pack)| (pack.used(), std::cmp::Reverse(**id)));
        fullest.map(|(id, _)| *id)
    }

    /// Whether `more` fits beside the sessions that are open.
    fn fits(&self, more: Need) -> bool {
        (self.open_need() + more).counted() <= self.options.kv_bytes_max
    }

    fn full(&self, needed: Need) -> EngineError {
        let largest = self.sessions.values().map(|s| s.need.bytes()).max();
        EngineError::Full {
            needed: needed.bytes(),
            used: self.open_need().bytes(),
            budget: self.options.kv_bytes_max,
            sessions: self.sessions.len() as u32,
            largest: largest.unwrap_or(0),
        }
    }

    /// Keeps the contexts of a pack that nobody uses.
    pub(super) fn keep(&mut self, pack: Pack) {
        for part in pack.parts {
            let group = self.groups.iter_mut().find(|group| group.id == part.group);
            if let Some(group) = group {
                group.idle.entry(part.kind).or_default().push(part.context);
            }
        }
    }

    /// A lane for a session, in a pack that others may join where it is `open`.
    fn place(
        &mut self,
        parts: Vec<(usize, Range<u32>)>,
        layers: &Range<u32>,
        class: u32,
        open: bool,
    ) -> Result<(Bench, u32), EngineError> {
        if open
            && let Some(id) = self.joined(&parts, layers, class)
            && let Some(pack) = self.packs.get(&id)
            && let Some(lane) = pack.free_lane()
        {
            let (used, all) = (pack.used(), pack.lanes.len() as u32);
            let more = self.need_of_lanes(&parts, class, used + 1, all)
                - self.need_of_lanes(&parts, class, used, all);
            if !self.fits(more) {
                return Err(self.full(more));
            }
            self.make_room(more);
            return Ok((id, lane));
        }
        let alone = self.need(&parts, class);
        if !self.fits(alone) {
            return Err(self.full(alone));
        }
        // llama.cpp touches all lanes as it makes them, so all must fit for a moment, which must not be long.
        let lanes = if open { LANES_MAX } else { 1 };
        let at_once = |lanes: &u32| {
            let all = self.need_of_lanes(&parts, class, *lanes, *lanes);
            all.kv <= AT_ONCE_MAX && self.fits(all)
        };
        let lanes = (1..=lanes).rev().find(at_once).unwrap_or(1);
        let need = self.need_of_lanes(&parts, class, lanes, lanes);
        let kinds: Vec<(usize, Kind)> = parts
            .into_iter()
            .map(|(group, part)| {
                let layers = (part.start, part.end);
                let kind = Kind {
                    class,
                    lanes,
                    layers,
                };
                (group, kind)
            })
            .collect();
        // Those first, so that making room does not free them.
        let kept: Vec<Option<Context>> = kinds
            .iter()
            .map(|(group, kind)| self.groups[*group].take(*kind))
            .collect();
        self.make_room(need);
        let parts = kinds
            .into_iter()
            .zip(kept)
            .map(|((group, kind), kept)| self.part(group, kind, kept))
            .collect::<Result<_, _>>()?;
        let id = Bench(self.next_pack);
        self.next_pack += 1;
        let pack = Pack::new(layers.clone(), class, open, lanes, parts);
        self.packs.insert(id, pack);
        Ok((id, 0))
    }

    fn part(&self, group: usize, kind: Kind, kept: Option<Context>) -> Result<Part, EngineError> {
        let group = &self.groups[group];
        let context = match kept {
            Some(mut context) => {
                let emptied = (0..kind.lanes).try_for_each(|lane| context.truncate(lane, 0));
                emptied.map(|()| context)
            }
            None => self.context(group, kind),
        };
        let context = context.map_err(EngineError::Backend)?;
        Ok(Part::new(group, kind, context))
    }

    fn context(&self, group: &Group, kind: Kind) -> Result<Context, String> {
        let (start, end) = kind.layers;
        let first = group.layers.start;
        let head = end == self.shape.n_layer;
        let options = ContextOptions {
            n_ctx: kind.class,
            lanes: kind.lanes,
            n_batch: PREFILL_CHUNK,
            n_threads: self.options.n_threads,
            enter: start - first,
            leave: (!head).then(|| end - 1 - first),
        };
        Context::new(&group.model, &options, &self.threads)
    }

    pub(super) fn open_in(
        &mut self,
        n_ctx: u32,
        layers: Range<u32>,
        open: bool,
    ) -> Result<Slot, EngineError> {
        check_layers(&layers, &self.stats.held)?;
        if n_ctx == 0 || n_ctx > self.shape.n_ctx_max {
            return Err(EngineError::ContextLength {
                n_ctx,
                max: self.shape.n_ctx_max,
            });
        }
        let class = self.blueprint.context_class(n_ctx);
        let parts = self.parts(&layers);
        let need = self.need(&parts, class);
        let (pack, lane) = self.place(parts, &layers, class, open)?;
        let slot = Slot(self.next_slot);
        self.next_slot += 1;
        if let Some(taken) = self.packs.get_mut(&pack) {
            taken.lanes[lane as usize] = Some(slot);
        }
        let session = Session {
            n_ctx,
            layers,
            need,
            pack,
            lane,
        };
        self.sessions.insert(slot, session);
        self.count();
        Ok(slot)
    }
}
