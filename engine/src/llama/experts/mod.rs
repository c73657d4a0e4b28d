//! Experts in ggml: a backend for the trunk that computes nothing itself, and
//! what holders compute with.
//!
//! ggml has no public way to add a backend from outside; its structures are in
//! an internal header. [`abi`] declares them for the one version that this crate
//! pins, and is held against the library before anything is made of them.

mod abi;
mod compute;
mod device;
mod graph;

pub(crate) use compute::{ExpertCpu, ExpertWeights, Job};
pub(crate) use device::ExpertDevice;
