//! The thread that owns a holder: calls in a bounded queue, several at a time
//! into one go. Experts come and go between two of them.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use super::holder::{ExpertHolder, HolderStats, LoadedExpert};
use super::message::{ExpertCall, ExpertError, ExpertReply};
use super::tensors::ExpertLayout;

/// Most calls that are computed in one go: later ones wait no longer than that.
const TOGETHER_MAX: usize = 16;

/// A call that takes no longer than this is computed by whoever brings it.
const AT_ONCE_MAX: Duration = Duration::from_micros(100);

/// What is done with an answer; called on the worker's thread, or before [`ExpertWorker::submit`] returns.
pub type HolderReply = Box<dyn FnOnce(Result<ExpertReply, ExpertError>) + Send>;

/// How long the thread rests after a go that took so long.
pub type Rest = Box<dyn FnMut(Duration) -> Duration + Send>;

/// What the thread and those who bring a small call have in common.
struct Shared {
    core: Mutex<Core>,
    /// Calls and changes that are not done.
    waiting: AtomicUsize,
    stats: Mutex<HolderStats>,
}

/// The holder, with whoever computes.
struct Core {
    holder: ExpertHolder,
    rest: Rest,
    /// Nobody computes before.
    rested: Instant,
}

impl Core {
    fn compute(&mut self, calls: &[ExpertCall]) -> Vec<Result<ExpertReply, ExpertError>> {
        let start = Instant::now();
        let answers = self.holder.compute(calls);
        let took = start.elapsed();
        self.rested = Instant::now() + (self.rest)(took);
        answers
    }
}

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
    shared: Arc<Shared>,
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
        let held = Mutex::new(holder.held().into_iter().collect());
        let layout = Arc::clone(holder.layout());
        let shared = Arc::new(Shared {
            stats: Mutex::new(holder.stats()),
            waiting: AtomicUsize::new(0),
            core: Mutex::new(Core {
                holder,
                rest,
                rested: Instant::now(),
            }),
        });
        let theirs = Arc::clone(&shared);
        let thread = Builder::new()
            .name("experts".into())
            .spawn(move || run(&items, &theirs))?;
        Ok(ExpertWorker {
            queue: Some(queue),
            queue_max,
            layout,
            shared,
            held,
            thread: Some(thread),
        })
    }

    /// Puts a call into the queue, whose answer `reply` gets; a small one is computed at once, on this thread,
    /// where nothing else is being done: to wake another thread takes longer.
    ///
    /// # Errors
    /// The queue is full, or the thread has ended.
    pub fn submit(&self, call: ExpertCall, reply: HolderReply) -> Result<(), ExpertError> {
        let queue = self.queue.as_ref().ok_or_else(gone)?;
        if let Some(answer) = self.shared.at_once(&call) {
            reply(answer);
            return Ok(());
        }
        self.shared.waiting.fetch_add(1, Ordering::AcqRel);
        queue.try_send(Item::Call(call, reply)).map_err(|why| {
            self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
            match why {
                TrySendError::Full(_) => ExpertError::Busy {
                    max: self.queue_max,
                },
                TrySendError::Disconnected(_) => gone(),
            }
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
        self.shared.stats().clone()
    }

    fn change(&self, change: Change) -> Result<(), ExpertError> {
        let queue = self.queue.as_ref().ok_or_else(gone)?;
        self.shared.waiting.fetch_add(1, Ordering::AcqRel);
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

impl Shared {
    fn stats(&self) -> MutexGuard<'_, HolderStats> {
        // Written as a whole: no invariant spans a panic.
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer to a small call, where nobody has the holder and nothing waits for it.
    fn at_once(&self, call: &ExpertCall) -> Option<Result<ExpertReply, ExpertError>> {
        if self.waiting.load(Ordering::Acquire) > 0 {
            return None;
        }
        // A holder that panicked is the thread's affair.
        let mut core = self.core.try_lock().ok()?;
        let (rows_s, _) = core.holder.stats().rows_s?;
        let small = call.rows_out() as f64 <= rows_s * AT_ONCE_MAX.as_secs_f64();
        if !small || self.waiting.load(Ordering::Acquire) > 0 || Instant::now() < core.rested {
            return None;
        }
        let mut answers = core.compute(std::slice::from_ref(call));
        *self.stats() = core.holder.stats();
        answers.pop()
    }
}

fn run(items: &Receiver<Item>, shared: &Shared) {
    while let Some((calls, replies, change)) = next(items) {
        let Ok(mut core) = shared.core.lock() else {
            return;
        };
        std::thread::sleep(core.rested.saturating_duration_since(Instant::now()));
        let done = calls.len() + usize::from(change.is_some());
        let answers = core.compute(&calls);
        // Before the answers: who has one finds it counted.
        *shared.stats() = core.holder.stats();
        for (answer, reply) in answers.into_iter().zip(replies) {
            reply(answer);
        }
        if let Some(change) = change {
            match change {
                Change::Add(loaded) => core.holder.add(loaded),
                Change::Remove(layer, expert) => drop(core.holder.unload(layer, expert)),
            }
            *shared.stats() = core.holder.stats();
        }
        drop(core);
        shared.waiting.fetch_sub(done, Ordering::AcqRel);
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
