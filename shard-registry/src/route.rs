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

use std::{fmt::Write as _, time::Duration};

use swarm_proto::{Advert, Hop, LayerRange, ModelAdvert, ModelId, Peer};

mod bound;
mod crowd;
mod index;
pub(crate) mod links;
mod reasons;
#[cfg(test)]
mod reference;
mod rooms;
mod search;
mod seen;
mod standby;
mod sweep;
mod table;
#[cfg(test)]
mod tests;

pub use self::reasons::{NoStandby, Other, Parts, Priced, WhyNot, others, price, why_no_standby};
pub use self::seen::{Doubt, doubts, seen_at_least};
pub use self::standby::standbys;
use self::{
    search::Search,
    table::{Table, claim, room, usable},
};
use crate::adverts::Snapshot;

/// What a hop costs beyond compute and wire (waking up, copying): the budget of the session code.
const HOP_NS: u64 = 80_000;
/// Half of a round trip to a peer that was never measured: somewhere on the same continent.
const HALF_RTT_UNKNOWN_NS: u64 = 10_000_000;
/// A round trip that nobody measured.
pub(crate) const RTT_UNKNOWN: Duration = Duration::from_nanos(2 * HALF_RTT_UNKNOWN_NS);
/// How much faster than it was seen to be a peer is believed to be: what is seen includes waiting and the
/// network.
pub const SEEN_FACTOR: f32 = 2.0;
/// What a hop must save to be worth it, as a share of the cheapest route's time.
const HOP_SHARE: f64 = 0.03;
/// Draws of the jitter that may each ask for more hops before the cheapest route is taken.
const DRAWS_MAX: u64 = 8;
/// Holders of a layer, the best by themselves, among whom the jitter draws.
const DRAWN_AMONG: usize = 32;

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
    /// Layer-tokens a second that the client saw of peers itself: a claim counts up to a little more.
    pub seen: &'a [(Peer, f32)],
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
            seen: &[],
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
    let table = table(snapshot, query)?;
    let found = Search::new(&table, snapshot, query).run(&table.prices);
    let found = found.ok_or_else(|| explain(snapshot, query, Vec::new()))?;
    Ok(table.route(&found.hops, found.ns))
}

/// Plans one of the routes that are about as cheap as the cheapest, drawn from the query's jitter and
/// seed. It has no more hops than the cheapest, and that one has a hop more only where it saves a few
/// percent: what is estimated finer than that is noise, and a hop is one more peer to fail.
///
/// # Errors
/// As [`plan`].
pub fn spread(snapshot: &Snapshot, query: &Query) -> Result<Route, NoRoute> {
    let table = table(snapshot, query)?;
    let mut search = Search::new(&table, snapshot, query);
    let none = || explain(snapshot, query, Vec::new());
    let calm = Query {
        jitter: 0.0,
        ..query.clone()
    };
    let prices = table.prices_by(&calm);
    let mut some = search.best(&prices, DRAWN_AMONG);
    // What the cheapest costs, near enough for a share of it.
    let about = search.among(&prices, &some);
    let about = about.or_else(|| search.run(&prices)).ok_or_else(none)?;
    let least = Duration::from_nanos(about.ns);
    let hop_extra = query.hop_extra + least.mul_f64(HOP_SHARE);
    let best = Query {
        hop_extra,
        ..calm.clone()
    };
    let mut chosen = search.run(&table.prices_by(&best)).ok_or_else(none)?;
    for (peer, _) in &chosen.hops {
        some[*peer] = true;
    }
    for draw in 0..DRAWS_MAX {
        let drawn = Query {
            hop_extra,
            seed: query.seed.wrapping_add(draw),
            ..query.clone()
        };
        let found = search
            .among(&table.prices_by(&drawn), &some)
            .ok_or_else(none)?;
        if found.hops.len() <= chosen.hops.len() {
            chosen = found;
            break;
        }
    }
    let ns = table.cost(&chosen.hops, &prices);
    Ok(table.route(&chosen.hops, ns))
}

/// What the planner would say that a given route costs; `None` when it uses a peer or layer that it
/// would not.
pub fn estimate(snapshot: &Snapshot, query: &Query, hops: &[Hop]) -> Option<Duration> {
    let table = Table::of(snapshot, query);
    let route = table.find(hops).filter(|route| !route.is_empty())?;
    let ns = table.cost(&route, &table.prices);
    Some(Duration::from_nanos(ns))
}

/// The holders to search among, of every layer at least one.
fn table<'a>(snapshot: &'a Snapshot, query: &Query) -> Result<Table<'a>, NoRoute> {
    let table = Table::of(snapshot, query);
    let missing = table.missing(query.n_layer);
    if missing.is_empty() && query.n_layer > 0 {
        Ok(table)
    } else {
        Err(explain(snapshot, query, missing))
    }
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
