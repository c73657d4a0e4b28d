//! Holders inside this process: for tests, benches and a node's own experts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;

use super::dispatch::{ExpertHolders, HolderId};
use super::holder::{ExpertHolder, HolderStats};
use super::message::{ExpertCall, ExpertError, ExpertReply};
use super::tensors::{ExpertLayout, ExpertSource};
use super::worker::ExpertWorker;

/// Calls that may wait at a holder here: one a trunk, and some of the next.
const QUEUE_MAX: usize = 64;

/// Which holder has which expert: layer after layer of the layout, a number of
/// a holder for each expert, or nobody.
pub type Placement = dyn Fn(u32, u32) -> Option<u32>;

/// How often an expert was picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertUse {
    /// Which layer.
    pub layer: u32,
    /// Which expert.
    pub expert: u32,
    /// Who has it.
    pub holder: HolderId,
    /// Rows it was picked for.
    pub rows: u64,
}

struct Placed {
    holder: HolderId,
    rows: AtomicU64,
}

/// Holders on threads of this process, each expert with one of them.
pub struct InProcess {
    layout: Arc<ExpertLayout>,
    /// Layer after layer of the layout's, expert after expert.
    placed: Vec<Option<Placed>>,
    workers: Vec<Arc<ExpertWorker>>,
}

impl InProcess {
    /// Loads all experts of a model into `holders` holders of `n_threads` each,
    /// as `placement` has them.
    ///
    /// # Errors
    /// As [`ExpertHolder::load`], and a placement with a holder that is not there.
    pub fn load(
        layout: Arc<ExpertLayout>,
        source: &dyn ExpertSource,
        holders: u32,
        n_threads: u32,
        placement: &Placement,
    ) -> Result<InProcess, ExpertError> {
        let mut loaded = (0..holders)
            .map(|_| ExpertHolder::new(Arc::clone(&layout), n_threads))
            .collect::<Result<Vec<_>, _>>()?;
        for layer in layout.layers() {
            for expert in 0..layout.n_expert() {
                let Some(at) = placement(layer, expert) else {
                    continue;
                };
                let none = || ExpertError::Backend(format!("holder {at} of {holders}"));
                let holder = loaded.get_mut(at as usize).ok_or_else(none)?;
                holder.load(layer, expert, source)?;
            }
        }
        let workers = loaded
            .into_iter()
            .map(|holder| ExpertWorker::spawn(holder, QUEUE_MAX).map(Arc::new))
            .collect::<Result<_, _>>()
            .map_err(|why| ExpertError::Backend(why.to_string()))?;
        Ok(InProcess::new(layout, workers))
    }

    /// Of holders that run, with the experts that they hold now; one that several have is asked of the first.
    pub fn new(layout: Arc<ExpertLayout>, workers: Vec<Arc<ExpertWorker>>) -> InProcess {
        let mut held = BTreeMap::new();
        for (at, worker) in workers.iter().enumerate().rev() {
            let at = HolderId(at as u32);
            held.extend(worker.held().into_iter().map(|which| (which, at)));
        }
        let mut placed = Vec::new();
        for layer in layout.layers() {
            for expert in 0..layout.n_expert() {
                let holder = held.get(&(layer, expert));
                placed.push(holder.map(|holder| Placed {
                    holder: *holder,
                    rows: AtomicU64::new(0),
                }));
            }
        }
        InProcess {
            layout,
            placed,
            workers,
        }
    }

    /// What each holder has and has done.
    pub fn stats(&self) -> Vec<HolderStats> {
        self.workers.iter().map(|worker| worker.stats()).collect()
    }

    /// How often each expert was picked.
    pub fn used(&self) -> Vec<ExpertUse> {
        let n_expert = self.layout.n_expert();
        let experts = self
            .layout
            .layers()
            .flat_map(|layer| (0..n_expert).map(move |e| (layer, e)));
        let used = experts
            .zip(&self.placed)
            .filter_map(|((layer, expert), placed)| {
                placed.as_ref().map(|placed| ExpertUse {
                    layer,
                    expert,
                    holder: placed.holder,
                    rows: placed.rows.load(Ordering::Relaxed),
                })
            });
        used.collect()
    }

    fn placed(&self, layer: u32, expert: u32) -> Option<&Placed> {
        let n_expert = self.layout.n_expert();
        let at = self.layout.layers().position(|with| with == layer)?;
        let at = at * n_expert as usize + expert as usize;
        self.placed.get(at).filter(|_| expert < n_expert)?.as_ref()
    }
}

impl ExpertHolders for InProcess {
    fn holder_of(&self, layer: u32, expert: u32) -> Option<HolderId> {
        self.placed(layer, expert).map(|placed| placed.holder)
    }

    fn ask(&self, calls: Vec<(HolderId, ExpertCall)>) -> Result<Vec<ExpertReply>, ExpertError> {
        let mut waits = Vec::with_capacity(calls.len());
        for (holder, call) in calls {
            for group in &call.groups {
                if let Some(placed) = self.placed(call.layer, group.expert) {
                    placed
                        .rows
                        .fetch_add(group.rows.len() as u64, Ordering::Relaxed);
                }
            }
            let gone = || ExpertError::Backend(format!("no holder {}", holder.0));
            let worker = self.workers.get(holder.0 as usize).ok_or_else(gone)?;
            let (answer, wait) = channel();
            worker.submit(call, Box::new(move |reply| drop(answer.send(reply))))?;
            waits.push(wait);
        }
        let gone = |_| ExpertError::Backend("a holder's thread has ended".into());
        let answers = waits.into_iter().map(|wait| wait.recv().map_err(gone)?);
        answers.collect()
    }
}
