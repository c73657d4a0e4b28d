//! Frames and bytes of session and answer streams, of the whole process: a process is one peer.

use std::sync::atomic::{AtomicU64, Ordering};

/// Of this process.
pub(crate) static TRAFFIC: Traffic = Traffic {
    frames_in: AtomicU64::new(0),
    frames_out: AtomicU64::new(0),
    bytes_in: AtomicU64::new(0),
    bytes_out: AtomicU64::new(0),
};

/// Counters that a frame costs two additions.
#[derive(Debug)]
pub(crate) struct Traffic {
    frames_in: AtomicU64,
    frames_out: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
}

impl Traffic {
    /// Some frames, or bytes, came.
    pub(crate) fn came(&self, frames: u64, bytes: usize) {
        add(&self.frames_in, frames);
        add(&self.bytes_in, bytes as u64);
    }

    /// Some frames, or bytes, went.
    pub(crate) fn sent(&self, frames: u64, bytes: usize) {
        add(&self.frames_out, frames);
        add(&self.bytes_out, bytes as u64);
    }

    /// Frames in and out.
    pub(super) fn frames(&self) -> (u64, u64) {
        (get(&self.frames_in), get(&self.frames_out))
    }

    /// Bytes in and out.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (get(&self.bytes_in), get(&self.bytes_out))
    }
}

fn add(to: &AtomicU64, n: u64) {
    if n > 0 {
        to.fetch_add(n, Ordering::Relaxed);
    }
}

fn get(of: &AtomicU64) -> u64 {
    of.load(Ordering::Relaxed)
}
