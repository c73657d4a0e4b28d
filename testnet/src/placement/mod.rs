//! Whole swarms that place themselves, from a seed, in virtual time: what share of the best possible the
//! placement reaches. The rules are the product's (`shard_registry::placement`); Petals' rule is beside
//! them, for comparison. A model of machines and links, not a measurement.
//!
//! ```text
//! machines ─▶ churn: nodes come, load layer by layer, go   ─▶ T/U each minute; a region dies
//!        └──▶ tight: a few nodes, barely enough memory     ─▶ T/U when nobody moves any more
//! ```
//!
//! T is the throughput of what is live, U the bound of [`upper_bound`] over all nodes that are there, with
//! those still loading. Every figure is drawn from the seed alone; time goes in ticks of [`TICK_S`],
//! within which all see the snapshot of its beginning.
//!
//! [`upper_bound`]: shard_registry::placement::throughput::upper_bound

use std::ops::Range;

use serde::Serialize;

mod agent;
pub mod churn;
mod figures;
mod machines;
mod petals;
pub mod tight;

pub use figures::{Cell, Job, Settings, Workload, run};

/// Layers of the model.
pub const N_LAYER: usize = 80;
/// Bytes of each.
pub const LAYER_BYTES: u64 = 500_000_000;
/// Bytes of a row between nodes: 8192 numbers as q8_0.
pub const FRAME_BYTES: u64 = 8704;
/// Seconds between two snapshots, which is also how old they get.
pub const TICK_S: f64 = 30.0;

/// By which rule nodes place themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// The product's.
    Shoal,
    /// That of Petals.
    Petals,
}

impl Rule {
    /// Both.
    pub const ALL: [Rule; 2] = [Rule::Shoal, Rule::Petals];
}

/// All layers are the same.
fn layer_bytes() -> Vec<u64> {
    vec![LAYER_BYTES; N_LAYER]
}

/// The layers of a window.
fn layers(window: &Range<u16>) -> Vec<u16> {
    window.clone().collect()
}
