//! A peer of the swarm: the network, the sessions, the worker that computes. The only crate that
//! names libp2p. It never touches a pointer of the compute library and never prints.

pub mod answer;
mod client;
pub mod config;
pub mod control;
pub mod cpu_share;
pub mod daemon;
pub mod demo;
mod experience;
pub mod experts;
mod hosting;
pub mod identity;
pub mod keys;
pub mod known_peers;
pub mod load;
pub mod measure;
pub mod metrics;
pub mod net;
pub mod pause;
pub mod peer_book;
mod phases;
pub mod quiet_hours;
mod random;
mod recovery;
mod routes;
pub mod runtime;
mod seldom;
pub mod session;
mod shares;
mod swarm_file;
pub mod swarm_node;
pub mod telemetry;
pub mod transfer;

pub use client::Client;
pub use experts::{ExpertService, Island, IslandFacts, IslandOptions};
pub use hosting::{Hold, Hosted};
pub use identity::{Identity, IdentityError};
pub use known_peers::KnownPeers;
pub use net::{Access, Net, NetConfig, NetError, OpenError, Proto, Stream};
pub use peer_book::PeerBook;
pub use random::Random;
pub use recovery::{Event, Listener, Recovery, Session};
pub use routes::{Explained, Privacy, Routes, SessionSpec, View, exact_batch};
pub use session::{Beginning, ClientError, ClientSession, Lender};
pub use swarm_node::{NodeConfig, StartError, SwarmNode};
pub use transfer::{Transfer, TransferError};
