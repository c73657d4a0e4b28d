//! What went through of each shard since the node started: bytes both ways, and how often it was fetched.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use swarm_proto::{ModelId, ShardId};

/// Of one shard.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ShardCount {
    /// How often all of it was fetched: more than once only where it was damaged or evicted in between.
    pub fetches: u32,
    /// Bytes that came, hashes included, and what came twice or was refused too.
    pub fetched_bytes: u64,
    /// Bytes that went to peers, hashes included.
    pub given_bytes: u64,
}

/// Of all. One entry for each shard of models that are here: peers cannot add any.
#[derive(Debug, Default)]
pub(super) struct Counts {
    shards: Mutex<HashMap<(ModelId, ShardId), ShardCount>>,
    /// Descriptions of models that went to peers.
    described: AtomicU64,
}

impl Counts {
    pub(super) fn came(&self, model: ModelId, shard: ShardId, bytes: usize) {
        let mut shards = self.lock();
        let count = shards.entry((model, shard)).or_default();
        count.fetched_bytes = count.fetched_bytes.saturating_add(bytes as u64);
    }

    pub(super) fn fetched(&self, model: ModelId, shard: ShardId) {
        let mut shards = self.lock();
        let count = shards.entry((model, shard)).or_default();
        count.fetches = count.fetches.saturating_add(1);
    }

    pub(super) fn gave(&self, model: ModelId, shard: ShardId, bytes: usize) {
        let mut shards = self.lock();
        let count = shards.entry((model, shard)).or_default();
        count.given_bytes = count.given_bytes.saturating_add(bytes as u64);
    }

    pub(super) fn described(&self, bytes: usize) {
        self.described.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn described_bytes(&self) -> u64 {
        self.described.load(Ordering::Relaxed)
    }

    pub(super) fn given_bytes(&self) -> u64 {
        self.lock().values().map(|count| count.given_bytes).sum()
    }

    pub(super) fn all(&self) -> Vec<(ModelId, ShardId, ShardCount)> {
        let shards = self.lock();
        let all = shards.iter();
        all.map(|((model, shard), count)| (*model, *shard, *count))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(ModelId, ShardId), ShardCount>> {
        // Counters: no invariant spans a panic.
        self.shards.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
