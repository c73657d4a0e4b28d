//! What waits for the stage, and which of it goes first. Pure.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Instant;

use super::{Job, Reply, SlotWaiter};
use crate::stage::{EngineError, Slot, Stage, StageStats};

/// How often a step may be overtaken: keeps prefill going under many decoders.
const OVERTAKEN_MAX: u32 = 4;

#[derive(Default)]
pub(super) struct Queue {
    pub(super) items: VecDeque<Item>,
    pub(super) stats: StageStats,
    pub(super) closed: bool,
    pub(super) dead: bool,
}

/// What is done to the stage between two steps.
pub(super) type Change = Box<dyn FnOnce(&mut dyn Stage) -> Result<(), EngineError> + Send>;

pub(super) enum Item {
    Open {
        n_ctx: u32,
        layers: Range<u32>,
        waiter: Box<dyn SlotWaiter>,
    },
    Close(Slot),
    Change {
        change: Change,
        reply: Reply<()>,
    },
    Run {
        job: Job,
        since: Instant,
        overtaken: u32,
    },
}

impl Queue {
    /// Puts the closing first, where it keeps nobody waiting for long and may
    /// make room for an opening; gives back the slot's steps.
    pub(super) fn close(&mut self, slot: Slot) -> Vec<Job> {
        let mut dropped = Vec::new();
        for item in std::mem::take(&mut self.items) {
            match item {
                Item::Run { job, .. } if job.step.slot == slot => dropped.push(job),
                other => self.items.push_back(other),
            }
        }
        self.items.push_front(Item::Close(slot));
        dropped
    }

    /// The first item, or a single row that may overtake it.
    pub(super) fn take(&mut self) -> Option<Item> {
        let at = self.first_decode().unwrap_or(0);
        for item in self.items.iter_mut().take(at) {
            if let Item::Run { overtaken, .. } = item {
                *overtaken += 1;
            }
        }
        self.items.remove(at)
    }

    fn first_decode(&self) -> Option<usize> {
        for (at, item) in self.items.iter().enumerate() {
            match item {
                Item::Run { job, .. } if job.step.n_rows == 1 => {
                    let slot = job.step.slot;
                    if !self
                        .items
                        .iter()
                        .take(at)
                        .any(|earlier| earlier.slot() == Some(slot))
                    {
                        return Some(at);
                    }
                }
                Item::Run { overtaken, .. } if *overtaken >= OVERTAKEN_MAX => return None,
                // Short, and somebody waits for it: at the head nothing overtakes it.
                Item::Open { .. } | Item::Close(_) | Item::Change { .. } if at == 0 => {
                    return None;
                }
                _ => {}
            }
        }
        None
    }
}

impl Item {
    fn slot(&self) -> Option<Slot> {
        match self {
            Item::Open { .. } | Item::Change { .. } => None,
            Item::Close(slot) => Some(*slot),
            Item::Run { job, .. } => Some(job.step.slot),
        }
    }

    pub(super) fn stopped(self) {
        match self {
            Item::Open { waiter, .. } => waiter.take(Err(EngineError::Stopped)),
            Item::Close(_) => {}
            Item::Change { reply, .. } => reply(Err(EngineError::Stopped)),
            Item::Run { job, .. } => (job.reply)(Err(EngineError::Stopped)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stage::{Step, Want};
    use crate::worker::{Reply, Rows};

    #[test]
    fn opening_and_closing_are_not_overtaken_for_ever() {
        let slot = |n| Slot(n);
        let row = |n| {
            let step = Step {
                slot: slot(n),
                layers: 0..3,
                pos0: 0,
                n_rows: 1,
                want: Want::None,
            };
            Item::Run {
                job: Job {
                    step,
                    input: Rows::Tokens(vec![1]),
                    reply: Box::new(|_| ()),
                },
                since: Instant::now(),
                overtaken: 0,
            }
        };
        let mut queue = Queue::default();
        queue.items.push_back(Item::Close(slot(9)));
        queue.items.push_back(row(1));
        let nobody: Reply<Slot> = Box::new(|_| ());
        queue.items.push_back(Item::Open {
            n_ctx: 64,
            layers: 0..3,
            waiter: Box::new(nobody),
        });
        // Single rows keep coming; what was there first still has its turn.
        let mut taken = Vec::new();
        for n in 2..5 {
            queue.items.push_back(row(n));
            taken.push(match queue.take() {
                Some(Item::Close(_)) => "close",
                Some(Item::Open { .. }) => "open",
                Some(Item::Run { .. }) => "row",
                Some(_) | None => "something else",
            });
        }
        assert_eq!(taken, ["close", "row", "open"]);
    }
}
