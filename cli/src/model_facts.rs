//! What there is to say about a model from its header alone: dimensions, sizes, and whether and where
//! it can be cut. Pure; nothing here reads tensor data.

use std::collections::BTreeMap;

use engine::{Blueprint, ExpertLayout};
use gguf::Header;
use serde::Serialize;

use crate::figures;

/// A model's dimensions and sizes.
#[derive(Debug, Serialize)]
pub struct ModelFacts {
    /// `general.architecture`.
    pub arch: String,
    /// `general.name`, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Layers.
    pub n_layer: u32,
    /// Floats of a hidden row.
    pub n_embd: u32,
    /// Tokens of the vocabulary.
    pub n_vocab: u32,
    /// Context it was trained on.
    pub n_ctx_train: u32,
    /// Attention heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_head: Option<u32>,
    /// Heads of keys and values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_head_kv: Option<u32>,
    /// Experts a layer has, and those a token uses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<(u32, u32)>,
    /// One expert of one layer, the largest; none where the experts cannot be told from their layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_bytes: Option<u64>,
    /// Weights.
    pub parameters: u64,
    /// All tensors together.
    pub bytes: u64,
    /// The token embedding.
    pub embedding_bytes: u64,
    /// Each layer's tensors.
    pub layer_bytes: Vec<u64>,
    /// Everything else: the final norm and the output matrix.
    pub head_bytes: u64,
    /// Bytes by tensor type, for a word on quantisation.
    pub type_bytes: BTreeMap<&'static str, u64>,
    /// KV of one token over all layers, f16; only known for models that can be cut.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_token_bytes: Option<u64>,
    /// The tokenizer, as GGUF names it; `none` without one.
    pub tokenizer: String,
    /// Whether the file has a chat template.
    pub chat_template: bool,
    /// Whether it can be cut between layers, with the same bits as the whole.
    pub can_be_cut: bool,
    /// Every boundary where it can be cut.
    pub cuts: Vec<u32>,
    /// Why it cannot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why_not: Option<String>,
}

/// Layer counts beyond this are a lie: the largest known model has 126.
const LAYERS_MAX: u32 = 4096;

impl ModelFacts {
    /// Reads them off a header.
    ///
    /// # Errors
    /// What every model has is missing: an architecture, a number of layers.
    pub fn new(header: &Header) -> anyhow::Result<Self> {
        let arch = header.get_str("general.architecture")?;
        let key = |name: &str| header.get_u32(&format!("{arch}.{name}"));
        let n_layer = key("block_count")?;
        anyhow::ensure!(
            n_layer <= LAYERS_MAX,
            "block_count is {n_layer}, the limit is {LAYERS_MAX}"
        );
        let blueprint = Blueprint::new(header);
        let embedding = header.tensor("token_embd.weight");
        let mut facts = Self {
            arch: figures::printable(arch, 64),
            name: header
                .get_str("general.name")
                .ok()
                .map(|name| figures::printable(name, 120)),
            n_layer,
            n_embd: key("embedding_length")?,
            n_vocab: embedding
                .and_then(|t| t.dims.get(1))
                .and_then(|&n| n.try_into().ok())
                .unwrap_or(0),
            n_ctx_train: key("context_length").unwrap_or(0),
            n_head: key("attention.head_count").ok(),
            n_head_kv: key("attention.head_count_kv").ok(),
            experts: key("expert_count")
                .ok()
                .zip(key("expert_used_count").ok())
                .filter(|(n, _)| *n > 0),
            expert_bytes: ExpertLayout::new(header).ok().and_then(|layout| {
                layout
                    .layers()
                    .map(|layer| layout.expert_bytes(layer))
                    .max()
            }),
            parameters: 0,
            bytes: 0,
            embedding_bytes: 0,
            layer_bytes: vec![0; n_layer as usize],
            head_bytes: 0,
            type_bytes: BTreeMap::new(),
            kv_token_bytes: None,
            tokenizer: figures::printable(
                header.get_str("tokenizer.ggml.model").unwrap_or("none"),
                64,
            ),
            chat_template: header.get("tokenizer.chat_template").is_some(),
            can_be_cut: blueprint.is_ok(),
            cuts: Vec::new(),
            why_not: None,
        };
        facts.add_tensors(header)?;
        match blueprint {
            Ok(blueprint) => {
                facts.cuts = (1..n_layer).collect();
                facts.kv_token_bytes = Some((0..n_layer).map(|i| blueprint.kv_cell_bytes(i)).sum());
            }
            Err(error) => facts.why_not = Some(figures::printable(&error.to_string(), 400)),
        }
        Ok(facts)
    }

    fn add_tensors(&mut self, header: &Header) -> anyhow::Result<()> {
        for tensor in &header.tensors {
            let bytes = tensor.n_bytes()?;
            self.parameters = self.parameters.saturating_add(tensor.n_elements()?);
            self.bytes = self.bytes.saturating_add(bytes);
            let of_type = self.type_bytes.entry(tensor.ty.name()).or_default();
            *of_type = of_type.saturating_add(bytes);
            let layer = tensor
                .name
                .strip_prefix("blk.")
                .and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
            let place = match layer.and_then(|layer| self.layer_bytes.get_mut(layer)) {
                Some(place) => place,
                None if tensor.name == "token_embd.weight" => &mut self.embedding_bytes,
                None => &mut self.head_bytes,
            };
            *place = place.saturating_add(bytes);
        }
        Ok(())
    }

    /// Bits of a weight, on average.
    pub fn bits_per_weight(&self) -> f64 {
        self.bytes as f64 * 8.0 / (self.parameters.max(1)) as f64
    }

    /// The tensor types that make up most of it: `Q4_K with F32, Q6_K`.
    pub fn quantisation(&self) -> String {
        let mut types: Vec<(&str, u64)> = self
            .type_bytes
            .iter()
            .map(|(name, bytes)| (*name, *bytes))
            .collect();
        types.sort_by_key(|&(name, bytes)| (std::cmp::Reverse(bytes), name));
        let names: Vec<&str> = types.iter().map(|(name, _)| *name).collect();
        match names.split_first() {
            None => "no tensors".into(),
            Some((most, [])) => (*most).to_string(),
            Some((most, rest)) => format!("{most} with {}", rest.join(", ")),
        }
    }
}
