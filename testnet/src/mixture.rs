//! A mixture whose experts are shared out over nodes: where each ran, and how often it was picked. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What a trunk says of those who compute its experts.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Island {
    /// Who they are.
    pub holders: Vec<Holder>,
    /// Where each expert is computed.
    pub experts: Vec<Placed>,
}

/// One of them.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Holder {
    /// Its id; none: the trunk itself.
    pub peer: Option<String>,
    /// Calls that it answered.
    pub calls: u64,
    /// What a call takes beyond its computing, in microseconds.
    pub wire_us: Option<u64>,
    /// Calls that others were asked, too, because it was late.
    pub hedges: u64,
}

/// An expert, as a trunk sees it.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Placed {
    /// Of which layer.
    pub layer: u32,
    /// Which.
    pub expert: u32,
    /// Who holds it, who would be asked first; `here`: the trunk itself.
    pub holders: Vec<String>,
    /// Rows it was picked for.
    pub rows: u64,
}

/// A node of the swarm, by its number from 1.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Its id.
    pub peer: String,
    /// Bytes of weights in memory.
    pub tensor_bytes: u64,
    /// Bytes that are resident.
    pub rss_bytes: u64,
    /// Its island, where it is a trunk.
    pub island: Option<Island>,
}

/// What became of a mixture.
#[derive(Clone, Debug, Serialize)]
pub struct Mixture {
    /// Nodes that hold trunks.
    pub trunks: Vec<Trunk>,
    /// Nodes that hold experts for them.
    pub holders: usize,
    /// All weights of the model.
    pub model_bytes: u64,
    /// Every expert of every layer.
    pub experts: Vec<Expert>,
    /// Calls of all trunks, by the node that answered.
    pub calls: BTreeMap<usize, u64>,
    /// Calls that a second node was asked, too, because the first was late.
    pub hedges: u64,
    /// What a call takes beyond the experts' computing, in microseconds, over all pairs of trunk and holder: the middle
    /// value.
    pub wire_us: Option<u64>,
}

/// A node that holds a trunk.
#[derive(Clone, Debug, Serialize)]
pub struct Trunk {
    /// Its number.
    pub node: usize,
    /// Bytes of its weights.
    pub tensor_bytes: u64,
    /// Bytes that are resident.
    pub rss_bytes: u64,
}

/// An expert of a layer.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct Expert {
    /// The layer.
    pub layer: u32,
    /// Its index.
    pub expert: u32,
    /// Rows that all trunks picked it for.
    pub rows: u64,
    /// The nodes that hold it, first those that trunks would ask first.
    pub nodes: Vec<usize>,
}

impl Mixture {
    /// Puts together what the nodes say, which are numbered from 1 as they come.
    pub fn new(nodes: &[Seen], model_bytes: u64) -> Self {
        let number = |peer: &str| Some(nodes.iter().position(|node| node.peer == peer)? + 1);
        let mut trunks = Vec::new();
        let mut experts: BTreeMap<(u32, u32), Expert> = BTreeMap::new();
        let mut calls = BTreeMap::new();
        let (mut hedges, mut wires) = (0, Vec::new());
        for (i, node) in nodes.iter().enumerate() {
            let Some(island) = &node.island else { continue };
            trunks.push(Trunk {
                node: i + 1,
                tensor_bytes: node.tensor_bytes,
                rss_bytes: node.rss_bytes,
            });
            for placed in &island.experts {
                let key = (placed.layer, placed.expert);
                let expert = experts.entry(key).or_insert_with(|| Expert {
                    layer: placed.layer,
                    expert: placed.expert,
                    rows: 0,
                    nodes: Vec::new(),
                });
                expert.rows += placed.rows;
                let holders = placed.holders.iter();
                let held = holders.filter_map(|holder| match holder.as_str() {
                    "here" => Some(i + 1),
                    peer => number(peer),
                });
                for holder in held {
                    if !expert.nodes.contains(&holder) {
                        expert.nodes.push(holder);
                    }
                }
            }
            for holder in &island.holders {
                let node = holder.peer.as_deref().map_or(Some(i + 1), number);
                if let Some(node) = node {
                    *calls.entry(node).or_default() += holder.calls;
                }
                hedges += holder.hedges;
                wires.extend(holder.wire_us);
            }
        }
        wires.sort_unstable();
        Self {
            holders: nodes.len() - trunks.len(),
            trunks,
            model_bytes,
            experts: experts.into_values().collect(),
            calls,
            hedges,
            wire_us: wires.get(wires.len() / 2).copied(),
        }
    }

    /// Whether every expert was somewhere, and trunks asked others for them.
    pub fn held(&self) -> bool {
        let somewhere = |expert: &Expert| !expert.nodes.is_empty();
        let asked = self.calls.values().any(|calls| *calls > 0);
        asked && !self.experts.is_empty() && self.experts.iter().all(somewhere)
    }

    /// The lines that a person reads.
    pub fn lines(&self) -> Vec<String> {
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / (1024.0 * 1024.0));
        let mut lines = Vec::new();
        for trunk in &self.trunks {
            lines.push(format!(
                "  trunk on node {:<4} {} of weights where the model has {}, {} resident",
                trunk.node,
                mib(trunk.tensor_bytes),
                mib(self.model_bytes),
                mib(trunk.rss_bytes)
            ));
        }
        let calls: Vec<String> = self
            .calls
            .iter()
            .map(|(node, calls)| format!("{node}: {calls}"))
            .collect();
        lines.push(format!("  calls by node     {}", calls.join(" · ")));
        if let Some(wire_us) = self.wire_us {
            lines.push(format!(
                "  a call takes      {wire_us} µs beyond the experts' computing; {} were asked of a second node, too",
                self.hedges
            ));
        }
        lines.push(
            "  experts           share of their layer's picks, and the nodes that hold them".into(),
        );
        let mut by_layer: BTreeMap<u32, Vec<&Expert>> = BTreeMap::new();
        for expert in &self.experts {
            by_layer.entry(expert.layer).or_default().push(expert);
        }
        for (layer, experts) in by_layer {
            let all: u64 = experts.iter().map(|expert| expert.rows).sum();
            let each = experts.iter().map(|expert| {
                let nodes: Vec<String> = expert.nodes.iter().map(ToString::to_string).collect();
                let nodes = match nodes.is_empty() {
                    true => "nowhere".into(),
                    false => nodes.join(","),
                };
                let share = 100.0 * expert.rows as f64 / all.max(1) as f64;
                format!("{}: {share:.0} % ({nodes})", expert.expert)
            });
            lines.push(format!(
                "    layer {layer:<3} {}",
                each.collect::<Vec<_>>().join("  ")
            ));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trunk(rows: u64, holders: &[&str]) -> Seen {
        Seen {
            peer: "t".into(),
            tensor_bytes: 1 << 20,
            rss_bytes: 2 << 20,
            island: Some(Island {
                holders: vec![Holder {
                    peer: Some("a".into()),
                    calls: 7,
                    wire_us: Some(90),
                    hedges: 1,
                }],
                experts: vec![Placed {
                    layer: 2,
                    expert: 3,
                    holders: holders.iter().map(ToString::to_string).collect(),
                    rows,
                }],
            }),
        }
    }

    #[test]
    fn experts_are_added_up_over_trunks_and_named_by_node() {
        let holder = Seen {
            peer: "a".into(),
            ..Seen::default()
        };
        let nodes = [holder, trunk(5, &["a", "here"]), trunk(6, &["b", "a"])];
        let mixture = Mixture::new(&nodes, 10 << 20);
        assert!(mixture.held());
        let expert = Expert {
            layer: 2,
            expert: 3,
            rows: 11,
            nodes: vec![1, 2],
        };
        assert_eq!(mixture.experts, [expert]);
        assert_eq!((mixture.holders, mixture.calls[&1]), (1, 14));
        let lines = mixture.lines().join("\n");
        assert!(lines.contains("layer 2   3: 100 % (1,2)"), "{lines}");
        assert!(
            !Mixture::new(&[trunk(5, &[])], 1).held(),
            "an expert is nowhere"
        );
    }
}
