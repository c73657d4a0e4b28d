//! `shoal bench moe --grid`: whether the planner's choice between an island and a pipeline is the faster one, for a
//! grid of round trips, link bandwidths and memory bandwidths that are injected by waiting.
//!
//! ```text
//! island    trunk ─ask─▶ holders    waits for the trunk's reading, and for the holder that would be done last
//! pipeline  stage ─▶ stage ─▶ …     waits for each stage's reading, and for the way between two
//! ```
//!
//! Both run the same weights in this process, on machines with the same memory: so much that either way fits. What
//! this machine itself takes is measured once without waits and told to the planner, as a node measures its stage.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use engine::{
    Blueprint, ExpertCall, ExpertError, ExpertHolders, ExpertLayout, ExpertReply, FileSource,
    HolderId, InProcess, Input, LlamaStage, LoadOptions, Slot, Stage, Step, Want, WholeModel,
};
use serde::Serialize;
use shard_registry::experts::{
    self, Choice, ExpertId, ExpertSet, ExpertUse, Holder, Link, Machine, MixtureShape, Overheads,
    Way, Wish,
};
use swarm_proto::LayerRange;

use super::super::decode::{PROMPT, Round, best, context, plain_round};
use super::super::{sameness, say_title, share_out};
use super::Args;
use crate::terminal;

const RTTS_MS: [f64; 6] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.0];
/// A line of 100 Mbit/s and one of a Gbit/s.
const LINKS_MB_S: [f64; 2] = [12.5, 125.0];
/// How many times slower memory is than this machine's.
const SLOWER: [f64; 4] = [2.0, 4.0, 16.0, 64.0];
/// Ways that differ by less are equally fast.
const NOISE: f64 = 0.03;
/// Before the end of a wait it is waited busily: the system wakes late.
const BUSY: Duration = Duration::from_micros(150);

/// What is injected.
#[derive(Clone, Copy, Debug, Default)]
struct Injected {
    rtt_s: f64,
    /// Of a byte on a link.
    link_s: f64,
    /// Of a byte of weights, beyond what this machine takes.
    read_s: f64,
}

/// Holders that answer as if they were elsewhere and slower.
struct Slow {
    near: InProcess,
    shape: MixtureShape,
    now: Mutex<Injected>,
}

impl Slow {
    fn inject(&self, injected: Injected) {
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = injected;
    }
}

impl ExpertHolders for Slow {
    fn holder_of(&self, layer: u32, expert: u32) -> Option<HolderId> {
        self.near.holder_of(layer, expert)
    }

    fn ask(&self, calls: Vec<(HolderId, ExpertCall)>) -> Result<Vec<ExpertReply>, ExpertError> {
        let now = *self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let layer = calls.first().map_or(0, |(_, call)| call.layer as usize);
        let of = self.shape.layers.get(layer).copied().unwrap_or_default();
        let holder = |(_, call): &(HolderId, ExpertCall)| {
            let numbers = call.hidden.len() + call.rows_out() * call.n_embd as usize;
            let read = of.expert_bytes as f64 * call.groups.len() as f64;
            now.rtt_s + now.link_s * 4.0 * numbers as f64 + now.read_s * read
        };
        let last = calls.iter().map(holder).fold(0.0, f64::max);
        let replies = self.near.ask(calls)?;
        wait(last + now.read_s * of.trunk_bytes as f64);
        Ok(replies)
    }
}

fn wait(seconds: f64) {
    let due = Instant::now() + Duration::from_secs_f64(seconds.max(0.0));
    if let Some(most) = due
        .checked_duration_since(Instant::now())
        .and_then(|left| left.checked_sub(BUSY))
    {
        std::thread::sleep(most);
    }
    while Instant::now() < due {
        std::hint::spin_loop();
    }
}

/// Stages that hand rows on, each on a machine of its own.
struct Pipeline {
    stages: Vec<(LlamaStage, Slot, LayerRange)>,
    shape: MixtureShape,
}

impl Pipeline {
    fn load(
        blueprint: &Blueprint,
        source: &FileSource,
        shape: &MixtureShape,
        n_stages: u32,
        n_ctx: u32,
    ) -> anyhow::Result<Self> {
        let options = LoadOptions {
            n_threads: 1,
            ..LoadOptions::default()
        };
        let stages = share_out(blueprint.n_layer(), n_stages).into_iter();
        let stages = stages.map(|layers| {
            let of = LayerRange {
                start: u16::try_from(layers.start)?,
                end: u16::try_from(layers.end)?,
            };
            let ready = &mut |_| {};
            let mut stage = LlamaStage::load(blueprint, layers.clone(), source, &options, ready)?;
            let slot = stage.open(n_ctx, layers)?;
            Ok((stage, slot, of))
        });
        Ok(Self {
            stages: stages.collect::<anyhow::Result<_>>()?,
            shape: shape.clone(),
        })
    }

    /// Some rows through all stages; the logits of the last.
    fn feed(&mut self, pos0: u32, tokens: &[u32], now: Injected) -> anyhow::Result<Vec<f32>> {
        let (mut rows, mut out) = (Vec::new(), Vec::new());
        for (at, (stage, slot, layers)) in self.stages.iter_mut().enumerate() {
            if at > 0 {
                let bytes = self.shape.row_bytes() * tokens.len() as u64;
                wait(now.rtt_s / 2.0 + now.link_s * bytes as f64);
            }
            let step = Step {
                slot: *slot,
                layers: layers.start.into()..layers.end.into(),
                pos0,
                n_rows: tokens.len() as u32,
                want: Want::Last,
            };
            let input = match at {
                0 => Input::Tokens(tokens),
                _ => Input::Hidden(&rows),
            };
            stage.run(&step, &input, &mut out)?;
            wait(now.read_s * self.shape.span_read_bytes(*layers) as f64);
            std::mem::swap(&mut rows, &mut out);
        }
        Ok(rows)
    }

    fn round(&mut self, n: u32, now: Injected) -> anyhow::Result<Round> {
        let mut round = Round::default();
        let mut token = best(&self.feed(0, &PROMPT, Injected::default())?)?;
        for i in 0..n {
            let begun = Instant::now();
            let row = self.feed(PROMPT.len() as u32 + i, &[token], now)?;
            token = best(&row)?;
            round.add(token, begun);
        }
        Ok(round)
    }
}

/// Both ways, and what the planner knows of them.
struct Ways {
    trunk: WholeModel,
    slow: Arc<Slow>,
    pipeline: Pipeline,
    /// Who holds what.
    sets: Vec<ExpertSet>,
    /// Bytes that every machine has room for.
    memory_bytes: u64,
}

impl Ways {
    /// Means over a round's tokens in seconds, island and pipeline, and whether both chose the same tokens. Every
    /// round has the same tokens with the same picks, so of each the least of all rounds counts: what else this
    /// machine does only makes them longer.
    fn measure(&mut self, args: &Args, now: Injected) -> anyhow::Result<(f64, f64, bool)> {
        let (mut island, mut pipeline) = (Vec::new(), Vec::new());
        let mut same = true;
        self.slow.inject(now);
        for _ in 0..args.rounds {
            let a = plain_round(&mut self.trunk, args.tokens)?;
            let b = self.pipeline.round(args.tokens, now)?;
            least(&mut island, a.us());
            least(&mut pipeline, b.us());
            same &= a.tokens == b.tokens;
        }
        // What the trunk reads and nobody is asked for: the head, and dense layers.
        let shape = &self.slow.shape;
        let dense = shape.layers.iter().filter(|layer| !layer.has_experts());
        let dense: u64 = dense.map(|layer| layer.trunk_bytes).sum();
        let alone = now.read_s * (dense + shape.head_bytes) as f64;
        Ok((mean_s(&island) + alone, mean_s(&pipeline), same))
    }

    /// What the planner would take, with these figures.
    fn choose(
        &self,
        used: &ExpertUse,
        read_bytes_s: f64,
        link: Link,
        overheads: &Overheads,
    ) -> anyhow::Result<Choice> {
        let shape = &self.slow.shape;
        let machine = Machine {
            read_bytes_s,
            memory_bytes: self.memory_bytes,
        };
        let holder = |experts: &ExpertSet| Holder {
            machine,
            link,
            experts: experts.clone(),
        };
        let holders: Vec<_> = self.sets.iter().map(holder).collect();
        let stage = |(_, _, layers): &(LlamaStage, Slot, LayerRange)| experts::Stage {
            machine,
            link,
            layers: *layers,
        };
        let stages: Vec<_> = self.pipeline.stages.iter().map(stage).collect();
        let span = shape.span();
        let island = experts::island_time(shape, used, span, &machine, &holders, overheads);
        let pipeline = experts::pipeline_time(shape, span, &stages, overheads);
        experts::choose(island, pipeline, Wish::FarHolders)
            .map_err(|(island, pipeline)| anyhow::anyhow!("{island}; {pipeline}"))
    }
}

#[derive(Serialize)]
struct Report {
    model: String,
    holders: u32,
    stages: usize,
    /// Bytes of weights that each machine has room for.
    memory_bytes: u64,
    /// What this machine reads for one row, in bytes a second.
    read_bytes_s: f64,
    /// What asking costs a layer beyond reading.
    asking_us_per_layer: f64,
    tokens: u32,
    rounds: u32,
    cells: Vec<CellReport>,
    /// Of all cells those in which the planner's choice was the faster way, or both were within the noise.
    right: f64,
    /// Cells in which an island was the faster.
    islands: usize,
    same_tokens: bool,
}

#[derive(Serialize)]
struct CellReport {
    rtt_ms: f64,
    link_mb_s: f64,
    read_gb_s: f64,
    island_tokens_per_s: f64,
    pipeline_tokens_per_s: f64,
    island_planned_tokens_per_s: f64,
    pipeline_planned_tokens_per_s: f64,
    chosen: &'static str,
    right: bool,
}

fn least(all: &mut Vec<f64>, round: &[f64]) {
    all.resize(round.len(), f64::INFINITY);
    for (least, us) in all.iter_mut().zip(round) {
        *least = least.min(*us);
    }
}

fn mean_s(us: &[f64]) -> f64 {
    us.iter().sum::<f64>() / us.len().max(1) as f64 / 1e6
}

/// Whether a choice was right, by what was measured.
fn right(way: Way, island_s: f64, pipeline_s: f64) -> bool {
    let (taken, other) = match way {
        Way::Island => (island_s, pipeline_s),
        Way::Pipeline => (pipeline_s, island_s),
    };
    taken <= other * (1.0 + NOISE)
}

/// Loads both ways, measures every cell, prints.
pub(super) fn main(
    args: &Args,
    name: String,
    file: &Path,
    layout: &ExpertLayout,
    source: &FileSource,
) -> anyhow::Result<()> {
    let shape = MixtureShape::of_header(source.header())?;
    let shape = shape.ok_or_else(|| anyhow::anyhow!("{name} says no number of experts used"))?;
    let mut ways = load(args, file, layout, source, &shape)?;
    let n_cells = SLOWER.len() * LINKS_MB_S.len() * RTTS_MS.len();
    let bar = terminal::bar_of(n_cells as u64 + 1, "cells");
    let here = Here::of(&mut ways, args)?;
    bar.inc(1);
    let mut cells = Vec::with_capacity(n_cells);
    let mut same_tokens = here.same_tokens;
    for slower in SLOWER {
        for link_mb_s in LINKS_MB_S {
            for rtt_ms in RTTS_MS {
                let (cell, same) = here.cell(&mut ways, args, [slower, link_mb_s, rtt_ms])?;
                same_tokens &= same;
                cells.push(cell);
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    let n_right = cells.iter().filter(|cell| cell.right).count();
    let island = |cell: &&CellReport| cell.island_tokens_per_s > cell.pipeline_tokens_per_s;
    let report = Report {
        model: name,
        holders: args.holders,
        stages: ways.pipeline.stages.len(),
        memory_bytes: ways.memory_bytes,
        read_bytes_s: here.read_bytes_s,
        asking_us_per_layer: here.overheads.layer.as_secs_f64() * 1e6,
        tokens: args.tokens,
        rounds: args.rounds,
        right: n_right as f64 / cells.len() as f64,
        islands: cells.iter().filter(island).count(),
        cells,
        same_tokens,
    };
    match args.json {
        true => terminal::say_json(&report),
        false => print(&report),
    }
}

/// What this machine takes by itself, and what experts are picked.
struct Here {
    read_bytes_s: f64,
    overheads: Overheads,
    used: ExpertUse,
    same_tokens: bool,
}

impl Here {
    fn of(ways: &mut Ways, args: &Args) -> anyhow::Result<Self> {
        // The first one warms both up.
        ways.measure(args, Injected::default())?;
        let (island_s, pipeline_s, same_tokens) = ways.measure(args, Injected::default())?;
        let shape = &ways.slow.shape;
        let read_bytes_s = shape.span_read_bytes(shape.span()) as f64 / pipeline_s;
        let used = counted(&ways.slow.near);
        let free = Overheads {
            layer: Duration::ZERO,
            holder: Duration::ZERO,
            hop: Duration::ZERO,
        };
        let asked = ways
            .choose(&used, read_bytes_s, Link::NEAR, &free)?
            .island?;
        let asking_s = (island_s - asked.total.as_secs_f64()) / f64::from(asked.n_asked.max(1));
        Ok(Self {
            read_bytes_s,
            overheads: Overheads {
                layer: Duration::from_secs_f64(asking_s.max(0.0)),
                ..free
            },
            used,
            same_tokens,
        })
    }

    /// One cell, and whether both ways chose the same tokens in it.
    fn cell(
        &self,
        ways: &mut Ways,
        args: &Args,
        [slower, link_mb_s, rtt_ms]: [f64; 3],
    ) -> anyhow::Result<(CellReport, bool)> {
        let now = Injected {
            rtt_s: rtt_ms / 1e3,
            link_s: 1e-6 / link_mb_s,
            read_s: (slower - 1.0) / self.read_bytes_s,
        };
        let link = Link {
            rtt: Duration::from_secs_f64(now.rtt_s),
            bytes_s: link_mb_s * 1e6,
        };
        let read_bytes_s = self.read_bytes_s / slower;
        let choice = ways.choose(&self.used, read_bytes_s, link, &self.overheads)?;
        let (island_s, pipeline_s, same) = ways.measure(args, now)?;
        let cell = CellReport {
            rtt_ms,
            link_mb_s,
            read_gb_s: read_bytes_s / 1e9,
            island_tokens_per_s: 1.0 / island_s,
            pipeline_tokens_per_s: 1.0 / pipeline_s,
            island_planned_tokens_per_s: 1.0 / choice.island?.total.as_secs_f64(),
            pipeline_planned_tokens_per_s: 1.0 / choice.pipeline?.total.as_secs_f64(),
            chosen: match choice.way {
                Way::Island => "island",
                Way::Pipeline => "pipeline",
            },
            right: right(choice.way, island_s, pipeline_s),
        };
        Ok((cell, same))
    }
}

fn load(
    args: &Args,
    file: &Path,
    layout: &ExpertLayout,
    source: &FileSource,
    shape: &MixtureShape,
) -> anyhow::Result<Ways> {
    let _wheel = terminal::wheel("loading both ways");
    let experts: u64 = shape.layers.iter().map(|of| shape.experts_bytes(of)).sum();
    let each = Machine {
        read_bytes_s: 1e9,
        // One expert of a layer more than even: they are whole.
        memory_bytes: experts.div_ceil(args.holders.into())
            + shape.layers.iter().map(|of| of.expert_bytes).sum::<u64>(),
    };
    let holders = vec![each; args.holders as usize];
    let mut sets = experts::assign_experts(shape, &ExpertUse::default(), &holders)?;
    // One copy of each: what is measured is how fast they are, not how many there are.
    let mut seen = ExpertSet::new();
    for set in &mut sets {
        set.retain(|id| seen.insert(*id));
    }
    let placed = sets.clone();
    let place = move |layer: u32, expert: u32| {
        let id = ExpertId {
            layer: u16::try_from(layer).ok()?,
            expert: u16::try_from(expert).ok()?,
        };
        let at = placed.iter().position(|set| set.contains(&id))?;
        u32::try_from(at).ok()
    };
    let shared = Arc::new(layout.clone());
    let slow = Arc::new(Slow {
        near: InProcess::load(shared, source, args.holders, 1, &place)?,
        shape: shape.clone(),
        now: Mutex::default(),
    });
    let n_ctx = context(args.tokens);
    let holders: Arc<dyn ExpertHolders> = slow.clone();
    let trunk = WholeModel::load_trunk(file, n_ctx, 1, holders)?;
    let blueprint = Blueprint::new(source.header())?;
    // The same machines: the trunk's, and each holder's.
    let pipeline = Pipeline::load(&blueprint, source, shape, args.holders + 1, n_ctx)?;
    let trunks: u64 = shape.layers.iter().map(|of| of.trunk_bytes).sum();
    let of_set = |set: &ExpertSet| -> u64 {
        let layers = set.iter().map(|id| shape.layers.get(usize::from(id.layer)));
        layers.flatten().map(|of| of.expert_bytes).sum()
    };
    let of_stage = |(_, _, layers): &(LlamaStage, Slot, LayerRange)| shape.span_bytes(*layers);
    let most = sets.iter().map(of_set);
    let most = most.chain(pipeline.stages.iter().map(of_stage));
    let memory_bytes = most.chain([trunks + shape.head_bytes]).max().unwrap_or(0);
    Ok(Ways {
        trunk,
        slow,
        pipeline,
        sets,
        memory_bytes,
    })
}

/// Picks as the holders counted them.
fn counted(near: &InProcess) -> ExpertUse {
    let mut used = ExpertUse::default();
    for expert in near.used() {
        let layer = u16::try_from(expert.layer).unwrap_or(u16::MAX);
        used.0.entry(layer).or_default().push(expert.rows);
    }
    used
}

fn print(report: &Report) -> anyhow::Result<()> {
    let about = format!(
        "{} holders and a trunk, or {} stages, {:.1} MB each, {} rounds of {} tokens",
        report.holders,
        report.stages,
        report.memory_bytes as f64 / 1e6,
        report.rounds,
        report.tokens
    );
    say_title(&report.model, about)?;
    terminal::say("  round trip      link     memory         island       pipeline  chosen")?;
    for cell in &report.cells {
        terminal::say(format!(
            "  {:>7.2} ms {:>5.1} MB/s {:>5.2} GB/s {:>8.1} tok/s {:>8.1} tok/s  {:<8}{}",
            cell.rtt_ms,
            cell.link_mb_s,
            cell.read_gb_s,
            cell.island_tokens_per_s,
            cell.pipeline_tokens_per_s,
            cell.chosen,
            if cell.right { "" } else { "  the slower" }
        ))?;
    }
    terminal::say(format!(
        "  the faster was chosen in {:.1} % of {} cells; an island was it in {}; {}",
        report.right * 100.0,
        report.cells.len(),
        report.islands,
        sameness(report.same_tokens)
    ))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_within_the_noise_is_right_either_way() {
        assert!(right(Way::Island, 1.0, 2.0) && !right(Way::Pipeline, 1.0, 2.0));
        assert!(!right(Way::Island, 2.0, 1.0) && right(Way::Pipeline, 2.0, 1.0));
        for way in [Way::Island, Way::Pipeline] {
            assert!(right(way, 1.0, 1.02) && right(way, 1.02, 1.0));
        }
    }

    #[test]
    fn of_each_token_the_least_counts() {
        let mut all = Vec::new();
        least(&mut all, &[3.0, 9.0, 2.0]);
        least(&mut all, &[4.0, 1.0, 2.0]);
        assert_eq!(all, [3.0, 1.0, 2.0]);
        assert!((mean_s(&all) - 2e-6).abs() < 1e-12);
    }

    #[test]
    fn a_wait_ends_when_it_is_due() {
        let begun = Instant::now();
        wait(2e-3);
        assert!(begun.elapsed() >= Duration::from_millis(2));
        wait(-1.0);
    }
}
