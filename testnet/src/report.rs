//! What a run found: one record, written as JSON and said in words.

use std::time::Duration;

use serde::Serialize;

use crate::client::Hop;
use crate::cold::ColdStart;
use crate::mixture::Mixture;
use crate::tally::Tally;

/// The figures of one run. The names are those of the report file.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// How many nodes ran.
    pub nodes: usize,
    /// Whether a client saw every layer held.
    pub covered: bool,
    /// What was asked.
    pub model: String,
    /// The model's layers.
    pub n_layer: u32,
    /// How many nodes hold each layer, as a client sees it.
    pub copies: Vec<usize>,
    /// The seed of the memory budgets.
    pub seed: u64,
    /// The layers of each node, as `start..end`.
    pub layers: Vec<String>,
    /// The route of the answer.
    pub route: Vec<Hop>,
    /// Its nodes by number, as the picture counts them.
    pub route_nodes: Vec<Option<usize>>,
    /// Its length.
    pub hops: usize,
    /// The prompt as given.
    pub prompt: String,
    /// The answer, without the prompt.
    pub text: String,
    /// Whether the whole model in one process says the same.
    pub same_as_whole: bool,
    /// From the prompt sent to the first token.
    pub ttft_ms: f64,
    /// Tokens a second after the first.
    pub tokens_per_s: f64,
    /// From the first process started until every node serves and a client sees every layer held.
    pub start_s: f64,
    /// The whole run.
    pub total_s: f64,
    /// Resident memory of each node after the answer; empty where the system does not tell.
    pub rss_bytes: Vec<u64>,
    /// What a cold start took, where it was one.
    #[serde(flatten)]
    pub cold: Option<ColdStart>,
    /// Where experts of a mixture ran, where they were shared out.
    #[serde(flatten)]
    pub mixture: Option<Mixture>,
    /// What faults cost, where there were any.
    #[serde(flatten)]
    pub chaos: Option<Tally>,
}

impl Report {
    /// The lines that a person reads after the answer.
    pub fn lines(&self) -> Vec<String> {
        let hops = self.route.iter().zip(&self.route_nodes);
        let route: Vec<String> = hops
            .map(|(hop, node)| match node {
                Some(node) => format!("node {node} ({})", hop.layers),
                None => format!("{} ({})", hop.peer, hop.layers),
            })
            .collect();
        let mut lines = vec![
            format!(
                "  route             {} hops: {}",
                self.hops,
                route.join(" → ")
            ),
            format!("  time to first     {:.0} ms", self.ttft_ms),
            format!("  speed             {:.1} tokens/s", self.tokens_per_s),
            format!(
                "  start             {:.1} s until all {} nodes served",
                self.start_s, self.nodes
            ),
        ];
        if let Some((min, median, max)) = spread(&self.rss_bytes) {
            lines.push(format!(
                "  memory per node   {} min · {} median · {} max",
                mib(min),
                mib(median),
                mib(max)
            ));
        }
        lines.push(format!(
            "  same text as the whole model: {}",
            if self.same_as_whole { "yes" } else { "no" }
        ));
        lines.extend(self.cold.iter().flat_map(ColdStart::lines));
        lines.extend(self.mixture.iter().flat_map(Mixture::lines));
        lines
    }

    /// Whether the text was that of the whole model, no fault changed it, and a cold start cost no more than it may.
    pub fn held(&self) -> bool {
        let cold = self.cold.as_ref().is_none_or(ColdStart::held);
        let mixture = self.mixture.as_ref().is_none_or(Mixture::held);
        cold && mixture && self.same_as_whole && self.chaos.as_ref().is_none_or(Tally::held)
    }
}

/// Seconds with two digits, as a report shows them.
pub fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 100.0).round() / 100.0
}

fn spread(values: &[u64]) -> Option<(u64, u64, u64)> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    Some((
        *sorted.first()?,
        *sorted.get(sorted.len() / 2)?,
        *sorted.last()?,
    ))
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1024.0 * 1024.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spread_of_memory() {
        assert_eq!(spread(&[3, 1, 2]), Some((1, 2, 3)));
        assert_eq!(spread(&[]), None);
    }
}
