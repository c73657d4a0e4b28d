//! How a session begins with what another one of the same client holds on this hop.
//!
//! ```text
//! Open, fork ─▶ KV of our own ─▶ ask ─▶ the other session's task: its frames ─▶ Opened, held
//!                                         └▶ stage thread: its KV, lane to lane ─┘
//! ```
//!
//! Nothing is owed: where the other one is gone, has other layers or cannot be copied, the session begins empty, and
//! whoever is above sends again what it holds, or computes it.

use engine::{Slot, Worker};
use swarm_proto::{Dtype, Epoch, ModelId, Numerics, Open, Peer};
use tokio::{sync::oneshot, time::timeout};

use super::{hop::Shared, relay::Relay, retained::Retained};

/// What the two sessions must have in common beside client and layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Alike {
    /// Of the one that is copied: it may hold what was taken back, if that happened in another one.
    epoch: Epoch,
    model: ModelId,
    dtype: Dtype,
    numerics: Numerics,
}

impl Alike {
    fn of(open: &Open, epoch: Epoch) -> Self {
        Self {
            epoch,
            model: open.model,
            dtype: open.dtype,
            numerics: open.numerics,
        }
    }
}

/// Asks the task of a session for its beginning.
pub(super) struct ForkAsk {
    /// Who is above: whoever is above the other one, too, has sent or could have sent all of it.
    pub(super) from: Peer,
    alike: Alike,
    positions: u32,
    /// Where the KV goes.
    worker: Worker,
    to: Slot,
    reply: oneshot::Sender<Lent>,
}

/// What it gives.
struct Lent {
    retained: Retained,
    /// Positions that `retained` stands for, or all that were asked for where nothing is retained.
    positions: u32,
    /// Positions of KV that came.
    copied: oneshot::Receiver<u32>,
}

/// What a session holds as it opens.
pub(super) struct Begun {
    pub(super) held: u32,
    pub(super) retained: Retained,
}

impl Shared {
    /// What a session that opens holds already, in `to`. Whoever is above waits for all of the opening, so half of that
    /// is given to it; a copy that comes later is not made where there are rows.
    pub(super) async fn forked(&self, from: Peer, open: &Open, worker: &Worker, to: Slot) -> Begun {
        let Some(fork) = open.fork else {
            return self.begun_empty();
        };
        let (reply, lent) = oneshot::channel();
        let ask = ForkAsk {
            from,
            alike: Alike::of(open, fork.epoch),
            positions: fork.positions.min(open.n_ctx),
            worker: worker.clone(),
            to,
            reply,
        };
        let begun = match self.desks.fork(open, fork.session, ask) {
            true => timeout(self.limits.deadlines.open / 2, begun(lent)).await,
            false => Ok(None),
        };
        let begun = begun.ok().flatten();
        let begun = begun.unwrap_or_else(|| self.begun_empty());
        let held = begun.held;
        tracing::debug!(held, of = fork.positions, "begins as another session");
        self.metrics.forked(held);
        begun
    }

    fn begun_empty(&self) -> Begun {
        Begun {
            held: 0,
            retained: Retained::new(self.retained.clone()),
        }
    }
}

async fn begun(lent: oneshot::Receiver<Lent>) -> Option<Begun> {
    let Lent {
        retained,
        positions,
        copied,
    } = lent.await.ok()?;
    let held = copied.await.ok()?;
    // What is retained and what is held are the same, but for the tail, which retains nothing.
    let whole = held == positions || retained.end() == Some(0);
    (held > 0 && whole).then_some(Begun { held, retained })
}

impl Relay {
    /// Gives another session of this client its beginning; nothing where that is not the same thing.
    pub(super) fn lend(&mut self, ask: ForkAsk) {
        let ours = Alike::of(self.open(), self.open().epoch);
        if ask.alike != ours || !ask.worker.is(self.worker()) {
            return;
        }
        let (retained, positions) = match self.tail() {
            true => (self.retained().copy(0), ask.positions),
            false => {
                let copy = self.retained().copy(ask.positions);
                let end = copy.end().unwrap_or(0);
                (copy, end)
            }
        };
        if positions == 0 {
            return;
        }
        let (to, copied) = oneshot::channel();
        let reply = Box::new(move |n: Result<u32, engine::EngineError>| {
            // Whoever asked has gone on without.
            let _ = to.send(n.unwrap_or(0));
        });
        let queued = ask.worker.copy(self.slot(), ask.to, positions, reply);
        if queued.is_ok() {
            let _ = ask.reply.send(Lent {
                retained,
                positions,
                copied,
            });
        }
    }
}
