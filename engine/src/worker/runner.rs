//! Who has the stage: runs what the queue gives, on the worker's thread or when a hand says so.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::queue::{Item, Queue, Run, Taken};
use super::{AWAKE_MAX, Done, Job, Reply, Rows, SPARE_MAX, Shared, Wake};
use crate::stage::{EngineError, Slot, Stage, Step, Want};

/// Who has the stage and runs what the queue gives.
pub(super) struct Runner {
    pub(super) shared: Arc<Shared>,
    stage: Box<dyn Stage>,
    spare: Vec<Vec<f32>>,
}

impl Runner {
    pub(super) fn new(stage: Box<dyn Stage>, queue: usize, wake: Wake) -> Self {
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

    pub(super) fn run(mut self) {
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
    pub(super) fn handle(&mut self, taken: Taken, took: Option<Duration>) -> Result<(), ()> {
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
        let want = if last || matches!(whole.want, Want::All | Want::Normed) {
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
        let (slot, n_rows) = (whole.slot, part.n_rows);
        self.shared.lock().prompted(slot, n_rows, end, compute);
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

    pub(super) fn die(&self) {
        tracing::error!("the stage worker's thread panicked; it takes no more work");
        self.stop();
    }

    /// Takes no more work; what waits is told so.
    pub(super) fn stop(&self) {
        let items = {
            let mut queue = self.shared.lock();
            queue.dead = true;
            std::mem::take(&mut queue.items)
        };
        items.into_iter().for_each(Item::stopped);
    }
}
