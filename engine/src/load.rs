//! Tensors to llama.cpp models: a group of layers is written to a private file
//! and loaded from it.

use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::sync::Arc;

use crate::blueprint::{Blueprint, Fill, StageFile, UnsupportedModel};
use crate::embedding::Embedding;
use crate::experts::ExpertHolders;
use crate::llama::{self, ExpertDevice, FileModel, Model};
use crate::source::TensorSource;
use crate::stage::Held;

/// Why a stage was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Layers the model does not have.
    #[error("layers {}..{} asked for, the model has {n_layer}", asked.start, asked.end)]
    Layers {
        /// What was asked for.
        asked: Range<u32>,
        /// What there is.
        n_layer: u32,
    },
    /// A tensor could not be read.
    #[error("reading tensor `{name}`: {source}")]
    Tensor {
        /// Which.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// A tensor has another length than its shape says.
    #[error("tensor `{name}` has {len} bytes, its shape takes {expected}")]
    TensorLength {
        /// Which.
        name: String,
        /// Bytes read.
        len: u64,
        /// Bytes expected.
        expected: u64,
    },
    /// The private file a group is loaded from could not be written.
    #[error("writing the stage file of layers {}..{}: {source}", layers.start, layers.end)]
    StageFile {
        /// Which group.
        layers: Range<u32>,
        /// Why: usually no room in the temporary directory (`TMPDIR`).
        source: std::io::Error,
    },
    /// No threads to compute with.
    #[error("no compute threads: {0}")]
    Threads(String),
    /// The layer's header does not come together.
    #[error(transparent)]
    Model(#[from] UnsupportedModel),
    /// llama.cpp refused it.
    #[error("llama.cpp refused layers {}..{}, counted from 0 by it: {why}", layers.start, layers.end)]
    Backend {
        /// Which group.
        layers: Range<u32>,
        /// What it logged.
        why: String,
    },
}

/// Layers with their weights, verified and ready to join a stage: [`crate::Stage::add`]. Made on any thread
/// while the stage runs.
pub struct Loaded {
    pub(crate) layers: Held,
    pub(crate) weights: Weights,
}

/// What comes with layers.
pub(crate) enum Weights {
    /// Nothing: the hash chain has none.
    None,
    /// Models of the groups, with their layers, and the embedding where layer 0 is among them.
    Llama {
        embedding: Option<Embedding>,
        groups: Vec<(Range<u32>, Model)>,
    },
}

impl Loaded {
    /// Reads spans of layers and hands them to llama.cpp, calling `progress` after each layer. Each span is loaded
    /// in groups of its own, see [`Blueprint::groups`].
    ///
    /// # Errors
    /// Tensors that cannot be read or that llama.cpp refuses, and no room for
    /// a group of layers in the temporary directory.
    pub fn read(
        blueprint: &Blueprint,
        spans: &[Range<u32>],
        source: &dyn TensorSource,
        progress: &mut dyn FnMut(u32),
    ) -> Result<Loaded, LoadError> {
        let groups = spans.iter().flat_map(|span| blueprint.groups(span));
        Loaded::read_groups(blueprint, spans, groups.collect(), None, source, progress)
    }

    /// Reads groups, which together are the spans.
    pub(crate) fn read_groups(
        blueprint: &Blueprint,
        spans: &[Range<u32>],
        cut: Vec<Range<u32>>,
        holders: Option<&Arc<dyn ExpertHolders>>,
        source: &dyn TensorSource,
        progress: &mut dyn FnMut(u32),
    ) -> Result<Loaded, LoadError> {
        let n_layer = blueprint.n_layer();
        let wrong = |span: &&Range<u32>| span.start >= span.end || span.end > n_layer;
        if let Some(asked) = spans.iter().find(wrong).cloned() {
            return Err(LoadError::Layers { asked, n_layer });
        }
        llama::start();
        let embedding = match spans.iter().any(|span| span.start == 0) {
            true => Some(Embedding::load(blueprint, source)?),
            false => None,
        };
        let mut groups = Vec::new();
        for group in cut {
            let model = load_group(blueprint, &group, holders, source)?;
            group.clone().for_each(&mut *progress);
            groups.push((group, model));
        }
        llama::trim();
        let weights = Weights::Llama { embedding, groups };
        let layers = Held::of(spans.iter().cloned());
        Ok(Loaded { layers, weights })
    }

    /// Layers of the hash chain.
    pub fn of_chain(layers: Range<u32>) -> Loaded {
        Loaded {
            layers: Held::of([layers]),
            weights: Weights::None,
        }
    }

    /// Which layers.
    pub fn layers(&self) -> &Held {
        &self.layers
    }
}

/// Writes the group's file, unlinked from the start, and loads it.
fn load_group(
    blueprint: &Blueprint,
    group: &Range<u32>,
    holders: Option<&Arc<dyn ExpertHolders>>,
    source: &dyn TensorSource,
) -> Result<Model, LoadError> {
    let mut stage_file = blueprint.stage_file(group)?;
    let holders = holders.filter(|_| stage_file.without_experts());
    let layers = || group.clone();
    let broken = |source| LoadError::StageFile {
        layers: layers(),
        source,
    };
    let mut file = tempfile::tempfile().map_err(broken)?;
    write_stage_file(&stage_file, group, source, &mut file)?;
    file.seek(SeekFrom::Start(0)).map_err(broken)?;
    let model = match holders {
        Some(holders) => ExpertDevice::new(Arc::clone(holders), group.start)
            .and_then(|experts| FileModel::trunk(file, experts)),
        None => FileModel::from_file(file, false),
    };
    let model = model.map_err(|why| LoadError::Backend {
        layers: layers(),
        why,
    })?;
    // Where the weights lie is seen by running the model, which a trunk does not do before its holders are there.
    if holders.is_none() {
        llama::use_huge_pages(&model);
    }
    Ok(model)
}

fn write_stage_file(
    stage_file: &StageFile,
    group: &Range<u32>,
    source: &dyn TensorSource,
    file: &mut std::fs::File,
) -> Result<(), LoadError> {
    let broken = |source| LoadError::StageFile {
        layers: group.clone(),
        source,
    };
    let header = &stage_file.header;
    let mut bytes = Vec::new();
    {
        let mut writer = BufWriter::new(&mut *file);
        header.write(&mut writer).map_err(UnsupportedModel::from)?;
        writer.flush().map_err(broken)?;
    }
    let mut end = header.data_offset;
    for (tensor, fill) in header.tensors.iter().zip(&stage_file.fills) {
        let n_bytes = tensor.n_bytes().map_err(UnsupportedModel::from)?;
        match fill {
            Fill::Hole => bytes.clear(),
            Fill::Ones => {
                bytes.clear();
                (0..n_bytes / 4).for_each(|_| bytes.extend(1f32.to_le_bytes()));
            }
            Fill::Source(name) => read_tensor(source, name, n_bytes, &mut bytes)?,
        }
        file.seek(SeekFrom::Start(header.data_offset + tensor.offset))
            .map_err(broken)?;
        file.write_all(&bytes).map_err(broken)?;
        end = header.data_offset + tensor.offset + n_bytes;
    }
    file.set_len(end + header.padding(end)).map_err(broken)
}

/// Replaces `bytes` by a tensor's, which are as many as its shape says.
pub(crate) fn read_tensor(
    source: &dyn TensorSource,
    name: &str,
    expected: u64,
    bytes: &mut Vec<u8>,
) -> Result<(), LoadError> {
    source
        .read(name, bytes)
        .map_err(|source| LoadError::Tensor {
            name: name.into(),
            source,
        })?;
    let len = bytes.len() as u64;
    if len != expected {
        return Err(LoadError::TensorLength {
            name: name.into(),
            len,
            expected,
        });
    }
    Ok(())
}
