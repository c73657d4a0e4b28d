//! Giving a shard to others: from its blob, from the user's own files, or from what is here of it already. Each
//! group is held against the hash that leads to it before a byte of it is written out.

use std::{
    fs::File,
    io::{self, BufReader, Read, Write},
    ops::Range,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::Arc,
};

use bao_tree::io::{
    EncodeError,
    sync::{ReadAt, encode_ranges_validated, outboard},
};
use swarm_proto::{ModelId, ShardId, transfer::groups_of};

use super::{
    Partial,
    tree::{self, Outboard},
    used_now,
};
use crate::{
    manifest::ShardEntry,
    store::{Sources, Store, StoreError},
};

/// Read at once while a shard is hashed.
const READ_BYTES: usize = 1 << 20;

/// A shard that can be given.
#[derive(Debug)]
pub struct OpenShard {
    shard: ShardId,
    bytes: u64,
    held: Held,
}

#[derive(Debug)]
enum Held {
    /// All of it, with the hashes of its groups.
    Whole(Places, Box<Outboard>),
    Partly(Arc<Partial>),
}

/// Where a shard's bytes are, in their order.
#[derive(Debug)]
struct Places(Vec<Place>);

#[derive(Debug)]
struct Place {
    /// First byte, within the shard.
    start: u64,
    len: u64,
    file: Arc<File>,
    path: PathBuf,
    offset: u64,
}

/// Why groups were not given.
#[derive(Debug, thiserror::Error)]
pub enum GiveError {
    /// The shard has no such groups. The asker's fault.
    #[error("groups {}..{} of a shard that has {of}", .asked.start, .asked.end)]
    Range {
        /// What was asked for.
        asked: Range<u32>,
        /// What there is.
        of: u32,
    },
    /// They are not here yet.
    #[error("not here yet")]
    NotYet,
    /// The asker left.
    #[error("the asker left")]
    Left,
    /// The bytes are not those that were imported or fetched.
    #[error(
        "{path} is not what it was: shard {shard} cannot be given; `shoal import` the file again, or `shoal pull` \
         what was fetched"
    )]
    Changed {
        /// The file that the shard begins in.
        path: PathBuf,
        /// Which shard.
        shard: ShardId,
    },
    /// They cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file that the shard begins in.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Store {
    /// Opens a shard of a model for giving it: reads and hashes all of it once. None where it is not here.
    ///
    /// # Errors
    /// It is here and not what it should be, or cannot be read.
    pub fn open_shard(
        &self,
        model: ModelId,
        shard: ShardId,
    ) -> Result<Option<OpenShard>, GiveError> {
        let manifest = match self.manifest(model) {
            Ok(manifest) => manifest,
            Err(StoreError::Missing { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let Some(entry) = manifest.shards.iter().find(|entry| entry.id == shard) else {
            return Ok(None);
        };
        if entry.pieces.is_empty() {
            // The metadata comes with the manifest, see `fetch`.
            return Ok(None);
        }
        let places = match self.blob_place(entry)? {
            Some(place) => Places(vec![place]),
            None => match self.sources(model).map_err(StoreError::Torn)? {
                Some(sources) => Places::in_files(entry, &sources)?,
                None if self.is_cut_off(entry) => {
                    let path = self.blob_path(&entry.id);
                    return Err(GiveError::Changed { path, shard });
                }
                None => return Ok(None),
            },
        };
        OpenShard::new(entry, places).map(Some)
    }

    fn blob_place(&self, entry: &ShardEntry) -> Result<Option<Place>, GiveError> {
        if !self.has_blob(entry) {
            return Ok(None);
        }
        let path = self.blob_path(&entry.id);
        let file = File::open(&path).map_err(|source| GiveError::Io {
            path: path.clone(),
            source,
        })?;
        used_now(&file);
        Ok(Some(Place {
            start: 0,
            len: entry.bytes,
            file: Arc::new(file),
            path,
            offset: 0,
        }))
    }
}

impl OpenShard {
    fn new(entry: &ShardEntry, places: Places) -> Result<OpenShard, GiveError> {
        let mut known = tree::empty(&entry.id, entry.bytes);
        let geometry = known.tree;
        let reader = InOrder {
            places: &places,
            at: 0,
            end: entry.bytes,
        };
        let reader = BufReader::with_capacity(READ_BYTES, reader);
        let root = outboard(reader, geometry, &mut known).map_err(|e| places.io(e))?;
        if root != tree::root(&entry.id) {
            return Err(places.changed(entry.id));
        }
        Ok(OpenShard {
            shard: entry.id,
            bytes: entry.bytes,
            held: Held::Whole(places, Box::new(known)),
        })
    }

    /// What is here so far of a shard that is being fetched.
    pub fn partly(partial: Arc<Partial>) -> OpenShard {
        OpenShard {
            shard: partial.shard(),
            bytes: partial.bytes(),
            held: Held::Partly(partial),
        }
    }

    /// Bytes of the whole shard.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes that it takes in memory while it is open.
    pub fn memory_bytes(&self) -> usize {
        match &self.held {
            Held::Whole(_, known) => known.data.len(),
            Held::Partly(_) => 0,
        }
    }

    /// Whether these groups can be given now.
    ///
    /// # Errors
    /// The shard has no such groups, or they are not here yet.
    pub fn check(&self, groups: &Range<u32>) -> Result<(), GiveError> {
        let of = groups_of(self.bytes);
        if groups.is_empty() || groups.end > of {
            let asked = groups.clone();
            return Err(GiveError::Range { asked, of });
        }
        match &self.held {
            Held::Partly(partial) if !partial.has(groups) => Err(GiveError::NotYet),
            _ => Ok(()),
        }
    }

    /// Writes groups as they go over the wire. An error of `out` means that the asker left.
    ///
    /// # Errors
    /// See [`GiveError`]. What was written before it is right all the same.
    pub fn give(&self, groups: &Range<u32>, out: &mut dyn Write) -> Result<(), GiveError> {
        self.check(groups)?;
        let ranges = tree::chunks(groups);
        let mut out = Out { out, left: false };
        let done = match &self.held {
            Held::Whole(places, known) => {
                encode_ranges_validated(places, known.as_ref(), &ranges, &mut out)
            }
            Held::Partly(partial) => {
                encode_ranges_validated(partial.data(), partial.as_ref(), &ranges, &mut out)
            }
        };
        match done {
            Ok(()) => Ok(()),
            Err(_) if out.left => Err(GiveError::Left),
            // A file that was cut off is another than it was, too.
            Err(EncodeError::Io(source)) if source.kind() != io::ErrorKind::UnexpectedEof => {
                Err(GiveError::Io {
                    path: self.path(),
                    source,
                })
            }
            Err(_) => Err(GiveError::Changed {
                path: self.path(),
                shard: self.shard,
            }),
        }
    }

    fn path(&self) -> PathBuf {
        match &self.held {
            Held::Whole(places, _) => places.path(),
            Held::Partly(_) => PathBuf::from("a shard being fetched"),
        }
    }
}

impl Places {
    fn in_files(entry: &ShardEntry, sources: &Sources) -> Result<Places, GiveError> {
        let mut files = Vec::with_capacity(sources.files.len());
        for mark in &sources.files {
            let io = |source| GiveError::Io {
                path: mark.path.clone(),
                source,
            };
            let file = File::open(&mark.path).map_err(io)?;
            if file.metadata().map_err(io)?.len() != mark.len {
                return Err(GiveError::Changed {
                    path: mark.path.clone(),
                    shard: entry.id,
                });
            }
            files.push(Arc::new(file));
        }
        let mut places = Vec::with_capacity(entry.pieces.len());
        let mut start = 0u64;
        for piece in &entry.pieces {
            let source = sources.tensors.get(piece.tensor as usize);
            let file = source.and_then(|source| files.get(source.file as usize));
            let (Some(source), Some(file)) = (source, file) else {
                let path = sources.files.first().map(|mark| mark.path.clone());
                return Err(GiveError::Changed {
                    path: path.unwrap_or_default(),
                    shard: entry.id,
                });
            };
            places.push(Place {
                start,
                len: piece.len,
                file: file.clone(),
                path: sources.files[source.file as usize].path.clone(),
                offset: source.offset.saturating_add(piece.offset),
            });
            start = start.saturating_add(piece.len);
        }
        Ok(Places(places))
    }

    fn path(&self) -> PathBuf {
        self.0
            .first()
            .map(|place| place.path.clone())
            .unwrap_or_default()
    }

    fn io(&self, source: io::Error) -> GiveError {
        let path = self.path();
        GiveError::Io { path, source }
    }

    fn changed(&self, shard: ShardId) -> GiveError {
        let path = self.path();
        GiveError::Changed { path, shard }
    }
}

impl ReadAt for Places {
    fn read_at(&self, at: u64, out: &mut [u8]) -> io::Result<usize> {
        let after = self.0.partition_point(|place| place.start <= at);
        // Empty pieces begin where the next one does: the last that begins here is the one.
        let Some(place) = after.checked_sub(1).and_then(|i| self.0.get(i)) else {
            return Ok(0);
        };
        let within = at - place.start;
        let left = place.len.saturating_sub(within);
        let n = usize::try_from(left).unwrap_or(usize::MAX).min(out.len());
        FileExt::read_at(
            place.file.as_ref(),
            &mut out[..n],
            place.offset.saturating_add(within),
        )
    }
}

/// The bytes from the first to the last.
struct InOrder<'a> {
    places: &'a Places,
    at: u64,
    end: u64,
}

impl Read for InOrder<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let n = left.min(out.len());
        let n = self.places.read_at(self.at, &mut out[..n])?;
        self.at += n as u64;
        Ok(n)
    }
}

/// Tells a reader that left from a file that cannot be read.
struct Out<'a> {
    out: &'a mut dyn Write,
    left: bool,
}

impl Write for Out<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes);
        self.left |= written.is_err();
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
