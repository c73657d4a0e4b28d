//! Mixtures of experts over several machines: which way is faster, and who should hold which experts. Pure: all
//! figures are passed in.
//!
//! ```text
//! Manifest ─▶ MixtureShape ─┬─▶ assign_experts ─▶ who holds which experts
//! Machine, Link (measured) ─┴─▶ island_time    ─┐
//!                               pipeline_time  ─┴─▶ choose ─▶ a way, and why
//! ```
//!
//! A span of layers is computed either by a **pipeline**, whole layers by one machine after the other, or by an
//! **island**: one machine has everything but the experts (the trunk) and asks near machines for the experts of
//! each layer, all at once. To the swarm both are hosts of that span. What is compared is one row of one session,
//! as in [`route`](crate::route).

mod assign;
mod choice;
mod cost;
mod draws;
mod of_route;
mod shape;
#[cfg(test)]
mod tests;

pub use assign::{ExpertId, ExpertSet, NoRoom, assign_experts};
pub use choice::{Choice, Reason, Way, Wish, choose};
pub use cost::{
    Holder, IslandTime, LayerTime, Link, Machine, Overheads, PipelineTime, Stage, StageTime, Unfit,
    island_time, pipeline_time,
};
pub use of_route::{Compared, compare};
pub use shape::{ExpertUse, LayerShape, MixtureShape};

use std::time::Duration;

/// The longest round trip to a holder at which an island is taken unasked: each layer waits for one.
pub const ISLAND_RTT_MAX: Duration = Duration::from_micros(500);
