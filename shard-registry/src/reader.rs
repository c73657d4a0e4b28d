//! Reading tensors out of the files they were imported from, or the shards that were fetched. A byte is given out
//! only after the whole shard it belongs to had the right hash, and from the very buffer that was hashed.
//!
//! Shards of one layer (or the embedding, or the head) are held at a time; a shard leaves the buffer
//! when all its tensors were read or another layer's are asked for.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use swarm_proto::{ModelId, ShardId};

use crate::{
    blobs::used_now,
    files::FileMark,
    layout::ShardKind,
    manifest::{Manifest, ShardEntry},
    store::{Sources, Store, StoreError, TensorSource},
};

/// Why a tensor cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The store has not the model, or it is torn.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Only the manifest is known here.
    #[error(
        "the weights of model {id} are not on this machine; fetch them: shoal pull {}, or import its GGUF: shoal import FILE",
        .id.short()
    )]
    Elsewhere {
        /// The model.
        id: ModelId,
    },
    /// Some of it is here, and this is not.
    #[error("{kind} of model {id} is not on this machine; fetch it: shoal pull {}", .id.short())]
    Absent {
        /// The model.
        id: ModelId,
        /// Which shard.
        kind: ShardKind,
    },
    /// A fetched shard is not what it was.
    #[error("{path}: {kind} has another hash than it was fetched with: the disk damaged it; fetch it again: shoal pull {}", .id.short())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The model.
        id: ModelId,
        /// Which shard.
        kind: ShardKind,
    },
    /// The model has no such tensor.
    #[error("model {id} has no tensor {name:?}")]
    NoTensor {
        /// The model.
        id: ModelId,
        /// The name.
        name: String,
    },
    /// A file cannot be opened or read.
    #[error(
        "{path} ({what}): {source}; bring the file back, or import the model from where it is now: shoal import FILE"
    )]
    Io {
        /// The file.
        path: PathBuf,
        /// What was wanted of it.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// A file has another length than when it was imported.
    #[error(
        "{path} has {found} bytes, it had {expected} when it was imported; import it again: shoal import {path}"
    )]
    Resized {
        /// The file.
        path: PathBuf,
        /// Bytes now.
        found: u64,
        /// Bytes then.
        expected: u64,
    },
    /// The bytes are others than were imported.
    #[error(
        "{path}: {kind} has the hash {found}, {expected} was imported: the file was changed or damaged; \
         restore it, or import it again as it is: shoal import {path}"
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// Which shard.
        kind: ShardKind,
        /// Its hash now.
        found: ShardId,
        /// Its hash then.
        expected: ShardId,
    },
}

impl From<ReadError> for io::Error {
    fn from(e: ReadError) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, e)
    }
}

/// Reads a model's tensors, each after its shard was verified.
#[derive(Debug)]
pub struct ShardReader {
    store: Store,
    id: ModelId,
    manifest: Manifest,
    /// Those it was imported from, if it was.
    files: Vec<(File, FileMark)>,
    tensors: Vec<TensorSource>,
    /// For each tensor the shards that hold it, in the order of its bytes.
    holders: Vec<Vec<u32>>,
    held: Mutex<Vec<Held>>,
}

/// A verified shard and which of its pieces were not given out yet.
#[derive(Debug)]
struct Held {
    shard: u32,
    bytes: Vec<u8>,
    left: Vec<bool>,
}

impl ShardReader {
    pub(crate) fn open(
        store: Store,
        id: ModelId,
        manifest: Manifest,
        sources: Option<Sources>,
    ) -> Result<ShardReader, ReadError> {
        let lies = |sources: &Sources| sources.tensors.len() != manifest.tensors.len();
        if sources.as_ref().is_some_and(lies) {
            return Err(ReadError::Elsewhere { id });
        }
        let sources = sources.unwrap_or_default();
        let mut files = Vec::with_capacity(sources.files.len());
        for mark in sources.files {
            let fail = |source| ReadError::Io {
                path: mark.path.clone(),
                what: format!("model {}", id.short()),
                source,
            };
            let file = File::open(&mark.path).map_err(fail)?;
            let found = file.metadata().map_err(fail)?.len();
            if found != mark.len {
                return Err(ReadError::Resized {
                    path: mark.path,
                    found,
                    expected: mark.len,
                });
            }
            files.push((file, mark));
        }
        let mut holders = vec![Vec::new(); manifest.tensors.len()];
        for (shard, i) in manifest.shards.iter().zip(0u32..) {
            for piece in &shard.pieces {
                holders[piece.tensor as usize].push(i);
            }
        }
        Ok(ShardReader {
            store,
            id,
            manifest,
            files,
            tensors: sources.tensors,
            holders,
            held: Mutex::default(),
        })
    }

    /// The model.
    pub fn id(&self) -> ModelId {
        self.id
    }

    /// Its manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Replaces `out` by a tensor's bytes. Several threads may ask; they take turns.
    ///
    /// # Errors
    /// No such tensor, a file that is gone or changed; names the file and what to do.
    pub fn read_tensor(&self, name: &str, out: &mut Vec<u8>) -> Result<(), ReadError> {
        out.clear();
        let missing = || ReadError::NoTensor {
            id: self.id,
            name: name.to_owned(),
        };
        let (index, tensor) = self.manifest.tensor(name).ok_or_else(missing)?;
        let holders = &self.holders[index as usize];
        // A panic elsewhere leaves only whole entries: each is pushed after it was verified.
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = |i: &&u32| {
            let pieces = &self.manifest.shards[**i as usize].pieces;
            pieces
                .iter()
                .any(|p| p.tensor == index && p.len == tensor.bytes)
        };
        let is_held = |i: &&u32| held.iter().any(|h| h.shard == **i);
        // Of several shards that hold all of it (shared tensors, a tied head) one that is in memory, or
        // the smallest of those on this machine.
        let one = holders.iter().filter(whole).find(is_held);
        let least = |i: &&u32| {
            let shard = &self.manifest.shards[**i as usize];
            (!self.is_here(shard), shard.bytes)
        };
        let one = one.or_else(|| holders.iter().filter(whole).min_by_key(least));
        let wanted: Vec<u32> = one.map_or_else(|| holders.clone(), |i| vec![*i]);
        out.reserve_exact(usize::try_from(tensor.bytes).unwrap_or(0));
        for shard in wanted {
            self.hold(shard, &mut held)?;
            self.give(shard, index, &mut held, out);
        }
        held.retain(|held| held.left.contains(&true));
        Ok(())
    }

    /// Replaces `out` by one expert's part of a tensor of all experts. Only that expert's shard has to be on this
    /// machine.
    ///
    /// # Errors
    /// As [`ShardReader::read_tensor`]; a tensor that is not one of experts has none of this expert.
    pub fn read_expert(&self, name: &str, expert: u16, out: &mut Vec<u8>) -> Result<(), ReadError> {
        out.clear();
        let missing = || ReadError::NoTensor {
            id: self.id,
            name: format!("{name} of expert {expert}"),
        };
        let (index, _) = self.manifest.tensor(name).ok_or_else(missing)?;
        let of_expert = |i: &&u32| {
            let kind = self.manifest.shards[**i as usize].kind;
            matches!(kind, ShardKind::Expert { expert: e, .. } if e == expert)
        };
        let shard = self.holders[index as usize].iter().find(of_expert);
        let shard = *shard.ok_or_else(missing)?;
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        self.hold(shard, &mut held)?;
        self.give(shard, index, &mut held, out);
        held.retain(|held| held.left.contains(&true));
        Ok(())
    }

    /// Verifies one shard now, and keeps it until its tensors were read.
    ///
    /// # Errors
    /// As [`ShardReader::read_tensor`].
    pub fn verify(&self, kind: ShardKind) -> Result<(), ReadError> {
        let position = self
            .manifest
            .shards
            .iter()
            .position(|shard| shard.kind == kind);
        let Some(shard) = position.and_then(|i| u32::try_from(i).ok()) else {
            return Err(ReadError::NoTensor {
                id: self.id,
                name: kind.to_string(),
            });
        };
        if self.manifest.shards[shard as usize].pieces.is_empty() {
            return Ok(());
        }
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        self.hold(shard, &mut held)
    }

    /// Drops what is held; it is verified again when it is asked for again.
    pub fn release(&self) {
        self.held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    fn hold(&self, shard: u32, held: &mut Vec<Held>) -> Result<(), ReadError> {
        if held.iter().any(|held| held.shard == shard) {
            return Ok(());
        }
        let entry = &self.manifest.shards[shard as usize];
        let group = group(entry.kind);
        held.retain(|held| self::group(self.manifest.shards[held.shard as usize].kind) == group);
        let fetched = self.store.has_blob(entry);
        let bytes = if fetched {
            self.read_blob(entry)?
        } else {
            self.read_shard(entry)?
        };
        let found = ShardId::of(&bytes);
        if found != entry.id && fetched {
            return Err(ReadError::Damaged {
                path: self.store.blob_path(&entry.id),
                id: self.id,
                kind: entry.kind,
            });
        }
        if found != entry.id {
            let file = entry
                .pieces
                .first()
                .map_or(0, |p| self.tensors[p.tensor as usize].file);
            return Err(ReadError::Changed {
                path: self.files[file as usize].1.path.clone(),
                kind: entry.kind,
                found,
                expected: entry.id,
            });
        }
        held.push(Held {
            shard,
            bytes,
            left: vec![true; entry.pieces.len()],
        });
        Ok(())
    }

    fn is_here(&self, entry: &ShardEntry) -> bool {
        !self.tensors.is_empty() || self.store.has_blob(entry)
    }

    fn read_blob(&self, entry: &ShardEntry) -> Result<Vec<u8>, ReadError> {
        let path = self.store.blob_path(&entry.id);
        let read = || {
            let file = File::open(&path)?;
            used_now(&file);
            let mut bytes = Vec::new();
            bytes.reserve_exact(usize::try_from(entry.bytes).unwrap_or(0));
            file.take(entry.bytes).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        read().map_err(|source| ReadError::Io {
            path: path.clone(),
            what: entry.kind.to_string(),
            source,
        })
    }

    fn read_shard(&self, entry: &ShardEntry) -> Result<Vec<u8>, ReadError> {
        if self.tensors.is_empty() {
            return Err(ReadError::Absent {
                id: self.id,
                kind: entry.kind,
            });
        }
        // The length was held against the files' when the model was imported; a source list that
        // lies meets the end of the file below.
        let n_bytes = usize::try_from(entry.bytes).unwrap_or(usize::MAX);
        let available: u64 = self.files.iter().map(|(_, mark)| mark.len).sum();
        if entry.bytes > available {
            return Err(ReadError::Elsewhere { id: self.id });
        }
        let mut bytes = vec![0; n_bytes];
        let mut rest = bytes.as_mut_slice();
        for piece in &entry.pieces {
            let (part, after) = rest.split_at_mut(usize::try_from(piece.len).unwrap_or(0));
            let source = self.tensors[piece.tensor as usize];
            let (file, mark) = &self.files[source.file as usize];
            let offset = source.offset.saturating_add(piece.offset);
            file.read_exact_at(part, offset)
                .map_err(|source| ReadError::Io {
                    path: mark.path.clone(),
                    what: entry.kind.to_string(),
                    source,
                })?;
            rest = after;
        }
        Ok(bytes)
    }

    /// Appends the pieces of a tensor that a held shard has.
    fn give(&self, shard: u32, tensor: u32, held: &mut [Held], out: &mut Vec<u8>) {
        let Some(held) = held.iter_mut().find(|held| held.shard == shard) else {
            return;
        };
        let mut at = 0;
        let pieces = &self.manifest.shards[shard as usize].pieces;
        for (piece, left) in pieces.iter().zip(&mut held.left) {
            let len = usize::try_from(piece.len).unwrap_or(0);
            if piece.tensor == tensor {
                out.extend_from_slice(&held.bytes[at..at + len]);
                *left = false;
            }
            at += len;
        }
    }
}

/// What is held together: a layer with its experts, the embedding, the head.
fn group(kind: ShardKind) -> (u8, u16) {
    match kind {
        ShardKind::Metadata => (0, 0),
        ShardKind::Embedding => (1, 0),
        ShardKind::Layer(layer) | ShardKind::Expert { layer, .. } => (2, layer),
        ShardKind::Head => (3, 0),
    }
}
