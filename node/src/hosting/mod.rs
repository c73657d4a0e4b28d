//! The models that this node serves layers of: how each is found, which layers it holds, and how these come and go.
//!
//! ```text
//! locate: here ─────────────────────────▶ Found ─▶ choose: a window ─▶ Keeper ─▶ stage worker
//!         └ what peers say ─▶ described ──┘                            │ ▲  └──▶ board: the advert
//!                                       a better window, each turn ────┘ └─ shards: here, or from peers
//! ```

use std::{ops::Range, time::Duration};

use engine::{Stage, Worker};
use swarm_proto::{LayerRange, ModelId};

use crate::{
    cpu_share::CpuShare,
    load::{self, Found},
    measure::{Speed, Timed},
    net::Net,
    session::{Served, SessionLimits, Sessions},
    swarm_node::{StartError, blocking},
    transfer::Transfer,
};

mod board;
mod choose;
mod groups;
mod keeper;
mod locate;
mod shards;

pub(crate) use board::{Board, Model, Serving};
use keeper::{Keeper, Plot};
pub(crate) use locate::locate;
use shards::Shards;

/// What all models of a node have in common.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) net: Net,
    pub(crate) transfer: Transfer,
    pub(crate) sessions: Sessions,
    pub(crate) board: Board,
    /// Compute threads of each, where the user said.
    pub(crate) threads: Option<u32>,
    /// How much of the time they may work.
    pub(crate) cpu_share: CpuShare,
    /// How long a turn lasts, see [`shard_registry::placement::plan`].
    pub(crate) turn: Duration,
    /// Nobody to hear from is known.
    pub(crate) alone: bool,
}

/// A model that is served.
#[derive(Debug, Clone)]
pub struct Hosted {
    /// Which.
    pub model: ModelId,
    /// The layers it is to serve; they come one by one where they are fetched, and may move later.
    pub layers: Range<u32>,
}

/// Chooses layers of a model, says so, loads the first of them and serves. Returns with what keeps them from then on:
/// [`Keeper::run`].
///
/// # Errors
/// The memory is too small, or no layer can be had.
pub(crate) async fn host(
    place: &Place,
    found: Found,
    memory: u64,
    layers: Option<Range<u32>>,
) -> Result<(Hosted, Keeper), StartError> {
    let layer_bytes = load::layer_bytes(&found.blueprint);
    let pinned = layers.is_some();
    let plan = choose::layers(place, &found, &layer_bytes, memory, layers).await?;
    tracing::info!(model = %found.name, id = %found.id.short(), layers = ?plan.layers, "loading");
    let threads = place
        .threads
        .unwrap_or_else(|| load::default_threads(&found.blueprint, &plan.layers));
    let mut plot = Plot {
        place: place.clone(),
        shards: Shards::new(found.clone(), place.transfer.clone(), plan.layers.len()),
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
    let queue = SessionLimits::default().worker_queue();
    let worker = blocking({
        let (speed, share) = (speed.clone(), place.cpu_share);
        move || Worker::spawn(Box::new(Timed::new(stage, speed, share)), queue)
    });
    let worker = worker.await?.map_err(StartError::Worker)?;
    place.sessions.serve(Served::new(found.id, worker.clone()));
    let serving = Serving {
        worker: worker.clone(),
        speed,
        threads,
    };
    place.board.serves(&found.id, serving).await;
    let hosted = Hosted {
        model: found.id,
        layers: plan.layers,
    };
    Ok((hosted, Keeper { plot, worker }))
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
