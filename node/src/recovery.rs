//! A session that outlives its route: when a hop is lost, the rest goes on around it.
//!
//! ```text
//! feed, next_logits ─▶ ClientSession ─ fails ─▶ shun who failed ─▶ plan, keeping the others
//!          ▲                                          ▲                │
//!          └──────── goes on where it was ◀── reopen ─┴── fails ◀──────┘   no route: wait for adverts
//! ```
//!
//! Nothing is lost: the client knows every token, the hops that are left know what they computed.

use std::{collections::HashMap, sync::Arc, time::Duration};

use shard_registry::Snapshot;
use swarm_proto::{Advert, Fault, Hop, LayerRange, ModelId, Peer, Want};
use tokio::time::{Instant, timeout_at};

use crate::{
    client::{Client, SessionSpec},
    session::{ClientError, ClientSession, LogitsRow, Opener},
};

/// How long a session waits, without any progress, for a route to come back.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a peer that failed is not asked again; twice as long each further time.
const SHUNNED: Duration = Duration::from_secs(10);
/// Routes are planned at least so often while none works: what was shunned may be tried again.
const RETRY: Duration = Duration::from_millis(500);
/// A hop that says of so many different neighbours that they are lost is not believed any more.
const ACCUSED_MAX: usize = 2;

/// What a session tells of while it recovers.
#[derive(Debug)]
pub enum Event<'a> {
    /// The route broke.
    Lost(&'a ClientError),
    /// There is no other route just now; the session waits for one.
    Waiting {
        /// What is missing.
        why: &'a ClientError,
        /// How long at most.
        left: Duration,
    },
    /// It goes on.
    Recovered(&'a Recovery),
}

/// A failure that was got over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovery {
    /// Positions fed when it happened.
    pub pos: u32,
    /// What was lost, in words.
    pub lost: String,
    /// Hops of the new route that were not on the old one.
    pub replaced: usize,
    /// From the failure to the new route.
    pub took: Duration,
}

/// Who hears of it.
pub type Listener = Box<dyn FnMut(Event<'_>) + Send>;

/// A session over the swarm that finds another route when a hop is lost.
pub struct Session {
    client: Client,
    opener: Opener,
    spec: SessionSpec,
    inner: ClientSession,
    shunned: Shunned,
    recoveries: Vec<Recovery>,
    listener: Option<Listener>,
}

impl Session {
    pub(crate) fn new(
        client: Client,
        opener: Opener,
        spec: SessionSpec,
        inner: ClientSession,
    ) -> Self {
        Self {
            client,
            opener,
            spec,
            inner,
            shunned: Shunned::default(),
            recoveries: Vec::new(),
            listener: None,
        }
    }

    /// Tells `listener` of failures and recoveries from now on.
    pub fn on_event(&mut self, listener: Listener) {
        self.listener = Some(listener);
    }

    /// What was got over so far.
    pub fn recoveries(&self) -> &[Recovery] {
        &self.recoveries
    }

    /// The hops, in order.
    pub fn route(&self) -> &[Hop] {
        self.inner.route()
    }

    /// Positions that the session holds.
    pub fn pos(&self) -> u32 {
        self.inner.pos()
    }

    /// Positions that the session can hold.
    pub fn n_ctx(&self) -> u32 {
        self.inner.n_ctx()
    }

    /// Tokens in the model's vocabulary.
    pub fn n_vocab(&self) -> u32 {
        self.inner.n_vocab()
    }

    /// As [`ClientSession::truncate`].
    ///
    /// # Errors
    /// `pos` lies beyond what the session holds.
    pub fn truncate(&mut self, pos: u32) -> Result<(), ClientError> {
        self.inner.truncate(pos)
    }

    /// As [`ClientSession::feed`], along another route when this one breaks.
    ///
    /// # Errors
    /// The context is full, or no route was found in time.
    pub async fn feed(&mut self, tokens: &[u32], want: Want) -> Result<(), ClientError> {
        match self.inner.feed(tokens, want).await {
            // What was fed is queued again.
            Err(error) if error.is_recoverable() => self.recover(error).await,
            fed => fed,
        }
    }

    /// As [`ClientSession::next_logits`], along another route when this one breaks.
    ///
    /// # Errors
    /// Nothing was asked for, no route was found in time, or the peers do not compute the same.
    pub async fn next_logits(&mut self) -> Result<LogitsRow, ClientError> {
        loop {
            match self.inner.next_logits().await {
                Err(error) if error.is_recoverable() => self.recover(error).await?,
                row => return row,
            }
        }
    }

    /// As [`ClientSession::recycle`].
    pub fn recycle(&mut self, row: LogitsRow) {
        self.inner.recycle(row);
    }

    /// Frees the KV on every hop, within a deadline.
    pub async fn close(self) {
        self.inner.close().await;
    }

    fn tell(&mut self, event: Event<'_>) {
        if let Some(listener) = &mut self.listener {
            listener(event);
        }
    }

    async fn recover(&mut self, first: ClientError) -> Result<(), ClientError> {
        let begin = Instant::now();
        let deadline = begin + PATIENCE;
        let (pos, before) = (self.inner.pos(), self.inner.route().to_vec());
        self.tell(Event::Lost(&first));
        self.shunned.blame(&first, &before, begin);
        let mut told = false;
        let mut changes = self.client.net().adverts().changes();
        loop {
            let failed = match self.plan(&before) {
                Ok(route) => match self.opener.reopen(&mut self.inner, &route).await {
                    Ok(()) => {
                        let kept = |hop: &Hop| before.iter().any(|old| same(old, hop));
                        let recovery = Recovery {
                            pos,
                            lost: first.to_string(),
                            replaced: route.iter().filter(|hop| !kept(hop)).count(),
                            took: begin.elapsed(),
                        };
                        tracing::info!(took = ?recovery.took, replaced = recovery.replaced, "went on along another route");
                        self.tell(Event::Recovered(&recovery));
                        self.recoveries.push(recovery);
                        return Ok(());
                    }
                    Err(error) if !error.is_recoverable() => return Err(error),
                    Err(error) => {
                        tracing::info!(%error, "another route failed to open");
                        if !self.shunned.blame(&error, &route, Instant::now()) {
                            // The same route would be planned at once, and fail again.
                            let until = Instant::now() + RETRY;
                            let _ = timeout_at(until.min(deadline), changes.changed()).await;
                        }
                        error
                    }
                },
                Err(none) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if !told {
                        self.tell(Event::Waiting { why: &none, left });
                        told = true;
                    }
                    let news =
                        timeout_at((Instant::now() + RETRY).min(deadline), changes.changed());
                    let _ = news.await;
                    none
                }
            };
            if Instant::now() >= deadline {
                return Err(ClientError::Exhausted {
                    tries: self.recoveries.len() + 1,
                    last: Box::new(failed),
                });
            }
        }
    }

    /// A route that keeps what it can of the old one; where there is none, any.
    fn plan(&self, before: &[Hop]) -> Result<Vec<Hop>, ClientError> {
        let now = Instant::now();
        let avoid = self.shunned.at(now);
        let keep: Vec<Hop> = before
            .iter()
            .filter(|hop| !avoid.contains(&hop.peer))
            .cloned()
            .collect();
        let snapshot = self.client.adverts();
        let keeping = keeping(&snapshot, &self.spec.model, &keep);
        let plan = |snapshot: &Snapshot, avoid: &[Peer]| {
            self.client
                .plan_in(snapshot, &self.spec, avoid, rand::random())
        };
        plan(&keeping, &avoid)
            .map(|route| cut_at(route, &keep))
            .or_else(|_| plan(&snapshot, &avoid))
            // Nobody else is left: perhaps it was only slow, or is back.
            .or_else(|_| plan(&snapshot, &[]))
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("route", &self.inner.route())
            .field("recoveries", &self.recoveries)
            .finish_non_exhaustive()
    }
}

fn same(a: &Hop, b: &Hop) -> bool {
    (a.peer, a.layers) == (b.peer, b.layers)
}

/// Peers that failed this session, for a while.
#[derive(Debug, Default)]
struct Shunned {
    until: HashMap<Peer, (Instant, u32)>,
    /// Who was accused by whom.
    accused: HashMap<Peer, Vec<Peer>>,
}

impl Shunned {
    /// Notes who is to be avoided after this failure on this route; false where it is nobody's fault.
    fn blame(&mut self, error: &ClientError, route: &[Hop], now: Instant) -> bool {
        let Some(culprit) = error.culprit(route) else {
            return false;
        };
        self.shun(culprit, now);
        let ClientError::Hop { hop, failure } = error else {
            return true;
        };
        let reporter = hop.at.checked_sub(1).and_then(|at| route.get(at));
        let Some(reporter) = reporter.filter(|_| failure.fault == Fault::Peer) else {
            return true;
        };
        let accused = self.accused.entry(reporter.peer).or_default();
        if !accused.contains(&culprit) {
            accused.push(culprit);
        }
        // One neighbour may die; of one who loses every neighbour the fault is its own.
        if accused.len() > ACCUSED_MAX {
            self.shun(reporter.peer, now);
        }
        true
    }

    fn shun(&mut self, peer: Peer, now: Instant) {
        let (until, times) = self.until.entry(peer).or_insert((now, 0));
        *times = (*times + 1).min(6);
        *until = now + SHUNNED * (1 << (*times - 1));
    }

    fn at(&self, now: Instant) -> Vec<Peer> {
        let shunned = self.until.iter().filter(|(_, (until, _))| *until > now);
        shunned.map(|(peer, _)| *peer).collect()
    }
}

/// The adverts as they would be if the kept hops were the only holders of their layers, with room for
/// this session, which they have already.
fn keeping(snapshot: &Snapshot, model: &ModelId, keep: &[Hop]) -> Snapshot {
    let advert = |advert: &Arc<Advert>| {
        let mut advert = Advert::clone(advert);
        for of_model in advert.models.iter_mut().filter(|m| m.model == *model) {
            let ours: Vec<LayerRange> = keep
                .iter()
                .filter(|hop| hop.peer == advert.peer)
                .map(|hop| hop.layers)
                .collect();
            let mut live: Vec<LayerRange> = of_model.live.clone();
            for hop in keep {
                live = live
                    .into_iter()
                    .flat_map(|span| without(span, hop.layers))
                    .collect();
            }
            if !ours.is_empty() {
                of_model.free_cells = u64::MAX;
                live.extend(ours);
            }
            of_model.live = live;
        }
        Arc::new(advert)
    };
    Snapshot {
        adverts: snapshot.adverts.iter().map(advert).collect(),
    }
}

fn without(span: LayerRange, hole: LayerRange) -> impl Iterator<Item = LayerRange> {
    let before = LayerRange {
        start: span.start,
        end: span.end.min(hole.start),
    };
    let after = LayerRange {
        start: span.start.max(hole.end),
        end: span.end,
    };
    [before, after]
        .into_iter()
        .filter(|part| part.start < part.end)
}

/// Hops that the planner made one of a kept one and its neighbour, apart again.
fn cut_at(route: Vec<Hop>, keep: &[Hop]) -> Vec<Hop> {
    let mut out = Vec::new();
    for hop in route {
        let mut rest = hop.layers;
        let mut cuts: Vec<u16> = keep
            .iter()
            .flat_map(|kept| [kept.layers.start, kept.layers.end])
            .collect();
        cuts.sort_unstable();
        for cut in cuts {
            if rest.start < cut && cut < rest.end {
                out.push(Hop {
                    layers: LayerRange {
                        start: rest.start,
                        end: cut,
                    },
                    ..hop.clone()
                });
                rest.start = cut;
            }
        }
        out.push(Hop {
            layers: rest,
            ..hop
        });
    }
    out
}
