//! What one row of a span takes, either way.
//!
//! ```text
//! island    Σ layers: trunk / memory bandwidth + max over holders (RTT + bytes / bandwidth + n · expert / memory bandwidth)
//! pipeline  Σ layers: (trunk + k · expert) / memory bandwidth,  and from stage to stage RTT / 2 + row / bandwidth
//! ```
//!
//! The way from the client and back to it is the same for both and in neither.

use std::{fmt, time::Duration};

use swarm_proto::{LayerRange, Peer};

use super::{
    assign::{ExpertId, ExpertSet},
    draws::Draws,
    shape::{ExpertUse, LayerShape, MixtureShape},
};

/// What a machine computes with. For one row a layer takes as long as reading its weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Machine {
    /// Bytes of weights that it reads in a second, as measured with its own stage.
    pub read_bytes_s: f64,
    /// Bytes of weights that it has room for.
    pub memory_bytes: u64,
}

/// The way between two machines.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// Round trip.
    pub rtt: Duration,
    /// Bytes a second, each way.
    pub bytes_s: f64,
}

/// Somebody who holds experts.
#[derive(Debug, Clone, PartialEq)]
pub struct Holder {
    /// What it computes with.
    pub machine: Machine,
    /// From the trunk; [`Link::NONE`] for the trunk's own experts.
    pub link: Link,
    /// What it holds.
    pub experts: ExpertSet,
}

/// A machine of a pipeline.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stage {
    /// What it computes with.
    pub machine: Machine,
    /// From the stage before; of the first it does not count.
    pub link: Link,
    /// What it computes.
    pub layers: LayerRange,
}

/// What asking and handing over cost beside network and compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overheads {
    /// Two more splits of the graph, grouping, putting rows back: of each layer with experts.
    pub layer: Duration,
    /// A call to one more holder.
    pub holder: Duration,
    /// A hop from one stage to the next.
    pub hop: Duration,
}

impl Default for Overheads {
    /// As measured in process (docs/decisions/0142) and as the route planner counts a hop.
    fn default() -> Overheads {
        Overheads {
            layer: Duration::from_micros(28),
            holder: Duration::from_micros(10),
            hop: Duration::from_micros(80),
        }
    }
}

/// What an island takes for one row.
#[derive(Debug, Clone, PartialEq)]
pub struct IslandTime {
    /// All of it.
    pub total: Duration,
    /// Attention, router, shared experts and the head.
    pub trunk: Duration,
    /// Waiting for the slowest holder of each layer, were they all in this machine.
    pub experts: Duration,
    /// What that waits longer because they are not.
    pub network: Duration,
    /// Asking.
    pub overhead: Duration,
    /// Layers with experts: so many round trips.
    pub n_asked: u16,
    /// Picks that the holder with the most gets, on average; of how many a row has.
    pub picks: (f64, u16),
    /// The longest round trip to a holder.
    pub rtt_max: Duration,
    /// Holders that are asked for something.
    pub n_holders: u16,
    /// Of each layer with experts what it takes, trunk included.
    pub layers: Vec<LayerTime>,
}

/// One layer of an island.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerTime {
    /// Which.
    pub layer: u16,
    /// What it takes.
    pub total: Duration,
}

/// What a pipeline takes for one row.
#[derive(Debug, Clone, PartialEq)]
pub struct PipelineTime {
    /// All of it.
    pub total: Duration,
    /// Its stages in order.
    pub stages: Vec<StageTime>,
}

/// One stage of a pipeline.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StageTime {
    /// What it computes.
    pub layers: LayerRange,
    /// How long.
    pub compute: Duration,
    /// Being handed the row.
    pub network: Duration,
}

/// Why a way is none.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Unfit {
    /// Nobody has an expert.
    #[error("nobody holds expert {expert} of layer {layer}")]
    NotHeld {
        /// Of which layer.
        layer: u16,
        /// Which.
        expert: u16,
    },
    /// A machine would need more memory than it has.
    #[error("{who} needs {needs} bytes of memory and has {has}")]
    Memory {
        /// The trunk, a holder or a stage.
        who: String,
        /// What it should hold.
        needs: u64,
        /// What it has room for.
        has: u64,
    },
    /// Stages that do not follow each other through the span.
    #[error("no stage computes layer {0} when its turn comes")]
    Gap(u16),
    /// Holders of an island that is not asked for.
    #[error("a holder is {rtt:?} away, too far for an island that nobody asks for")]
    TooFar {
        /// To the farthest.
        rtt: Duration,
    },
    /// Nobody knows how near a holder is.
    #[error("nobody measured the way from the trunk to {0}")]
    Unmeasured(Peer),
    /// A figure that cannot be.
    #[error("{who} reads no weights or sends no bytes in a second")]
    Figure {
        /// Whose.
        who: String,
    },
}

impl Link {
    /// Another program of the same machine.
    pub const NEAR: Link = Link {
        rtt: Duration::from_nanos(1),
        bytes_s: f64::INFINITY,
    };
    /// To oneself.
    pub const NONE: Link = Link {
        rtt: Duration::ZERO,
        bytes_s: f64::INFINITY,
    };

    fn seconds(&self, rtts: f64, bytes: u64) -> f64 {
        self.rtt.as_secs_f64() * rtts + bytes as f64 / self.bytes_s
    }
}

impl Machine {
    /// A machine that was seen to compute so many layers of a mixture a second, one row each.
    pub fn of_layers_s(shape: &MixtureShape, layers_s: f64, memory_bytes: u64) -> Machine {
        let read: u64 = shape
            .layers
            .iter()
            .map(|layer| shape.read_bytes(layer))
            .sum();
        Machine {
            read_bytes_s: read as f64 / shape.layers.len().max(1) as f64 * layers_s,
            memory_bytes,
        }
    }

    fn seconds(&self, bytes: u64) -> f64 {
        bytes as f64 / self.read_bytes_s
    }

    fn checked(&self, link: &Link, who: &str) -> Result<(), Unfit> {
        // Nothing is also smaller than nothing at all.
        match self.read_bytes_s > 0.0 && link.bytes_s > 0.0 {
            true => Ok(()),
            false => Err(Unfit::Figure { who: who.into() }),
        }
    }

    fn fits(&self, needs: u64, who: impl FnOnce() -> String) -> Result<(), Unfit> {
        if needs <= self.memory_bytes {
            return Ok(());
        }
        Err(Unfit::Memory {
            who: who(),
            needs,
            has: self.memory_bytes,
        })
    }
}

/// One row of `span` on a trunk that asks `holders`.
///
/// # Errors
/// The island cannot be: an expert that nobody has, or a machine without room.
pub fn island_time(
    shape: &MixtureShape,
    used: &ExpertUse,
    span: LayerRange,
    trunk: &Machine,
    holders: &[Holder],
    overheads: &Overheads,
) -> Result<IslandTime, Unfit> {
    fits(shape, span, trunk, holders)?;
    let head = trunk.seconds(shape.head_of(span));
    let mut sums = Sums::default();
    let mut layers = Vec::new();
    let mut asked = vec![false; holders.len()];
    for (layer, of) in shape.within(span) {
        let trunk_s = trunk.seconds(of.trunk_bytes);
        sums.trunk += trunk_s;
        if !of.has_experts() {
            continue;
        }
        let shares = deal(shape, used, layer, of, holders)?;
        for (asked, shares) in asked.iter_mut().zip(&shares) {
            *asked |= !shares.is_empty();
        }
        let one = Asking::of(shape, of, holders, &shares, overheads);
        sums.add(&one);
        layers.push(LayerTime {
            layer,
            total: duration(trunk_s + one.all + one.overhead),
        });
    }
    let n = layers.len().max(1) as f64;
    let rtts = holders.iter().zip(&asked).filter(|(_, asked)| **asked);
    let rtts = rtts.map(|(holder, _)| holder.link.rtt);
    Ok(IslandTime {
        total: duration(sums.trunk + head + sums.all + sums.overhead),
        trunk: duration(sums.trunk + head),
        experts: duration(sums.near),
        network: duration(sums.all - sums.near),
        overhead: duration(sums.overhead),
        n_asked: layers.len() as u16,
        picks: (sums.picks / n, shape.n_expert_used),
        rtt_max: rtts.max().unwrap_or_default(),
        n_holders: asked.iter().filter(|asked| **asked).count() as u16,
        layers,
    })
}

/// In seconds.
#[derive(Default)]
struct Sums {
    trunk: f64,
    all: f64,
    near: f64,
    overhead: f64,
    picks: f64,
}

impl Sums {
    fn add(&mut self, one: &Asking) {
        self.all += one.all;
        self.near += one.near;
        self.overhead += one.overhead;
        self.picks += one.picks;
    }
}

/// Asking for the experts of one layer, in seconds.
struct Asking {
    /// Until the last answer is there.
    all: f64,
    /// The same without a network.
    near: f64,
    overhead: f64,
    /// Of the holder with the most.
    picks: f64,
}

impl Asking {
    fn of(
        shape: &MixtureShape,
        of: &LayerShape,
        holders: &[Holder],
        shares: &[Vec<f64>],
        overheads: &Overheads,
    ) -> Asking {
        let draws = Draws::of(shares, shape.n_expert_used.into());
        let row = shape.row_bytes();
        let read = |holder: usize, n: usize| {
            let bytes = of.expert_bytes.saturating_mul(n as u64);
            holders[holder].machine.seconds(bytes)
        };
        // The row there, one for each pick back.
        let network = |holder: usize, n: usize| {
            let bytes = row.saturating_mul(n as u64 + 1);
            holders[holder].link.seconds(1.0, bytes)
        };
        let n_asked: f64 = (0..holders.len()).map(|holder| draws.asked(holder)).sum();
        Asking {
            all: draws.mean_of_largest(|holder, n| network(holder, n) + read(holder, n)),
            near: draws.mean_of_largest(read),
            overhead: overheads.layer.as_secs_f64() + overheads.holder.as_secs_f64() * n_asked,
            picks: draws.mean_of_largest(|_, n| n as f64),
        }
    }
}

/// Whose picks the experts of a layer are, where several hold one: those that only one has first, then each to the
/// holder that is done first on average. Of each holder the shares of its experts.
fn deal(
    shape: &MixtureShape,
    used: &ExpertUse,
    layer: u16,
    of: &LayerShape,
    holders: &[Holder],
) -> Result<Vec<Vec<f64>>, Unfit> {
    let mut shares = vec![Vec::new(); holders.len()];
    let mut busy: Vec<f64> = holders
        .iter()
        .map(|holder| holder.link.rtt.as_secs_f64())
        .collect();
    let mut open = Vec::new();
    let mut give = |to: usize, share: f64, busy: &mut [f64]| {
        shares[to].push(share);
        busy[to] += share * holders[to].machine.seconds(of.expert_bytes);
    };
    for expert in 0..shape.n_expert {
        let id = ExpertId { layer, expert };
        let mut with = (0..holders.len()).filter(|at| holders[*at].experts.contains(&id));
        let first = with.next().ok_or(Unfit::NotHeld { layer, expert })?;
        let share = used.share(shape, layer, expert);
        match with.next() {
            None => give(first, share, &mut busy),
            Some(_) => open.push((share, id)),
        }
    }
    open.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    for (share, id) in open {
        let with = (0..holders.len()).filter(|at| holders[*at].experts.contains(&id));
        let done = |at: &usize| busy[*at] + share * holders[*at].machine.seconds(of.expert_bytes);
        if let Some(to) = with.min_by(|a, b| done(a).total_cmp(&done(b))) {
            give(to, share, &mut busy);
        }
    }
    Ok(shares)
}

/// Whether an island is possible.
fn fits(
    shape: &MixtureShape,
    span: LayerRange,
    trunk: &Machine,
    holders: &[Holder],
) -> Result<(), Unfit> {
    trunk.checked(&Link::NONE, "the trunk")?;
    let mut needs = shape.head_of(span);
    needs += shape
        .within(span)
        .map(|(_, layer)| layer.trunk_bytes)
        .sum::<u64>();
    for (at, holder) in holders.iter().enumerate() {
        let who = || format!("holder {at}");
        holder.machine.checked(&holder.link, &who())?;
        let held = holder.experts.iter();
        let bytes = held.map(|id| shape.layers.get(usize::from(id.layer)));
        let bytes: u64 = bytes.flatten().map(|layer| layer.expert_bytes).sum();
        if holder.link == Link::NONE {
            needs += bytes;
        } else {
            holder.machine.fits(bytes, who)?;
        }
    }
    trunk.fits(needs, || "the trunk".into())
}

/// One row of `span` on stages that follow each other.
///
/// # Errors
/// The pipeline cannot be: a layer that is nobody's, or a machine without room.
pub fn pipeline_time(
    shape: &MixtureShape,
    span: LayerRange,
    stages: &[Stage],
    overheads: &Overheads,
) -> Result<PipelineTime, Unfit> {
    let mut next = span.start;
    let mut times = Vec::with_capacity(stages.len());
    for (at, stage) in stages.iter().enumerate() {
        let who = || format!("the stage of layers {}", stage.layers);
        stage.machine.checked(&stage.link, &who())?;
        if stage.layers.start != next || stage.layers.is_empty() || stage.layers.end > span.end {
            return Err(Unfit::Gap(next));
        }
        next = stage.layers.end;
        stage.machine.fits(shape.span_bytes(stage.layers), who)?;
        let read = shape.span_read_bytes(stage.layers);
        let network = match at {
            0 => 0.0,
            _ => stage.link.seconds(0.5, shape.row_bytes()) + overheads.hop.as_secs_f64(),
        };
        times.push(StageTime {
            layers: stage.layers,
            compute: duration(stage.machine.seconds(read)),
            network: duration(network),
        });
    }
    if next != span.end || span.is_empty() {
        return Err(Unfit::Gap(next));
    }
    let total = times
        .iter()
        .map(|stage| stage.compute.saturating_add(stage.network));
    Ok(PipelineTime {
        total: total.fold(Duration::ZERO, Duration::saturating_add),
        stages: times,
    })
}

/// What is absurd counts as a day.
fn duration(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.clamp(0.0, 86_400.0))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl fmt::Display for IslandTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.2} ms: trunk {:.2}, experts {:.2} (the fullest of {} holders has {:.1} of {} picks), \
             network {:.2} ({} round trips of up to {:.2} ms), asking {:.2}",
            ms(self.total),
            ms(self.trunk),
            ms(self.experts),
            self.n_holders,
            self.picks.0,
            self.picks.1,
            ms(self.network),
            self.n_asked,
            ms(self.rtt_max),
            ms(self.overhead)
        )
    }
}

impl fmt::Display for PipelineTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} ms:", ms(self.total))?;
        for (at, stage) in self.stages.iter().enumerate() {
            if at > 0 {
                write!(f, ", {:.2} on the way,", ms(stage.network))?;
            }
            write!(f, " layers {} {:.2}", stage.layers, ms(stage.compute))?;
        }
        Ok(())
    }
}
