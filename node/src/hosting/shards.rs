//! Layers of a model, from the store or else from peers, verified and loaded.

use std::{ops::Range, sync::Arc};

use engine::{ExpertHolders, Loaded};
use shard_registry::{ShardEntry, ShardKind};
use swarm_proto::LayerRange;
use tokio::time::Instant;

use super::range;
use crate::{
    experts::Island,
    load::{self, Found, LoadError},
    swarm_node::{StartError, blocking},
    transfer::Transfer,
};

/// Where the layers of one model come from.
pub(super) struct Shards {
    pub(super) found: Found,
    transfer: Transfer,
    /// Who computes the experts, where they are not loaded with their layers.
    island: Option<Arc<Island>>,
    /// Layers loaded, and those that are to be, for people who watch.
    done: usize,
    wanted: usize,
}

impl Shards {
    pub(super) fn new(found: Found, transfer: Transfer, wanted: usize) -> Self {
        Self {
            found,
            transfer,
            island: None,
            done: 0,
            wanted,
        }
    }

    /// The same without experts, which an island computes.
    pub(super) fn with(self, island: Option<Arc<Island>>) -> Self {
        Self { island, ..self }
    }

    /// Counts from here to so many layers.
    pub(super) fn expect(&mut self, wanted: usize) {
        (self.done, self.wanted) = (0, wanted);
    }

    /// Which of these layers are in the store, as spans.
    pub(super) async fn here(&self, among: &[u16]) -> Result<Vec<LayerRange>, StartError> {
        let (store, id) = (self.transfer.store().clone(), self.found.id);
        let here = blocking(move || store.here(id)).await?;
        let here = here.map_err(LoadError::from)?;
        let here = match self.island {
            Some(_) => here.trunks,
            None => here.layers,
        };
        let among = here
            .into_iter()
            .flat_map(|span| span.layers())
            .filter(|layer| among.contains(layer));
        Ok(LayerRange::merge(among.map(LayerRange::one).collect()))
    }

    /// Loads spans of layers, each as [`Loaded::read`] does. What is not in the store is fetched, and so is what
    /// turns out to be damaged there.
    pub(super) async fn load(&mut self, spans: &[LayerRange]) -> Result<Loaded, StartError> {
        let layers: Vec<u16> = spans.iter().flat_map(LayerRange::layers).collect();
        let here = self.here(&layers).await?;
        for layer in &layers {
            if !here.iter().any(|span| span.contains(*layer)) {
                self.fetch(LayerRange::one(*layer)).await?;
            }
        }
        match self.read(spans).await? {
            Err(LoadError::Read(error)) => {
                tracing::warn!(?spans, %error, "what is here cannot be used; looking for it among peers");
                for span in spans {
                    if let Err(nobody) = self.fetch(*span).await {
                        tracing::warn!(error = %nobody, "nor does a peer give it");
                        return Err(LoadError::Read(error).into());
                    }
                }
                Ok(self.read(spans).await??)
            }
            read => Ok(read?),
        }
    }

    async fn read(
        &mut self,
        spans: &[LayerRange],
    ) -> Result<Result<Loaded, LoadError>, StartError> {
        let (store, found) = (self.transfer.store().clone(), self.found.clone());
        let spans: Vec<Range<u32>> = spans.iter().copied().map(range).collect();
        let (mut done, wanted) = (self.done, self.wanted);
        let holders = self.island.clone();
        let holders = holders.map(|island| island as Arc<dyn ExpertHolders>);
        let read = move || {
            let loaded = load::read(&store, &found, &spans, holders.as_ref(), &mut |layer| {
                done += 1;
                tracing::info!(
                    layer,
                    "verified and loaded layer {layer} ({done} of {wanted})"
                );
            });
            (loaded, done)
        };
        let (loaded, done) = blocking(read).await?;
        if loaded.is_ok() {
            self.done = done;
        }
        Ok(loaded)
    }

    async fn fetch(&self, layers: LayerRange) -> Result<(), StartError> {
        let manifest = &self.found.manifest;
        let experts = self.island.is_none();
        let wanted =
            |shard: &&ShardEntry| experts || !matches!(shard.kind, ShardKind::Expert { .. });
        for shard in manifest.shards_of(layers).filter(wanted) {
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
