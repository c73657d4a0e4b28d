//! The tensors of experts: their names, and one expert's part of each.

use std::collections::BTreeMap;
use std::fmt;
use std::io;

use gguf::{Header, TensorInfo, TensorType};

use super::message::USED_MAX;

/// A matrix of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// `ffn_gate_exps`.
    Gate,
    /// `ffn_up_exps`.
    Up,
    /// `ffn_gate_up_exps`: both in one, gate first.
    GateUp,
    /// `ffn_down_exps`.
    Down,
}

/// What of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// The matrix: `[columns, rows, experts]`.
    Weight,
    /// Added to what it gives: `[rows, experts]`, f32.
    Bias,
    /// What it gives is multiplied by, before the bias: `[experts]`, f32.
    Scale,
}

const PARTS: [(Part, &str); 4] = [
    (Part::Gate, "ffn_gate_exps"),
    (Part::Up, "ffn_up_exps"),
    (Part::GateUp, "ffn_gate_up_exps"),
    (Part::Down, "ffn_down_exps"),
];
const KINDS: [(Kind, &str); 3] = [
    (Kind::Weight, "weight"),
    (Kind::Bias, "bias"),
    (Kind::Scale, "scale"),
];

/// The same names, as llama.cpp's loader matches them.
pub(crate) const PATTERN: &std::ffi::CStr =
    c"^blk\\.[0-9]+\\.ffn_(gate|up|gate_up|down)_exps\\.(weight|bias|scale)$";

/// A tensor of all experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Weight {
    /// As the file counts.
    pub layer: u32,
    /// Which matrix.
    pub part: Part,
    /// What of it.
    pub kind: Kind,
}

impl Weight {
    /// What `blk.<layer>.ffn_<part>_exps.<kind>` names.
    pub(crate) fn parse(name: &str) -> Option<Weight> {
        let mut words = name.strip_prefix("blk.")?.split('.');
        let layer = words.next()?;
        let (part, kind) = (words.next()?, words.next()?);
        let found = Weight {
            layer: layer.parse().ok()?,
            part: PARTS.iter().find(|(_, name)| *name == part)?.0,
            kind: KINDS.iter().find(|(_, name)| *name == kind)?.0,
        };
        (found.name() == name).then_some(found)
    }

    fn name(self) -> String {
        let part = PARTS.iter().find(|(part, _)| *part == self.part);
        let kind = KINDS.iter().find(|(kind, _)| *kind == self.kind);
        let (part, kind) = (part.map_or("", |p| p.1), kind.map_or("", |k| k.1));
        format!("blk.{}.{part}.{kind}", self.layer)
    }
}

/// Whether a tensor of this name belongs to experts.
pub(crate) fn is_expert(name: &str) -> bool {
    Weight::parse(name).is_some()
}

/// A set of tensors of an expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts(u16);

impl Parts {
    pub(crate) fn with(self, part: Part, kind: Kind) -> Parts {
        Parts(self.0 | Self::bit(part, kind))
    }

    pub(crate) fn has(self, part: Part, kind: Kind) -> bool {
        self.0 & Self::bit(part, kind) != 0
    }

    fn bit(part: Part, kind: Kind) -> u16 {
        1 << (3 * part as u16 + kind as u16)
    }

    /// As a number for the wire, below 4096.
    pub fn bits(self) -> u16 {
        self.0
    }

    /// From such a number.
    pub fn from_bits(bits: u16) -> Option<Parts> {
        (bits < 1 << 12).then_some(Parts(bits))
    }
}

/// As `ffn_gate_exps.weight, ffn_gate_exps.bias`.
impl fmt::Display for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sep = "";
        for (part, name) in PARTS {
            for (kind, of) in KINDS {
                if self.has(part, kind) {
                    write!(f, "{sep}{name}.{of}")?;
                    sep = ", ";
                }
            }
        }
        if sep.is_empty() {
            f.write_str("nothing")?;
        }
        Ok(())
    }
}

/// Where the bytes of single experts come from.
pub trait ExpertSource {
    /// Replaces `out` by expert `expert`'s part of tensor `name`.
    ///
    /// # Errors
    /// It cannot be had.
    fn read_expert(&self, name: &str, expert: u32, out: &mut Vec<u8>) -> io::Result<()>;
}

/// One tensor of an expert.
#[derive(Clone, Debug)]
pub(crate) struct Slice {
    pub name: String,
    pub ty: TensorType,
    /// Floats of a row; 1 for a scale.
    pub columns: u64,
    /// Rows; 1 for biases and scales.
    pub rows: u64,
    pub bytes: u64,
}

/// What the experts of a model's layers are made of.
#[derive(Clone, Debug)]
pub struct ExpertLayout {
    n_embd: u32,
    n_expert: u32,
    n_used: u32,
    layers: BTreeMap<u32, BTreeMap<(Part, Kind), Slice>>,
}

/// Largest dimension believed, as a model's.
const DIM_MAX: u64 = 1 << 20;

impl ExpertLayout {
    /// Reads a model's header.
    ///
    /// # Errors
    /// What is wrong with it, or that it has no experts.
    pub fn new(header: &Header) -> Result<ExpertLayout, String> {
        let arch = header
            .get_str("general.architecture")
            .map_err(|e| e.to_string())?;
        let number = |key: &str| {
            header
                .get_u32(&format!("{arch}.{key}"))
                .map_err(|e| e.to_string())
        };
        let n_embd = number("embedding_length")?;
        let n_expert = number("expert_count").unwrap_or(0);
        let most = USED_MAX as u32;
        let n_used = number("expert_used_count").unwrap_or(most).clamp(1, most);
        if n_embd == 0 || u64::from(n_embd) > DIM_MAX || n_expert == 0 || n_expert > 1024 {
            return Err(format!(
                "{n_expert} experts of {n_embd} cannot be: not a mixture of experts"
            ));
        }
        let mut layers: BTreeMap<u32, BTreeMap<(Part, Kind), Slice>> = BTreeMap::new();
        for tensor in &header.tensors {
            if let Some(weight) = Weight::parse(&tensor.name) {
                let slice = slice(tensor, weight.kind, n_expert)?;
                let layer = layers.entry(weight.layer).or_default();
                layer.insert((weight.part, weight.kind), slice);
            }
        }
        if layers.is_empty() {
            return Err("no tensors of experts".into());
        }
        for (layer, slices) in &layers {
            check_shapes(slices, n_embd.into()).map_err(|why| format!("layer {layer}: {why}"))?;
        }
        Ok(ExpertLayout {
            n_embd,
            n_expert,
            n_used,
            layers,
        })
    }

    /// Floats in a row that enters or leaves an expert.
    pub fn n_embd(&self) -> u32 {
        self.n_embd
    }

    /// Experts of a layer.
    pub fn n_expert(&self) -> u32 {
        self.n_expert
    }

    /// Experts that a row meets; where the file does not say, the most there are.
    pub fn n_used(&self) -> u32 {
        self.n_used
    }

    /// The layers that have experts, in ascending order.
    pub fn layers(&self) -> impl Iterator<Item = u32> + '_ {
        self.layers.keys().copied()
    }

    /// Bytes of one expert of `layer`; 0 where there are none.
    pub fn expert_bytes(&self, layer: u32) -> u64 {
        let slices = self.layers.get(&layer);
        slices.map_or(0, |slices| slices.values().map(|slice| slice.bytes).sum())
    }

    /// Which tensors the experts of `layer` have.
    pub fn parts(&self, layer: u32) -> Parts {
        let slices = self.layers.get(&layer).into_iter().flatten();
        slices.fold(Parts::default(), |parts, ((part, kind), _)| {
            parts.with(*part, *kind)
        })
    }

    /// Whether the experts of `layer` have a gate.
    pub(crate) fn gated(&self, layer: u32) -> bool {
        let parts = self.parts(layer);
        parts.has(Part::Gate, Kind::Weight) || parts.has(Part::GateUp, Kind::Weight)
    }

    pub(crate) fn slices(&self, layer: u32) -> Option<&BTreeMap<(Part, Kind), Slice>> {
        self.layers.get(&layer)
    }
}

/// One expert's part: experts are the slowest dimension.
fn slice(tensor: &TensorInfo, kind: Kind, n_expert: u32) -> Result<Slice, String> {
    let bad = |why: &str| Err(format!("tensor `{}`: {why}", tensor.name));
    let n = u64::from(n_expert);
    let (columns, rows) = match (kind, &tensor.dims[..]) {
        (Kind::Weight, [columns, rows, experts]) if *experts == n => (*columns, *rows),
        (Kind::Bias, [columns, experts]) if *experts == n => (*columns, 1),
        (Kind::Scale, [experts]) if *experts == n => (1, 1),
        _ => return bad(&format!("{:?} is not for {n} experts", tensor.dims)),
    };
    if columns == 0 || columns > DIM_MAX || rows == 0 || rows > DIM_MAX {
        return bad("a dimension that cannot be");
    }
    if kind != Kind::Weight && tensor.ty != TensorType::F32 {
        return bad("biases and scales are f32");
    }
    let Some(row) = tensor.ty.row_bytes(columns) else {
        return bad("a row is not whole blocks of its type");
    };
    Ok(Slice {
        name: tensor.name.clone(),
        ty: tensor.ty,
        columns,
        rows,
        bytes: row * rows,
    })
}

/// Whether rows fit through: ggml asserts it otherwise.
fn check_shapes(slices: &BTreeMap<(Part, Kind), Slice>, n_embd: u64) -> Result<(), String> {
    let weight = |part| slices.get(&(part, Kind::Weight));
    let down = weight(Part::Down).ok_or("no ffn_down_exps")?;
    let first = match (weight(Part::GateUp), weight(Part::Gate), weight(Part::Up)) {
        (Some(both), None, None) if both.rows.is_multiple_of(2) => vec![(both, both.rows / 2)],
        (None, gate, Some(up)) => {
            let all = gate.into_iter().chain([up]);
            all.map(|slice| (slice, slice.rows)).collect()
        }
        _ => return Err("neither ffn_up_exps, with or without gate, nor ffn_gate_up_exps".into()),
    };
    let fits = |(slice, rows): &(&Slice, u64)| slice.columns == n_embd && *rows == down.columns;
    if !first.iter().all(fits) || down.rows != n_embd {
        return Err(format!("the experts' matrices do not fit rows of {n_embd}"));
    }
    for ((part, kind), slice) in slices {
        let rows = weight(*part).map(|weight| weight.rows);
        if *kind == Kind::Bias && rows != Some(slice.columns) || rows.is_none() {
            return Err(format!("`{}` does not fit its matrix", slice.name));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_experts_tensors() {
        let weight = Weight {
            layer: 12,
            part: Part::GateUp,
            kind: Kind::Scale,
        };
        assert_eq!(Weight::parse("blk.12.ffn_gate_up_exps.scale"), Some(weight));
        for name in [
            "blk.12.ffn_gate_up_exps.scale.x",
            "blk.012.ffn_up_exps.weight",
            "blk.1.ffn_up_shexp.weight",
            "blk.1.ffn_gate_inp.weight",
            "ffn_up_exps.weight",
            "blk.1.ffn_up_exps",
        ] {
            assert_eq!(Weight::parse(name), None, "{name}");
        }
    }

    #[test]
    fn sets_of_tensors_go_through_numbers() {
        let parts = Parts::default()
            .with(Part::Down, Kind::Scale)
            .with(Part::Gate, Kind::Weight);
        assert_eq!(Parts::from_bits(parts.bits()), Some(parts));
        assert_eq!(Parts::from_bits(1 << 12), None);
        assert_eq!(
            parts.to_string(),
            "ffn_gate_exps.weight, ffn_down_exps.scale"
        );
        assert!(parts.has(Part::Down, Kind::Scale) && !parts.has(Part::Down, Kind::Bias));
    }
}
