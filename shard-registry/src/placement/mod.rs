//! Who should hold which layers: pure functions of a snapshot of adverts. No clock, no chance.
//!
//! ```text
//! Snapshot ─▶ Holdings ─▶ join::choose ─▶ a window           a node that comes
//!                │   └──▶ join::scarcest ─▶ one layer        what it loads next
//!                ├──────▶ plan::plan ─▶ moves, by rank       who goes elsewhere, in a swarm of a home
//!                │         plan::local ─▶ a window           the same in a large one, each for itself
//!                └──────▶ slide::step ─▶ load or drop        how a node gets to its window
//!          ExpertHoldings ─▶ choose ─▶ next ─▶ load or swap   a node that holds experts of a mixture
//! throughput: what any of this is worth
//! ```
//!
//! The same snapshot gives the same result on every node and every kind of machine: peers are looked
//! at in the order of their ids, ties are drawn from hashes of ids, and only `+ - × ÷` of `f64` are
//! used, which round alike everywhere. Nothing here loads, sends or waits.

use std::{collections::HashSet, ops::Range, time::Duration};

use swarm_proto::{LayerRange, ModelAdvert, ModelId, Peer};

use crate::adverts::Snapshot;

mod draw;
pub mod experts;
pub mod join;
pub mod plan;
pub mod slide;
pub mod throughput;

/// Layer-tokens a second of a peer of whom nobody of the model's peers knows the speed.
const LAYER_TOKENS_UNKNOWN: f64 = 1.0;
/// Most layers of a model that is placed; more are not looked at. Real models have up to 130.
pub const LAYERS_MAX: usize = 4096;

/// A round trip within one part of a continent: what fails together is mostly within it.
const NEAR_RTT: Duration = Duration::from_millis(30);

/// What placement needs to know of a model.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// Its id.
    pub model: ModelId,
    /// Bytes of each layer's weights, without embedding and head.
    pub layer_bytes: &'a [u64],
    /// Bytes of one row between hops: what an uplink is divided by.
    pub frame_bytes: u64,
}

/// A peer that holds layers of the model, or is about to.
#[derive(Debug, Clone, PartialEq)]
pub struct Holder {
    /// Who.
    pub peer: Peer,
    /// Rows a second through one layer.
    pub layer_tokens_s: f64,
    /// Rows a second that its uplink carries.
    pub rows_s: f64,
    /// Layers served now, in order.
    pub live: Vec<u16>,
    /// Its window, in order: the layers it serves once it has done what it intends. While it slides
    /// some of them are not live yet, and some are live that will go.
    pub held: Vec<u16>,
    /// Most bytes that its layers may take; none where they stay what they are.
    pub layer_bytes_max: Option<u64>,
}

/// Who holds what of one model, and how fast they are: what a snapshot says of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Holdings {
    /// Layers of the model.
    pub n_layer: usize,
    /// In the order of their ids.
    pub holders: Vec<Holder>,
}

/// Which layers of a holder count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    /// Those that are served now.
    Live,
    /// Those that are about to be.
    Held,
}

impl Holdings {
    /// What a snapshot says of a model. Who has not measured itself counts as the median of those who
    /// have (one layer-token a second where nobody has, an uplink without bound), so that a node that
    /// has only announced itself is not overlooked. What a peer intends is the whole of its window; one
    /// that intends nothing stays with what it serves. Who says that the model has another number of
    /// layers is left out.
    pub fn of(snapshot: &Snapshot, facts: &Facts) -> Holdings {
        let n_layer = facts.layer_bytes.len().min(LAYERS_MAX);
        let claims = snapshot.adverts.iter().filter_map(|advert| {
            let same = |m: &&ModelAdvert| {
                m.model == facts.model && usize::from(m.n_layer) == n_layer && !advert.leaving
            };
            Some((advert, advert.models.iter().find(same)?))
        });
        let claims: Vec<_> = claims.collect();
        let speeds = claims.iter().map(|(_, model)| model.layer_tokens_s);
        let speed = median(speeds.flatten().map(|m| f64::from(m.value)));
        let speed = speed.unwrap_or(LAYER_TOKENS_UNKNOWN);
        let uplinks = claims.iter().map(|(advert, _)| advert.uplink_bytes_s);
        let uplink = median(uplinks.flatten().map(|m| f64::from(m.value)));
        let uplink = uplink.unwrap_or(f64::INFINITY);
        let holder = |(advert, model): (&std::sync::Arc<swarm_proto::Advert>, &ModelAdvert)| {
            let live = layers(model.live.clone());
            let held = layers(model.intended.clone());
            let measured = model.layer_tokens_s.map(|m| f64::from(m.value));
            let bytes_s = advert.uplink_bytes_s.map(|m| f64::from(m.value));
            Holder {
                peer: advert.peer,
                layer_tokens_s: measured.unwrap_or(speed),
                rows_s: bytes_s.unwrap_or(uplink) / facts.frame_bytes.max(1) as f64,
                held: if held.is_empty() { live.clone() } else { held },
                live,
                layer_bytes_max: model.layer_bytes_max,
            }
        };
        let holders = claims.into_iter().map(holder).collect();
        Holdings { n_layer, holders }
    }

    /// How well each layer is covered: the sum over its holders, `me` left out, of the rows a second
    /// that each gives it when it shares its compute evenly among its layers, at most its uplink; those
    /// that are `near` count twice, so that each region tends to stand on its own feet.
    pub fn coverage(&self, count: Count, me: Peer, near: impl Fn(&Peer) -> bool) -> Vec<f64> {
        let mut rows_s = vec![0.0; self.n_layer];
        for holder in self.holders.iter().filter(|holder| holder.peer != me) {
            let weight = if near(&holder.peer) { 2.0 } else { 1.0 };
            let layers = holder.layers(count);
            let given = weight * holder.even_share(layers.len());
            for layer in layers {
                if let Some(sum) = rows_s.get_mut(usize::from(*layer)) {
                    *sum += given;
                }
            }
        }
        rows_s
    }

    /// How many hold each layer, `me` left out.
    pub fn others(&self, count: Count, me: Peer) -> Vec<u32> {
        let mut copies = vec![0; self.n_layer];
        let others = self.holders.iter().filter(|holder| holder.peer != me);
        let layers = others.flat_map(|holder| holder.layers(count));
        for layer in layers {
            if let Some(n) = copies.get_mut(usize::from(*layer)) {
                *n += 1;
            }
        }
        copies
    }

    /// What the holders can do together.
    pub fn supplies(&self, count: Count) -> Vec<throughput::Supply<'_>> {
        let supply = |holder| Holder::supply(holder, count);
        self.holders.iter().map(supply).collect()
    }
}

impl Holder {
    /// The layers that count.
    pub fn layers(&self, count: Count) -> &[u16] {
        match count {
            Count::Live => &self.live,
            Count::Held => &self.held,
        }
    }

    /// Rows a second for each of so many layers.
    fn even_share(&self, n: usize) -> f64 {
        self.rows_s.min(self.layer_tokens_s / n.max(1) as f64)
    }

    fn supply(&self, count: Count) -> throughput::Supply<'_> {
        throughput::Supply {
            layer_tokens_s: self.layer_tokens_s,
            rows_s: self.rows_s,
            layers: self.layers(count),
        }
    }
}

/// The layers of these spans, each once, in order.
fn layers(spans: Vec<LayerRange>) -> Vec<u16> {
    let merged = LayerRange::merge(spans);
    merged.iter().flat_map(LayerRange::layers).collect()
}

/// The windows worth choosing between: from each layer on as many as fit into `room_bytes`, without
/// those that lie within another. Empty where no layer fits. In order of both their ends.
pub fn windows(layer_bytes: &[u64], room_bytes: u64) -> Vec<Range<u16>> {
    let n_layer = layer_bytes.len().min(LAYERS_MAX);
    let mut windows: Vec<Range<u16>> = Vec::new();
    let (mut end, mut bytes) = (0, 0u64);
    for start in 0..n_layer {
        if end < start {
            (end, bytes) = (start, 0);
        }
        while end < n_layer && bytes.saturating_add(layer_bytes[end]) <= room_bytes {
            bytes += layer_bytes[end];
            end += 1;
        }
        if end > start {
            if windows
                .last()
                .is_none_or(|last| end > usize::from(last.end))
            {
                windows.push(start as u16..end as u16);
            }
            bytes -= layer_bytes[start];
        }
    }
    windows
}

/// Who is near, by measured round trips: the same region. Nobody where none was measured; where all
/// are near, all count alike.
pub fn near(rtts: Vec<(Peer, Duration)>) -> impl Fn(&Peer) -> bool {
    let near = rtts.into_iter().filter(|(_, rtt)| *rtt <= NEAR_RTT);
    let near: HashSet<Peer> = near.map(|(peer, _)| peer).collect();
    move |peer| near.contains(peer)
}

/// The middle one of these, the lower of two; `None` of none.
fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied()
}

#[cfg(test)]
mod tests;
