//! A client of the swarm: connects, learns who holds what, plans a route, opens sessions. It needs
//! no weights; manifests and tokenizers come by hash from whoever holds them.

use std::{sync::Arc, time::Duration};

use shard_registry::{Manifest, Snapshot};
use swarm_proto::{Hop, LayerRange, ModelId, Peer};

use crate::{
    known_peers::KnownPeers,
    net::{FetchError, Net, NetConfig, NetError},
    peer_book::PeerBook,
    recovery::Session,
    routes::{Explained, Privacy, Routes, SessionSpec},
    session::{Beginning, ClientError, Opener},
};

/// How long connecting waits for a first peer's adverts.
const SYNC_DEADLINE: Duration = Duration::from_secs(10);
/// A client; clones share the network.
#[derive(Clone)]
pub struct Client {
    net: Net,
    routes: Routes,
}

impl Client {
    /// Starts a network of its own and waits, a bounded time, for a first peer's adverts. Where the peers
    /// of the configuration do not answer, or it names none, those of `known` are dialled.
    ///
    /// # Errors
    /// The network does not start. That nobody is there shows when something is asked for.
    pub async fn connect(
        config: NetConfig,
        privacy: Privacy,
        known: Option<&KnownPeers>,
    ) -> Result<Self, NetError> {
        let given = !config.bootstrap.is_empty();
        let net = Net::start(config).await?;
        if let Some(known) = known {
            known.fall_back(&net, given).await;
        }
        net.synced(SYNC_DEADLINE).await;
        Ok(Self::over(net, privacy))
    }

    /// A client over a network that runs already.
    pub fn over(net: Net, privacy: Privacy) -> Self {
        let opener = Opener::new(net.me(), Arc::new(net.clone()));
        let routes = Routes::new(Arc::new(net.clone()), privacy, opener);
        Self { net, routes }
    }

    /// Goes by what `book` says of peers, and writes into it.
    pub fn with_book(mut self, book: PeerBook) -> Self {
        self.routes.keep_book(book);
        self
    }

    /// What is thought of peers.
    pub fn book(&self) -> &PeerBook {
        &self.routes.opener().book
    }

    /// The network.
    pub fn net(&self) -> &Net {
        &self.net
    }

    /// Who may see the prompt.
    pub fn privacy(&self) -> &Privacy {
        self.routes.privacy()
    }

    /// Everything known to be alive, for planning and for pictures.
    pub fn adverts(&self) -> Snapshot {
        self.net.adverts().snapshot()
    }

    /// The models that somebody serves: id, layers, the name that its holders use.
    pub fn models(&self) -> Vec<(ModelId, u16, String)> {
        self.adverts().models()
    }

    /// A manifest by its hash.
    ///
    /// # Errors
    /// Nobody holds it, or nobody sends what hashes to it.
    pub async fn manifest(&self, model: &ModelId) -> Result<Manifest, FetchError> {
        self.net.fetch_manifest(model, self.book()).await
    }

    /// The model's metadata by its hash: tokenizer and chat template, as a vocabulary header wants
    /// it ([`Manifest::vocab_header`]).
    ///
    /// # Errors
    /// As [`Client::manifest`]; a model may be without.
    pub async fn metadata(
        &self,
        model: &ModelId,
        manifest: &Manifest,
    ) -> Result<Vec<u8>, ClientError> {
        let Some(shard) = manifest.metadata() else {
            return Ok(Vec::new());
        };
        self.net
            .fetch_shard(model, &shard.id, self.book())
            .await
            .map_err(model_error)
    }

    /// Opens a session along the cheapest route, or along another when a peer of it fails, then and
    /// later.
    ///
    /// # Errors
    /// No route (the error says which layers are missing), nobody with room, or every route tried
    /// failed.
    pub async fn open(&self, spec: &SessionSpec) -> Result<Session, ClientError> {
        self.open_waiting(spec, Duration::ZERO, |_| {}).await
    }

    /// The same, and where the peers that could do it are full, waits up to `patience` for room;
    /// `busy` hears once of which layers, when the waiting begins.
    ///
    /// # Errors
    /// As [`Client::open`].
    pub async fn open_waiting(
        &self,
        spec: &SessionSpec,
        patience: Duration,
        busy: impl FnOnce(&[LayerRange]),
    ) -> Result<Session, ClientError> {
        self.routes.open_waiting(spec, patience, busy).await
    }

    /// Opens a session that begins with the first `positions` of another one, along the same route: hops that can
    /// copy them compute them no more. What is fed then comes behind them.
    ///
    /// # Errors
    /// The route does not open again: nobody else is asked.
    pub async fn fork(
        &self,
        spec: &SessionSpec,
        of: &Beginning,
        positions: u32,
    ) -> Result<Session, ClientError> {
        self.routes.fork(spec, of, positions).await
    }

    /// The route that [`Client::open`] would take now, without the peers to avoid. Where the adverts
    /// leave none with room, one as if all had: adverts are some seconds old, and hops say it themselves.
    ///
    /// # Errors
    /// There is none.
    pub fn plan(
        &self,
        spec: &SessionSpec,
        avoid: &[Peer],
        seed: u64,
    ) -> Result<Vec<Hop>, ClientError> {
        self.routes.plan(spec, avoid, seed)
    }

    /// The route that [`Client::open`] would take now, with the planner's reasons.
    pub fn explain(&self, spec: &SessionSpec) -> Explained {
        self.routes.explain(spec, self.routes.opener().random.u64())
    }

    /// Leaves the swarm.
    pub async fn shutdown(&self) {
        self.net.shutdown().await;
    }
}

fn model_error(e: impl std::fmt::Display) -> ClientError {
    ClientError::Model(e.to_string())
}
