//! Who may connect: a libp2p behaviour that refuses connections by peer id, in either direction.
//!
//! It knows ids only after the handshake of an inbound connection: who is refused has learnt that
//! we exist and our id, nothing else. A pre-shared key (see `transport`) hides even that.

use std::{
    collections::HashSet,
    task::{Context, Poll},
};

use libp2p::{
    Multiaddr, PeerId,
    core::{Endpoint, transport::PortUse},
    swarm::{
        ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandlerInEvent, ToSwarm,
        dummy,
    },
};
use swarm_proto::Peer;

use super::admission::Never;

/// Whom we talk to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Access {
    /// Anybody of the swarm.
    #[default]
    Open,
    /// Only these peers may connect, and only these are dialled: a private swarm.
    Listed(HashSet<Peer>),
    /// Only these peers are dialled; anybody may connect to us: a client that trusts these, or a
    /// node that forwards to these alone.
    DialListed(HashSet<Peer>),
}

impl Access {
    /// Whether we may dial `peer`.
    pub fn may_dial(&self, peer: &Peer) -> bool {
        match self {
            Access::Open => true,
            Access::Listed(peers) | Access::DialListed(peers) => peers.contains(peer),
        }
    }

    /// Whether `peer` may connect to us.
    pub fn may_connect(&self, peer: &Peer) -> bool {
        match self {
            Access::Open | Access::DialListed(_) => true,
            Access::Listed(peers) => peers.contains(peer),
        }
    }
}

/// Why a connection was refused.
#[derive(Debug, thiserror::Error)]
#[error("peer {0} is not on the list of allowed peers")]
pub(super) struct NotAllowed(pub(super) PeerId);

/// The behaviour.
pub(super) struct Gate(pub(super) Access);

impl Gate {
    fn check(
        &self,
        id: PeerId,
        allowed: fn(&Access, &Peer) -> bool,
    ) -> Result<(), ConnectionDenied> {
        // With a list, a peer that has no ed25519 key cannot be on it.
        let known = crate::identity::peer_of(&id);
        match known {
            Some(peer) if allowed(&self.0, &peer) => Ok(()),
            None if self.0 == Access::Open => Ok(()),
            _ => Err(ConnectionDenied::new(NotAllowed(id))),
        }
    }
}

impl NetworkBehaviour for Gate {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Never;

    fn handle_pending_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: Option<PeerId>,
        _: &[Multiaddr],
        _: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        peer.map_or(Ok(()), |id| self.check(id, Access::may_dial))?;
        Ok(Vec::new())
    }

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<dummy::ConnectionHandler, ConnectionDenied> {
        self.check(peer, Access::may_connect)?;
        Ok(dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<dummy::ConnectionHandler, ConnectionDenied> {
        self.check(peer, Access::may_dial)?;
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, _: FromSwarm) {}

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: Never) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Never, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}
