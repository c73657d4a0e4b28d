//! A session on one hop, from its first opening to its end, over as many routes as it takes.
//!
//! ```text
//!            ┌────────── opened again ◀───────────┐
//!            ▼                                    │
//!  Run ─ below or upstream lost ─▶ Keep ─ client comes back, in a higher epoch
//!   └─ closed, failed ─▶ End ◀── nobody came in time
//! ```
//!
//! What a hop holds (KV, retained frames) outlives its streams, so that losing one hop costs the
//! others nothing. Only the client raises the epoch: a stream of an older one finds nobody.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use swarm_proto::{Failure, FailureCode, Fault, LayerRange, ModelId, Open, Peer, SessionId};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    admit::admit,
    failure::{fail, is_goodbye, is_leaving},
    fork::ForkAsk,
    hop::{Chain, Lease, Served, Shared},
    relay::{Below, End, Relay},
    standby::{Fed, resume_at, streams_to},
    tail::Place,
    wire::Pipe,
};

/// How long who needs room waits for a session to give way.
const GIVE_WAY: Duration = Duration::from_secs(1);
/// A session without work for so long may give way to one that has some.
const REST: Duration = Duration::from_secs(5);
/// Openings that may wait for a session's task: a client that is in a hurry sends one, then another.
const COMEBACKS_MAX: usize = 2;
/// Forks that may wait for it: as many sessions as begin alike at once. Others begin empty.
const FORKS_MAX: usize = 16;

/// An opening of a session that is held here already, on a stream of its own.
pub(super) struct Comeback {
    pub(super) from: Peer,
    pub(super) open: Open,
    pub(super) up: Pipe,
}

/// Whose session: the client, the number it drew, and the layers, for a peer may be on a route twice.
type Key = (Peer, SessionId, LayerRange);

/// Where this opening belongs.
pub(super) fn key(open: &Open) -> Key {
    let hop = open.hops.get(usize::from(open.at));
    let layers = hop.map_or(LayerRange { start: 0, end: 0 }, |hop| hop.layers);
    (open.client, open.session, layers)
}

/// Where openings of sessions that are held here are handed over, and where one that needs their room finds
/// those that nothing runs on.
#[derive(Clone, Default)]
pub(super) struct Desks(Arc<Mutex<HashMap<Key, Entry>>>);

struct Entry {
    model: ModelId,
    to: mpsc::Sender<Comeback>,
    forks: mpsc::Sender<ForkAsk>,
    idle: Idle,
    give_way: CancellationToken,
    goes: CancellationToken,
}

/// What reaches the task of a session beside its streams.
pub(super) struct Calls {
    comebacks: mpsc::Receiver<Comeback>,
    forks: mpsc::Receiver<ForkAsk>,
}

/// Whether a session could give way to one that runs; those that cost least first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Idle {
    /// It stands by: whoever it stands by for is there.
    StandingBy,
    /// It is kept for a client who may come back.
    Kept,
    /// Its client has not asked for anything for a while; it is there, and can compute it again.
    Resting,
    /// It runs, or is about to.
    No,
}

/// A session's place among them, given up when dropped.
pub(super) struct Desk {
    desks: Desks,
    key: Key,
    ours: mpsc::WeakSender<Comeback>,
    /// Somebody who runs needs its room.
    give_way: CancellationToken,
    /// It is to go on elsewhere, whether it runs or not.
    goes: CancellationToken,
}

impl Desks {
    /// Openings of this session come to the receiver from now on, and so do those of sessions that begin as it.
    pub(super) fn take(&self, open: &Open) -> (Desk, Calls) {
        let (to, comebacks) = mpsc::channel(COMEBACKS_MAX);
        let (forks, asked) = mpsc::channel(FORKS_MAX);
        let key = key(open);
        let desk = Desk {
            desks: self.clone(),
            key,
            ours: to.downgrade(),
            give_way: CancellationToken::new(),
            goes: CancellationToken::new(),
        };
        let entry = Entry {
            model: open.model,
            to,
            forks,
            idle: Idle::No,
            give_way: desk.give_way.clone(),
            goes: desk.goes.clone(),
        };
        self.lock().insert(key, entry);
        let forks = asked;
        (desk, Calls { comebacks, forks })
    }

    /// Asks the task that holds a session of the same client and layers for its beginning; false where there is none.
    pub(super) fn fork(&self, open: &Open, session: SessionId, ask: ForkAsk) -> bool {
        let (client, _, layers) = key(open);
        let desks = self.lock();
        let entry = desks.get(&(client, session, layers));
        entry.is_some_and(|entry| entry.forks.try_send(ask).is_ok())
    }

    /// Tells the sessions of a model on layers that `go` that they go on elsewhere; how many they are.
    pub(super) fn leave(&self, model: &ModelId, go: impl Fn(LayerRange) -> bool) -> usize {
        let desks = self.lock();
        let leaving = desks
            .iter()
            .filter(|(key, entry)| entry.model == *model && go(key.2));
        leaving.map(|(_, entry)| entry.goes.cancel()).count()
    }

    /// Has a session end that nothing runs on, and waits until its KV is free; false where there is none.
    pub(super) async fn make_room(&self) -> bool {
        let to = {
            let desks = self.lock();
            let idle = desks
                .iter()
                .filter(|(_, entry)| entry.idle != Idle::No && !entry.give_way.is_cancelled());
            let Some((_, entry)) = idle.min_by_key(|(key, entry)| (entry.idle, **key)) else {
                return false;
            };
            entry.give_way.cancel();
            entry.to.clone()
        };
        // It may be about to say goodbye to somebody who does not listen.
        timeout(GIVE_WAY, to.closed()).await.is_ok()
    }

    /// Hands an opening to the task that holds its session; gives it back where there is none.
    pub(super) fn hand_over(&self, from: Peer, open: Open, up: Pipe) -> Option<Comeback> {
        let key = key(&open);
        let come = Comeback { from, open, up };
        let Some(to) = self.lock().get(&key).map(|entry| entry.to.clone()) else {
            return Some(come);
        };
        match to.try_send(come) {
            Ok(()) => None,
            // Its task is ending, or busy with two others: this one is a session of its own.
            Err(mpsc::error::TrySendError::Closed(come)) => Some(come),
            Err(mpsc::error::TrySendError::Full(_)) => None,
        }
    }

    /// Sessions that are held.
    pub(super) fn len(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Entry>> {
        // Single inserts and removals: no invariant spans a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Desk {
    /// False where the session was told to give way: then it must.
    fn set(&self, idle: Idle) -> bool {
        let mut desks = self.desks.lock();
        if let Some(entry) = desks.get_mut(&self.key).filter(|entry| self.is_ours(entry)) {
            entry.idle = idle;
        }
        !self.give_way.is_cancelled()
    }

    /// A later session of the same name may sit here already.
    fn is_ours(&self, entry: &Entry) -> bool {
        let mine = self.ours.upgrade();
        mine.is_some_and(|mine| mine.same_channel(&entry.to))
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        let mut desks = self.desks.lock();
        if desks
            .get(&self.key)
            .is_some_and(|entry| self.is_ours(entry))
        {
            desks.remove(&self.key);
        }
    }
}

/// A session that is held here.
pub(super) struct Held {
    pub(super) shared: Arc<Shared>,
    pub(super) served: Served,
    pub(super) relay: Relay,
    /// Who is upstream.
    pub(super) from: Peer,
    pub(super) calls: Calls,
    /// Our place in the pairing table, when we are the tail.
    pub(super) place: Option<Place>,
    /// When what is kept is given up; set when something is lost, unset when it runs again.
    pub(super) kept_until: Option<Instant>,
    pub(super) desk: Desk,
    pub(super) _lease: Lease,
}

/// How a session ended, in one word of a few.
fn word(end: &End) -> &'static str {
    match end {
        End::Closed | End::Reopen(_) => "closed",
        End::Failed(failure) if is_goodbye(failure) => "closed",
        End::Failed(failure) if is_leaving(failure) => "handed_over",
        End::UpstreamLost => "upstream_lost",
        End::Failed(_) | End::BelowLost(_) => "failed",
    }
}

/// The opening message, and the stream that it came on if that is a new one.
type Again = (Open, Option<(Peer, Pipe)>);

/// What a held session does next.
enum Turn {
    Run,
    Keep,
    /// Opened again.
    Reopen(Box<Again>),
    End(End),
}

impl Held {
    /// Runs the session to its end.
    pub(super) async fn run(mut self) {
        self.shared.metrics.opened();
        let (stopping, goes) = (self.shared.stopping.clone(), self.desk.goes.clone());
        let end = tokio::select! {
            biased;
            end = self.turns() => end,
            () = stopping.cancelled() => End::Failed(self.shared.going_down(self.relay.at())),
            () = goes.cancelled() => self.handed_over(),
        };
        self.shared.metrics.ended(word(&end));
        self.shared.log(self.relay.at(), &end);
        self.relay.finish(&end).await;
    }

    async fn turns(&mut self) -> End {
        let mut turn = Turn::Run;
        loop {
            turn = match turn {
                Turn::Run => self.running().await,
                Turn::Keep => self.keep().await,
                Turn::Reopen(again) => self.reopen(again.0, again.1).await,
                Turn::End(end) => return end,
            };
        }
    }

    async fn running(&mut self) -> Turn {
        let standing_by = self.relay.open().standing_by;
        self.desk.set(if standing_by {
            Idle::StandingBy
        } else {
            Idle::No
        });
        let mut resting = false;
        loop {
            let end = tokio::select! {
                biased;
                end = self.relay.run() => end,
                Some(come) = self.calls.comebacks.recv() => return come.into(),
                Some(ask) = self.calls.forks.recv() => {
                    self.lend(ask);
                    continue;
                }
                () = self.desk.give_way.cancelled(), if standing_by => return self.give_way(),
                () = self.desk.give_way.cancelled(), if resting => return self.rest_is_over(),
                () = sleep(REST), if !standing_by => {
                    resting = self.relay.rests(REST);
                    let idle = if resting { Idle::Resting } else { Idle::No };
                    if !self.desk.set(idle) {
                        return self.rest_is_over();
                    }
                    continue;
                }
            };
            return self.after(end);
        }
    }

    /// Somebody has work, and this client, who is there, has had none for a while: it goes on elsewhere, or here
    /// when there is room again.
    fn rest_is_over(&self) -> Turn {
        let message = "nothing ran on it for a while, and its room is needed";
        let code = FailureCode::HandedOver;
        Turn::End(End::Failed(fail(
            self.relay.at(),
            Fault::Local,
            code,
            message,
        )))
    }

    /// Nothing runs: waits for the client, who may find another route.
    async fn keep(&mut self) -> Turn {
        self.desk.set(Idle::Kept);
        let keep = self.shared.limits.deadlines.keep;
        let until = *self.kept_until.get_or_insert_with(|| Instant::now() + keep);
        let end = tokio::select! {
            biased;
            end = self.relay.hear() => end,
            Some(come) = self.calls.comebacks.recv() => return come.into(),
            Some(ask) = self.calls.forks.recv() => {
                self.lend(ask);
                return Turn::Keep;
            }
            () = sleep_until(until) => return Turn::End(self.given_up()),
            () = self.desk.give_way.cancelled() => return self.give_way(),
        };
        if end == End::UpstreamLost {
            // Its stream has nothing more to say; another may.
            return tokio::select! {
                biased;
                Some(come) = self.calls.comebacks.recv() => come.into(),
                Some(ask) = self.calls.forks.recv() => {
                    self.lend(ask);
                    Turn::Keep
                }
                () = sleep_until(until) => Turn::End(End::UpstreamLost),
                () = self.desk.give_way.cancelled() => self.give_way(),
            };
        }
        self.after(end)
    }

    /// Gives another session its beginning. Who knows the number of this one, but is not above it, gets nothing.
    fn lend(&mut self, ask: ForkAsk) {
        if ask.from == self.from {
            self.relay.lend(ask);
        }
    }

    /// Somebody who runs needs the room.
    fn give_way(&self) -> Turn {
        let message = "nothing ran on it, and its room is needed";
        let at = self.relay.at();
        Turn::End(End::Failed(fail(
            at,
            Fault::Local,
            FailureCode::Full,
            message,
        )))
    }

    /// What was sent on is kept above, what comes of it below: the client finds somebody else for what is between.
    fn handed_over(&self) -> End {
        let message = "these layers are no longer served here";
        let code = FailureCode::HandedOver;
        End::Failed(fail(self.relay.at(), Fault::Local, code, message))
    }

    fn given_up(&self) -> End {
        let keep = self.shared.limits.deadlines.keep;
        let message = format!("the route below was lost, and no other was opened within {keep:?}");
        End::Failed(fail(
            self.relay.at(),
            Fault::Caller,
            FailureCode::Deadline,
            message,
        ))
    }

    fn after(&mut self, end: End) -> Turn {
        match end {
            End::Reopen(open) => Turn::Reopen(Box::new((*open, None))),
            End::BelowLost(failure) => {
                tracing::debug!(at = failure.at, why = %failure.message, "the route below is lost");
                self.relay.say_lost(failure);
                Turn::Keep
            }
            End::UpstreamLost => {
                tracing::debug!("the upstream is lost");
                Turn::Keep
            }
            End::Closed | End::Failed(_) => Turn::End(end),
        }
    }

    async fn reopen(&mut self, open: Open, stream: Option<(Peer, Pipe)>) -> Turn {
        if !self.desk.set(Idle::No) {
            return self.give_way();
        }
        if let Err(failure) = self.admit_again(&open, stream.as_ref().map(|(from, _)| *from)) {
            let Some((_, up)) = stream else {
                return Turn::End(End::Failed(failure));
            };
            // A stranger, or a late one: the session does not notice.
            self.refuse(up, failure);
            return if self.kept_until.is_some() {
                Turn::Keep
            } else {
                Turn::Run
            };
        }
        tracing::debug!(epoch = open.epoch.0, resume = open.resume, "opened again");
        // Who stood by has not heard what was taken back since its stream was lost.
        let anew = stream.is_some() && self.relay.open().standing_by;
        if let Some((from, up)) = stream {
            self.from = from;
            self.relay.take_upstream(up);
        }
        let (current, standby) = self.streams_below(&open);
        // The old epoch's place in the pairing table is nobody's any more.
        self.place = None;
        let step = self.relay.step_deadline();
        match timeout(step, self.relay.rewind(open.clone(), anew)).await {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => return Turn::End(End::Failed(failure)),
            Err(_) => {
                let message = format!("the stage worker was busy for {step:?}");
                let failure = fail(open.at, Fault::Local, FailureCode::Deadline, message);
                return Turn::End(End::Failed(failure));
            }
        }
        self.kept_until
            .get_or_insert_with(|| Instant::now() + self.shared.limits.deadlines.keep);
        let chain = match self.chain_again(&open, current).await {
            Ok(chain) => chain,
            Err(turn) => return turn,
        };
        let resumed = chain.and_then(|chain| {
            self.place = chain.place;
            self.relay.resume(chain.below, chain.held)
        });
        match resumed {
            Ok(()) => {
                self.kept_until = None;
                let standby = self.shared.standby(&open, &self.served, standby);
                self.relay.stand_by(standby);
                Turn::Run
            }
            Err(failure) if failure.at > open.at => self.after(End::BelowLost(failure)),
            Err(failure) => Turn::End(End::Failed(failure)),
        }
    }

    /// Opens what is below along the new route, while the upstream is there; or what happens instead.
    async fn chain_again(
        &mut self,
        open: &Open,
        current: Option<Fed>,
    ) -> Result<Result<Chain, Failure>, Turn> {
        let mut below = open.clone();
        let current = resume_at(&mut below, current);
        let beat = self.shared.limits.deadlines.beat;
        let end = {
            let chain = self.shared.below(&below, &self.served, current);
            tokio::pin!(chain);
            loop {
                tokio::select! {
                    biased;
                    chain = &mut chain => return Ok(chain),
                    // The client lost patience, or is gone.
                    end = self.relay.hear() => break end,
                    Some(come) = self.calls.comebacks.recv() => {
                        // A late or foreign one changes nothing.
                        match self.admit_again(&come.open, Some(come.from)) {
                            Ok(()) => return Err(come.into()),
                            Err(failure) => self.refuse(come.up, failure),
                        }
                    }
                    () = sleep(beat) => self.relay.say_working(),
                }
            }
        };
        Err(match end {
            End::UpstreamLost => Turn::Keep,
            end => self.after(end),
        })
    }

    fn refuse(&self, up: Pipe, failure: Failure) {
        let shared = self.shared.clone();
        let refusal = async move { shared.refuse(up, failure).await };
        self.shared.tasks.spawn(refusal);
    }

    /// Whether a session that is held may go on so.
    fn admit_again(&self, open: &Open, from: Option<Peer>) -> Result<(), Failure> {
        let ours = self.relay.open();
        let wrong = |code, message: String| Err(fail(open.at, Fault::Caller, code, message));
        if open.epoch <= ours.epoch {
            let message = format!(
                "epoch {}, this session is at {}",
                open.epoch.0, ours.epoch.0
            );
            return wrong(FailureCode::WrongSession, message);
        }
        let same = (
            open.session,
            open.client,
            open.model,
            open.n_ctx,
            (open.dtype, open.numerics),
        ) == (
            ours.session,
            ours.client,
            ours.model,
            ours.n_ctx,
            (ours.dtype, ours.numerics),
        );
        if !same || key(open) != key(ours) {
            let message =
                "it is held here for another client, model, context, dtype, numerics or layers";
            return wrong(FailureCode::WrongSession, message.into());
        }
        let from = from.unwrap_or(self.from);
        admit(open, from, self.shared.me, Some(&self.served)).map(|_| ())
    }

    /// The streams to the next hop and to who stands by for it on the new route, where there are any
    /// already. A standby may be the next hop now.
    fn streams_below(&mut self, open: &Open) -> (Option<Fed>, Option<Fed>) {
        let (below, standby) = self.relay.detach();
        let Some(at) = open.at.checked_add(1) else {
            return (None, None);
        };
        let next = |open: &Open| {
            let hop = open.hops.get(usize::from(at))?;
            Some((hop.peer, hop.layers))
        };
        let current = match below {
            Below::Next(pipe) if next(open) == next(self.relay.open()) => Some(Fed::next_hop(pipe)),
            _ => None,
        };
        streams_to(open, at, current, standby)
    }
}

impl From<Comeback> for Turn {
    fn from(come: Comeback) -> Self {
        Turn::Reopen(Box::new((come.open, Some((come.from, come.up)))))
    }
}
