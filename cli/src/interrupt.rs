//! Ctrl-C (and SIGTERM): the first asks, so that the session's KV is freed on every hop; the second
//! ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

use crate::failure::{Failure, INTERRUPTED};

/// Saying goodbye to every hop may take this long; whoever pressed Ctrl-C is waiting.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Listens for the rest of the process; clones share what was heard.
#[derive(Clone)]
pub struct Interrupt {
    heard: Arc<Heard>,
}

struct Heard {
    flag: AtomicBool,
    notify: Notify,
}

impl Interrupt {
    /// Starts listening. Needs a tokio runtime.
    pub fn listen() -> Self {
        let heard = Arc::new(Heard {
            flag: AtomicBool::new(false),
            notify: Notify::new(),
        });
        let theirs = Arc::clone(&heard);
        tokio::spawn(async move {
            // A system that gives no signals leaves Ctrl-C to end the process, as without this.
            let Ok(mut signals) = Signals::new() else {
                return;
            };
            while signals.next().await {
                if theirs.flag.swap(true, Ordering::SeqCst) {
                    std::process::exit(i32::from(INTERRUPTED));
                }
                theirs.notify.notify_waiters();
            }
        });
        Self { heard }
    }

    /// Whether it came.
    pub fn is_set(&self) -> bool {
        self.heard.flag.load(Ordering::SeqCst)
    }

    /// Ends the process if it came: for long work that holds nothing anywhere else.
    pub fn end_if_set(&self) {
        if self.is_set() {
            std::process::exit(i32::from(INTERRUPTED));
        }
    }

    /// Takes it back, when it meant only what was going on (an answer in a chat).
    pub fn clear(&self) {
        self.heard.flag.store(false, Ordering::SeqCst);
    }

    /// What `work` gives, unless it comes first.
    ///
    /// # Errors
    /// Those of `work`, or that it came.
    pub async fn or_end<T>(
        &self,
        work: impl Future<Output = anyhow::Result<T>>,
    ) -> anyhow::Result<T> {
        tokio::select! {
            biased;
            () = self.wait() => Err(Failure::interrupted().into()),
            done = work => done,
        }
    }

    /// Waits for it.
    ///
    /// # Cancel safety
    /// May be dropped and awaited again; one that came meanwhile is not lost.
    pub async fn wait(&self) {
        loop {
            let notified = self.heard.notify.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if self.is_set() {
                return;
            }
            notified.await;
        }
    }
}

#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) -> bool {
        tokio::select! {
            heard = self.interrupt.recv() => heard.is_some(),
            heard = self.terminate.recv() => heard.is_some(),
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) -> bool {
        tokio::signal::ctrl_c().await.is_ok()
    }
}
