//! The models of a swarm, as the HTTP server asks for them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use api::swarm::{PeerDetail, Seeing, SwarmView, WhyView};
use api::{ApiError, Asked, Embeds, Found, Listed, Models};
use engine::{Pooling, Vocab};
use futures::FutureExt;
use futures::future::BoxFuture;
use node::answer::Source;
use node::control::{self, NodeStatus};
use node::exact_batch;
use node::metrics::Metrics;
use node::{Beginning, SessionSpec};
use shard_registry::Manifest;
use swarm_proto::{ModelId, Numerics, Peer};

use crate::beginnings::Beginnings;
use crate::kept::{Kept, Owner};
use crate::run_report::Privacy;
use crate::session_args::TravelArgs;
use crate::swarm::{Member, longest};

/// Positions of the session that is meant where a peer is looked at: that of a usual question.
pub const CTX_EXPLAINED: u32 = 2048;
/// Descriptions kept: each has a tokenizer of some megabytes.
const DESCRIBED_MAX: usize = 16;

/// A member of the swarm that others ask through.
pub struct Serving {
    /// The member.
    pub member: Member,
    /// How sessions are opened.
    pub travel: TravelArgs,
    /// The model that is meant where a request names none.
    pub model: Option<String>,
    /// How long a request waits for a place.
    pub queue: Duration,
    /// Sessions whose answer is complete.
    kept: Arc<Mutex<Kept<Source>>>,
    /// What these and those that run begin with.
    beginnings: Beginnings,
    described: Mutex<HashMap<ModelId, Described>>,
    /// Held while a description is fetched: a crowd that comes first fetches it once.
    fetching: tokio::sync::Mutex<()>,
}

#[derive(Clone)]
struct Described {
    manifest: Arc<Manifest>,
    vocab: Option<Arc<Vocab>>,
}

impl Serving {
    /// Nothing is fetched yet.
    pub fn new(
        member: Member,
        travel: TravelArgs,
        model: Option<String>,
        queue: Duration,
        keep: Duration,
    ) -> Self {
        Self {
            member,
            travel,
            model,
            queue,
            kept: Arc::new(Mutex::new(Kept::new(keep))),
            beginnings: Beginnings::default(),
            described: Mutex::new(HashMap::new()),
            fetching: tokio::sync::Mutex::new(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ModelId, Described>> {
        lock(&self.described)
    }

    fn known(&self, id: ModelId) -> Option<Described> {
        self.lock().get(&id).cloned()
    }

    async fn described(&self, id: ModelId) -> Result<Described, ApiError> {
        if let Some(known) = self.known(id) {
            return Ok(known);
        }
        let _fetching = self.fetching.lock().await;
        if let Some(known) = self.known(id) {
            return Ok(known);
        }
        let found = self.member.described(&id).await;
        let (manifest, vocab) =
            found.map_err(|error| ApiError::unavailable(format!("{error:#}")))?;
        let described = Described {
            manifest: Arc::new(manifest),
            vocab: vocab.map(Arc::new),
        };
        let mut all = self.lock();
        if all.len() >= DESCRIBED_MAX {
            all.clear();
        }
        all.insert(id, described.clone());
        Ok(described)
    }

    /// What is known of a peer, and whether a session of this model would use it.
    async fn looked_at(&self, peer: &str, asked: Option<&str>) -> Result<PeerDetail, ApiError> {
        let id: Peer = peer.parse().map_err(|_| ApiError::no_peer(peer))?;
        let client = &self.member.client;
        let mut detail = PeerDetail::of(client, &id)?;
        let why = async {
            let model = self.found(asked).await?;
            let n_ctx = CTX_EXPLAINED.min(model.n_ctx_max);
            let spec = self.spec(&model, n_ctx).await?;
            Ok(WhyView::of(client, &spec, &id))
        };
        let why: Result<WhyView, ApiError> = why.await;
        let unknown = |error: ApiError| WhyView::unknown(asked.unwrap_or_default(), &error);
        detail.why = Some(why.unwrap_or_else(unknown));
        Ok(detail)
    }

    /// A session of a model.
    async fn spec(&self, model: &Found, n_ctx: u32) -> Result<SessionSpec, ApiError> {
        let id: ModelId = model
            .id
            .parse()
            .map_err(|_| ApiError::internal("a model without an id"))?;
        let manifest = self.described(id).await?.manifest;
        Ok(self.travel.ask(n_ctx, USUAL).spec(id, &manifest))
    }

    async fn found(&self, asked: Option<&str>) -> Result<Arc<Found>, ApiError> {
        let served = self.member.report().models;
        let meant = self.member.meant(asked.or(self.model.as_deref()), &served);
        let (id, name) = match meant {
            Ok(meant) => meant,
            Err(why) if served.is_empty() => return Err(ApiError::unavailable(why.to_string())),
            Err(why) => return Err(ApiError::unknown_model(why.to_string())),
        };
        let described = self.described(id).await?;
        let report = served.iter().find(|model| model.id == id);
        Ok(Arc::new(Found {
            id: id.to_string(),
            name,
            n_ctx_max: longest(&described.manifest, report),
            embeds: embeds(&described.manifest),
            vocab: described.vocab,
        }))
    }

    /// A session for who asks this, which begins with what another one of theirs has computed, where there is one.
    async fn opened_for(
        &self,
        model: &Found,
        asked: Asked<'_>,
        n_ctx: u32,
    ) -> Result<Source, ApiError> {
        let Ok(id) = model.id.parse() else {
            return self.opened(model, n_ctx, None).await;
        };
        let owner = (id, asked.caller);
        let (lender, begun) = self.beginnings.enter(owner, asked.prompt).await;
        let mut source = self.opened(model, n_ctx, begun).await?;
        source.lend(lender);
        Ok(source)
    }

    async fn opened(
        &self,
        model: &Found,
        n_ctx: u32,
        begun: Option<(Beginning, u32)>,
    ) -> Result<Source, ApiError> {
        // What hops allocate anyway, so that the next turn has room, too.
        let n_ctx = n_ctx
            .checked_next_power_of_two()
            .unwrap_or(n_ctx)
            .min(model.n_ctx_max);
        let spec = self.spec(model, n_ctx).await?;
        let client = &self.member.client;
        if let Some((beginning, common)) = begun {
            match client.fork(&spec, &beginning, common).await {
                Ok(session) => return Ok(Source::swarm(session, spec.batch, None)),
                // Another route, perhaps, and all of the prompt.
                Err(why) => tracing::debug!(%why, "a session was not forked"),
            }
        }
        // Others wait for what we only keep.
        let kept = Arc::clone(&self.kept);
        let busy = move |_: &[swarm_proto::LayerRange]| drop(lock(&kept).clear());
        let session = client.open_waiting(&spec, self.queue, busy).await?;
        Ok(Source::swarm(session, spec.batch, None))
    }
}

/// How the model makes one vector of a text, as its settings say.
fn embeds(manifest: &Manifest) -> Result<Embeds, String> {
    let key = format!("{}.pooling_type", manifest.arch);
    let mut settings = manifest.kv.iter();
    let value = settings.find(|(name, _)| *name == key);
    match Pooling::of_value(value.map(|(_, value)| value)) {
        Ok(Some(pooling)) => Ok(Embeds {
            pooling,
            n_embd: manifest.n_embd,
        }),
        Ok(None) => Err(format!(
            "its file has no {key}, which says how rows make one vector"
        )),
        Err(why) => Err(format!("{key}: {why}")),
    }
}

impl Seeing for Serving {
    fn swarm(&self) -> SwarmView {
        SwarmView::of(&self.member.client)
    }

    fn peer<'a>(
        &'a self,
        peer: &'a str,
        model: Option<&'a str>,
    ) -> BoxFuture<'a, Result<PeerDetail, ApiError>> {
        self.looked_at(peer, model).boxed()
    }

    fn node(&self) -> BoxFuture<'_, Option<NodeStatus>> {
        node_of(self.member.settings.home.clone()).boxed()
    }
}

/// How the node of a home is, where one runs.
pub async fn node_of(home: PathBuf) -> Option<NodeStatus> {
    let asked = tokio::task::spawn_blocking(move || control::ask(&home, &control::Request::Status));
    asked.await.ok()?.ok()
}

/// What sessions are where nothing is said: many users ask at once.
const USUAL: Numerics = Numerics::Fast;

impl Serving {
    /// Whose a kept session is; none where it is not kept. A row has other bits where it was computed in another
    /// portion, for some types: then exact sessions begin anew.
    fn owner(&self, model: &Found, asked: Asked<'_>) -> Option<Owner> {
        let id = model.id.parse().ok()?;
        let manifest = self.known(id)?.manifest;
        let exact_types = exact_batch(manifest.tensors.iter().map(|tensor| tensor.ty)) > 1;
        let fast = self.travel.numerics.unwrap_or(USUAL) == Numerics::Fast;
        (exact_types || fast).then_some((id, asked.caller))
    }

    /// Says goodbye to all that is kept.
    pub async fn forget(&self) {
        let gone = lock(&self.kept).clear();
        futures::future::join_all(gone.into_iter().map(Source::close)).await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Single pushes and removals: no invariant spans a panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Models for Serving {
    fn listed(&self) -> Vec<Listed> {
        let served = self.member.report().models;
        let whole = served.into_iter().filter(|model| model.complete);
        let listed = |model: crate::swarm_report::ModelReport| Listed {
            n_ctx: model.n_ctx_max(),
            id: model.id.to_string(),
            name: model.name,
            n_layer: model.n_layer,
        };
        whole.map(listed).collect()
    }

    fn peers(&self) -> usize {
        self.member.client.net().peers().borrow().len()
    }

    fn find<'a>(&'a self, asked: Option<&'a str>) -> BoxFuture<'a, Result<Arc<Found>, ApiError>> {
        self.found(asked).boxed()
    }

    fn open<'a>(&'a self, model: &'a Found, n_ctx: u32) -> BoxFuture<'a, Result<Source, ApiError>> {
        self.opened(model, n_ctx, None).boxed()
    }

    fn open_for<'a>(
        &'a self,
        model: &'a Found,
        asked: Asked<'a>,
        n_ctx: u32,
    ) -> BoxFuture<'a, Result<Source, ApiError>> {
        self.opened_for(model, asked, n_ctx).boxed()
    }

    fn metrics(&self) -> Metrics {
        self.member.metrics.clone()
    }

    fn kept(&self, model: &Found, asked: Asked<'_>, n_ctx: u32) -> Option<Source> {
        let owner = self.owner(model, asked)?;
        lock(&self.kept).take(owner, asked.prompt, n_ctx)
    }

    fn keep<'a>(&'a self, model: &'a Found, asked: Asked<'a>, source: Source) -> BoxFuture<'a, ()> {
        async move {
            let Some(owner) = self.owner(model, asked) else {
                return source.close().await;
            };
            let (gone, time) = {
                let mut kept = lock(&self.kept);
                let gone = kept.keep(owner, source, asked.prompt.len(), Instant::now());
                (gone, kept.time())
            };
            let kept = Arc::clone(&self.kept);
            tokio::spawn(async move {
                futures::future::join_all(gone.into_iter().map(Source::close)).await;
                tokio::time::sleep(time).await;
                let over = lock(&kept).expired(Instant::now());
                futures::future::join_all(over.into_iter().map(Source::close)).await;
            });
        }
        .boxed()
    }

    fn privacy(&self) -> &'static str {
        match self.member.privacy() {
            Privacy::Open => "open",
            Privacy::Trusted => "trusted",
            Privacy::Local => "local",
        }
    }

    fn wire(&self) -> String {
        self.travel.wire.to_string()
    }
}
