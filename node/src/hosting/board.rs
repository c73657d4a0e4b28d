//! What the advert says of the models that this node serves: one announcement for all of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use engine::{ExpertWorker, Worker};
use shard_registry::{Store, placement::experts::Expert};
use swarm_proto::{
    ExpertSpan, ExpertsAdvert, LayerRange, Measured, ModelAdvert, ModelId, advert::ADVERT_SPANS_MAX,
};
use tokio::time::timeout;

use super::span;
use crate::{
    experts::Island,
    load::Found,
    measure::Speed,
    net::{Announcement, Net},
    pause::Pause,
    session::Sessions,
    swarm_node::blocking,
};

/// How long an advert may take to be said: the pause between two is half a second.
const SAID: Duration = Duration::from_secs(2);

/// Clones share it.
#[derive(Clone)]
pub(crate) struct Board {
    net: Net,
    store: Store,
    pause: Pause,
    claims: Arc<Mutex<BTreeMap<ModelId, Claim>>>,
}

/// What is said of one model.
struct Claim {
    name: String,
    n_layer: u16,
    n_embd: u32,
    /// Layers that are to be served; none where it holds experts only.
    window: Option<LayerRange>,
    layer_bytes_max: Option<u64>,
    /// Layers that others can have from here.
    stored: Vec<LayerRange>,
    serving: Option<Serving>,
    /// Served still, and about to leave.
    leaving: Option<LayerRange>,
    /// Experts that are to be computed here, and that are, for the trunks of others.
    experts: Option<Experts>,
}

/// What is said of experts that are held here.
#[derive(Clone, Default)]
pub(crate) struct Experts {
    pub(crate) intended: Vec<ExpertSpan>,
    pub(crate) live: Vec<ExpertSpan>,
    pub(crate) worker: Option<Arc<ExpertWorker>>,
}

/// Where the figures come from.
#[derive(Clone)]
pub(crate) struct Serving {
    pub(crate) worker: Worker,
    pub(crate) speed: Speed,
    pub(super) threads: u32,
    /// Who computes the experts of its layers, where it does not.
    pub(crate) island: Option<Arc<Island>>,
}

/// A model of which something is served, for its owner to see.
pub(crate) struct Model {
    pub(crate) id: ModelId,
    pub(crate) name: String,
    pub(crate) n_layer: u16,
    pub(crate) window: Option<LayerRange>,
    pub(crate) serving: Option<Serving>,
    pub(crate) experts: Option<Experts>,
}

impl Model {
    /// Whether its stage worker runs, if it has one.
    pub(crate) fn is_alive(&self) -> bool {
        let worker = self.serving.as_ref().map(|serving| &serving.worker);
        worker.is_none_or(Worker::is_alive)
    }
}

impl Board {
    pub(crate) fn new(net: Net, store: Store, pause: Pause) -> Self {
        Self {
            net,
            store,
            pause,
            claims: Arc::default(),
        }
    }

    /// A window of a model is to be served; `layer_bytes_max` as in [`ModelAdvert::layer_bytes_max`].
    pub(super) async fn intends(
        &self,
        found: &Found,
        window: LayerRange,
        layer_bytes_max: Option<u64>,
    ) {
        let claim = Claim {
            window: Some(window),
            layer_bytes_max,
            ..self.claim(found).await
        };
        self.lock().insert(found.id, claim);
        self.publish().await;
    }

    /// Experts of a model are to be computed.
    pub(super) async fn intends_experts(&self, found: &Found, intended: &BTreeSet<Expert>) {
        let intended = ExpertSpan::of(intended.iter().copied());
        let experts = Experts {
            intended,
            ..Experts::default()
        };
        let claim = Claim {
            experts: Some(experts),
            ..self.claim(found).await
        };
        self.lock().insert(found.id, claim);
        self.publish().await;
    }

    /// This worker is to compute them.
    pub(super) fn computes(&self, model: &ModelId, worker: &Arc<ExpertWorker>) {
        self.change_experts(model, |experts| experts.worker = Some(Arc::clone(worker)));
    }

    /// Which experts are to be computed, and which are.
    pub(super) async fn has_experts(
        &self,
        model: &ModelId,
        intended: &BTreeSet<Expert>,
        live: &BTreeSet<Expert>,
    ) {
        self.change_experts(model, |experts| {
            experts.intended = ExpertSpan::of(intended.iter().copied());
            experts.live = ExpertSpan::of(live.iter().copied());
        });
        self.publish().await;
    }

    fn change_experts(&self, model: &ModelId, change: impl FnOnce(&mut Experts)) {
        let mut claims = self.lock();
        let claim = claims.get_mut(model);
        if let Some(experts) = claim.and_then(|claim| claim.experts.as_mut()) {
            change(experts);
        }
    }

    /// What can be said of any model.
    async fn claim(&self, found: &Found) -> Claim {
        Claim {
            name: found.name.clone(),
            n_layer: found.manifest.n_layer,
            n_embd: found.manifest.n_embd,
            window: None,
            layer_bytes_max: None,
            stored: self.stored(found.id).await,
            serving: None,
            leaving: None,
            experts: None,
        }
    }

    /// Another window of it is.
    pub(super) async fn moves(&self, model: &ModelId, window: LayerRange) {
        if let Some(claim) = self.lock().get_mut(model) {
            claim.window = Some(window);
        }
        self.publish().await;
    }

    /// Its first layers are served. Returns when that was said: adverts follow each other with a pause, and whoever is
    /// told that this node is ready shall find it so.
    pub(super) async fn serves(&self, model: &ModelId, serving: Serving) {
        if let Some(claim) = self.lock().get_mut(model) {
            claim.serving = Some(serving);
        }
        let mut changes = self.net.adverts().changes();
        self.publish().await;
        let me = self.net.me();
        let said = async {
            while self.pause.now().is_none() {
                let snapshot = self.net.adverts().snapshot();
                let own = snapshot.of_model(&me, model);
                if own.is_some_and(|own| !own.live.is_empty()) || changes.changed().await.is_err() {
                    return;
                }
            }
        };
        let _ = timeout(SAID, said).await;
    }

    /// Layers that are said to be served no more, although they still are.
    pub(super) async fn leaves(&self, model: &ModelId, layers: Option<LayerRange>) {
        if let Some(claim) = self.lock().get_mut(model) {
            claim.leaving = layers;
        }
        self.publish().await;
    }

    /// Looks again what is in the store, and publishes.
    pub(crate) async fn refresh(&self) {
        let models: Vec<ModelId> = self.lock().keys().copied().collect();
        for model in models {
            let stored = self.stored(model).await;
            if let Some(claim) = self.lock().get_mut(&model) {
                claim.stored = stored;
            }
        }
        self.publish().await;
    }

    /// Says it as it is now.
    pub(crate) async fn publish(&self) {
        let announcement = self.announcement();
        self.net.publish(announcement).await;
    }

    /// Whether this node serves others just now.
    pub(super) fn pause(&self) -> &Pause {
        &self.pause
    }

    /// The models that are served.
    pub(crate) fn models(&self) -> Vec<Model> {
        let model = |(id, claim): (&ModelId, &Claim)| {
            let experts = claim.experts.clone();
            let experts = experts.filter(|experts| experts.worker.is_some());
            let some = claim.serving.is_some() || experts.is_some();
            some.then(|| Model {
                id: *id,
                name: claim.name.clone(),
                n_layer: claim.n_layer,
                window: claim.window,
                serving: claim.serving.clone(),
                experts,
            })
        };
        self.lock().iter().filter_map(model).collect()
    }

    /// Has those sessions go on elsewhere whose layers others serve, too; how many they are.
    pub(crate) fn hand_over(&self, sessions: &Sessions) -> usize {
        let (me, snapshot) = (self.net.me(), self.net.adverts().snapshot());
        let others = snapshot.adverts.iter().filter(|advert| advert.peer != me);
        let others: Vec<&ModelAdvert> = others.flat_map(|advert| &advert.models).collect();
        let models: Vec<ModelId> = self.lock().keys().copied().collect();
        let handed = models.iter().map(|model| {
            let live = others.iter().filter(|other| other.model == *model);
            let live: Vec<&LayerRange> = live.flat_map(|other| &other.live).collect();
            let served = |layer: u16| live.iter().any(|span| span.contains(layer));
            sessions.hand_over(model, |span| span.layers().all(served))
        });
        handed.sum()
    }

    fn announcement(&self) -> Announcement {
        if self.pause.now().is_some() {
            // Nothing live and nothing to come: others go around us, and see that layers are missing.
            return Announcement::default();
        }
        let claims = self.lock();
        let queued = claims
            .values()
            .filter_map(|claim| Some(claim.serving.as_ref()?.worker.queued()));
        Announcement {
            uplink_bytes_s: self.net.uplink(),
            queue: u16::try_from(queued.sum::<usize>()).unwrap_or(u16::MAX),
            models: claims.iter().map(|(id, claim)| claim.advert(*id)).collect(),
        }
    }

    /// As many spans as an advert holds.
    async fn stored(&self, model: ModelId) -> Vec<LayerRange> {
        let store = self.store.clone();
        let here = blocking(move || store.here(model)).await;
        let mut layers = here.map_or_else(|_| Ok(Vec::new()), |here| here.map(|here| here.layers));
        if let Ok(layers) = &mut layers {
            layers.truncate(ADVERT_SPANS_MAX);
        }
        layers.unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ModelId, Claim>> {
        // Each change is one assignment: no invariant spans a panic.
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim {
    fn advert(&self, model: ModelId) -> ModelAdvert {
        let mut advert = ModelAdvert {
            model,
            name: self.name.clone(),
            n_layer: self.n_layer,
            live: Vec::new(),
            intended: self.window.into_iter().collect(),
            layer_tokens_s: None,
            n_ctx_max: 0,
            free_cells: 0,
            n_embd: self.n_embd,
            numerics: 0,
            stored: self.stored.clone(),
            layer_bytes_max: self.layer_bytes_max,
            experts: None,
        };
        if let Some(Serving {
            worker,
            speed,
            threads,
            island,
        }) = &self.serving
        {
            let stats = worker.stats();
            let stays = |layer: &u16| self.leaving.is_none_or(|leaving| !leaving.contains(*layer));
            let held = stats.held.spans().iter().map(span);
            let whole = |layer: &u16| island.as_ref().is_none_or(|island| island.covers(*layer));
            let live = held.flat_map(|span| span.layers());
            let live = live.filter(stays).filter(whole);
            advert.live = LayerRange::merge(live.map(LayerRange::one).collect());
            advert.layer_tokens_s = speed.get();
            advert.n_ctx_max = worker.shape().n_ctx_max;
            let layers = u64::from(stats.held.n_layers());
            advert.free_cells = stats.free_cells.saturating_mul(layers);
            advert.numerics = engine::numerics_class(*threads);
            advert.experts = island.as_ref().map(|island| ExpertsAdvert {
                island: island.peers(),
                hot: island.hot(),
                ..ExpertsAdvert::default()
            });
        }
        if let Some(experts) = &self.experts {
            let stats = experts.worker.as_ref().map(|worker| worker.stats());
            let rows_s = stats.and_then(|stats| stats.rows_s);
            advert.numerics = engine::expert_numerics_class();
            advert.experts = Some(ExpertsAdvert {
                live: experts.live.clone(),
                intended: experts.intended.clone(),
                rows_s: rows_s.map(|(value, at)| Measured {
                    value: value as f32,
                    age_s: u32::try_from(at.elapsed().as_secs()).unwrap_or(u32::MAX),
                }),
                ..ExpertsAdvert::default()
            });
        }
        advert
    }
}
