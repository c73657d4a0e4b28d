//! Importing a GGUF in place: its bytes are hashed where they are, no weight is copied.
//!
//! ```text
//! files ─▶ settings, tensors ─▶ Manifest::unhashed ─▶ hash each shard ─▶ metadata, manifest, sources
//! ```

use std::{
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use swarm_proto::{Hash, ModelId, ShardId};

use crate::{
    files::{FileMark, GgufFiles, place},
    layout::{Piece, ShardKind},
    manifest::{Manifest, ManifestError},
    store::{AliasName, Sources, Store, StoreError, TensorSource},
};

/// Bytes read at once: large enough that seeking between experts does not show.
const CHUNK: usize = 1 << 20;

/// How far an import is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes hashed.
    pub done: u64,
    /// Bytes to hash.
    pub total: u64,
    /// The shard at work.
    pub shard: ShardKind,
}

/// What an import made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// The model.
    pub id: ModelId,
    /// Its alias.
    pub alias: AliasName,
    /// What the alias pointed at before, when that was another model.
    pub replaced: Option<ModelId>,
}

/// Why a file cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// It cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A folder, a socket.
    #[error("{path} is not a file")]
    NotAFile {
        /// What was given.
        path: PathBuf,
    },
    /// It is no GGUF that this program reads.
    #[error("{path}: {source}")]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: gguf::GgufError,
    },
    /// One file of several, and not the one its name says.
    #[error(
        "{path} says that it is file {found_no} of {found_count}, by its name it is {no} of {count}; \
         the files of a model must be called NAME-00001-of-0000N.gguf and lie in one folder"
    )]
    Split {
        /// The file.
        path: PathBuf,
        /// As its settings say, from 1.
        found_no: u64,
        /// As its settings say.
        found_count: u64,
        /// As its name says, from 1.
        no: u32,
        /// As its name says.
        count: u32,
    },
    /// Well-formed, and no model that can be cut.
    #[error("{path}: {source}")]
    Model {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ManifestError,
    },
    /// It was written to while it was read.
    #[error(
        "{path} changed while it was being imported; import it again when nothing writes to it"
    )]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Store {
    /// Imports the GGUF at `path` (of a model in several files: any of them) and points an alias at
    /// it: `alias`, or what the file is called. The files stay where they are and must not change.
    ///
    /// A process killed in between leaves the store as it was, or with the model whole.
    ///
    /// # Errors
    /// The file is no model, cannot be read, or changes meanwhile; the alias is pinned to another model; the
    /// store cannot be written.
    pub fn import(
        &self,
        path: &Path,
        alias: Option<&AliasName>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Imported, ImportError> {
        let Hashed {
            id,
            manifest,
            metadata,
            sources,
        } = hash(path, progress)?;
        let alias = alias.cloned().unwrap_or_else(|| AliasName::for_file(path));
        self.check_pin(&alias, id)?;
        self.put_model(id, &manifest, &metadata, Some(&sources))?;
        let replaced = self.alias(&alias).filter(|old| *old != id);
        self.set_alias(&alias, id)?;
        Ok(Imported {
            id,
            alias,
            replaced,
        })
    }

    /// The model that this file was imported as, unless the file has changed since: by name, length
    /// and time, without reading it. What is wrong inside shows when it is read.
    pub fn find_file(&self, path: &Path) -> Option<ModelId> {
        let path = place(path).ok()?;
        let file = std::fs::File::open(&path).ok()?;
        let mark = FileMark::of(&path, &file).ok()?;
        let (models, _) = self.models();
        let found = models.into_iter().find(|model| {
            let sources = self.sources(model.id).ok().flatten();
            sources.is_some_and(|sources| {
                sources.files.contains(&mark) && sources.files.iter().all(unchanged)
            })
        });
        found.map(|model| model.id)
    }
}

pub(crate) fn unchanged(mark: &FileMark) -> bool {
    let file = std::fs::File::open(&mark.path);
    file.is_ok_and(|file| FileMark::of(&mark.path, &file).is_ok_and(|now| now == *mark))
}

fn at(mark: &FileMark, source: io::Error) -> ImportError {
    ImportError::Io {
        path: mark.path.clone(),
        source,
    }
}

/// A model as its files are now.
struct Hashed {
    id: ModelId,
    /// Encoded.
    manifest: Vec<u8>,
    metadata: Vec<u8>,
    sources: Sources,
}

/// The id of the model in the GGUF at `path`, as it is now: every byte is read and hashed, nothing is
/// stored. What [`Store::import`] would call it.
///
/// # Errors
/// As [`Store::import`], without the store.
pub fn identify(path: &Path, progress: &mut dyn FnMut(Progress)) -> Result<ModelId, ImportError> {
    Ok(hash(path, progress)?.id)
}

fn hash(path: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Hashed, ImportError> {
    let files = GgufFiles::open(path)?;
    let model = |source| ImportError::Model {
        path: path.to_owned(),
        source,
    };
    let (mut manifest, metadata) =
        Manifest::unhashed(files.kv.clone(), files.tensors.clone()).map_err(model)?;
    hash_shards(&files, &mut manifest, &metadata, progress)?;
    for (file, mark) in &files.files {
        let now = FileMark::of(&mark.path, file);
        if now.map_err(|source| at(mark, source))? != *mark {
            let path = mark.path.clone();
            return Err(ImportError::Changed { path });
        }
    }
    let manifest = manifest.encode().map_err(model)?;
    let sources = Sources {
        version: 1,
        files: files.files.iter().map(|(_, mark)| mark.clone()).collect(),
        tensors: files
            .tensors
            .iter()
            .zip(&files.file_of)
            .map(|(tensor, &file)| TensorSource {
                file,
                offset: tensor.offset,
            })
            .collect(),
    };
    Ok(Hashed {
        id: Manifest::id_of(&manifest),
        manifest,
        metadata,
        sources,
    })
}

fn hash_shards(
    files: &GgufFiles,
    manifest: &mut Manifest,
    metadata: &[u8],
    progress: &mut dyn FnMut(Progress),
) -> Result<(), ImportError> {
    let total = manifest.shards.iter().map(|shard| shard.bytes).sum();
    let mut done = 0;
    let mut buffer = vec![0; CHUNK];
    for shard in &mut manifest.shards {
        if shard.kind == ShardKind::Metadata {
            shard.id = ShardId::of(metadata);
            done += shard.bytes;
            continue;
        }
        let mut hasher = blake3::Hasher::new();
        for piece in &shard.pieces {
            hash_piece(files, piece, &mut buffer, |bytes| {
                hasher.update(bytes);
                done += bytes.len() as u64;
                let shard = shard.kind;
                progress(Progress { done, total, shard });
            })?;
        }
        shard.id = ShardId(Hash(*hasher.finalize().as_bytes()));
    }
    Ok(())
}

fn hash_piece(
    files: &GgufFiles,
    piece: &Piece,
    buffer: &mut [u8],
    mut take: impl FnMut(&[u8]),
) -> Result<(), ImportError> {
    let index = piece.tensor as usize;
    let (file, mark) = &files.files[files.file_of[index] as usize];
    let mut offset = files.tensors[index].offset.saturating_add(piece.offset);
    let mut left = piece.len;
    while left > 0 {
        let n = left.min(buffer.len() as u64);
        let part = &mut buffer[..n as usize];
        file.read_exact_at(part, offset)
            .map_err(|source| at(mark, source))?;
        take(part);
        offset += n;
        left -= n;
    }
    Ok(())
}
