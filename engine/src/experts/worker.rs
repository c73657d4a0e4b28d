//! The thread that owns a holder: calls in a bounded queue, several at a time
//! into one go.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use super::holder::{ExpertHolder, HolderStats};
use super::message::{ExpertCall, ExpertError, ExpertReply};

/// Most calls that are computed in one go: later ones wait no longer than that.
const TOGETHER_MAX: usize = 16;

/// What is done with an answer; called on the worker's thread.
pub type HolderReply = Box<dyn FnOnce(Result<ExpertReply, ExpertError>) + Send>;

struct Item {
    call: ExpertCall,
    reply: HolderReply,
}

/// A holder on its own thread.
pub struct ExpertWorker {
    queue: Option<SyncSender<Item>>,
    queue_max: usize,
    stats: Arc<Mutex<HolderStats>>,
    thread: Option<JoinHandle<()>>,
}

impl ExpertWorker {
    /// Starts the thread; `queue_max` calls may wait.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn spawn(mut holder: ExpertHolder, queue_max: usize) -> std::io::Result<ExpertWorker> {
        let (queue, items) = sync_channel::<Item>(queue_max.max(1));
        let stats = Arc::new(Mutex::new(holder.stats()));
        let shown = Arc::clone(&stats);
        let run = move || {
            while let Some(items) = next(&items) {
                let (calls, replies): (Vec<_>, Vec<_>) = items
                    .into_iter()
                    .map(|item| (item.call, item.reply))
                    .unzip();
                let answers = holder.compute(&calls);
                // Before the answers: who has one finds it counted.
                *shown.lock().unwrap_or_else(PoisonError::into_inner) = holder.stats();
                for (answer, reply) in answers.into_iter().zip(replies) {
                    reply(answer);
                }
            }
        };
        let thread = Builder::new().name("experts".into()).spawn(run)?;
        Ok(ExpertWorker {
            queue: Some(queue),
            queue_max: queue_max.max(1),
            stats,
            thread: Some(thread),
        })
    }

    /// Puts a call into the queue, whose answer `reply` gets.
    ///
    /// # Errors
    /// The queue is full, or the thread has ended.
    pub fn submit(&self, call: ExpertCall, reply: HolderReply) -> Result<(), ExpertError> {
        let gone = || ExpertError::Backend("the experts' thread has ended".into());
        let queue = self.queue.as_ref().ok_or_else(gone)?;
        queue
            .try_send(Item { call, reply })
            .map_err(|why| match why {
                TrySendError::Full(_) => ExpertError::Busy {
                    max: self.queue_max,
                },
                TrySendError::Disconnected(_) => gone(),
            })
    }

    /// What the holder has and has done.
    pub fn stats(&self) -> HolderStats {
        let stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.clone()
    }
}

impl Drop for ExpertWorker {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The next call and what else waits; `None` when nobody can send any more.
fn next(items: &Receiver<Item>) -> Option<Vec<Item>> {
    let mut together = vec![items.recv().ok()?];
    while together.len() < TOGETHER_MAX
        && let Ok(item) = items.try_recv()
    {
        together.push(item);
    }
    Some(together)
}
