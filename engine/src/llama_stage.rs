//! The llama.cpp stage: a model per group of layers, a context per group and session.
//!
//! ```text
//! ids ─▶ embedding (ours) ─▶ layers a..c ─▶ c..e ─▶ … ─▶ ..b [─▶ head]
//!                             └ a model, and per session a context with its KV
//! ```
//!
//! A session enters and leaves a group at any of its layers. Contexts come in
//! size classes and are kept for the next session. Groups come and go while
//! sessions run: a context keeps its model alive.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::PREFILL_CHUNK;
use crate::blueprint::Blueprint;
use crate::embedding::Embedding;
use crate::llama::{self, Context, ContextOptions, Model, Output, ThreadPool};
use crate::load::{LoadError, Loaded, Weights};
use crate::memory::{Need, WORK_FREE, positions_left};
use crate::source::TensorSource;
use crate::stage::{EngineError, Held, Input, Slot, Stage, StageShape, StageStats, Step, Want};
use crate::stage::{all_finite, check_end, check_layers, check_step};

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
    next_slot: u64,
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
    /// First layer and the one behind the last.
    layers: (u32, u32),
}

struct Session {
    n_ctx: u32,
    layers: Range<u32>,
    need: Need,
    parts: Vec<Part>,
}

/// A session in one group.
struct Part {
    /// The id of the stage's, which may be gone.
    group: u64,
    kind: Kind,
    context: Context,
    /// Positions held.
    end: u32,
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
            next_slot: 0,
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
        self.sessions.values().map(|session| session.need).sum()
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

    fn part(&self, group: usize, kind: Kind, kept: Option<Context>) -> Result<Part, EngineError> {
        let group = &self.groups[group];
        let context = match kept {
            Some(mut context) => context.truncate(0).map(|()| context),
            None => self.context(group, kind),
        };
        Ok(Part {
            group: group.id,
            kind,
            context: context.map_err(EngineError::Backend)?,
            end: 0,
        })
    }

    fn context(&self, group: &Group, kind: Kind) -> Result<Context, String> {
        let (start, end) = kind.layers;
        let first = group.layers.start;
        let head = end == self.shape.n_layer;
        let options = ContextOptions {
            n_ctx: kind.class,
            n_batch: PREFILL_CHUNK,
            n_threads: self.options.n_threads,
            enter: start - first,
            leave: (!head).then(|| end - 1 - first),
        };
        Context::new(&group.model, &options, &self.threads)
    }
}

impl Session {
    fn run(
        &mut self,
        shape: &StageShape,
        embedding: Option<&mut Embedding>,
        between: &mut Vec<f32>,
        step: &Step,
        input: &Input<'_>,
        out: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        check_step(shape, &self.layers, self.n_ctx, step, input)?;
        for part in &self.parts {
            check_end(step, part.kind.layers.0, part.end)?;
        }
        let mut rows = match *input {
            Input::Hidden(rows) => Some(rows),
            Input::Tokens(tokens) => {
                let none = || EngineError::Backend("no embedding loaded".into());
                between.clear();
                embedding.ok_or_else(none)?.look_up(tokens, between)?;
                None
            }
        };
        let last = self.parts.len() - 1;
        for (at, part) in self.parts.iter_mut().enumerate() {
            part.run(rows.take().unwrap_or(between), step, out)?;
            if at < last {
                std::mem::swap(between, out);
            }
        }
        // Broken weights show here rather than at the next hop. What enters is
        // checked where it comes from the wire, and not again.
        let hidden = step.layers.end < shape.n_layer || step.want == Want::Normed;
        if hidden && !all_finite(out) {
            let Range { start, end } = step.layers;
            let why = format!("layers {start}..{end} gave values not finite");
            return Err(EngineError::Backend(why));
        }
        Ok(())
    }
}

impl Part {
    fn run(&mut self, hidden: &[f32], step: &Step, out: &mut Vec<f32>) -> Result<(), EngineError> {
        if step.pos0 < self.end {
            self.context
                .truncate(step.pos0)
                .map_err(EngineError::Backend)?;
        }
        self.end = step.pos0;
        let rows = llama::Rows::Hidden(hidden);
        let output = match step.want {
            Want::None => Output::None,
            Want::Last => Output::Last,
            Want::All => Output::All,
            Want::Normed => Output::Normed,
        };
        self.context
            .run(&rows, step.n_rows as usize, step.pos0, output, out)
            .map_err(|why| self.repair(why))?;
        self.end = step.pos0 + step.n_rows;
        Ok(())
    }

    /// After a failed call nobody knows what the KV holds behind `end`.
    fn repair(&mut self, why: String) -> EngineError {
        if self.context.truncate(self.end).is_err() {
            self.end = 0;
        }
        EngineError::Backend(why)
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
            .flat_map(|(kind, idle)| idle.iter().map(|_| self.need(blueprint, kind.class)))
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
        check_layers(&layers, &self.stats.held)?;
        if n_ctx == 0 || n_ctx > self.shape.n_ctx_max {
            return Err(EngineError::ContextLength {
                n_ctx,
                max: self.shape.n_ctx_max,
            });
        }
        let class = self.blueprint.context_class(n_ctx);
        let parts = self.parts(&layers);
        let (open, need) = (self.open_need(), self.need(&parts, class));
        if (open + need).counted() > self.options.kv_bytes_max {
            let largest = self.sessions.values().map(|s| s.need.bytes()).max();
            return Err(EngineError::Full {
                needed: need.bytes(),
                used: open.bytes(),
                budget: self.options.kv_bytes_max,
                sessions: self.sessions.len() as u32,
                largest: largest.unwrap_or(0),
            });
        }
        let kinds: Vec<(usize, Kind)> = parts
            .into_iter()
            .map(|(group, part)| {
                let layers = (part.start, part.end);
                (group, Kind { class, layers })
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
        let slot = Slot(self.next_slot);
        self.next_slot += 1;
        let session = Session {
            n_ctx,
            layers,
            need,
            parts,
        };
        self.sessions.insert(slot, session);
        self.count();
        Ok(slot)
    }

    fn close(&mut self, slot: Slot) {
        let Some(session) = self.sessions.remove(&slot) else {
            return;
        };
        for part in session.parts {
            let group = self.groups.iter_mut().find(|group| group.id == part.group);
            if let Some(group) = group {
                let idle = &mut group.idle;
                idle.entry(part.kind).or_default().push(part.context);
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
        let session = self.sessions.get_mut(&step.slot);
        let session = session.ok_or(EngineError::BadSlot(step.slot))?;
        let (embedding, between) = (self.embedding.as_mut(), &mut self.between);
        let result = session.run(&self.shape, embedding, between, step, input, out);
        match &result {
            Ok(()) => {
                self.stats.steps += 1;
                self.stats.rows += u64::from(step.n_rows);
            }
            Err(_) => out.clear(),
        }
        result
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
