//! All there is to say of one peer: its advert, what was seen of it from here, and why it is or is not on the route
//! that a request would take now.

use node::{Client, Explained, SessionSpec};
use serde::{Deserialize, Serialize};
use swarm_proto::{Advert, Hop, ModelAdvert, Peer};

use super::view::{self, FailedView, NAME_CHARS_MAX, WHY_CHARS_MAX, heard_s_ago, ms, pair, spans};
use crate::error::ApiError;
use crate::fields::printable;

/// Letters of an address.
const ADDR_CHARS_MAX: usize = 128;

/// One peer, looked at closely.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PeerDetail {
    /// Its id.
    pub peer: String,
    /// Whether it advertises now; else only `seen` is known.
    pub alive: bool,
    /// Program and version, as it says.
    pub agent: String,
    /// Where it listens, as it says.
    pub addrs: Vec<String>,
    /// Seconds since its advert was made.
    pub heard_s_ago: f64,
    /// Whether there is a connection to it.
    pub connected: bool,
    /// It could not be reached from here and has been silent since.
    pub unreachable: bool,
    /// Round trip measured from here, in milliseconds.
    pub rtt_ms: Option<f64>,
    /// Frames that wait for its stage worker.
    pub queue: u16,
    /// Measured uplink, in bytes a second.
    pub uplink_bytes_s: Option<f32>,
    /// Seconds since that was measured.
    pub uplink_s_ago: Option<u32>,
    /// What it holds.
    pub models: Vec<HeldView>,
    /// Whom it measured round trips to, nearest first.
    pub neighbours: Vec<NeighbourView>,
    /// How it failed this member, where it did and is not forgiven.
    pub seen: Option<FailedView>,
    /// Why it is or is not used for the model that was asked about.
    pub why: Option<WhyView>,
}

/// What it says of a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeldView {
    /// The model's id.
    pub model: String,
    /// What it calls it.
    pub name: String,
    /// Layers of the whole model, as it says.
    pub n_layer: u16,
    /// Layers served now, as `[first, end)`.
    pub live: Vec<[u16; 2]>,
    /// Layers served or on their way.
    pub intended: Vec<[u16; 2]>,
    /// Layers whose shards it gives to others.
    pub stored: Vec<[u16; 2]>,
    /// Measured rows a second through one layer.
    pub layer_tokens_s: Option<f32>,
    /// Seconds since that was measured.
    pub measured_s_ago: Option<u32>,
    /// Free KV: positions of one layer each.
    pub free_cells: u64,
    /// Longest context it opens.
    pub n_ctx_max: u32,
    /// Most bytes its layers may take; none where they stay what they are.
    pub layer_bytes_max: Option<u64>,
    /// Peers with the same one compute the same bits.
    pub numerics: String,
    /// Experts that it computes for the trunks of others, as `0-3,7 of 0..5`.
    #[serde(default)]
    pub experts: Vec<String>,
    /// Who computes the experts of its layers, where it does not.
    #[serde(default)]
    pub island: Vec<String>,
}

/// A round trip between two others.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NeighbourView {
    /// To whom.
    pub peer: String,
    /// In milliseconds.
    pub rtt_ms: f64,
}

/// Why a peer is or is not used.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WhyView {
    /// The model.
    pub model: String,
    /// Its layers on the route that would be taken now; empty where it is not on it.
    pub layers: Vec<[u16; 2]>,
    /// Layers for which it would stand by.
    pub stands_by: Vec<[u16; 2]>,
    /// In words.
    pub text: String,
    /// What it costs a token, where it is on the route, by the planner's figures.
    pub parts: Option<PartsView>,
}

/// What a hop costs a token, in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PartsView {
    /// One way from whoever is before it.
    pub network: f64,
    /// Whether that was measured; else it is estimated.
    pub network_measured: bool,
    /// Frames that wait for it already.
    pub queue: f64,
    /// Being a hop at all.
    pub overhead: f64,
    /// Its layers.
    pub compute: f64,
}

impl PeerDetail {
    /// What `client` knows of `peer` now, without [`PeerDetail::why`].
    ///
    /// # Errors
    /// Nothing.
    pub fn of(client: &Client, peer: &Peer) -> Result<Self, ApiError> {
        let now_ms = node::net::now_ms();
        let entries = client.book().entries();
        let seen = entries.iter().find(|entry| entry.peer == *peer);
        let seen = seen.map(|entry| FailedView::new(entry, now_ms / 1000));
        let snapshot = client.adverts();
        let mut detail = match snapshot.get(peer) {
            Some(advert) => Self::new(advert, now_ms),
            None if seen.is_some() => Self {
                peer: peer.to_string(),
                ..Self::default()
            },
            None => return Err(ApiError::no_peer(&peer.to_string())),
        };
        let net = client.net();
        let rtts = net.rtts();
        let rtt = rtts.iter().find(|(other, _)| other == peer);
        detail.rtt_ms = rtt.map(|(_, rtt)| ms(*rtt));
        detail.connected = net.peers().borrow().contains(peer);
        detail.unreachable = net.adverts().unreachable().contains(peer);
        detail.seen = seen;
        Ok(detail)
    }

    fn new(advert: &Advert, now_ms: u64) -> Self {
        let neighbour = |(peer, micros): &(Peer, u32)| NeighbourView {
            peer: peer.to_string(),
            rtt_ms: f64::from(*micros) / 1e3,
        };
        let mut neighbours: Vec<NeighbourView> = advert.rtts.iter().map(neighbour).collect();
        neighbours.sort_by(|a, b| a.rtt_ms.total_cmp(&b.rtt_ms));
        let addrs = advert.addrs.iter();
        Self {
            peer: advert.peer.to_string(),
            alive: true,
            agent: printable(&advert.agent, NAME_CHARS_MAX),
            addrs: addrs.map(|addr| printable(addr, ADDR_CHARS_MAX)).collect(),
            heard_s_ago: heard_s_ago(advert, now_ms),
            queue: advert.queue,
            uplink_bytes_s: advert.uplink_bytes_s.map(|measured| measured.value),
            uplink_s_ago: advert.uplink_bytes_s.map(|measured| measured.age_s),
            models: advert.models.iter().map(HeldView::new).collect(),
            neighbours,
            ..Self::default()
        }
    }
}

impl HeldView {
    fn new(held: &ModelAdvert) -> Self {
        Self {
            model: held.model.to_string(),
            name: printable(&held.name, NAME_CHARS_MAX),
            n_layer: held.n_layer,
            live: spans(&held.live),
            intended: spans(&held.intended),
            stored: spans(&held.stored),
            layer_tokens_s: held.layer_tokens_s.map(|measured| measured.value),
            measured_s_ago: held.layer_tokens_s.map(|measured| measured.age_s),
            free_cells: held.free_cells,
            n_ctx_max: held.n_ctx_max,
            layer_bytes_max: held.layer_bytes_max,
            numerics: format!("{:016x}", held.numerics),
            experts: view::experts(held),
            island: view::island(held),
        }
    }
}

impl WhyView {
    /// Plans the route that such a session would take now, and says what became of `peer`.
    pub fn of(client: &Client, spec: &SessionSpec, peer: &Peer) -> Self {
        let explained = client.explain(spec);
        Self {
            model: spec.model.to_string(),
            ..Self::new(&explained, peer)
        }
    }

    fn new(explained: &Explained, peer: &Peer) -> Self {
        let hops = explained.hops.as_deref().unwrap_or_default();
        let priced = explained.priced.iter().flat_map(|priced| &priced.hops);
        let ours = |hop: &Hop| hop.peer == *peer;
        let stands_by = hops.iter().zip(&explained.standbys);
        let stands_by = stands_by.filter(|(_, standby)| standby.as_ref() == Ok(peer));
        let mut why = Self {
            layers: (hops.iter().filter(|hop| ours(hop)))
                .map(|hop| pair(&hop.layers))
                .collect(),
            stands_by: stands_by.map(|(hop, _)| pair(&hop.layers)).collect(),
            ..Self::default()
        };
        let parts = hops.iter().zip(priced).find(|(hop, _)| ours(hop));
        why.parts = parts.map(|(_, parts)| PartsView {
            network: ms(parts.network),
            network_measured: parts.measured,
            queue: ms(parts.queue),
            overhead: ms(parts.overhead),
            compute: ms(parts.compute),
        });
        let other = explained.others.iter().find(|other| other.peer == *peer);
        why.text = match (&explained.hops, other) {
            _ if !why.layers.is_empty() => "on the cheapest route".into(),
            (_, Some(other)) if why.stands_by.is_empty() => other.why.to_string(),
            (_, Some(other)) => format!("stands by; not on the route itself: {}", other.why),
            (Err(none), None) => format!("there is no route: {none}"),
            (Ok(_), None) => "it says nothing of this model".into(),
        };
        why.text = printable(&why.text, WHY_CHARS_MAX);
        why
    }

    /// Where it cannot be found out.
    pub fn unknown(model: &str, error: &ApiError) -> Self {
        Self {
            model: printable(model, NAME_CHARS_MAX),
            text: printable(&error.to_string(), WHY_CHARS_MAX),
            ..Self::default()
        }
    }
}
