//! The route planner: the cheapest way through all layers, by what the adverts say. Pure; the same
//! input gives the same route.
//!
//! ```text
//! boundary 0      1      2      …      n_layer
//! peer A   ●──────●──────●                       ──▶ compute one more layer here
//! peer B          ●──────●──────●                 ↘  hand over: delay + frame/bandwidth + queue
//! peer C                 ●──────●───── … ──●──▶ client
//! ```
//!
//! A state is (boundary, peer that computed the layer before it); layer by layer each holder takes
//! the cheaper of going on and being handed the rows. Round trips between most pairs are unknown and
//! estimated as a sum of one term for each side, so that one sorted list of givers serves all takers
//! and only known pairs are looked at one by one. A peer may appear more than once in a route.
//!
//! No peer gets more layers than it has room for, as long as a route like that is found; where none is
//! (adverts are some seconds old) the hops themselves say whether they are full.

use std::{collections::HashMap, fmt::Write as _, time::Duration};

use swarm_proto::{Advert, Hop, LayerRange, ModelAdvert, ModelId, Peer, session};

mod reasons;
mod search;
mod standby;

pub use self::reasons::{NoStandby, Other, Parts, Priced, WhyNot, others, price, why_no_standby};
use self::search::search;
pub use self::standby::standbys;
use crate::adverts::Snapshot;

/// What a hop costs beyond compute and wire (waking up, copying): the budget of the session code.
const HOP_NS: u64 = 80_000;
/// Half of a round trip to a peer that was never measured: somewhere on the same continent.
const HALF_RTT_UNKNOWN_NS: u64 = 10_000_000;
/// Uplink of a peer that did not measure it, in bytes a second: a home's.
const UPLINK_UNKNOWN: f64 = 2.5e6;
/// Layers a second of a peer that did not measure it: a slow one's, so that measured peers win.
const LAYER_TOKENS_UNKNOWN: f64 = 200.0;
/// Compute counts for more than its measured time: a machine under load is slower than idle.
const COMPUTE_WEIGHT: f64 = 1.5;
/// What a hop must save to be worth it, as a share of the cheapest route's time.
const HOP_SHARE: f64 = 0.03;
/// Draws of the jitter that may each ask for more hops before the cheapest route is taken.
const DRAWS_MAX: u64 = 8;
/// Holders of a layer that are looked at: the best by themselves. Where a layer has no more than that
/// the route is the cheapest there is.
const HOLDERS_MAX: usize = 32;
/// Larger than any real cost, small enough to add up.
const COST_MAX: u64 = 1 << 50;

/// What is asked of the planner.
#[derive(Debug, Clone)]
pub struct Query<'a> {
    /// The model.
    pub model: ModelId,
    /// Its layers.
    pub n_layer: u16,
    /// Bytes of one row between hops.
    pub frame_bytes: u64,
    /// Bytes of one answer from the tail.
    pub reply_bytes: u64,
    /// Context the session will ask for; 0 when it is not known.
    pub n_ctx: u32,
    /// Peers not to use.
    pub avoid: &'a [Peer],
    /// When given, only these.
    pub allow: Option<&'a [Peer]>,
    /// Round trips measured from here, in µs.
    pub rtts: &'a [(Peer, u32)],
    /// Makes each peer's compute dearer by a factor of 1 to `1 + jitter`, so that clients with the same
    /// view do not all choose the same route. 0: none. Alone it buys hops too: see [`spread`].
    pub jitter: f32,
    /// What the jitter is drawn from.
    pub seed: u64,
    /// What a hop costs beyond its known price.
    pub hop_extra: Duration,
}

impl<'a> Query<'a> {
    /// A query without wishes.
    pub fn new(model: ModelId, n_layer: u16) -> Query<'a> {
        Query {
            model,
            n_layer,
            frame_bytes: 16 * 1024,
            reply_bytes: 2 * 1024,
            n_ctx: 0,
            avoid: &[],
            allow: None,
            rtts: &[],
            jitter: 0.0,
            seed: 0,
            hop_extra: Duration::ZERO,
        }
    }
}

/// A way through all layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// In order; their layers cover the model exactly once.
    pub hops: Vec<Hop>,
    /// Estimated time of one token, from the client back to the client.
    pub estimate: Duration,
}

/// Why there is no route.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.text())]
pub struct NoRoute {
    /// Layers that no usable peer serves.
    pub missing: Vec<LayerRange>,
    /// Of these, layers that peers serve who may not be used (avoided, or not allowed).
    pub excluded: Vec<LayerRange>,
    /// Of these, layers that peers serve who have no room for the context.
    pub full: Vec<LayerRange>,
    /// Peers who serve some layer of the model.
    pub n_peers: usize,
}

impl NoRoute {
    fn text(&self) -> String {
        let list = |ranges: &[LayerRange]| {
            let texts: Vec<_> = ranges.iter().map(ToString::to_string).collect();
            texts.join(", ")
        };
        if self.n_peers == 0 {
            return "no peer serves any layer of this model; start a node with it, or wait for adverts".into();
        }
        let mut text = format!("no usable peer serves layers {}", list(&self.missing));
        if !self.excluded.is_empty() {
            let _ = write!(
                text,
                "; peers that may not be used serve {}",
                list(&self.excluded)
            );
        }
        if !self.full.is_empty() {
            let _ = write!(
                text,
                "; peers without room for this context serve {}",
                list(&self.full)
            );
        }
        let _ = write!(text, " ({} peers serve others of its layers)", self.n_peers);
        text
    }
}

/// Plans the cheapest route whose peers have room for their layers; where none is found, the cheapest.
///
/// # Errors
/// Some layer has no usable holder; says which.
pub fn plan(snapshot: &Snapshot, query: &Query) -> Result<Route, NoRoute> {
    let table = Table::new(snapshot, query);
    let missing = table.missing(query.n_layer, |_| true);
    if !missing.is_empty() || query.n_layer == 0 {
        return Err(explain(snapshot, query, missing));
    }
    let found = search(&table, query, |peer| peer.room)
        .or_else(|| search(&table, query, |_| usize::MAX))
        .ok_or_else(|| explain(snapshot, query, missing))?;
    let hops = found.hops.into_iter();
    Ok(Route {
        hops: hops.map(|(peer, layers)| table.hop(peer, layers)).collect(),
        estimate: Duration::from_nanos(found.ns),
    })
}

/// Plans one of the routes that are about as cheap as the cheapest, drawn from the query's jitter and
/// seed. It has no more hops than the cheapest, and that one has a hop more only where it saves a few
/// percent: what is estimated finer than that is noise, and a hop is one more peer to fail.
///
/// # Errors
/// As [`plan`].
pub fn spread(snapshot: &Snapshot, query: &Query) -> Result<Route, NoRoute> {
    let calm = Query {
        jitter: 0.0,
        ..query.clone()
    };
    let least = plan(snapshot, &calm)?.estimate;
    let hop_extra = query.hop_extra + least.mul_f64(HOP_SHARE);
    let priced = |route: Route| Route {
        estimate: estimate(snapshot, &calm, &route.hops).unwrap_or(route.estimate),
        ..route
    };
    let best = Query {
        hop_extra,
        ..calm.clone()
    };
    let best = plan(snapshot, &best)?;
    for draw in 0..DRAWS_MAX {
        let drawn = Query {
            hop_extra,
            seed: query.seed.wrapping_add(draw),
            ..query.clone()
        };
        let route = plan(snapshot, &drawn)?;
        if route.hops.len() <= best.hops.len() {
            return Ok(priced(route));
        }
    }
    Ok(priced(best))
}

/// What the planner would say that a given route costs; `None` when it uses a peer or layer that it
/// would not.
pub fn estimate(snapshot: &Snapshot, query: &Query, hops: &[Hop]) -> Option<Duration> {
    let table = Table::new(snapshot, query);
    let route = table.find(hops).filter(|route| !route.is_empty())?;
    Some(Duration::from_nanos(table.cost(&route)))
}

/// A peer as the planner sees it.
struct Usable<'a> {
    advert: &'a Advert,
    live: Vec<LayerRange>,
    /// Layers of this session that it has room for.
    room: usize,
    /// One layer of one row.
    layer_ns: u64,
    /// Its share of a delay that was not measured.
    half_ns: u64,
    /// Sending a frame.
    send_ns: u64,
    /// Waking up and waiting in its queue.
    enter_ns: u64,
    /// Of that, its queue.
    queued_ns: u64,
    /// From it back to the client.
    exit_ns: u64,
    /// One-way delays to other usable peers that are known: (index, ns), by index.
    known: Vec<(usize, u64)>,
}

impl Usable<'_> {
    fn holds(&self, layer: u16) -> bool {
        self.live.iter().any(|span| span.contains(layer))
    }
}

struct Table<'a> {
    peers: Vec<Usable<'a>>,
    /// For each layer who holds it.
    holders: Vec<Vec<usize>>,
}

impl<'a> Table<'a> {
    /// The holders that are looked at in a search.
    fn new(snapshot: &'a Snapshot, query: &Query) -> Table<'a> {
        let peers = shortlist(Self::usable(snapshot, query), query.n_layer);
        Self::of(peers, query)
    }

    /// All of them.
    fn whole(snapshot: &'a Snapshot, query: &Query) -> Table<'a> {
        Self::of(Self::usable(snapshot, query), query)
    }

    fn usable(snapshot: &'a Snapshot, query: &Query) -> Vec<Usable<'a>> {
        let rtts: HashMap<Peer, u32> = query.rtts.iter().copied().collect();
        let mut peers: Vec<Usable> = Vec::new();
        for advert in &snapshot.adverts {
            let Some(model) = claim(advert, query) else {
                continue;
            };
            let room = room(model, query);
            if usable(advert, query) && room > 0 {
                peers.push(weigh(advert, model, room, query, &rtts));
            }
        }
        peers
    }

    fn of(mut peers: Vec<Usable<'a>>, query: &Query) -> Table<'a> {
        let known = known_delays(&peers);
        for (peer, mut known) in peers.iter_mut().zip(known) {
            // Both ends may have measured: the smaller one is nearer to the wire.
            known.sort_unstable();
            known.dedup_by_key(|(j, _)| *j);
            peer.known = known;
        }
        let holders = holders(&peers, query.n_layer);
        Table { peers, holders }
    }

    fn missing(&self, n_layer: u16, only: impl Fn(u16) -> bool) -> Vec<LayerRange> {
        let empty = (0..n_layer).filter(|l| self.holders[usize::from(*l)].is_empty() && only(*l));
        LayerRange::merge(
            empty
                .map(|l| LayerRange {
                    start: l,
                    end: l + 1,
                })
                .collect(),
        )
    }

    /// One frame from one peer to another.
    fn link(&self, from: usize, to: usize) -> u64 {
        let (giver, taker) = (&self.peers[from], &self.peers[to]);
        let known = taker.known.binary_search_by_key(&from, |(i, _)| *i);
        let delay = match known {
            Ok(at) => taker.known[at].1,
            Err(_) => giver.half_ns + taker.half_ns,
        };
        giver.send_ns + delay
    }

    fn hop(&self, peer: usize, layers: LayerRange) -> Hop {
        let advert = self.peers[peer].advert;
        let fits = advert
            .addrs
            .iter()
            .filter(|addr| addr.len() <= session::ADDR_BYTES_MAX);
        Hop {
            peer: advert.peer,
            addrs: fits.take(session::HOP_ADDRS_MAX).cloned().collect(),
            layers,
        }
    }
}

/// For each layer the indices of those who hold it.
fn holders(peers: &[Usable], n_layer: u16) -> Vec<Vec<usize>> {
    let mut holders = vec![Vec::new(); n_layer.into()];
    for (i, peer) in peers.iter().enumerate() {
        for layer in peer.live.iter().flat_map(LayerRange::layers) {
            if let Some(holders) = holders.get_mut(usize::from(layer)) {
                holders.push(i);
            }
        }
    }
    holders
}

/// Keeps the peers that are among the best holders of some layer.
fn shortlist<'a>(peers: Vec<Usable<'a>>, n_layer: u16) -> Vec<Usable<'a>> {
    let score = |peer: &Usable| {
        let n_live: u64 = peer.live.iter().map(|span| u64::from(span.len())).sum();
        let per_hop = peer.half_ns + peer.enter_ns + peer.send_ns;
        peer.layer_ns + per_hop / n_live.min(peer.room as u64).max(1)
    };
    let scores: Vec<u64> = peers.iter().map(score).collect();
    let mut keep = vec![false; peers.len()];
    for mut layer in holders(&peers, n_layer) {
        if layer.len() > HOLDERS_MAX {
            layer.select_nth_unstable_by_key(HOLDERS_MAX, |i| (scores[*i], *i));
            layer.truncate(HOLDERS_MAX);
        }
        layer.into_iter().for_each(|i| keep[i] = true);
    }
    let kept = peers.into_iter().zip(keep).filter(|(_, keep)| *keep);
    kept.map(|(peer, _)| peer).collect()
}

/// For each peer the delays that it or the other end measured.
fn known_delays(peers: &[Usable]) -> Vec<Vec<(usize, u64)>> {
    let index = peers
        .iter()
        .enumerate()
        .map(|(i, peer)| (peer.advert.peer, i));
    let index: HashMap<Peer, usize> = index.collect();
    let mut known: Vec<Vec<(usize, u64)>> = vec![Vec::new(); peers.len()];
    for (i, peer) in peers.iter().enumerate() {
        for (other, rtt_us) in &peer.advert.rtts {
            if let Some(&j) = index.get(other).filter(|j| **j != i) {
                let ns = half(*rtt_us);
                known[i].push((j, ns));
                known[j].push((i, ns));
            }
        }
    }
    known
}

fn claim<'a>(advert: &'a Advert, query: &Query) -> Option<&'a ModelAdvert> {
    let mut models = advert.models.iter();
    models.find(|model| model.model == query.model && model.n_layer == query.n_layer)
}

fn usable(advert: &Advert, query: &Query) -> bool {
    !advert.leaving
        && !query.avoid.contains(&advert.peer)
        && query.allow.is_none_or(|allow| allow.contains(&advert.peer))
}

/// Layers of the session that a peer has room for; 0: not to be used.
fn room(model: &ModelAdvert, query: &Query) -> usize {
    if query.n_ctx == 0 {
        return usize::MAX;
    }
    usize::try_from(model.room(query.n_ctx)).unwrap_or(usize::MAX)
}

fn half(rtt_us: u32) -> u64 {
    u64::from(rtt_us) * 500
}

/// Whole ns; a figure that is absurd counts as the worst that can be added up.
fn ns(seconds: f64) -> u64 {
    ((seconds * 1e9) as u64).min(COST_MAX >> 16)
}

fn weigh<'a>(
    advert: &'a Advert,
    model: &ModelAdvert,
    room: usize,
    query: &Query,
    rtts: &HashMap<Peer, u32>,
) -> Usable<'a> {
    let live = LayerRange::merge(model.live.clone());
    let speed = model
        .layer_tokens_s
        .map_or(LAYER_TOKENS_UNKNOWN, |m| m.value.into());
    let uplink = advert
        .uplink_bytes_s
        .map_or(UPLINK_UNKNOWN, |m| m.value.into());
    let jitter = f64::from(query.jitter.max(0.0));
    let dearer = if jitter > 0.0 {
        1.0 + jitter * draw(query.seed, &advert.peer)
    } else {
        1.0
    };
    let layer_ns = ns(COMPUTE_WEIGHT * dearer / speed.max(1e-3)).max(1);
    let half_ns = rtts
        .get(&advert.peer)
        .map_or(HALF_RTT_UNKNOWN_NS, |rtt| half(*rtt));
    let send = |bytes: u64| ns(bytes as f64 / uplink.max(1.0));
    let n_live: u64 = live.iter().map(|span| u64::from(span.len())).sum();
    let queued = layer_ns
        .saturating_mul(n_live)
        .saturating_mul(advert.queue.into())
        .min(COST_MAX >> 16);
    let hop_extra = u64::try_from(query.hop_extra.as_nanos()).unwrap_or(u64::MAX);
    Usable {
        advert,
        room,
        layer_ns,
        half_ns,
        send_ns: send(query.frame_bytes),
        enter_ns: HOP_NS + hop_extra.min(COST_MAX >> 16) + queued,
        queued_ns: queued,
        exit_ns: half_ns + send(query.reply_bytes),
        known: Vec::new(),
        live,
    }
}

/// A number in 0 to 1 from a seed and a peer.
fn draw(seed: u64, peer: &Peer) -> f64 {
    let mut bytes = [0; 40];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..].copy_from_slice(&peer.0);
    let hash = blake3::hash(&bytes);
    let word = hash
        .as_bytes()
        .first_chunk()
        .map_or(0, |word| u32::from_le_bytes(*word));
    f64::from(word) / f64::from(u32::MAX)
}

fn explain(snapshot: &Snapshot, query: &Query, missing: Vec<LayerRange>) -> NoRoute {
    let wanted = |layer: u16| missing.iter().any(|range| range.contains(layer));
    let served = |pick: &dyn Fn(&Advert, &ModelAdvert) -> bool| {
        let adverts = snapshot.adverts.iter();
        let claims = adverts.filter_map(|advert| Some((&**advert, claim(advert, query)?)));
        let layers = claims
            .filter(|(a, m)| pick(a, m))
            .flat_map(|(_, m)| m.live.clone());
        let single = layers
            .flat_map(|range| range.layers())
            .filter(|layer| wanted(*layer));
        LayerRange::merge(
            single
                .map(|l| LayerRange {
                    start: l,
                    end: l.saturating_add(1),
                })
                .collect(),
        )
    };
    let holds =
        |advert: &&std::sync::Arc<Advert>| claim(advert, query).is_some_and(|m| !m.live.is_empty());
    NoRoute {
        excluded: served(&|advert, _| !usable(advert, query)),
        full: served(&|advert, model| usable(advert, query) && room(model, query) == 0),
        n_peers: snapshot.adverts.iter().filter(holds).count(),
        missing,
    }
}
