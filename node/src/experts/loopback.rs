//! An island whose holders are in this process, behind networks of their own: what the wire costs, without any other
//! machine. For benches.

use std::{sync::Arc, time::Duration};

use engine::{ExpertLayout, ExpertWorker};
use swarm_proto::{ExpertSpan, ExpertsAdvert, Hash, ModelAdvert, ModelId, SwarmId};
use tokio::{runtime::Handle, time::timeout};

use super::{ExpertService, Island, IslandFacts, IslandOptions};
use crate::{
    identity::Identity,
    net::{Announcement, Net, NetConfig},
    peer_book::PeerBook,
    session::BenchError,
};

/// The model of the bench.
const MODEL: ModelId = ModelId(Hash([0xbf; 32]));
/// All of it computes the same bits.
const NUMERICS: u64 = 1;
/// How long the holders may take to find each other.
const READY_DEADLINE: Duration = Duration::from_secs(60);

/// A trunk's network, its holders', and the island.
pub struct Loopback {
    island: Arc<Island>,
    nets: Vec<Net>,
}

impl Loopback {
    /// Starts a holder for each worker and waits until all experts can be asked for.
    ///
    /// # Errors
    /// A network that does not start, or experts that no worker has.
    pub async fn start(
        layout: &ExpertLayout,
        workers: Vec<Arc<ExpertWorker>>,
    ) -> Result<Loopback, BenchError> {
        let trunk = start(None).await?;
        let mut nets = vec![trunk.clone()];
        for worker in workers {
            let net = start(Some(&trunk)).await?;
            let service = ExpertService::new(None);
            let _ = service.serve(&net);
            net.publish(announcement(layout, &worker)).await;
            service.offer(MODEL, worker);
            nets.push(net);
        }
        let facts = IslandFacts::new(MODEL, layout, NUMERICS);
        let options = IslandOptions {
            // A machine that does something else, too, is still the same machine.
            rtt_max: READY_DEADLINE,
            ..IslandOptions::default()
        };
        let (book, runtime) = (PeerBook::default(), Handle::current());
        let island = Island::new(trunk, book, runtime, facts, options);
        let mut changes = island.changes();
        let ready =
            async { while !island.missing().is_empty() && changes.changed().await.is_ok() {} };
        let ready = timeout(READY_DEADLINE, ready).await;
        ready.map_err(|_| BenchError::Options("the holders did not find each other".into()))?;
        Ok(Loopback { island, nets })
    }

    /// The island.
    pub fn island(&self) -> Arc<Island> {
        self.island.clone()
    }

    /// Ends it.
    pub async fn stop(self) {
        self.island.close();
        for net in self.nets {
            net.shutdown().await;
        }
    }
}

async fn start(near: Option<&Net>) -> Result<Net, BenchError> {
    let swarm: SwarmId = "bench-experts"
        .parse()
        .map_err(|e| BenchError::Options(format!("{e}")))?;
    let mut config = NetConfig::client(Identity::generate(), swarm);
    config.listen = vec!["/ip4/127.0.0.1/tcp/0".into()];
    config.bootstrap = near.map(Net::listen_addrs).unwrap_or_default();
    Ok(Net::start(config).await?)
}

fn announcement(layout: &ExpertLayout, worker: &ExpertWorker) -> Announcement {
    let narrow =
        |(layer, expert): (u32, u32)| Some((layer.try_into().ok()?, expert.try_into().ok()?));
    let live = ExpertSpan::of(worker.held().into_iter().filter_map(narrow));
    let last = layout.layers().max().unwrap_or(0);
    let model = ModelAdvert {
        model: MODEL,
        name: "bench".into(),
        n_layer: u16::try_from(last + 1).unwrap_or(u16::MAX),
        live: Vec::new(),
        intended: Vec::new(),
        layer_tokens_s: None,
        n_ctx_max: 0,
        free_cells: 0,
        n_embd: layout.n_embd(),
        numerics: NUMERICS,
        stored: Vec::new(),
        layer_bytes_max: None,
        experts: Some(ExpertsAdvert {
            live,
            ..ExpertsAdvert::default()
        }),
    };
    Announcement {
        models: vec![model],
        ..Announcement::default()
    }
}
