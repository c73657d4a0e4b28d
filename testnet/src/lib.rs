//! Many nodes on one machine: real `shoal-node` processes on loopback, and the real `shoal` asked through them.
//!
//! ```text
//! plan ──▶ swarm ──▶ process (one shoal-node each)      picture, report: what a person sees
//!            └─────▶ client (the shoal binary, with a deadline)
//! ```
//!
//! The library is what `shoal-testnet` and the end-to-end tests share. It knows the binaries by their flags and by what
//! they print, as a user does; only `sim`, which runs a whole swarm in virtual time instead, links the product. It never
//! prints.

pub mod binaries;
pub mod client;
pub mod facts;
pub mod picture;
pub mod plan;
pub mod process;
pub mod report;
pub mod screen;
pub mod sim;
pub mod swarm;
