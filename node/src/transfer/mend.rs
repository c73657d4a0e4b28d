//! A fetched shard that the disk damaged, found out when somebody asked for it: fetched again, so that a node that
//! runs for long gives what it says to have.

use std::sync::{Arc, atomic::Ordering};

use swarm_proto::{ModelId, ShardId};

use super::{Inner, Transfer, TransferError, blocking};

impl Inner {
    /// Fetches a damaged shard again in the background, one at a time: whoever asks for another finds it. Files of the
    /// user's own are the user's to mend.
    pub(super) fn mend(self: &Arc<Self>, model: ModelId, shard: ShardId) {
        if self.mending.swap(true, Ordering::SeqCst) {
            return;
        }
        let inner = self.clone();
        tokio::spawn(async move {
            match inner.clone().fetch_again(model, shard).await {
                Ok(true) => tracing::info!(%shard, "a damaged shard was fetched again"),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%shard, %error, "a shard is damaged and cannot be fetched again");
                }
            }
            inner.mending.store(false, Ordering::SeqCst);
        });
    }

    /// False where it was not fetched in the first place.
    async fn fetch_again(
        self: Arc<Self>,
        model: ModelId,
        shard: ShardId,
    ) -> Result<bool, TransferError> {
        let store = self.store.clone();
        let manifest = blocking(move || store.manifest(model)).await??;
        let entry = manifest.shards.iter().find(|entry| entry.id == shard);
        let fetched = |entry: &&shard_registry::ShardEntry| {
            self.store.has_blob(entry) || self.store.is_cut_off(entry)
        };
        let Some(entry) = entry.filter(fetched) else {
            return Ok(false);
        };
        let transfer = Transfer {
            inner: self.clone(),
        };
        transfer.fetch(model, &manifest, entry, &mut |_| {}).await?;
        Ok(true)
    }
}
