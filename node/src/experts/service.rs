//! The holder's side: takes streams of trunks and answers their calls with what this node holds.
//!
//! Bounded in streams, over all and for each peer, in calls under way on a stream, and by the worker's own queue.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use engine::ExpertWorker;
use serde::Serialize;
use swarm_proto::ModelId;
use tokio::task::JoinHandle;

use super::served;
use crate::{
    net::{Net, Proto},
    pause::Pause,
    shares::Shares,
};

/// Streams that may be open, over all peers: one a trunk.
const STREAMS_MAX: usize = 64;
/// Those of one peer: one for each model of a few, and a second while one starts anew.
const STREAMS_PER_PEER_MAX: usize = 4;

/// What was done for trunks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ServiceStats {
    /// Streams open now.
    pub streams: usize,
    /// Calls answered with rows.
    pub calls: u64,
    /// Rows in these answers.
    pub rows: u64,
    /// Streams and calls that got a refusal.
    pub refused: u64,
}

/// Answers calls for experts; clones share it.
#[derive(Clone)]
pub struct ExpertService {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    offers: RwLock<HashMap<ModelId, Arc<ExpertWorker>>>,
    pause: Option<Pause>,
    streams: Shares<swarm_proto::Peer>,
    calls: AtomicU64,
    rows: AtomicU64,
    refused: AtomicU64,
}

impl ExpertService {
    /// A service of nothing yet; while `pause` holds, everybody is refused.
    pub fn new(pause: Option<Pause>) -> Self {
        Self {
            inner: Arc::new(Inner {
                offers: RwLock::default(),
                pause,
                streams: Shares::new(STREAMS_MAX, STREAMS_PER_PEER_MAX),
                calls: AtomicU64::new(0),
                rows: AtomicU64::new(0),
                refused: AtomicU64::new(0),
            }),
        }
    }

    /// Takes streams until the network is shut down; `None` where somebody does so already.
    pub fn serve(&self, net: &Net) -> Option<JoinHandle<()>> {
        let mut streams = net.accept(Proto::Experts)?;
        let inner = self.inner.clone();
        Some(tokio::spawn(async move {
            while let Some((peer, stream)) = streams.recv().await {
                let share = match inner.streams.take(peer) {
                    Ok(share) => share,
                    Err(why) => {
                        tracing::debug!(%peer, ?why, "stream for experts dropped");
                        inner.refuse();
                        continue;
                    }
                };
                let inner = inner.clone();
                tokio::spawn(async move {
                    if let Err(why) = served::serve(&inner, stream).await {
                        tracing::debug!(%peer, %why, "stream for experts ended");
                    }
                    drop(share);
                });
            }
        }))
    }

    /// Answers calls for `model` with the experts that `worker` holds at the time.
    pub fn offer(&self, model: ModelId, worker: Arc<ExpertWorker>) {
        self.inner.offers_mut().insert(model, worker);
    }

    /// Answers no more calls for `model`; those under way are.
    pub fn withdraw(&self, model: &ModelId) {
        self.inner.offers_mut().remove(model);
    }

    /// What was done so far.
    pub fn stats(&self) -> ServiceStats {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let inner = &self.inner;
        ServiceStats {
            streams: inner.streams.taken(),
            calls: get(&inner.calls),
            rows: get(&inner.rows),
            refused: get(&inner.refused),
        }
    }
}

impl Inner {
    fn offers_mut(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<ModelId, Arc<ExpertWorker>>> {
        // Each change is one call: no invariant spans a panic.
        self.offers.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn offer(&self, model: &ModelId) -> Option<Arc<ExpertWorker>> {
        let offers = self.offers.read().unwrap_or_else(PoisonError::into_inner);
        offers.get(model).cloned()
    }

    pub(super) fn is_paused(&self) -> bool {
        self.pause
            .as_ref()
            .is_some_and(|pause| pause.now().is_some())
    }

    pub(super) fn refuse(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn answered(&self, rows: u64) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.rows.fetch_add(rows, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use engine::{ExpertHolder, ExpertLayout, FileSource, RandomShape, RandomWeights};
    use swarm_proto::{ExpertAsk, ExpertGive, ExpertRefusal, Hash};
    use tokio::time::timeout;

    use super::*;
    use crate::{experts::wire, net::Stream, quiet_hours::QuietHours, session::wire::Pipe};

    const MODEL: ModelId = ModelId(Hash([7; 32]));

    fn worker() -> Arc<ExpertWorker> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        let shape = RandomShape {
            n_expert: 4,
            n_expert_used: 2,
            ..RandomShape::tiny()
        };
        let weights = RandomWeights::One(gguf::TensorType::F32);
        engine::random_model("olmoe", &shape, weights, 1, &path).unwrap();
        let source = FileSource::open(&path).unwrap();
        let layout = Arc::new(ExpertLayout::new(source.header()).unwrap());
        let holder = ExpertHolder::new(layout, 1).unwrap();
        Arc::new(ExpertWorker::spawn(holder, 4).unwrap())
    }

    async fn said(pipe: &mut Pipe) -> ExpertGive {
        pipe.flush().await.unwrap();
        let said = timeout(Duration::from_secs(30), pipe.frame()).await;
        said.unwrap().unwrap().expect("it closed the stream")
    }

    fn trunk(service: &ExpertService) -> Pipe {
        let (near, far) = tokio::io::duplex(1 << 16);
        let inner = service.inner.clone();
        tokio::spawn(async move { served::serve(&inner, Stream::new(far)).await });
        let mut pipe = Pipe::new(Stream::new(near), wire::HELLO);
        pipe.push(&ExpertAsk::Hello { model: MODEL });
        pipe
    }

    #[tokio::test]
    async fn who_is_not_served_is_told_why() {
        let home = tempfile::tempdir().unwrap();
        let pause = Pause::load(home.path(), QuietHours::default());
        let service = ExpertService::new(Some(pause.clone()));
        let refused = said(&mut trunk(&service)).await;
        assert!(matches!(&refused, ExpertGive::Refused(why) if why.contains("no experts")));

        let worker = worker();
        service.offer(MODEL, worker.clone());
        let mut pipe = trunk(&service);
        assert_eq!(said(&mut pipe).await, ExpertGive::Serving { n_embd: 256 });
        let mut call = wire::tests::call(&[(2, &[0])], 1);
        call.layer = 0;
        (call.n_embd, call.hidden) = (256, vec![0.5; 256]);
        call.form.parts = worker.layout().parts(0);
        let ask = async |pipe: &mut Pipe, id| {
            let mut frame = Vec::new();
            wire::encode_call(id, &call, &mut frame).unwrap();
            pipe.push_encoded(&frame);
            match said(pipe).await {
                ExpertGive::Failed { id: of, why } if of == id => why,
                other => panic!("{other:?}"),
            }
        };
        let none = ExpertRefusal::NotHeld { expert: 2 };
        assert_eq!(ask(&mut pipe, 1).await, none);
        pause.pause(None).unwrap();
        assert_eq!(ask(&mut pipe, 2).await, ExpertRefusal::Paused);
        let refused = said(&mut trunk(&service)).await;
        assert!(matches!(&refused, ExpertGive::Refused(why) if why.contains("owner")));
        pause.resume().unwrap();
        service.withdraw(&MODEL);
        assert_eq!(ask(&mut pipe, 3).await, none, "as one that holds nothing");
        assert_eq!((service.stats().calls, service.stats().refused), (0, 5));
    }
}
