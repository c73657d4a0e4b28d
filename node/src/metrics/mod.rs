//! What a process counts, for Prometheus. Whoever counts registers here; what exists anyway is read when somebody
//! asks.
//!
//! | file | what |
//! |---|---|
//! | `process` | memory, files, time of this process |
//! | `net` | connected peers, known adverts, bytes and frames of sessions |
//! | `steps` | what the session service counts as it runs |
//! | `serving` | a node's models, sessions and transfers |
//! | `server` | a small HTTP server for a node |
//!
//! Names of peers, models and clients that others chose are never labels: a label has few values, and this process
//! knows them all. Nothing of a prompt or an answer is counted but its length.

mod net;
mod process;
mod server;
mod serving;
mod steps;
mod traffic;

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, EncodeLabelSet, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

pub(crate) use net::NetMetrics;
pub use server::{MetricsAddr, MetricsServer, ServerError};
pub(crate) use serving::{Facts, ServingMetrics};
pub use steps::SessionMetrics;
pub(crate) use traffic::TRAFFIC;

/// The type of the text that [`Metrics::text`] gives.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What this process counts. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    registry: Arc<RwLock<Registry>>,
}

impl Metrics {
    /// The process itself, and the build of `program`.
    pub fn new(program: &'static str) -> Self {
        let metrics = Self::default();
        metrics.register(|registry| {
            let build = Info::new([("program", program), ("version", env!("CARGO_PKG_VERSION"))]);
            registry.register("shoal_build", "What runs here", build);
            registry.register_collector(Box::new(process::ProcessMetrics));
        });
        metrics
    }

    /// Adds what somebody counts.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        // Registering adds to a list: no invariant spans a panic.
        let registry = self.registry.write();
        add(&mut registry.unwrap_or_else(PoisonError::into_inner));
    }

    /// Adds the network that this process is part of.
    pub fn register_net(&self, net: &crate::Net) {
        self.register(|registry| registry.register_collector(Box::new(NetMetrics::new(net))));
    }

    /// All of it in OpenMetrics' text format, which Prometheus reads.
    pub fn text(&self) -> String {
        let registry = self.registry.read().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &registry) {
            tracing::error!(%error, "metrics cannot be written");
        }
        text
    }
}

/// Bounds of a histogram of times, in seconds: from what a hop adds to a token to what a long prompt takes.
pub fn seconds_buckets() -> impl Iterator<Item = f64> {
    const BOUNDS: [f64; 19] = [
        0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
        5.0, 10.0, 25.0, 60.0, 300.0,
    ];
    BOUNDS.into_iter()
}

/// Writes what is read when somebody asks.
struct Reading<'a>(DescriptorEncoder<'a>);

impl Reading<'_> {
    fn gauge(&mut self, name: &str, help: &str, value: impl EncodeGaugeValue) -> fmt::Result {
        let mut metric = (self.0).encode_descriptor(name, help, None, MetricType::Gauge)?;
        metric.encode_gauge(&value)
    }

    fn counter(&mut self, name: &str, help: &str, value: impl EncodeCounterValue) -> fmt::Result {
        let mut metric = (self.0).encode_descriptor(name, help, None, MetricType::Counter)?;
        metric.encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    fn gauges<L: EncodeLabelSet, V: EncodeGaugeValue>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (L, V)>,
    ) -> fmt::Result {
        let mut metric = (self.0).encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in values {
            metric.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    fn counters<L: EncodeLabelSet, V: EncodeCounterValue>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (L, V)>,
    ) -> fmt::Result {
        let mut metric = (self.0).encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in values {
            let mut metric = metric.encode_family(&labels)?;
            metric.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_counts_is_text_that_prometheus_reads() {
        let metrics = Metrics::new("test");
        TRAFFIC.sent(1, 100);
        let text = metrics.text();
        assert!(text.ends_with("# EOF\n"), "{text}");
        let build = format!("program=\"test\",version=\"{}\"", env!("CARGO_PKG_VERSION"));
        assert!(
            text.contains(&format!("shoal_build_info{{{build}}} 1")),
            "{text}"
        );
        for name in ["process_cpu_seconds_total", "process_resident_memory_bytes"] {
            if cfg!(target_os = "linux") {
                let line = text.lines().find(|line| line.starts_with(name));
                let value = line.and_then(|line| line.split(' ').nth(1)?.parse::<f64>().ok());
                assert!(value.is_some_and(|value| value >= 0.0), "{name} in {text}");
            }
        }
        assert!(text.contains("process_start_time_seconds 1"), "{text}");
    }
}
