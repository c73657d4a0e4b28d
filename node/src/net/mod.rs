//! The network: one driver task that owns the libp2p swarm, and a handle that the rest of the node
//! uses. Streams come and go through it; what is said on them is `session`'s and `fetch`'s.

mod admission;
mod behaviour;
mod bootstrap;
mod driver;
mod gate;
mod handle;
mod names;
mod shared;
mod stream;
mod streams;
mod transport;

pub use behaviour::BehaviourError;
pub use gate::Access;
pub use handle::{Net, NetConfig, NetError};
pub use stream::{OpenError, Proto, Stream};
pub use transport::TransportError;
