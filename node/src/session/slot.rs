//! KV of one session in a stage worker, freed when dropped: whatever ends a session frees it.

use engine::{EngineError, Share, Slot, SlotWaiter, Worker};
use swarm_proto::{Failure, FailureCode, Fault, Numerics, Open};
use tokio::{sync::oneshot, time::timeout};

use super::{
    admit::Admitted,
    failure::fail,
    hop::{Served, Shared},
};

/// Sessions that give way to one: more are not worth it.
const GIVE_WAY_MAX: usize = 8;

impl Shared {
    /// KV for a session; those that nothing runs on give way to it, unless it only stands by.
    pub(super) async fn room_for(
        &self,
        open: &Open,
        admitted: &Admitted,
        served: &Served,
    ) -> Result<SlotGuard, Failure> {
        for _ in 0..GIVE_WAY_MAX {
            match self.kv(open, admitted, served).await {
                Err(full) if full.code == FailureCode::Full && !open.standing_by => {
                    if !self.desks.make_room().await {
                        return Err(full);
                    }
                }
                kv => return kv,
            }
        }
        self.kv(open, admitted, served).await
    }

    async fn kv(
        &self,
        open: &Open,
        admitted: &Admitted,
        served: &Served,
    ) -> Result<SlotGuard, Failure> {
        let at = admitted.at;
        let (to, slot) = oneshot::channel();
        let worker = served.worker.clone();
        let waiter = KvWaiter { to, worker };
        let local = |code, message: String| fail(at, Fault::Local, code, message);
        served
            .worker
            .open_for(share(open), open.n_ctx, admitted.layers.clone(), waiter)
            .map_err(|e| local(FailureCode::Full, e.to_string()))?;
        let deadline = self.limits.deadlines.open;
        match timeout(deadline, slot).await {
            Ok(Ok(Ok(slot))) => Ok(slot),
            Ok(Ok(Err(e))) => Err(local(engine_code(&e), e.to_string())),
            Ok(Err(_)) => Err(local(
                FailureCode::Engine,
                "the stage worker is gone".into(),
            )),
            Err(_) => {
                let message = format!("no KV within {deadline:?}: the stage worker is busy");
                Err(local(FailureCode::Deadline, message))
            }
        }
    }
}

fn engine_code(e: &engine::EngineError) -> FailureCode {
    match e {
        engine::EngineError::Full { .. } => FailureCode::Full,
        _ => FailureCode::Engine,
    }
}

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
