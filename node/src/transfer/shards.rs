//! The shards that are given to others: opened when they are first asked for, which hashes all of them, and kept
//! open while they are asked for. Those on their way here are among them. Used on blocking threads.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use shard_registry::{
    Store,
    blobs::{GiveError, OpenShard, Partial},
};
use swarm_proto::{ModelId, ShardId};

/// Shards that are open at once.
const OPEN_MAX: usize = 256;
/// Memory that their hashes may take: enough for 16 GiB of shards.
const MEMORY_BYTES_MAX: usize = 64 << 20;

type Opened = Arc<OnceLock<Option<Arc<OpenShard>>>>;

/// Open shards, and those on their way.
pub(super) struct Shards {
    store: Store,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    whole: HashMap<ShardId, Entry>,
    partly: HashMap<ShardId, Arc<Partial>>,
    /// Counts uses, for who was used last.
    clock: u64,
}

struct Entry {
    shard: Opened,
    used: u64,
}

impl Shards {
    pub(super) fn new(store: Store) -> Self {
        Self {
            store,
            open: Mutex::default(),
        }
    }

    /// The shard, or what is here of it; none where nothing is. Blocks while it is hashed the first time, whoever
    /// asks for it meanwhile too.
    pub(super) fn get(
        &self,
        model: ModelId,
        shard: ShardId,
    ) -> Result<Option<Arc<OpenShard>>, GiveError> {
        let place = {
            let mut open = self.lock();
            if let Some(partial) = open.partly.get(&shard) {
                return Ok(Some(Arc::new(OpenShard::partly(partial.clone()))));
            }
            open.clock += 1;
            let used = open.clock;
            let entry = open.whole.entry(shard).or_insert_with(|| Entry {
                shard: Opened::default(),
                used,
            });
            entry.used = used;
            entry.shard.clone()
        };
        let mut failed = None;
        let found = place.get_or_init(|| {
            self.store.open_shard(model, shard).map_or_else(
                |error| {
                    failed = Some(error);
                    None
                },
                |found| found.map(Arc::new),
            )
        });
        let found = found.clone();
        if found.is_none() {
            // It may come later.
            self.forget(&shard);
        }
        if let Some(error) = failed {
            return Err(error);
        }
        self.make_room();
        Ok(found)
    }

    /// A shard of this id is to be opened anew.
    pub(super) fn forget(&self, shard: &ShardId) {
        self.lock().whole.remove(shard);
    }

    /// One that is on its way, if somebody fetches it already.
    pub(super) fn coming(&self, shard: &ShardId) -> Option<Arc<Partial>> {
        self.lock().partly.get(shard).cloned()
    }

    /// One that is on its way can be given as far as it is here.
    pub(super) fn comes(&self, partial: Arc<Partial>) {
        self.lock().partly.insert(partial.shard(), partial);
    }

    /// It is here, or given up.
    pub(super) fn came(&self, shard: &ShardId) {
        self.lock().partly.remove(shard);
    }

    fn make_room(&self) {
        let mut open = self.lock();
        let taken = |open: &Open| -> usize {
            let opened = open.whole.values().filter_map(|entry| entry.shard.get());
            opened.flatten().map(|shard| shard.memory_bytes()).sum()
        };
        while open.whole.len() > 1
            && (open.whole.len() > OPEN_MAX || taken(&open) > MEMORY_BYTES_MAX)
        {
            let oldest = open.whole.iter().min_by_key(|(_, entry)| entry.used);
            let Some(oldest) = oldest.map(|(shard, _)| *shard) else {
                return;
            };
            open.whole.remove(&oldest);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        // Maps whose every change is one call: no invariant spans a panic.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
