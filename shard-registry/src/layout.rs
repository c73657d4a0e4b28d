//! How a model's tensors are cut into shards. A pure function of the tensor table, so that a
//! manifest cannot claim another cut: shards can neither overlap nor leave a gap.
//!
//! ```text
//! metadata │ embedding │ layer 0 (for MoE its trunk) │ expert 0 of layer 0 │ … │ layer n-1 … │ head
//! ```

use bincode::{Decode, Encode};

use crate::manifest::Tensor;

/// Largest tensor without a place of its own that is added to every layer; real ones (rope
/// frequencies) have some hundred bytes.
const SHARED_BYTES_MAX: u64 = 1 << 20;

/// Most tensors that are added to every layer: real models have one or two.
const SHARED_TENSORS_MAX: usize = 16;
/// Most pieces of all shards: a model with 61 layers of 384 experts has 70 000.
const PIECES_MAX: u64 = 1 << 20;

/// What a shard is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode)]
pub enum ShardKind {
    /// Large settings, the tokenizer above all.
    Metadata,
    /// What the first layer needs before it.
    Embedding,
    /// One layer; for a mixture of experts what all experts share.
    Layer(u16),
    /// One expert of one layer.
    Expert {
        /// The layer.
        layer: u16,
        /// Which expert.
        expert: u16,
    },
    /// What comes after the last layer.
    Head,
}

impl std::fmt::Display for ShardKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ShardKind::Metadata => f.write_str("metadata"),
            ShardKind::Embedding => f.write_str("embedding"),
            ShardKind::Layer(layer) => write!(f, "layer {layer}"),
            ShardKind::Expert { layer, expert } => write!(f, "expert {expert} of layer {layer}"),
            ShardKind::Head => f.write_str("head"),
        }
    }
}

/// A part of a shard: a whole tensor, or an expert's slice of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Index in the manifest's tensor table.
    pub tensor: u32,
    /// First byte, within the tensor.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// Where a tensor belongs.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Embedding,
    Layer(u16),
    Experts(u16),
    Head,
    EveryLayer,
}

/// The shards of a model and what each consists of, the metadata first (it has no tensors).
///
/// # Errors
/// The first tensor that has no place: of a layer that the model does not have.
pub(crate) fn shards(
    tensors: &[Tensor],
    n_layer: u16,
    n_expert: u16,
) -> Result<Vec<(ShardKind, Vec<Piece>)>, String> {
    let mut pieces = 0u64;
    let mut shared = 0;
    let (mut embedding, mut head) = (Vec::new(), Vec::new());
    let mut layers = vec![Vec::new(); usize::from(n_layer)];
    let mut experts = vec![Vec::new(); usize::from(n_layer)];
    let tied = !tensors.iter().any(|tensor| tensor.name == "output.weight");
    for (i, tensor) in tensors.iter().enumerate() {
        let index = u32::try_from(i).map_err(|_| "too many tensors".to_owned())?;
        let whole = Piece {
            tensor: index,
            offset: 0,
            len: tensor.bytes,
        };
        let place = place(tensor, n_layer, n_expert)?;
        pieces += match place {
            Place::EveryLayer => n_layer.into(),
            Place::Experts(_) => n_expert.into(),
            _ => 1,
        };
        shared += usize::from(place == Place::EveryLayer);
        if pieces > PIECES_MAX || shared > SHARED_TENSORS_MAX {
            return Err(format!(
                "{pieces} pieces, {shared} tensors for every layer; \
                 {PIECES_MAX} and {SHARED_TENSORS_MAX} are possible"
            ));
        }
        match place {
            Place::Embedding => {
                embedding.push(whole);
                if tied && tensor.name == "token_embd.weight" {
                    head.push(whole);
                }
            }
            Place::Head => head.push(whole),
            Place::Layer(layer) => layers[usize::from(layer)].push(whole),
            Place::Experts(layer) => experts[usize::from(layer)].push(whole),
            Place::EveryLayer => layers.iter_mut().for_each(|layer| layer.push(whole)),
        }
    }
    let mut out = vec![
        (ShardKind::Metadata, Vec::new()),
        (ShardKind::Embedding, embedding),
    ];
    for (layer, (trunk, sliced)) in (0..n_layer).zip(layers.into_iter().zip(experts)) {
        out.push((ShardKind::Layer(layer), trunk));
        if sliced.is_empty() {
            continue;
        }
        for expert in 0..n_expert {
            let pieces = sliced.iter().map(|whole| slice(*whole, expert, n_expert));
            out.push((ShardKind::Expert { layer, expert }, pieces.collect()));
        }
    }
    out.push((ShardKind::Head, head));
    Ok(out)
}

/// Experts are the slowest dimension: each is one contiguous part.
fn slice(whole: Piece, expert: u16, n_expert: u16) -> Piece {
    let len = whole.len / u64::from(n_expert);
    Piece {
        offset: len * u64::from(expert),
        len,
        ..whole
    }
}

fn place(tensor: &Tensor, n_layer: u16, n_expert: u16) -> Result<Place, String> {
    let name = tensor.name.as_str();
    if let Some(rest) = name.strip_prefix("blk.") {
        let (number, rest) = rest.split_once('.').unwrap_or((rest, ""));
        let layer = number.parse().ok().filter(|layer| *layer < n_layer);
        let layer = layer.ok_or_else(|| {
            format!("tensor {name} belongs to no layer of a model that has {n_layer}")
        })?;
        return Ok(if is_expert(rest, tensor, n_expert) {
            Place::Experts(layer)
        } else {
            Place::Layer(layer)
        });
    }
    if name.starts_with("output") || name.starts_with("cls") {
        return Ok(Place::Head);
    }
    if name.starts_with("token_") || name.starts_with("position_") {
        return Ok(Place::Embedding);
    }
    // Rope frequencies and the like: every layer reads them.
    Ok(if tensor.bytes <= SHARED_BYTES_MAX {
        Place::EveryLayer
    } else {
        Place::Head
    })
}

fn is_expert(rest: &str, tensor: &Tensor, n_expert: u16) -> bool {
    let merged = [
        "ffn_gate_exps.",
        "ffn_up_exps.",
        "ffn_down_exps.",
        "ffn_gate_up_exps.",
    ];
    let last = tensor.dims.last().copied();
    // Weights and biases have a row or more for each expert, scales a number.
    n_expert > 0
        && (tensor.dims.len() > 1 || rest.ends_with(".scale"))
        && last == Some(n_expert.into())
        && tensor.bytes.is_multiple_of(n_expert.into())
        && merged.iter().any(|prefix| rest.starts_with(prefix))
}
