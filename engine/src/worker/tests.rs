//! The worker's tests.

use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::chain::ChainStage;
use crate::stage::Want;

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
    fn copy(&mut self, _: Slot, _: Slot, _: u32) -> Result<u32, EngineError> {
        Ok(0)
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
