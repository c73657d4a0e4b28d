//! The models that this node serves layers of: how each is found, which layers it holds, and how these come and go.
//!
//! ```text
//! locate: here ─────────────────────────▶ Found ─▶ choose: a window ─▶ Keeper ─▶ stage worker
//!         └ what peers say ─▶ described ──┘                            │ ▲  └──▶ board: the advert
//!                                       a better window, each turn ────┘ └─ shards: here, or from peers
//! ```
//!
//! Of a mixture of experts a node may hold whole layers, trunks, whose experts its island computes (`trunk`), or experts
//! (`experts`): see [`Hold`].

use std::{ops::Range, sync::Arc, time::Duration};

use engine::{LlamaStage, Stage, Worker};
use futures::future::{BoxFuture, FutureExt};
use swarm_proto::{ExpertSpan, LayerRange, ModelId};
use tokio::runtime::Handle;

use crate::{
    cpu_share::CpuShare,
    experts::{ExpertService, Island, IslandFacts, IslandOptions},
    load::{self, Found},
    measure::{Speed, Timed},
    net::Net,
    peer_book::PeerBook,
    session::{Served, SessionLimits, Sessions},
    swarm_node::{StartError, blocking},
    transfer::Transfer,
};

mod board;
mod choose;
mod experts;
mod groups;
mod hold;
mod keeper;
mod locate;
mod shards;
mod trunk;

pub(crate) use board::{Board, Experts, Model, Serving};
use experts::ExpertShards;
pub use hold::Hold;
use keeper::{Keeper, Plot};
pub(crate) use locate::locate;
use shards::Shards;
use trunk::TrunkKeeper;

/// How long a step waits for an expert that nobody holds: it is fetched meanwhile, where there is room for it. Then the
/// session goes on elsewhere, if another trunk serves its layers.
const MISSING_WAIT: Duration = Duration::from_secs(3);
/// Between two words of what a trunk waits for.
const SAY_AGAIN: Duration = Duration::from_secs(15);

/// What all models of a node have in common.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) net: Net,
    pub(crate) transfer: Transfer,
    pub(crate) sessions: Sessions,
    pub(crate) service: ExpertService,
    pub(crate) board: Board,
    /// Whom it does not trust any more.
    pub(crate) book: PeerBook,
    /// Compute threads of each, where the user said.
    pub(crate) threads: Option<u32>,
    /// How much of the time they may work.
    pub(crate) cpu_share: CpuShare,
    /// How long a turn lasts, see [`shard_registry::placement::plan`].
    pub(crate) turn: Duration,
    /// The longest round trip to holders of experts.
    pub(crate) island_rtt: Duration,
    /// Nobody to hear from is known.
    pub(crate) alone: bool,
}

/// A model that is served.
#[derive(Debug, Clone)]
pub struct Hosted {
    /// Which.
    pub model: ModelId,
    /// The layers it is to serve; they come one by one where they are fetched, and may move later. Empty where it
    /// holds experts only.
    pub layers: Range<u32>,
    /// What of them it holds.
    pub hold: Hold,
    /// The experts that it is to hold.
    pub experts: Vec<ExpertSpan>,
}

/// What keeps a model's layers or experts for as long as the node runs.
pub(crate) type Keeping = BoxFuture<'static, ()>;

/// Chooses what of a model to hold, says so, loads the first of it and serves.
///
/// # Errors
/// The memory is too small, or nothing of it can be had.
pub(crate) async fn host(
    place: &Place,
    found: Found,
    memory: u64,
    layers: Option<Range<u32>>,
    hold: Hold,
) -> Result<(Hosted, Keeping), StartError> {
    match (hold.of(place, &found, memory)?, found.experts.clone()) {
        (Hold::Experts, Some(layout)) => {
            let (hosted, keeper) = experts::host(place, found, layout, memory, layers).await?;
            Ok((hosted, keeper.run().boxed()))
        }
        (Hold::Trunk, Some(layout)) => {
            let shards = ExpertShards {
                place: place.clone(),
                found: found.clone(),
                layout,
            };
            host_layers(place, found, memory, layers, Some(shards)).await
        }
        _ => host_layers(place, found, memory, layers, None).await,
    }
}

/// Layers, with their experts or, where `experts` are elsewhere, without.
async fn host_layers(
    place: &Place,
    mut found: Found,
    memory: u64,
    layers: Option<Range<u32>>,
    experts: Option<ExpertShards>,
) -> Result<(Hosted, Keeping), StartError> {
    if experts.is_some() {
        found.blueprint = found.blueprint.without_experts();
    }
    let layer_bytes = load::layer_bytes(&found.blueprint);
    let pinned = layers.is_some();
    let plan = choose::layers(place, &found, &layer_bytes, memory, layers).await?;
    tracing::info!(model = %found.name, id = %found.id.short(), layers = ?plan.layers, "loading");
    let threads = place
        .threads
        .unwrap_or_else(|| load::default_threads(&found.blueprint, &plan.layers));
    let island = experts.as_ref().map(|experts| island(place, experts));
    let shards = Shards::new(found.clone(), place.transfer.clone(), plan.layers.len());
    let mut plot = Plot {
        place: place.clone(),
        shards: shards.with(island.clone()),
        window: span(&plan.layers),
        groups: groups::Groups::default(),
        layer_bytes,
        memory,
        pinned,
    };
    let mut stage = load::stage(&found, &plan, threads)?;
    if let Some(layer) = plot.next_to_load() {
        stage.add(plot.load_first(layer).await?)?;
    }
    let speed = Speed::default();
    let held = plot.groups.layers();
    let worker = worker(place, stage, &speed, island.as_deref(), &held).await?;
    place.sessions.serve(Served::new(found.id, worker.clone()));
    let serving = Serving {
        worker: worker.clone(),
        speed,
        threads,
        island: island.clone(),
    };
    place.board.serves(&found.id, serving).await;
    let hosted = Hosted {
        model: found.id,
        layers: plan.layers,
        hold: if island.is_some() {
            Hold::Trunk
        } else {
            Hold::Layers
        },
        experts: Vec::new(),
    };
    let keeper = Keeper {
        plot,
        worker: worker.clone(),
    };
    let trunk = experts.zip(island).map(|(shards, island)| TrunkKeeper {
        shards,
        island,
        worker,
        memory,
        threads,
    });
    let keeping = async move {
        match trunk {
            None => keeper.run().await,
            Some(trunk) => {
                tokio::join!(keeper.run(), trunk.run());
            }
        }
    };
    Ok((hosted, keeping.boxed()))
}

/// The worker of a stage, which is measured first: a trunk's with its experts, for it is of no use without.
async fn worker(
    place: &Place,
    stage: LlamaStage,
    speed: &Speed,
    island: Option<&Island>,
    layers: &[u16],
) -> Result<Worker, StartError> {
    if let Some(island) = island {
        is_whole(island, layers).await;
    }
    let queue = SessionLimits::default().worker_queue();
    let worker = blocking({
        let (speed, share) = (speed.clone(), place.cpu_share);
        move || Worker::spawn(Box::new(Timed::new(stage, speed, share)), queue)
    });
    let worker = worker.await?.map_err(StartError::Worker)?;
    if let Some(island) = island {
        island.forget_picks();
    }
    Ok(worker)
}

fn island(place: &Place, experts: &ExpertShards) -> Arc<Island> {
    let numerics = engine::expert_numerics_class();
    let facts = IslandFacts::new(experts.found.id, &experts.layout, numerics);
    let options = IslandOptions {
        rtt_max: place.island_rtt,
        missing_wait: MISSING_WAIT,
    };
    let (net, book) = (place.net.clone(), place.book.clone());
    Island::new(net, book, Handle::current(), facts, options)
}

/// Waits until somebody computes every expert of these layers, and says for whom it waits.
async fn is_whole(island: &Island, layers: &[u16]) {
    let mut changes = island.changes();
    let whole = || layers.iter().all(|layer| island.covers(*layer));
    while !whole() {
        let missing = island.missing().len();
        tracing::info!(
            missing,
            "waiting for near peers that hold the experts (shoal-node --hold experts)"
        );
        let _ = tokio::time::timeout(SAY_AGAIN, async {
            while !whole() && changes.changed().await.is_ok() {}
        })
        .await;
    }
}

/// As adverts and placement count; models have fewer layers than 65,536.
fn span(layers: &Range<u32>) -> LayerRange {
    let number = |layer: u32| u16::try_from(layer).unwrap_or(u16::MAX);
    LayerRange {
        start: number(layers.start),
        end: number(layers.end),
    }
}

/// As the engine counts.
fn range(layers: LayerRange) -> Range<u32> {
    layers.start.into()..layers.end.into()
}
