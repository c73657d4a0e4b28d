//! A shard on its way here. Groups are written where they belong once their hash was right; the hashes that
//! prove it are written beside them, and are what tells after a restart which groups are here: a process that
//! is killed, or a disk that loses what was written last, leaves groups that are not right and are fetched again.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read},
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use bao_tree::{
    TreeNode,
    io::{
        BaoContentItem, DecodeError,
        sync::{DecodeResponseIter, Outboard as _, OutboardMut as _},
    },
};
use swarm_proto::{ShardId, transfer::groups_of};

use super::{
    BlobError, PARTIAL,
    tree::{self, Outboard},
};
use crate::{manifest::ShardEntry, store::Store};

/// A shard that is partly here. Shared by those who write its ranges and those who give them on.
#[derive(Debug)]
pub struct Partial {
    shard: ShardId,
    bytes: u64,
    data: File,
    outboard: File,
    paths: Paths,
    state: Mutex<State>,
}

#[derive(Debug)]
struct Paths {
    data: PathBuf,
    outboard: PathBuf,
    blob: PathBuf,
}

#[derive(Debug)]
struct State {
    outboard: Outboard,
    have: Vec<bool>,
    missing: u32,
}

/// What opening a shard to write it gives.
#[derive(Debug)]
pub enum Taken {
    /// All of it was fetched already.
    Whole,
    /// Some of it is to be fetched.
    Partly(Box<Partial>),
}

/// Why groups were not taken.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// They are not the shard's. The sender's fault.
    #[error("group {group} has another hash than the shard's")]
    Wrong {
        /// The first that is wrong, or that a wrong hash leads to.
        group: u32,
    },
    /// They end too early, or their reader failed.
    #[error("the range broke off: {0}")]
    Broken(io::Error),
    /// They cannot be written.
    #[error(transparent)]
    Blob(#[from] BlobError),
}

impl Store {
    /// Opens a shard to write what is missing of it. What an earlier process left is verified first.
    ///
    /// # Errors
    /// Another process writes it, or the store cannot be written.
    pub fn take_shard(&self, entry: &ShardEntry) -> Result<Taken, BlobError> {
        let file = |ending| {
            self.dir()
                .join(PARTIAL)
                .join(format!("{}.{ending}", entry.id))
        };
        let paths = Paths {
            data: file("data"),
            outboard: file("tree"),
            blob: self.blob_path(&entry.id),
        };
        let data = loop {
            if self.has_blob(entry) {
                return Ok(Taken::Whole);
            }
            let data = open(&paths.data)?;
            match data.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(BlobError::Busy { shard: entry.id });
                }
                Err(TryLockError::Error(e)) => return Err(BlobError::at(&paths.data)(e)),
            }
            // Whoever held the lock before may have moved the file away.
            if is_at(&data, &paths.data) {
                break data;
            }
        };
        Ok(Taken::Partly(Box::new(Partial::open(entry, data, paths)?)))
    }
}

impl Partial {
    fn open(entry: &ShardEntry, data: File, paths: Paths) -> Result<Partial, BlobError> {
        let outboard = open(&paths.outboard)?;
        let mut known = tree::empty(&entry.id, entry.bytes);
        let resize = |file: &File, len: u64| match file.metadata()?.len() {
            found if found == len => Ok(true),
            _ => file
                .set_len(0)
                .and_then(|()| file.set_len(len))
                .map(|()| false),
        };
        let old_data = resize(&data, entry.bytes).map_err(BlobError::at(&paths.data))?;
        let old_outboard =
            resize(&outboard, known.data.len() as u64).map_err(BlobError::at(&paths.outboard))?;
        let groups = groups_of(entry.bytes) as usize;
        let mut have = vec![false; groups];
        if old_data && old_outboard {
            outboard
                .read_exact_at(&mut known.data, 0)
                .map_err(BlobError::at(&paths.outboard))?;
            have = tree::right_groups(&known, &data).map_err(BlobError::at(&paths.data))?;
            have.truncate(groups);
        }
        let missing = have.iter().filter(|here| !**here).count();
        Ok(Partial {
            shard: entry.id,
            bytes: entry.bytes,
            data,
            outboard,
            paths,
            state: Mutex::new(State {
                outboard: known,
                have,
                missing: u32::try_from(missing).unwrap_or(u32::MAX),
            }),
        })
    }

    /// Which shard.
    pub fn shard(&self) -> ShardId {
        self.shard
    }

    /// Bytes of the whole shard.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of the groups that are here.
    pub fn here_bytes(&self) -> u64 {
        let missing = u64::from(self.lock().missing);
        self.bytes
            .saturating_sub(missing.saturating_mul(swarm_proto::transfer::GROUP_BYTES))
    }

    /// Whether all of these groups are here.
    pub fn has(&self, groups: &Range<u32>) -> bool {
        let state = self.lock();
        let wanted = state.have.get(groups.start as usize..groups.end as usize);
        wanted.is_some_and(|have| have.iter().all(|here| *here))
    }

    /// The first of these groups that is missing; their end where none is.
    pub fn first_missing(&self, groups: &Range<u32>) -> u32 {
        let state = self.lock();
        let here = |group: &u32| state.have.get(*group as usize).is_some_and(|here| *here);
        groups
            .clone()
            .find(|group| !here(group))
            .unwrap_or(groups.end)
    }

    /// What is missing, in ranges of at most `max` groups.
    pub fn missing(&self, max: u32) -> Vec<Range<u32>> {
        let mut ranges: Vec<Range<u32>> = Vec::new();
        for (group, here) in (0u32..).zip(&self.lock().have) {
            match ranges.last_mut() {
                _ if *here => {}
                Some(last) if last.end == group && last.len() < max as usize => last.end += 1,
                _ => ranges.push(group..group + 1),
            }
        }
        ranges
    }

    /// Reads groups as they come over the wire, and writes each once its hash is right. What was right before
    /// one that is wrong stays.
    ///
    /// # Errors
    /// See [`TakeError`]: whose fault it is.
    pub fn take(&self, groups: &Range<u32>, encoded: impl Read) -> Result<(), TakeError> {
        let ranges = tree::chunks(groups);
        let (root, geometry) = (tree::root(&self.shard), tree::tree(self.bytes));
        for item in DecodeResponseIter::new(root, geometry, encoded, &ranges) {
            match item.map_err(wrong_or_broken)? {
                BaoContentItem::Parent(parent) => {
                    self.save(parent.node, &parent.pair)
                        .map_err(BlobError::at(&self.paths.outboard))?;
                }
                BaoContentItem::Leaf(leaf) => {
                    self.data
                        .write_all_at(&leaf.data, leaf.offset)
                        .map_err(BlobError::at(&self.paths.data))?;
                    self.note(tree::group_at(leaf.offset));
                }
            }
        }
        Ok(())
    }

    /// Makes a blob of it, once nothing is missing.
    ///
    /// # Errors
    /// Something is, or the store cannot be written.
    pub fn finish(&self) -> Result<(), BlobError> {
        let missing = self.lock().missing;
        if missing > 0 {
            let shard = self.shard;
            return Err(BlobError::Incomplete { shard, missing });
        }
        // Not synced: what a power cut takes is found when the blob is read, and fetched again.
        match fs::rename(&self.paths.data, &self.paths.blob) {
            // Two tasks of this process fetched it, and the other one was first.
            Err(e) if e.kind() == io::ErrorKind::NotFound && self.is_blob() => return Ok(()),
            renamed => renamed.map_err(BlobError::at(&self.paths.blob))?,
        }
        // Only in the way of nobody: the next to open it would begin anew.
        let _ = fs::remove_file(&self.paths.outboard);
        Ok(())
    }

    fn is_blob(&self) -> bool {
        is_at(&self.data, &self.paths.blob)
    }

    pub(super) fn data(&self) -> &File {
        &self.data
    }

    fn save(&self, node: TreeNode, pair: &(blake3::Hash, blake3::Hash)) -> io::Result<()> {
        let mut state = self.lock();
        state.outboard.save(node, pair)?;
        let Some(at) = state.outboard.tree().pre_order_offset(node) else {
            return Ok(());
        };
        drop(state);
        let both = [*pair.0.as_bytes(), *pair.1.as_bytes()].concat();
        self.outboard.write_all_at(&both, at.saturating_mul(64))
    }

    fn note(&self, group: usize) {
        let mut state = self.lock();
        let state = &mut *state;
        if let Some(here) = state.have.get_mut(group) {
            state.missing = state.missing.saturating_sub(u32::from(!*here));
            *here = true;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A group is noted after it was written: no invariant spans a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// So that what is here can be given on while the rest arrives.
impl bao_tree::io::sync::Outboard for &Partial {
    fn root(&self) -> blake3::Hash {
        tree::root(&self.shard)
    }

    fn tree(&self) -> bao_tree::BaoTree {
        tree::tree(self.bytes)
    }

    fn load(&self, node: TreeNode) -> io::Result<Option<(blake3::Hash, blake3::Hash)>> {
        self.lock().outboard.load(node)
    }
}

fn wrong_or_broken(error: DecodeError) -> TakeError {
    let group = |chunk: u64| u32::try_from(chunk / 16).unwrap_or(u32::MAX);
    match error {
        DecodeError::LeafHashMismatch(chunk) => TakeError::Wrong {
            group: group(chunk.0),
        },
        DecodeError::ParentHashMismatch(node) => TakeError::Wrong {
            group: group(node.chunk_range().start.0),
        },
        other => TakeError::Broken(other.into()),
    }
}

fn open(path: &Path) -> Result<File, BlobError> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).map_err(BlobError::at(path))
}

fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(held), Ok(there)) = (file.metadata(), fs::metadata(path)) else {
        return false;
    };
    (held.dev(), held.ino()) == (there.dev(), there.ino())
}
