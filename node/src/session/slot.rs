//! KV of one session in a stage worker, freed when dropped: whatever ends a session frees it.

use engine::{Slot, Worker};

/// A slot that is closed on drop.
pub(super) struct SlotGuard {
    worker: Worker,
    slot: Slot,
}

impl SlotGuard {
    pub(super) fn new(worker: Worker, slot: Slot) -> Self {
        Self { worker, slot }
    }

    pub(super) fn slot(&self) -> Slot {
        self.slot
    }
}

impl Drop for SlotGuard {
    fn drop(&mut self) {
        self.worker.close(self.slot);
    }
}
