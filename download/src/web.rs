//! Files at plain addresses: `downloads/<hash of the address and its validator>/<name>`.
//!
//! A file that changed at its address goes into another folder: what was imported in place stays as it is.

use std::{fs, path::PathBuf};

use url::Url;

use crate::{
    DownloadError, Progress, Settings,
    body::{Wanted, check_room, incomplete, lock, make_folder},
    http::{Follow, Http, Reply},
    source::{file_name, shown},
};

pub(crate) fn obtain(
    url: &Url,
    settings: &Settings,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf, DownloadError> {
    let http = Http::new(settings);
    let reply = http.head(url, Follow::Anywhere)?;
    if reply.status() != 200 {
        return Err(reply.refusal());
    }
    let bytes = reply.number("content-length");
    let bytes = bytes.ok_or_else(|| reply.wrong("the server does not say how long the file is"))?;
    let name = file_name(url).ok_or_else(|| reply.wrong("it is no .gguf"))?;
    let mark = validator(&reply);
    let folder = folder_name(url, mark.as_deref().unwrap_or_default());
    let folder = settings.downloads.join(folder);
    make_folder(&folder)?;
    let target = folder.join(name);
    let here = |path: &PathBuf| fs::metadata(path).is_ok_and(|meta| meta.len() == bytes);
    if mark.is_some() && here(&target) {
        return Ok(target);
    }
    let _lock = lock(&folder.join("lock"), &target)?;
    if mark.is_none() {
        // Nothing says that what lies here is of the same file.
        let _ = fs::remove_file(incomplete(&target));
    }
    let wanted = Wanted {
        url,
        target: &target,
        bytes,
        sha256: None,
        if_range: mark.as_deref(),
        pause: settings.pause,
    };
    check_room(&folder, wanted.missing())?;
    wanted.fetch(&http, &mut |done| progress(Progress { done, total: bytes }))?;
    Ok(target)
}

/// What a range may be asked for by: a strong ETag, else the date of the last change.
fn validator(reply: &Reply) -> Option<String> {
    let etag = reply.header("etag").filter(|etag| !etag.starts_with("W/"));
    let mark = etag.or_else(|| reply.header("last-modified"));
    mark.map(ToOwned::to_owned)
}

/// A key behind a `?` is part of how to ask, not of what is there.
fn folder_name(url: &Url, validator: &str) -> String {
    let what = format!("{}\0{validator}", shown(url.as_str()));
    blake3::hash(what.as_bytes())
        .to_hex()
        .chars()
        .take(16)
        .collect()
}
