//! A stage on a thread of its own, fed by a bounded queue.
//!
//! ```text
//! submit ─▶ queue (bounded, refuses visibly) ─▶ thread: stage.run, run_rows ─▶ reply
//! close  ─▶ the slot's steps leave the queue, its KV is freed next
//! ```
//!
//! The interface is messages only: nothing the stage owns leaves the thread.
//! Single rows (decode) of sessions of one bench run in one pass, and go before
//! longer steps (prefill) of other sessions, a bounded number of times; while
//! others decode a longer step runs in parts. The steps of one session keep
//! their order, and owners have their turns one after the other.
//!
//! The same queue and the same runner can do without the thread ([`Worker::by_hand`]): a simulator
//! then says when a step runs, and how long it took.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::load::Loaded;
use crate::stage::{EngineError, Held, Input, Slot, Stage, StageShape, StageStats, Step};

mod by_hand;
mod company;
mod pace;
mod queue;
mod runner;

pub use by_hand::WorkerByHand;
use queue::{Item, Queue, Run, Taken, Worth};
use runner::Runner;

/// The worker stays awake while the next item usually comes within this time, as it does from a client on
/// the same machine: waking a thread takes some 35 µs, and a frame needs several on its way.
const AWAKE_MAX: Duration = Duration::from_micros(300);
/// Row buffers kept for reuse: the depth of a short pipeline.
const SPARE_MAX: usize = 8;

/// Called once, on the worker's thread or on that which closes the slot: it
/// must not block.
pub type Reply<T> = Box<dyn FnOnce(Result<T, EngineError>) + Send>;

/// Who asked for a slot.
pub trait SlotWaiter: Send {
    /// Whether anybody still waits. Asked just before the stage opens: contexts
    /// that nobody will use are not built.
    fn waits(&self) -> bool;

    /// Takes the slot, on the worker's thread: it must not block. Not called
    /// when nobody waited.
    fn take(self: Box<Self>, result: Result<Slot, EngineError>);
}

/// Waits whatever happens.
impl SlotWaiter for Reply<Slot> {
    fn waits(&self) -> bool {
        true
    }

    fn take(self: Box<Self>, result: Result<Slot, EngineError>) {
        self(result);
    }
}

/// Rows that a job brings along.
#[derive(Clone, Debug, PartialEq)]
pub enum Rows {
    /// Token ids.
    Tokens(Vec<u32>),
    /// Hidden rows.
    Hidden(Vec<f32>),
}

impl Rows {
    fn all(&self) -> Input<'_> {
        match self {
            Rows::Tokens(tokens) => Input::Tokens(tokens),
            Rows::Hidden(rows) => Input::Hidden(rows),
        }
    }

    /// `n` rows from the `from`th on, of `all`. What does not come out even is left for the stage to refuse.
    fn part(&self, from: u32, n: u32, all: u32) -> Input<'_> {
        if n == all {
            return self.all();
        }
        let (from, n, all) = (from as usize, n as usize, all.max(1) as usize);
        match self {
            Rows::Tokens(tokens) => Input::Tokens(tokens.get(from..from + n).unwrap_or(tokens)),
            Rows::Hidden(rows) => {
                let width = rows.len() / all;
                let part = rows.get(from * width..(from + n) * width);
                Input::Hidden(part.unwrap_or(rows))
            }
        }
    }
}

/// One step and where its result goes.
pub struct Job {
    /// The step.
    pub step: Step,
    /// Its input.
    pub input: Rows,
    /// Gets the result.
    pub reply: Reply<Done>,
}

/// A step's result.
#[derive(Clone, Debug, PartialEq)]
pub struct Done {
    /// Hidden rows or logits rows, as [`Stage::run`] says.
    pub rows: Vec<f32>,
    /// Time in the stage.
    pub compute: Duration,
    /// Time in the queue.
    pub queued: Duration,
}

/// For whom a session is opened, and what may be done with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Whoever it is: owners have their turns one after the other, however many sessions each has.
    pub owner: u64,
    /// Its rows may run with those of others also where that changes bits, within the noise of the model's kernels.
    pub fast: bool,
}

/// The queue is full; try again later or elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stage worker's queue of {max} is full")]
pub struct Busy {
    /// The queue's length.
    pub max: usize,
}

/// A handle to a stage worker. The thread ends, and the stage is dropped, when
/// the last handle is dropped and the queue is empty.
#[derive(Clone)]
pub struct Worker {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
    /// None where the worker is driven by hand.
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    shape: StageShape,
    queue_max: usize,
    queue: Mutex<Queue>,
    wake: Wake,
}

/// Who is told that something waits.
enum Wake {
    Thread(Condvar),
    Hand(Box<dyn Fn() + Send + Sync>),
}

impl Worker {
    /// Starts the thread. `queue` bounds the opens and steps that wait.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn spawn(stage: Box<dyn Stage>, queue: usize) -> io::Result<Worker> {
        let runner = Runner::new(stage, queue, Wake::Thread(Condvar::new()));
        let shared = Arc::clone(&runner.shared);
        let thread = std::thread::Builder::new()
            .name("stage".into())
            .spawn(move || runner.run())?;
        let thread = Some(thread);
        Ok(Worker {
            handle: Arc::new(Handle { shared, thread }),
        })
    }

    /// A worker without a thread: whoever has its other end says when a step runs, and how long it
    /// took. `wake` is called whenever something was queued or closed; it must not block.
    pub fn by_hand(
        stage: Box<dyn Stage>,
        queue: usize,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> (Worker, WorkerByHand) {
        let runner = Runner::new(stage, queue, Wake::Hand(Box::new(wake)));
        let shared = Arc::clone(&runner.shared);
        let thread = None;
        let worker = Worker {
            handle: Arc::new(Handle { shared, thread }),
        };
        (worker, WorkerByHand::new(runner))
    }

    /// Whether both are handles to the same stage.
    pub fn is(&self, other: &Worker) -> bool {
        Arc::ptr_eq(&self.handle, &other.handle)
    }

    /// The stage's dimensions.
    pub fn shape(&self) -> &StageShape {
        &self.shared().shape
    }

    /// The stage's counters after the latest step.
    pub fn stats(&self) -> StageStats {
        self.shared().lock().stats.clone()
    }

    /// Opens and steps that wait.
    pub fn queued(&self) -> usize {
        self.shared().lock().items.len()
    }

    /// Whether the thread runs. Once it has panicked it takes no more work, and never will.
    pub fn is_alive(&self) -> bool {
        match &self.handle.thread {
            Some(thread) => !thread.is_finished(),
            None => !self.shared().lock().dead,
        }
    }

    /// Queues a step. The reply is called in any case once this returns `Ok`.
    ///
    /// # Errors
    /// [`Busy`] when the queue is full: the job is dropped, its reply too.
    pub fn submit(&self, job: Job) -> Result<(), Busy> {
        let run = Run::new(job, Instant::now());
        self.shared().push(Item::Run(Box::new(run)))
    }

    /// Queues [`Stage::open_beside`] for nobody in particular, whose bits do not change.
    ///
    /// # Errors
    /// [`Busy`] when the queue is full.
    pub fn open(
        &self,
        n_ctx: u32,
        layers: Range<u32>,
        waiter: impl SlotWaiter + 'static,
    ) -> Result<(), Busy> {
        self.open_for(Share::default(), n_ctx, layers, waiter)
    }

    /// Queues [`Stage::open_beside`].
    ///
    /// # Errors
    /// [`Busy`] when the queue is full.
    pub fn open_for(
        &self,
        share: Share,
        n_ctx: u32,
        layers: Range<u32>,
        waiter: impl SlotWaiter + 'static,
    ) -> Result<(), Busy> {
        self.shared().push(Item::Open {
            n_ctx,
            layers,
            share,
            waiter: Box::new(waiter),
        })
    }

    /// Closes a slot as soon as the step that runs now is over: never refused,
    /// so that KV is never lost. Steps of the slot that still wait do not run;
    /// their replies get [`EngineError::BadSlot`].
    pub fn close(&self, slot: Slot) {
        let mut queue = self.shared().lock();
        if queue.dead {
            return;
        }
        let dropped = queue.close(slot);
        drop(queue);
        self.shared().notify();
        for job in dropped {
            (job.reply)(Err(EngineError::BadSlot(slot)));
        }
    }

    /// Queues [`Stage::copy`], between two steps; `reply` gets the result.
    ///
    /// # Errors
    /// [`Busy`] when the queue is full.
    pub fn copy(&self, from: Slot, to: Slot, n: u32, reply: Reply<u32>) -> Result<(), Busy> {
        let copied = Arc::new(AtomicU32::new(0));
        let n_copied = Arc::clone(&copied);
        let change = Box::new(move |stage: &mut dyn Stage| {
            n_copied.store(stage.copy(from, to, n)?, Ordering::Relaxed);
            Ok(())
        });
        // On the same thread, right behind it.
        let reply: Reply<()> =
            Box::new(move |done| reply(done.map(|()| copied.load(Ordering::Relaxed))));
        self.shared().push(Item::Change { change, reply })
    }

    /// Queues [`Stage::add`]; `reply` gets the result.
    ///
    /// # Errors
    /// [`Busy`] when the queue is full: what was loaded is dropped.
    pub fn add(&self, loaded: Loaded, reply: Reply<()>) -> Result<(), Busy> {
        let change = Box::new(move |stage: &mut dyn Stage| stage.add(loaded));
        self.shared().push(Item::Change { change, reply })
    }

    /// Queues [`Stage::remove`]; `reply` is called when it is done.
    ///
    /// # Errors
    /// [`Busy`] when the queue is full.
    pub fn remove(&self, layers: Range<u32>, reply: Reply<()>) -> Result<(), Busy> {
        let change = Box::new(move |stage: &mut dyn Stage| {
            stage.remove(&layers);
            Ok(())
        });
        self.shared().push(Item::Change { change, reply })
    }

    /// Queues [`Stage::limit`].
    ///
    /// # Errors
    /// [`Busy`] when the queue is full.
    pub fn limit(&self, kv_bytes_max: u64) -> Result<(), Busy> {
        let change = Box::new(move |stage: &mut dyn Stage| {
            stage.limit(kv_bytes_max);
            Ok(())
        });
        let reply = Box::new(|_| {});
        self.shared().push(Item::Change { change, reply })
    }

    /// Layers held now.
    pub fn held(&self) -> Held {
        self.shared().lock().stats.held.clone()
    }

    fn shared(&self) -> &Shared {
        &self.handle.shared
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.notify();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // The queue holds no invariant that a panic could break.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, item: Item) -> Result<(), Busy> {
        let mut queue = self.lock();
        if queue.dead {
            drop(queue);
            item.stopped();
            return Ok(());
        }
        if queue.items.len() >= self.queue_max {
            return Err(Busy {
                max: self.queue_max,
            });
        }
        queue.items.push_back(item);
        drop(queue);
        self.notify();
        Ok(())
    }

    fn notify(&self) {
        match &self.wake {
            Wake::Thread(asleep) => asleep.notify_one(),
            Wake::Hand(call) => call(),
        }
    }

    /// Waits on the thread for what is next, looking out for it for `awake` before sleeping.
    fn pop(&self, asleep: &Condvar, awake: Duration, worth: Worth<'_>) -> Option<Taken> {
        let begun = Instant::now();
        let mut queue = self.lock();
        while queue.items.is_empty() && !queue.closed && begun.elapsed() < awake {
            drop(queue);
            std::thread::yield_now();
            queue = self.lock();
        }
        loop {
            let now = Instant::now();
            queue = match queue.take(Some(now), worth) {
                Taken::Nothing if queue.closed => return None,
                Taken::Nothing => asleep.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Taken::Wait(until) => {
                    let wait = until.saturating_duration_since(now);
                    let woken = asleep.wait_timeout(queue, wait);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
                taken => return Some(taken),
            };
        }
    }
}

#[cfg(test)]
mod tests;
