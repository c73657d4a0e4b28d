//! Ctrl-C (and SIGTERM): the first asks, so that the session's KV is freed on every hop; the second
//! ends the process at once.

use std::ops::Deref;
use std::time::Duration;

use node::answer::Cancel;

use crate::failure::{Failure, INTERRUPTED};

/// Saying goodbye to every hop may take this long; whoever pressed Ctrl-C is waiting.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Listens for the rest of the process; clones share what was heard.
#[derive(Clone)]
pub struct Interrupt {
    heard: Cancel,
}

impl Deref for Interrupt {
    type Target = Cancel;

    fn deref(&self) -> &Cancel {
        &self.heard
    }
}

impl Interrupt {
    /// Starts listening. Needs a tokio runtime.
    pub fn listen() -> Self {
        let heard = Cancel::new();
        let theirs = heard.clone();
        tokio::spawn(async move {
            // A system that gives no signals leaves Ctrl-C to end the process, as without this.
            let Ok(mut signals) = Signals::new() else {
                return;
            };
            while signals.next().await {
                if theirs.set() {
                    std::process::exit(i32::from(INTERRUPTED));
                }
            }
        });
        Self { heard }
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
}

/// Ends the process if it came: for long work that holds nothing anywhere else.
pub fn end_if_set(heard: &Cancel) {
    if heard.is_set() {
        std::process::exit(i32::from(INTERRUPTED));
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
