//! What a model file says about its size, and the memory budget that makes a node hold so many of its layers.

use serde::Deserialize;

/// The share of a node's budget that it may fill with layers; the rest is for KV caches.
const LAYER_SHARE: f64 = 0.75;

/// What `shoal inspect --json` says, as far as it is used here.
#[derive(Clone, Debug, Deserialize)]
pub struct Facts {
    /// The number of layers.
    pub n_layer: u32,
    /// All weights together.
    pub bytes: u64,
    /// Those of each layer.
    pub layer_bytes: Vec<u64>,
}

impl Facts {
    /// A budget in bytes with which a node holds `span` layers and not one more.
    pub fn budget(&self, span: u32) -> u64 {
        let largest = self.layer_bytes.iter().max().copied().unwrap_or(1).max(1) as f64;
        ((f64::from(span) + 0.5) * largest / LAYER_SHARE) as u64
    }
}
