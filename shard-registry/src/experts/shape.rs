//! What the planner needs to know of a mixture: how many bytes are read for one row, and by whom.

use std::collections::BTreeMap;

use swarm_proto::LayerRange;

use crate::{
    layout::ShardKind,
    manifest::{EXPERTS_MAX, Manifest, ManifestError},
};

/// Bytes of one number of a row on the way to a holder and back.
const NUMBER_BYTES: u64 = 4;

/// A mixture as far as time and memory are concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MixtureShape {
    /// Numbers in a row.
    pub n_embd: u32,
    /// Experts of a layer that has any.
    pub n_expert: u16,
    /// Of these, how many a row is computed with.
    pub n_expert_used: u16,
    /// Bytes of what comes after the last layer.
    pub head_bytes: u64,
    /// Each layer, from the first on.
    pub layers: Vec<LayerShape>,
}

/// One layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerShape {
    /// What every row is computed with: attention, router, shared experts; of a dense layer all.
    pub trunk_bytes: u64,
    /// One expert; 0 for a dense layer.
    pub expert_bytes: u64,
}

/// Rows that each expert of a layer was picked for, by layer; of layers that are missing all alike.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExpertUse(pub BTreeMap<u16, Vec<u64>>);

impl MixtureShape {
    /// The shape of a model; none for a dense one, or one that does not say how many experts a row takes.
    pub fn of(manifest: &Manifest) -> Option<MixtureShape> {
        let key = format!("{}.expert_used_count", manifest.arch);
        let used = manifest.kv.iter().find(|(name, _)| *name == key)?;
        let used = used.1.as_u64().filter(|used| *used <= EXPERTS_MAX)?;
        let mut shape = MixtureShape {
            n_embd: manifest.n_embd,
            n_expert: manifest.n_expert,
            n_expert_used: u16::try_from(used).ok()?.min(manifest.n_expert),
            head_bytes: 0,
            layers: vec![LayerShape::default(); manifest.n_layer.into()],
        };
        for shard in &manifest.shards {
            match shard.kind {
                ShardKind::Head => shape.head_bytes = shard.bytes,
                ShardKind::Layer(layer) => {
                    shape.layers.get_mut(usize::from(layer))?.trunk_bytes = shard.bytes;
                }
                ShardKind::Expert { layer, .. } => {
                    shape.layers.get_mut(usize::from(layer))?.expert_bytes = shard.bytes;
                }
                _ => {}
            }
        }
        let mixture = shape.n_expert_used > 0 && shape.layers.iter().any(LayerShape::has_experts);
        mixture.then_some(shape)
    }

    /// The same from the header of a whole file.
    ///
    /// # Errors
    /// A header that makes no manifest.
    pub fn of_header(header: &gguf::Header) -> Result<Option<MixtureShape>, ManifestError> {
        let (manifest, _) = Manifest::unhashed(header.kv.clone(), header.tensors.clone())?;
        Ok(Self::of(&manifest))
    }

    /// All layers.
    pub fn span(&self) -> LayerRange {
        LayerRange {
            start: 0,
            end: u16::try_from(self.layers.len()).unwrap_or(u16::MAX),
        }
    }

    /// The layers of a span with their numbers.
    pub(super) fn within(&self, span: LayerRange) -> impl Iterator<Item = (u16, &LayerShape)> {
        let layers = (0u16..).zip(&self.layers);
        layers.filter(move |(layer, _)| span.contains(*layer))
    }

    /// Whether a span ends with the head.
    pub(super) fn head_of(&self, span: LayerRange) -> u64 {
        match usize::from(span.end) == self.layers.len() {
            true => self.head_bytes,
            false => 0,
        }
    }

    /// Bytes that a machine reads for one row of a layer that it computes whole.
    pub fn read_bytes(&self, layer: &LayerShape) -> u64 {
        layer.trunk_bytes + layer.expert_bytes * u64::from(self.n_expert_used)
    }

    /// Bytes of a layer with all its experts.
    pub fn layer_bytes(&self, layer: &LayerShape) -> u64 {
        layer.trunk_bytes + self.experts_bytes(layer)
    }

    /// Bytes of a layer's experts.
    pub fn experts_bytes(&self, layer: &LayerShape) -> u64 {
        layer.expert_bytes * u64::from(self.n_expert)
    }

    /// Bytes of a span, with the head where it ends with it.
    pub fn span_bytes(&self, span: LayerRange) -> u64 {
        let layers = self.within(span).map(|(_, layer)| self.layer_bytes(layer));
        layers.sum::<u64>() + self.head_of(span)
    }

    /// Bytes that a machine reads for one row of a span that it computes whole.
    pub fn span_read_bytes(&self, span: LayerRange) -> u64 {
        let layers = self.within(span).map(|(_, layer)| self.read_bytes(layer));
        layers.sum::<u64>() + self.head_of(span)
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> u64 {
        u64::from(self.n_embd) * NUMBER_BYTES
    }
}

impl LayerShape {
    /// Whether rows are sent to experts.
    pub fn has_experts(&self) -> bool {
        self.expert_bytes > 0
    }
}

impl ExpertUse {
    /// How many picks of a row an expert of a layer gets, on average.
    pub fn share(&self, shape: &MixtureShape, layer: u16, expert: u16) -> f64 {
        let used = f64::from(shape.n_expert_used);
        let even = used / f64::from(shape.n_expert.max(1));
        let Some(rows) = self.0.get(&layer) else {
            return even;
        };
        let sum: f64 = rows.iter().map(|rows| *rows as f64).sum();
        match rows.get(usize::from(expert)) {
            Some(rows) if sum > 0.0 => (*rows as f64 / sum * used).min(1.0),
            _ => even,
        }
    }
}
