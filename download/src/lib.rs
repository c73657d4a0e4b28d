//! Files from elsewhere: from Hugging Face (`hf:…`) and plain `https` addresses to a path on this disk.
//!
//! ```text
//! Source ─▶ hub: HEAD each part ─▶ in the hub's cache? ─▶ body: GET, Range, sha256 ─▶ snapshot path
//!       └─▶ web: HEAD           ─▶ in downloads/?       ─▶ body                     ─▶ path
//! ```
//!
//! It blocks, follows the hub's own cache and token conventions, and knows nothing of models or of a swarm:
//! what a file is worth is decided by whoever hashes it.

mod body;
mod choose;
mod error;
mod http;
mod hub;
mod roots;
mod settings;
mod source;
mod web;

use std::path::PathBuf;

pub use error::DownloadError;
pub use roots::{SystemTls, system_tls};
pub use settings::{Settings, Token};
pub use source::{HubSource, Source, SourceError, Wish};

/// How far a download is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes here.
    pub done: u64,
    /// Bytes in all, of every part.
    pub total: u64,
}

/// The file that a source names, downloaded unless it is here already; of a model in several files the first
/// one, with all the others beside it.
///
/// What arrived stays when it is cut off, and the next call goes on there.
///
/// # Errors
/// The source names nothing, nobody lets us have it, the connection fails again and again, the disk is full,
/// or what came is not what was announced. [`DownloadError::remedy`] says what to try.
pub fn obtain(
    source: &Source,
    settings: &Settings,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf, DownloadError> {
    match source {
        Source::File(path) => Ok(path.clone()),
        Source::Hub(wanted) => hub::obtain(wanted, settings, progress),
        Source::Url(url) => match source::on_hub(url, &settings.endpoint) {
            Some(wanted) => hub::obtain(&wanted, settings, progress),
            None => web::obtain(url, settings, progress),
        },
    }
}
