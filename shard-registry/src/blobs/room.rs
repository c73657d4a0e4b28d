//! Room for fetched shards: a quota, a reserve of free disk, and who goes first. The least recently used go, those
//! that others have too before the last copies that are known; whoever asks is told of each.

use std::{
    fs, io,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use swarm_proto::ShardId;

use super::{BLOBS, BlobError, PARTIAL, remove::disk_bytes};
use crate::{manifest::ShardEntry, store::Store};

/// Free disk that fetching leaves alone, whatever the quota says.
const RESERVE_BYTES: u64 = 512 << 20;

/// How much may be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    /// Bytes of fetched shards; none: as much as the disk holds.
    pub max_bytes: Option<u64>,
    /// Bytes of the disk that stay free.
    pub reserve_bytes: u64,
}

impl Default for Quota {
    fn default() -> Self {
        Self {
            max_bytes: None,
            reserve_bytes: RESERVE_BYTES,
        }
    }
}

/// What a fetched shard is worth to whoever makes room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Worth {
    /// Others have it.
    Elsewhere,
    /// Nobody else is known to have it.
    LastCopy,
    /// It is needed here.
    Needed,
}

/// A shard that had to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evicted {
    /// Which.
    pub shard: ShardId,
    /// Its bytes.
    pub bytes: u64,
    /// Nobody else was known to have it.
    pub last_copy: bool,
}

struct Blob {
    shard: ShardId,
    bytes: u64,
    worth: Worth,
    used: u64,
}

impl Store {
    /// Makes room for `needed` more bytes: within the quota, and with the reserve left on the disk.
    ///
    /// # Errors
    /// There is none, whatever goes; nothing goes then.
    pub fn make_room(
        &self,
        needed: u64,
        quota: &Quota,
        worth: &dyn Fn(&ShardId) -> Worth,
    ) -> Result<Vec<Evicted>, BlobError> {
        let evicted = self.would_go(needed, quota, worth)?;
        for gone in &evicted {
            let path = self.blob_path(&gone.shard);
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(BlobError::at(&path)(e));
                }
                _ => {}
            }
        }
        Ok(evicted)
    }

    /// What [`Store::make_room`] would take away.
    ///
    /// # Errors
    /// As there.
    pub fn would_go(
        &self,
        needed: u64,
        quota: &Quota,
        worth: &dyn Fn(&ShardId) -> Worth,
    ) -> Result<Vec<Evicted>, BlobError> {
        let mut blobs = self.blobs(worth)?;
        let mut used = self.bytes_of(&blobs);
        let folder = self.dir().join(BLOBS);
        let mut free = free_bytes(&folder).map_err(BlobError::at(&folder))?;
        // The last is the first to go.
        blobs.sort_unstable_by_key(|blob| std::cmp::Reverse((blob.worth, blob.used)));
        let mut evicted = Vec::new();
        loop {
            let over = |max: u64| used.saturating_add(needed) > max;
            let over_quota = quota.max_bytes.filter(|max| over(*max));
            let short = free < needed.saturating_add(quota.reserve_bytes);
            if over_quota.is_none() && !short {
                return Ok(evicted);
            }
            match blobs.pop_if(|blob| blob.worth < Worth::Needed) {
                Some(blob) => {
                    used = used.saturating_sub(blob.bytes);
                    free = free.saturating_add(blob.bytes);
                    evicted.push(Evicted {
                        shard: blob.shard,
                        bytes: blob.bytes,
                        last_copy: blob.worth == Worth::LastCopy,
                    });
                }
                None => {
                    return Err(match over_quota {
                        Some(max) => BlobError::Quota { needed, max, used },
                        None => BlobError::Full {
                            path: folder,
                            needed,
                            free,
                            reserve: quota.reserve_bytes,
                        },
                    });
                }
            }
        }
    }

    /// Bytes that fetched shards take on the disk, those on their way included.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn fetched_bytes(&self) -> Result<u64, BlobError> {
        let blobs = self.blobs(&|_| Worth::Needed)?;
        Ok(self.bytes_of(&blobs))
    }

    fn bytes_of(&self, blobs: &[Blob]) -> u64 {
        let whole = blobs.iter().map(|blob| blob.bytes).sum::<u64>();
        whole.saturating_add(self.partial_bytes())
    }

    fn blobs(&self, worth: &dyn Fn(&ShardId) -> Worth) -> Result<Vec<Blob>, BlobError> {
        let folder = self.dir().join(BLOBS);
        let mut blobs = Vec::new();
        for entry in fs::read_dir(&folder).map_err(BlobError::at(&folder))? {
            let Ok(entry) = entry else { continue };
            let Some(shard) = shard_of(&entry.path()) else {
                continue;
            };
            // One that is removed meanwhile needs no room.
            let Ok(meta) = entry.metadata() else { continue };
            let used = meta.accessed().unwrap_or(UNIX_EPOCH);
            blobs.push(Blob {
                shard,
                bytes: meta.len(),
                worth: worth(&shard),
                used: millis(used),
            });
        }
        Ok(blobs)
    }

    /// Bytes that a shard will take on the disk beside what is here of it.
    pub fn still_needed(&self, shard: &ShardEntry) -> u64 {
        if self.has_blob(shard) {
            return 0;
        }
        let partial = self.dir().join(PARTIAL).join(format!("{}.data", shard.id));
        shard.bytes.saturating_sub(disk_bytes(&partial))
    }

    /// Bytes that partials take on the disk: they have holes.
    fn partial_bytes(&self) -> u64 {
        let Ok(entries) = fs::read_dir(self.dir().join(PARTIAL)) else {
            return 0;
        };
        let files = entries.flatten().map(|entry| entry.path());
        files.map(|path| disk_bytes(&path)).sum()
    }
}

/// The shard that a file of ours is named after.
pub(super) fn shard_of(path: &Path) -> Option<ShardId> {
    path.file_stem()?.to_str()?.parse().ok()
}

fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn free_bytes(folder: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(folder)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
