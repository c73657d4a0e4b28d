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
    AliasName, UnknownModel,
    placement::{self, Count, Holdings, join},
};
use swarm_proto::{LayerRange, ModelId};
use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, sleep, timeout_at},
};

use crate::{
    load::{self, Found, LoadError},
    net::{FetchError, Net},
    pause::Pause,
    swarm_node::StartError,
    transfer::{Transfer, TransferError},
};

/// How long a model that is not here is looked for among peers: a swarm that starts together is there within it.
const LOCATE: Duration = Duration::from_secs(60);
/// Between two looks, and before a layer that could not be had is tried again; doubled up to the second.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);

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
    let models = net.adverts().snapshot().models();
    let name = models.into_iter().find(|(other, ..)| *other == id);
    let store = transfer.store().clone();
    let found = tokio::task::spawn_blocking(move || {
        if let Some(name) = name.and_then(|(.., name)| name.parse::<AliasName>().ok())
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
    let models = net.adverts().snapshot().models().into_iter();
    let fits = models.filter(|(id, _, name)| *name == text || id.begins_with(text));
    let ids: Vec<ModelId> = fits.map(|(id, ..)| id).collect();
    match ids[..] {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        // By a name nobody decides between two models.
        _ => Err(LoadError::Unknown(UnknownModel::ambiguous(text, &ids)).into()),
    }
}

/// The layers that a node is to hold, and how it comes by those that it does not yet.
pub(crate) struct Growth {
    found: Found,
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
            left: left.collect(),
            total: layers.len(),
            found,
            transfer,
            net,
        }
    }

    /// The first layers, waited for as long as somebody has them: a slow seed may be busy with others.
    ///
    /// # Errors
    /// As [`Growth::next`], but for holders that send nothing for a while.
    pub(crate) async fn first(&mut self) -> Result<Option<Loaded>, StartError> {
        loop {
            match self.next().await {
                Err(StartError::Transfer(error @ TransferError::Stalled { .. })) => {
                    tracing::warn!(%error, "going on");
                }
                first => return first,
            }
        }
    }

    /// The next layers, loaded: a span that is here, else the scarcest, fetched. `None` when there are no more.
    ///
    /// # Errors
    /// They cannot be had or loaded; they are still to come.
    pub(crate) async fn next(&mut self) -> Result<Option<Loaded>, StartError> {
        if self.left.is_empty() {
            return Ok(None);
        }
        let layers = match self.span_here().await? {
            Some(here) => here,
            None => {
                let Some(layer) = self.scarcest() else {
                    return Ok(None);
                };
                self.fetch(layer).await?;
                layer
            }
        };
        let loaded = match self.read(layers).await? {
            Err(LoadError::Read(error)) => {
                tracing::warn!(%layers, %error, "what is here cannot be used; looking for it among peers");
                if let Err(nobody) = self.fetch(layers).await {
                    tracing::warn!(error = %nobody, "nor does a peer give it");
                    return Err(LoadError::Read(error).into());
                }
                self.read(layers).await??
            }
            read => read?,
        };
        self.left.retain(|layer| !layers.contains(*layer));
        Ok(Some(loaded))
    }

    /// Goes on until all layers are there; each is given to the worker, and `news` told.
    /// A node that is paused fetches nothing for others either.
    pub(crate) async fn go_on(mut self, worker: Worker, news: Arc<Notify>, owners: Pause) {
        let mut pause = PAUSE;
        loop {
            owners.over().await;
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

    async fn read(&self, layers: LayerRange) -> Result<Result<Loaded, LoadError>, StartError> {
        let (store, found) = (self.transfer.store().clone(), self.found.clone());
        let (total, mut done) = (self.total, self.total - self.left.len());
        let mut progress = move |layer| {
            done += 1;
            tracing::info!(
                layer,
                "verified and loaded layer {layer} ({done} of {total})"
            );
        };
        let read = move || {
            let layers = layers.start.into()..layers.end.into();
            load::read(&store, &found, layers, &mut progress)
        };
        Ok(tokio::task::spawn_blocking(read).await?)
    }

    /// The first span of the layers left whose shards are all here.
    async fn span_here(&self) -> Result<Option<LayerRange>, StartError> {
        let (store, id) = (self.transfer.store().clone(), self.found.id);
        let here = tokio::task::spawn_blocking(move || store.here(id)).await?;
        let here = here.map_err(LoadError::from)?.layers.into_iter();
        let left = here
            .flat_map(|span| span.layers())
            .filter(|layer| self.left.contains(layer));
        Ok(LayerRange::merge(left.map(LayerRange::one).collect())
            .first()
            .copied())
    }

    fn scarcest(&self) -> Option<LayerRange> {
        let facts = self.found.facts(&self.layer_bytes);
        let holdings = Holdings::of(&self.net.adverts().snapshot(), &facts);
        let near = placement::near(self.net.rtts());
        let coverage = holdings.coverage(Count::Live, self.net.me(), near);
        join::scarcest(&self.left, &coverage, self.net.me()).map(LayerRange::one)
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
