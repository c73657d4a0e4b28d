//! The llama.cpp stage: a model per group of layers, contexts for its sessions.
//!
//! ```text
//! ids ─▶ embedding (ours) ─▶ layers a..c ─▶ c..e ─▶ … ─▶ ..b [─▶ head]
//!                             └ a model, and contexts with the KV of one session or of several
//! ```
//!
//! A session enters and leaves a group at any of its layers. Contexts come in
//! size classes and are kept for the next session. Sessions of the same layers and
//! class share contexts where their rows may run together ([`pack`]). Groups come
//! and go while sessions run: a context keeps its model alive.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::blueprint::Blueprint;
use crate::embedding::Embedding;
use crate::llama::{self, Context, Model, ThreadPool};
use crate::load::{LoadError, Loaded, Weights};
use crate::memory::{Need, WORK_FREE, positions_left};
use crate::source::TensorSource;
use crate::stage::{
    Bench, EngineError, Held, Input, Slot, Stage, StageShape, StageStats, Step, Want,
};
use crate::stage::{all_finite, check_step};

mod copy;
mod costs;
mod pack;
mod places;

use pack::{Pack, Row, pack_need};

/// How to load a stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Compute threads. ggml's threads wait busily: more than the free cores
    /// is many times slower than one.
    pub n_threads: u32,
    /// Longest context of a session; `None`: what the model was trained on.
    pub n_ctx_max: Option<u32>,
    /// Bytes that sessions may hold together, kept contexts included: KV, and
    /// working buffers beyond the first 16 MB.
    pub kv_bytes_max: u64,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            n_threads: crate::system::physical_cores(),
            n_ctx_max: None,
            kv_bytes_max: 1 << 30,
        }
    }
}

/// Layers of a model in llama.cpp.
pub struct LlamaStage {
    shape: StageShape,
    blueprint: Blueprint,
    options: LoadOptions,
    embedding: Option<Embedding>,
    /// In the order of their layers.
    groups: Vec<Group>,
    threads: Arc<ThreadPool>,
    sessions: BTreeMap<Slot, Session>,
    packs: BTreeMap<Bench, Pack>,
    /// Rows in one call have the same bits as one by one.
    rows_are_exact: bool,
    next_slot: u64,
    next_pack: u64,
    next_group: u64,
    /// Hidden rows between groups: written by one, read by the next.
    between: Vec<f32>,
    /// Kept up to date: asked for after every step.
    stats: StageStats,
}

/// Layers in one model, and the contexts that no session uses just now.
struct Group {
    /// Never used again.
    id: u64,
    layers: Range<u32>,
    model: Model,
    idle: BTreeMap<Kind, Vec<Context>>,
}

/// What makes a context fit a session.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    class: u32,
    lanes: u32,
    /// First layer and the one behind the last.
    layers: (u32, u32),
}

struct Session {
    n_ctx: u32,
    layers: Range<u32>,
    /// What it would take alone.
    need: Need,
    pack: Bench,
    lane: u32,
}

impl LlamaStage {
    /// A stage that holds nothing yet.
    ///
    /// # Errors
    /// The system has no threads left.
    pub fn new(blueprint: &Blueprint, options: &LoadOptions) -> Result<LlamaStage, LoadError> {
        llama::start();
        let options = LoadOptions {
            n_threads: options.n_threads.clamp(1, 512),
            ..options.clone()
        };
        let threads = ThreadPool::new(options.n_threads).map_err(LoadError::Threads)?;
        let shape = StageShape {
            n_embd: blueprint.n_embd(),
            n_vocab: blueprint.n_vocab(),
            n_layer: blueprint.n_layer(),
            n_ctx_max: options.n_ctx_max.unwrap_or(blueprint.n_ctx_train()).max(1),
        };
        let stats = StageStats {
            kv_bytes_max: options.kv_bytes_max,
            ..StageStats::default()
        };
        Ok(LlamaStage {
            shape,
            blueprint: blueprint.clone(),
            options,
            embedding: None,
            groups: Vec::new(),
            threads,
            sessions: BTreeMap::new(),
            packs: BTreeMap::new(),
            rows_are_exact: blueprint.rows_are_exact(),
            next_slot: 0,
            next_pack: 0,
            next_group: 0,
            between: Vec::new(),
            stats,
        })
    }

    /// A stage of `layers`, calling `progress` after each.
    ///
    /// # Errors
    /// As [`LlamaStage::new`] and [`Loaded::read`].
    pub fn load(
        blueprint: &Blueprint,
        layers: Range<u32>,
        source: &dyn TensorSource,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u32),
    ) -> Result<LlamaStage, LoadError> {
        let loaded = Loaded::read(blueprint, &[layers], source, progress)?;
        let mut stage = LlamaStage::new(blueprint, options)?;
        stage.take_in(loaded);
        Ok(stage)
    }

    fn take_in(&mut self, loaded: Loaded) {
        let Weights::Llama { embedding, groups } = loaded.weights else {
            return;
        };
        let meet = |a: &Range<u32>, b: &Range<u32>| a.start < b.end && b.start < a.end;
        let replaced = |old: &Group| groups.iter().any(|(new, _)| meet(&old.layers, new));
        self.groups.retain(|old| !replaced(old));
        self.embedding = embedding.or(self.embedding.take());
        for (layers, model) in groups {
            let id = self.next_group;
            self.next_group += 1;
            let idle = BTreeMap::new();
            self.groups.push(Group {
                id,
                layers,
                model,
                idle,
            });
        }
        self.groups.sort_unstable_by_key(|group| group.layers.start);
        self.count_layers();
    }

    /// The embedding goes with the last that needs it.
    fn drop_embedding(&mut self) {
        let begins = |layers: &Range<u32>| layers.start == 0;
        let needed = self.groups.iter().any(|group| begins(&group.layers))
            || self
                .sessions
                .values()
                .any(|session| begins(&session.layers));
        if !needed {
            self.embedding = None;
        }
    }

    /// Brings what is said of layers up to date.
    fn count_layers(&mut self) {
        self.drop_embedding();
        let tensors: u64 = self.groups.iter().map(|group| group.model.bytes()).sum();
        self.stats.held = Held::of(self.groups.iter().map(|group| group.layers.clone()));
        self.stats.tensor_bytes = tensors + self.embedding.as_ref().map_or(0, Embedding::bytes);
        self.count();
    }

    /// The groups that `layers` touch, with what is asked of each.
    fn parts(&self, layers: &Range<u32>) -> Vec<(usize, Range<u32>)> {
        let within = |group: &Group| {
            let start = layers.start.max(group.layers.start);
            start..layers.end.min(group.layers.end)
        };
        let groups = self.groups.iter().enumerate();
        groups
            .map(|(at, group)| (at, within(group)))
            .filter(|(_, part)| !part.is_empty())
            .collect()
    }

    /// What a context of each of these parts takes.
    fn need(&self, parts: &[(usize, Range<u32>)], class: u32) -> Need {
        parts
            .iter()
            .map(|(at, _)| self.groups[*at].need(&self.blueprint, class))
            .sum()
    }

    fn open_need(&self) -> Need {
        let packs = self.packs.values();
        packs.map(|pack| pack.need(&self.blueprint)).sum()
    }

    /// What packs of these parts with so many lanes take while so many are used.
    fn need_of_lanes(
        &self,
        parts: &[(usize, Range<u32>)],
        class: u32,
        used: u32,
        lanes: u32,
    ) -> Need {
        let groups = parts.iter().map(|(at, _)| &self.groups[*at].layers);
        groups
            .map(|group| pack_need(&self.blueprint, group, class, used, lanes))
            .sum()
    }

    fn idle_need(&self) -> Need {
        self.groups
            .iter()
            .map(|group| group.idle_need(&self.blueprint))
            .sum()
    }

    /// Brings the counters of memory up to date.
    fn count(&mut self) {
        let open = self.open_need();
        let layers = self.parts(&(0..self.shape.n_layer));
        let (none, one) = (self.need(&layers, 0), self.need(&layers, 1));
        let budget = self.options.kv_bytes_max;
        self.stats.sessions = self.sessions.len() as u32;
        self.stats.kv_bytes = open.bytes();
        self.stats.free_cells = match layers.is_empty() {
            true => 0,
            false => positions_left(budget, open, none, one),
        };
    }

    /// Frees idle contexts until `more` fits the budget.
    fn make_room(&mut self, more: Need) {
        let room = |stage: &Self| {
            let idle = stage.idle_need();
            (stage.open_need() + idle + more).counted() <= stage.options.kv_bytes_max
                && idle.work <= WORK_FREE
        };
        let mut freed = false;
        while !room(self) {
            let fullest = self.groups.iter_mut().max_by_key(|group| group.idle_len());
            if !fullest.is_some_and(Group::drop_one) {
                break;
            }
            freed = true;
        }
        if freed {
            llama::trim();
        }
    }

    /// Holds a step against its session; what it runs in.
    fn checked(&self, step: &Step, input: &Input<'_>) -> Result<(Bench, u32), EngineError> {
        let session = self.sessions.get(&step.slot);
        let session = session.ok_or(EngineError::BadSlot(step.slot))?;
        check_step(&self.shape, &session.layers, session.n_ctx, step, input)?;
        let pack = self.packs.get(&session.pack);
        let pack = pack.ok_or(EngineError::BadSlot(step.slot))?;
        pack.check_end(session.lane, step)?;
        Ok((session.pack, session.lane))
    }

    /// What enters layer 0, in `out`.
    fn look_up(&mut self, input: &Input<'_>, out: &mut Vec<f32>) -> Result<(), EngineError> {
        if let Input::Tokens(tokens) = *input {
            let none = || EngineError::Backend("no embedding loaded".into());
            let embedding = self.embedding.as_mut().ok_or_else(none)?;
            embedding.look_up(tokens, out)?;
        }
        Ok(())
    }

    fn run_alone(
        &mut self,
        step: &Step,
        input: &Input<'_>,
        out: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        let (pack, lane) = self.checked(step, input)?;
        let mut between = std::mem::take(&mut self.between);
        between.clear();
        let hidden = match *input {
            Input::Hidden(rows) => Ok(Some(rows)),
            Input::Tokens(_) => self.look_up(input, &mut between).map(|()| None),
        };
        let ran = hidden.and_then(|hidden| match self.packs.get_mut(&pack) {
            Some(pack) => pack.run(lane, step, hidden, &mut between, out),
            None => Err(EngineError::BadSlot(step.slot)),
        });
        self.between = between;
        ran?;
        self.check_finite(step, out)
    }

    /// Broken weights show here rather than at the next hop. What enters is
    /// checked where it comes from the wire, and not again.
    fn check_finite(&self, step: &Step, out: &[f32]) -> Result<(), EngineError> {
        let hidden = step.layers.end < self.shape.n_layer || step.want == Want::Normed;
        if hidden && !all_finite(out) {
            let Range { start, end } = step.layers;
            let why = format!("layers {start}..{end} gave values not finite");
            return Err(EngineError::Backend(why));
        }
        Ok(())
    }

    fn counted(&mut self, step: &Step, ran: &Result<(), EngineError>, out: &mut Vec<f32>) {
        match ran {
            Ok(()) => {
                self.stats.steps += 1;
                self.stats.rows += u64::from(step.n_rows);
            }
            Err(_) => out.clear(),
        }
    }

    /// Runs rows of sessions of one pack in as few calls as pay.
    fn run_together(
        &mut self,
        steps: &[Step],
        inputs: &[Input<'_>],
        outs: &mut [Vec<f32>],
    ) -> Vec<Result<(), EngineError>> {
        let n_embd = self.shape.n_embd as usize;
        let mut looked_up = Vec::new();
        let mut results = vec![Ok(()); steps.len()];
        // Who runs, by lane, and where the row lies that enters.
        let mut running: Vec<(u32, usize, Option<usize>)> = Vec::new();
        let mut bench = None;
        for (at, (step, input)) in steps.iter().zip(inputs).enumerate() {
            let from = looked_up.len();
            let checked = self.checked(step, input);
            let entered = checked.and_then(|place| {
                self.look_up(input, &mut looked_up)?;
                Ok(place)
            });
            match entered {
                Ok((pack, lane)) => {
                    bench = Some(pack);
                    let from = (looked_up.len() > from).then_some(from);
                    running.push((lane, at, from));
                }
                Err(why) => results[at] = Err(why),
            }
        }
        running.sort_unstable_by_key(|(lane, _, _)| *lane);
        let mut free: Vec<Option<&mut Vec<f32>>> = outs.iter_mut().map(Some).collect();
        let rows = running.iter().filter_map(|(lane, at, from)| {
            let hidden = match (inputs[*at], from) {
                (Input::Hidden(rows), _) => rows,
                (Input::Tokens(_), Some(from)) => looked_up.get(*from..from + n_embd)?,
                (Input::Tokens(_), None) => return None,
            };
            Some(Row {
                lane: *lane,
                step: &steps[*at],
                hidden,
                out: free.get_mut(*at)?.take()?,
                result: Ok(()),
            })
        });
        let mut rows: Vec<Row<'_>> = rows.collect();
        if let Some(pack) = bench.and_then(|bench| self.packs.get_mut(&bench)) {
            pack.run_rows(&mut rows);
        }
        let ran: Vec<_> = rows.into_iter().map(|row| row.result).collect();
        for ((_, at, _), ran) in running.iter().zip(ran) {
            results[*at] = ran.and_then(|()| self.check_finite(&steps[*at], &outs[*at]));
        }
        for ((step, ran), out) in steps.iter().zip(&results).zip(outs) {
            self.counted(step, ran, out);
        }
        results
    }
}

impl Kind {
    /// What a context takes that nobody uses: one that has several lanes has given theirs back.
    fn idle_need(self, blueprint: &Blueprint, group: &Range<u32>) -> Need {
        let used = if self.lanes > 1 { 0 } else { 1 };
        pack_need(blueprint, group, self.class, used, self.lanes)
    }
}

impl Group {
    fn need(&self, blueprint: &Blueprint, class: u32) -> Need {
        blueprint.context_need(&self.layers, class)
    }

    fn idle_len(&self) -> usize {
        self.idle.values().map(Vec::len).sum()
    }

    fn idle_need(&self, blueprint: &Blueprint) -> Need {
        let kinds = self.idle.iter();
        kinds
            .flat_map(|(kind, idle)| idle.iter().map(|_| kind.idle_need(blueprint, &self.layers)))
            .sum()
    }

    fn take(&mut self, kind: Kind) -> Option<Context> {
        let of_kind = self.idle.get_mut(&kind)?;
        let context = of_kind.pop();
        if of_kind.is_empty() {
            self.idle.remove(&kind);
        }
        context
    }

    /// Drops an idle context; whether there was one.
    fn drop_one(&mut self) -> bool {
        let kind = self.idle.keys().next().copied();
        kind.is_some_and(|kind| self.take(kind).is_some())
    }
}

impl Stage for LlamaStage {
    fn shape(&self) -> StageShape {
        self.shape.clone()
    }

    fn open(&mut self, n_ctx: u32, layers: Range<u32>) -> Result<Slot, EngineError> {
        self.open_in(n_ctx, layers, false)
    }

    fn open_beside(
        &mut self,
        n_ctx: u32,
        layers: Range<u32>,
        fast: bool,
    ) -> Result<Slot, EngineError> {
        self.open_in(n_ctx, layers, fast || self.rows_are_exact)
    }

    fn bench(&self, slot: Slot) -> Option<Bench> {
        let id = self.sessions.get(&slot)?.pack;
        self.packs.get(&id)?.open.then_some(id)
    }

    fn worth_waiting(&self, bench: Bench, rows: u32) -> Option<Duration> {
        let pack = self.packs.get(&bench)?;
        let (together, one) = (pack.cost(rows as usize), pack.cost(1));
        let worth = rows > 1 && together > 0.0 && together <= one * rows as f32 / 2.0;
        worth.then(|| Duration::from_secs_f32(together.min(1.0)))
    }

    fn copy(&mut self, from: Slot, to: Slot, n: u32) -> Result<u32, EngineError> {
        self.copy_session(from, to, n)
    }

    fn close(&mut self, slot: Slot) {
        let Some(session) = self.sessions.remove(&slot) else {
            return;
        };
        if let Some(pack) = self.packs.get_mut(&session.pack) {
            pack.leave(session.lane);
            if pack.used() == 0
                && let Some(pack) = self.packs.remove(&session.pack)
            {
                self.keep(pack);
            }
        }
        self.make_room(Need::default());
        self.count_layers();
    }

    fn run(
        &mut self,
        step: &Step,
        input: &Input<'_>,
        out: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        out.clear();
        let ran = self.run_alone(step, input, out);
        self.counted(step, &ran, out);
        ran
    }

    fn run_rows(
        &mut self,
        steps: &[Step],
        inputs: &[Input<'_>],
        outs: &mut [Vec<f32>],
    ) -> Vec<Result<(), EngineError>> {
        let mut benches = steps.iter().map(|step| self.bench(step.slot));
        let first = benches.next().flatten();
        let together = first.is_some() && benches.all(|bench| bench == first);
        let twice = |(at, step): (usize, &Step)| steps[..at].iter().any(|s| s.slot == step.slot);
        let alone = |step: &Step| step.n_rows == 1 && step.want != Want::Normed;
        let single = steps.iter().all(alone) && !steps.iter().enumerate().any(twice);
        outs.iter_mut().for_each(Vec::clear);
        if together && single && steps.len() > 1 {
            return self.run_together(steps, inputs, outs);
        }
        let each = steps.iter().zip(inputs).zip(outs);
        each.map(|((step, input), out)| self.run(step, input, out))
            .collect()
    }

    fn add(&mut self, loaded: Loaded) -> Result<(), EngineError> {
        if let Weights::None = loaded.weights {
            return Err(EngineError::Backend("layers without weights".into()));
        }
        self.take_in(loaded);
        Ok(())
    }

    fn remove(&mut self, layers: &Range<u32>) {
        let within =
            |group: &Group| layers.start <= group.layers.start && group.layers.end <= layers.end;
        self.groups.retain(|group| !within(group));
        self.count_layers();
        llama::trim();
    }

    fn limit(&mut self, kv_bytes_max: u64) {
        self.options.kv_bytes_max = kv_bytes_max;
        self.stats.kv_bytes_max = kv_bytes_max;
        self.make_room(Need::default());
        self.count();
    }

    fn stats(&self) -> StageStats {
        self.stats.clone()
    }
}
