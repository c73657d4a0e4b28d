//! What a swarm looks like from its adverts: peers, models, who holds which layers, how fast and how fresh, and who
//! failed. Pure: facts in, plain data out, so that a test draws any swarm it likes.
//!
//! It is bounded whatever peers say: so many peers, models and holders, of the others only how many there are.

use std::borrow::Borrow;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

use node::Client;
use node::peer_book::Entry;
use serde::{Deserialize, Serialize};
use swarm_proto::{Advert, LayerRange, ModelAdvert, ModelId, Peer};

use super::live::LiveView;
use crate::fields::printable;

/// Peers that are listed: more than anybody reads, and 400 kB of JSON.
const PEERS_MAX: usize = 2048;
/// Models that are listed, those with most holders first.
const MODELS_MAX: usize = 32;
/// Holders that are listed, of all models together.
const HOLDERS_MAX: usize = 2048;
/// Spans that are listed of one holder: a node has one, and a few while it moves.
const SPANS_MAX: usize = 16;
/// No model has more: who says so is not believed.
const LAYERS_MAX: u16 = 1024;
/// Failures that are listed.
const FAILED_MAX: usize = 64;
/// Letters of what a peer calls a model.
pub(super) const NAME_CHARS_MAX: usize = 64;
/// Letters of why something failed.
pub(super) const WHY_CHARS_MAX: usize = 300;

/// A swarm at one moment, as one of its members sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SwarmView {
    /// The swarm's id.
    pub swarm: String,
    /// Who looks.
    pub me: String,
    /// The program that looks.
    pub version: String,
    /// Who can read what is asked here: `open`, `trusted` or `local`.
    pub privacy: String,
    /// Who advertises, by id.
    pub peers: Vec<PeerView>,
    /// Further ones.
    pub peers_left_out: usize,
    /// What is advertised, most holders first.
    pub models: Vec<ModelView>,
    /// Further ones.
    pub models_left_out: usize,
    /// Who failed this member lately, the last one first.
    pub failed: Vec<FailedView>,
    /// What runs here; changes with every token.
    #[serde(flatten)]
    pub live: LiveView,
}

/// One peer's advert, and what was seen of it from here.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PeerView {
    /// Its id.
    pub peer: String,
    /// Seconds since its advert was made, by both clocks.
    pub heard_s_ago: f64,
    /// Frames that wait for its stage worker.
    pub queue: u16,
    /// Round trip measured from here, in milliseconds; none where it is not connected.
    pub rtt_ms: Option<f64>,
    /// Measured uplink, in bytes a second.
    pub uplink_bytes_s: Option<f32>,
    /// Seconds since that was measured.
    pub uplink_s_ago: Option<u32>,
    /// Whether there is a connection to it.
    pub connected: bool,
    /// It could not be reached from here and has been silent since.
    pub unreachable: bool,
    /// It is shutting down.
    pub leaving: bool,
    /// Seconds for which it is left alone after failures; 0 where it may be asked.
    pub left_alone_s: u64,
    /// It names no model: it is paused, or has just come.
    pub idle: bool,
}

/// A model and who holds what of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelView {
    /// Its id, in hex.
    pub id: String,
    /// What most of its holders call it.
    pub name: String,
    /// Layers of the whole model.
    pub n_layer: u16,
    /// Whether every layer has a holder.
    pub complete: bool,
    /// Layers without one, as `[first, end)`.
    pub gaps: Vec<[u16; 2]>,
    /// Holders of each layer.
    pub copies: Vec<u32>,
    /// Who holds it, by their first layer.
    pub holders: Vec<HolderView>,
    /// Further ones, which `copies` counts too.
    pub holders_left_out: usize,
}

/// What one peer holds of one model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HolderView {
    /// Its id.
    pub peer: String,
    /// Layers served now, as `[first, end)`.
    pub live: Vec<[u16; 2]>,
    /// Layers served or on their way.
    pub intended: Vec<[u16; 2]>,
    /// Measured rows a second through one layer.
    pub layer_tokens_s: Option<f32>,
    /// Seconds since that was measured.
    pub measured_s_ago: Option<u32>,
    /// Free KV: positions of one layer each.
    pub free_cells: u64,
    /// Longest context it opens.
    pub n_ctx_max: u32,
    /// Peers with the same one compute the same bits.
    pub numerics: String,
    /// Experts that it computes for the trunks of others, as `0-3,7 of 0..5`.
    #[serde(default)]
    pub experts: Vec<String>,
    /// Who computes the experts of its layers, where it does not.
    #[serde(default)]
    pub island: Vec<String>,
}

/// What was seen of a peer that failed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FailedView {
    /// Who.
    pub peer: String,
    /// Failures that are not forgotten.
    pub failures: u32,
    /// The latest, in words.
    pub last: String,
    /// Seconds since then.
    pub s_ago: u64,
    /// Seconds until it is asked again without need; 0 where it may be.
    pub left_alone_s: u64,
}

/// What a member knows.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Round trips from here.
    pub rtts: Vec<(Peer, Duration)>,
    /// Who is connected.
    pub connected: Vec<Peer>,
    /// Who could not be reached.
    pub unreachable: Vec<Peer>,
    /// Who failed.
    pub book: Vec<Entry>,
}

impl Facts {
    fn of(client: &Client) -> Self {
        let net = client.net();
        Self {
            rtts: net.rtts(),
            connected: net.peers().borrow().clone(),
            unreachable: net.adverts().unreachable(),
            book: client.book().entries(),
        }
    }
}

impl SwarmView {
    /// The swarm as `client` sees it now; nothing runs in it.
    pub fn of(client: &Client) -> Self {
        let now_ms = node::net::now_ms();
        let mut view = Self::new(&client.adverts().adverts, &Facts::of(client), now_ms);
        view.swarm = client.net().swarm().to_string();
        view.me = client.net().me().to_string();
        view.privacy = client.privacy().to_string();
        view
    }

    /// Sums up adverts and facts; `now_ms` is the time since 1970.
    pub fn new<A: Borrow<Advert>>(adverts: &[A], facts: &Facts, now_ms: u64) -> Self {
        let adverts: Vec<&Advert> = adverts.iter().map(Borrow::borrow).collect();
        let now_s = now_ms / 1000;
        let rtts: HashMap<Peer, Duration> = facts.rtts.iter().copied().collect();
        let connected: HashSet<&Peer> = facts.connected.iter().collect();
        let unreachable: HashSet<&Peer> = facts.unreachable.iter().collect();
        let alone = |entry: &Entry| (entry.peer, entry.until_s.saturating_sub(now_s));
        let alone: HashMap<Peer, u64> = facts.book.iter().map(alone).collect();
        let peer = |advert: &&Advert| PeerView {
            rtt_ms: rtts.get(&advert.peer).copied().map(ms),
            connected: connected.contains(&advert.peer),
            unreachable: unreachable.contains(&advert.peer),
            left_alone_s: alone.get(&advert.peer).copied().unwrap_or(0),
            ..PeerView::new(advert, now_ms)
        };
        let (models, models_left_out) = models(&adverts);
        let failed = facts.book.iter().take(FAILED_MAX);
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            peers: adverts.iter().take(PEERS_MAX).map(peer).collect(),
            peers_left_out: adverts.len().saturating_sub(PEERS_MAX),
            models,
            models_left_out,
            failed: failed.map(|entry| FailedView::new(entry, now_s)).collect(),
            ..Self::default()
        }
    }
}

impl PeerView {
    fn new(advert: &Advert, now_ms: u64) -> Self {
        Self {
            peer: advert.peer.to_string(),
            heard_s_ago: heard_s_ago(advert, now_ms),
            queue: advert.queue,
            uplink_bytes_s: advert.uplink_bytes_s.map(|measured| measured.value),
            uplink_s_ago: advert.uplink_bytes_s.map(|measured| measured.age_s),
            leaving: advert.leaving,
            idle: advert.models.is_empty(),
            ..Self::default()
        }
    }
}

impl FailedView {
    /// What the book says.
    pub fn new(entry: &Entry, now_s: u64) -> Self {
        Self {
            peer: entry.peer.to_string(),
            failures: entry.failures,
            last: printable(&entry.last, WHY_CHARS_MAX),
            s_ago: now_s.saturating_sub(entry.at_s),
            left_alone_s: entry.until_s.saturating_sub(now_s),
        }
    }
}

impl HolderView {
    fn new(peer: Peer, held: &ModelAdvert) -> Self {
        Self {
            peer: peer.to_string(),
            live: spans(&held.live),
            intended: spans(&held.intended),
            layer_tokens_s: held.layer_tokens_s.map(|measured| measured.value),
            measured_s_ago: held.layer_tokens_s.map(|measured| measured.age_s),
            free_cells: held.free_cells,
            n_ctx_max: held.n_ctx_max,
            numerics: format!("{:016x}", held.numerics),
            experts: experts(held),
            island: island(held),
        }
    }
}

/// The experts that a peer computes for the trunks of others.
pub(super) fn experts(held: &ModelAdvert) -> Vec<String> {
    let live = held.experts.iter().flat_map(|experts| &experts.live);
    live.map(ToString::to_string).collect()
}

/// Who computes the experts of a peer's layers.
pub(super) fn island(held: &ModelAdvert) -> Vec<String> {
    let island = held.experts.iter().flat_map(|experts| &experts.island);
    island.map(ToString::to_string).collect()
}

/// A model while it is summed up.
#[derive(Default)]
struct Sum<'a> {
    /// How often each name and number of layers is given.
    claims: HashMap<(u16, &'a str), usize>,
    holders: Vec<(Peer, &'a ModelAdvert)>,
}

/// All that are listed, and how many are not.
fn models(adverts: &[&Advert]) -> (Vec<ModelView>, usize) {
    let mut sums: HashMap<ModelId, Sum<'_>> = HashMap::new();
    for advert in adverts.iter().filter(|advert| !advert.leaving) {
        for held in &advert.models {
            let sum = sums.entry(held.model).or_default();
            *sum.claims.entry((held.n_layer, &held.name)).or_default() += 1;
            sum.holders.push((advert.peer, held));
        }
    }
    let mut sums: Vec<(ModelId, Sum<'_>)> = sums.into_iter().collect();
    // Who invents models has them alone.
    sums.sort_by_key(|(id, sum)| (std::cmp::Reverse(sum.holders.len()), *id));
    let left_out = sums.len().saturating_sub(MODELS_MAX);
    let mut room = HOLDERS_MAX;
    let mut views = Vec::new();
    for (id, sum) in sums.into_iter().take(MODELS_MAX) {
        let view = sum.view(id, room);
        room = room.saturating_sub(view.holders.len());
        views.push(view);
    }
    (views, left_out)
}

impl Sum<'_> {
    fn view(self, id: ModelId, room: usize) -> ModelView {
        let claims = self.claims.into_iter();
        let most =
            claims.max_by_key(|((n_layer, name), n)| (*n, std::cmp::Reverse((*n_layer, *name))));
        let (n_layer, name) = most.map_or((0, ""), |(claim, _)| claim);
        let n_layer = n_layer.min(LAYERS_MAX);
        // Who says that it has another number of layers means another model.
        let mut holders = self.holders;
        holders.retain(|(_, held)| held.n_layer == n_layer);
        let first = |held: &ModelAdvert| {
            let spans = held.live.iter().chain(&held.intended);
            spans.map(|span| (span.start, span.end)).min()
        };
        holders.sort_by_cached_key(|(peer, held)| (first(held), *peer));
        let copies = copies(n_layer, &holders);
        let none = (0..n_layer).zip(&copies).filter(|(_, n)| **n == 0);
        let gaps = LayerRange::merge(none.map(|(layer, _)| LayerRange::one(layer)).collect());
        let shown = holders.iter().take(room);
        ModelView {
            id: id.to_string(),
            name: printable(name, NAME_CHARS_MAX),
            n_layer,
            complete: gaps.is_empty() && n_layer > 0,
            gaps: gaps.iter().map(pair).collect(),
            copies,
            holders_left_out: holders.len().saturating_sub(room),
            holders: shown
                .map(|(peer, held)| HolderView::new(*peer, held))
                .collect(),
        }
    }
}

/// How many serve each layer.
fn copies(n_layer: u16, holders: &[(Peer, &ModelAdvert)]) -> Vec<u32> {
    let mut copies = vec![0; usize::from(n_layer)];
    for (_, held) in holders {
        for span in LayerRange::merge(held.live.clone()) {
            let (start, end) = (usize::from(span.start), usize::from(span.end.min(n_layer)));
            for layer in copies.get_mut(start..end).into_iter().flatten() {
                *layer += 1;
            }
        }
    }
    copies
}

/// As they are listed: merged, so many of them.
pub(super) fn spans(ranges: &[LayerRange]) -> Vec<[u16; 2]> {
    let merged = LayerRange::merge(ranges.to_vec());
    merged.iter().take(SPANS_MAX).map(pair).collect()
}

pub(super) fn pair(range: &LayerRange) -> [u16; 2] {
    [range.start, range.end]
}

/// An advert's sequence number is the time it was made; a clock that runs ahead counts as now.
pub(super) fn heard_s_ago(advert: &Advert, now_ms: u64) -> f64 {
    let ms = now_ms.saturating_sub(advert.seq);
    (ms / 100) as f64 / 10.0
}

/// Milliseconds, to the microsecond.
pub(super) fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests;
