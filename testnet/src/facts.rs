//! What a model file says about its size, and the memory budget that makes a node hold so many of its layers.

use serde::Deserialize;

/// The share of a node's budget that it may fill with layers, in percent; the rest is for KV caches.
const LAYER_SHARE: u64 = 75;

/// What `shoal inspect --json` says, as far as it is used here.
#[derive(Clone, Debug, Deserialize)]
pub struct Facts {
    /// The number of layers.
    pub n_layer: u32,
    /// All weights together.
    pub bytes: u64,
    /// Those of each layer.
    pub layer_bytes: Vec<u64>,
    /// Experts of a layer, and those that a token uses, of a mixture.
    #[serde(default)]
    pub experts: Option<(u32, u32)>,
    /// The largest of them.
    #[serde(default)]
    pub expert_bytes: Option<u64>,
}

impl Facts {
    /// The largest budget in bytes with which a node holds `span` layers at most, wherever its window lies.
    pub fn budget(&self, span: u32) -> u64 {
        let window = span as usize + 1;
        let all: u64 = self.layer_bytes.iter().sum();
        let one_more = self
            .layer_bytes
            .windows(window)
            .map(|window| window.iter().sum::<u64>());
        let room = one_more.min().map_or(all, |bytes| bytes.saturating_sub(1));
        room.saturating_mul(100) / LAYER_SHARE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_just_too_small_for_one_layer_more() {
        let layer_bytes = vec![100, 80, 80, 100];
        let facts = Facts {
            n_layer: 4,
            bytes: 360,
            layer_bytes,
            experts: None,
            expert_bytes: None,
        };
        // 80 + 80 does not fit.
        assert_eq!(facts.budget(1) * LAYER_SHARE / 100, 159);
        assert_eq!(facts.budget(4) * LAYER_SHARE / 100, 360);
    }
}
