//! Shards between peers: fetched from several holders at once, verified group by group as they come, and given on
//! while they are still on their way.
//!
//! ```text
//!   Transfer::fetch ─▶ who has it (adverts, Kademlia) ─▶ one stream to each of a few ─▶ Partial ─▶ blob
//!                       ▲        Give::Elsewhere ─────────┘ ranges are handed out, and taken back from the slow
//!   Transfer::serve ◀─ Ask ─ Shards (opened once, hashed whole) ─▶ slots, grants, upload limit ─▶ Part …
//! ```
//!
//! What peers say is believed of nothing: bytes are held against the shard's own hash, and who sends others is
//! written into the peer book. Hashing and files belong to blocking threads.

mod bucket;
mod counts;
mod fetch;
mod grants;
mod holders;
mod mend;
mod ranges;
mod serve;
mod shards;
mod silent;
mod source;
mod wire;

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use shard_registry::{
    Manifest, ManifestError, ShardEntry, ShardKind, Store, StoreError,
    blobs::{BlobError, Evicted, Quota, Worth},
};
use swarm_proto::{ModelId, ShardId};
use tokio::task::JoinError;

use crate::{
    net::{FetchError, Net},
    peer_book::PeerBook,
};

use bucket::Bucket;
use counts::Counts;
pub use counts::ShardCount;
pub use holders::holders;
use shards::Shards;
use silent::Silent;

/// What shards may take in a second, both ways together, while a session runs on this node: about what a gigabit
/// link carries in half of its time. Reading, hashing and encrypting more takes the cores from frames that wait.
const BESIDE_BYTES_S: u64 = 64_000_000;
/// Some parts at once: timers are no finer.
const BESIDE_BURST: Duration = Duration::from_millis(2);

/// What may be used for others and kept for ourselves.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// Most bytes a second that are uploaded; none: as fast as it goes.
    pub upload_bytes_s: Option<u64>,
    /// How much fetched shards may take.
    pub quota: Quota,
}

/// Fetches shards, and gives what is here; clones share it.
#[derive(Clone)]
pub struct Transfer {
    inner: Arc<Inner>,
}

struct Inner {
    net: Net,
    store: Store,
    shards: Shards,
    limits: Limits,
    book: PeerBook,
    /// Whether others get from us what we fetch.
    shares: bool,
    /// Shards that are not evicted.
    needed: Mutex<HashSet<ShardId>>,
    counts: Counts,
    /// Nothing is given: the node is paused.
    paused: AtomicBool,
    /// Who gave nothing when it was last asked.
    silent: Silent,
    /// A damaged shard is being fetched again.
    mending: AtomicBool,
    /// What shards may take beside sessions that run here.
    beside: Mutex<Bucket>,
}

/// Why a shard was not fetched.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// What describes the model.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// It is none.
    #[error("model {id}: {source}")]
    Manifest {
        /// Which.
        id: ModelId,
        /// Why.
        source: ManifestError,
    },
    /// Nobody is known to have it.
    #[error(
        "nobody in this swarm is known to have {kind} of model {id}; `shoal status` shows who is there"
    )]
    NoHolder {
        /// The model.
        id: ModelId,
        /// Which shard.
        kind: ShardKind,
    },
    /// Those that have it do not send it.
    #[error(
        "{kind} of model {id} does not arrive: {here} of {bytes} bytes are here and kept, nothing came for {} s; last: {last}; \
         try again, it goes on from there", .waited.as_secs()
    )]
    Stalled {
        /// The model.
        id: ModelId,
        /// Which shard.
        kind: ShardKind,
        /// Bytes that are here.
        here: u64,
        /// Bytes of the shard.
        bytes: u64,
        /// How long.
        waited: Duration,
        /// What the last holder did.
        last: String,
    },
    /// This machine.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A task of ours died.
    #[error("internal: {0}")]
    Task(#[from] JoinError),
}

impl Transfer {
    /// `shares`: [`Transfer::serve`] will be called, and others can reach us.
    pub fn new(net: Net, store: Store, limits: Limits, book: PeerBook, shares: bool) -> Self {
        let inner = Inner {
            shards: Shards::new(store.clone()),
            net,
            store,
            limits,
            book,
            shares,
            needed: Mutex::default(),
            counts: Counts::default(),
            paused: AtomicBool::new(false),
            silent: Silent::default(),
            mending: AtomicBool::new(false),
            beside: Mutex::new(Bucket::new(BESIDE_BYTES_S, BESIDE_BURST, Instant::now())),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The store that shards are fetched into.
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// A model's manifest with its metadata in the store: from there, else from whoever has them.
    ///
    /// # Errors
    /// Nobody has them, or the store cannot be written.
    pub async fn describe(&self, id: ModelId) -> Result<Arc<Manifest>, TransferError> {
        let store = self.inner.store.clone();
        let known = blocking(move || store.metadata(id).and_then(|_| store.manifest(id))).await?;
        if let Ok(manifest) = known {
            return Ok(Arc::new(manifest));
        }
        let (net, book) = (&self.inner.net, &self.inner.book);
        let manifest = net.fetch_manifest(&id, book).await?;
        let metadata = match manifest.metadata() {
            Some(shard) => net.fetch_shard(&id, &shard.id, book).await?,
            None => Vec::new(),
        };
        let store = self.inner.store.clone();
        let (manifest, kept) = blocking(move || {
            let wrong = |source| TransferError::Manifest { id, source };
            let bytes = manifest.encode().map_err(wrong)?;
            Ok::<_, TransferError>((manifest, store.put_fetched(&bytes, &metadata)))
        })
        .await??;
        kept?;
        Ok(Arc::new(manifest))
    }

    /// Whether these shards fit on this machine beside what stays, all of them; they are not evicted from now on until
    /// [`Transfer::release`].
    ///
    /// # Errors
    /// They do not: what is needed and what there is.
    pub async fn check_room(&self, shards: &[ShardEntry]) -> Result<(), TransferError> {
        self.inner
            .needed()
            .extend(shards.iter().map(|shard| shard.id));
        let (inner, shards) = (self.inner.clone(), shards.to_vec());
        let checked = blocking(move || {
            let needed = shards
                .iter()
                .map(|shard| inner.store.still_needed(shard))
                .sum();
            let quota = &inner.limits.quota;
            inner
                .store
                .would_go(needed, quota, &|shard| inner.worth(shard, &HashSet::new()))
        });
        checked.await??;
        Ok(())
    }

    /// Bytes of shards that went to peers since the start, the hashes between them included.
    pub fn given_bytes(&self) -> u64 {
        self.inner.counts.given_bytes()
    }

    /// What went through of each shard since the start.
    pub fn counts(&self) -> Vec<(ModelId, ShardId, ShardCount)> {
        self.inner.counts.all()
    }

    /// Bytes of models' descriptions that went to peers since the start.
    pub fn described_bytes(&self) -> u64 {
        self.inner.counts.described_bytes()
    }

    /// A description of so many bytes goes to a peer.
    pub(crate) fn described(&self, bytes: usize) {
        self.inner.counts.described(bytes);
    }

    /// What may be used, as it was set.
    pub fn limits(&self) -> &Limits {
        &self.inner.limits
    }

    /// From now on nothing is given, or again; a range that is on its way is given to its end.
    pub fn pause(&self, paused: bool) {
        self.inner.paused.store(paused, Ordering::Relaxed);
    }

    /// A shard that was fetched for us may be evicted again.
    pub fn release(&self, shard: &ShardId) {
        self.inner.needed().remove(shard);
    }
}

impl Inner {
    fn needed(&self) -> std::sync::MutexGuard<'_, HashSet<ShardId>> {
        self.needed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits where a session runs here, so that no more than `BESIDE_BYTES_S` pass; true if it did.
    async fn give_way(&self, bytes: usize) -> bool {
        if !self.net.sessions_run() {
            return false;
        }
        let wait = {
            let mut beside = self.beside.lock().unwrap_or_else(PoisonError::into_inner);
            beside.take(bytes, Instant::now())
        };
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        !wait.is_zero()
    }

    fn worth(&self, shard: &ShardId, elsewhere: &HashSet<ShardId>) -> Worth {
        match () {
            () if self.needed().contains(shard) => Worth::Needed,
            () if elsewhere.contains(shard) => Worth::Elsewhere,
            () => Worth::LastCopy,
        }
    }

    /// Room for a shard; what had to go is told. Blocks.
    fn make_room(&self, entry: &ShardEntry) -> Result<(), BlobError> {
        let elsewhere =
            holders::held_elsewhere(&self.net.adverts().snapshot(), &self.store, self.net.me());
        let worth = |shard: &ShardId| self.worth(shard, &elsewhere);
        let needed = self.store.still_needed(entry);
        let quota = &self.limits.quota;
        for Evicted {
            shard,
            bytes,
            last_copy,
        } in self.store.make_room(needed, quota, &worth)?
        {
            self.shards.forget(&shard);
            if last_copy {
                tracing::warn!(%shard, bytes, "evicted to make room: nobody else is known to have this shard");
            } else {
                tracing::info!(%shard, bytes, "evicted to make room: others have this shard");
            }
        }
        Ok(())
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    tokio::task::spawn_blocking(work).await
}
