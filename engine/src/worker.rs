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
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::load::Loaded;
use crate::stage::{EngineError, Held, Input, Slot, Stage, StageShape, StageStats, Step, Want};

mod by_hand;
mod pace;
mod queue;

pub use by_hand::WorkerByHand;
use queue::{Item, Queue, Run, Taken, Worth};

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

/// Who has the stage and runs what the queue gives.
struct Runner {
    shared: Arc<Shared>,
    stage: Box<dyn Stage>,
    spare: Vec<Vec<f32>>,
}

impl Runner {
    fn new(stage: Box<dyn Stage>, queue: usize, wake: Wake) -> Self {
        let shared = Shared {
            shape: stage.shape(),
            queue_max: queue.max(1),
            queue: Mutex::new(Queue::new(stage.stats())),
            wake,
        };
        Runner {
            shared: Arc::new(shared),
            stage,
            spare: Vec::new(),
        }
    }

    fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let Wake::Thread(asleep) = &shared.wake else {
            return;
        };
        let mut awake = Duration::ZERO;
        loop {
            let begun = Instant::now();
            let stage = &self.stage;
            let worth = |bench, rows| stage.worth_waiting(bench, rows);
            let Some(taken) = shared.pop(asleep, awake, &worth) else {
                return;
            };
            let soon = begun.elapsed() <= AWAKE_MAX;
            awake = if soon { AWAKE_MAX } else { Duration::ZERO };
            if self.handle(taken, None).is_err() {
                self.die();
                return;
            }
        }
    }

    /// Does what was taken, which took the time that is given or measured; an error means the stage
    /// panicked and is not to be used again.
    fn handle(&mut self, taken: Taken, took: Option<Duration>) -> Result<(), ()> {
        match taken {
            Taken::Item(item) => self.item(item),
            Taken::Rows(runs) => self.rows(runs, took),
            Taken::Long(run, rows) => self.long(run, rows, took),
            Taken::Wait(_) | Taken::Nothing => Ok(()),
        }
    }

    fn item(&mut self, item: Item) -> Result<(), ()> {
        match item {
            Item::Open { waiter, .. } if !waiter.waits() => Ok(()),
            Item::Open {
                n_ctx,
                layers,
                share,
                waiter,
            } => {
                let opened = self.guarded(|stage| {
                    let slot = stage.open_beside(n_ctx, layers, share.fast)?;
                    Ok((slot, stage.bench(slot)))
                });
                let opened = opened.map(|opened| {
                    opened.map(|(slot, bench)| {
                        self.shared.lock().seat(slot, bench, share.owner);
                        slot
                    })
                });
                self.finish(opened, Box::new(|slot| waiter.take(slot)))
            }
            Item::Close(slot) => {
                let closed = self.guarded(|stage| {
                    stage.close(slot);
                    Ok(())
                });
                self.finish(closed, Box::new(|_| {}))
            }
            Item::Change { change, reply } => {
                let changed = self.guarded(change);
                self.finish(changed, reply)
            }
            Item::Run(run) => {
                let rows = run.job.step.n_rows;
                self.long(run, rows, None)
            }
        }
    }

    /// Single rows in one pass.
    fn rows(&mut self, runs: Vec<Run>, took: Option<Duration>) -> Result<(), ()> {
        let begin = Instant::now();
        let mut outs: Vec<Vec<f32>> = runs
            .iter()
            .map(|_| self.spare.pop().unwrap_or_default())
            .collect();
        let ran = self.guarded(|stage| {
            let steps: Vec<_> = runs.iter().map(|run| run.job.step.clone()).collect();
            let inputs: Vec<_> = runs.iter().map(|run| run.job.input.all()).collect();
            Ok(match (&steps[..], &inputs[..], &mut outs[..]) {
                ([step], [input], [out]) => vec![stage.run(step, input, out)],
                (steps, inputs, outs) => stage.run_rows(steps, inputs, outs),
            })
        });
        let end = Instant::now();
        let compute = took.unwrap_or_else(|| end.saturating_duration_since(begin));
        let slots: Vec<Slot> = runs.iter().map(|run| run.job.step.slot).collect();
        let stats = ran.is_ok().then(|| self.stage.stats());
        {
            let mut queue = self.shared.lock();
            queue.decoded(&slots, end, compute);
            queue.stats = stats.unwrap_or_default();
        }
        let (results, panicked) = match ran {
            Ok(Ok(results)) => (results, false),
            Ok(Err(why)) => (vec![Err(why); runs.len()], false),
            Err(()) => (vec![Err(EngineError::Stopped); runs.len()], true),
        };
        for ((run, rows), result) in runs.into_iter().zip(outs).zip(results) {
            let Job { input, reply, .. } = run.job;
            self.spare_input(input);
            let queued = begin.saturating_duration_since(run.since);
            reply(result.map(|()| Done {
                rows,
                compute,
                queued,
            }));
        }
        if panicked { Err(()) } else { Ok(()) }
    }

    /// So many rows of a longer step; its result when all ran.
    fn long(&mut self, mut run: Box<Run>, rows: u32, took: Option<Duration>) -> Result<(), ()> {
        let begin = Instant::now();
        let whole = run.job.step.clone();
        let last = run.done + rows >= whole.n_rows;
        let want = if last || whole.want == Want::All {
            whole.want
        } else {
            Want::None
        };
        let part = Step {
            pos0: whole.pos0 + run.done,
            n_rows: rows.min(whole.n_rows - run.done),
            want,
            ..whole.clone()
        };
        if run.done == 0 {
            run.queued = begin.saturating_duration_since(run.since);
        }
        let mut out = self.spare.pop().unwrap_or_default();
        let ran = self.guarded(|stage| {
            let input = run.job.input.part(run.done, part.n_rows, whole.n_rows);
            stage.run(&part, &input, &mut out)
        });
        let end = Instant::now();
        let compute = took.unwrap_or_else(|| end.saturating_duration_since(begin));
        self.shared.lock().prompted(part.n_rows, end, compute);
        run.compute += compute;
        let went_well = matches!(ran, Ok(Ok(())));
        if went_well && run.done == 0 {
            std::mem::swap(&mut run.rows, &mut out);
        } else if went_well {
            run.rows.extend_from_slice(&out);
        }
        self.spare_rows(out);
        run.done += part.n_rows;
        if went_well && !last {
            let put_back = self.shared.lock().put_back(run);
            return match put_back {
                Ok(()) => Ok(()),
                Err(run) => {
                    (run.job.reply)(Err(EngineError::BadSlot(whole.slot)));
                    Ok(())
                }
            };
        }
        let Run {
            job,
            rows,
            compute,
            queued,
            ..
        } = *run;
        self.spare_input(job.input);
        let done = ran.map(|ran| {
            ran.map(|()| Done {
                rows,
                compute,
                queued,
            })
        });
        self.finish(done, job.reply)
    }

    fn spare_input(&mut self, input: Rows) {
        if let Rows::Hidden(buffer) = input {
            self.spare_rows(buffer);
        }
    }

    fn spare_rows(&mut self, buffer: Vec<f32>) {
        if self.spare.len() < SPARE_MAX {
            self.spare.push(buffer);
        }
    }

    fn guarded<T>(
        &mut self,
        call: impl FnOnce(&mut dyn Stage) -> Result<T, EngineError>,
    ) -> Result<Result<T, EngineError>, ()> {
        let stage = self.stage.as_mut();
        catch_unwind(AssertUnwindSafe(|| call(stage))).map_err(|_| ())
    }

    fn finish<T>(
        &mut self,
        result: Result<Result<T, EngineError>, ()>,
        reply: Reply<T>,
    ) -> Result<(), ()> {
        match result {
            Ok(result) => {
                self.shared.lock().stats = self.stage.stats();
                reply(result);
                Ok(())
            }
            Err(()) => {
                reply(Err(EngineError::Stopped));
                Err(())
            }
        }
    }

    fn die(&self) {
        tracing::error!("the stage worker's thread panicked; it takes no more work");
        self.stop();
    }

    /// Takes no more work; what waits is told so.
    fn stop(&self) {
        let items = {
            let mut queue = self.shared.lock();
            queue.dead = true;
            std::mem::take(&mut queue.items)
        };
        items.into_iter().for_each(Item::stopped);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::chain::ChainStage;

    fn reply<T: Send + 'static>() -> (Reply<T>, Receiver<Result<T, EngineError>>) {
        let (tx, rx) = channel();
        (Box::new(move |result| drop(tx.send(result))), rx)
    }

    fn open(worker: &Worker) -> Slot {
        let (tx, rx) = reply();
        worker.open(64, 0..3, tx).unwrap();
        rx.recv().unwrap().unwrap()
    }

    fn job(slot: Slot, pos0: u32, tokens: &[u32], reply: Reply<Done>) -> Job {
        let n_rows = tokens.len() as u32;
        let step = Step {
            slot,
            layers: 0..3,
            pos0,
            n_rows,
            want: Want::Last,
        };
        Job {
            step,
            input: Rows::Tokens(tokens.to_vec()),
            reply,
        }
    }

    fn chain() -> ChainStage {
        ChainStage::new(3, 32, 50, 0..3, 1)
    }

    #[test]
    fn steps_run_in_order_and_replies_come() {
        let worker = Worker::spawn(Box::new(chain()), 4).unwrap();
        let slot = open(&worker);
        let (tx, first) = reply();
        worker.submit(job(slot, 0, &[1, 2], tx)).unwrap();
        let (tx, second) = reply();
        worker.submit(job(slot, 2, &[3], tx)).unwrap();
        first.recv().unwrap().unwrap();
        let rows = second.recv().unwrap().unwrap().rows;
        let top = (0..50u32).max_by(|&a, &b| rows[a as usize].total_cmp(&rows[b as usize]));
        assert_eq!(top, Some(chain().expected(&[1, 2, 3])));
        assert_eq!(worker.stats().rows, 3);
        worker.close(slot);
        let (tx, late) = reply();
        worker.submit(job(slot, 3, &[4], tx)).unwrap();
        assert_eq!(late.recv().unwrap(), Err(EngineError::BadSlot(slot)));
    }

    /// A stage whose steps wait for the test; it panics at position 63.
    struct Gate {
        inner: ChainStage,
        gate: Receiver<()>,
    }

    impl Stage for Gate {
        fn shape(&self) -> StageShape {
            self.inner.shape()
        }
        fn open(&mut self, n_ctx: u32, layers: Range<u32>) -> Result<Slot, EngineError> {
            self.inner.open(n_ctx, layers)
        }
        fn close(&mut self, slot: Slot) {
            self.inner.close(slot);
        }
        fn run(
            &mut self,
            step: &Step,
            input: &Input<'_>,
            out: &mut Vec<f32>,
        ) -> Result<(), EngineError> {
            self.gate.recv().map_err(|_| EngineError::Stopped)?;
            assert!(step.pos0 < 63, "as the test wants");
            self.inner.run(step, input, out)
        }
        fn add(&mut self, loaded: Loaded) -> Result<(), EngineError> {
            self.inner.add(loaded)
        }
        fn remove(&mut self, layers: &Range<u32>) {
            self.inner.remove(layers);
        }
        fn limit(&mut self, kv_bytes_max: u64) {
            self.inner.limit(kv_bytes_max);
        }
        fn stats(&self) -> StageStats {
            self.inner.stats()
        }
    }

    #[test]
    fn decode_overtakes_prefill_of_others_and_a_full_queue_refuses() {
        let (open_gate, gate) = channel();
        let worker = Worker::spawn(
            Box::new(Gate {
                inner: chain(),
                gate,
            }),
            3,
        )
        .unwrap();
        let (a, b) = (open(&worker), open(&worker));
        let (order, seen) = channel();
        let note = |what: &'static str| -> Reply<Done> {
            let order = order.clone();
            Box::new(move |result| {
                let _ = order.send((what, result.is_ok()));
            })
        };
        worker.submit(job(a, 0, &[1; 8], note("a0"))).unwrap();
        while worker.queued() > 0 {
            std::thread::yield_now(); // until the thread is inside the first step
        }
        worker.submit(job(a, 8, &[1; 8], note("a8"))).unwrap();
        worker.submit(job(a, 16, &[1], note("a16"))).unwrap();
        worker.submit(job(b, 0, &[1], note("b0"))).unwrap();
        let full = worker.submit(job(b, 1, &[1], note("b1")));
        assert_eq!(full, Err(Busy { max: 3 }));
        (0..4).for_each(|_| open_gate.send(()).unwrap());
        let got: Vec<_> = (0..4).map(|_| seen.recv().unwrap()).collect();
        assert_eq!(
            got,
            [("a0", true), ("b0", true), ("a8", true), ("a16", true)]
        );
    }

    #[test]
    fn closing_drops_the_steps_that_wait() {
        let (open_gate, gate) = channel();
        let inner = chain();
        let worker = Worker::spawn(Box::new(Gate { inner, gate }), 8).unwrap();
        let (a, b) = (open(&worker), open(&worker));
        let (order, seen) = channel();
        let note = |what: &'static str| -> Reply<Done> {
            let order = order.clone();
            Box::new(move |result| {
                let _ = order.send((what, result.map(|done| done.rows.len())));
            })
        };
        worker.submit(job(a, 0, &[1], note("a0"))).unwrap();
        while worker.queued() > 0 {
            std::thread::yield_now(); // until the thread is inside the first step
        }
        worker.submit(job(a, 1, &[1; 8], note("a1"))).unwrap();
        worker.submit(job(b, 0, &[1], note("b0"))).unwrap();
        worker.submit(job(a, 9, &[1], note("a9"))).unwrap();
        worker.close(a);
        let closed = Err(EngineError::BadSlot(a));
        assert_eq!(seen.recv().unwrap(), ("a1", closed.clone()));
        assert_eq!(seen.recv().unwrap(), ("a9", closed));
        // Two passes: for the step that ran already and for that of the other slot.
        (0..2).for_each(|_| open_gate.send(()).unwrap());
        assert_eq!(seen.recv().unwrap(), ("a0", Ok(50)));
        assert_eq!(seen.recv().unwrap(), ("b0", Ok(50)));
        let stats = worker.stats();
        assert_eq!((stats.sessions, stats.steps), (1, 2));
    }

    /// Somebody who left before the stage had time.
    struct Gone;

    impl SlotWaiter for Gone {
        fn waits(&self) -> bool {
            false
        }
        fn take(self: Box<Self>, result: Result<Slot, EngineError>) {
            panic!("nobody waits for {result:?}");
        }
    }

    #[test]
    fn nothing_is_opened_for_somebody_who_left() {
        let worker = Worker::spawn(Box::new(chain()), 4).unwrap();
        worker.open(64, 0..3, Gone).unwrap();
        // The next slot is the first.
        assert_eq!(open(&worker), Slot(0));
        assert_eq!(worker.stats().sessions, 1);
    }

    #[test]
    fn a_panic_is_an_error_for_everyone() {
        let (open_gate, gate) = channel();
        let worker = Worker::spawn(
            Box::new(Gate {
                inner: chain(),
                gate,
            }),
            3,
        )
        .unwrap();
        let slot = open(&worker);
        open_gate.send(()).unwrap();
        let (tx, rx) = reply();
        worker.submit(job(slot, 63, &[1], tx)).unwrap();
        assert_eq!(rx.recv().unwrap(), Err(EngineError::Stopped));
        let (tx, rx) = reply();
        worker.submit(job(slot, 0, &[1], tx)).unwrap();
        assert_eq!(rx.recv().unwrap(), Err(EngineError::Stopped));
        while worker.is_alive() {
            std::thread::yield_now();
        }
    }
}
