//! From what is known of the swarm to a session: plans a route, opens it, and gives what is needed to
//! do so again when a hop is lost.
//!
//! ```text
//! View (adverts, round trips) ─▶ plan ─▶ Opener ─▶ Session (recovery), which plans again
//! ```
//!
//! It names no network: `Net` is one view and one dialler, a simulated swarm another.

use std::{sync::Arc, time::Duration};

use gguf::TensorType;
use shard_registry::{
    Manifest, Snapshot,
    route::{
        Doubt, NoStandby, Other, Priced, Query, doubts, others, plan, price, seen_at_least, spread,
        standbys, why_no_standby,
    },
};
use swarm_proto::{
    Advert, Dtype, Hop, LayerRange, ModelId, Numerics, Peer, Standby, Standbys,
    session::STANDBYS_MAX,
};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use crate::{
    net::Net,
    peer_book::PeerBook,
    recovery::Session,
    session::{Beginning, ClientError, Kind, Opener, Route},
};

/// Gossip may still be on its way when a first plan finds a gap: planning waits this long for it.
const PATIENCE: Duration = Duration::from_secs(2);
/// How much dearer a peer's compute may be drawn, so that clients with the same view spread.
const JITTER: f32 = 0.3;

/// Rows decoded one by one that a standby gets at once: it is at most so many steps behind, and reads its
/// weights once for all of them.
const STANDBY_BATCH: u16 = 16;

/// More than every layer of any model takes for the longest context.
const FREE_CELLS_IDLE: u64 = 1 << 48;

/// What a client knows of the swarm.
pub trait View: Send + Sync + 'static {
    /// Everything known to be alive, for planning.
    fn adverts(&self) -> Snapshot;

    /// Changes whenever the adverts do.
    fn changes(&self) -> watch::Receiver<u64>;

    /// The round trips measured from here.
    fn rtts(&self) -> Vec<(Peer, Duration)>;

    /// Who could not be connected to from here and has been silent since.
    fn unreachable(&self) -> Vec<Peer>;

    /// Finds out, in the background, whether a peer that another one lost is unreachable from here, too.
    fn look_for(&self, peer: Peer);
}

impl View for Net {
    fn adverts(&self) -> Snapshot {
        Net::adverts(self).snapshot()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        Net::adverts(self).changes()
    }

    fn rtts(&self) -> Vec<(Peer, Duration)> {
        // Nearest of all is what this machine serves itself.
        let mut rtts = Net::rtts(self);
        rtts.push((self.me(), Duration::ZERO));
        rtts
    }

    fn unreachable(&self) -> Vec<Peer> {
        Net::adverts(self).unreachable()
    }

    fn look_for(&self, peer: Peer) {
        Net::look_for(self, peer);
    }
}

/// Whom the hidden states may pass, from which a prompt can be reconstructed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Privacy {
    /// Any peer of the swarm.
    #[default]
    Open,
    /// Only these peers.
    Trusted(Vec<Peer>),
}

impl std::fmt::Display for Privacy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Privacy::Open => "open",
            Privacy::Trusted(_) => "trusted",
        })
    }
}

/// What kind of session to open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionSpec {
    /// The model.
    pub model: ModelId,
    /// Its layers, from the manifest: adverts are not believed on this.
    pub n_layer: u16,
    /// Numbers in a hidden row, from the manifest.
    pub n_embd: u32,
    /// Floats in a logits row.
    pub n_vocab: u32,
    /// Positions that the session must hold.
    pub n_ctx: u32,
    /// How hidden states travel between hops.
    pub dtype: Dtype,
    /// What may be done with its numbers.
    pub numerics: Numerics,
    /// Peers not to use.
    pub avoid: Vec<Peer>,
    /// Whether other holders of the hops' layers are fed along, to take over at once.
    pub standby: bool,
    /// Decoded rows that a standby may compute as one step: the kernels of the model's types give them
    /// the same bits.
    pub batch: u16,
    /// How long an open session waits, without any progress, for a route to come back.
    pub patience: Duration,
}

impl SessionSpec {
    /// How long a lost route is waited for where nobody says: as long as a machine takes to start again and
    /// load its layers.
    pub const PATIENCE: Duration = Duration::from_secs(60);

    /// A session of `n_ctx` positions with exact hidden states.
    pub fn new(model: ModelId, manifest: &Manifest, n_ctx: u32) -> Self {
        Self {
            model,
            n_layer: manifest.n_layer,
            n_embd: manifest.n_embd,
            n_vocab: manifest.n_vocab,
            n_ctx,
            dtype: Dtype::F32,
            numerics: Numerics::Exact,
            avoid: Vec::new(),
            standby: true,
            batch: exact_batch(manifest.tensors.iter().map(|tensor| tensor.ty)),
            patience: Self::PATIENCE,
        }
    }

    fn kind(&self) -> Kind {
        Kind {
            model: self.model,
            n_ctx: self.n_ctx,
            dtype: self.dtype,
            n_embd: self.n_embd,
            numerics: self.numerics,
            n_vocab: self.n_vocab,
        }
    }
}

/// Decoded rows that may be computed again as one step, with the same bits as one by one, by the kernels
/// of this build for a model of these types: seen in frames of less than 64 rows, not for the K quants.
pub fn exact_batch(mut types: impl Iterator<Item = TensorType>) -> u16 {
    if types.all(|ty| matches!(ty, TensorType::F32 | TensorType::Q8_0 | TensorType::Q4_0)) {
        STANDBY_BATCH
    } else {
        1
    }
}

/// The route that would be taken now, and why.
#[derive(Debug)]
pub struct Explained {
    /// The route, or why there is none.
    pub hops: Result<Vec<Hop>, ClientError>,
    /// What it costs by the adverts; `None` without a route.
    pub priced: Option<Priced>,
    /// For each hop who would stand by, or why nobody.
    pub standbys: Vec<Result<Peer, NoStandby>>,
    /// Everybody else who names the model.
    pub others: Vec<Other>,
    /// Whose claims are not counted as they stand, because they were seen to be slower.
    pub doubts: Vec<Doubt>,
    /// By the adverts nobody has room for some layers, so it is planned as if they had.
    pub as_if_idle: bool,
}

/// What was measured from here.
struct Measured {
    /// Round trips, in µs.
    rtts: Vec<(Peer, u32)>,
    /// Layer-tokens a second that peers showed.
    seen: Vec<(Peer, f32)>,
}

/// Plans routes and opens sessions along them; clones share the view.
#[derive(Clone)]
pub struct Routes {
    view: Arc<dyn View>,
    privacy: Privacy,
    opener: Opener,
}

impl Routes {
    /// Routes over what `view` knows, opened by `opener`.
    pub fn new(view: Arc<dyn View>, privacy: Privacy, opener: Opener) -> Self {
        Self {
            view,
            privacy,
            opener,
        }
    }

    pub(crate) fn keep_book(&mut self, book: PeerBook) {
        self.opener.book = book;
    }

    pub(crate) fn view(&self) -> &dyn View {
        &*self.view
    }

    pub(crate) fn privacy(&self) -> &Privacy {
        &self.privacy
    }

    pub(crate) fn opener(&self) -> &Opener {
        &self.opener
    }

    /// As [`crate::Client::open_waiting`].
    ///
    /// # Errors
    /// As there.
    pub async fn open_waiting(
        &self,
        spec: &SessionSpec,
        patience: Duration,
        busy: impl FnOnce(&[LayerRange]),
    ) -> Result<Session, ClientError> {
        self.wait_for_route(spec).await;
        let seed = self.opener.random.u64();
        let kind = spec.kind();
        let opened = self
            .opener
            .open_waiting(
                kind,
                patience,
                |avoid| {
                    let (hops, _) = self.plan_well(&self.view.adverts(), spec, avoid, seed)?;
                    let standbys = self.standbys(spec, &hops, avoid, &Route::default());
                    Ok(Route { hops, standbys })
                },
                busy,
            )
            .await?;
        Ok(Session::new(self.clone(), spec.clone(), opened))
    }

    /// As [`crate::Client::fork`].
    ///
    /// # Errors
    /// As there.
    pub async fn fork(
        &self,
        spec: &SessionSpec,
        of: &Beginning,
        positions: u32,
    ) -> Result<Session, ClientError> {
        let hops = of.route().hops.clone();
        let standbys = self.standbys(spec, &hops, &[], of.route());
        let route = Route { hops, standbys };
        let forked = self.opener.fork(spec.kind(), route, of, positions).await?;
        Ok(Session::new(self.clone(), spec.clone(), forked))
    }

    /// A route without those who had better be left alone, unless there is no other; and who was left alone.
    fn plan_well(
        &self,
        snapshot: &Snapshot,
        spec: &SessionSpec,
        avoid: &[Peer],
        seed: u64,
    ) -> Result<(Vec<Hop>, Vec<Peer>), ClientError> {
        let alone = self.left_alone();
        match self.plan_in(snapshot, spec, &[avoid, &alone].concat(), seed) {
            Ok(hops) => Ok((hops, alone)),
            Err(none) if alone.is_empty() => Err(none),
            Err(_) => Ok((self.plan_in(snapshot, spec, avoid, seed)?, Vec::new())),
        }
    }

    /// Who is left alone after failures, and who seems to be gone, those first who may be asked again first.
    pub(crate) fn left_alone(&self) -> Vec<Peer> {
        let mut alone = self.opener.book.left_alone();
        let gone = self.view.unreachable().into_iter();
        let gone: Vec<Peer> = gone.filter(|peer| !alone.contains(peer)).collect();
        alone.extend(gone);
        alone
    }

    /// The route that a session would be opened along now, with the planner's reasons. Like opening one, it
    /// draws among routes that are about as cheap.
    pub fn explain(&self, spec: &SessionSpec, seed: u64) -> Explained {
        let mut snapshot = self.view.adverts();
        let (hops, left_alone) = match self.plan_well(&snapshot, spec, &[], seed) {
            Ok((hops, left_alone)) => (Ok(hops), left_alone),
            Err(none) => (Err(none), Vec::new()),
        };
        let avoid: Vec<Peer> = spec.avoid.iter().chain(&left_alone).copied().collect();
        let measured = self.measured(spec);
        let query = self.query(spec, &avoid, &measured);
        let route = hops.as_deref().ok();
        let mut priced = route.and_then(|hops| price(&snapshot, &query, hops));
        let as_if_idle = route.is_some() && priced.is_none();
        let others = others(&snapshot, &query, route);
        if as_if_idle {
            snapshot = idle(&snapshot);
            priced = route.and_then(|hops| price(&snapshot, &query, hops));
        }
        let route = route.unwrap_or_default();
        let found = self.standbys(spec, route, &[], &Route::default());
        let standby = |at: usize| {
            let mut peers = found.peers.iter();
            let standby = peers.find(|standby| usize::from(standby.at) == at);
            let peer = standby.map(|standby| standby.peer);
            peer.ok_or_else(|| why_no_standby(&self.view.adverts(), &query, route, at))
        };
        let standbys = (0..route.len()).map(standby).collect();
        Explained {
            doubts: doubts(&snapshot, &query),
            standbys,
            priced,
            others,
            as_if_idle,
            hops,
        }
    }

    /// The route that would be taken now, without the peers to avoid. Where the adverts
    /// leave none with room, one as if all had: adverts are some seconds old, and hops say it themselves.
    ///
    /// # Errors
    /// There is none.
    pub fn plan(
        &self,
        spec: &SessionSpec,
        avoid: &[Peer],
        seed: u64,
    ) -> Result<Vec<Hop>, ClientError> {
        self.plan_in(&self.view.adverts(), spec, avoid, seed)
    }

    pub(crate) fn plan_in(
        &self,
        snapshot: &Snapshot,
        spec: &SessionSpec,
        avoid: &[Peer],
        seed: u64,
    ) -> Result<Vec<Hop>, ClientError> {
        let avoid: Vec<Peer> = spec.avoid.iter().chain(avoid).copied().collect();
        let measured = self.measured(spec);
        let query = Query {
            jitter: JITTER,
            seed,
            ..self.query(spec, &avoid, &measured)
        };
        let planned = match spread(snapshot, &query) {
            Err(none) if !none.full.is_empty() => spread(&idle(snapshot), &query),
            planned => planned,
        };
        match planned {
            Ok(route) => Ok(route.hops),
            Err(none) => Err(self
                .untrusted(snapshot, &query)
                .unwrap_or(ClientError::NoRoute(none))),
        }
    }

    /// Who stands by on a route, as far as there is somebody; who did so `before` goes on. Who failed another
    /// session is better than nobody.
    pub(crate) fn standbys(
        &self,
        spec: &SessionSpec,
        hops: &[Hop],
        avoid: &[Peer],
        before: &Route,
    ) -> Standbys {
        if !spec.standby {
            return Standbys::default();
        }
        let gone = self.view.unreachable();
        let never: Vec<Peer> = [&spec.avoid, avoid, &gone].concat();
        let alone = self.opener.book.left_alone();
        let (measured, snapshot) = (self.measured(spec), self.view.adverts());
        let found = |avoid: &[Peer]| standbys(&snapshot, &self.query(spec, avoid, &measured), hops);
        let any = found(&never);
        let good = match alone.is_empty() {
            true => any.clone(),
            false => found(&[&never[..], &alone].concat()),
        };
        let on_the_route = hops.iter().map(|hop| hop.peer);
        let mut taken: Vec<Peer> = on_the_route.chain(never.iter().copied()).collect();
        let mut peers = Vec::new();
        for ((at, hop), (good, any)) in (0u8..).zip(hops).zip(good.into_iter().zip(any)) {
            let before = before.standby_for(hop.layers).into_iter();
            let mut candidates = before.chain(good).chain(any);
            let free = candidates.find(|hop| !taken.contains(&hop.peer));
            if let Some(Hop { peer, addrs, .. }) = free {
                taken.push(peer);
                peers.push(Standby { at, peer, addrs });
            }
        }
        peers.truncate(STANDBYS_MAX);
        Standbys {
            peers,
            batch: spec.batch,
        }
    }

    /// A token of a session along `hops` took `step`: the hops had at least some speed each.
    pub(crate) fn saw(&self, spec: &SessionSpec, hops: &[Hop], step: Duration) {
        let measured = self.measured(spec);
        let query = self.query(spec, &[], &measured);
        let seen = seen_at_least(&self.view.adverts(), &query, hops, step);
        for (peer, speed) in seen {
            self.opener.book.experience().note(peer, spec.model, speed);
        }
    }

    fn measured(&self, spec: &SessionSpec) -> Measured {
        let micros = |d: Duration| u32::try_from(d.as_micros()).unwrap_or(u32::MAX);
        let rtts = self.view.rtts().into_iter();
        Measured {
            rtts: rtts.map(|(peer, rtt)| (peer, micros(rtt))).collect(),
            seen: self.opener.book.experience().seen(&spec.model),
        }
    }

    fn query<'a>(
        &'a self,
        spec: &SessionSpec,
        avoid: &'a [Peer],
        measured: &'a Measured,
    ) -> Query<'a> {
        Query {
            frame_bytes: spec.dtype.row_len(spec.n_embd) as u64,
            n_ctx: spec.n_ctx,
            avoid,
            allow: match &self.privacy {
                Privacy::Open => None,
                Privacy::Trusted(list) => Some(list),
            },
            rtts: &measured.rtts,
            seen: &measured.seen,
            ..Query::new(spec.model, spec.n_layer)
        }
    }

    /// The list is what is missing: everybody together could do it.
    fn untrusted(&self, snapshot: &Snapshot, query: &Query<'_>) -> Option<ClientError> {
        let Privacy::Trusted(list) = &self.privacy else {
            return None;
        };
        let all = Query {
            allow: None,
            ..query.clone()
        };
        let missing = plan(snapshot, query).err()?.missing;
        plan(snapshot, &all).ok()?;
        let holds = |a: &Advert| -> Vec<LayerRange> {
            let of_model = a.models.iter().filter(|m| m.model == query.model);
            of_model.flat_map(|m| m.live.iter().copied()).collect()
        };
        let meets = |a: &LayerRange| missing.iter().any(|b| a.meets(*b));
        let others = snapshot
            .adverts
            .iter()
            .filter(|a| !list.contains(&a.peer))
            .map(|a| (a.peer, holds(a)))
            .filter(|(_, layers)| layers.iter().any(meets))
            .collect();
        Some(ClientError::Untrusted { missing, others })
    }

    async fn wait_for_route(&self, spec: &SessionSpec) {
        let deadline = Instant::now() + PATIENCE;
        let mut changes = self.view.changes();
        while self.plan(spec, &[], 0).is_err() {
            match timeout_at(deadline, changes.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return,
            }
        }
    }
}

/// The same peers, with room for any session.
fn idle(snapshot: &Snapshot) -> Snapshot {
    snapshot.with(|advert| {
        for model in &mut advert.models {
            model.free_cells = FREE_CELLS_IDLE;
        }
    })
}
