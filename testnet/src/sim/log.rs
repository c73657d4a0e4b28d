//! What happened when, as a hash by which two runs compare, and as text for who looks into one seed.

use std::cell::Cell;
use std::fmt::Arguments;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

/// Something that must never happen, happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// Virtual milliseconds since the beginning.
    pub at_ms: u64,
    /// The rule.
    pub invariant: String,
    /// Who, and what.
    pub detail: String,
}

thread_local! {
    /// When the run on this thread began.
    static START: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// How far the run on this thread is, for who prints what it logs; none outside of one.
pub fn virtual_time() -> Option<Duration> {
    START.get().map(|start| start.elapsed())
}

/// The log of one seed.
pub(super) struct Log {
    start: Instant,
    hash: Mutex<blake3::Hasher>,
    violation: Mutex<Option<Violation>>,
}

impl Drop for Log {
    fn drop(&mut self) {
        // Outside of the runtime there is no virtual time.
        START.set(None);
    }
}

impl Log {
    /// Begins now.
    pub(super) fn new() -> Self {
        let start = Instant::now();
        START.set(Some(start));
        Self {
            start,
            hash: Mutex::default(),
            violation: Mutex::default(),
        }
    }

    /// Virtual time since the beginning.
    pub(super) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Notes an event in words.
    pub(super) fn note(&self, what: Arguments<'_>) {
        let text = what.to_string();
        tracing::info!(target: "sim", "{text}");
        self.mark(text.as_bytes());
    }

    /// Notes an event that is too frequent for words.
    pub(super) fn mark(&self, what: &[u8]) {
        let at = self.elapsed().as_micros() as u64;
        lock(&self.hash).update(&at.to_le_bytes()).update(what);
    }

    /// Notes that a rule is broken; the first one counts.
    pub(super) fn broken(&self, invariant: &str, detail: Arguments<'_>) {
        self.note(format_args!("BROKEN: {invariant}: {detail}"));
        let at_ms = self.elapsed().as_millis() as u64;
        lock(&self.violation).get_or_insert_with(|| Violation {
            at_ms,
            invariant: invariant.to_owned(),
            detail: detail.to_string(),
        });
    }

    /// The first rule that was broken.
    pub(super) fn violation(&self) -> Option<Violation> {
        lock(&self.violation).clone()
    }

    /// The hash of all that was noted so far.
    pub(super) fn hash(&self) -> String {
        lock(&self.hash).finalize().to_hex()[..16].to_owned()
    }
}

/// Everything of a seed runs on one thread; a panic is found and reported by itself.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
