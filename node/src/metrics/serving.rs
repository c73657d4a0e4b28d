//! What a node serves: read from its parts when somebody asks, as `shoal node status` reads them.

use std::fmt;

use engine::StageStats;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use super::Reading;
use crate::hosting::{Model, Serving};
use crate::session::Sessions;
use crate::transfer::Transfer;

/// The parts of a node that are there by now.
pub(crate) struct Facts {
    pub(crate) paused: bool,
    pub(crate) transfer: Option<Transfer>,
    pub(crate) sessions: Option<Sessions>,
    pub(crate) models: Vec<Model>,
}

/// A node.
pub(crate) struct ServingMetrics(Box<Look>);

type Look = dyn Fn() -> Option<Facts> + Send + Sync;

impl ServingMetrics {
    /// One whose parts `facts` gives while it runs; it must not block for long.
    pub(crate) fn new(facts: impl Fn() -> Option<Facts> + Send + Sync + 'static) -> Self {
        Self(Box::new(facts))
    }
}

impl fmt::Debug for ServingMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServingMetrics")
    }
}

impl Collector for ServingMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut to = Reading(encoder);
        let Some(facts) = (self.0)() else {
            return Ok(());
        };
        let help = "1 while the node's owner, or the hour, lets it take no sessions";
        to.gauge("shoal_node_paused", help, u32::from(facts.paused))?;
        if let Some(sessions) = &facts.sessions {
            of_sessions(&mut to, sessions)?;
        }
        if let Some(transfer) = &facts.transfer {
            of_transfer(&mut to, transfer)?;
        }
        of_stages(&mut to, &facts.models)?;
        of_experts(&mut to, &facts.models)
    }
}

fn of_sessions(to: &mut Reading<'_>, sessions: &Sessions) -> fmt::Result {
    let held = sessions.holdings();
    let help = "Sessions that are open or being opened";
    to.gauge("shoal_sessions_open", help, held.sessions)?;
    let help = "Open sessions that their clients can open again";
    to.gauge("shoal_sessions_held", help, held.held)?;
    let help = "Halves of sessions that wait for the other half";
    to.gauge("shoal_sessions_pairing", help, held.pairing)?;
    let help = "Bytes of frames that are kept to feed a replacement of the hop below";
    let retained = [
        ([("place", "memory")], held.retained_memory),
        ([("place", "disk")], held.retained_disk),
    ];
    to.gauges("shoal_retained_bytes", help, retained)
}

fn of_transfer(to: &mut Reading<'_>, transfer: &Transfer) -> fmt::Result {
    let counts = transfer.counts();
    let fetched: u64 = counts.iter().map(|(_, _, count)| count.fetched_bytes).sum();
    let fetches: u64 = counts
        .iter()
        .map(|(_, _, count)| u64::from(count.fetches))
        .sum();
    let bytes = [
        ([("direction", "in")], fetched),
        ([("direction", "out")], transfer.given_bytes()),
    ];
    let help = "Bytes of shards from and to peers, hashes included";
    to.counters("shoal_transfer_bytes", help, bytes)?;
    to.counter(
        "shoal_transfer_shards",
        "Shards that were fetched whole",
        fetches,
    )
}

/// A model's stage, as it is now.
struct Stage {
    labels: [(&'static str, String); 1],
    stats: StageStats,
    queued: usize,
    layer_tokens_s: f64,
}

impl Stage {
    /// None where the node holds experts only.
    fn of(model: &Model) -> Option<Self> {
        let Serving { worker, speed, .. } = model.serving.as_ref()?;
        Some(Self {
            labels: [("model", model.id.short())],
            stats: worker.stats(),
            queued: worker.queued(),
            layer_tokens_s: speed.get().map_or(0.0, |speed| f64::from(speed.value)),
        })
    }

    fn layers(&self) -> u32 {
        let spans = self.stats.held.spans().iter();
        spans.map(|span| span.end - span.start).sum()
    }
}

/// What a metric is called, what it is, and its value for a stage.
type Named<T> = (&'static str, &'static str, fn(&Stage) -> T);

/// Experts that are computed here, and calls that this node's trunks have others answer.
fn of_experts(to: &mut Reading<'_>, models: &[Model]) -> fmt::Result {
    let held = models.iter().filter_map(|model| {
        let worker = model.experts.as_ref()?.worker.as_ref()?;
        Some(([("model", model.id.short())], worker.stats()))
    });
    let held: Vec<_> = held.collect();
    let help = "Experts that are computed here for trunks";
    let experts = held
        .iter()
        .map(|(labels, it)| (labels.clone(), f64::from(it.experts)));
    to.gauges("shoal_experts_held", help, experts)?;
    let help = "Bytes of their weights in memory";
    let bytes = held
        .iter()
        .map(|(labels, it)| (labels.clone(), it.tensor_bytes as f64));
    to.gauges("shoal_experts_weights_bytes", help, bytes)?;
    let help = "Calls of trunks that were answered";
    let calls = held.iter().map(|(labels, it)| (labels.clone(), it.calls));
    to.counters("shoal_experts_calls", help, calls)?;
    let help = "Rows that went through experts, once for each";
    let rows = held.iter().map(|(labels, it)| (labels.clone(), it.rows));
    to.counters("shoal_experts_rows", help, rows)?;
    let islands = models.iter().filter_map(|model| {
        let island = model.serving.as_ref()?.island.as_ref()?;
        Some((
            [("model", model.id.short())],
            island.stats(),
            island.missing().len(),
        ))
    });
    let islands: Vec<_> = islands.collect();
    let help = "Experts of this node's layers that nobody computes now";
    let missing = islands
        .iter()
        .map(|(labels, _, missing)| (labels.clone(), *missing as f64));
    to.gauges("shoal_island_missing_experts", help, missing)?;
    let help = "Peers that compute experts for this node's layers";
    let peers = islands
        .iter()
        .map(|(labels, it, _)| (labels.clone(), it.len() as f64));
    to.gauges("shoal_island_holders", help, peers)?;
    let sum = |of: fn(&crate::experts::HolderView) -> u64| {
        islands
            .iter()
            .map(move |(labels, it, _)| (labels.clone(), it.iter().map(of).sum::<u64>()))
    };
    let help = "Calls for experts that others answered";
    to.counters("shoal_island_calls", help, sum(|it| it.calls))?;
    let help = "Calls that another holder was asked, too, because the first was late";
    to.counters("shoal_island_hedges", help, sum(|it| it.hedges))?;
    let help = "Times that a holder was lost";
    to.counters("shoal_island_losses", help, sum(|it| it.losses))
}

fn of_stages(to: &mut Reading<'_>, models: &[Model]) -> fmt::Result {
    let stages: Vec<Stage> = models.iter().filter_map(Stage::of).collect();
    let gauges: [Named<f64>; 7] = [
        ("shoal_stage_layers", "Layers that are loaded", |it| {
            it.layers().into()
        }),
        (
            "shoal_stage_weights_bytes",
            "Bytes of weights in memory",
            |it| it.stats.tensor_bytes as f64,
        ),
        ("shoal_stage_sessions", "Sessions that hold KV", |it| {
            it.stats.sessions.into()
        }),
        ("shoal_stage_kv_bytes", "Bytes that sessions hold", |it| {
            it.stats.kv_bytes as f64
        }),
        (
            "shoal_stage_kv_limit_bytes",
            "Bytes that sessions may hold",
            |it| it.stats.kv_bytes_max as f64,
        ),
        (
            "shoal_stage_queue_length",
            "Frames that wait for the stage",
            |it| it.queued as f64,
        ),
        (
            "shoal_stage_layer_tokens_per_second",
            "Rows a second through one layer, as measured; 0 before that",
            |it| it.layer_tokens_s,
        ),
    ];
    for (name, help, value) in gauges {
        to.gauges(
            name,
            help,
            stages.iter().map(|it| (it.labels.clone(), value(it))),
        )?;
    }
    let counters: [Named<u64>; 2] = [
        (
            "shoal_stage_steps",
            "Steps of the stage that ended well",
            |it| it.stats.steps,
        ),
        ("shoal_stage_rows", "Rows in those steps", |it| {
            it.stats.rows
        }),
    ];
    for (name, help, value) in counters {
        to.counters(
            name,
            help,
            stages.iter().map(|it| (it.labels.clone(), value(it))),
        )?;
    }
    Ok(())
}
