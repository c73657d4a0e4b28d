//! The layers of one model on this node, over time: loaded one by one, the scarcest first; moved where the swarm is
//! better served; given up only when others serve them.
//!
//! ```text
//! next: Load ─▶ fetch, verify, load ─▶ stage, advert
//!       Drop ─▶ out of the advert ─▶ do others still serve it? ─▶ hand sessions over ─▶ free
//!       Done ─▶ each turn: a better window ─▶ next …      else, if idle: load together what came one by one
//! ```

use std::time::Duration;

use engine::{Busy, EngineError, Loaded, Reply, Worker};
use shard_registry::placement::{
    self, Count, Holdings,
    plan::{HOME_PEERS_MAX, local, movers, plan},
    slide::{OTHERS_MIN, Slide, Step, step},
};
use swarm_proto::{LayerRange, Peer};
use tokio::{sync::oneshot, time::sleep};

use super::{
    Place,
    groups::{self, Groups},
    range,
    shards::Shards,
};
use crate::{
    load,
    net::now_ms,
    swarm_node::{StartError, blocking},
    transfer::TransferError,
};

/// Before a layer that could not be had is tried again; doubled up to the second.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// How long the others have to hear that a layer leaves, and this node to hear that they leave theirs; up to twice as
/// long, each its own time.
const SETTLE: Duration = Duration::from_secs(2);
/// Between two looks at whether something may leave by now.
const LOOK: Duration = Duration::from_secs(5);

/// What a node holds of a model and what it is to hold.
pub(super) struct Plot {
    pub(super) place: Place,
    pub(super) shards: Shards,
    pub(super) window: LayerRange,
    pub(super) groups: Groups,
    pub(super) layer_bytes: Vec<u64>,
    /// Bytes for layers and KV.
    pub(super) memory: u64,
    /// The user said which layers: they stay.
    pub(super) pinned: bool,
}

/// The same with the stage worker that serves it.
pub(crate) struct Keeper {
    pub(super) plot: Plot,
    pub(super) worker: Worker,
}

impl Plot {
    fn me(&self) -> Peer {
        self.place.net.me()
    }

    fn holdings(&self) -> Holdings {
        let facts = self.shards.found.facts(&self.layer_bytes);
        Holdings::of(&self.place.net.adverts().snapshot(), &facts)
    }

    /// What to do next, when layers may take `room_bytes`.
    fn next(&self, room_bytes: u64) -> Step {
        let (me, live) = (self.me(), self.groups.layers());
        let holdings = self.holdings();
        let near = placement::near(self.place.net.rtts());
        let slide = Slide {
            me,
            live: &live,
            window: self.window.start..self.window.end,
            layer_bytes: &self.layer_bytes,
            room_bytes,
        };
        step(
            &slide,
            &holdings.others(Count::Live, me),
            &holdings.coverage(Count::Live, me, near),
        )
    }

    /// The first layer to load.
    pub(super) fn next_to_load(&self) -> Option<u16> {
        match self.next(u64::MAX) {
            Step::Load(layer) => Some(layer),
            Step::Drop(_) | Step::Wait | Step::Done => None,
        }
    }

    /// Loads what a stage without layers begins with: what is here, else this layer, waited for as long as somebody
    /// has it.
    pub(super) async fn load_first(&mut self, layer: u16) -> Result<Loaded, StartError> {
        let layers: Vec<u16> = self.window.layers().collect();
        let here = self.shards.here(&layers).await?;
        let span = here.first().copied().unwrap_or(LayerRange::one(layer));
        loop {
            match self.shards.load(&[span]).await {
                // A slow seed may be busy with others for as long as it likes.
                Err(StartError::Transfer(error @ TransferError::Stalled { .. })) => {
                    tracing::warn!(%error, "going on");
                }
                loaded => {
                    self.note(&[span]);
                    return loaded;
                }
            }
        }
    }

    /// These spans are held, each as the engine groups it.
    fn note(&mut self, spans: &[LayerRange]) {
        let blueprint = &self.shards.found.blueprint;
        let groups = spans
            .iter()
            .flat_map(|span| blueprint.groups(&range(*span)));
        self.groups.add(groups);
    }

    fn bytes(&self, layers: impl Iterator<Item = u16>) -> u64 {
        let bytes = |layer: u16| self.layer_bytes.get(usize::from(layer)).copied();
        layers.filter_map(bytes).fold(0, u64::saturating_add)
    }
}

impl Keeper {
    /// Keeps the layers for as long as the node runs.
    pub(crate) async fn run(mut self) {
        let mut pause = PAUSE;
        let mut turn = self.turn();
        loop {
            // A node that is paused fetches nothing for others either.
            self.plot.place.board.pause().over().await;
            match self.step().await {
                Ok(true) => pause = PAUSE,
                Ok(false) => self.rest(&mut turn).await,
                Err(StartError::Engine(error @ EngineError::Stopped)) => {
                    tracing::debug!(%error, "layers are kept no more");
                    return;
                }
                Err(error) => {
                    let held = self.plot.groups.layers();
                    let missing = self.plot.window.layers().filter(|l| !held.contains(l));
                    let left = missing.count();
                    tracing::warn!(%error, left, "layers are missing still; trying again in {pause:?}");
                    sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        }
    }

    /// Does what comes next; false where that is nothing now.
    async fn step(&mut self) -> Result<bool, StartError> {
        match self.plot.next(self.room_bytes()) {
            Step::Load(layer) => self.bring(layer).await.map(|()| true),
            Step::Drop(layer) => self.give_up(layer).await,
            Step::Wait | Step::Done => Ok(false),
        }
    }

    /// Bytes that layers may take on the way: those of the window, and one more where KV in use leaves that.
    fn room_bytes(&self) -> u64 {
        let window = self.plot.bytes(self.plot.window.layers());
        let one = self.plot.layer_bytes.iter().copied().max().unwrap_or(0);
        window.saturating_add(one.min(self.spare_bytes()))
    }

    /// Bytes of the budget that neither layers nor sessions take now.
    fn spare_bytes(&self) -> u64 {
        let stats = self.worker.stats();
        let used = stats.tensor_bytes.saturating_add(stats.kv_bytes);
        self.plot.memory.saturating_sub(used)
    }

    /// Loads a layer of the window and serves it; what else of the window is here comes along where nothing has to
    /// leave for it.
    async fn bring(&mut self, layer: u16) -> Result<(), StartError> {
        let held = self.plot.groups.layers();
        let mut span = LayerRange::one(layer);
        if held.iter().all(|layer| self.plot.window.contains(*layer)) {
            let missing: Vec<u16> = self
                .plot
                .window
                .layers()
                .filter(|l| !held.contains(l))
                .collect();
            span = *self
                .plot
                .shards
                .here(&missing)
                .await?
                .first()
                .unwrap_or(&span);
        }
        let loaded = self.plot.shards.load(&[span]).await?;
        self.serve(loaded, &[span]).await
    }

    async fn serve(&mut self, loaded: Loaded, spans: &[LayerRange]) -> Result<(), StartError> {
        done(|reply| self.worker.add(loaded, reply)).await?;
        self.plot.note(spans);
        self.plot.place.board.publish().await;
        Ok(())
    }

    /// Serves a layer no more, if enough others do; false where they do not. What was loaded with it and stays is
    /// loaded anew without it, before where there is room for both, else after: others serve that, too, then.
    async fn give_up(&mut self, layer: u16) -> Result<bool, StartError> {
        let Some(group) = self.plot.groups.of(layer) else {
            return Ok(false);
        };
        let rest = groups::rest(group, layer, self.plot.window);
        let rest_bytes = self.plot.bytes(rest.iter().flat_map(LayerRange::layers));
        let before = !rest.is_empty() && rest_bytes <= self.spare_bytes();
        let leaving = match rest.is_empty() || before {
            true => LayerRange::one(layer),
            false => group,
        };
        if !self.others_serve(leaving) {
            return Ok(false);
        }
        let loaded = match before {
            true => Some(self.plot.shards.load(&rest).await?),
            false => None,
        };
        let id = self.plot.shards.found.id;
        let board = self.plot.place.board.clone();
        board.leaves(&id, Some(leaving)).await;
        let own = f64::from(self.plot.me().0[0]) / 256.0;
        sleep(SETTLE.mul_f64(1.0 + own)).await;
        // Two that act on the same old adverts see each other now.
        let left = match self.others_serve(leaving) {
            true => self
                .leave(leaving, group, &rest, loaded)
                .await
                .map(|()| true),
            false => Ok(false),
        };
        board.leaves(&id, None).await;
        left
    }

    /// The layers leave: sessions on them go on elsewhere, and of their group only `rest` stays.
    async fn leave(
        &mut self,
        leaving: LayerRange,
        group: LayerRange,
        rest: &[LayerRange],
        loaded: Option<Loaded>,
    ) -> Result<(), StartError> {
        let sessions = &self.plot.place.sessions;
        let handed_over =
            sessions.hand_over(&self.plot.shards.found.id, |span| span.meets(leaving));
        tracing::info!(layers = %leaving, handed_over, "others serve these layers: they leave");
        if let Some(loaded) = loaded {
            return self.serve(loaded, rest).await;
        }
        self.remove(group).await?;
        if rest.is_empty() {
            return Ok(());
        }
        let loaded = self.plot.shards.load(rest).await?;
        self.serve(loaded, rest).await
    }

    async fn remove(&mut self, group: LayerRange) -> Result<(), StartError> {
        done(|reply| self.worker.remove(range(group), reply)).await?;
        self.plot.groups.remove(group);
        Ok(())
    }

    fn others_serve(&self, layers: LayerRange) -> bool {
        let others = self.plot.holdings().others(Count::Live, self.plot.me());
        let enough = |layer: u16| {
            let n = others.get(usize::from(layer)).copied();
            n.is_some_and(|n| n >= OTHERS_MIN)
        };
        layers.layers().all(enough)
    }

    /// The number of the running turn, the same on all nodes whose clocks are right.
    fn turn(&self) -> u64 {
        now_ms() / self.turn_ms()
    }

    fn turn_ms(&self) -> u64 {
        (self.plot.place.turn.as_millis() as u64).max(1)
    }

    /// Waits until something may have changed. Once a turn it looks whether another window is better.
    async fn rest(&mut self, looked: &mut u64) {
        let next_turn = Duration::from_millis(self.turn_ms() - now_ms() % self.turn_ms());
        sleep(LOOK.min(next_turn)).await;
        let turn = self.turn();
        if turn == *looked {
            return;
        }
        *looked = turn;
        if !self.plot.pinned && self.look_elsewhere(turn).await {
            return;
        }
        if let Err(error) = self.load_together().await {
            tracing::debug!(%error, "layers stay as they came");
        }
    }

    /// Makes the plan of this turn; whether there is another window for this node.
    async fn look_elsewhere(&mut self, turn: u64) -> bool {
        let (me, window) = (self.plot.me(), self.plot.window);
        let held = self.plot.groups.layers();
        let settled = window.layers().eq(held);
        let holdings = self.plot.holdings();
        let near = placement::near(self.plot.place.net.rtts());
        let (found, layer_bytes) = (
            self.plot.shards.found.clone(),
            self.plot.layer_bytes.clone(),
        );
        let windows = load::windows(&layer_bytes, self.plot.memory).unwrap_or_default();
        let better = blocking(move || {
            if holdings.holders.len() <= HOME_PEERS_MAX {
                let plan = plan(&holdings, &found.facts(&layer_bytes), turn)?;
                let first = plan.moves.into_iter().next()?;
                (first.peer == me && windows.contains(&first.to)).then_some(first.to)
            } else if settled && movers(&holdings, turn).contains(&me) {
                local(&holdings, &windows, me, near)
            } else {
                None
            }
        });
        let Ok(Some(better)) = better.await else {
            return false;
        };
        let to = LayerRange {
            start: better.start,
            end: better.end,
        };
        if to == window {
            return false;
        }
        tracing::info!(from = %window, %to, "the swarm is served better elsewhere: moving");
        let new = to.layers().filter(|layer| !window.contains(*layer));
        self.plot.shards.expect(new.count());
        self.plot.window = to;
        let found = &self.plot.shards.found;
        let memory = self.plot.memory;
        let kv = load::plan(&found.blueprint, range(to), memory).kv_bytes_max;
        if let Err(busy) = self.worker.limit(kv) {
            tracing::debug!(%busy, "the room for sessions stays as it was");
        }
        self.plot.place.board.moves(&found.id, to).await;
        true
    }

    /// Loads together what came one by one, a group a turn, while no session runs that would need both: a call and a
    /// context for each layer cost more than one for all.
    async fn load_together(&mut self) -> Result<(), StartError> {
        let held = self.plot.groups.layers();
        if !self.plot.window.layers().eq(held) || self.worker.stats().sessions > 0 {
            return Ok(());
        }
        let blueprint = &self.plot.shards.found.blueprint;
        let groups = blueprint.groups(&range(self.plot.window)).into_iter();
        let mut apart = groups
            .map(|group| super::span(&group))
            .filter(|group| !self.plot.groups.contains(*group));
        let spare = self.spare_bytes();
        let Some(group) =
            apart.find(|group| load::tensor_bytes(blueprint, &range(*group)) <= spare)
        else {
            return Ok(());
        };
        self.plot.shards.expect(usize::from(group.len()));
        let loaded = self.plot.shards.load(&[group]).await?;
        self.serve(loaded, &[group]).await
    }
}

/// Has the stage worker do something between two steps, and waits for it.
async fn done(queue: impl FnOnce(Reply<()>) -> Result<(), Busy>) -> Result<(), EngineError> {
    let (reply, done) = oneshot::channel();
    // Never with a queue that sessions cannot fill.
    let queued = queue(Box::new(move |result| drop(reply.send(result))));
    queued.map_err(|busy| EngineError::Backend(busy.to_string()))?;
    done.await.unwrap_or(Err(EngineError::Stopped))
}
