//! The libp2p protocols a node speaks, each with its limits. Names carry the swarm id wherever
//! libp2p lets us name them, so that two swarms on one LAN never merge; identify and ping keep
//! their standard names, which is how a stranger can be told what is wrong.

use std::{collections::HashSet, net::IpAddr, sync::Arc, time::Duration};

use libp2p::{
    PeerId, StreamProtocol, connection_limits,
    connection_limits::ConnectionLimits,
    gossipsub::{
        self, CallbackSubscriptionFilter, IdentityTransform, MaxCountSubscriptionFilter,
        MessageAuthenticity, PeerScoreParams, PeerScoreThresholds, TopicHash, ValidationMode,
    },
    identify,
    identity::Keypair,
    kad::{self, store::MemoryStore},
    mdns, ping,
    swarm::{NetworkBehaviour, behaviour::toggle::Toggle},
};
use swarm_proto::{SwarmId, advert::ADVERT_MODELS_MAX};

use super::{
    admission::Acceptors,
    gate::{Access, Gate},
    providers::{PROVIDE_INTERVAL, RECORD_TTL, RECORDS_MAX},
    streams::Streams,
};

/// A signed advert (16 KiB) and gossipsub's envelope.
const GOSSIP_BYTES_MAX: usize = 20 * 1024;
/// Topics one remote may make us remember: the general one and its models.
const TOPICS_PER_PEER_MAX: usize = 64;
/// Connections in all: adverts flood a mesh of about eight, sessions need their route, the rest is
/// reserve. Each idle connection costs some 30 kB.
const CONNECTIONS_MAX: u32 = 512;
/// Inbound may not fill all of them, so that nobody can surround us.
const INBOUND_MAX: u32 = 384;
/// Two transports, and both sides may dial at once.
const PER_PEER_MAX: u32 = 4;
/// Handshakes under way.
const PENDING_MAX: u32 = 128;
/// A peer whose pings fail for this long is gone.
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// RTT samples: the minimum of a few is wanted within the first minute.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// Peers with the same address before gossipsub suspects one attacker: on one machine or behind
/// one home router many nodes share an address. Loopback is exempt altogether.
const COLOCATION_THRESHOLD: f64 = 64.0;

type Filter = MaxCountSubscriptionFilter<
    CallbackSubscriptionFilter<Box<dyn FnMut(&TopicHash) -> bool + Send>>,
>;
/// Gossipsub with our topic filter.
pub(super) type Gossip = gossipsub::Behaviour<IdentityTransform, Filter>;

/// Everything together. The gate stands first: what it refuses, nobody else sees.
#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    pub(super) gate: Gate,
    pub(super) limits: connection_limits::Behaviour,
    pub(super) streams: Streams,
    pub(super) identify: identify::Behaviour,
    pub(super) ping: ping::Behaviour,
    pub(super) gossip: Gossip,
    pub(super) kad: kad::Behaviour<MemoryStore>,
    pub(super) mdns: Toggle<mdns::tokio::Behaviour>,
}

/// Why the protocols could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum BehaviourError {
    /// Gossipsub refused its configuration.
    #[error("gossipsub: {0}")]
    Gossip(String),
    /// A protocol name is not one.
    #[error("protocol name {0}")]
    Name(String),
}

/// What the protocols are made from.
pub(super) struct Parts<'a> {
    pub(super) keypair: &'a Keypair,
    pub(super) swarm: &'a SwarmId,
    pub(super) access: Access,
    pub(super) acceptors: Arc<Acceptors>,
    pub(super) agent: String,
    pub(super) mdns: bool,
    /// Whether others may find us at an address we listen on.
    pub(super) server: bool,
    /// Others are told other addresses than those we listen on.
    pub(super) announced: bool,
}

impl Behaviour {
    pub(super) fn new(parts: Parts<'_>) -> Result<Self, BehaviourError> {
        let me = parts.keypair.public().to_peer_id();
        Ok(Self {
            gate: Gate(parts.access),
            limits: connection_limits::Behaviour::new(limits()),
            streams: Streams::new(parts.acceptors),
            identify: identify::Behaviour::new(
                identify::Config::new(parts.swarm.identify_protocol(), parts.keypair.public())
                    .with_agent_version(parts.agent)
                    .with_push_listen_addr_updates(true)
                    .with_hide_listen_addrs(parts.announced)
                    .with_cache_size(256),
            ),
            ping: ping::Behaviour::new(
                ping::Config::new()
                    .with_interval(PING_INTERVAL)
                    .with_timeout(PING_TIMEOUT),
            ),
            gossip: gossip(parts.keypair, parts.swarm)?,
            kad: kademlia(me, parts.swarm, parts.server)?,
            mdns: mdns_toggle(me, parts.mdns).into(),
        })
    }
}

fn limits() -> ConnectionLimits {
    ConnectionLimits::default()
        .with_max_pending_incoming(Some(PENDING_MAX))
        .with_max_pending_outgoing(Some(PENDING_MAX))
        .with_max_established_incoming(Some(INBOUND_MAX))
        .with_max_established(Some(CONNECTIONS_MAX))
        .with_max_established_per_peer(Some(PER_PEER_MAX))
}

fn gossip(keypair: &Keypair, swarm: &SwarmId) -> Result<Gossip, BehaviourError> {
    let wrong = |e: &dyn std::fmt::Display| BehaviourError::Gossip(e.to_string());
    let config = gossipsub::ConfigBuilder::default()
        .protocol_id_prefix(format!("/shoal/{swarm}/meshsub"))
        .max_transmit_size(GOSSIP_BYTES_MAX)
        .validation_mode(ValidationMode::Strict)
        // An advert goes on to others only after we have checked it.
        .validate_messages()
        .max_publish_messages(16)
        .build()
        .map_err(|e| wrong(&e))?;
    let prefix = swarm.advert_topic();
    let ours = Box::new(move |topic: &TopicHash| topic.as_str().starts_with(&prefix));
    let filter = MaxCountSubscriptionFilter {
        filter: CallbackSubscriptionFilter(ours as Box<dyn FnMut(&TopicHash) -> bool + Send>),
        max_subscribed_topics: TOPICS_PER_PEER_MAX,
        max_subscriptions_per_request: TOPICS_PER_PEER_MAX,
    };
    let signed = MessageAuthenticity::Signed(keypair.clone());
    let mut gossip = gossipsub::Behaviour::new_with_subscription_filter(signed, config, filter)
        .map_err(|e| wrong(&e))?;
    let loopback = ["127.0.0.1", "::1"]
        .iter()
        .filter_map(|ip| ip.parse::<IpAddr>().ok());
    let score = PeerScoreParams {
        ip_colocation_factor_threshold: COLOCATION_THRESHOLD,
        ip_colocation_factor_whitelist: loopback.collect::<HashSet<_>>(),
        ..PeerScoreParams::default()
    };
    gossip
        .with_peer_score(score, PeerScoreThresholds::default())
        .map_err(|e| wrong(&e))?;
    Ok(gossip)
}

fn kademlia(
    me: PeerId,
    swarm: &SwarmId,
    server: bool,
) -> Result<kad::Behaviour<MemoryStore>, BehaviourError> {
    let name = swarm.kad_protocol();
    let name =
        StreamProtocol::try_from_owned(name.clone()).map_err(|_| BehaviourError::Name(name))?;
    let mut config = kad::Config::new(name);
    config
        .disjoint_query_paths(true)
        // Nothing enters the store unless the driver has looked at it.
        .set_record_filtering(kad::StoreInserts::FilterBoth)
        .set_query_timeout(Duration::from_secs(20))
        .set_provider_publication_interval(Some(PROVIDE_INTERVAL))
        .set_provider_record_ttl(Some(RECORD_TTL))
        .set_max_packet_size(16 * 1024);
    let store = kad::store::MemoryStoreConfig {
        max_records: 0,
        max_value_bytes: 0,
        max_providers_per_key: kad::K_VALUE.get(),
        // Others' keys and our own share it; the driver bounds the others'.
        max_provided_keys: RECORDS_MAX + ADVERT_MODELS_MAX,
    };
    let mut kad = kad::Behaviour::with_config(me, MemoryStore::with_config(me, store), config);
    // Left alone it stays a client until somebody confirms an address of ours, which on a LAN or
    // on loopback nobody does.
    kad.set_mode(Some(if server {
        kad::Mode::Server
    } else {
        kad::Mode::Client
    }));
    Ok(kad)
}

fn mdns_toggle(me: PeerId, wanted: bool) -> Option<mdns::tokio::Behaviour> {
    if !wanted {
        return None;
    }
    match mdns::tokio::Behaviour::new(mdns::Config::default(), me) {
        Ok(mdns) => Some(mdns),
        Err(error) => {
            tracing::warn!(%error, "mDNS is not available: peers on this network are not found by themselves; use --peer");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kad::{ProviderRecord, RecordKey, store::RecordStore};

    #[test]
    fn the_keys_of_others_leave_room_for_our_own() {
        let swarm = "t".parse().unwrap();
        let mut kad = kademlia(PeerId::random(), &swarm, true).unwrap();
        let key = |n: usize| RecordKey::new(&n.to_le_bytes());
        for n in 0..RECORDS_MAX {
            let record = ProviderRecord::new(key(n), PeerId::random(), Vec::new());
            kad.store_mut().add_provider(record).unwrap();
        }
        for n in 0..ADVERT_MODELS_MAX {
            kad.start_providing(key(RECORDS_MAX + n)).unwrap();
        }
    }
}
