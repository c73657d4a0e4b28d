//! The experts of one model on this node: chosen by what the swarm lacks, loaded one by one, each said once it
//! computes.
//!
//! ```text
//! choose ─▶ intended ─▶ fetch, verify, load ─▶ worker, advert ─▶ … ─▶ all live
//!                          ▲ take, or swap ◀── next: missing elsewhere, or picked often ◀─┘
//! ```

use std::{collections::BTreeSet, io, ops::Range, sync::Arc, time::Duration};

use engine::{ExpertHolder, ExpertLayout, ExpertSource, ExpertWorker, LoadedExpert};
use shard_registry::{
    ShardEntry, ShardKind,
    placement::experts::{Expert, ExpertHoldings, Next, choose, next},
};
use swarm_proto::{ExpertSpan, Peer};
use tokio::time::sleep;

use super::{Hold, Hosted, Place, choose::LISTEN_FIRST};
use crate::{
    load::{Bytes, Found, LoadError, Verified},
    swarm_node::{StartError, blocking},
    transfer::TransferError,
};

/// Calls that may wait at the worker, over all trunks.
const QUEUE_MAX: usize = 256;
/// How long others get to object to a choice, each time, and how often they may.
const SETTLE: Duration = Duration::from_millis(700);
const ROUNDS: u32 = 4;
/// Between two looks at what the swarm lacks.
const LOOK: Duration = Duration::from_secs(3);
/// Two nodes that would do the same wait up to this long, each its own time, and look again.
const DRAWN: Duration = Duration::from_secs(2);
/// Before an expert that could not be had is tried again; doubled up to the second.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Experts of one model, and where they come from.
pub(super) struct ExpertShards {
    pub(super) place: Place,
    pub(super) found: Found,
    pub(super) layout: Arc<ExpertLayout>,
}

/// What keeps them.
pub(super) struct ExpertKeeper {
    shards: ExpertShards,
    worker: Arc<ExpertWorker>,
    /// All that this node may hold.
    all: Vec<Expert>,
    intended: BTreeSet<Expert>,
    live: BTreeSet<Expert>,
    /// How many fit.
    room: usize,
}

impl ExpertShards {
    pub(super) fn entry(&self, (layer, expert): Expert) -> Option<&ShardEntry> {
        self.found
            .manifest
            .shard(ShardKind::Expert { layer, expert })
    }

    /// Bytes of one expert's tensors.
    pub(super) fn bytes(&self, (layer, _): Expert) -> u64 {
        self.layout.expert_bytes(layer.into())
    }

    /// Reads an expert from the store, where it is fetched to if it is not there or damaged.
    pub(super) async fn load(&self, expert: Expert) -> Result<LoadedExpert, StartError> {
        let entry = self.entry(expert).ok_or_else(|| no_such(expert))?;
        let store = self.place.transfer.store().clone();
        let id = self.found.id;
        let here = blocking(move || store.here(id))
            .await?
            .map_err(LoadError::from)?;
        if !ExpertSpan::hold(&here.experts, expert.0, expert.1) {
            self.fetch(entry).await?;
        }
        match self.read(expert).await? {
            Err(LoadError::Read(error)) => {
                tracing::warn!(shard = %entry.kind, %error, "what is here cannot be used; looking for it among peers");
                self.fetch(entry).await?;
                Ok(self.read(expert).await??)
            }
            read => Ok(read?),
        }
    }

    async fn fetch(&self, entry: &ShardEntry) -> Result<(), StartError> {
        let (id, manifest) = (self.found.id, &self.found.manifest);
        let progress = &mut |_| {};
        let fetched = self.place.transfer.fetch(id, manifest, entry, progress);
        fetched.await?;
        tracing::debug!(shard = %entry.kind, bytes = entry.bytes, "fetched");
        Ok(())
    }

    async fn read(
        &self,
        (layer, expert): Expert,
    ) -> Result<Result<LoadedExpert, LoadError>, StartError> {
        let (store, id) = (self.place.transfer.store().clone(), self.found.id);
        let layout = Arc::clone(&self.layout);
        let read = move || {
            let source = Verified(store.reader(id)?);
            // Whose fault it is, is known only by asking for the shard itself.
            source.0.verify(ShardKind::Expert { layer, expert })?;
            let loaded = LoadedExpert::read(&layout, layer.into(), expert.into(), &source);
            loaded.map_err(LoadError::Experts)
        };
        Ok(blocking(read).await?)
    }
}

fn no_such((layer, expert): Expert) -> StartError {
    LoadError::Experts(engine::ExpertError::NotHeld {
        layer: layer.into(),
        expert: expert.into(),
    })
    .into()
}

impl ExpertSource for Verified {
    fn read_expert(&self, name: &str, expert: u32, out: &mut Vec<u8>) -> io::Result<()> {
        let expert = u16::try_from(expert).map_err(io::Error::other)?;
        self.0
            .read_expert(name, expert, out)
            .map_err(io::Error::other)
    }
}

/// Chooses experts of a mixture, says so, loads the first and computes with it for whoever asks. Returns with what
/// keeps them from then on.
///
/// # Errors
/// The memory is too small, or no expert can be had.
pub(super) async fn host(
    place: &Place,
    found: Found,
    layout: Arc<ExpertLayout>,
    memory: u64,
    layers: Option<Range<u32>>,
) -> Result<(Hosted, ExpertKeeper), StartError> {
    let wanted = |layer: &u32| layers.as_ref().is_none_or(|layers| layers.contains(layer));
    let of_layer = |layer: u32| (0..layout.n_expert()).map(move |e| (layer as u16, e as u16));
    let all: Vec<Expert> = layout.layers().filter(wanted).flat_map(of_layer).collect();
    let most = layout
        .layers()
        .map(|layer| layout.expert_bytes(layer))
        .max();
    let most = most.unwrap_or(0).max(1);
    let room = usize::try_from(memory / most)
        .unwrap_or(usize::MAX)
        .min(all.len());
    if all.is_empty() {
        let asked = layers.unwrap_or_default();
        let n_layer = found.blueprint.n_layer();
        return Err(LoadError::Layers { asked, n_layer }.into());
    }
    if room == 0 {
        let (given, needed) = (Bytes(memory), Bytes(most));
        return Err(LoadError::ExpertMemory { given, needed }.into());
    }
    if !place.alone && !place.net.synced(LISTEN_FIRST).await {
        tracing::info!("no other node was heard within {LISTEN_FIRST:?}");
    }
    let threads = place
        .threads
        .unwrap_or_else(|| engine::threads_for(most.saturating_mul(room as u64)));
    let shards = ExpertShards {
        place: place.clone(),
        found,
        layout,
    };
    let intended = settle(&shards, &all, room).await;
    let (id, name) = (shards.found.id, shards.found.name.clone());
    tracing::info!(model = %name, id = %id.short(), experts = intended.len(), of = all.len(), "loading experts");
    let layout = Arc::clone(&shards.layout);
    let share = place.cpu_share;
    let worker = blocking(move || -> Result<ExpertWorker, StartError> {
        let holder = ExpertHolder::new(layout, threads).map_err(LoadError::Experts)?;
        let rest = Box::new(move |took| share.rest(took));
        ExpertWorker::spawn_resting(holder, QUEUE_MAX, rest).map_err(StartError::Worker)
    });
    let worker = Arc::new(worker.await??);
    let mut keeper = ExpertKeeper {
        shards,
        worker: Arc::clone(&worker),
        all,
        intended,
        live: BTreeSet::new(),
        room,
    };
    place.board.computes(&id, &worker);
    while !keeper.bring().await? {}
    place.service.offer(id, worker);
    let hosted = Hosted {
        model: id,
        layers: 0..0,
        hold: Hold::Experts,
        experts: ExpertSpan::of(keeper.intended.iter().copied()),
    };
    Ok((hosted, keeper))
}

/// The choice, announced, once others have had time to choose otherwise.
async fn settle(shards: &ExpertShards, all: &[Expert], room: usize) -> BTreeSet<Expert> {
    let place = &shards.place;
    let pick =
        |held: &BTreeSet<Expert>| choose(all, &shards.holdings(), held, room, place.net.me());
    let mut intended = pick(&BTreeSet::new());
    place.board.intends_experts(&shards.found, &intended).await;
    for _ in 0..if place.alone { 0 } else { ROUNDS } {
        // Not a wait for one event: others' choices may come or not.
        sleep(SETTLE).await;
        let better = pick(&intended);
        if better == intended {
            break;
        }
        intended = better;
        place.board.intends_experts(&shards.found, &intended).await;
    }
    intended
}

impl ExpertShards {
    /// Who else holds experts, of those that are near enough for the same trunks.
    fn holdings(&self) -> ExpertHoldings {
        let (net, most) = (&self.place.net, self.place.island_rtt);
        let far: BTreeSet<Peer> = net
            .rtts()
            .into_iter()
            .filter(|(_, rtt)| *rtt > most)
            .map(|(peer, _)| peer)
            .collect();
        let n_expert = u16::try_from(self.layout.n_expert()).unwrap_or(u16::MAX);
        let near = |peer: &Peer| !far.contains(peer);
        ExpertHoldings::of(
            &net.adverts().snapshot(),
            self.found.id,
            n_expert,
            net.me(),
            near,
        )
    }
}

impl ExpertKeeper {
    /// Keeps the experts for as long as the node runs.
    pub(super) async fn run(mut self) {
        let mut pause = PAUSE;
        loop {
            self.shards.place.board.pause().over().await;
            match self.step().await {
                Ok(true) => pause = PAUSE,
                Ok(false) => sleep(LOOK).await,
                Err(error) => {
                    let left = self.intended.len().saturating_sub(self.live.len());
                    tracing::warn!(%error, left, "experts are missing still; trying again in {pause:?}");
                    sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        }
    }

    /// Does what comes next; false where that is nothing now.
    async fn step(&mut self) -> Result<bool, StartError> {
        if self
            .intended
            .iter()
            .any(|expert| !self.live.contains(expert))
        {
            return self.bring().await.map(|_| true);
        }
        let wanted = self.next();
        if wanted == Next::Stay {
            return Ok(false);
        }
        let me = self.shards.place.net.me();
        sleep(DRAWN.mul_f64(f64::from(me.0[1]) / 256.0)).await;
        if self.next() != wanted {
            return Ok(true);
        }
        match wanted {
            Next::Stay => return Ok(false),
            Next::Take(take) => drop(self.intended.insert(take)),
            Next::Swap(take, instead) => {
                tracing::info!(
                    layer = take.0,
                    expert = take.1,
                    "is wanted more: taking it in place of another"
                );
                self.intended.insert(take);
                self.intended.remove(&instead);
                self.live.remove(&instead);
                // Others go around it before it is gone.
                self.say().await;
                sleep(SETTLE).await;
                let (layer, expert) = instead;
                self.worker
                    .remove(layer.into(), expert.into())
                    .map_err(LoadError::Experts)?;
            }
        }
        self.say().await;
        Ok(true)
    }

    fn next(&self) -> Next {
        let me = self.shards.place.net.me();
        next(
            &self.all,
            &self.shards.holdings(),
            &self.intended,
            self.room,
            me,
        )
    }

    /// Loads the one that fewest have of those that are to come; false where nobody had it for now.
    async fn bring(&mut self) -> Result<bool, StartError> {
        let missing = self.intended.difference(&self.live).copied();
        let missing: Vec<Expert> = missing.collect();
        let (me, holdings) = (self.shards.place.net.me(), self.shards.holdings());
        let first = choose(&missing, &holdings, &BTreeSet::new(), 1, me).pop_first();
        let Some(expert) = first else {
            return Ok(true);
        };
        let loaded = match self.shards.load(expert).await {
            // A slow seed may be busy with others for as long as it likes.
            Err(StartError::Transfer(error @ TransferError::Stalled { .. })) => {
                tracing::warn!(%error, "going on");
                return Ok(false);
            }
            loaded => loaded?,
        };
        self.worker.add(loaded).map_err(LoadError::Experts)?;
        self.live.insert(expert);
        let (done, of) = (self.live.len(), self.intended.len());
        tracing::info!(
            layer = expert.0,
            expert = expert.1,
            "verified and loaded an expert ({done} of {of})"
        );
        self.say().await;
        Ok(true)
    }

    async fn say(&self) {
        let (intended, live) = (&self.intended, &self.live);
        let board = &self.shards.place.board;
        board
            .has_experts(&self.shards.found.id, intended, live)
            .await;
    }
}
