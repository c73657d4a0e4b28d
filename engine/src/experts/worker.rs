//! The thread that owns a holder: calls in a bounded queue, several at a time
//! into one go. Experts come and go between two of them.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use super::holder::{ExpertHolder, HolderStats, LoadedExpert};
use super::message::{ExpertCall, ExpertError, ExpertReply};
use super::tensors::ExpertLayout;

/// Most calls that are computed in one go: later ones wait no longer than that.
const TOGETHER_MAX: usize = 16;

/// What is done with an answer; called on the worker's thread.
pub type HolderReply = Box<dyn FnOnce(Result<ExpertReply, ExpertError>) + Send>;

/// How long the thread rests after a go that took so long.
pub type Rest = Box<dyn FnMut(Duration) -> Duration + Send>;

enum Item {
    Call(ExpertCall, HolderReply),
    Change(Change),
}

enum Change {
    Add(LoadedExpert),
    Remove(u32, u32),
}

/// A holder on its own thread.
pub struct ExpertWorker {
    queue: Option<SyncSender<Item>>,
    queue_max: usize,
    layout: Arc<ExpertLayout>,
    stats: Arc<Mutex<HolderStats>>,
    /// As it is when everything in the queue is done.
    held: Mutex<BTreeSet<(u32, u32)>>,
    thread: Option<JoinHandle<()>>,
}

impl ExpertWorker {
    /// Starts the thread; `queue_max` calls may wait.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn spawn(holder: ExpertHolder, queue_max: usize) -> std::io::Result<ExpertWorker> {
        Self::spawn_resting(holder, queue_max, Box::new(|_| Duration::ZERO))
    }

    /// As [`ExpertWorker::spawn`], and the thread rests after each go as long as `rest` says: for those who
    /// may not have all of the machine's time.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn spawn_resting(
        holder: ExpertHolder,
        queue_max: usize,
        rest: Rest,
    ) -> std::io::Result<ExpertWorker> {
        let queue_max = queue_max.max(1);
        let (queue, items) = sync_channel::<Item>(queue_max);
        let stats = Arc::new(Mutex::new(holder.stats()));
        let held = Mutex::new(holder.held().into_iter().collect());
        let layout = Arc::clone(holder.layout());
        let shown = Arc::clone(&stats);
        let thread = Builder::new()
            .name("experts".into())
            .spawn(move || run(holder, &items, &shown, rest))?;
        Ok(ExpertWorker {
            queue: Some(queue),
            queue_max,
            layout,
            stats,
            held,
            thread: Some(thread),
        })
    }

    /// Puts a call into the queue, whose answer `reply` gets.
    ///
    /// # Errors
    /// The queue is full, or the thread has ended.
    pub fn submit(&self, call: ExpertCall, reply: HolderReply) -> Result<(), ExpertError> {
        let queue = self.queue.as_ref().ok_or_else(gone)?;
        queue
            .try_send(Item::Call(call, reply))
            .map_err(|why| match why {
                TrySendError::Full(_) => ExpertError::Busy {
                    max: self.queue_max,
                },
                TrySendError::Disconnected(_) => gone(),
            })
    }

    /// Takes an expert in that was read by [`ExpertWorker::layout`]; one that is held is replaced. Calls from
    /// now on find it. Waits while the queue is full.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn add(&self, loaded: LoadedExpert) -> Result<(), ExpertError> {
        let which = (loaded.layer(), loaded.expert());
        let mut held = self.lock();
        self.change(Change::Add(loaded))?;
        held.insert(which);
        Ok(())
    }

    /// Frees an expert; whether it was held. Calls in the queue are answered first. Waits while the queue is
    /// full.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn remove(&self, layer: u32, expert: u32) -> Result<bool, ExpertError> {
        let mut held = self.lock();
        if !held.contains(&(layer, expert)) {
            return Ok(false);
        }
        self.change(Change::Remove(layer, expert))?;
        Ok(held.remove(&(layer, expert)))
    }

    /// The experts held, by layer and index.
    pub fn held(&self) -> Vec<(u32, u32)> {
        self.lock().iter().copied().collect()
    }

    /// What its experts are made of.
    pub fn layout(&self) -> &Arc<ExpertLayout> {
        &self.layout
    }

    /// What the holder has and has done.
    pub fn stats(&self) -> HolderStats {
        let stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.clone()
    }

    fn change(&self, change: Change) -> Result<(), ExpertError> {
        let queue = self.queue.as_ref().ok_or_else(gone)?;
        queue.send(Item::Change(change)).map_err(|_| gone())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<(u32, u32)>> {
        // Changed by one call each: no invariant spans a panic.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ExpertWorker {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            // An answer may own the last handle: then the thread ends itself.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

fn gone() -> ExpertError {
    ExpertError::Backend("the experts' thread has ended".into())
}

fn run(
    mut holder: ExpertHolder,
    items: &Receiver<Item>,
    shown: &Mutex<HolderStats>,
    mut rest: Rest,
) {
    let mut rested = Instant::now();
    while let Some((calls, replies, change)) = next(items) {
        std::thread::sleep(rested.saturating_duration_since(Instant::now()));
        let start = Instant::now();
        let answers = holder.compute(&calls);
        let took = start.elapsed();
        let show = || shown.lock().unwrap_or_else(PoisonError::into_inner);
        // Before the answers: who has one finds it counted.
        *show() = holder.stats();
        for (answer, reply) in answers.into_iter().zip(replies) {
            reply(answer);
        }
        if let Some(change) = change {
            match change {
                Change::Add(loaded) => holder.add(loaded),
                Change::Remove(layer, expert) => drop(holder.unload(layer, expert)),
            }
            *show() = holder.stats();
        }
        rested = Instant::now() + rest(took);
    }
}

type Together = (Vec<ExpertCall>, Vec<HolderReply>, Option<Change>);

/// The next calls, as many as wait, up to a change; `None` when nobody can send
/// any more.
fn next(items: &Receiver<Item>) -> Option<Together> {
    let (mut calls, mut replies) = (Vec::new(), Vec::new());
    let mut item = items.recv().ok()?;
    loop {
        match item {
            Item::Change(change) => return Some((calls, replies, Some(change))),
            Item::Call(call, reply) => {
                calls.push(call);
                replies.push(reply);
            }
        }
        if calls.len() == TOGETHER_MAX {
            return Some((calls, replies, None));
        }
        match items.try_recv() {
            Ok(next) => item = next,
            Err(_) => return Some((calls, replies, None)),
        }
    }
}
