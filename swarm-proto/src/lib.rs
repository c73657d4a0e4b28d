//! What goes on the wire: ids, messages, frames, limits. No I/O, no clock, no async, no libp2p.

mod ids;

pub use ids::{Peer, PeerError, SwarmId, SwarmIdError};
