//! What the planner knows of everybody who may be used, in the form that a search reads.
//!
//! ```text
//! adverts ─▶ usable ─▶ prices (of one search)
//!        └─▶ servers ─▶ links (kept from one plan to the next)
//! ```

use std::{borrow::Cow, time::Duration};

use swarm_proto::{Advert, Hop, LayerRange, ModelAdvert, Peer, session};

use super::{HALF_RTT_UNKNOWN_NS, HOP_NS, Query, Route, SEEN_FACTOR, index::Index, links::Server};
use crate::adverts::Snapshot;

/// Uplink of a peer that did not measure it, in bytes a second: a home's.
const UPLINK_UNKNOWN: f64 = 2.5e6;
/// Layers a second of a peer that did not measure it: a slow one's, so that measured peers win.
const LAYER_TOKENS_UNKNOWN: f64 = 200.0;
/// Compute counts for more than its measured time: a machine under load is slower than idle.
pub(super) const COMPUTE_WEIGHT: f64 = 1.5;
/// Larger than any real cost, small enough to add up.
const COST_MAX: u64 = 1 << 50;
/// The largest part of one: so many can be added up.
const PART_MAX: u64 = COST_MAX >> 18;

/// A peer as the planner sees it.
pub(super) struct Usable<'a> {
    pub(super) advert: &'a Advert,
    pub(super) model: &'a ModelAdvert,
    /// What it serves: sorted, apart from each other.
    pub(super) live: Cow<'a, [LayerRange]>,
    /// How many layers that is.
    pub(super) n_live: u64,
    /// Layers of this session that it has room for.
    pub(super) room: usize,
    /// One layer of one row.
    layer_ns: u64,
    /// Its share of a delay that was not measured.
    pub(super) half_ns: u64,
    /// Sending a frame.
    pub(super) send_ns: u64,
    /// From it back to the client.
    pub(super) exit_ns: u64,
}

/// What a peer's work costs in one search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Price {
    /// One layer of one row.
    pub(super) layer_ns: u64,
    /// Waking up and waiting in its queue.
    pub(super) enter_ns: u64,
    /// Of that, its queue.
    pub(super) queued_ns: u64,
}

pub(super) struct Table<'a> {
    pub(super) peers: Vec<Usable<'a>>,
    /// What everybody's work costs.
    pub(super) prices: Vec<Price>,
}

impl<'a> Table<'a> {
    pub(super) fn of(snapshot: &'a Snapshot, query: &Query) -> Table<'a> {
        let peers = usable_peers(snapshot, query, |_| true);
        Table {
            prices: peers.iter().map(|peer| peer.price(query)).collect(),
            peers,
        }
    }

    pub(super) fn missing(&self, n_layer: u16) -> Vec<LayerRange> {
        // Who begins to hold layers at each boundary, less those who do not any more.
        let mut change = vec![0i64; usize::from(n_layer) + 1];
        for span in self.peers.iter().flat_map(|peer| peer.live.iter()) {
            if let Some(begin) = change.get_mut(usize::from(span.start)) {
                *begin += 1;
                change[usize::from(span.end.min(n_layer))] -= 1;
            }
        }
        let mut holders = 0;
        let empty = (0..n_layer).zip(change).filter(|(_, change)| {
            holders += change;
            holders == 0
        });
        LayerRange::merge(empty.map(|(layer, _)| LayerRange::one(layer)).collect())
    }

    /// The smallest delay between two peers that either of them measured.
    pub(super) fn measured(&self, giver: usize, taker: usize) -> Option<u64> {
        let [giver, taker] = [giver, taker].map(|at| self.peers[at].advert);
        let of = |one: &'a Advert, other: &'a Advert| {
            let rtts = one.rtts.iter().filter(|(peer, _)| *peer == other.peer);
            rtts.map(|(_, rtt_us)| half(*rtt_us))
        };
        let both = of(giver, taker).chain(of(taker, giver));
        both.min().filter(|_| giver.peer != taker.peer)
    }

    /// One frame from one peer to another.
    pub(super) fn link(&self, from: usize, to: usize) -> u64 {
        let (giver, taker) = (&self.peers[from], &self.peers[to]);
        let measured = self.measured(from, to);
        giver.send_ns + measured.unwrap_or(giver.half_ns + taker.half_ns)
    }

    /// What everybody's work costs by the jitter and the price of a hop that another query names.
    pub(super) fn prices_by(&self, query: &Query) -> Vec<Price> {
        self.peers.iter().map(|peer| peer.price(query)).collect()
    }

    pub(super) fn route(&self, hops: &[(usize, LayerRange)], ns: u64) -> Route {
        let hops = hops
            .iter()
            .map(|(peer, layers)| self.peers[*peer].hop(*layers));
        Route {
            hops: hops.collect(),
            estimate: Duration::from_nanos(ns),
        }
    }

    /// A route by this table's own numbers of its peers; `None` when one is not here or does not hold its
    /// layers.
    pub(super) fn find(&self, hops: &[Hop]) -> Option<Vec<(usize, LayerRange)>> {
        let found = hops.iter().map(|hop| {
            let mut peers = self.peers.iter();
            let at = peers.position(|peer| peer.advert.peer == hop.peer)?;
            let held = self.peers[at].holds(hop.layers);
            held.then_some((at, hop.layers))
        });
        found.collect()
    }

    /// One token along a route, in ns.
    pub(super) fn cost(&self, route: &[(usize, LayerRange)], prices: &[Price]) -> u64 {
        let mut ns = 0;
        let mut last: Option<usize> = None;
        for &(at, layers) in route {
            let price = &prices[at];
            let link = last.map_or(self.peers[at].half_ns, |from| self.link(from, at));
            ns += link + price.enter_ns + price.layer_ns * u64::from(layers.len());
            last = Some(at);
        }
        ns + last.map_or(0, |at| self.peers[at].exit_ns)
    }
}

impl Usable<'_> {
    pub(super) fn holds(&self, layers: LayerRange) -> bool {
        let mut live = self.live.iter();
        live.any(|span| span.start <= layers.start && layers.end <= span.end)
    }

    pub(super) fn hop(&self, layers: LayerRange) -> Hop {
        let fits = |addr: &&String| addr.len() <= session::ADDR_BYTES_MAX;
        let addrs = self.advert.addrs.iter().filter(fits);
        Hop {
            peer: self.advert.peer,
            addrs: addrs.take(session::HOP_ADDRS_MAX).cloned().collect(),
            layers,
        }
    }

    pub(super) fn price(&self, query: &Query) -> Price {
        let layer_ns = if query.jitter > 0.0 {
            let dearer = 1.0 + f64::from(query.jitter) * draw(query.seed, &self.advert.peer);
            ((self.layer_ns as f64 * dearer) as u64).min(PART_MAX)
        } else {
            self.layer_ns
        };
        let queued_ns = layer_ns
            .saturating_mul(self.n_live)
            .saturating_mul(self.advert.queue.into())
            .min(PART_MAX);
        let hop_extra = u64::try_from(query.hop_extra.as_nanos()).unwrap_or(u64::MAX);
        Price {
            layer_ns,
            enter_ns: HOP_NS + hop_extra.min(PART_MAX) + queued_ns,
            queued_ns,
        }
    }

    /// Where the layers begin and end that it serves.
    pub(super) fn extent(&self) -> LayerRange {
        LayerRange {
            start: self.live.first().map_or(0, |span| span.start),
            end: self.live.last().map_or(0, |span| span.end),
        }
    }
}

/// Everybody who serves layers of the model, may be used and has some room, as far as they are asked for.
pub(super) fn usable_peers<'a>(
    snapshot: &'a Snapshot,
    query: &Query,
    wanted: impl Fn(&ModelAdvert) -> bool,
) -> Vec<Usable<'a>> {
    let rtts = Index::of(query.rtts.iter().map(|(peer, _)| peer));
    let seen = Index::of(query.seen.iter().map(|(peer, _)| peer));
    let mut peers: Vec<Usable> = Vec::with_capacity(snapshot.adverts.len());
    for advert in &snapshot.adverts {
        let Some(model) = claim(advert, query) else {
            continue;
        };
        let room = room(model, query);
        if !model.live.is_empty() && room > 0 && wanted(model) && usable(advert, query) {
            let rtt = rtts.find(&advert.peer).map(|at| query.rtts[at].1);
            let seen = seen.find(&advert.peer).map(|at| query.seen[at].1);
            peers.push(weigh(advert, model, room, query, rtt, seen));
        }
    }
    peers
}

fn weigh<'a>(
    advert: &'a Advert,
    model: &'a ModelAdvert,
    room: usize,
    query: &Query,
    rtt_us: Option<u32>,
    seen: Option<f32>,
) -> Usable<'a> {
    let live = if apart(&model.live) {
        Cow::Borrowed(&model.live[..])
    } else {
        Cow::Owned(LayerRange::merge(model.live.clone()))
    };
    let speed = believed(model, seen).unwrap_or(LAYER_TOKENS_UNKNOWN);
    let uplink = advert
        .uplink_bytes_s
        .map_or(UPLINK_UNKNOWN, |m| m.value.into());
    let half_ns = rtt_us.map_or(HALF_RTT_UNKNOWN_NS, half);
    let send = |bytes: u64| ns(bytes as f64 / uplink.max(1.0));
    Usable {
        advert,
        model,
        n_live: live.iter().map(|span| u64::from(span.len())).sum(),
        live,
        room,
        layer_ns: ns(COMPUTE_WEIGHT / speed.max(1e-3)).max(1),
        half_ns,
        send_ns: send(query.frame_bytes),
        exit_ns: half_ns + send(query.reply_bytes),
    }
}

/// Layer-tokens a second that are counted: what is claimed, up to a little more than what was seen.
pub(super) fn believed(model: &ModelAdvert, seen: Option<f32>) -> Option<f64> {
    let claimed = model.layer_tokens_s.map(|measured| measured.value);
    let most = seen.map(|seen| seen * SEEN_FACTOR);
    let counted = match (claimed, most) {
        (Some(claimed), Some(most)) => Some(claimed.min(most)),
        (Some(claimed), None) => Some(claimed),
        // Who claims nothing is as fast as it was.
        (None, _) => seen,
    };
    counted.map(f64::from)
}

/// Everybody who says that it serves layers of the model, sorted by peer.
pub(super) fn servers<'a>(snapshot: &'a Snapshot, query: &Query) -> Vec<Server<'a>> {
    let server = |advert: &'a std::sync::Arc<Advert>| {
        let live = &claim(advert, query)?.live;
        let start = live.iter().map(|span| span.start).min()?;
        let end = live.iter().map(|span| span.end).max()?;
        let extent = LayerRange { start, end };
        Some(Server { advert, extent })
    };
    snapshot.adverts.iter().filter_map(server).collect()
}

/// Whether spans are as [`LayerRange::merge`] leaves them.
fn apart(spans: &[LayerRange]) -> bool {
    let empty = spans.iter().any(LayerRange::is_empty);
    !empty && spans.windows(2).all(|two| two[0].end < two[1].start)
}

pub(super) fn claim<'a>(advert: &'a Advert, query: &Query) -> Option<&'a ModelAdvert> {
    let mut models = advert.models.iter();
    models.find(|model| model.model == query.model && model.n_layer == query.n_layer)
}

pub(super) fn usable(advert: &Advert, query: &Query) -> bool {
    !advert.leaving
        && !query.avoid.contains(&advert.peer)
        && query.allow.is_none_or(|allow| allow.contains(&advert.peer))
}

/// Layers of the session that a peer has room for; 0: not to be used.
pub(super) fn room(model: &ModelAdvert, query: &Query) -> usize {
    if query.n_ctx == 0 {
        return usize::MAX;
    }
    usize::try_from(model.room(query.n_ctx)).unwrap_or(usize::MAX)
}

/// Of a round trip that is all that can be known of one way.
pub(super) fn half(rtt_us: u32) -> u64 {
    u64::from(rtt_us) * 500
}

/// Whole ns; a figure that is absurd counts as the worst that can be added up.
fn ns(seconds: f64) -> u64 {
    ((seconds * 1e9) as u64).min(PART_MAX)
}

/// A number in 0 to 1 from a seed and a peer, whose key is as good as random; who does not know the seed
/// cannot make a key that is drawn well.
fn draw(seed: u64, peer: &Peer) -> f64 {
    let key = peer
        .0
        .first_chunk()
        .map_or(0, |key| u64::from_le_bytes(*key));
    let word = scramble(scramble(seed) ^ key);
    (word >> 32) as f64 / f64::from(u32::MAX)
}

/// The last step of SplitMix64.
pub(super) fn scramble(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}
