//! The async runtime of a process of ours: one thread, which runs the network and every session.
//!
//! A frame then wakes no other thread on its way between a socket and a session, which costs more
//! than handling it: on a machine with idle cores some 35 µs each time. Weights never run on it, and
//! what blocks goes to threads of its own.

use std::{future::Future, io};

/// Runs `main` to its end on the runtime's own thread, then ends what still runs without waiting.
///
/// # Errors
/// The system has no thread left.
///
/// # Panics
/// With `main`'s panic.
pub fn run<T: Send + 'static>(main: impl Future<Output = T> + Send + 'static) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("async")
        .enable_all()
        .build()?;
    // Spawned: `block_on` alone would poll it here, on a second thread.
    let ended = runtime.block_on(runtime.spawn(main));
    runtime.shutdown_background();
    match ended {
        Ok(value) => Ok(value),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(error) => Err(io::Error::other(error)),
    }
}
