//! Models from elsewhere: the file behind `hf:…` or `https://…`, downloaded with a progress bar.

use std::path::{Path, PathBuf};

use download::{DownloadError, Settings, Source};

use crate::failure::Failure;
use crate::{figures, terminal};

/// What the user wrote, as a source of a model.
pub fn source(text: &str) -> Result<Source, Failure> {
    let remedy =
        "hf:OWNER/REPO/FILE.gguf, hf:OWNER/REPO:Q4_K_M, https://HOST/FILE.gguf, or a file here";
    text.parse()
        .map_err(|e: download::SourceError| Failure::usage(e.to_string()).try_this(remedy))
}

/// The file of a source, downloaded unless it is here. Of a model in several files the first.
pub fn obtain(home: &Path, source: &Source) -> anyhow::Result<PathBuf> {
    let settings = Settings::of_env(home).map_err(failure)?;
    let what = match source {
        Source::File(path) => return Ok(path.clone()),
        Source::Hub(hub) => hub.repo.clone(),
        Source::Url(url) => url.host_str().unwrap_or_default().to_owned(),
    };
    let bar = terminal::bar_of_bytes(0, &figures::printable(&what, 32));
    let obtained = download::obtain(source, &settings, &mut |at| {
        bar.set_length(at.total);
        bar.set_position(at.done);
    });
    bar.finish_and_clear();
    Ok(obtained.map_err(failure)?)
}

fn failure(error: DownloadError) -> Failure {
    let failure = Failure::new(error.to_string());
    match error.remedy() {
        Some(remedy) => failure.try_this(remedy),
        None => failure,
    }
}
