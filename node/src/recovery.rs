//! A session that outlives its route: when a hop is lost, the rest goes on around it.
//!
//! ```text
//! feed, next_logits ─▶ ClientSession ─ fails ─▶ shun who failed ─▶ plan, keeping the others
//!          ▲                                          ▲                │
//!          └──────── goes on where it was ◀── reopen ─┴── fails ◀──────┘   no route: wait for adverts
//! ```
//!
//! Nothing is lost: the client knows every token, the hops that are left know what they computed.

use std::{collections::HashMap, time::Duration};

use shard_registry::Snapshot;
use swarm_proto::{Fault, Hop, LayerRange, ModelId, Numerics, Peer, Want};
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{Instrument, Span};

use crate::{
    experience::{STEPS, quick},
    peer_book::PeerBook,
    routes::{Routes, SessionSpec},
    session::{ClientError, ClientSession, Lender, LogitsRow, Route},
};

/// Losses further apart have nothing to do with each other.
const APART: Duration = Duration::from_secs(10);
/// Routes are planned so often while none works: what was shunned may be tried again.
const RETRY: Duration = Duration::from_millis(500);
/// A hop that says of so many different neighbours that they are lost is not believed any more.
const ACCUSED_MAX: usize = 2;

/// How much the log-probability of the last answer may differ when peers of another numerics class compute
/// it again, or the kernels of a model whose rows depend on who runs along: honest ones stay well below, another model's answer does not.
const CLASSES_DIFFER: f32 = 0.5;

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
    /// Whether all peers of both routes compute the same bits; else what follows may differ in a close
    /// choice from what the first route would have said.
    pub exact: bool,
}

/// Who hears of it.
pub type Listener = Box<dyn FnMut(Event<'_>) + Send>;

/// A session over the swarm that finds another route when a hop is lost.
pub struct Session {
    routes: Routes,
    spec: SessionSpec,
    inner: ClientSession,
    blame: Blame,
    /// The numerics class of every peer that was on a route.
    classes: HashMap<Peer, u64>,
    recoveries: Vec<Recovery>,
    stuck: Stuck,
    listener: Option<Listener>,
    /// In which it was opened: what comes later is part of the same trace.
    span: Span,
}

/// Losses one after the other without an answer between them.
#[derive(Debug, Default)]
struct Stuck {
    since: Option<Instant>,
    /// When the last one was got over.
    until: Option<Instant>,
    times: u32,
}

impl Session {
    pub(crate) fn new(routes: Routes, spec: SessionSpec, inner: ClientSession) -> Self {
        let mut session = Self {
            routes,
            spec,
            inner,
            blame: Blame::default(),
            classes: HashMap::new(),
            recoveries: Vec::new(),
            stuck: Stuck::default(),
            listener: None,
            span: Span::current(),
        };
        let hops = session.inner.route().hops.clone();
        session.note_classes(&hops);
        session
    }

    /// Tells `listener` of failures and recoveries from now on.
    pub fn on_event(&mut self, listener: Listener) {
        self.listener = Some(listener);
    }

    /// As [`ClientSession::lend`].
    pub fn lend(&mut self, to: Lender) {
        self.inner.lend(to);
    }

    /// As [`ClientSession::spared`].
    pub fn spared(&self) -> u32 {
        self.inner.spared()
    }

    /// As [`ClientSession::tokens`].
    pub fn tokens(&self) -> &[u32] {
        self.inner.tokens()
    }

    /// The span in which it was opened.
    pub(crate) fn span(&self) -> &Span {
        &self.span
    }

    /// What was got over so far.
    pub fn recoveries(&self) -> &[Recovery] {
        &self.recoveries
    }

    /// The hops, in order.
    pub fn route(&self) -> &[Hop] {
        &self.inner.route().hops
    }

    /// Who stands by for which of them, each as the hop it would be.
    pub fn standbys(&self) -> Vec<Hop> {
        let route = self.inner.route();
        let hops = route.hops.iter();
        hops.filter_map(|hop| route.standby_for(hop.layers))
            .collect()
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
                row => {
                    self.stuck = Stuck::default();
                    if self.inner.steps().len() >= STEPS {
                        self.note_steps();
                    }
                    return row;
                }
            }
        }
    }

    /// As [`ClientSession::recycle`].
    pub fn recycle(&mut self, row: LogitsRow) {
        self.inner.recycle(row);
    }

    /// Frees the KV on every hop, within a deadline.
    pub async fn close(self) {
        let hops = self.inner.route().hops.iter();
        self.book().served(hops.map(|hop| hop.peer));
        self.inner.close().await;
    }

    /// What the last tokens tell of the hops.
    fn note_steps(&mut self) {
        if let Some(step) = quick(self.inner.take_steps()) {
            let hops = &self.inner.route().hops;
            self.routes.saw(&self.spec, hops, step);
        }
    }

    fn book(&self) -> &PeerBook {
        &self.routes.opener().book
    }

    fn tell(&mut self, event: Event<'_>) {
        if let Some(listener) = &mut self.listener {
            listener(event);
        }
    }

    async fn recover(&mut self, first: ClientError) -> Result<(), ClientError> {
        // What comes now is of another route.
        self.note_steps();
        let begin = Instant::now();
        let deadline = self.stuck.begin(begin) + self.spec.patience;
        sleep_until((begin + self.stuck.pause()).min(deadline)).await;
        let (pos, before) = (self.inner.pos(), self.inner.route().clone());
        self.tell(Event::Lost(&first));
        self.blame.note(&self.routes, &first, &before.hops);
        let (mut told, mut tried) = (false, Vec::new());
        let mut changes = self.routes.view().changes();
        loop {
            let failed = match self.plan(&before) {
                Ok((route, hopeful)) => match self.reopen(&route).await {
                    Ok(exact) => {
                        let recovery = Recovery {
                            pos,
                            lost: first.to_string(),
                            replaced: replaced(&before, &route),
                            took: begin.elapsed(),
                            exact,
                        };
                        self.blame.over(&self.routes.opener().book);
                        self.stuck.until = Some(Instant::now());
                        self.recovered(recovery);
                        return Ok(());
                    }
                    Err(error) if !error.is_recoverable() => return Err(error),
                    Err(error) => {
                        tracing::info!(%error, "another route failed to open");
                        let learned = self.blame.note(&self.routes, &error, &route.hops);
                        let culprit = error.culprit(&route.hops);
                        let fresh = culprit.filter(|peer| !tried.contains(peer));
                        tried.extend(fresh);
                        // Of many who may be gone each is asked once without a pause.
                        if !(learned && (hopeful || fresh.is_some())) {
                            sleep_until((Instant::now() + RETRY).min(deadline)).await;
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
                    let soon = (Instant::now() + RETRY).min(deadline);
                    let _ = timeout_at(soon, changes.changed()).await;
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

    /// Opens the session along `route`; whether all peers so far compute the same bits.
    async fn reopen(&mut self, route: &Route) -> Result<bool, ClientError> {
        self.note_classes(&route.hops);
        let mut classes = self.classes.values();
        let first = classes.next();
        let exact = classes.all(|class| Some(class) == first);
        // Rows that ran with others may have other bits when they run again.
        let noisy = self.spec.numerics == Numerics::Fast && self.spec.batch <= 1;
        self.inner.tolerate(match exact && !noisy {
            true => 0.0,
            false => CLASSES_DIFFER,
        });
        let opener = self.routes.opener();
        let reopened = opener.reopen(&mut self.inner, route.clone());
        reopened.instrument(self.span.clone()).await?;
        Ok(exact)
    }

    fn recovered(&mut self, recovery: Recovery) {
        self.span.in_scope(|| {
            tracing::info!(took = ?recovery.took, replaced = recovery.replaced, "went on along another route");
        });
        self.tell(Event::Recovered(&recovery));
        self.recoveries.push(recovery);
    }

    fn note_classes(&mut self, hops: &[Hop]) {
        let snapshot = self.routes.view().adverts();
        for hop in hops {
            if let Some(model) = snapshot.of_model(&hop.peer, &self.spec.model) {
                self.classes.insert(hop.peer, model.numerics);
            }
        }
    }

    /// A route that keeps what it can of the old one, and who stood by for what is lost, else any; and
    /// whether it uses nobody who is shunned.
    fn plan(&self, before: &Route) -> Result<(Route, bool), ClientError> {
        // Who is on the route and has not failed it is as good as any.
        let on_it = |peer: &Peer| before.hops.iter().any(|hop| hop.peer == *peer);
        let mut avoid = self.routes.left_alone();
        let failed = |peer: &Peer| self.blame.failed.iter().position(|failed| failed == peer);
        avoid.retain(|peer| failed(peer).is_some() || !on_it(peer));
        // Where some must be forgiven: who failed another session before who failed this one.
        avoid.sort_by_key(failed);
        let good = |hop: &Hop| !avoid.contains(&hop.peer);
        let kept = |hop: &Hop| {
            let stood = || before.standby_for(hop.layers).filter(good);
            if good(hop) {
                Some(hop.clone())
            } else {
                stood()
            }
        };
        let keep: Vec<Hop> = before.hops.iter().filter_map(kept).collect();
        let snapshot = self.routes.view().adverts();
        let keeping = keeping(&snapshot, &self.spec.model, &keep);
        let (hops, hopeful) = self
            .plan_in(&keeping, &avoid)
            .map(|route| cut_at(route, &keep))
            .or_else(|_| self.plan_in(&snapshot, &avoid))
            .map(|route| (route, true))
            .or_else(|none| {
                let route = self.plan_forgiving(&snapshot, avoid.clone(), none)?;
                Ok((route, false))
            })?;
        avoid.retain(|peer| failed(peer).is_some());
        let standbys = self.routes.standbys(&self.spec, &hops, &avoid, before);
        Ok((Route { hops, standbys }, hopeful))
    }

    /// Nobody else is left: perhaps one who is shunned was only slow, or is back. As few as needed are
    /// forgiven, those first whose time is over first.
    fn plan_forgiving(
        &self,
        snapshot: &Snapshot,
        mut avoid: Vec<Peer>,
        mut none: ClientError,
    ) -> Result<Vec<Hop>, ClientError> {
        loop {
            let ClientError::NoRoute(no_route) = &none else {
                return Err(none);
            };
            let holds = |peer: &Peer| {
                let models = snapshot
                    .get(peer)
                    .into_iter()
                    .flat_map(|advert| &advert.models);
                models
                    .flat_map(|model| &model.live)
                    .any(|live| no_route.excluded.iter().any(|range| live.meets(*range)))
            };
            // `avoid` is sorted: those who failed longest ago come first.
            let Some(at) = avoid.iter().position(holds) else {
                return Err(none);
            };
            avoid.remove(at);
            match self.plan_in(snapshot, &avoid) {
                Ok(route) => return Ok(route),
                Err(error) => none = error,
            }
        }
    }

    fn plan_in(&self, snapshot: &Snapshot, avoid: &[Peer]) -> Result<Vec<Hop>, ClientError> {
        let seed = self.routes.opener().random.u64();
        self.routes.plan_in(snapshot, &self.spec, avoid, seed)
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

/// Hops of the new route that were not on the old one.
fn replaced(before: &Route, route: &Route) -> usize {
    let kept = |hop: &Hop| before.hops.iter().any(|old| same(old, hop));
    route.hops.iter().filter(|hop| !kept(hop)).count()
}

fn same(a: &Hop, b: &Hop) -> bool {
    (a.peer, a.layers) == (b.peer, b.layers)
}

impl Stuck {
    /// Another loss; since when there has been nothing else.
    fn begin(&mut self, now: Instant) -> Instant {
        if self.until.is_some_and(|until| now > until + APART) {
            *self = Self::default();
        }
        self.times += 1;
        *self.since.get_or_insert(now)
    }

    /// None for two neighbours that go at once; a route that opens and breaks each time is not tried at the
    /// speed of the network.
    fn pause(&self) -> Duration {
        match self.times {
            0..=2 => Duration::ZERO,
            more => RETRY.min(Duration::from_millis(20) * (1 << more.min(6))),
        }
    }
}

/// Who failed this session, beside what the book says of them.
#[derive(Debug, Default)]
struct Blame {
    /// Who was accused by whom.
    accused: HashMap<Peer, Vec<Peer>>,
    /// Who said once that it could not feed the hop below it.
    forgetful: Vec<Peer>,
    /// Who failed it, the latest last.
    failed: Vec<Peer>,
    /// First hops of this recovery that we lost ourselves: where there are several, the fault was ours.
    ours: Vec<Peer>,
}

impl Blame {
    /// Notes in the book who is to be avoided after this failure on this route; whether another try has
    /// better prospects now.
    fn note(&mut self, routes: &Routes, error: &ClientError, route: &[Hop]) -> bool {
        let book = &routes.opener().book;
        let Some(culprit) = error.culprit(route) else {
            return false;
        };
        if error.is_not_retained() && !self.forgetful.contains(&culprit) {
            // It gave the session up with this, and begins anew when it is asked again.
            self.forgetful.push(culprit);
            return true;
        }
        let ClientError::Hop { hop, failure } = error else {
            return true;
        };
        self.failed.retain(|peer| *peer != culprit);
        self.failed.push(culprit);
        if error.without_room().is_some() || error.is_leaving() {
            book.full(culprit, &failure.message);
            return true;
        }
        if hop.at > 0 {
            book.accused(culprit, &failure.message);
        } else {
            book.failed(culprit, &failure.message);
            if !self.ours.contains(&culprit) {
                self.ours.push(culprit);
            }
        }
        let reporter = hop.at.checked_sub(1).and_then(|at| route.get(at));
        let Some(reporter) = reporter.filter(|_| failure.fault == Fault::Peer) else {
            return true;
        };
        let accused = self.accused.entry(reporter.peer).or_default();
        if !accused.contains(&culprit) {
            accused.push(culprit);
        }
        routes.view().look_for(culprit);
        // One neighbour may die; of one who loses every neighbour, and those whom we reach, the fault is its own.
        let gone = routes.view().unreachable();
        let reached = accused.iter().filter(|peer| !gone.contains(peer));
        if reached.count() > ACCUSED_MAX {
            book.failed(reporter.peer, "it loses all its neighbours");
            self.failed.push(reporter.peer);
        }
        true
    }

    /// The session goes on. Whoever loses several first hops in a row was away itself.
    fn over(&mut self, book: &PeerBook) {
        let ours = std::mem::take(&mut self.ours);
        if ours.len() > 1 {
            book.forgive(&ours);
        }
    }
}

/// The adverts as they would be if the kept hops were the only holders of their layers, with room for
/// this session, which they have already.
fn keeping(snapshot: &Snapshot, model: &ModelId, keep: &[Hop]) -> Snapshot {
    snapshot.with(|advert| {
        let peer = advert.peer;
        for of_model in advert.models.iter_mut().filter(|m| m.model == *model) {
            let ours: Vec<LayerRange> = keep
                .iter()
                .filter(|hop| hop.peer == peer)
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
    })
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
