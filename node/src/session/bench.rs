//! What a hop costs beyond computing: nodes in this process, connected through real networks on
//! loopback (encrypted as always), running the hash-chain engine.
//!
//! ```text
//! overhead of a hop = (time of a step at the client − time the stages computed) / hops
//! ```
//!
//! It holds everything between two computations: frames, copies, wake-ups, encryption, the kernel's
//! loopback, and the share of the answer's way back.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use engine::{ChainStage, Worker};
use serde::Serialize;
use swarm_proto::{Dtype, Form, Hash, Hop, LayerRange, ModelId, SwarmId, Want, WantRows};

use super::{ClientError, Kind, Opener, Served, SessionLimits, Sessions};
use crate::{
    identity::Identity,
    net::{Net, NetConfig, NetError, Proto},
};

/// Tokens of the chain's vocabulary: the tail's work on logits is not what is measured.
const N_VOCAB: u32 = 1024;
/// The model of the bench.
const MODEL: ModelId = ModelId(Hash([0xbe; 32]));
/// Both sides ask for the best token, as greedy decoding does.
const WANT: Want = Want {
    rows: WantRows::Last,
    form: Form::Top(1),
};

/// What to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HopBench {
    /// Lengths of routes.
    pub hops: Vec<u16>,
    /// Numbers in a hidden row.
    pub n_embd: Vec<u32>,
    /// Steps that count, for each pair of the two.
    pub steps: u32,
    /// Steps before, which do not.
    pub warm_up: u32,
    /// Over QUIC instead of TCP.
    pub quic: bool,
    /// Hops keep what they sent, as they always do outside of measurements.
    pub retain: bool,
}

impl Default for HopBench {
    fn default() -> Self {
        Self {
            hops: vec![1, 2, 3, 4],
            n_embd: vec![256, 2048],
            steps: 2000,
            warm_up: 200,
            quic: false,
            retain: true,
        }
    }
}

/// One line of the result; times in microseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HopCost {
    /// Stages on the route.
    pub hops: u16,
    /// Numbers in a hidden row.
    pub n_embd: u32,
    /// Steps measured.
    pub steps: u32,
    /// A whole step at the client, median.
    pub step_p50_us: f64,
    /// What of it the stages computed, median.
    pub compute_p50_us: f64,
    /// Overhead of one hop, median.
    pub overhead_p50_us: f64,
    /// Overhead of one hop, 99th percentile.
    pub overhead_p99_us: f64,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A network did not start.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A session failed.
    #[error(transparent)]
    Session(#[from] ClientError),
    /// The system has no thread left.
    #[error("cannot start a stage worker: {0}")]
    Worker(#[from] std::io::Error),
    /// Nothing to measure, or a name that is none.
    #[error("{0}")]
    Options(String),
}

/// Measures every pair of hops and widths, one after the other.
///
/// # Errors
/// A network or a session that fails.
pub async fn bench_hops(bench: &HopBench) -> Result<Vec<HopCost>, BenchError> {
    let swarm: SwarmId = "bench-hops"
        .parse()
        .map_err(|e| BenchError::Options(format!("{e}")))?;
    let mut costs = Vec::new();
    for &n_embd in &bench.n_embd {
        for &hops in &bench.hops {
            if hops == 0 || n_embd == 0 || bench.steps == 0 {
                return Err(BenchError::Options(
                    "hops, n_embd and steps begin at 1".into(),
                ));
            }
            costs.push(measure(bench, &swarm, hops, n_embd).await?);
        }
    }
    Ok(costs)
}

/// A node of the bench: one layer of the chain behind a network of its own.
struct BenchNode {
    net: Net,
    service: tokio::task::JoinHandle<()>,
}

async fn start(
    bench: &HopBench,
    swarm: &SwarmId,
    layer: u16,
    n_layer: u16,
    n_embd: u32,
) -> Result<BenchNode, BenchError> {
    let listen = if bench.quic {
        "/ip4/127.0.0.1/udp/0/quic-v1"
    } else {
        "/ip4/127.0.0.1/tcp/0"
    };
    let mut config = NetConfig::client(Identity::generate(), swarm.clone());
    config.listen = vec![listen.into()];
    let net = Net::start(config).await?;
    let mut limits = SessionLimits::default();
    if !bench.retain {
        (limits.retained_memory, limits.retained_disk) = (0, 0);
    }
    let layer = u32::from(layer);
    let stage = ChainStage::new(n_layer.into(), n_embd, N_VOCAB, layer..layer + 1, 1);
    let worker = Worker::spawn(Box::new(stage), limits.worker_queue())?;
    let sessions = Sessions::new(net.me(), Arc::new(net.clone()), limits);
    sessions.serve(Served::new(MODEL, worker));
    let (Some(opened), Some(attached)) = (net.accept(Proto::Session), net.accept(Proto::Answer))
    else {
        return Err(BenchError::Options(
            "the network's streams are taken".into(),
        ));
    };
    let service = tokio::spawn(async move { sessions.run(opened, attached).await });
    Ok(BenchNode { net, service })
}

async fn measure(
    bench: &HopBench,
    swarm: &SwarmId,
    hops: u16,
    n_embd: u32,
) -> Result<HopCost, BenchError> {
    let mut nodes = Vec::new();
    for layer in 0..hops {
        nodes.push(start(bench, swarm, layer, hops, n_embd).await?);
    }
    let client = Net::start(NetConfig::client(Identity::generate(), swarm.clone())).await?;
    let route: Vec<Hop> = (0u16..)
        .zip(&nodes)
        .map(|(layer, node)| Hop {
            peer: node.net.me(),
            addrs: node.net.listen_addrs(),
            layers: LayerRange::one(layer),
        })
        .collect();
    let times = steps(bench, &client, &route, n_embd).await;
    client.shutdown().await;
    for node in nodes {
        node.net.shutdown().await;
        node.service.abort();
    }
    Ok(summary(times?, hops, n_embd))
}

/// (whole step, computed) of each step that counts.
async fn steps(
    bench: &HopBench,
    client: &Net,
    route: &[Hop],
    n_embd: u32,
) -> Result<Vec<(Duration, Duration)>, BenchError> {
    let opener = Opener::new(client.me(), Arc::new(client.clone()));
    let n_ctx = bench.warm_up.saturating_add(bench.steps).saturating_add(1);
    let kind = Kind {
        model: MODEL,
        n_ctx,
        dtype: Dtype::F32,
        n_embd,
        numerics: swarm_proto::Numerics::Exact,
        n_vocab: N_VOCAB,
    };
    let mut session = opener.open_route(kind, route).await?;
    let mut token = 1;
    let mut times = Vec::with_capacity(bench.steps as usize);
    for step in 0..bench.warm_up.saturating_add(bench.steps) {
        let begin = Instant::now();
        session.feed(&[token], WANT).await?;
        let row = session.next_logits().await?;
        let whole = begin.elapsed();
        token = row.argmax().unwrap_or(0);
        if step >= bench.warm_up {
            times.push((whole, Duration::from_micros(row.spent_us.into())));
        }
        session.recycle(row);
    }
    session.close().await;
    Ok(times)
}

fn summary(times: Vec<(Duration, Duration)>, hops: u16, n_embd: u32) -> HopCost {
    let us = |d: Duration| d.as_secs_f64() * 1e6;
    let of = |f: fn(&(Duration, Duration)) -> Duration| -> Vec<f64> {
        times.iter().map(|t| us(f(t))).collect()
    };
    let overhead = of(|t| t.0.saturating_sub(t.1));
    let hop = f64::from(hops.max(1));
    HopCost {
        hops,
        n_embd,
        steps: times.len() as u32,
        step_p50_us: percentile(of(|t| t.0), 0.5),
        compute_p50_us: percentile(of(|t| t.1), 0.5),
        overhead_p50_us: percentile(overhead.clone(), 0.5) / hop,
        overhead_p99_us: percentile(overhead, 0.99) / hop,
    }
}

fn percentile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let at = ((values.len() as f64 - 1.0).max(0.0) * share).round() as usize;
    values.get(at).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn every_route_is_measured_over_real_networks() {
        let bench = HopBench {
            hops: vec![1, 3],
            n_embd: vec![64],
            steps: 50,
            warm_up: 5,
            quic: false,
            retain: true,
        };
        let costs = bench_hops(&bench).await.unwrap();
        assert_eq!(costs.iter().map(|c| c.hops).collect::<Vec<_>>(), [1, 3]);
        for cost in costs {
            assert_eq!(cost.steps, 50);
            assert!(
                cost.overhead_p50_us > 0.0 && cost.overhead_p50_us <= cost.overhead_p99_us,
                "{cost:?}"
            );
        }
        let none = HopBench {
            steps: 0,
            ..HopBench::default()
        };
        assert!(bench_hops(&none).await.is_err());
    }
}
