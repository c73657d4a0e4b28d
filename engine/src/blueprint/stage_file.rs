//! Which layers share a model, and what its file holds.

use std::collections::BTreeSet;
use std::ops::Range;

use gguf::{Array, Header, TensorInfo, TensorType, Value};

use super::{Blueprint, EMBEDDING, OUTPUT, UnsupportedModel};

/// Most layers of a group: a session that uses one of them takes KV for all.
const GROUP_LAYERS_MAX: u32 = 8;
const _: () = assert!(GROUP_LAYERS_MAX <= crate::llama::LAYERS_MAX);
/// Most bytes of a group's layers: its file lies in the temporary directory
/// while it is loaded.
const GROUP_BYTES_MAX: u64 = 512 << 20;

/// Where a tensor of a stage file comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    /// The model's tensor of this name.
    Source(String),
    /// f32 ones.
    Ones,
    /// Zero bytes: never read, a hole in the file.
    Hole,
}

/// A stage file: its header, and where each of its tensors comes from.
#[derive(Clone, Debug)]
pub(crate) struct StageFile {
    pub header: Header,
    pub fills: Vec<Fill>,
}

impl Blueprint {
    /// Cuts layers into those that are loaded as one model: a context takes
    /// megabytes of working buffers and a call 20 µs, whatever they compute. Only
    /// layers that have the same keys and no windows share a model. Without experts none do: what lies behind the layer
    /// that rows leave at would be asked of their holders, too.
    pub fn groups(&self, layers: &Range<u32>) -> Vec<Range<u32>> {
        let mut groups: Vec<Range<u32>> = Vec::new();
        for i in layers.clone() {
            match groups.last_mut() {
                Some(group) if self.joins(group, i) => group.end = i + 1,
                _ => groups.push(i..i + 1),
            }
        }
        groups
    }

    fn joins(&self, group: &Range<u32>, i: u32) -> bool {
        let bytes: u64 = (group.start..=i).map(|i| self.layer_bytes(i)).sum();
        let values = |i: u32| {
            let of = move |(_, array): &(_, Array)| array.get(i as usize);
            self.arrays.iter().map(of)
        };
        self.local.is_none()
            && !self.trunk
            && i - group.start < GROUP_LAYERS_MAX
            && bytes <= GROUP_BYTES_MAX
            && values(group.start).eq(values(i))
            && self.tensor_shapes(group.start) == self.tensor_shapes(i)
    }

    fn tensor_shapes(&self, i: u32) -> BTreeSet<(&str, &[u64])> {
        self.layer_tensors(i)
            .map(|(name, tensor)| (name, &tensor.dims[..]))
            .collect()
    }

    /// A layer's tensors by what follows `blk.<i>.` in their names.
    fn layer_tensors(&self, i: u32) -> impl Iterator<Item = (&str, &TensorInfo)> {
        let tensors = self.layers.get(i as usize).map_or(&[][..], Vec::as_slice);
        tensors.iter().map(|tensor| {
            (
                tensor.name.splitn(3, '.').nth(2).unwrap_or_default(),
                tensor,
            )
        })
    }

    /// The file of a stage of these layers, one of [`Blueprint::groups`]; the
    /// last one's has the head.
    pub(crate) fn stage_file(&self, group: &Range<u32>) -> Result<StageFile, UnsupportedModel> {
        let last = group.end == self.n_layer;
        let mut tensors = Vec::new();
        let mut fills = Vec::new();
        let mut push = |name: &str, dims: &[u64], ty, fill| {
            tensors.push(TensorInfo {
                name: name.into(),
                dims: dims.into(),
                ty,
                offset: 0,
            });
            fills.push(fill);
        };
        let n_embd = u64::from(self.n_embd);
        let rows = if last { u64::from(self.n_vocab) } else { 1 };
        push(EMBEDDING, &[n_embd, rows], hole_type(n_embd), Fill::Hole);
        if last {
            for tensor in &self.head {
                push(
                    &tensor.name,
                    &tensor.dims,
                    tensor.ty,
                    Fill::Source(tensor.name.clone()),
                );
            }
            if self.tied {
                let fill = Fill::Source(EMBEDDING.into());
                push(OUTPUT, &self.embedding.dims, self.embedding.ty, fill);
            }
        } else {
            push("output_norm.weight", &[n_embd], TensorType::F32, Fill::Ones);
            push(OUTPUT, &[n_embd, 1], TensorType::F32, Fill::Hole);
        }
        for tensor in &self.shared {
            push(
                &tensor.name,
                &tensor.dims,
                tensor.ty,
                Fill::Source(tensor.name.clone()),
            );
        }
        for (at, i) in group.clone().enumerate() {
            for (name, tensor) in self.layer_tensors(i) {
                let fill = Fill::Source(tensor.name.clone());
                push(&format!("blk.{at}.{name}"), &tensor.dims, tensor.ty, fill);
            }
        }
        let header = Header::new(
            gguf::ALIGNMENT_DEFAULT,
            self.stage_kv(group, rows as u32),
            tensors,
        )?;
        Ok(StageFile { header, fills })
    }

    fn stage_kv(&self, group: &Range<u32>, n_vocab: u32) -> Vec<(String, Value)> {
        let mut kv = self.kv.clone();
        let i = group.start;
        for (key, array) in &self.arrays {
            kv.extend(array.get(i as usize).map(|value| (key.clone(), value)));
        }
        let name = self.arch.name;
        let n_layer = group.end - group.start;
        kv.push((format!("{name}.block_count"), Value::U32(n_layer)));
        kv.push((format!("{name}.vocab_size"), Value::U32(n_vocab)));
        let Some(local) = &self.local else { return kv };
        let window = format!("{name}.attention.sliding_window");
        if local.get(i as usize) == Some(&true) {
            // A pattern of two begins with a local layer.
            kv.push((format!("{window}_pattern"), Value::U32(2)));
            return kv;
        }
        // llama.cpp asserts that a model with windows has a local layer: one
        // that looks at everything has no window.
        kv.retain(|(key, _)| *key != window);
        kv
    }
}

/// The smallest type whose rows `n_embd` divides into.
fn hole_type(n_embd: u64) -> TensorType {
    [TensorType::Q1_0, TensorType::Q2_0, TensorType::Q4_0]
        .into_iter()
        .find(|ty| n_embd.is_multiple_of(ty.block_len()))
        .unwrap_or(TensorType::F16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::FileSource;
    use crate::{RandomShape, RandomWeights, random_model};

    fn blueprint(arch: &str, shape: &RandomShape) -> Blueprint {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        random_model(arch, shape, RandomWeights::Q4KM, 1, &path).unwrap();
        Blueprint::new(FileSource::open(&path).unwrap().header()).unwrap()
    }

    #[test]
    fn layers_share_a_model_where_they_are_alike_and_small() {
        let mut shape = RandomShape::tiny();
        shape.n_layer = 10;
        let mut llama = blueprint("llama", &shape);
        assert_eq!(llama.groups(&(0..10)), [0..8, 8..10]);
        assert_eq!(llama.groups(&(1..4)).len(), 1);
        // Another set of tensors.
        let bias = llama.layers[4][0].clone();
        llama.layers[4].push(TensorInfo {
            name: "blk.4.attn_q.bias".into(),
            ..bias
        });
        assert_eq!(llama.groups(&(0..10)), [0..4, 4..5, 5..10]);
        // Other numbers of heads.
        let mut llama = blueprint("llama", &shape);
        let heads = Array::U32(vec![4, 4, 2, 2, 4, 4, 4, 4, 4, 4]);
        let key = "llama.attention.head_count_kv";
        llama.arrays.push((key.into(), heads));
        assert_eq!(llama.groups(&(0..10)), [0..2, 2..4, 4..10]);
        // Layers of 300 MB.
        let mut llama = blueprint("llama", &shape);
        for tensors in &mut llama.layers {
            tensors[0].dims = vec![256, 300 << 12];
            tensors[0].ty = TensorType::Q8_0;
        }
        assert_eq!(llama.groups(&(0..2)), [0..1, 1..2]);
        (shape.n_layer, shape.window) = (7, 16);
        let windows = blueprint("gemma3", &shape);
        assert_eq!(windows.groups(&(0..7)).len(), 7);
    }
}
