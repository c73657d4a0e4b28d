//! KV of one session in a stage worker, freed when dropped: whatever ends a session frees it.

use engine::{EngineError, Share, Slot, SlotWaiter, Worker};
use swarm_proto::{Numerics, Open};
use tokio::sync::oneshot;

/// A client's sessions have their turns together, and run as it wants.
pub(super) fn share(open: &Open) -> Share {
    let [a, b, c, d, e, f, g, h, ..] = open.client.0;
    Share {
        owner: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
        fast: open.numerics == Numerics::Fast,
    }
}

/// The task that opens a session, as the stage worker sees it.
pub(super) struct KvWaiter {
    pub(super) to: oneshot::Sender<Result<SlotGuard, EngineError>>,
    pub(super) worker: Worker,
}

impl SlotWaiter for KvWaiter {
    fn waits(&self) -> bool {
        !self.to.is_closed()
    }

    fn take(self: Box<Self>, result: Result<Slot, EngineError>) {
        let Self { to, worker } = *self;
        // Guarded before it travels: a session that is gone by now must not leak its KV.
        let _ = to.send(result.map(|slot| SlotGuard::new(worker, slot)));
    }
}

/// A slot that is closed on drop.
pub(super) struct SlotGuard {
    worker: Worker,
    slot: Slot,
    freed: bool,
}

impl SlotGuard {
    pub(super) fn new(worker: Worker, slot: Slot) -> Self {
        let freed = false;
        Self {
            worker,
            slot,
            freed,
        }
    }

    /// Frees the KV now; the slot is nobody's after this.
    pub(super) fn free(&mut self) {
        if !std::mem::replace(&mut self.freed, true) {
            self.worker.close(self.slot);
        }
    }

    pub(super) fn slot(&self) -> Slot {
        self.slot
    }
}

impl Drop for SlotGuard {
    fn drop(&mut self) {
        self.free();
    }
}
