//! A trunk's island: the holders near by, and which of them is asked for what.
//!
//! The engine asks on its stage thread, which blocks until all rows are there. Everything that waits for peers
//! runs on the async runtime and wakes that thread directly.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
    time::{Duration, Instant},
};

use engine::{
    ExpertCall, ExpertError, ExpertHolders, ExpertLayout, ExpertReply, ExpertWorker, HolderId,
};
use serde::Serialize;
use shard_registry::experts::ISLAND_RTT_MAX;
use swarm_proto::{HotExpert, ModelId, Peer, experts::ISLAND_PEERS_MAX};
use tokio::{runtime::Handle, sync::watch};

use super::{
    ask,
    choose::{LOCAL, choose},
    holder::{Holder, HolderView, LinkState, lock, us},
    keeper,
    link::Event,
    table::{Expert, Shape, Table},
    timing::Timing,
    usage::Usage,
};
use crate::{net::Net, peer_book::PeerBook};

/// An expert that nobody has: asking for it waits for somebody.
pub(super) const NOBODY: HolderId = HolderId(u32::MAX);

/// What an island is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IslandFacts {
    /// Which model.
    pub model: ModelId,
    /// The layers of it that have experts, as the whole model counts.
    pub layers: Vec<u16>,
    /// Experts of each.
    pub n_expert: u16,
    /// Floats in a row.
    pub n_embd: u32,
    /// The trunk's numerics class: only holders of the same compute the same bits.
    pub numerics: u64,
}

impl IslandFacts {
    /// Those of a model whose experts are laid out like this.
    pub fn new(model: ModelId, layout: &ExpertLayout, numerics: u64) -> Self {
        Self {
            model,
            layers: layout
                .layers()
                .filter_map(|layer| layer.try_into().ok())
                .collect(),
            n_expert: layout.n_expert().try_into().unwrap_or(u16::MAX),
            n_embd: layout.n_embd(),
            numerics,
        }
    }
}

/// How an island is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IslandOptions {
    /// Holders farther than this are left out: a token waits for one of them in every layer.
    pub rtt_max: Duration,
    /// How long a step waits for an expert that nobody holds.
    pub missing_wait: Duration,
}

impl Default for IslandOptions {
    fn default() -> Self {
        Self {
            rtt_max: ISLAND_RTT_MAX,
            missing_wait: Duration::from_secs(15),
        }
    }
}

/// Where an expert is computed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlacedExpert {
    /// Of which layer.
    pub layer: u16,
    /// Which.
    pub expert: u16,
    /// Who holds it, who would be asked first; none: this node itself.
    pub holders: Vec<Option<Peer>>,
    /// Rows it was picked for.
    pub rows: u64,
}

/// What a holder says that it has, and what of it it refused.
#[derive(Default)]
pub(super) struct Held {
    pub(super) said: HashSet<Expert>,
    pub(super) denied: HashSet<Expert>,
}

/// Who there is. The numbers of holders are their places here, plus one.
#[derive(Default)]
struct Known {
    holders: Vec<Arc<Holder>>,
    held: HashMap<u32, Held>,
    local: HashSet<Expert>,
}

/// The table as it is read for each layer of each token.
struct Current {
    table: Table,
    /// By number, less one.
    holders: Vec<Arc<Holder>>,
}

/// What the island's handle, its tasks and stage threads share.
pub(super) struct Shared {
    pub(super) net: Net,
    pub(super) book: PeerBook,
    pub(super) runtime: Handle,
    pub(super) facts: IslandFacts,
    pub(super) options: IslandOptions,
    shape: Shape,
    known: Mutex<Known>,
    current: RwLock<Arc<Current>>,
    local: RwLock<Option<Arc<ExpertWorker>>>,
    local_timing: Mutex<(Timing, u64, u64)>,
    usage: Usage,
    /// Asked for while nobody held them.
    wanted: Mutex<HashSet<Expert>>,
    /// Steps that wait for a holder.
    waiting: Mutex<Vec<Sender<Event>>>,
    changes: watch::Sender<u64>,
    closed: AtomicBool,
    /// Told when it is closed.
    pub(super) stop: watch::Sender<bool>,
}

/// The holders of a trunk's experts: give it to `engine` as what computes them.
pub struct Island {
    shared: Arc<Shared>,
}

impl Island {
    /// An island that looks for holders from now on, in the background, on `runtime`.
    pub fn new(
        net: Net,
        book: PeerBook,
        runtime: Handle,
        facts: IslandFacts,
        options: IslandOptions,
    ) -> Arc<Island> {
        let shape = Shape::new(&facts.layers, facts.n_expert);
        let table = Table::new(&shape, std::iter::empty(), std::iter::empty());
        let current = Current {
            table,
            holders: Vec::new(),
        };
        let shared = Arc::new(Shared {
            net,
            book,
            runtime,
            facts,
            options,
            usage: Usage::new(&shape),
            shape,
            known: Mutex::default(),
            current: RwLock::new(Arc::new(current)),
            local: RwLock::default(),
            local_timing: Mutex::default(),
            wanted: Mutex::default(),
            waiting: Mutex::default(),
            changes: watch::Sender::new(0),
            closed: AtomicBool::new(false),
            stop: watch::Sender::new(false),
        });
        shared.runtime.spawn(keeper::run(shared.clone()));
        Arc::new(Island { shared })
    }

    /// Computes the experts that `worker` holds now here, and no others; call it again when it holds others.
    pub fn set_local(&self, worker: Option<Arc<ExpertWorker>>) {
        let held = worker.as_ref().map(|worker| worker.held());
        let held = held.unwrap_or_default().into_iter();
        let narrow = |(layer, expert): (u32, u32)| {
            Some((u16::try_from(layer).ok()?, u16::try_from(expert).ok()?))
        };
        let local = held.filter_map(narrow).collect();
        let shared = &self.shared;
        *shared.local.write().unwrap_or_else(PoisonError::into_inner) = worker;
        shared.change(|known| known.local = local);
    }

    /// Whether every expert of `layer` can be asked for now.
    pub fn covers(&self, layer: u16) -> bool {
        let shared = &self.shared;
        let current = shared.current();
        let n_expert = u32::from(shared.shape.n_expert());
        let held = |expert| {
            let at = shared.shape.at(layer.into(), expert);
            !current.table.holders(at).is_empty()
        };
        (0..n_expert).all(held)
    }

    /// Experts that nobody here can be asked for now, by layer and index.
    pub fn missing(&self) -> Vec<Expert> {
        let current = self.shared.current();
        let all = self.shared.shape.each().zip(current.table.all());
        let missing = all.filter(|(_, holders)| holders.is_empty());
        missing.map(|(expert, _)| expert).collect()
    }

    /// Experts that were asked for and that nobody holds: whose shards should be fetched first.
    pub fn wanted(&self) -> Vec<Expert> {
        let shared = &self.shared;
        let current = shared.current();
        let mut wanted = lock(&shared.wanted);
        wanted.retain(|(layer, expert)| {
            let at = shared.shape.at((*layer).into(), (*expert).into());
            current.table.holders(at).is_empty()
        });
        let mut wanted: Vec<_> = wanted.iter().copied().collect();
        wanted.sort_unstable();
        wanted
    }

    /// The holders that are asked, in a fixed order: for the advert.
    pub fn peers(&self) -> Vec<Peer> {
        let current = self.shared.current();
        let used: HashSet<u32> = current.table.all().iter().flatten().copied().collect();
        let holders = current.holders.iter();
        let mut peers: Vec<_> = holders
            .filter(|holder| used.contains(&holder.number))
            .map(|holder| holder.peer)
            .collect();
        peers.sort_unstable();
        peers.truncate(ISLAND_PEERS_MAX);
        peers
    }

    /// Changes whenever who can be asked for what does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    /// Counts picks from here on: a measurement picks the same experts again and again.
    pub fn forget_picks(&self) {
        self.shared.usage.forget();
    }

    /// Rows that each expert was picked for, by layer and index.
    pub fn used(&self) -> Vec<(u16, u16, u64)> {
        let all = self.shared.shape.each().zip(self.shared.usage.total());
        all.map(|((layer, expert), rows)| (layer, expert, rows))
            .collect()
    }

    /// Experts that another holder of would help: picked half again as often as a fair share.
    pub fn hot(&self) -> Vec<HotExpert> {
        self.shared.usage.hot(&self.shared.shape)
    }

    /// How it stands with every holder, this node itself first.
    pub fn stats(&self) -> Vec<HolderView> {
        let known = lock(&self.shared.known);
        let mut views = Vec::new();
        if !known.local.is_empty() {
            let (timing, calls, rows) = *lock(&self.shared.local_timing);
            views.push(HolderView {
                peer: None,
                state: LinkState::Up,
                experts: known.local.len(),
                calls,
                rows,
                rtt_us: None,
                wire_us: None,
                row_us: timing.figures().map(|(_, row)| us(row)),
                hedges: 0,
                losses: 0,
            });
        }
        for holder in &known.holders {
            let held = known.held.get(&holder.number);
            if held.is_some() {
                views.push(holder.view(held.map_or(0, |held| held.said.len())));
            }
        }
        views
    }

    /// Where each expert is computed, by layer and index.
    pub fn placed(&self) -> Vec<PlacedExpert> {
        let current = self.shared.current();
        let experts = self.shared.shape.each().zip(current.table.all());
        let experts = experts.zip(self.shared.usage.total());
        let now = Instant::now();
        let placed = experts.map(|(((layer, expert), holders), rows)| {
            let first = choose(&[(1, holders)], |holder| {
                self.shared.costs(&current, holder, now)
            });
            let first = first.into_iter().flatten().next();
            let mut holders = holders.clone();
            holders.sort_by_key(|holder| Some(*holder) != first);
            let peer = |holder: u32| current.holder(holder).map(|holder| holder.peer);
            PlacedExpert {
                layer,
                expert,
                holders: holders.into_iter().map(peer).collect(),
                rows,
            }
        });
        placed.collect()
    }

    /// Ends it: steps that wait fail at once, streams are closed.
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        self.shared.stop.send_replace(true);
        self.shared.wake();
    }
}

impl Drop for Island {
    fn drop(&mut self) {
        self.close();
    }
}

impl ExpertHolders for Island {
    fn holder_of(&self, layer: u32, expert: u32) -> Option<HolderId> {
        self.place(layer, &[(expert, 1)])
            .into_iter()
            .next()
            .flatten()
    }

    fn place(&self, layer: u32, experts: &[(u32, u32)]) -> Vec<Option<HolderId>> {
        let shared = &self.shared;
        let current = shared.current();
        let places = experts.iter().map(|(expert, rows)| {
            let at = shared.shape.at(layer, *expert);
            (*rows, current.table.holders(at))
        });
        let places: Vec<_> = places.collect();
        let now = Instant::now();
        let chosen = choose(&places, |holder| shared.costs(&current, holder, now));
        chosen
            .into_iter()
            .map(|holder| Some(holder.map_or(NOBODY, HolderId)))
            .collect()
    }

    fn ask(&self, calls: Vec<(HolderId, ExpertCall)>) -> Result<Vec<ExpertReply>, ExpertError> {
        ask::ask(&self.shared, calls)
    }
}

impl Current {
    fn holder(&self, number: u32) -> Option<&Arc<Holder>> {
        self.holders.get((number as usize).checked_sub(1)?)
    }
}

impl Shared {
    fn current(&self) -> Arc<Current> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&current)
    }

    fn costs(&self, current: &Current, holder: u32, now: Instant) -> (f64, f64) {
        match current.holder(holder) {
            Some(holder) => lock(&holder.timing).costs(now),
            None => (0.0, lock(&self.local_timing).0.costs(now).1),
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    pub(super) fn local(&self) -> Option<Arc<ExpertWorker>> {
        let local = self.local.read().unwrap_or_else(PoisonError::into_inner);
        local.clone()
    }

    pub(super) fn local_answered(&self, rows: u32, took: Duration) {
        let mut local = lock(&self.local_timing);
        local.0.answered(rows, took, took, Instant::now());
        local.1 += 1;
        local.2 += u64::from(rows);
    }

    pub(super) fn holder(&self, number: u32) -> Option<Arc<Holder>> {
        self.current().holder(number).cloned()
    }

    /// A holder for each of `experts` of `layer` but those in `without`.
    pub(super) fn others(
        &self,
        layer: u32,
        experts: &[(u32, u32)],
        without: &[u32],
    ) -> Vec<Option<u32>> {
        let current = self.current();
        let left: Vec<(u32, Vec<u32>)> = experts
            .iter()
            .map(|(expert, rows)| {
                let holders = current.table.holders(self.shape.at(layer, *expert));
                let holders = holders.iter().copied();
                let left = holders.filter(|holder| !without.contains(holder));
                (*rows, left.collect())
            })
            .collect();
        let now = Instant::now();
        // One that has them all, if there is one: then nothing is torn apart.
        let rows = experts.iter().map(|(_, rows)| rows).sum();
        let first = left.first().map_or(&[][..], |(_, holders)| holders);
        let of_all: Vec<u32> = first
            .iter()
            .copied()
            .filter(|holder| left.iter().all(|(_, holders)| holders.contains(holder)))
            .collect();
        let one = choose(&[(rows, &of_all)], |holder| {
            self.costs(&current, holder, now)
        });
        if let Some(Some(one)) = one.first() {
            return vec![Some(*one); experts.len()];
        }
        let places: Vec<(u32, &[u32])> = left
            .iter()
            .map(|(rows, holders)| (*rows, holders.as_slice()))
            .collect();
        choose(&places, |holder| self.costs(&current, holder, now))
    }

    pub(super) fn picked(&self, layer: u32, expert: u32, rows: u64) {
        if let Some(at) = self.shape.at(layer, expert) {
            self.usage.picked(&self.shape, at, rows);
        }
    }

    /// Somebody waits for an expert that nobody has.
    pub(super) fn want(&self, layer: u32, expert: u32) {
        if let (Some(_), Ok(layer), Ok(expert)) = (
            self.shape.at(layer, expert),
            u16::try_from(layer),
            u16::try_from(expert),
        ) && lock(&self.wanted).insert((layer, expert))
        {
            self.changes.send_modify(|version| *version += 1);
        }
    }

    /// A step that is told of each change until its receiver is gone.
    pub(super) fn wait(&self, step: Sender<Event>) {
        lock(&self.waiting).push(step);
        if self.is_closed() {
            self.wake();
        }
    }

    fn wake(&self) {
        lock(&self.waiting).retain(|step| step.send(Event::Changed).is_ok());
    }

    /// `holder` refuses these experts of a layer, whatever its advert says; until it says something else.
    pub(super) fn deny(&self, holder: u32, layer: u32, experts: impl Iterator<Item = u32>) {
        let narrow = |expert: u32| Some((layer.try_into().ok()?, expert.try_into().ok()?));
        let experts: Vec<Expert> = experts.filter_map(narrow).collect();
        self.change(|known| match holder {
            LOCAL => experts.iter().for_each(|expert| {
                known.local.remove(expert);
            }),
            _ => {
                if let Some(held) = known.held.get_mut(&holder) {
                    held.denied.extend(experts);
                }
            }
        });
    }

    /// The holder of this peer; a new one gets a number.
    pub(super) fn holder_for(&self, peer: Peer) -> Arc<Holder> {
        let mut known = lock(&self.known);
        if let Some(holder) = known.holders.iter().find(|holder| holder.peer == peer) {
            return holder.clone();
        }
        // The place of one who is gone, so that peers who come and go do not fill the memory.
        let gone = known
            .holders
            .iter()
            .position(|holder| !known.held.contains_key(&holder.number) && !holder.is_up());
        let at = gone.unwrap_or(known.holders.len());
        let number = u32::try_from(at + 1).unwrap_or(NOBODY.0);
        let holder = Arc::new(Holder::new(number, peer));
        // Its place is taken from now on.
        known.held.entry(number).or_default();
        match known.holders.get_mut(at) {
            Some(place) => *place = holder.clone(),
            None => known.holders.push(holder.clone()),
        }
        holder
    }

    /// What holders say they have, by number; those who are not among them are gone.
    pub(super) fn set_held(&self, mut said: HashMap<u32, HashSet<Expert>>) {
        let known = lock(&self.known);
        let same = |(holder, held): (&u32, &Held)| said.get(holder) == Some(&held.said);
        if known.held.len() == said.len() && known.held.iter().all(same) {
            return;
        }
        drop(known);
        self.change(|known| {
            known.held.retain(|holder, _| said.contains_key(holder));
            for (holder, said) in said.drain() {
                let held = known.held.entry(holder).or_default();
                if held.said != said {
                    held.denied.clear();
                    held.said = said;
                }
            }
        });
    }

    /// A link came or went.
    pub(super) fn relinked(&self) {
        self.change(|_| ());
    }

    /// A link came: what the holder refused before, it may not refuse now.
    pub(super) fn linked(&self, holder: u32) {
        self.change(|known| {
            if let Some(held) = known.held.get_mut(&holder) {
                held.denied.clear();
            }
        });
    }

    /// Changes what is known, makes the table anew and tells those who wait, if it is another one.
    fn change(&self, change: impl FnOnce(&mut Known)) {
        let mut known = lock(&self.known);
        change(&mut known);
        let up = known.holders.iter().filter(|holder| holder.is_up());
        let others = up.filter_map(|holder| {
            let held = known.held.get(&holder.number)?;
            Some((holder.number, &held.said, &held.denied))
        });
        let table = Table::new(&self.shape, known.local.iter().copied(), others);
        let other = table.all() != self.current().table.all();
        let new = Current {
            table,
            holders: known.holders.clone(),
        };
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
        drop(known);
        if other {
            self.changes.send_modify(|version| *version += 1);
            self.wake();
        }
    }
}
