//! How a node comes by its model and its layers: what is here at once, the rest from peers, the scarcest layer first,
//! each served as soon as it is verified.
//!
//! ```text
//! locate: here ─────────────────────────▶ Found      Growth: layers that are here ─▶ one load for each span
//!         └ what peers say ─▶ described ──┘                  └ scarcest ─▶ fetch ─▶ verify, load ─▶ next …
//! ```

use std::{ops::Range, sync::Arc, time::Duration};

use engine::{EngineError, Loaded, Worker};
use shard_registry::{
    AliasName, Store, UnknownModel,
    placement::{self, Count, Facts, Holdings, join},
};
use swarm_proto::{LayerRange, ModelId};
use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, sleep, timeout_at},
};

use crate::{
    load::{self, Found, LoadError},
    net::{FetchError, Net},
    swarm_node::StartError,
    transfer::{Transfer, TransferError},
};

/// How long a model that is not here is looked for among peers: a swarm that starts together is there within it.
const LOCATE: Duration = Duration::from_secs(60);
/// Between two looks, and before a layer that could not be had is tried again; doubled up to the second.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// Shortest beginning of an id that names a model.
const PREFIX_LEN_MIN: usize = 6;

/// Finds a model that is not here by what peers say, and has it described; it then has a name here, too.
/// `alone`: nobody is known who could say anything.
pub(crate) async fn locate(
    unknown: UnknownModel,
    transfer: &Transfer,
    net: &Net,
    alone: bool,
) -> Result<Found, StartError> {
    let not_here = |unknown| StartError::Load(LoadError::Unknown(unknown));
    let UnknownModel::Unknown { text, mut known } = unknown else {
        return Err(not_here(unknown));
    };
    let is_file = text.contains(std::path::is_separator) || text.ends_with(".gguf");
    if is_file || alone {
        return Err(not_here(UnknownModel::Unknown { text, known }));
    }
    tracing::info!(model = %text, "not here: looking for it among peers");
    let deadline = Instant::now() + LOCATE;
    let mut changes = net.adverts().changes();
    let id = loop {
        match meant(&text, net)? {
            Some(found) => break found,
            None if Instant::now() >= deadline => {
                let models = net.adverts().snapshot().models();
                known.extend(
                    models
                        .into_iter()
                        .map(|(id, _, name)| format!("{name} ({})", id.short())),
                );
                return Err(not_here(UnknownModel::Unknown { text, known }));
            }
            None => {
                let soon = deadline.min(Instant::now() + PAUSE);
                let _ = timeout_at(soon, changes.changed()).await;
            }
        }
    };
    // Who says to have it may go, and others may come.
    while let Err(error) = transfer.describe(id).await {
        let nobody = matches!(
            error,
            TransferError::Fetch(FetchError::NoHolder { .. } | FetchError::Open(_))
        );
        if !nobody || Instant::now() >= deadline {
            return Err(error.into());
        }
        sleep(PAUSE).await;
    }
    // What it is called where it comes from, if that is free here.
    let models = net.adverts().snapshot().models().into_iter();
    let name = models
        .filter(|(other, ..)| *other == id)
        .map(|(.., name)| name)
        .next();
    let store = transfer.store().clone();
    let found = tokio::task::spawn_blocking(move || {
        if let Some(name) = name.and_then(|name| name.parse::<AliasName>().ok())
            && store.alias(&name).is_none()
        {
            store.set_alias(&name, id)?;
        }
        load::described(&store, id)
    });
    Ok(found.await??)
}

/// The model of this id, whole, or of this name or beginning of an id among those that peers have.
fn meant(text: &str, net: &Net) -> Result<Option<ModelId>, StartError> {
    if let Ok(id) = text.parse() {
        return Ok(Some(id));
    }
    let prefix = text.to_ascii_lowercase();
    let begins = |id: &ModelId| text.len() >= PREFIX_LEN_MIN && id.to_string().starts_with(&prefix);
    let models = net.adverts().snapshot().models().into_iter();
    let fits = models.filter(|(id, _, name)| *name == text || begins(id));
    let ids: Vec<ModelId> = fits.map(|(id, ..)| id).collect();
    match ids[..] {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        // By a name nobody decides between two models.
        _ => Err(StartError::Load(LoadError::Unknown(
            UnknownModel::Ambiguous {
                text: text.to_owned(),
                ids: ids.iter().map(ToString::to_string).collect(),
            },
        ))),
    }
}

/// The layers that a node is to hold, and how it comes by those that it does not yet.
pub(crate) struct Growth {
    found: Found,
    store: Store,
    transfer: Transfer,
    net: Net,
    left: Vec<u16>,
    total: usize,
    layer_bytes: Vec<u64>,
}

impl Growth {
    pub(crate) fn new(found: Found, layers: &Range<u32>, transfer: Transfer, net: Net) -> Self {
        let left = layers.clone().filter_map(|layer| u16::try_from(layer).ok());
        Self {
            layer_bytes: load::layer_bytes(&found.blueprint),
            store: transfer.store().clone(),
            left: left.collect(),
            total: layers.len(),
            found,
            transfer,
            net,
        }
    }

    /// The next layers, loaded: a span that is here, else the scarcest, fetched. `None` when there are no more.
    ///
    /// # Errors
    /// They cannot be had or loaded; they are still to come.
    pub(crate) async fn next(&mut self) -> Result<Option<Loaded>, StartError> {
        let Some(span) = self.span_here().await?.or_else(|| self.scarcest()) else {
            return Ok(None);
        };
        let layers = LayerRange {
            start: span.start,
            end: span.end,
        };
        if !self.is_here(&span).await? {
            self.fetch(layers).await?;
        }
        let loaded = match self.read(&span).await? {
            Err(LoadError::Read(error)) => {
                tracing::warn!(%layers, %error, "what is here cannot be used; looking for it among peers");
                if let Err(nobody) = self.fetch(layers).await {
                    tracing::warn!(error = %nobody, "nor does a peer give it");
                    return Err(LoadError::Read(error).into());
                }
                self.read(&span).await??
            }
            read => read?,
        };
        self.left.retain(|layer| !span.contains(layer));
        let done = self.total - self.left.len();
        tracing::info!(%layers, "verified and loaded layers {layers} ({done} of {})", self.total);
        Ok(Some(loaded))
    }

    /// Goes on until all layers are there; each is given to the worker, and `news` told.
    pub(crate) async fn go_on(mut self, worker: Worker, news: Arc<Notify>) {
        let mut pause = PAUSE;
        loop {
            match self.next().await {
                Ok(None) => return,
                Ok(Some(loaded)) => match add(&worker, loaded).await {
                    Ok(()) => {
                        news.notify_one();
                        pause = PAUSE;
                    }
                    Err(error) => {
                        tracing::error!(%error, "layers were loaded and cannot be served");
                        return;
                    }
                },
                Err(error) => {
                    tracing::warn!(%error, left = self.left.len(), "layers are missing still; trying again in {pause:?}");
                    sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        }
    }

    async fn read(&self, span: &Range<u16>) -> Result<Result<Loaded, LoadError>, StartError> {
        let (store, found) = (self.store.clone(), self.found.clone());
        let layers = u32::from(span.start)..u32::from(span.end);
        Ok(tokio::task::spawn_blocking(move || load::read(&store, &found, layers)).await?)
    }

    /// The first span of the layers left whose shards are all here.
    async fn span_here(&self) -> Result<Option<Range<u16>>, StartError> {
        let here = self.here().await?;
        let is_here = |layer: &u16| {
            here.iter()
                .any(|span| span.start <= *layer && *layer < span.end)
        };
        let mut layers = self.left.iter().copied().filter(is_here);
        let Some(start) = layers.next() else {
            return Ok(None);
        };
        let more = layers
            .zip(start + 1..)
            .take_while(|(layer, next)| layer == next)
            .count();
        Ok(Some(start..start + 1 + more as u16))
    }

    async fn is_here(&self, span: &Range<u16>) -> Result<bool, StartError> {
        let here = self.here().await?;
        Ok(here
            .iter()
            .any(|held| held.start <= span.start && span.end <= held.end))
    }

    async fn here(&self) -> Result<Vec<LayerRange>, StartError> {
        let (store, id) = (self.store.clone(), self.found.id);
        let here = tokio::task::spawn_blocking(move || store.here(id)).await?;
        Ok(here.map_err(LoadError::from)?.layers)
    }

    fn scarcest(&self) -> Option<Range<u16>> {
        let facts = Facts {
            model: self.found.id,
            layer_bytes: &self.layer_bytes,
            frame_bytes: self.found.frame_bytes(),
        };
        let holdings = Holdings::of(&self.net.adverts().snapshot(), &facts);
        let near = placement::near(self.net.rtts());
        let coverage = holdings.coverage(Count::Live, self.net.me(), near);
        let layer = join::scarcest(&self.left, &coverage, self.net.me())?;
        Some(layer..layer + 1)
    }

    async fn fetch(&self, layers: LayerRange) -> Result<(), StartError> {
        let manifest = &self.found.manifest;
        for shard in manifest.shards_of(layers) {
            let begin = Instant::now();
            let progress = &mut |_| {};
            let fetched = self
                .transfer
                .fetch(self.found.id, manifest, shard, progress);
            fetched.await?;
            tracing::info!(shard = %shard.kind, bytes = shard.bytes, took = ?begin.elapsed(), "fetched");
        }
        Ok(())
    }
}

async fn add(worker: &Worker, loaded: Loaded) -> Result<(), EngineError> {
    let (reply, added) = oneshot::channel();
    let reply = Box::new(move |result| drop(reply.send(result)));
    // Never with a queue that sessions cannot fill.
    let queued = worker.add(loaded, reply);
    queued.map_err(|busy| EngineError::Backend(busy.to_string()))?;
    added.await.unwrap_or(Err(EngineError::Stopped))
}
