//! Taking things away: a model with what was fetched of it, and what nothing refers to. The user's own files are
//! never touched.

use std::{
    collections::HashSet,
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Serialize;
use swarm_proto::{ModelId, ShardId};

use super::{BLOBS, BlobError, PARTIAL, room::shard_of};
use crate::store::{AliasName, Store, StoreError};

/// What removing a model took away.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// Names that pointed at it.
    pub aliases: Vec<String>,
    /// Fetched shards that are gone.
    pub blobs: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Fetched shards that another model has too: they stay.
    pub shared: usize,
    /// The user's own files, which stay where they are.
    pub files: Vec<PathBuf>,
}

/// What a collection took away.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// Shards that were partly here.
    pub partials: usize,
    /// Shards of no model here.
    pub blobs: usize,
    /// Bytes that are free now.
    pub bytes: u64,
}

impl Store {
    /// Removes a model: its names, its description, and what was fetched of it. Files it was imported from stay.
    ///
    /// # Errors
    /// It is not here, or the store cannot be written.
    pub fn remove_model(&self, id: ModelId) -> Result<Removed, BlobError> {
        let folder = self.dir().join("models").join(id.to_string());
        if !folder.is_dir() {
            return Err(StoreError::Missing { id }.into());
        }
        let mut removed = Removed::default();
        if let Ok(Some(sources)) = self.sources(id) {
            removed.files = sources.files.into_iter().map(|mark| mark.path).collect();
        }
        // A manifest that is torn names no shards: `collect` finds them.
        let mine: Vec<ShardId> = self.manifest(id).map_or(Vec::new(), |manifest| {
            manifest.shards.iter().map(|shard| shard.id).collect()
        });
        let (aliases, _) = self.aliases();
        for (alias, _) in aliases.into_iter().filter(|(_, to)| *to == id) {
            self.remove_alias(&alias)?;
            removed.aliases.push(alias.to_string());
        }
        // First: a folder without a manifest is no model.
        remove(&folder.join("manifest"))?;
        fs::remove_dir_all(&folder).map_err(BlobError::at(&folder))?;
        let (others, _) = self.referenced();
        for shard in mine {
            let path = self.blob_path(&shard);
            let Ok(meta) = fs::metadata(&path) else {
                self.remove_partial(&shard)?;
                continue;
            };
            if others.contains(&shard) {
                removed.shared += 1;
                continue;
            }
            remove(&path)?;
            removed.blobs += 1;
            removed.bytes += meta.len();
        }
        Ok(removed)
    }

    /// Removes partials that nobody wrote to for `age`, and fetched shards that belong to no model here.
    ///
    /// # Errors
    /// The store cannot be written. Where a model's description is torn, no fetched shard is removed: it may be its.
    pub fn collect(&self, age: Duration) -> Result<Collected, BlobError> {
        let mut collected = Collected::default();
        let (referenced, torn) = self.referenced();
        for path in files(&self.dir().join(BLOBS))? {
            let spare = shard_of(&path).is_some_and(|shard| !referenced.contains(&shard));
            if spare && !torn {
                collected.bytes += fs::metadata(&path).map_or(0, |meta| meta.len());
                remove(&path)?;
                collected.blobs += 1;
            }
        }
        for path in files(&self.dir().join(PARTIAL))? {
            let Some(shard) = shard_of(&path) else {
                continue;
            };
            if !is_older(&path, age) || path.extension().is_none_or(|ending| ending != "data") {
                continue;
            }
            let taken = disk_bytes(&path);
            if self.remove_partial(&shard)? {
                collected.partials += 1;
                collected.bytes += taken;
            }
        }
        Ok(collected)
    }

    /// Every shard of every model here, and whether there is a model that cannot be read.
    fn referenced(&self) -> (HashSet<ShardId>, bool) {
        let (models, problems) = self.models();
        let manifests = models
            .iter()
            .filter_map(|model| self.manifest(model.id).ok());
        let shards = manifests.flat_map(|manifest| manifest.shards);
        (shards.map(|shard| shard.id).collect(), !problems.is_empty())
    }

    /// False where somebody is writing it.
    fn remove_partial(&self, shard: &ShardId) -> Result<bool, BlobError> {
        let at = |ending| self.dir().join(PARTIAL).join(format!("{shard}.{ending}"));
        let data = at("data");
        match File::open(&data) {
            Ok(file) => match file.try_lock() {
                Ok(()) => remove(&data)?,
                Err(TryLockError::WouldBlock) => return Ok(false),
                Err(TryLockError::Error(e)) => return Err(BlobError::at(&data)(e)),
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(BlobError::at(&data)(e)),
        }
        remove(&at("tree"))?;
        Ok(true)
    }

    fn remove_alias(&self, alias: &AliasName) -> Result<(), BlobError> {
        remove(&self.dir().join("aliases").join(alias.as_str()))
    }
}

fn remove(path: &Path) -> Result<(), BlobError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(BlobError::at(path)(e)),
        _ => Ok(()),
    }
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, BlobError> {
    let entries = fs::read_dir(folder).map_err(BlobError::at(folder))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

fn is_older(path: &Path, age: Duration) -> bool {
    let modified = fs::metadata(path).and_then(|meta| meta.modified());
    modified.is_ok_and(|at| at.elapsed().is_ok_and(|since| since >= age))
}

/// Bytes that a file takes on the disk: less than its length where it has holes.
pub(super) fn disk_bytes(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).map_or(0, |meta| meta.blocks().saturating_mul(512))
}
