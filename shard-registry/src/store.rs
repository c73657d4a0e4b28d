//! The store: what this machine knows of models. Imported weights stay where they are; fetched shards lie in
//! `blobs` and `partial` (see there).
//!
//! ```text
//! models/<id>/manifest      canonical encoding; its hash is <id>
//! models/<id>/metadata      the metadata shard
//! models/<id>/sources.json  which file and offset holds each tensor (absent: it was not imported here)
//! models/<id>/signatures/   publishers' words on it, one file each (`signatures.rs`)
//! aliases/<name>            an id; with `pinned` in a second line it is not moved (`pins.rs`)
//! tmp/                      files being written
//! ```
//!
//! Every file is written under `tmp`, synced and renamed into place: a reader sees the old one or
//! the new one, whoever is killed when, however many processes write. What is torn all the same
//! (a bad disk, a full one) is reported and skipped.

use std::{
    fmt, fs, io,
    io::Write,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use swarm_proto::{ModelId, ModelSignatureError, ShardId};

use crate::{
    blobs::{BLOBS, PARTIAL, remedy},
    files::FileMark,
    manifest::{MANIFEST_BYTES_MAX, Manifest, ManifestError},
    reader::{ReadError, ShardReader},
};

/// Longest alias.
const ALIAS_LEN_MAX: usize = 64;
/// Largest `sources.json`: some 60 bytes for each tensor.
const SOURCES_BYTES_MAX: u64 = 32 << 20;
/// A temporary file older than this was left by a process that died.
const STALE_AFTER: Duration = Duration::from_secs(3600);

/// The store in one folder. Cheap to clone; any number of processes may use one folder.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

/// A model in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its id.
    pub id: ModelId,
    /// Aliases that point at it, sorted.
    pub aliases: Vec<AliasName>,
    /// Whether its weights were imported here, and from which files.
    pub files: Vec<PathBuf>,
}

/// Something in the store that cannot be used; it was skipped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {why}; it is skipped, remove it or import the model again")]
pub struct Problem {
    /// The file or folder.
    pub path: PathBuf,
    /// What is wrong.
    pub why: String,
}

/// What a text from the user names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolved {
    /// A model in the store.
    Model(ModelId),
    /// A file, not imported yet as far as its name goes.
    File(PathBuf),
}

/// Why a text names no model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnknownModel {
    /// Nothing of that name.
    #[error("{text:?} is neither a model known here nor a file; {}", known_list(.known))]
    Unknown {
        /// What was given.
        text: String,
        /// What could have been.
        known: Vec<String>,
    },
    /// Several ids begin like this.
    #[error("{text:?} could be any of {}; write more of it", .ids.join(", "))]
    Ambiguous {
        /// What was given.
        text: String,
        /// The ids.
        ids: Vec<String>,
    },
}

impl UnknownModel {
    /// That `text` could be any of these.
    pub fn ambiguous(text: &str, ids: &[ModelId]) -> UnknownModel {
        UnknownModel::Ambiguous {
            text: text.into(),
            ids: ids.iter().map(ToString::to_string).collect(),
        }
    }
}

fn known_list(known: &[String]) -> String {
    match known {
        [] => "none is known: shoal import FILE.gguf".into(),
        _ => format!("known are {}", known.join(", ")),
    }
}

/// Why the store could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The system refused.
    #[error("model store: {path}: {source}{}", remedy(.source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A model that is not there.
    #[error("model {id} is not in the store")]
    Missing {
        /// Its id.
        id: ModelId,
    },
    /// A file that is not what it should be.
    #[error("{0}")]
    Torn(#[from] Problem),
    /// Bytes given for the store are no manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A name that was pinned to another model.
    #[error("`{alias}` is pinned to model {}, it cannot become the name of {}", .pinned.short(), .other.short())]
    Pinned {
        /// The name.
        alias: AliasName,
        /// What it stands for.
        pinned: ModelId,
        /// What it was to stand for.
        other: ModelId,
    },
    /// A publisher's signature that is none.
    #[error(transparent)]
    Signature(#[from] ModelSignatureError),
    /// A name that cannot be an alias.
    #[error(
        "{text:?} cannot be an alias: 1 to {ALIAS_LEN_MAX} of letters, digits, '.', '-' and '_', not first a '.' or '-'"
    )]
    Alias {
        /// What was given, shortened.
        text: String,
    },
}

/// A local name of a model.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AliasName(String);

impl AliasName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What the model in this file is called when nobody says otherwise.
    pub fn for_file(path: &Path) -> AliasName {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        // One name for a model in several files.
        let stem = match stem.rsplit_once("-of-") {
            Some((rest, _)) => rest.rsplit_once('-').map_or(rest, |(stem, _)| stem),
            None => &stem,
        };
        let plain = stem.chars().map(|c| if is_alias_char(c) { c } else { '-' });
        let name: String = plain.take(ALIAS_LEN_MAX).collect();
        let name = name.trim_start_matches(['.', '-']);
        AliasName(if name.is_empty() {
            "model".into()
        } else {
            name.into()
        })
    }
}

impl fmt::Display for AliasName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for AliasName {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        let fits = (1..=ALIAS_LEN_MAX).contains(&text.len());
        let plain = text.chars().all(is_alias_char) && !text.starts_with(['.', '-']);
        if fits && plain {
            return Ok(Self(text.into()));
        }
        let text = text.chars().take(80).collect();
        Err(StoreError::Alias { text })
    }
}

fn is_alias_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')
}

/// Where the bytes of a model are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sources {
    pub(crate) version: u32,
    pub(crate) files: Vec<FileMark>,
    /// In the manifest's order.
    pub(crate) tensors: Vec<TensorSource>,
}

/// Where one tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TensorSource {
    /// Index of the file.
    pub(crate) file: u32,
    /// From the start of the file.
    pub(crate) offset: u64,
}

impl Store {
    /// Opens the store in `dir`, made if it is not there.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn open(dir: &Path) -> Result<Store, StoreError> {
        let store = Store {
            dir: dir.to_owned(),
        };
        let folders = ["models", "aliases", "tmp"].into_iter();
        for folder in folders.chain([BLOBS, PARTIAL]) {
            let path = dir.join(folder);
            fs::create_dir_all(&path).map_err(|source| StoreError::Io { path, source })?;
        }
        store.sweep();
        Ok(store)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All models that can be used, sorted by id, and what could not be read.
    pub fn models(&self) -> (Vec<Stored>, Vec<Problem>) {
        let (aliases, mut problems) = self.aliases();
        let mut models = Vec::new();
        for path in entries(&self.dir.join("models"), &mut problems) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let Ok(id) = name.parse::<ModelId>() else {
                problems.push(problem(&path, "its name is no model id"));
                continue;
            };
            match self.manifest(id) {
                Ok(_) => {}
                Err(StoreError::Torn(problem)) => {
                    problems.push(problem);
                    continue;
                }
                Err(e) => {
                    problems.push(problem(&path, e.to_string()));
                    continue;
                }
            }
            let files = match self.sources(id) {
                Ok(sources) => sources.map_or(Vec::new(), |sources| sources.files),
                Err(e) => {
                    problems.push(e);
                    Vec::new()
                }
            };
            let mine = aliases.iter().filter(|(_, to)| *to == id);
            models.push(Stored {
                id,
                aliases: mine.map(|(alias, _)| alias.clone()).collect(),
                files: files.into_iter().map(|file| file.path).collect(),
            });
        }
        models.sort_unstable_by_key(|model| model.id);
        (models, problems)
    }

    /// All aliases, sorted, and what could not be read.
    pub fn aliases(&self) -> (Vec<(AliasName, ModelId)>, Vec<Problem>) {
        let (mut aliases, mut problems) = (Vec::new(), Vec::new());
        for path in entries(&self.dir.join("aliases"), &mut problems) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let Ok(alias) = name.parse::<AliasName>() else {
                problems.push(problem(&path, "its name is no alias"));
                continue;
            };
            match self.alias(&alias) {
                Some(id) => aliases.push((alias, id)),
                None => problems.push(problem(&path, "it holds no model id")),
            }
        }
        aliases.sort_unstable();
        (aliases, problems)
    }

    /// The model that an alias points at.
    pub fn alias(&self, alias: &AliasName) -> Option<ModelId> {
        self.alias_lines(alias)?.lines().next()?.trim().parse().ok()
    }

    /// Points an alias at a model.
    ///
    /// # Errors
    /// It is pinned to another; the store cannot be written.
    pub fn set_alias(&self, alias: &AliasName, id: ModelId) -> Result<(), StoreError> {
        self.check_pin(alias, id)?;
        if self.pinned(alias) == Some(id) {
            return Ok(());
        }
        self.write_alias(alias, &format!("{id}\n"))
    }

    pub(crate) fn alias_lines(&self, alias: &AliasName) -> Option<String> {
        let text = read_limited(&self.dir.join("aliases").join(&alias.0), 256).ok()?;
        String::from_utf8(text).ok()
    }

    pub(crate) fn write_alias(&self, alias: &AliasName, text: &str) -> Result<(), StoreError> {
        self.write(&self.dir.join("aliases").join(&alias.0), text.as_bytes())
    }

    /// What a text names: an alias, an id or the beginning of one (six digits and more), a file.
    ///
    /// # Errors
    /// Nothing, or more than one thing; says what could have been meant.
    pub fn resolve(&self, text: &str) -> Result<Resolved, UnknownModel> {
        let alias = text.parse().ok().and_then(|alias| self.alias(&alias));
        if let Some(id) = alias {
            return Ok(Resolved::Model(id));
        }
        let (models, _) = self.models();
        let ids = models.iter().map(|model| model.id);
        let found: Vec<_> = ids.filter(|id| id.begins_with(text)).collect();
        match found[..] {
            [] => {}
            [id] => return Ok(Resolved::Model(id)),
            _ => return Err(UnknownModel::ambiguous(text, &found)),
        }
        if Path::new(text).is_file() {
            return Ok(Resolved::File(text.into()));
        }
        let names = models.into_iter().map(|model| match model.aliases.first() {
            Some(alias) => alias.to_string(),
            None => model.id.short(),
        });
        Err(UnknownModel::Unknown {
            text: text.into(),
            known: names.collect(),
        })
    }

    /// A model's manifest.
    ///
    /// # Errors
    /// It is not there, or torn.
    pub fn manifest(&self, id: ModelId) -> Result<Manifest, StoreError> {
        let bytes = self.manifest_bytes(id)?;
        let torn = |e: ManifestError| problem(&self.path(id, "manifest"), e.to_string());
        Ok(Manifest::decode(&bytes).map_err(torn)?)
    }

    /// A model's manifest as it travels; its hash is right.
    ///
    /// # Errors
    /// It is not there, or torn.
    pub fn manifest_bytes(&self, id: ModelId) -> Result<Vec<u8>, StoreError> {
        let path = self.path(id, "manifest");
        let bytes = self.read(id, &path, MANIFEST_BYTES_MAX as u64)?;
        if Manifest::id_of(&bytes) != id {
            return Err(problem(&path, "its hash is not the model's id").into());
        }
        Ok(bytes)
    }

    /// A model's metadata shard; its hash is right.
    ///
    /// # Errors
    /// It is not there, or torn.
    pub fn metadata(&self, id: ModelId) -> Result<Vec<u8>, StoreError> {
        let wanted = self.manifest(id)?.metadata().map(|shard| shard.id);
        let path = self.path(id, "metadata");
        let bytes = self.read(id, &path, gguf::METADATA_BYTES_MAX)?;
        if Some(ShardId::of(&bytes)) != wanted {
            return Err(problem(&path, "its hash is not the manifest's").into());
        }
        Ok(bytes)
    }

    /// The metadata shard of this id, if a model in the store has it.
    pub fn metadata_shard(&self, shard: ShardId) -> Option<Vec<u8>> {
        let (models, _) = self.models();
        models.into_iter().find_map(|model| {
            let manifest = self.manifest(model.id).ok()?;
            (manifest.metadata()?.id == shard).then(|| self.metadata(model.id).ok())?
        })
    }

    /// Keeps a manifest and its metadata that came from elsewhere; the weights stay there.
    ///
    /// # Errors
    /// The manifest is none, or the metadata is not its; the store cannot be written.
    pub fn put_fetched(&self, manifest: &[u8], metadata: &[u8]) -> Result<ModelId, StoreError> {
        Manifest::decode(manifest)?.vocab_header(metadata)?;
        let id = Manifest::id_of(manifest);
        self.put_model(id, manifest, metadata, None)?;
        Ok(id)
    }

    /// A reader of a model's weights, which were imported or fetched: each shard from where it is.
    ///
    /// # Errors
    /// The model is not there, all its weights are elsewhere, or its files cannot be opened.
    pub fn reader(&self, id: ModelId) -> Result<ShardReader, ReadError> {
        let manifest = self.manifest(id)?;
        let fetched = manifest.shards.iter().any(|shard| self.has_blob(shard));
        let sources = self.sources(id).map_err(StoreError::Torn)?;
        match sources {
            None if !fetched => Err(ReadError::Elsewhere { id }),
            // Files that are gone are no loss where their shards were fetched.
            Some(_) if fetched && !self.in_place(id) => {
                ShardReader::open(self.clone(), id, manifest, None)
            }
            sources => ShardReader::open(self.clone(), id, manifest, sources),
        }
    }

    pub(crate) fn put_model(
        &self,
        id: ModelId,
        manifest: &[u8],
        metadata: &[u8],
        sources: Option<&Sources>,
    ) -> Result<(), StoreError> {
        let folder = self.dir.join("models").join(id.to_string());
        fs::create_dir_all(&folder).map_err(|source| StoreError::Io {
            path: folder.clone(),
            source,
        })?;
        self.write(&folder.join("metadata"), metadata)?;
        if let Some(sources) = sources {
            let path = folder.join("sources.json");
            let json = serde_json::to_vec(sources).map_err(|e| StoreError::Io {
                path: path.clone(),
                source: e.into(),
            })?;
            self.write(&path, &json)?;
        }
        // Last: a folder without a manifest is no model.
        self.write(&folder.join("manifest"), manifest)?;
        sync_folder(&self.dir.join("models"))
    }

    /// Where a model's bytes are; `None` when its weights were not imported here.
    pub(crate) fn sources(&self, id: ModelId) -> Result<Option<Sources>, Problem> {
        let path = self.path(id, "sources.json");
        let bytes = match read_limited(&path, SOURCES_BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(problem(&path, e.to_string())),
        };
        let sources: Sources =
            serde_json::from_slice(&bytes).map_err(|e| problem(&path, e.to_string()))?;
        let files = sources.files.len() as u64;
        if sources.version != 1 || sources.tensors.iter().any(|t| u64::from(t.file) >= files) {
            return Err(problem(&path, "it is of another version, or damaged"));
        }
        Ok(Some(sources))
    }

    pub(crate) fn path(&self, id: ModelId, file: &str) -> PathBuf {
        self.dir.join("models").join(id.to_string()).join(file)
    }

    fn read(&self, id: ModelId, path: &Path, max: u64) -> Result<Vec<u8>, StoreError> {
        read_limited(path, max).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => StoreError::Missing { id },
            _ => StoreError::Io {
                path: path.to_owned(),
                source,
            },
        })
    }

    pub(crate) fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        let put = || -> io::Result<()> {
            let mut temp = tempfile::NamedTempFile::new_in(self.dir.join("tmp"))?;
            temp.write_all(bytes)?;
            temp.as_file().sync_all()?;
            temp.persist(path)?;
            Ok(())
        };
        put().map_err(|source| StoreError::Io {
            path: path.to_owned(),
            source,
        })?;
        path.parent().map_or(Ok(()), sync_folder)
    }

    /// Removes what dead processes left. Nothing depends on it.
    fn sweep(&self) {
        for path in entries(&self.dir.join("tmp"), &mut Vec::new()) {
            let age = fs::metadata(&path)
                .and_then(|metadata| metadata.modified())
                .map(|time| time.elapsed().unwrap_or_default());
            if age.is_ok_and(|age| age > STALE_AFTER) {
                let _ = fs::remove_file(&path);
            }
        }
    }
}

pub(crate) fn problem(path: &Path, why: impl Into<String>) -> Problem {
    Problem {
        path: path.to_owned(),
        why: why.into(),
    }
}

pub(crate) fn entries(folder: &Path, problems: &mut Vec<Problem>) -> Vec<PathBuf> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(e) => {
            problems.push(problem(folder, e.to_string()));
            Vec::new()
        }
    }
}

pub(crate) fn read_limited(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    use io::Read;
    let file = fs::File::open(path)?;
    let len = file.metadata()?.len();
    if len > max {
        let why = format!("{len} bytes, the limit is {max}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
    file.take(max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A rename is on disk once its folder is.
fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    fs::File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|source| StoreError::Io {
            path: folder.to_owned(),
            source,
        })
}
