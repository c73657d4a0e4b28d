//! The network: one driver task that owns the libp2p swarm, and a handle that the rest of the node
//! uses. Streams come and go through it; what is said on them is `session`'s and `fetch`'s.

mod admission;
mod adverts;
mod behaviour;
mod bootstrap;
mod driver;
mod facts;
mod fetch;
mod gate;
mod handle;
mod providers;
mod snapshots;
mod stream;
mod streams;
mod transport;
mod uplink;

pub use adverts::{Adverts, Announcement, now_ms};
pub use behaviour::BehaviourError;
pub use fetch::{FetchError, Shelf};
pub use gate::Access;
pub use handle::{Net, NetConfig, NetError};
pub use stream::{OpenError, Proto, Stream};
pub use transport::TransportError;
