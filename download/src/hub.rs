//! Files of Hugging Face, in the hub's own cache, so that every client of it sees the same files:
//!
//! ```text
//! models--owner--repo/blobs/<etag>               the bytes
//! models--owner--repo/snapshots/<commit>/<file>  a link to them
//! models--owner--repo/refs/<revision>            a commit
//! .locks/models--owner--repo/<etag>.lock         held while they are fetched
//! ```

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use url::Url;

use crate::{
    DownloadError, HubSource, Progress, Settings, Wish,
    body::{Wanted, check_room, lock, make_folder},
    choose::{Choice, choose, models, parts},
    http::{Follow, Http, Reply},
    source::is_path,
};

/// Folders looked into for files of a snapshot.
const FOLDERS_MAX: usize = 1000;

pub(crate) fn obtain(
    wanted: &HubSource,
    settings: &Settings,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf, DownloadError> {
    let hub = Hub {
        http: Http::new(settings),
        folder: settings
            .cache
            .join(format!("models--{}", wanted.repo.replace('/', "--"))),
        wanted,
        settings,
    };
    if let Some(path) = hub.pinned() {
        return Ok(path);
    }
    if settings.offline {
        let what = format!("{}@{}", wanted.repo, wanted.revision);
        return hub.cached().ok_or(DownloadError::Offline { what });
    }
    match hub.online(progress) {
        // The hub's other clients do the same: better the file of last week than none.
        Err(e @ DownloadError::Unreachable { .. }) => hub.cached().ok_or(e),
        other => other,
    }
}

/// A repository on the hub and in the cache.
struct Hub<'a> {
    http: Http<'a>,
    folder: PathBuf,
    wanted: &'a HubSource,
    settings: &'a Settings,
}

/// What the hub says of a repository at a revision.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// What the hub says of a file.
struct Meta {
    url: Url,
    file: String,
    commit: String,
    /// Checked: it is a file's name.
    etag: String,
    bytes: u64,
}

impl Meta {
    /// Of files in large storage the ETag is the SHA-256.
    fn sha256(&self) -> Option<&str> {
        (self.etag.len() == 64 && is_hex(&self.etag)).then_some(&self.etag)
    }
}

impl Hub<'_> {
    fn online(&self, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf, DownloadError> {
        let (file, mut revision) = match &self.wanted.wish {
            Wish::File(file) => (file.clone(), self.wanted.revision.clone()),
            Wish::Tag(tag) => {
                let listing = self.listing()?;
                (self.pick(&listing.files(), tag.as_deref())?, listing.sha)
            }
        };
        let mut metas = Vec::new();
        for part in parts(&file) {
            let meta = self.meta(&part, &revision)?;
            // All parts of one commit.
            revision.clone_from(&meta.commit);
            metas.push(meta);
        }
        self.fetch(&metas, progress)?;
        if let Some(meta) = metas.first() {
            self.write_ref(&meta.commit)?;
        }
        Ok(self.pointer(&revision, metas.first().map_or(&file, |meta| &meta.file)))
    }

    /// Fetches what is not here, and links all of it.
    fn fetch(
        &self,
        metas: &[Meta],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), DownloadError> {
        let blobs = self.folder.join("blobs");
        let locks = self
            .settings
            .cache
            .join(".locks")
            .join(self.folder.file_name().unwrap_or_default());
        make_folder(&blobs)?;
        make_folder(&locks)?;
        let targets: Vec<PathBuf> = metas.iter().map(|meta| blobs.join(&meta.etag)).collect();
        let wanted = |meta, target| wanted(meta, target, self.settings);
        let all = || metas.iter().zip(&targets);
        let missing = all().filter(|(meta, target)| !is_here(target, meta.bytes));
        let need = missing.map(|(meta, target)| wanted(meta, target).missing());
        check_room(&blobs, need.fold(0, u64::saturating_add))?;
        let total = metas
            .iter()
            .fold(0, |sum: u64, meta| sum.saturating_add(meta.bytes));
        let mut before = 0u64;
        for (meta, target) in all() {
            if !is_here(target, meta.bytes) {
                let _lock = lock(&locks.join(format!("{}.lock", meta.etag)), target)?;
                wanted(meta, target).fetch(&self.http, &mut |done| {
                    let done = before.saturating_add(done);
                    progress(Progress { done, total });
                })?;
            }
            self.link(meta)?;
            before = before.saturating_add(meta.bytes);
        }
        Ok(())
    }

    /// What the hub says of one file, without its bytes.
    fn meta(&self, file: &str, revision: &str) -> Result<Meta, DownloadError> {
        let mut url = self.address(&[]);
        if let Ok(mut path) = url.path_segments_mut() {
            path.extend(self.wanted.repo.split('/'));
            path.extend(["resolve", revision]).extend(file.split('/'));
        }
        let reply = self.http.head(&url, Follow::Home)?;
        if !matches!(reply.status(), 200 | 301 | 302 | 303 | 307 | 308) {
            return Err(self.refused(&reply, file));
        }
        let commit = reply.header("x-repo-commit").filter(|text| is_commit(text));
        let commit = commit.ok_or_else(|| reply.wrong("it names no commit: this is no hub"))?;
        let etag = reply
            .header("x-linked-etag")
            .or_else(|| reply.header("etag"));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"'));
        let etag = etag.filter(|etag| is_etag(etag));
        let etag =
            etag.ok_or_else(|| reply.wrong("it says nothing by which the file can be kept"))?;
        let bytes = reply.number("x-linked-size").or_else(|| {
            let whole = reply.status() == 200;
            reply.number("content-length").filter(|_| whole)
        });
        let bytes = bytes.ok_or_else(|| reply.wrong("it does not say how long the file is"))?;
        Ok(Meta {
            file: file.to_owned(),
            commit: commit.to_owned(),
            etag: etag.to_owned(),
            bytes,
            url,
        })
    }

    fn listing(&self) -> Result<Listing, DownloadError> {
        let mut url = self.address(&["api", "models"]);
        if let Ok(mut path) = url.path_segments_mut() {
            path.extend(self.wanted.repo.split('/'));
            path.extend(["revision", &self.wanted.revision]);
        }
        let reply = self.http.get(&url, &[])?;
        if reply.status() != 200 {
            return Err(self.refused(&reply, ""));
        }
        let odd = reply.wrong("that is no list of a repository");
        match serde_json::from_str::<Listing>(&reply.text()?) {
            Ok(listing) if is_commit(&listing.sha) => Ok(listing),
            _ => Err(odd),
        }
    }

    fn pick(&self, files: &[String], tag: Option<&str>) -> Result<String, DownloadError> {
        let HubSource { repo, revision, .. } = self.wanted.clone();
        match choose(files, tag) {
            Choice::One(file) => Ok(file),
            Choice::Many(models) => Err(DownloadError::Ambiguous {
                repo,
                revision,
                models,
            }),
            Choice::None(models) => Err(DownloadError::NoFile {
                wanted: tag.map_or("model in a .gguf".into(), |tag| {
                    format!("model called {tag}")
                }),
                repo,
                revision,
                models,
            }),
        }
    }

    /// What a refusal of the hub means: it says so in a header of its own.
    fn refused(&self, reply: &Reply, file: &str) -> DownloadError {
        let HubSource { repo, revision, .. } = self.wanted.clone();
        let token_sent = self.settings.token.is_some();
        match (reply.header("x-error-code"), reply.status()) {
            (Some("GatedRepo"), _) | (None, 403) => {
                let mut page = self.address(&[]);
                page.set_path(&repo);
                DownloadError::Gated {
                    page: page.into(),
                    repo,
                    token_sent,
                }
            }
            (Some("RevisionNotFound"), _) => DownloadError::NoRevision { repo, revision },
            (Some("RepoNotFound"), _) | (_, 401) => DownloadError::NoRepo { repo, token_sent },
            (_, 404) if !file.is_empty() => DownloadError::NoFile {
                wanted: format!("{file:?}"),
                models: self
                    .listing()
                    .map_or(vec![], |listing| models(&listing.files())),
                repo,
                revision,
            },
            (_, 404) => DownloadError::NoRepo { repo, token_sent },
            _ => reply.refusal(),
        }
    }

    fn address(&self, parts: &[&str]) -> Url {
        let mut url = self.settings.endpoint.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(parts);
        }
        url
    }

    // The cache.

    fn pointer(&self, commit: &str, file: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit).join(file)
    }

    /// The file of a named commit, which cannot have changed: nobody has to be asked.
    fn pinned(&self) -> Option<PathBuf> {
        is_commit(&self.wanted.revision).then(|| self.cached())?
    }

    /// What the cache has, by what it knew last.
    fn cached(&self) -> Option<PathBuf> {
        let commit = if is_commit(&self.wanted.revision) {
            self.wanted.revision.clone()
        } else {
            let text = fs::read_to_string(self.folder.join("refs").join(&self.wanted.revision));
            text.ok()?.trim().to_owned()
        };
        if !is_commit(&commit) {
            return None;
        }
        let file = match &self.wanted.wish {
            Wish::File(file) => file.clone(),
            Wish::Tag(tag) => {
                let snapshot = self.folder.join("snapshots").join(&commit);
                match choose(&files_below(&snapshot), tag.as_deref()) {
                    Choice::One(file) => file,
                    _ => return None,
                }
            }
        };
        let parts: Vec<PathBuf> = parts(&file)
            .iter()
            .map(|part| self.pointer(&commit, part))
            .collect();
        let whole = parts.iter().all(|part| part.is_file());
        whole.then(|| parts.into_iter().next())?
    }

    /// Points the snapshot's name at the bytes.
    fn link(&self, meta: &Meta) -> Result<(), DownloadError> {
        let pointer = self.pointer(&meta.commit, &meta.file);
        let io_at = |source| DownloadError::Io {
            path: pointer.clone(),
            source,
        };
        make_folder(pointer.parent().unwrap_or(&self.folder))?;
        let up = "../".repeat(2 + meta.file.split('/').count() - 1);
        let to = format!("{up}blobs/{}", meta.etag);
        if fs::read_link(&pointer).is_ok_and(|old| old == Path::new(&to)) {
            return Ok(());
        }
        let _ = fs::remove_file(&pointer);
        symlink(&to, &pointer).map_err(io_at)
    }

    fn write_ref(&self, commit: &str) -> Result<(), DownloadError> {
        let revision = &self.wanted.revision;
        if is_commit(revision) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        let io_at = |source| DownloadError::Io {
            path: path.clone(),
            source,
        };
        let folder = path.parent().unwrap_or(&self.folder);
        make_folder(folder)?;
        let temp = tempfile::NamedTempFile::new_in(&self.folder).map_err(io_at)?;
        fs::write(temp.path(), commit).map_err(io_at)?;
        temp.persist(&path).map_err(|e| io_at(e.error))?;
        Ok(())
    }
}

impl Listing {
    fn files(&self) -> Vec<String> {
        let names = self
            .siblings
            .iter()
            .map(|sibling| sibling.rfilename.clone());
        names.filter(|name| is_path(name)).collect()
    }
}

fn wanted<'a>(meta: &'a Meta, target: &'a Path, settings: &Settings) -> Wanted<'a> {
    Wanted {
        url: &meta.url,
        target,
        bytes: meta.bytes,
        sha256: meta.sha256(),
        // The name of what lies here is its ETag already.
        if_range: None,
        pause: settings.pause,
    }
}

fn is_here(blob: &Path, bytes: u64) -> bool {
    fs::metadata(blob).is_ok_and(|meta| meta.len() == bytes)
}

/// The files of a snapshot, by their paths in it.
fn files_below(snapshot: &Path) -> Vec<String> {
    let mut files = Vec::new();
    let mut folders = vec![snapshot.to_owned()];
    for at in 0..FOLDERS_MAX {
        let Some(folder) = folders.get(at).cloned() else {
            break;
        };
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(inside) = path.strip_prefix(snapshot) {
                files.extend(inside.to_str().map(ToOwned::to_owned));
            }
        }
    }
    files
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && is_hex(text)
}

/// A server's word becomes a file's name.
fn is_etag(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    (1..=128).contains(&text.len()) && text.bytes().all(plain)
}
