//! One file's bytes: fetched into `….incomplete`, taken up again where they broke off, checked, renamed.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use sha2::{Digest, Sha256};
use url::Url;

use crate::{
    DownloadError,
    http::{Http, Reply},
    source::shown,
};

/// Breaks without a byte in between before we give up: half a minute of pauses in all.
const BREAKS_MAX: u32 = 5;
/// Bytes read at once.
const CHUNK: usize = 256 << 10;

/// What to fetch, and what is known of it beforehand.
pub(crate) struct Wanted<'a> {
    /// Where it is.
    pub(crate) url: &'a Url,
    /// Where it goes.
    pub(crate) target: &'a Path,
    /// Its length.
    pub(crate) bytes: u64,
    /// SHA-256 in hex, where the server announced it.
    pub(crate) sha256: Option<&'a str>,
    /// What a server must still have for a range to be of the same file; without it, its address says so.
    pub(crate) if_range: Option<&'a str>,
    /// The first pause after a break.
    pub(crate) pause: Duration,
}

impl Wanted<'_> {
    /// What has not arrived yet, by what lies there.
    pub(crate) fn missing(&self) -> u64 {
        let here = fs::metadata(incomplete(self.target)).map_or(0, |meta| meta.len());
        self.bytes.saturating_sub(here)
    }

    /// Fetches it; `progress` hears how many bytes are here.
    pub(crate) fn fetch(
        &self,
        http: &Http,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), DownloadError> {
        let mut partial = Partial::open(incomplete(self.target), self.bytes, progress)?;
        let mut breaks = 0;
        while partial.done < self.bytes {
            let before = partial.done;
            let broke = match self.go_on(http, &mut partial, progress) {
                Ok(()) => continue,
                Err(e) if e.passes() => e,
                Err(e) => return Err(e),
            };
            breaks = if partial.done > before { 1 } else { breaks + 1 };
            if breaks > BREAKS_MAX {
                return Err(DownloadError::Cut {
                    times: breaks,
                    done: partial.done,
                    total: self.bytes,
                    why: broke.to_string(),
                });
            }
            thread::sleep(self.pause * 2u32.pow(breaks - 1));
        }
        self.finish(partial)
    }

    /// One request, until all is here or it breaks.
    fn go_on(
        &self,
        http: &Http,
        partial: &mut Partial,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), DownloadError> {
        let mut headers = Vec::new();
        if partial.done > 0 {
            headers.push(("range", format!("bytes={}-", partial.done)));
            headers.extend(self.if_range.map(|mark| ("if-range", mark.to_owned())));
        }
        let mut reply = http.get(self.url, &headers)?;
        match reply.status() {
            200 => partial.begin_again()?,
            206 if range_begins_at(&reply, partial.done, self.bytes) => {}
            206 => return Err(reply.wrong("another range came than was asked for")),
            // What lies here cannot be gone on with.
            416 if partial.done > 0 => return partial.begin_again(),
            _ => return Err(reply.refusal()),
        }
        let left = self.bytes - partial.done;
        if reply
            .number("content-length")
            .is_some_and(|len| len != left)
        {
            return Err(reply.wrong(format!(
                "it is not the {} bytes long that were announced",
                self.bytes
            )));
        }
        let url = reply.url.clone();
        let body = reply.response.body_mut().with_config().limit(u64::MAX);
        self.copy(&url, &mut body.reader(), partial, progress)
    }

    fn copy(
        &self,
        url: &Url,
        body: &mut dyn Read,
        partial: &mut Partial,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), DownloadError> {
        let mut buffer = vec![0; CHUNK];
        while partial.done < self.bytes {
            let left = usize::try_from(self.bytes - partial.done).unwrap_or(usize::MAX);
            let space = &mut buffer[..left.min(CHUNK)];
            let cut = |why: String| DownloadError::Unreachable {
                host: url.host_str().unwrap_or_default().into(),
                why,
            };
            match body.read(space) {
                Ok(0) => return Err(cut("the connection ended early".into())),
                Ok(n) => partial.take(&space[..n])?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(cut(e.to_string())),
            }
            progress(partial.done);
        }
        Ok(())
    }

    fn finish(&self, partial: Partial) -> Result<(), DownloadError> {
        let Partial {
            file, path, hash, ..
        } = partial;
        let io_at = |source| DownloadError::Io {
            path: path.clone(),
            source,
        };
        file.sync_all().map_err(io_at)?;
        let found = hex(&hash.finalize());
        if let Some(announced) = self.sha256.filter(|announced| **announced != found) {
            let _ = fs::remove_file(&path);
            return Err(DownloadError::Hash {
                url: shown(self.url.as_str()),
                announced: announced.into(),
                found,
            });
        }
        fs::rename(&path, self.target).map_err(io_at)?;
        // The rename is on disk once the folder is.
        let folder = self.target.parent().unwrap_or(Path::new("."));
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(io_at)
    }
}

/// Where the bytes lie until they are all there; the name that other clients of the hub use.
pub(crate) fn incomplete(target: &Path) -> PathBuf {
    let mut path = target.as_os_str().to_owned();
    path.push(".incomplete");
    path.into()
}

fn range_begins_at(reply: &Reply, start: u64, total: u64) -> bool {
    let range = reply.header("content-range");
    let begin = format!("bytes {start}-");
    range.is_some_and(|range| range.starts_with(&begin) && range.ends_with(&format!("/{total}")))
}

/// What is here of a file.
struct Partial {
    file: File,
    path: PathBuf,
    done: u64,
    /// Of the first `done` bytes.
    hash: Sha256,
}

impl Partial {
    /// What an earlier call left is read again: its hash is not kept.
    fn open(
        path: PathBuf,
        bytes: u64,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Partial, DownloadError> {
        let io_at = |source| DownloadError::Io {
            path: path.clone(),
            source,
        };
        let options = &mut File::options();
        let options = options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path).map_err(io_at)?;
        let mut partial = Partial {
            file,
            path: path.clone(),
            done: 0,
            hash: Sha256::new(),
        };
        if partial.file.metadata().map_err(io_at)?.len() > bytes {
            partial.begin_again()?;
        }
        let mut buffer = vec![0; CHUNK];
        loop {
            let n = partial.file.read(&mut buffer).map_err(io_at)?;
            if n == 0 {
                return Ok(partial);
            }
            partial.hash.update(&buffer[..n]);
            partial.done += n as u64;
            progress(partial.done);
        }
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), DownloadError> {
        self.file.write_all(bytes).map_err(|e| self.at(e))?;
        self.hash.update(bytes);
        self.done += bytes.len() as u64;
        Ok(())
    }

    fn begin_again(&mut self) -> Result<(), DownloadError> {
        self.file.set_len(0).map_err(|e| self.at(e))?;
        self.file.seek(SeekFrom::Start(0)).map_err(|e| self.at(e))?;
        self.hash = Sha256::new();
        self.done = 0;
        Ok(())
    }

    fn at(&self, source: io::Error) -> DownloadError {
        DownloadError::Io {
            path: self.path.clone(),
            source,
        }
    }
}

/// Refuses what would not fit beside what is on the disk of `folder`.
pub(crate) fn check_room(folder: &Path, need: u64) -> Result<(), DownloadError> {
    let found = rustix::fs::statvfs(folder);
    let found = found.map_err(|e| DownloadError::Io {
        path: folder.to_owned(),
        source: e.into(),
    })?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if need > free {
        return Err(DownloadError::NoRoom {
            path: folder.to_owned(),
            need,
            free,
        });
    }
    Ok(())
}

/// Makes a folder and those above it.
pub(crate) fn make_folder(path: &Path) -> Result<(), DownloadError> {
    fs::create_dir_all(path).map_err(|source| DownloadError::Io {
        path: path.to_owned(),
        source,
    })
}

/// Keeps other programs from the same download, as long as the file is held.
pub(crate) fn lock(path: &Path, target: &Path) -> Result<File, DownloadError> {
    let io_at = |source| DownloadError::Io {
        path: path.to_owned(),
        source,
    };
    let options = &mut File::options();
    let options = options.write(true).create(true).truncate(false);
    let file = options.open(path).map_err(io_at)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(DownloadError::Busy {
            path: target.to_owned(),
        }),
        Err(fs::TryLockError::Error(source)) => Err(io_at(source)),
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
