//! A swarm that starts with one copy of the model: when which layers are held, and what that cost whom. Pure.

use std::ops::Range;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::mixture::Island;
use crate::process::span;
use crate::report::seconds;
use crate::swarm::gaps;

/// Copies of the model that the seed may upload, less than.
const SEED_COPIES_MAX: f64 = 3.0;

/// What `shoal node status --json` says, as far as it is used here.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeStatus {
    /// What it serves; nothing while it starts.
    pub models: Vec<HeldModel>,
    /// What it fetched and gave.
    pub transfer: Transfer,
}

/// The layers of a model that a node holds.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct HeldModel {
    /// As `a..b`.
    pub live: Vec<String>,
    /// As `a..b`: once all are there.
    pub intended: Option<String>,
    /// Bytes of weights in memory.
    pub tensor_bytes: u64,
    /// Who computes the experts of its layers, where it does not.
    #[serde(default)]
    pub island: Option<Island>,
}

/// What a node fetched and gave.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Transfer {
    /// Bytes of shards that came.
    pub fetched_bytes: u64,
    /// Bytes of shards that went to others.
    pub given_bytes: u64,
    /// Bytes of the model's description that went to others.
    pub described_bytes: u64,
    /// Its limit.
    pub upload_bytes_s_max: Option<u64>,
    /// Each shard's part.
    pub shards: Vec<Shard>,
}

/// What a node fetched and gave of one shard.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Shard {
    /// What it is.
    pub kind: String,
    /// Its length.
    pub bytes: u64,
    /// How often all of it was fetched.
    pub fetches: u32,
    /// Bytes that came.
    pub fetched_bytes: u64,
}

impl NodeStatus {
    /// Layers that are loaded.
    pub fn live(&self) -> Vec<Range<u32>> {
        let models = self.models.iter();
        models
            .flat_map(|model| &model.live)
            .map(|text| span(text))
            .collect()
    }

    /// Layers that will be.
    pub fn intended(&self) -> Range<u32> {
        self.models
            .first()
            .and_then(|model| model.intended.as_deref())
            .map_or(0..0, span)
    }

    fn complete(&self) -> bool {
        let live = self.live();
        let mut wanted = self.intended();
        !wanted.is_empty() && wanted.all(|layer| live.iter().any(|span| span.contains(&layer)))
    }
}

impl Shard {
    /// Bytes beyond those that the shard takes on the wire with its hashes: two of 32 bytes for each 16 KiB.
    fn again_bytes(&self) -> u64 {
        let once = self.bytes + (self.bytes / (16 * 1024) + 2) * 64;
        let ranges = self.bytes.div_ceil(1 << 20);
        // Each range brings the hashes on its way from the root again.
        self.fetched_bytes.saturating_sub(once + ranges * 64 * 20)
    }

    /// It came twice, or as much as that is.
    fn twice(&self) -> bool {
        self.fetches > 1 || self.again_bytes() > self.bytes / 2
    }
}

/// When the swarm got where, counted from the start of the nodes that had nothing.
#[derive(Clone, Debug, Default)]
pub struct Milestones {
    first_layer: Option<Duration>,
    covered: Option<Duration>,
    complete: Option<Duration>,
    /// Which nodes have had all of their layers: they may move on to others while some still fetch.
    filled: Vec<bool>,
}

impl Milestones {
    /// What the nodes besides the seed say now.
    pub fn see(&mut self, nodes: &[NodeStatus], n_layer: u32, elapsed: Duration) {
        let live: Vec<Range<u32>> = nodes.iter().flat_map(NodeStatus::live).collect();
        let reach = |milestone: &mut Option<Duration>, there: bool| {
            if there {
                milestone.get_or_insert(elapsed);
            }
        };
        reach(&mut self.first_layer, !live.is_empty());
        reach(&mut self.covered, gaps(&live, n_layer).is_empty());
        self.filled.resize(nodes.len(), false);
        for (filled, node) in self.filled.iter_mut().zip(nodes) {
            *filled |= node.complete();
        }
        reach(&mut self.complete, self.filled.iter().all(|filled| *filled));
    }

    /// Every node has all of its layers, and every layer is held by one of them.
    pub fn reached(&self) -> bool {
        self.covered.is_some() && self.complete.is_some()
    }
}

/// What one node fetched and gave.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Traffic {
    /// Its number, from 1: the seed's.
    pub node: usize,
    /// Its layers, as `start..end`.
    pub layers: String,
    /// Bytes of shards that came.
    pub fetched_bytes: u64,
    /// Of these, bytes that had come already.
    pub again_bytes: u64,
    /// Bytes that went to others.
    pub given_bytes: u64,
}

/// The figures of a cold start. The names are those of the report file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ColdStart {
    /// Bytes of the model.
    pub model_bytes: u64,
    /// What the seed may upload in a second.
    pub seed_upload_bytes_s_max: Option<u64>,
    /// Until the first node that had nothing served a layer.
    pub first_layer_s: f64,
    /// Until every layer was held by a node other than the seed.
    pub covered_s: f64,
    /// Until all nodes had all of their layers.
    pub complete_s: f64,
    /// Bytes that the seed gave, over those of the model.
    pub seed_copies: f64,
    /// Shards that a node fetched twice, in words.
    pub fetched_twice: Vec<String>,
    /// Of each node, the seed first.
    pub traffic: Vec<Traffic>,
}

impl ColdStart {
    /// The figures from what all nodes say at the end, the seed first.
    pub fn new(statuses: &[NodeStatus], model_bytes: u64, reached: &Milestones) -> Self {
        let traffic: Vec<Traffic> = statuses.iter().zip(1..).map(traffic).collect();
        let given = traffic.first().map_or(0, |seed| seed.given_bytes);
        let twice = |(status, node): (&NodeStatus, usize)| -> Vec<String> {
            let shards = status.transfer.shards.iter().filter(|shard| shard.twice());
            shards
                .map(|shard| format!("{} by node {node}", shard.kind))
                .collect()
        };
        let s = |milestone: Option<Duration>| milestone.map_or(f64::NAN, seconds);
        Self {
            model_bytes,
            seed_upload_bytes_s_max: statuses
                .first()
                .and_then(|seed| seed.transfer.upload_bytes_s_max),
            first_layer_s: s(reached.first_layer),
            covered_s: s(reached.covered),
            complete_s: s(reached.complete),
            seed_copies: (given as f64 / model_bytes.max(1) as f64 * 1000.0).round() / 1000.0,
            fetched_twice: statuses.iter().zip(1..).flat_map(twice).collect(),
            traffic,
        }
    }

    /// Whether the seed gave few copies, and nobody fetched anything twice.
    pub fn held(&self) -> bool {
        self.seed_copies < SEED_COPIES_MAX && self.fetched_twice.is_empty()
    }

    /// The lines that a person reads.
    pub fn lines(&self) -> Vec<String> {
        let limit = match self.seed_upload_bytes_s_max {
            Some(limit) => format!(", at most {} a second", megabytes(limit)),
            None => String::new(),
        };
        let again: u64 = self.traffic.iter().map(|node| node.again_bytes).sum();
        let twice = match &self.fetched_twice[..] {
            [] => format!("no shard; {} of ranges that were slow", megabytes(again)),
            shards => shards.join(", "),
        };
        let mut lines = vec![
            format!("  first layer       after {:.1} s", self.first_layer_s),
            format!(
                "  all layers        after {:.1} s, without the seed",
                self.covered_s
            ),
            format!("  all nodes         after {:.1} s", self.complete_s),
            format!(
                "  the seed gave     {:.2} copies of {}{limit}; fewer than {SEED_COPIES_MAX} is the goal",
                self.seed_copies,
                megabytes(self.model_bytes)
            ),
            format!("  fetched twice     {twice}"),
            "  node    layers    fetched      given".to_owned(),
        ];
        lines.extend(self.traffic.iter().map(|node| {
            format!(
                "  {:>4}  {:>8} {:>10} {:>10}{}",
                node.node,
                node.layers,
                megabytes(node.fetched_bytes),
                megabytes(node.given_bytes),
                if node.node == 1 { "  the seed" } else { "" }
            )
        }));
        lines
    }
}

fn traffic((status, node): (&NodeStatus, usize)) -> Traffic {
    let intended = status.intended();
    let transfer = &status.transfer;
    Traffic {
        node,
        layers: format!("{}..{}", intended.start, intended.end),
        fetched_bytes: transfer.fetched_bytes,
        again_bytes: transfer.shards.iter().map(Shard::again_bytes).sum(),
        given_bytes: transfer.given_bytes + transfer.described_bytes,
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(live: &[&str], intended: &str, shards: &[(u32, u64, u64)], given: u64) -> NodeStatus {
        let shard = |&(fetches, bytes, fetched_bytes): &(u32, u64, u64)| Shard {
            kind: "layer 1".into(),
            bytes,
            fetches,
            fetched_bytes,
        };
        let shards: Vec<Shard> = shards.iter().map(shard).collect();
        NodeStatus {
            models: vec![HeldModel {
                live: live.iter().map(|span| (*span).to_owned()).collect(),
                intended: Some(intended.into()),
                ..HeldModel::default()
            }],
            transfer: Transfer {
                fetched_bytes: shards.iter().map(|shard| shard.fetched_bytes).sum(),
                given_bytes: given,
                described_bytes: 1,
                upload_bytes_s_max: Some(10 << 20),
                shards,
            },
        }
    }

    #[test]
    fn milestones_are_reached_once_and_the_seed_does_not_count() {
        let mut reached = Milestones::default();
        let second = Duration::from_secs(1);
        reached.see(
            &[NodeStatus::default(), node(&[], "0..2", &[], 0)],
            3,
            second,
        );
        assert!(reached.first_layer.is_none());
        reached.see(
            &[
                node(&["1..2"], "1..3", &[], 0),
                node(&["0..1"], "0..2", &[], 0),
            ],
            3,
            2 * second,
        );
        assert_eq!(
            (reached.first_layer, reached.covered),
            (Some(2 * second), None)
        );
        let all = [
            node(&["1..2", "2..3"], "1..3", &[], 0),
            node(&["0..2"], "0..2", &[], 0),
        ];
        reached.see(&all, 3, 3 * second);
        reached.see(&all, 3, 4 * second);
        assert!(reached.reached());
        assert_eq!(
            (reached.covered, reached.complete),
            (Some(3 * second), Some(3 * second))
        );
    }

    #[test]
    fn three_copies_or_a_shard_that_came_twice_are_too_many() {
        let big = 40 << 20;
        let once = big + big / 256;
        let start = |given, shards: &[(u32, u64, u64)]| {
            let all = [
                node(&["0..3"], "0..3", &[], given),
                node(&["0..2"], "0..2", shards, 5),
            ];
            ColdStart::new(&all, 1000, &Milestones::default())
        };
        let good = start(2998, &[(1, big, once)]);
        assert!(good.held(), "{good:?}");
        assert_eq!(good.traffic[1].again_bytes, 0);
        assert!(
            !start(2999, &[(1, big, once)]).held(),
            "with its description it is three"
        );
        assert!(!start(0, &[(2, big, once)]).held());
        assert!(!start(0, &[(1, big, once + big)]).held());
        let slow = start(0, &[(1, big, once + (2 << 20))]);
        assert!(
            slow.held() && slow.traffic[1].again_bytes > 1 << 20,
            "{slow:?}"
        );
        assert!(
            slow.lines().iter().all(|line| line.chars().count() < 100),
            "{:?}",
            slow.lines()
        );
    }
}
