//! A stage worker without a thread: the simulator's end of it.

use std::time::Duration;

use super::Job;
use super::queue::Taken;
use super::runner::Runner;

/// What runs a worker that was made by [`super::Worker::by_hand`]. Dropping it is the death of the
/// stage: whoever waits for it is told so.
pub struct WorkerByHand {
    runner: Runner,
    taken: Option<Taken>,
}

impl WorkerByHand {
    pub(super) fn new(runner: Runner) -> Self {
        Self {
            runner,
            taken: None,
        }
    }

    /// Takes the next item off the queue, as the thread would: from now on it cannot be taken back.
    /// How many rows times layers it runs, 0 for anything else; `None` where nothing waits.
    pub fn take(&mut self) -> Option<u64> {
        let taken = self.runner.shared.lock().take(None, &|_, _| None);
        let cells = |job: &Job| u64::from(job.step.n_rows) * job.step.layers.len() as u64;
        let cells = match &taken {
            Taken::Nothing | Taken::Wait(_) => return None,
            Taken::Item(_) => 0,
            Taken::Rows(runs) => runs.iter().map(|run| cells(&run.job)).sum(),
            Taken::Long(run, _) => cells(&run.job),
        };
        self.taken = Some(taken);
        Some(cells)
    }

    /// Runs what was taken, and says that it took so long.
    pub fn run(&mut self, took: Duration) {
        if let Some(taken) = self.taken.take()
            && self.runner.handle(taken, Some(took)).is_err()
        {
            self.runner.die();
        }
    }

    /// Whether every handle is gone and nothing waits: there will be no more work.
    pub fn is_over(&self) -> bool {
        let queue = self.runner.shared.lock();
        queue.closed && queue.items.is_empty()
    }
}

impl Drop for WorkerByHand {
    fn drop(&mut self) {
        if let Some(taken) = self.taken.take() {
            taken.stopped();
        }
        self.runner.stop();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::channel;

    use super::*;
    use crate::chain::ChainStage;
    use crate::stage::{EngineError, Slot, Step, Want};
    use crate::worker::{Done, Reply, Rows, Worker};

    #[test]
    fn steps_run_when_the_hand_says_so_and_take_what_it_says() {
        let woken = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&woken);
        let stage = Box::new(ChainStage::new(3, 32, 50, 0..3, 1));
        let (worker, mut hand) = Worker::by_hand(stage, 4, move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(hand.take(), None);
        let (tx, slot) = channel();
        let reply: Reply<Slot> = Box::new(move |slot| drop(tx.send(slot)));
        worker.open(64, 0..3, reply).unwrap();
        assert_eq!((woken.load(Ordering::Relaxed), hand.take()), (1, Some(0)));
        assert!(slot.try_recv().is_err(), "taken, not yet run");
        hand.run(Duration::ZERO);
        let slot = slot.try_recv().unwrap().unwrap();
        let (tx, done) = channel();
        let job = || {
            let (tx, step) = (
                tx.clone(),
                Step {
                    slot,
                    layers: 0..3,
                    pos0: 0,
                    n_rows: 2,
                    want: Want::None,
                },
            );
            let reply: Reply<Done> = Box::new(move |done| drop(tx.send(done)));
            Job {
                step,
                input: Rows::Tokens(vec![1, 2]),
                reply,
            }
        };
        worker.submit(job()).unwrap();
        assert_eq!(hand.take(), Some(6));
        hand.run(Duration::from_millis(7));
        let took = done.try_recv().unwrap().unwrap().compute;
        assert_eq!(took, Duration::from_millis(7));
        worker.submit(job()).unwrap();
        worker.submit(job()).unwrap();
        assert_eq!(hand.take(), Some(6));
        drop(hand);
        for _ in 0..2 {
            assert_eq!(done.try_recv().unwrap(), Err(EngineError::Stopped));
        }
        assert!(!worker.is_alive());
    }
}
