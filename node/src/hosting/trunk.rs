//! A trunk's experts: who computes them is said as it changes, and what nobody does is fetched and computed here for
//! as long as that lasts.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use engine::{ExpertHolder, ExpertWorker, Worker};
use shard_registry::placement::experts::Expert;
use tokio::time::{Instant, sleep_until, timeout};

use super::experts::ExpertShards;
use crate::{
    experts::Island,
    load::LoadError,
    swarm_node::{StartError, blocking},
};

/// Calls that may wait at the worker for experts here: one, for the stage waits for it.
const QUEUE_MAX: usize = 4;
/// How long a holder that was lost has to come back before its experts are fetched; one that was asked for is fetched
/// at once.
const GRACE: Duration = Duration::from_secs(2);
/// Between two looks when nothing is said to have changed.
const LOOK: Duration = Duration::from_secs(5);
/// How long somebody else has to have held an expert before it leaves again.
const LEAVES_AFTER: Duration = Duration::from_secs(60);

/// What keeps a trunk's island whole.
pub(super) struct TrunkKeeper {
    pub(super) shards: ExpertShards,
    pub(super) island: Arc<Island>,
    pub(super) worker: Worker,
    /// Bytes for layers, KV and experts.
    pub(super) memory: u64,
    pub(super) threads: u32,
}

/// The experts that are computed here.
#[derive(Default)]
struct Local {
    worker: Option<Arc<ExpertWorker>>,
    held: BTreeSet<Expert>,
    /// Since when others hold all of them, too.
    others_since: Option<Instant>,
}

/// A node that stops ends the steps that wait for an expert.
impl Drop for TrunkKeeper {
    fn drop(&mut self) {
        self.island.close();
    }
}

impl TrunkKeeper {
    pub(super) async fn run(self) {
        let mut changes = self.island.changes();
        let mut local = Local::default();
        let mut missing_since: Option<Instant> = None;
        loop {
            self.shards.place.board.publish().await;
            let missing = self.missing(&local);
            missing_since = match missing.is_empty() {
                true => None,
                false => Some(missing_since.unwrap_or_else(Instant::now)),
            };
            let asked: BTreeSet<Expert> = self.island.wanted().into_iter().collect();
            let over = missing_since.is_some_and(|since| since.elapsed() >= GRACE);
            let mut taken = false;
            for expert in missing
                .iter()
                .filter(|expert| over || asked.contains(expert))
            {
                match self.take(&mut local, *expert).await {
                    Ok(true) => taken = true,
                    Ok(false) => break,
                    Err(error) => {
                        let (layer, expert) = *expert;
                        tracing::warn!(layer, expert, %error, "nobody computes this expert, and it cannot be had");
                        continue;
                    }
                }
                break;
            }
            if taken {
                continue;
            }
            self.leave(&mut local);
            let grace = missing_since.map(|since| since + GRACE);
            let until = grace.filter(|at| *at > Instant::now());
            let until = until.unwrap_or_else(|| Instant::now() + LOOK);
            if let Ok(Err(_)) = timeout(until - Instant::now(), changes.changed()).await {
                sleep_until(until).await;
            }
        }
    }

    /// Experts of this trunk's layers that nobody computes.
    fn missing(&self, local: &Local) -> Vec<Expert> {
        let missing = self.island.missing().into_iter();
        missing
            .filter(|expert| !local.held.contains(expert))
            .collect()
    }

    /// Computes an expert here; false where there is no room for it.
    async fn take(&self, local: &mut Local, expert: Expert) -> Result<bool, StartError> {
        let stats = self.worker.stats();
        let held: u64 = local.held.iter().map(|held| self.shards.bytes(*held)).sum();
        let used = stats
            .tensor_bytes
            .saturating_add(stats.kv_bytes)
            .saturating_add(held);
        if used.saturating_add(self.shards.bytes(expert)) > self.memory {
            return Ok(false);
        }
        let loaded = self.shards.load(expert).await?;
        let worker = match &local.worker {
            Some(worker) => Arc::clone(worker),
            None => {
                let (layout, threads) = (Arc::clone(&self.shards.layout), self.threads);
                let made = blocking(move || -> Result<ExpertWorker, StartError> {
                    let holder = ExpertHolder::new(layout, threads).map_err(LoadError::Experts)?;
                    ExpertWorker::spawn(holder, QUEUE_MAX).map_err(StartError::Worker)
                });
                Arc::new(made.await??)
            }
        };
        worker.add(loaded).map_err(LoadError::Experts)?;
        local.held.insert(expert);
        local.worker = Some(worker);
        local.others_since = None;
        self.island.set_local(local.worker.clone());
        let (layer, expert) = expert;
        tracing::info!(
            layer,
            expert,
            "nobody near computes this expert: it is computed here"
        );
        Ok(true)
    }

    /// Lets go of what others have held for a while.
    fn leave(&self, local: &mut Local) {
        let placed = match local.held.is_empty() {
            true => Vec::new(),
            false => self.island.placed(),
        };
        let others = placed
            .iter()
            .filter(|placed| placed.holders.iter().any(Option::is_some));
        let others: BTreeSet<Expert> = others.map(|placed| (placed.layer, placed.expert)).collect();
        if local.held.is_empty() || !local.held.is_subset(&others) {
            local.others_since = None;
            return;
        }
        let since = *local.others_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= LEAVES_AFTER {
            tracing::info!("others compute all experts again: those here leave");
            *local = Local::default();
            self.island.set_local(None);
        }
    }
}
