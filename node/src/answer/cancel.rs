//! A word that ends what goes on: Ctrl-C, or a client that hung up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// Clones share what was said.
#[derive(Clone, Debug, Default)]
pub struct Cancel {
    said: Arc<Said>,
}

#[derive(Debug, Default)]
struct Said {
    flag: AtomicBool,
    notify: Notify,
}

impl Cancel {
    /// Nothing was said yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Says it; whether it had been said before.
    pub fn set(&self) -> bool {
        let before = self.said.flag.swap(true, Ordering::SeqCst);
        self.said.notify.notify_waiters();
        before
    }

    /// Whether it was said.
    pub fn is_set(&self) -> bool {
        self.said.flag.load(Ordering::SeqCst)
    }

    /// Takes it back, when it meant only what was going on (an answer in a chat).
    pub fn clear(&self) {
        self.said.flag.store(false, Ordering::SeqCst);
    }

    /// Waits for it.
    ///
    /// # Cancel safety
    /// May be dropped and awaited again; what was said meanwhile is not lost.
    pub async fn wait(&self) {
        loop {
            let notified = self.said.notify.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if self.is_set() {
                return;
            }
            notified.await;
        }
    }
}
