//! Adverts: ours go out, others' come in, are checked here (not in the driver) and reported back,
//! so that gossip carries on only what is good.
//!
//! ```text
//!   driver ──notices──▶ this task ──▶ AdvertTable ◀── anybody, through `Adverts`
//!          ◀─commands──  verify, insert, report; sign and publish our own every ten seconds
//! ```

use std::{
    collections::{HashSet, VecDeque},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use libp2p::gossipsub::MessageAcceptance;
use shard_registry::{AdvertTable, Outcome, Refusal, Snapshot};
use swarm_proto::{Advert, Measured, ModelAdvert, ModelId, Peer, SignedAdvert, SwarmId};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::Instant,
};

use super::{
    driver::{Command, Notice},
    handle::{Inner, Net},
    snapshots::Snapshots,
};

/// How often we say that we are there.
const PUBLISH_INTERVAL: Duration = Duration::from_secs(10);
/// How long others believe it: three adverts may be lost, and one may be late.
const TTL: Duration = Duration::from_secs(40);
/// A new one is repeated after this, then after twice as long, until it is the interval: what is
/// told while connections come up may be lost.
const REPEAT_FIRST: Duration = Duration::from_secs(1);
/// A change is told at once, but not more often than this.
const PUBLISH_PAUSE: Duration = Duration::from_millis(500);
/// How often expired adverts are swept out.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);
/// Adverts just checked, by hash: the same one comes on two topics and from several sides.
const RECENT_MAX: usize = 512;
/// Requests to publish that may wait.
const REQUESTS_MAX: usize = 16;

/// What we say of ourselves; the rest of the advert (addresses, round trips, time) is filled in.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Announcement {
    /// What we serve.
    pub models: Vec<ModelAdvert>,
    /// Measured uplink.
    pub uplink_bytes_s: Option<Measured>,
    /// Frames waiting for the stage worker.
    pub queue: u16,
}

/// The adverts known, shared by everybody in this process.
#[derive(Clone)]
pub struct Adverts {
    table: Arc<Mutex<AdvertTable>>,
    version: watch::Sender<u64>,
}

impl Adverts {
    fn new(swarm: SwarmId) -> Self {
        Self {
            table: Arc::new(Mutex::new(AdvertTable::new(swarm))),
            version: watch::Sender::new(0),
        }
    }

    /// Looks at the table; keep it short, others wait.
    pub fn with<T>(&self, look: impl FnOnce(&mut AdvertTable) -> T) -> T {
        look(&mut self.table.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Everything alive now, for planning.
    pub fn snapshot(&self) -> Snapshot {
        self.with(|table| table.snapshot(now_ms()))
    }

    /// The same as it was signed, for passing on.
    pub fn snapshot_signed(&self) -> Vec<SignedAdvert> {
        self.with(|table| table.signed(now_ms()))
    }

    /// Who serves or stores any layer of `model` and where they listen, in a fixed order.
    pub fn holders(&self, model: &ModelId) -> Vec<(Peer, Vec<String>)> {
        let snapshot = self.snapshot();
        let serves = |a: &&Arc<Advert>| {
            a.models
                .iter()
                .any(|m| m.model == *model && !(m.live.is_empty() && m.stored.is_empty()))
        };
        snapshot
            .adverts
            .iter()
            .filter(serves)
            .map(|a| (a.peer, a.addrs.clone()))
            .collect()
    }

    /// Who could not be connected to and has been silent since.
    pub fn unreachable(&self) -> Vec<Peer> {
        self.with(|table| table.unreachable(now_ms()))
    }

    /// Where `peer` says it listens.
    pub fn addrs(&self, peer: &Peer) -> Vec<String> {
        self.with(|table| table.get(peer, now_ms()).map(|a| a.addrs.clone()))
            .unwrap_or_default()
    }

    /// Changes whenever the table does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Takes over adverts that somebody passed on; each is checked. Tells how many were news.
    pub(super) async fn insert_all(&self, adverts: Vec<SignedAdvert>) -> usize {
        let this = self.clone();
        let insert = move || {
            let news = |signed| matches!(this.insert(signed), Outcome::Accepted);
            adverts
                .into_iter()
                .filter(|signed| news(signed.clone()))
                .count()
        };
        // 4096 signatures take 200 ms.
        tokio::task::spawn_blocking(insert).await.unwrap_or(0)
    }

    fn insert(&self, signed: SignedAdvert) -> Outcome {
        let inserted = self.with(|table| table.insert(signed, now_ms()));
        if matches!(inserted, Outcome::Accepted) {
            self.version.send_modify(|version| *version += 1);
        }
        inserted
    }

    fn sweep(&self) {
        if !self.with(|table| table.expire(now_ms())).is_empty() {
            self.version.send_modify(|version| *version += 1);
        }
    }
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

pub(super) enum Request {
    Publish(Announcement),
    Leave(oneshot::Sender<()>),
}

/// The handle's side of the task.
pub(super) struct Publisher {
    pub(super) adverts: Adverts,
    pub(super) requests: mpsc::Sender<Request>,
    pub(super) synced: watch::Receiver<usize>,
}

/// The task.
struct Task {
    net: Weak<Inner>,
    swarm: SwarmId,
    commands: mpsc::WeakSender<Command>,
    adverts: Adverts,
    recent: VecDeque<blake3::Hash>,
    recent_set: HashSet<blake3::Hash>,
    own: Option<Announcement>,
    topics: HashSet<String>,
    seq: u64,
    published: Option<Instant>,
    due: Option<Instant>,
    repeat: Duration,
    snapshots: Snapshots,
    /// Requests for snapshots under way: whom, and whether it gave one.
    asking: JoinSet<(Peer, bool)>,
    synced: watch::Sender<usize>,
}

/// Starts the task; `net` is given by the caller once the handle exists.
pub(super) fn start(
    net: Weak<Inner>,
    swarm: SwarmId,
    commands: mpsc::WeakSender<Command>,
    notices: mpsc::Receiver<Notice>,
) -> Publisher {
    let adverts = Adverts::new(swarm.clone());
    let (requests, inbox) = mpsc::channel(REQUESTS_MAX);
    let (synced, done) = watch::channel(0);
    let task = Task {
        net,
        swarm,
        commands,
        adverts: adverts.clone(),
        recent: VecDeque::new(),
        recent_set: HashSet::new(),
        own: None,
        topics: HashSet::new(),
        seq: 0,
        published: None,
        due: None,
        repeat: REPEAT_FIRST,
        snapshots: Snapshots::new(TTL),
        asking: JoinSet::new(),
        synced,
    };
    tokio::spawn(task.run(notices, inbox));
    Publisher {
        adverts,
        requests,
        synced: done,
    }
}

impl Task {
    async fn run(
        mut self,
        mut notices: mpsc::Receiver<Notice>,
        mut requests: mpsc::Receiver<Request>,
    ) {
        let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
        self.subscribe(self.swarm.advert_topic()).await;
        loop {
            let due = self.due;
            let timer = async {
                match due {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                request = requests.recv() => match request {
                    Some(Request::Publish(announcement)) => self.announce(announcement).await,
                    Some(Request::Leave(done)) => {
                        self.leave().await;
                        let _ = done.send(());
                    }
                    None => return,
                },
                () = timer => self.publish(false).await,
                notice = notices.recv() => match notice {
                    Some(notice) => self.on_notice(notice).await,
                    None => return,
                },
                Some(asked) = self.asking.join_next() => {
                    if let Ok((peer, given)) = asked {
                        self.answered(&peer, given);
                    }
                }
                _ = sweep.tick() => {
                    self.adverts.sweep();
                    self.ask_snapshots();
                }
            }
        }
    }

    async fn command(&self, command: Command) {
        // A driver that is gone needs no commands.
        if let Some(commands) = self.commands.upgrade() {
            let _ = commands.send(command).await;
        }
    }

    async fn subscribe(&mut self, topic: String) {
        if self.topics.insert(topic.clone()) {
            self.command(Command::Subscribe(topic)).await;
        }
    }

    async fn on_notice(&mut self, notice: Notice) {
        match notice {
            Notice::Advert { bytes, id, source } => {
                let acceptance = self.judge(&bytes);
                self.command(Command::Report {
                    id,
                    source,
                    acceptance,
                })
                .await;
            }
            Notice::Identified { peer, fetch } => {
                self.adverts.with(|table| table.note_reachable(&peer, true));
                if fetch {
                    self.snapshots.connected(peer, Instant::now().into());
                    self.ask_snapshots();
                }
            }
            Notice::Disconnected { peer } => {
                self.snapshots.disconnected(&peer, Instant::now().into());
                self.ask_snapshots();
            }
            Notice::Unreachable { peer } => {
                self.adverts
                    .with(|table| table.note_reachable(&peer, false));
            }
            Notice::Subscribed | Notice::Listening => self.publish_soon(),
        }
    }

    /// Checks an advert that gossip brought.
    fn judge(&mut self, bytes: &[u8]) -> MessageAcceptance {
        let hash = blake3::hash(bytes);
        if self.recent_set.contains(&hash) {
            return MessageAcceptance::Accept;
        }
        let signed = match SignedAdvert::from_bytes(bytes) {
            Ok(signed) => signed,
            Err(error) => {
                tracing::debug!(%error, "advert refused");
                return MessageAcceptance::Reject;
            }
        };
        match self.adverts.insert(signed) {
            Outcome::Accepted => {
                self.remember(hash);
                MessageAcceptance::Accept
            }
            // A clock that is off or a full table here is no fault of who passed it on.
            Outcome::Stale | Outcome::Refused(Refusal::Clock { .. } | Refusal::Full { .. }) => {
                MessageAcceptance::Ignore
            }
            Outcome::Refused(error) => {
                tracing::debug!(%error, "advert refused");
                MessageAcceptance::Reject
            }
        }
    }

    fn remember(&mut self, hash: blake3::Hash) {
        if self.recent.len() == RECENT_MAX
            && let Some(oldest) = self.recent.pop_front()
        {
            self.recent_set.remove(&oldest);
        }
        self.recent.push_back(hash);
        self.recent_set.insert(hash);
    }

    fn ask_snapshots(&mut self) {
        let Some(inner) = self.net.upgrade() else {
            return;
        };
        for peer in self.snapshots.next(Instant::now().into()) {
            let net = Net::from_inner(inner.clone());
            self.asking.spawn(async move {
                let given = net.fetch_snapshot(peer, &[]).await;
                match &given {
                    Ok(news) => tracing::debug!(%peer, news, "took over the adverts a peer knows"),
                    Err(error) => tracing::debug!(%peer, %error, "no adverts from this peer"),
                }
                (peer, given.is_ok())
            });
        }
    }

    fn answered(&mut self, peer: &Peer, given: bool) {
        self.snapshots.answered(peer, given, Instant::now().into());
        self.synced.send_modify(|done| *done += usize::from(given));
        self.ask_snapshots();
    }

    fn publish_soon(&mut self) {
        if self.own.is_none() {
            return;
        }
        let now = Instant::now();
        let soon = self
            .published
            .map_or(now, |at| (at + PUBLISH_PAUSE).max(now));
        self.due = Some(self.due.map_or(soon, |due| due.min(soon)));
    }

    async fn announce(&mut self, announcement: Announcement) {
        for model in &announcement.models {
            let topic = self.swarm.model_advert_topic(&model.model);
            if !self.topics.contains(&topic) {
                self.command(Command::Provide(model.model.0.0.to_vec()))
                    .await;
            }
            self.subscribe(topic).await;
        }
        if self.own.as_ref() != Some(&announcement) {
            let spans = |own: &Announcement| -> Vec<_> {
                own.models
                    .iter()
                    .map(|m| (m.model, m.live.clone(), m.intended.clone()))
                    .collect()
            };
            if self.own.as_ref().map(spans) != Some(spans(&announcement)) {
                self.repeat = REPEAT_FIRST;
            }
            self.own = Some(announcement);
            self.publish_soon();
        }
    }

    async fn leave(&mut self) {
        if self.own.is_some() {
            self.publish(true).await;
            for model in self.own.take().unwrap_or_default().models {
                self.command(Command::StopProviding(model.model.0.0.to_vec()))
                    .await;
            }
            self.due = None;
        }
    }

    async fn publish(&mut self, leaving: bool) {
        let (Some(own), Some(net)) = (self.own.clone(), self.net.upgrade()) else {
            return;
        };
        let now = Instant::now();
        self.published = Some(now);
        self.due = Some(now + self.repeat);
        self.repeat = (self.repeat * 2).min(PUBLISH_INTERVAL);
        self.seq = now_ms().max(self.seq + 1);
        let advert = net.advert(own, self.seq, TTL, leaving);
        let topics = advert
            .models
            .iter()
            .map(|m| self.swarm.model_advert_topic(&m.model));
        let topics = std::iter::once(self.swarm.advert_topic())
            .chain(topics)
            .collect();
        match SignedAdvert::sign(&advert, &self.swarm, net.identity().secret()) {
            Ok(signed) => {
                let bytes = signed.to_bytes();
                self.adverts.insert(signed);
                self.command(Command::Publish { topics, bytes }).await;
            }
            Err(error) => tracing::error!(%error, "our own advert breaks the rules"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Identity;

    fn task() -> Task {
        let (commands, _) = mpsc::channel(1);
        Task {
            net: Weak::new(),
            swarm: swarm(),
            commands: commands.downgrade(),
            adverts: Adverts::new(swarm()),
            recent: VecDeque::new(),
            recent_set: HashSet::new(),
            own: None,
            topics: HashSet::new(),
            seq: 0,
            published: None,
            due: None,
            repeat: REPEAT_FIRST,
            snapshots: Snapshots::new(TTL),
            asking: JoinSet::new(),
            synced: watch::Sender::new(0),
        }
    }

    fn swarm() -> SwarmId {
        "t".parse().expect("swarm id")
    }

    fn advert(who: &Identity, seq: u64, swarm: &SwarmId) -> Vec<u8> {
        let advert = Advert {
            peer: who.peer(),
            seq,
            ttl_ms: 1000,
            addrs: Vec::new(),
            models: Vec::new(),
            uplink_bytes_s: None,
            queue: 0,
            rtts: Vec::new(),
            leaving: false,
            agent: String::new(),
        };
        SignedAdvert::sign(&advert, swarm, who.secret())
            .expect("signs")
            .to_bytes()
    }

    #[test]
    fn gossip_is_judged_by_signature_swarm_and_sequence() {
        let (mut task, who) = (task(), Identity::generate());
        let now = now_ms();
        let good = advert(&who, now, &swarm());
        let judged = |task: &mut Task, bytes: &[u8]| format!("{:?}", task.judge(bytes));
        assert_eq!(judged(&mut task, &good), "Accept");
        assert_eq!(
            judged(&mut task, &good),
            "Accept",
            "the same on another topic"
        );
        assert_eq!(
            judged(&mut task, &advert(&who, now - 1, &swarm())),
            "Ignore",
            "older"
        );
        let mut forged = advert(&who, now + 1, &swarm());
        forged[70] ^= 1;
        assert_eq!(judged(&mut task, &forged), "Reject");
        let foreign = advert(&who, now + 1, &"other".parse().expect("swarm id"));
        assert_eq!(
            judged(&mut task, &foreign),
            "Reject",
            "signed for another swarm"
        );
        for garbage in [&[][..], &[0; 64], &[0xff; 20_000]] {
            assert_eq!(judged(&mut task, garbage), "Reject");
        }
    }

    #[test]
    fn what_was_just_checked_is_remembered_within_bounds() {
        let mut task = task();
        for n in 0..2 * RECENT_MAX {
            task.remember(blake3::hash(&n.to_le_bytes()));
        }
        assert_eq!(
            (task.recent.len(), task.recent_set.len()),
            (RECENT_MAX, RECENT_MAX)
        );
    }
}
