//! Everything about a model but its bytes. The hash of its encoding is the model's id.
//!
//! What can be derived is not written down, so that it cannot lie: the dimensions come from the
//! settings and the tensor table, the pieces of the shards from the layout. What is written down is
//! held against both before it is used.

use std::collections::HashMap;

use bincode::{Decode, Encode};
use gguf::{ALIGNMENT_DEFAULT, Header, TensorInfo, TensorType, Value};
use swarm_proto::{
    Hash, LayerRange, ModelId, ShardId,
    codec::{CodecError, cut_text, decode_record, encode_record},
};

use crate::layout::{Piece, ShardKind, shards};

/// Largest manifest: 61 layers of 256 experts need 1.2 MB.
pub const MANIFEST_BYTES_MAX: usize = 32 << 20;
/// Memory that decoding may claim: names are strings of 24 bytes and more in memory.
const MANIFEST_CLAIM_MAX: usize = 128 << 20;
/// Most layers: the largest models have less than 200.
pub const LAYERS_MAX: u64 = 1024;
/// Most experts of a layer: the largest models have 512.
pub const EXPERTS_MAX: u64 = 4096;
/// Most shards.
pub const SHARDS_MAX: usize = 1 << 18;
/// Largest shard: ten times the largest layers there are. Its hashes take a 256th of it in memory while it is fetched.
pub const SHARD_BYTES_MAX: u64 = 1 << 38;
/// Most numbers in a row.
pub const EMBD_MAX: u64 = 1 << 20;
/// Most tokens in a vocabulary.
pub const VOCAB_MAX: u64 = 1 << 24;
/// Longest model name.
const NAME_BYTES_MAX: usize = 256;
/// Settings longer than this move to the metadata shard, where a tokenizer holds them.
const TOKENIZER_VALUE_INLINE_MAX: usize = 1024;
/// The same for all other settings: arrays with a number per layer stay.
const VALUE_INLINE_MAX: usize = 64 * 1024;
const CONTEXT: &str = "shoal manifest 1";
const RECORD: &str = "manifest";
const VERSION: u16 = 1;

/// One tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// GGUF name.
    pub name: String,
    /// Shape, ggml order (fastest first).
    pub dims: Vec<u64>,
    /// Type of its elements.
    pub ty: TensorType,
    /// Bytes.
    pub bytes: u64,
}

/// One shard: its bytes are those of its pieces, one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardEntry {
    /// What it is.
    pub kind: ShardKind,
    /// Hash of its bytes.
    pub id: ShardId,
    /// Their number.
    pub bytes: u64,
    /// What they are; none for the metadata.
    pub pieces: Vec<Piece>,
}

/// A model without its bytes. Made by [`Manifest::decode`] or an import; always checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    /// `general.architecture`.
    pub arch: String,
    /// `general.name`, or empty.
    pub name: String,
    /// Layers (`<arch>.block_count`).
    pub n_layer: u16,
    /// Numbers in a row (`<arch>.embedding_length`).
    pub n_embd: u32,
    /// Tokens in the vocabulary, from the embedding's shape.
    pub n_vocab: u32,
    /// Context the model was trained for (`<arch>.context_length`), 0 when it is not said.
    pub n_ctx_train: u32,
    /// Experts of a layer, 0 for a dense model.
    pub n_expert: u16,
    /// Settings, without the large ones that are in the metadata shard.
    pub kv: Vec<(String, Value)>,
    /// All tensors.
    pub tensors: Vec<Tensor>,
    /// All shards: metadata, embedding, layers (each with its experts), head.
    pub shards: Vec<ShardEntry>,
    index: HashMap<String, u32>,
}

#[derive(Encode, Decode)]
struct Record {
    version: u16,
    kv: Vec<u8>,
    tensors: Vec<TensorRecord>,
    shards: Vec<ShardRecord>,
}

#[derive(Encode, Decode)]
struct TensorRecord {
    name: String,
    dims: Vec<u64>,
    ty: u32,
}

#[derive(Encode, Decode)]
struct ShardRecord {
    kind: ShardKind,
    id: ShardId,
    bytes: u64,
}

/// Why bytes are no manifest, or a model cannot have one. The fault of whoever made it.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not an encoding of one.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// Of a version that this program does not know.
    #[error("manifest of version {0}, this program knows {VERSION}; update shoal")]
    Version(u16),
    /// Its settings or tensors break GGUF's rules.
    #[error("manifest: {0}")]
    Gguf(#[from] gguf::GgufError),
    /// A number out of bounds.
    #[error("manifest: {what} is {value}, 1 to {max} are possible")]
    Bounds {
        /// What.
        what: String,
        /// Its value.
        value: u64,
        /// The limit.
        max: u64,
    },
    /// Parts that do not fit together.
    #[error("manifest: {0}")]
    Wrong(String),
    /// Its hash is another.
    #[error("the manifest's id is {found}, {wanted} was asked for")]
    Id {
        /// Of the bytes.
        found: ModelId,
        /// The one wanted.
        wanted: ModelId,
    },
}

impl Manifest {
    /// A manifest of a whole model's settings and tensors, with the metadata shard's bytes. The
    /// shards' hashes are the caller's to fill in: it has the bytes.
    pub(crate) fn unhashed(
        kv: Vec<(String, Value)>,
        tensors: Vec<TensorInfo>,
    ) -> Result<(Manifest, Vec<u8>), ManifestError> {
        let (large, small) = kv
            .into_iter()
            .partition(|(key, value)| is_large(key, value));
        let metadata = kv_bytes(large)?;
        let mut manifest = Self::derive(small, tensors)?;
        for (kind, pieces) in shards(&manifest.tensors, manifest.n_layer, manifest.n_expert)
            .map_err(ManifestError::Wrong)?
        {
            let bytes = match kind {
                ShardKind::Metadata => metadata.len() as u64,
                _ => pieces.iter().map(|piece| piece.len).sum(),
            };
            manifest.shards.push(ShardEntry {
                kind,
                id: ShardId(Hash([0; 32])),
                bytes,
                pieces,
            });
        }
        manifest.check()?;
        Ok((manifest, metadata))
    }

    fn derive(
        kv: Vec<(String, Value)>,
        tensors: Vec<TensorInfo>,
    ) -> Result<Manifest, ManifestError> {
        let mut table = Vec::with_capacity(tensors.len());
        for info in tensors {
            table.push(Tensor {
                bytes: info.n_bytes()?,
                name: info.name,
                dims: info.dims,
                ty: info.ty,
            });
        }
        let settings = Settings::new(&kv)?;
        let embedding = table
            .iter()
            .find(|tensor| tensor.name == "token_embd.weight");
        let embedding = embedding.ok_or_else(|| wrong("it has no tensor token_embd.weight"))?;
        let n_embd = settings.bounded("embedding_length", EMBD_MAX)?;
        let n_vocab = match embedding.dims[..] {
            [row, n] if row == n_embd => bounded("vocabulary", n, VOCAB_MAX)?,
            _ => {
                let dims = &embedding.dims;
                return Err(wrong(format!(
                    "token_embd.weight has the shape {dims:?}, rows of {n_embd} are declared"
                )));
            }
        };
        let n_expert = match settings.number("expert_count") {
            None | Some(0) => 0,
            Some(n) => bounded("expert_count", n, EXPERTS_MAX)?,
        };
        let n_ctx_train = settings.number("context_length").unwrap_or(0);
        Ok(Manifest {
            arch: settings.arch.clone(),
            name: settings.name.clone(),
            n_layer: narrow(settings.bounded("block_count", LAYERS_MAX)?),
            n_embd: narrow(n_embd),
            n_vocab: narrow(n_vocab),
            n_ctx_train: u32::try_from(n_ctx_train).unwrap_or(u32::MAX),
            n_expert: narrow(n_expert),
            index: table
                .iter()
                .zip(0..)
                .map(|(tensor, i)| (tensor.name.clone(), i))
                .collect(),
            kv,
            tensors: table,
            shards: Vec::new(),
        })
    }

    /// Holds every part against the others: settings and tensors against GGUF's rules, shards
    /// against the layout. Nothing is allocated by a number that was not held against a limit.
    ///
    /// # Errors
    /// The first that does not fit.
    pub fn check(&self) -> Result<(), ManifestError> {
        self.header()?;
        if self.index.len() != self.tensors.len() {
            return Err(wrong("two tensors have one name"));
        }
        let expert_shards = u64::from(self.n_layer) * (u64::from(self.n_expert) + 1);
        bounded("number of shards", expert_shards + 3, SHARDS_MAX as u64)?;
        let expected =
            shards(&self.tensors, self.n_layer, self.n_expert).map_err(ManifestError::Wrong)?;
        if expected.len() != self.shards.len() {
            let (found, wanted) = (self.shards.len(), expected.len());
            return Err(wrong(format!("{found} shards, its tensors make {wanted}")));
        }
        for (shard, (kind, pieces)) in self.shards.iter().zip(expected) {
            let bytes = match kind {
                ShardKind::Metadata => shard.bytes.min(gguf::METADATA_BYTES_MAX),
                _ => pieces.iter().map(|piece| piece.len).sum(),
            };
            if bytes > SHARD_BYTES_MAX {
                return Err(ManifestError::Bounds {
                    what: format!("bytes of {kind}"),
                    value: bytes,
                    max: SHARD_BYTES_MAX,
                });
            }
            if (shard.kind, shard.bytes) != (kind, bytes) || shard.pieces != pieces {
                let (found, found_bytes) = (shard.kind, shard.bytes);
                return Err(wrong(format!(
                    "shard {found} of {found_bytes} bytes where {kind} of {bytes} belongs"
                )));
            }
            // What every layer shares makes no layer.
            let own = |piece: &Piece| self.tensors[piece.tensor as usize].name.starts_with("blk.");
            if matches!(kind, ShardKind::Layer(_)) && !shard.pieces.iter().any(own) {
                return Err(wrong(format!("{kind} has no tensors")));
            }
        }
        Ok(())
    }

    /// The canonical encoding.
    ///
    /// # Errors
    /// Larger than [`MANIFEST_BYTES_MAX`].
    pub fn encode(&self) -> Result<Vec<u8>, ManifestError> {
        let tensors = self.tensors.iter().map(|tensor| TensorRecord {
            name: tensor.name.clone(),
            dims: tensor.dims.clone(),
            ty: tensor.ty.id(),
        });
        let shards = self.shards.iter().map(|shard| ShardRecord {
            kind: shard.kind,
            id: shard.id,
            bytes: shard.bytes,
        });
        let record = Record {
            version: VERSION,
            kv: kv_bytes(self.kv.clone())?,
            tensors: tensors.collect(),
            shards: shards.collect(),
        };
        let mut out = Vec::new();
        encode_record(RECORD, &record, &mut out, MANIFEST_BYTES_MAX)?;
        Ok(out)
    }

    /// The manifest in these bytes.
    ///
    /// # Errors
    /// Bytes that are none, one that breaks a rule, or one in another than the canonical encoding.
    pub fn decode(bytes: &[u8]) -> Result<Manifest, ManifestError> {
        // The version comes first, so that a newer one is named and not called malformed.
        if let Some(&version @ 0..=250) = bytes.first()
            && u16::from(version) != VERSION
        {
            return Err(ManifestError::Version(version.into()));
        }
        let record: Record =
            decode_record::<_, MANIFEST_CLAIM_MAX>(RECORD, bytes, MANIFEST_BYTES_MAX)?;
        if record.version != VERSION {
            return Err(ManifestError::Version(record.version));
        }
        let kv = read_kv(&record.kv)?;
        let mut tensors = Vec::with_capacity(record.tensors.len());
        for tensor in record.tensors {
            tensors.push(TensorInfo {
                name: tensor.name,
                dims: tensor.dims,
                ty: TensorType::from_id(tensor.ty)?,
                offset: 0,
            });
        }
        let mut manifest = Self::derive(kv, tensors)?;
        let declared = record.shards;
        let expert_shards = u64::from(manifest.n_layer) * (u64::from(manifest.n_expert) + 1);
        bounded("number of shards", expert_shards + 3, SHARDS_MAX as u64)?;
        let layout = shards(&manifest.tensors, manifest.n_layer, manifest.n_expert)
            .map_err(ManifestError::Wrong)?;
        if declared.len() != layout.len() {
            let (found, wanted) = (declared.len(), layout.len());
            return Err(wrong(format!("{found} shards, its tensors make {wanted}")));
        }
        manifest.shards = declared
            .into_iter()
            .zip(layout)
            .map(|(shard, (_, pieces))| ShardEntry {
                kind: shard.kind,
                id: shard.id,
                bytes: shard.bytes,
                pieces,
            })
            .collect();
        manifest.check()?;
        if manifest.encode()? != bytes {
            return Err(wrong("it is not in the canonical encoding"));
        }
        Ok(manifest)
    }

    /// As [`Manifest::decode`], for bytes that came for an id.
    ///
    /// # Errors
    /// Also when their hash is another; nothing is decoded then.
    pub fn decode_for(id: ModelId, bytes: &[u8]) -> Result<Manifest, ManifestError> {
        let found = Self::id_of(bytes);
        if found != id {
            return Err(ManifestError::Id { found, wanted: id });
        }
        Self::decode(bytes)
    }

    /// The id of the model with this encoding.
    pub fn id_of(bytes: &[u8]) -> ModelId {
        ModelId(Hash(blake3::derive_key(CONTEXT, bytes)))
    }

    /// A GGUF header with all tensors and without the large settings: what a stage is cut from.
    ///
    /// # Errors
    /// Tensors or settings that break GGUF's rules.
    pub fn header(&self) -> Result<Header, ManifestError> {
        let tensors = self.tensors.iter().map(|tensor| TensorInfo {
            name: tensor.name.clone(),
            dims: tensor.dims.clone(),
            ty: tensor.ty,
            offset: 0,
        });
        let header = Header::new(alignment(&self.kv)?, self.kv.clone(), tensors.collect())?;
        Ok(header)
    }

    /// A GGUF header with all settings and no tensors: what a tokenizer is made from. `metadata` is
    /// the metadata shard, whose hash is checked here.
    ///
    /// # Errors
    /// Other bytes than the shard's, or bytes that are no settings.
    pub fn vocab_header(&self, metadata: &[u8]) -> Result<Header, ManifestError> {
        let found = ShardId::of(metadata);
        let wanted = self.metadata().map(|shard| shard.id);
        if Some(found) != wanted {
            return Err(wrong(format!(
                "the metadata's hash is {found}, the manifest's says {}",
                wanted.map_or("none".into(), |id| id.to_string())
            )));
        }
        let mut kv = self.kv.clone();
        kv.extend(read_kv(metadata)?);
        Ok(Header::new(alignment(&kv)?, kv, Vec::new())?)
    }

    /// The tensor called `name`, with its index.
    pub fn tensor(&self, name: &str) -> Option<(u32, &Tensor)> {
        let index = *self.index.get(name)?;
        Some((index, self.tensors.get(index as usize)?))
    }

    /// The shard of a kind.
    pub fn shard(&self, kind: ShardKind) -> Option<&ShardEntry> {
        self.shards.iter().find(|shard| shard.kind == kind)
    }

    /// The metadata shard.
    pub fn metadata(&self) -> Option<&ShardEntry> {
        self.shards.first()
    }

    /// All layers.
    pub fn layers(&self) -> LayerRange {
        LayerRange {
            start: 0,
            end: self.n_layer,
        }
    }

    /// Bytes of one layer's tensors, its experts included.
    pub fn layer_bytes(&self, layer: u16) -> u64 {
        self.bytes_where(|kind| match kind {
            ShardKind::Layer(i) | ShardKind::Expert { layer: i, .. } => i == layer,
            _ => false,
        })
    }

    /// Bytes of a shard that is there once: the embedding or the head.
    pub fn bytes_of(&self, kind: ShardKind) -> u64 {
        self.bytes_where(|other| other == kind)
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    fn bytes_where(&self, wanted: impl Fn(ShardKind) -> bool) -> u64 {
        let found = self.shards.iter().filter(|shard| wanted(shard.kind));
        found.map(|shard| shard.bytes).sum()
    }
}

struct Settings<'a> {
    kv: &'a [(String, Value)],
    arch: String,
    name: String,
}

impl<'a> Settings<'a> {
    fn new(kv: &'a [(String, Value)]) -> Result<Self, ManifestError> {
        let text = |key| {
            find(kv, key)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        let (arch, mut name) = (text("general.architecture"), text("general.name"));
        if arch.is_empty() || arch.len() > NAME_BYTES_MAX {
            return Err(wrong("it has no general.architecture"));
        }
        cut_text(&mut name, NAME_BYTES_MAX);
        Ok(Self { kv, arch, name })
    }

    fn number(&self, key: &str) -> Option<u64> {
        find(self.kv, &format!("{}.{key}", self.arch)).and_then(Value::as_u64)
    }

    fn bounded(&self, key: &str, max: u64) -> Result<u64, ManifestError> {
        let name = format!("{}.{key}", self.arch);
        let value = self.number(key);
        bounded(
            &name,
            value.ok_or_else(|| wrong(format!("it has no number {name}")))?,
            max,
        )
    }
}

fn find<'a>(kv: &'a [(String, Value)], key: &str) -> Option<&'a Value> {
    kv.iter().find(|(k, _)| k == key).map(|(_, value)| value)
}

fn bounded(what: &str, value: u64, max: u64) -> Result<u64, ManifestError> {
    if (1..=max).contains(&value) {
        return Ok(value);
    }
    let what = what.to_owned();
    Err(ManifestError::Bounds { what, value, max })
}

/// For numbers that were held against a limit of the type.
fn narrow<T: TryFrom<u64> + Default>(value: u64) -> T {
    T::try_from(value).unwrap_or_default()
}

fn wrong(why: impl Into<String>) -> ManifestError {
    ManifestError::Wrong(why.into())
}

fn alignment(kv: &[(String, Value)]) -> Result<u32, ManifestError> {
    match find(kv, gguf::ALIGNMENT_KEY) {
        None => Ok(ALIGNMENT_DEFAULT),
        Some(Value::U32(alignment)) => Ok(*alignment),
        Some(other) => Err(wrong(format!(
            "{} is {}, not u32",
            gguf::ALIGNMENT_KEY,
            other.kind()
        ))),
    }
}

/// Settings as a GGUF without tensors: its reader trusts nothing.
fn kv_bytes(kv: Vec<(String, Value)>) -> Result<Vec<u8>, ManifestError> {
    let header = Header::new(alignment(&kv)?, kv, Vec::new())?;
    let mut bytes = Vec::new();
    header.write(&mut bytes)?;
    Ok(bytes)
}

fn read_kv(bytes: &[u8]) -> Result<Vec<(String, Value)>, ManifestError> {
    let header = Header::read(&mut std::io::Cursor::new(bytes), bytes.len() as u64)?;
    if header.tensors.is_empty() {
        return Ok(header.kv);
    }
    Err(wrong("its settings come with tensors"))
}

fn is_large(key: &str, value: &Value) -> bool {
    let max = if key.starts_with("tokenizer.") {
        TOKENIZER_VALUE_INLINE_MAX
    } else {
        VALUE_INLINE_MAX
    };
    let bytes = match value {
        Value::Str(text) => text.0.len(),
        Value::Array(gguf::Array::Str(texts)) => texts.iter().map(|text| 8 + text.0.len()).sum(),
        Value::Array(array) => array.len().saturating_mul(4),
        _ => 8,
    };
    bytes > max
}
