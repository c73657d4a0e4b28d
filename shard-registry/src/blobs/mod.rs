//! Shards that came from elsewhere, each a file called by its hash, and how any shard here (a fetched one, one in
//! the user's own files, one that is only partly here) is given to others, verified group by group.
//!
//! ```text
//! blobs/<shard id>          all its bytes
//! partial/<shard id>.data   some of its groups, each where it belongs
//! partial/<shard id>.tree   the hashes of those groups and the way up to the shard's own: the outboard
//! ```
//!
//! Nothing here is believed because of where it lies: a partial is verified against its outboard when it is
//! opened again, and a blob against its name before it is read or given.

mod give;
mod partial;
mod remove;
mod room;
mod tree;

use std::{
    fmt,
    fs::{self, File, FileTimes},
    io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use swarm_proto::{ExpertSpan, LayerRange, ModelId, ShardId};

use crate::{
    layout::ShardKind,
    manifest::{Manifest, ShardEntry},
    store::{Store, StoreError},
};

pub use give::{GiveError, OpenShard};
pub use partial::{Partial, TakeError, Taken};
pub use remove::{Collected, Removed};
pub use room::{Evicted, Quota, Worth};
pub use tree::encoded_len;

/// Folders of the store.
pub(crate) const BLOBS: &str = "blobs";
pub(crate) const PARTIAL: &str = "partial";

/// Why a shard cannot be kept or read. Ours, never a peer's.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The system refused.
    #[error("{path}: {source}{}", remedy(.source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No room on the disk.
    #[error(
        "{path}: {} are needed and {} are free on this disk, of which {} stay free; free some, or `shoal gc`, or \
         move the home directory: --home DIR",
        Size(*needed), Size(*free), Size(*reserve)
    )]
    Full {
        /// The folder.
        path: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
        /// Bytes that are left free.
        reserve: u64,
    },
    /// More than the quota allows, whatever is evicted.
    #[error(
        "{} are needed, and --disk allows {}, of which {} are in use by what is needed too; raise --disk",
        Size(*needed), Size(*max), Size(*used)
    )]
    Quota {
        /// Bytes needed.
        needed: u64,
        /// The quota.
        max: u64,
        /// Bytes that cannot be evicted.
        used: u64,
    },
    /// Another process fetches the same shard into this store.
    #[error("another process of this home is fetching shard {shard}")]
    Busy {
        /// Which.
        shard: ShardId,
    },
    /// Not all of it is here.
    #[error("shard {shard}: {missing} groups are missing")]
    Incomplete {
        /// Which.
        shard: ShardId,
        /// How many.
        missing: u32,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl BlobError {
    fn at(path: &Path) -> impl Fn(io::Error) -> BlobError + '_ {
        |source| BlobError::Io {
            path: path.to_owned(),
            source,
        }
    }
}

/// Bytes as people read them.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) = match self.0 {
            0..0x400 => return write!(f, "{} bytes", self.0),
            0x400..0x10_0000 => (1u64 << 10, "KiB"),
            0x10_0000..0x4000_0000 => (1 << 20, "MiB"),
            _ => (1 << 30, "GiB"),
        };
        write!(f, "{:.1} {name}", self.0 as f64 / unit as f64)
    }
}

/// What to do about a disk that takes nothing more; empty for other errors.
pub(crate) fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::FileTooLarge => {
            "; a limit keeps this file from growing: raise it (ulimit -f), or give another file system: --home DIR"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some disk, or `shoal gc`; what was fetched is kept, and it goes on from there"
        }
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
            "; the store must be writable for this user, or give another one: --home DIR"
        }
        _ => "",
    }
}

/// How much of a model is on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Here {
    /// Layers all of whose shards are here, with the embedding for the first and the head for the last.
    pub layers: Vec<LayerRange>,
    /// Layers of which everything is here but perhaps experts; those of a dense model as above.
    pub trunks: Vec<LayerRange>,
    /// Experts whose shards are here.
    pub experts: Vec<ExpertSpan>,
    /// Shards that are here, the metadata among them.
    pub shards: usize,
    /// Of how many.
    pub of: usize,
    /// Bytes of fetched shards; none where the user's own files have everything.
    pub blob_bytes: u64,
}

impl Here {
    /// All of it.
    pub fn is_whole(&self) -> bool {
        self.shards == self.of
    }
}

impl Store {
    pub(crate) fn blob_path(&self, shard: &ShardId) -> PathBuf {
        self.dir().join(BLOBS).join(shard.to_string())
    }

    /// Whether a shard was fetched and has the right length. Its bytes are verified when they are read.
    pub fn has_blob(&self, shard: &ShardEntry) -> bool {
        let found = fs::metadata(self.blob_path(&shard.id));
        found.is_ok_and(|meta| meta.is_file() && meta.len() == shard.bytes)
    }

    /// Whether a shard was fetched and is of another length by now.
    pub fn is_cut_off(&self, shard: &ShardEntry) -> bool {
        let found = fs::metadata(self.blob_path(&shard.id));
        found.is_ok_and(|meta| meta.len() != shard.bytes)
    }

    /// Reads and hashes a fetched shard: true if it is whole. One that is damaged is removed, so that it can be
    /// fetched again.
    ///
    /// # Errors
    /// It cannot be read, or not be removed.
    pub fn check_blob(&self, shard: &ShardEntry) -> Result<bool, BlobError> {
        let path = self.blob_path(&shard.id);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(BlobError::at(&path)(e)),
        };
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&file).map_err(BlobError::at(&path))?;
        if *hasher.finalize().as_bytes() == shard.id.0.0 {
            used_now(&file);
            return Ok(true);
        }
        tracing::warn!(path = %path.display(), "a fetched shard is damaged: it is removed and fetched again");
        fs::remove_file(&path).map_err(BlobError::at(&path))?;
        Ok(false)
    }

    /// How much of a model is here, in the user's files or fetched. Nothing is read but names and lengths.
    ///
    /// # Errors
    /// The model is not known here, or torn.
    pub fn here(&self, id: ModelId) -> Result<Here, StoreError> {
        let manifest = self.manifest(id)?;
        let in_place = self.in_place(id);
        let mut here = Here {
            of: manifest.shards.len(),
            ..Here::default()
        };
        let (mut missing, mut missing_trunk) = (Vec::new(), Vec::new());
        let mut experts = Vec::new();
        for shard in &manifest.shards {
            let expert = match shard.kind {
                ShardKind::Expert { layer, expert } => Some((layer, expert)),
                _ => None,
            };
            if in_place || shard.kind == ShardKind::Metadata {
                here.shards += 1;
                experts.extend(expert);
            } else if self.has_blob(shard) {
                here.shards += 1;
                here.blob_bytes += shard.bytes;
                experts.extend(expert);
            } else {
                let layer = layer_of(shard.kind, manifest.n_layer);
                missing.extend(layer);
                missing_trunk.extend(layer.filter(|_| expert.is_none()));
            }
        }
        let but = |missing: Vec<u16>| {
            let held = (0..manifest.n_layer).filter(|layer| !missing.contains(layer));
            LayerRange::merge(held.map(LayerRange::one).collect())
        };
        (here.layers, here.trunks) = (but(missing), but(missing_trunk));
        here.experts = ExpertSpan::of(experts);
        Ok(here)
    }

    /// Whether the files that the model was imported from are as they were.
    pub(crate) fn in_place(&self, id: ModelId) -> bool {
        let sources = self.sources(id).ok().flatten();
        sources.is_some_and(|sources| sources.files.iter().all(crate::import::unchanged))
    }
}

impl Manifest {
    /// The shards that a node needs to serve `layers`: with the embedding for the first and the head for the last.
    pub fn shards_of(&self, layers: LayerRange) -> impl Iterator<Item = &ShardEntry> {
        let n_layer = self.n_layer;
        self.shards.iter().filter(move |shard| {
            layer_of(shard.kind, n_layer).is_some_and(|layer| layers.contains(layer))
        })
    }
}

/// The layer whose holders have such a shard; none for the metadata, which everybody has.
pub fn layer_of(kind: ShardKind, n_layer: u16) -> Option<u16> {
    match kind {
        ShardKind::Metadata => None,
        ShardKind::Embedding => Some(0),
        ShardKind::Layer(layer) | ShardKind::Expert { layer, .. } => Some(layer),
        ShardKind::Head => n_layer.checked_sub(1),
    }
}

/// For the order in which shards are evicted. A store that cannot be written has none.
pub(crate) fn used_now(file: &File) {
    let _ = file.set_times(FileTimes::new().set_accessed(SystemTime::now()));
}
