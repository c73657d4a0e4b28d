//! The async runtime of a command: a client moves little, and whoever computes has threads of its own.

/// Two threads, so that the network goes on while one waits for a terminal or for a whole model.
const THREADS: usize = 2;

/// Runs `work` to its end.
pub fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()?
        .block_on(work)
}
