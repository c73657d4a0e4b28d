//! Many nodes on one machine: real `shoal-node` processes on loopback, and the real `shoal` asked through them.
//!
//! ```text
//! plan ──▶ swarm ──▶ process (one shoal-node each)      picture, report, tally, cold, mixture: what a person sees
//!            ├─────▶ relay (a gate in front of each node, where links are to fail) ◀── faults
//!            └─────▶ client, stream (the shoal binary, with a deadline)
//! ```
//!
//! The library is what `shoal-testnet` and the end-to-end tests share. It knows the binaries by their flags and by what
//! they print, as a user does; only `sim` and `placement`, which run whole swarms in virtual time instead, link the
//! product. It never prints.

pub mod binaries;
pub mod client;
pub mod cold;
pub mod facts;
pub mod faults;
pub mod mixture;
pub mod picture;
pub mod placement;
pub mod plan;
pub mod process;
pub mod relay;
pub mod report;
pub mod screen;
pub mod sim;
pub mod stream;
pub mod swarm;
pub mod tally;
