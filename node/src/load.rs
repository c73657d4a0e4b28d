//! From a model's name and a memory budget to a loaded stage: which model, which layers, verified
//! bytes into the engine. Runs on a blocking thread. Which window it is says `shard_registry::placement`.

use std::{io, ops::Range, path::Path, sync::Arc};

use engine::{
    Blueprint, ExpertHolders, ExpertLayout, LlamaStage, LoadOptions, Loaded, TensorSource,
    UnsupportedModel,
};
use shard_registry::{
    ImportError, Manifest, ManifestError, ReadError, Resolved, ShardReader, Store, StoreError,
    UnknownModel,
    placement::{self, Facts},
};
use swarm_proto::ModelId;

use crate::{
    demo::{self, DemoError},
    hosting::Hold,
};

/// The share of the budget that layers may fill, in percent. The rest is for KV; the embedding and
/// the head come out of it too, at the ends of the model.
const LAYER_SHARE: u64 = 75;
/// KV gets at least this share of the budget, however large the embedding is, in percent.
const KV_SHARE_MIN: u64 = 12;

/// A model found on this machine.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its id.
    pub id: ModelId,
    /// What people call it: a hint.
    pub name: String,
    /// What it is made of.
    pub manifest: Arc<Manifest>,
    /// How it is cut.
    pub blueprint: Blueprint,
    /// What its experts are made of, where it is a mixture.
    pub experts: Option<Arc<ExpertLayout>>,
}

impl Found {
    /// What placement needs to know of it; `layer_bytes` are those of [`layer_bytes`].
    pub fn facts<'a>(&self, layer_bytes: &'a [u64]) -> Facts<'a> {
        Facts {
            model: self.id,
            layer_bytes,
            // As exact as it is computed.
            frame_bytes: u64::from(self.manifest.n_embd) * size_of::<f32>() as u64,
        }
    }
}

/// Why a stage was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// No such model here.
    #[error(transparent)]
    Unknown(#[from] UnknownModel),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file could not be imported.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// The demo.
    #[error(transparent)]
    Demo(#[from] DemoError),
    /// The weights are elsewhere, or changed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The manifest does not come together.
    #[error("model {id}: {source}")]
    Manifest {
        /// Which.
        id: ModelId,
        /// Why.
        source: ManifestError,
    },
    /// The engine cannot cut it.
    #[error("model {id}: {source}")]
    Unsupported {
        /// Which.
        id: ModelId,
        /// Why.
        source: UnsupportedModel,
    },
    /// The layers asked for do not exist.
    #[error("layers {}..{} asked for, the model has 0..{n_layer}", asked.start, asked.end)]
    Layers {
        /// What was asked for.
        asked: Range<u32>,
        /// What there is.
        n_layer: u32,
    },
    /// Not one layer fits.
    #[error(
        "a memory budget of {given} is too small for even one layer: the smallest needs {needed}; raise --memory"
    )]
    Memory {
        /// The budget, in bytes.
        given: Bytes,
        /// What would do.
        needed: Bytes,
    },
    /// The layers asked for leave no room for a session.
    #[error(
        "a memory budget of {given} is too small for layers {}..{} and one session: they need {needed}; raise --memory or give fewer --layers",
        asked.start, asked.end
    )]
    LayersMemory {
        /// What was asked for.
        asked: Range<u32>,
        /// The budget, in bytes.
        given: Bytes,
        /// What would do.
        needed: Bytes,
    },
    /// Trunks or experts of a model that has none to tell apart.
    #[error(
        "{name} is no mixture of experts, so there are no {hold} of it to hold: leave --hold out"
    )]
    NoMixture {
        /// The model.
        name: String,
        /// What was asked for.
        hold: Hold,
    },
    /// Not one expert fits.
    #[error(
        "a memory budget of {given} is too small for even one expert, which needs {needed}; raise --memory"
    )]
    ExpertMemory {
        /// The budget, in bytes.
        given: Bytes,
        /// What would do.
        needed: Bytes,
    },
    /// An expert cannot be computed with.
    #[error(transparent)]
    Experts(engine::ExpertError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] engine::LoadError),
}

/// Bytes, displayed as people write them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            n if n < 1 << 20 => write!(f, "{} KiB", n.div_ceil(1 << 10)),
            n if n < 10 << 30 => write!(f, "{} MiB", n.div_ceil(1 << 20)),
            n => write!(f, "{} GiB", n.div_ceil(1 << 30)),
        }
    }
}

/// Finds a model by alias, id, file or `demo`; files are imported in place. Blocks.
///
/// # Errors
/// See [`LoadError`]; an unknown name lists those that are known.
pub fn find(store: &Store, home: &Path, text: &str) -> Result<Found, LoadError> {
    let resolved = match (demo::meant(home, store, text), store.resolve(text)) {
        (Some(demo), _) => Ok(Resolved::Model(demo.ensure(home, store)?)),
        (None, Err(UnknownModel::Unknown { text, mut known })) => {
            for demo in demo::names() {
                known.extend((!known.iter().any(|k| k == demo)).then(|| demo.to_owned()));
            }
            Err(UnknownModel::Unknown { text, known })
        }
        (None, other) => other,
    };
    let id = match resolved? {
        Resolved::Model(id) => id,
        Resolved::File(path) => match store.find_file(&path) {
            Some(id) => id,
            None => {
                tracing::info!(path = %path.display(), "importing: reading and hashing the file, in place");
                store.import(&path, None, &mut |_| {})?.id
            }
        },
    };
    described(store, id)
}

/// A model whose manifest and metadata are in the store. Blocks.
///
/// # Errors
/// They are not, or the engine cannot cut it.
pub fn described(store: &Store, id: ModelId) -> Result<Found, LoadError> {
    let manifest = store.manifest(id)?;
    let header = manifest
        .header()
        .map_err(|source| LoadError::Manifest { id, source })?;
    let blueprint =
        Blueprint::new(&header).map_err(|source| LoadError::Unsupported { id, source })?;
    let name = display_name(store, id, &manifest);
    let experts = match manifest.n_expert {
        0 => None,
        _ => match ExpertLayout::new(&header) {
            Ok(layout) => Some(Arc::new(layout)),
            Err(why) => {
                tracing::info!(model = %name, why, "its experts stay with their layers");
                None
            }
        },
    };
    Ok(Found {
        id,
        name,
        manifest: Arc::new(manifest),
        blueprint,
        experts,
    })
}

fn display_name(store: &Store, id: ModelId, manifest: &Manifest) -> String {
    let (aliases, _) = store.aliases();
    let alias = aliases
        .into_iter()
        .find(|(_, to)| *to == id)
        .map(|(alias, _)| alias.to_string());
    let mut name = alias.unwrap_or_else(|| manifest.name.clone());
    while name.len() > swarm_proto::advert::NAME_BYTES_MAX {
        name.pop();
    }
    name
}

/// What a window of layers costs and leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The layers.
    pub layers: Range<u32>,
    /// Bytes of KV that sessions may take.
    pub kv_bytes_max: u64,
}

/// The plan for layers that were asked for by name; the budget then only sizes the KV.
///
/// # Errors
/// The model does not have them.
pub fn plan_fixed(
    blueprint: &Blueprint,
    layers: Range<u32>,
    memory: u64,
) -> Result<Plan, LoadError> {
    let n_layer = blueprint.n_layer();
    if layers.start >= layers.end || layers.end > n_layer {
        return Err(LoadError::Layers {
            asked: layers,
            n_layer,
        });
    }
    let plan = plan(blueprint, layers, memory);
    if longest_context(blueprint, &plan) == 0 {
        let tensors = tensor_bytes(blueprint, &plan.layers);
        let kv = blueprint.session_bytes(&plan.layers, 1);
        return Err(LoadError::LayersMemory {
            asked: plan.layers,
            given: Bytes(memory),
            needed: Bytes(tensors.saturating_add(kv)),
        });
    }
    Ok(plan)
}

/// The longest context that one session over all layers of a plan has KV for; 0 where it has none.
/// More would be promised to clients and then refused.
fn longest_context(blueprint: &Blueprint, plan: &Plan) -> u32 {
    let fits = |n_ctx: &u32| blueprint.session_bytes(&plan.layers, *n_ctx) <= plan.kv_bytes_max;
    let whole = blueprint.n_ctx_train();
    let shorter = (0..u32::BITS).rev().map(|bit| 1 << bit);
    std::iter::once(whole)
        .chain(shorter.filter(|n_ctx| *n_ctx < whole))
        .find(fits)
        .unwrap_or(0)
}

/// Bytes of the tensors of these layers, with the embedding and the head where they belong to them.
pub(crate) fn tensor_bytes(blueprint: &Blueprint, layers: &Range<u32>) -> u64 {
    let ends = [
        (layers.start == 0).then(|| blueprint.embedding_bytes()),
        (layers.end == blueprint.n_layer()).then(|| blueprint.head_bytes()),
    ];
    let layer_bytes = layers.clone().map(|i| blueprint.layer_bytes(i));
    layer_bytes
        .chain(ends.into_iter().flatten())
        .fold(0, u64::saturating_add)
}

/// The bytes of each layer.
pub fn layer_bytes(blueprint: &Blueprint) -> Vec<u64> {
    let layers = 0..blueprint.n_layer();
    layers.map(|i| blueprint.layer_bytes(i)).collect()
}

/// Bytes of a memory budget that layers may take.
pub fn layer_budget(memory: u64) -> u64 {
    share(memory, LAYER_SHARE)
}

/// The memory of each of several models that share a budget: by their size.
pub fn shares(memory: u64, models: &[&Blueprint]) -> Vec<u64> {
    let bytes = |blueprint: &&Blueprint| tensor_bytes(blueprint, &(0..blueprint.n_layer())).max(1);
    let sizes: Vec<u64> = models.iter().map(bytes).collect();
    let all: u128 = sizes.iter().copied().map(u128::from).sum();
    let share = |size: u64| u128::from(memory) * u128::from(size) / all.max(1);
    let shares = sizes.into_iter().map(share);
    shares
        .map(|share| u64::try_from(share).unwrap_or(memory))
        .collect()
}

/// The windows worth choosing between, see [`placement::windows`].
///
/// # Errors
/// Not one layer fits.
pub fn windows(layer_bytes: &[u64], memory: u64) -> Result<Vec<Range<u16>>, LoadError> {
    let windows = placement::windows(layer_bytes, layer_budget(memory));
    if windows.is_empty() {
        let smallest = layer_bytes.iter().copied().min().unwrap_or(0);
        let needed = smallest.saturating_mul(100).div_ceil(LAYER_SHARE);
        return Err(LoadError::Memory {
            given: Bytes(memory),
            needed: Bytes(needed),
        });
    }
    Ok(windows)
}

/// A window with the KV that it leaves room for.
pub fn plan(blueprint: &Blueprint, layers: Range<u32>, memory: u64) -> Plan {
    let kv_bytes_max = memory
        .saturating_sub(tensor_bytes(blueprint, &layers))
        .max(share(memory, KV_SHARE_MIN));
    Plan {
        layers,
        kv_bytes_max,
    }
}

fn share(bytes: u64, percent: u64) -> u64 {
    bytes / 100 * percent
}

/// A stage for a plan's layers that holds none of them yet.
///
/// # Errors
/// The system has no threads left.
pub fn stage(found: &Found, plan: &Plan, n_threads: u32) -> Result<LlamaStage, LoadError> {
    let options = LoadOptions {
        n_threads,
        n_ctx_max: Some(longest_context(&found.blueprint, plan)),
        kv_bytes_max: plan.kv_bytes_max,
    };
    Ok(LlamaStage::new(&found.blueprint, &options)?)
}

/// Verifies and loads spans of layers, without their `experts` where others compute them, calling `progress` after each
/// layer. Blocks for as long as reading and hashing
/// them takes.
///
/// # Errors
/// The files changed, or the engine refuses.
pub fn read(
    store: &Store,
    found: &Found,
    spans: &[Range<u32>],
    experts: Option<&Arc<dyn ExpertHolders>>,
    progress: &mut dyn FnMut(u32),
) -> Result<Loaded, LoadError> {
    let source = Verified(store.reader(found.id)?);
    let blueprint = &found.blueprint;
    let loaded = match experts {
        None => Loaded::read(blueprint, spans, &source, progress),
        Some(holders) => Loaded::read_trunk(blueprint, spans, &source, holders, progress),
    };
    let loaded = loaded.map_err(of_reader)?;
    source.0.release();
    Ok(loaded)
}

/// What the reader said, where that was it.
fn of_reader(error: engine::LoadError) -> LoadError {
    match error {
        engine::LoadError::Tensor { name, source } => match source.downcast::<ReadError>() {
            Ok(error) => error.into(),
            Err(source) => engine::LoadError::Tensor { name, source }.into(),
        },
        other => other.into(),
    }
}

/// Tensors of an imported model for the engine, each given only where its shard's hash was right.
pub struct Verified(pub ShardReader);

impl TensorSource for Verified {
    fn read(&self, name: &str, out: &mut Vec<u8>) -> io::Result<()> {
        self.0.read_tensor(name, out).map_err(io::Error::other)
    }
}

/// Compute threads for these layers when nobody says.
pub fn default_threads(blueprint: &Blueprint, layers: &Range<u32>) -> u32 {
    engine::threads_for(tensor_bytes(blueprint, layers))
}

/// Half of the memory that is free now, for nodes that are given no budget.
pub fn default_memory() -> u64 {
    const FALLBACK: u64 = 4 << 30;
    available_memory().unwrap_or(FALLBACK) / 2
}

#[cfg(target_os = "linux")]
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

#[cfg(target_os = "macos")]
fn available_memory() -> Option<u64> {
    let asked = std::process::Command::new("/usr/bin/vm_stat")
        .output()
        .ok()?;
    vm_stat_available(std::str::from_utf8(&asked.stdout).ok()?)
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
fn available_memory() -> Option<u64> {
    None
}

/// Bytes that macOS gives without writing anything out: pages that are free, read ahead on a guess, or
/// not used for a while.
#[cfg(any(target_os = "macos", test))]
fn vm_stat_available(text: &str) -> Option<u64> {
    let (head, pages) = text.split_once('\n')?;
    let page: u64 = head
        .split_once("page size of ")?
        .1
        .split(' ')
        .next()?
        .parse()
        .ok()?;
    let count = |name: &str| {
        let line = pages.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches('.').parse::<u64>().ok()
    };
    let free = count("Pages free:")? + count("Pages speculative:")?;
    free.checked_add(count("Pages inactive:")?)?
        .checked_mul(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(Bytes(1).to_string(), "1 KiB");
        assert_eq!(Bytes(5 << 20).to_string(), "5 MiB");
        assert_eq!(Bytes(20 << 30).to_string(), "20 GiB");
    }

    #[test]
    fn the_free_memory_of_a_mac_is_read_from_vm_stat() {
        let text = "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n\
            Pages free:                                5000.\n\
            Pages active:                            300000.\n\
            Pages inactive:                          290000.\n\
            Pages speculative:                         5000.\n\
            Pages throttled:                              0.\n\
            Pages wired down:                        150000.\n";
        assert_eq!(vm_stat_available(text), Some(300_000 * 16384));
        assert_eq!(vm_stat_available("something else\n"), None);
    }

    #[test]
    fn planners_reckon_with_the_contexts_that_the_engine_makes() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(&home.path().join("store")).unwrap();
        let demo = find(&store, home.path(), demo::NAME).unwrap();
        for n_ctx in [1, 255, 256, 257, 600, 1024, 4097] {
            let made = u64::from(demo.blueprint.context_class(n_ctx));
            assert_eq!(swarm_proto::advert::session_positions(n_ctx), made);
        }
    }
}
