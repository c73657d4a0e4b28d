//! KV of one session in a stage worker, freed when dropped: whatever ends a session frees it.

use engine::{Slot, Worker};

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
