//! What a swarm looks like from its adverts: which layer of which model is where, what is missing,
//! how fast and how fresh. Pure: adverts and a time in, a report out; `shoal status` prints it as a
//! picture or as JSON, `shoal models` and the choice of a default model read it too.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::ops::Range;

use serde::Serialize;
use swarm_proto::{Advert, LayerRange, ModelAdvert, ModelId};

use crate::figures;
use crate::layer_map;

/// A swarm at one moment.
#[derive(Debug, Serialize)]
pub struct SwarmReport {
    /// The swarm's id.
    pub swarm: String,
    /// Everyone who advertises, whatever they hold.
    pub peers: Vec<PeerReport>,
    /// Every model that someone advertises, by name.
    pub models: Vec<ModelReport>,
    /// Peers that failed this home's clients, those that did last first.
    pub failed: Vec<FailedReport>,
}

/// What this home has seen of a peer that failed.
#[derive(Debug, Serialize)]
pub struct FailedReport {
    /// Who.
    pub peer: String,
    /// Failures that are not forgotten.
    pub failures: u32,
    /// The latest, in words.
    pub last: String,
    /// How long ago.
    pub ago_s: u64,
    /// How long it is left alone; 0 where it may be asked.
    pub left_alone_s: u64,
}

/// One peer's advert.
#[derive(Debug, Serialize)]
pub struct PeerReport {
    /// Its id.
    pub peer: String,
    /// Program and version, as it says.
    pub agent: String,
    /// Where it listens.
    pub addrs: Vec<String>,
    /// Since its advert was made, by both clocks.
    pub age_s: f64,
    /// Frames waiting for its stage worker.
    pub queue: u16,
    /// It is shutting down.
    pub leaving: bool,
    /// Measured uplink.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uplink_bytes_s: Option<f32>,
}

/// One model and who holds what of it.
#[derive(Debug, Serialize)]
pub struct ModelReport {
    /// Its id.
    #[serde(skip)]
    pub id: ModelId,
    /// The same, in hex.
    pub model: String,
    /// What its holders call it.
    pub name: String,
    /// Layers of the whole model.
    pub n_layer: u16,
    /// Whether every layer has a holder.
    pub complete: bool,
    /// Layers without one, as `8..12`.
    pub gaps: Vec<String>,
    /// Every layer with its holders.
    pub layers: Vec<LayerReport>,
    /// The same, by peer.
    pub holders: Vec<HolderReport>,
}

/// One layer.
#[derive(Debug, Serialize)]
pub struct LayerReport {
    /// Its index.
    pub layer: u16,
    /// Peers that serve it.
    pub holders: Vec<String>,
}

/// What one peer holds of one model.
#[derive(Debug, Serialize)]
pub struct HolderReport {
    /// Its id.
    pub peer: String,
    /// Served now.
    pub live: Vec<String>,
    /// Loading or planned.
    pub intended: Vec<String>,
    /// Measured speed of one layer, with the age of the measurement.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer_tokens_s: Option<f32>,
    /// Seconds since it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub measured_s_ago: Option<u32>,
    /// Context cells free for new sessions.
    pub free_cells: u64,
    /// Longest context it opens.
    pub n_ctx_max: u32,
    /// Peers with the same class give the same bits.
    pub numerics: String,
    /// Experts that it computes for the trunks of others, as `0-3,7 of 0..5`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<String>,
    /// Who computes the experts of its layers, where it does not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub island: Vec<String>,
    /// Since its advert was made.
    pub age_s: f64,
    #[serde(skip)]
    live_ranges: Vec<Range<usize>>,
    #[serde(skip)]
    intended_ranges: Vec<Range<usize>>,
}

impl SwarmReport {
    /// The same, with what this home has seen of peers.
    pub fn with_book(mut self, entries: Vec<node::peer_book::Entry>) -> Self {
        let now_s = crate::swarm::now_ms() / 1000;
        let report = |entry: node::peer_book::Entry| FailedReport {
            peer: entry.peer.to_string(),
            failures: entry.failures,
            last: figures::printable(&entry.last, 200),
            ago_s: now_s.saturating_sub(entry.at_s),
            left_alone_s: entry.until_s.saturating_sub(now_s),
        };
        self.failed = entries.into_iter().map(report).collect();
        self
    }

    /// Sums up the adverts; `now_ms` is the time since 1970.
    pub fn new<A: Borrow<Advert>>(swarm: String, adverts: &[A], now_ms: u64) -> Self {
        let adverts: Vec<&Advert> = adverts.iter().map(Borrow::borrow).collect();
        let mut models: BTreeMap<(String, ModelId), ModelReport> = BTreeMap::new();
        let names = names(&adverts);
        for advert in adverts.iter().copied().filter(|advert| !advert.leaving) {
            for held in &advert.models {
                let name = names.get(&held.model).cloned().unwrap_or_default();
                let report = models
                    .entry((name.clone(), held.model))
                    .or_insert_with(|| ModelReport::new(held, name));
                report.holders.push(HolderReport::new(advert, held, now_ms));
            }
        }
        let mut peers: Vec<PeerReport> = adverts
            .iter()
            .copied()
            .map(|advert| PeerReport::new(advert, now_ms))
            .collect();
        peers.sort_by(|a, b| a.peer.cmp(&b.peer));
        Self {
            swarm,
            peers,
            models: models.into_values().map(ModelReport::finish).collect(),
            failed: Vec::new(),
        }
    }
}

/// The commonest name each model has among its holders; names are hints, ids are what counts.
fn names(adverts: &[&Advert]) -> BTreeMap<ModelId, String> {
    let mut votes: BTreeMap<ModelId, BTreeMap<&str, usize>> = BTreeMap::new();
    for held in adverts.iter().flat_map(|advert| &advert.models) {
        *votes
            .entry(held.model)
            .or_default()
            .entry(held.name.as_str())
            .or_default() += 1;
    }
    votes
        .into_iter()
        .map(|(model, votes)| {
            let best = votes
                .into_iter()
                .max_by_key(|&(name, n)| (n, std::cmp::Reverse(name)));
            (
                model,
                figures::printable(best.map_or("", |(name, _)| name), 64),
            )
        })
        .collect()
}

impl PeerReport {
    fn new(advert: &Advert, now_ms: u64) -> Self {
        Self {
            peer: advert.peer.to_string(),
            agent: figures::printable(&advert.agent, 64),
            addrs: advert
                .addrs
                .iter()
                .map(|addr| figures::printable(addr, 128))
                .collect(),
            age_s: age_s(advert, now_ms),
            queue: advert.queue,
            leaving: advert.leaving,
            uplink_bytes_s: advert
                .uplink_bytes_s
                .as_ref()
                .map(|measured| measured.value),
        }
    }
}

impl ModelReport {
    fn new(held: &ModelAdvert, name: String) -> Self {
        Self {
            id: held.model,
            model: held.model.to_string(),
            name,
            n_layer: held.n_layer,
            complete: false,
            gaps: Vec::new(),
            layers: Vec::new(),
            holders: Vec::new(),
        }
    }

    fn finish(mut self) -> Self {
        self.holders.sort_by(|a, b| {
            let first = |holder: &HolderReport| {
                holder
                    .live_ranges
                    .iter()
                    .chain(&holder.intended_ranges)
                    .map(|r| (r.start, r.end))
                    .min()
            };
            first(a).cmp(&first(b)).then_with(|| a.peer.cmp(&b.peer))
        });
        self.layers = (0..self.n_layer)
            .map(|layer| LayerReport {
                layer,
                holders: (self.holders.iter())
                    .filter(|holder| {
                        holder
                            .live_ranges
                            .iter()
                            .any(|r| r.contains(&usize::from(layer)))
                    })
                    .map(|holder| holder.peer.clone())
                    .collect(),
            })
            .collect();
        let copies: Vec<usize> = self
            .layers
            .iter()
            .map(|layer| layer.holders.len())
            .collect();
        self.gaps = layer_map::gaps(&copies)
            .iter()
            .map(|gap| format!("{}..{}", gap.start, gap.end))
            .collect();
        self.complete = self.gaps.is_empty();
        self
    }

    /// The longest context that every layer has a holder for.
    pub fn n_ctx_max(&self) -> u32 {
        let of_layer = |layer: usize| {
            let holders = self
                .holders
                .iter()
                .filter(|holder| holder.live_ranges.iter().any(|r| r.contains(&layer)));
            holders
                .map(|holder| holder.n_ctx_max)
                .max()
                .unwrap_or(u32::MAX)
        };
        (0..usize::from(self.n_layer))
            .map(of_layer)
            .min()
            .unwrap_or(u32::MAX)
    }

    /// The rows of its picture.
    pub fn rows(&self) -> Vec<layer_map::Row> {
        self.holders
            .iter()
            .map(|holder| layer_map::Row {
                label: figures::short_peer(&holder.peer),
                live: holder.live_ranges.clone(),
                intended: holder.intended_ranges.clone(),
                remark: holder.remark(),
            })
            .collect()
    }
}

impl HolderReport {
    fn new(advert: &Advert, held: &ModelAdvert, now_ms: u64) -> Self {
        let experts = held.experts.iter();
        Self {
            peer: advert.peer.to_string(),
            live: held.live.iter().map(ToString::to_string).collect(),
            intended: held.intended.iter().map(ToString::to_string).collect(),
            layer_tokens_s: held.layer_tokens_s.as_ref().map(|measured| measured.value),
            measured_s_ago: held.layer_tokens_s.as_ref().map(|measured| measured.age_s),
            free_cells: held.free_cells,
            n_ctx_max: held.n_ctx_max,
            numerics: format!("{:016x}", held.numerics),
            experts: experts
                .clone()
                .flat_map(|e| &e.live)
                .map(ToString::to_string)
                .collect(),
            island: experts
                .flat_map(|e| &e.island)
                .map(ToString::to_string)
                .collect(),
            age_s: age_s(advert, now_ms),
            live_ranges: held.live.iter().map(range).collect(),
            intended_ranges: held.intended.iter().map(range).collect(),
        }
    }

    /// Speed is that of one layer, so that peers with different spans compare.
    fn remark(&self) -> String {
        let spans = if !self.experts.is_empty() {
            "–".to_string()
        } else if self.live.is_empty() {
            "loading".to_string()
        } else {
            self.live.join(" ")
        };
        let speed = figures::rate(self.layer_tokens_s.map(f64::from));
        let age = format!("{:.0} s ago", self.age_s);
        let about = match (&self.experts[..], self.island.len()) {
            ([], 0) => String::new(),
            ([], n) => format!("  experts with {}", figures::plural(n, "peer")),
            (experts, _) => format!("  experts {}", experts.join("; ")),
        };
        format!("{spans:<8} {speed:>14}  {age:>8}{about}")
    }
}

/// Heads the remarks of [`ModelReport::rows`].
pub const REMARKS: &str = "serves   tokens/s·layer     heard";

fn range(range: &LayerRange) -> Range<usize> {
    usize::from(range.start)..usize::from(range.end)
}

/// An advert's sequence number is the time it was made; a clock that runs ahead counts as now.
fn age_s(advert: &Advert, now_ms: u64) -> f64 {
    let ms = now_ms.saturating_sub(advert.seq);
    (ms / 100) as f64 / 10.0
}
