//! The advert table: who says what, until it expires. Pure: the time is passed in.
//!
//! Times are ms since 1970 by this machine's clock. An advert lives for its TTL from when it
//! arrived, so that clocks that differ a little do no harm; the sender's time (`seq`) only orders
//! its adverts and keeps very old ones from being replayed.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use swarm_proto::{
    Advert, AdvertError, LayerRange, ModelAdvert, ModelId, Peer, SignedAdvert, SwarmId,
};

use crate::route::links::Cell;

/// Most peers: what one snapshot can carry.
pub const PEERS_MAX: usize = 4096;
/// How far the clocks of two honest machines may be apart.
pub const CLOCK_SKEW_MS: u64 = 600_000;

/// What became of an advert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is in the table; pass it on.
    Accepted,
    /// A newer one, or the same, is known. Nobody's fault.
    Stale,
    /// It is wrong: do not pass it on.
    Refused(Refusal),
}

/// Why an advert was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not well-formed, against the rules, or not signed by whom it names for this swarm.
    #[error(transparent)]
    Advert(#[from] AdvertError),
    /// Made long ago, or in the future.
    #[error("advert of {peer} was made {} s {}; is a clock wrong?", .off_ms.unsigned_abs() / 1000, side(*.off_ms))]
    Clock {
        /// Whose.
        peer: Peer,
        /// Its time minus ours.
        off_ms: i64,
    },
    /// No room for another peer. Not the sender's fault.
    #[error("{PEERS_MAX} peers are known, no room for {peer}")]
    Full {
        /// Who came too late.
        peer: Peer,
    },
}

fn side(off_ms: i64) -> &'static str {
    if off_ms < 0 { "ago" } else { "from now" }
}

/// Adverts by peer.
#[derive(Debug)]
pub struct AdvertTable {
    swarm: SwarmId,
    /// Sorted, as snapshots are.
    peers: BTreeMap<Peer, Entry>,
    /// The newest seq of peers that left or expired, so that their old adverts do not come back.
    gone: HashMap<Peer, Gone>,
    /// What plans have looked up, for the plans to come.
    links: Arc<Cell>,
}

#[derive(Debug)]
struct Entry {
    advert: Arc<Advert>,
    signed: SignedAdvert,
    expires_ms: u64,
    /// We could not connect to it since it said this.
    unreachable: bool,
}

#[derive(Debug)]
struct Gone {
    seq: u64,
    forget_ms: u64,
}

/// The adverts at one moment, sorted by peer. Cheap to clone and to hold.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Each peer's advert, sorted by peer.
    pub adverts: Vec<Arc<Advert>>,
    /// What the planner has looked up in them.
    pub(crate) links: Arc<Cell>,
}

/// Who holds which layer of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coverage {
    /// For each layer who serves it now, sorted.
    pub holders: Vec<Vec<Peer>>,
}

impl AdvertTable {
    /// An empty table of a swarm.
    pub fn new(swarm: SwarmId) -> Self {
        Self {
            swarm,
            peers: BTreeMap::new(),
            gone: HashMap::new(),
            links: Arc::default(),
        }
    }

    /// Takes an advert in, if it is right and newer than what is known. What is stale is seen before
    /// its signature is checked: gossip brings each advert several times.
    pub fn insert(&mut self, signed: SignedAdvert, now_ms: u64) -> Outcome {
        if self.peers.values().any(|entry| entry.signed == signed) {
            return Outcome::Stale;
        }
        match signed.verify(&self.swarm) {
            Ok(advert) => self.insert_verified(advert, signed, now_ms),
            Err(e) => Outcome::Refused(e.into()),
        }
    }

    /// Takes in what `signed` was found to say: everything but the signature is checked here. For who
    /// has verified it already, and for simulations, which sign nothing.
    pub fn insert_verified(
        &mut self,
        advert: Advert,
        signed: SignedAdvert,
        now_ms: u64,
    ) -> Outcome {
        let peer = advert.peer;
        if let Some(off_ms) = clock_off(&advert, now_ms) {
            return Outcome::Refused(Refusal::Clock { peer, off_ms });
        }
        let known = self.peers.get(&peer).map(|entry| entry.advert.seq);
        let known = known.max(self.gone.get(&peer).map(|gone| gone.seq));
        if known.is_some_and(|seq| seq >= advert.seq) {
            return Outcome::Stale;
        }
        if advert.leaving {
            self.bury(peer, advert.seq, now_ms);
            return Outcome::Accepted;
        }
        if self.peers.len() >= PEERS_MAX && !self.peers.contains_key(&peer) {
            self.expire(now_ms);
            if self.peers.len() >= PEERS_MAX {
                return Outcome::Refused(Refusal::Full { peer });
            }
        }
        let entry = Entry {
            expires_ms: now_ms.saturating_add(advert.ttl_ms.into()),
            advert: Arc::new(advert),
            signed,
            unreachable: false,
        };
        self.gone.remove(&peer);
        self.peers.insert(peer, entry);
        Outcome::Accepted
    }

    /// Notes whether a peer could be connected to. That it could not holds until it says something newer,
    /// which it does every few seconds while it lives: others may reach it where we do not.
    pub fn note_reachable(&mut self, peer: &Peer, reachable: bool) {
        if let Some(entry) = self.peers.get_mut(peer) {
            entry.unreachable = !reachable;
        }
    }

    /// Who could not be connected to and has been silent since, sorted.
    pub fn unreachable(&self, now_ms: u64) -> Vec<Peer> {
        let silent = self.live(now_ms).filter(|entry| entry.unreachable);
        silent.map(|entry| entry.advert.peer).collect()
    }

    /// Drops what expired; returns who is gone by that.
    pub fn expire(&mut self, now_ms: u64) -> Vec<Peer> {
        let expired = self
            .peers
            .iter()
            .filter(|(_, entry)| entry.expires_ms <= now_ms);
        let expired: Vec<_> = expired
            .map(|(peer, entry)| (*peer, entry.advert.seq))
            .collect();
        for (peer, seq) in &expired {
            self.bury(*peer, *seq, now_ms);
        }
        self.gone.retain(|_, gone| gone.forget_ms > now_ms);
        expired.into_iter().map(|(peer, _)| peer).collect()
    }

    /// A peer's advert, if it has not expired.
    pub fn get(&self, peer: &Peer, now_ms: u64) -> Option<&Arc<Advert>> {
        let entry = self.peers.get(peer)?;
        (entry.expires_ms > now_ms).then_some(&entry.advert)
    }

    /// What has not expired, to plan with.
    pub fn snapshot(&self, now_ms: u64) -> Snapshot {
        let live = self.live(now_ms);
        Snapshot {
            adverts: live.map(|entry| Arc::clone(&entry.advert)).collect(),
            links: Arc::clone(&self.links),
        }
    }

    /// What has not expired, to pass on: not of those who are unreachable, who are probably gone.
    pub fn signed(&self, now_ms: u64) -> Vec<SignedAdvert> {
        self.live(now_ms)
            .filter(|entry| !entry.unreachable)
            .map(|entry| entry.signed.clone())
            .collect()
    }

    fn live(&self, now_ms: u64) -> impl Iterator<Item = &Entry> {
        self.peers
            .values()
            .filter(move |entry| entry.expires_ms > now_ms)
    }

    fn bury(&mut self, peer: Peer, seq: u64, now_ms: u64) {
        self.peers.remove(&peer);
        if self.gone.len() < PEERS_MAX {
            // An advert of that time is refused by its age once this is forgotten.
            let forget_ms = now_ms.saturating_add(2 * CLOCK_SKEW_MS);
            self.gone.insert(peer, Gone { seq, forget_ms });
        }
    }
}

/// The sender's time minus ours, where that is too much.
fn clock_off(advert: &Advert, now_ms: u64) -> Option<i64> {
    let off = i64::try_from(i128::from(advert.seq) - i128::from(now_ms)).unwrap_or(i64::MAX);
    (off.unsigned_abs() > CLOCK_SKEW_MS).then_some(off)
}

impl Snapshot {
    /// A snapshot of these adverts.
    pub fn new(mut adverts: Vec<Arc<Advert>>) -> Snapshot {
        adverts.sort_unstable_by_key(|advert| advert.peer);
        adverts.dedup_by_key(|advert| advert.peer);
        Snapshot {
            adverts,
            links: Arc::default(),
        }
    }

    /// The same peers as they would be if they said something else: what `change` makes of each advert, which
    /// stays its peer's.
    pub fn with(&self, change: impl Fn(&mut Advert)) -> Snapshot {
        let changed = |advert: &Arc<Advert>| {
            let mut changed = Advert::clone(advert);
            change(&mut changed);
            changed.peer = advert.peer;
            Arc::new(changed)
        };
        Snapshot {
            adverts: self.adverts.iter().map(changed).collect(),
            // What is looked up in these is not for those.
            links: Arc::new(self.links.fork()),
        }
    }

    /// What a peer says.
    pub fn get(&self, peer: &Peer) -> Option<&Advert> {
        let at = self
            .adverts
            .binary_search_by_key(peer, |advert| advert.peer);
        Some(&self.adverts[at.ok()?])
    }

    /// What a peer says of a model.
    pub fn of_model(&self, peer: &Peer, model: &ModelId) -> Option<&ModelAdvert> {
        let mut models = self.get(peer)?.models.iter();
        models.find(|other| other.model == *model)
    }

    /// Every model that someone names: its id, layers, and the name given most often. Sorted by id.
    pub fn models(&self) -> Vec<(ModelId, u16, String)> {
        let mut models: BTreeMap<ModelId, BTreeMap<(u16, &str), usize>> = BTreeMap::new();
        for model in self.adverts.iter().flat_map(|advert| &advert.models) {
            let claims = models.entry(model.model).or_default();
            *claims.entry((model.n_layer, &model.name)).or_default() += 1;
        }
        let mut out = Vec::with_capacity(models.len());
        for (id, claims) in models {
            if let Some(((n_layer, name), _)) = claims.into_iter().max_by_key(|claim| claim.1) {
                out.push((id, n_layer, name.to_owned()));
            }
        }
        out
    }

    /// Who serves which layer of a model of `n_layer` layers. Whoever says that it has another
    /// number of them is left out.
    pub fn coverage(&self, model: &ModelId, n_layer: u16) -> Coverage {
        let mut holders = vec![Vec::new(); usize::from(n_layer)];
        for advert in &self.adverts {
            let claims = advert.models.iter();
            let held = claims.filter(|m| m.model == *model && m.n_layer == n_layer);
            for span in LayerRange::merge(held.flat_map(|m| m.live.clone()).collect()) {
                for layer in span.layers() {
                    if let Some(holders) = holders.get_mut(usize::from(layer)) {
                        holders.push(advert.peer);
                    }
                }
            }
        }
        Coverage { holders }
    }
}

impl Coverage {
    /// Layers that nobody serves.
    pub fn gaps(&self) -> Vec<LayerRange> {
        let layers = (0u16..).zip(&self.holders);
        let missing = layers.filter(|(_, holders)| holders.is_empty());
        let single = missing.map(|(layer, _)| LayerRange::one(layer));
        LayerRange::merge(single.collect())
    }

    /// Whether every layer is served.
    pub fn is_complete(&self) -> bool {
        self.holders.iter().all(|holders| !holders.is_empty())
    }
}
