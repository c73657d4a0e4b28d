//! Fetching one shard: who is asked when, from whom not again, and when it is given up.

use std::{collections::HashMap, collections::HashSet, sync::Arc, time::Duration};

use shard_registry::{
    Manifest, ShardEntry,
    blobs::{BlobError, Partial, Taken},
};
use swarm_proto::{ModelId, Peer};
use tokio::{task::JoinSet, time::Instant};

use super::{
    Inner, Transfer, TransferError, blocking,
    holders::holders,
    ranges::SLOW,
    source::{End, Source, Work},
};

/// Groups of one range: 1 MiB.
const RANGE_GROUPS: u32 = 64;
/// Holders that are asked at once.
const SOURCES_MAX: usize = 4;
/// Holders that are known of at most, those that others name included.
const KNOWN_MAX: usize = 64;
/// How often it is looked who could be asked, and progress told.
const LOOK: Duration = Duration::from_millis(200);
/// A holder that is to be asked later is asked again after so long, and twice as long each time.
const LATER: Duration = Duration::from_millis(200);
const LATER_MAX: Duration = Duration::from_secs(2);
/// A holder that failed is asked again after so long.
const AGAIN: Duration = Duration::from_millis(1500);
/// One that failed so often is hoped for no longer, and asked all the same for as long as it is tried: it may have
/// been started again.
const FAILURES_MAX: u32 = 4;
/// Without a byte for so long, those that sent us elsewhere are told that it was in vain.
const IN_VAIN_AFTER: Duration = Duration::from_secs(4);
/// The same where those elsewhere say that it is on its way to them: a slow holder may serve many.
const IN_VAIN_LATER: Duration = Duration::from_secs(20);
/// Without a byte for so long it is given up; what is here is kept.
const GIVE_UP_AFTER: Duration = Duration::from_secs(60);
/// The same while somebody says that it comes later: a slow holder gives its shards one after the other. Then others
/// may have become scarcer.
const GIVE_UP_LATER: Duration = Duration::from_secs(300);
/// With nobody to ask, it is given up earlier.
const NOBODY_AFTER: Duration = Duration::from_secs(15);
/// How often Kademlia is asked while nobody is known.
const PROVIDERS_INTERVAL: Duration = Duration::from_secs(5);
/// How long it may take.
const PROVIDERS_DEADLINE: Duration = Duration::from_secs(5);
/// How often it is looked whether another process of this home is done.
const BUSY_PAUSE: Duration = Duration::from_millis(500);

impl Transfer {
    /// Fetches a shard of a model that [`Transfer::describe`] gave, or finds that it is here; a damaged one is
    /// fetched again. `progress` is told the bytes of it that are here, now and then. The shard is not evicted until
    /// [`Transfer::release`].
    ///
    /// # Errors
    /// Nobody has it, nobody sends it, or this machine cannot keep it. What came is kept.
    ///
    /// # Cancel safety
    /// May be dropped at any time; what came is kept, and given to others by [`Transfer::serve`].
    pub async fn fetch(
        &self,
        id: ModelId,
        manifest: &Manifest,
        shard: &ShardEntry,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), TransferError> {
        let inner = &self.inner;
        if shard.pieces.is_empty() {
            // The metadata came with the manifest.
            progress(shard.bytes);
            return Ok(());
        }
        inner.needed().insert(shard.id);
        let Some(partial) = inner.take(shard).await? else {
            progress(shard.bytes);
            return Ok(());
        };
        inner.shards.comes(partial.clone());
        let fetched = Fetching::new(inner.clone(), id, manifest, shard, partial.clone())
            .run(progress)
            .await;
        let done = match fetched {
            Ok(()) => blocking(move || partial.finish()).await?,
            Err(TransferError::Blob(error)) => Err(error),
            Err(other) => return Err(other),
        };
        // Also where the disk failed, or somebody removed the files: the next to fetch it looks what is there.
        inner.shards.came(&shard.id);
        done?;
        inner.counts.fetched(id, shard.id);
        progress(shard.bytes);
        Ok(())
    }
}

impl Inner {
    /// The shard as far as it is here; none if that is all of it.
    async fn take(
        self: &Arc<Self>,
        shard: &ShardEntry,
    ) -> Result<Option<Arc<Partial>>, TransferError> {
        if let Some(coming) = self.shards.coming(&shard.id) {
            return Ok(Some(coming));
        }
        loop {
            let (inner, entry) = (self.clone(), shard.clone());
            let taken = blocking(move || {
                if inner.store.check_blob(&entry)? {
                    return Ok(Taken::Whole);
                }
                inner.shards.forget(&entry.id);
                inner.make_room(&entry)?;
                inner.store.take_shard(&entry)
            })
            .await?;
            match taken {
                Ok(Taken::Whole) => return Ok(None),
                Ok(Taken::Partly(partial)) => return Ok(Some(Arc::from(partial))),
                Err(BlobError::Busy { .. }) => tokio::time::sleep(BUSY_PAUSE).await,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A holder as this fetch knows it.
struct Known {
    addrs: Vec<String>,
    /// When it may be asked; none while it is.
    due: Option<Instant>,
    later: Duration,
    failures: u32,
    /// It named others.
    sent_away: bool,
}

struct Fetching<'a> {
    inner: Arc<Inner>,
    id: ModelId,
    n_layer: u16,
    shard: &'a ShardEntry,
    work: Arc<Work>,
    known: HashMap<Peer, Known>,
    /// In the order they became known.
    order: Vec<Peer>,
    running: JoinSet<(Peer, End)>,
    number: u64,
    /// When something last came, and how much was here then.
    moved: (Instant, u64),
    asked_kad: Option<Instant>,
    /// When somebody last said that it is on its way.
    coming: Option<Instant>,
    /// Who sent what it should not have.
    wrong: HashSet<Peer>,
    last: Option<String>,
}

impl<'a> Fetching<'a> {
    fn new(
        inner: Arc<Inner>,
        id: ModelId,
        manifest: &Manifest,
        shard: &'a ShardEntry,
        partial: Arc<Partial>,
    ) -> Self {
        let here = partial.here_bytes();
        Self {
            inner,
            id,
            n_layer: manifest.n_layer,
            shard,
            work: Arc::new(Work::new(id, partial, RANGE_GROUPS)),
            known: HashMap::new(),
            order: Vec::new(),
            running: JoinSet::new(),
            number: 0,
            moved: (Instant::now(), here),
            asked_kad: None,
            coming: None,
            wrong: HashSet::new(),
            last: None,
        }
    }

    async fn run(mut self, progress: &mut (dyn FnMut(u64) + Send)) -> Result<(), TransferError> {
        let mut look = tokio::time::interval(LOOK);
        loop {
            let here = self.work.partial.here_bytes();
            progress(here);
            if here > self.moved.1 {
                self.moved = (Instant::now(), here);
            }
            if self.work.is_done() {
                let gave = self.work.gave();
                self.note_silent(&gave);
                self.inner
                    .book
                    .served(gave.difference(&self.wrong).copied());
                return Ok(());
            }
            self.learn();
            self.start();
            self.give_up(here)?;
            if self.known.is_empty() {
                self.ask_kademlia().await;
            }
            tokio::select! {
                Some(ended) = self.running.join_next() => {
                    let (peer, end) = ended?;
                    self.ended(peer, end)?;
                }
                _ = look.tick() => {}
            }
        }
    }

    /// Who says by now that it has it.
    fn learn(&mut self) {
        let net = &self.inner.net;
        let snapshot = net.adverts().snapshot();
        for (peer, addrs) in holders(&snapshot, &self.id, self.n_layer, self.shard.kind, net.me()) {
            self.know(peer, addrs);
        }
    }

    fn know(&mut self, peer: Peer, addrs: Vec<String>) {
        if let Some(known) = self.known.get_mut(&peer) {
            // It may have been started again, elsewhere.
            if !addrs.is_empty() {
                known.addrs = addrs;
            }
            return;
        }
        if self.known.len() >= KNOWN_MAX || peer == self.inner.net.me() {
            return;
        }
        let known = Known {
            addrs,
            due: Some(Instant::now()),
            later: LATER,
            failures: 0,
            sent_away: false,
        };
        self.known.insert(peer, known);
        self.order.push(peer);
    }

    async fn ask_kademlia(&mut self) {
        let soon = |at: Instant| at.elapsed() < PROVIDERS_INTERVAL;
        if self.asked_kad.is_some_and(soon) {
            return;
        }
        self.asked_kad = Some(Instant::now());
        let key = self.id.0.0;
        for peer in self.inner.net.providers(key, PROVIDERS_DEADLINE).await {
            self.know(peer, Vec::new());
        }
    }

    /// Asks those that may be asked, as many as may be at once. Who is left alone for what it did before is asked
    /// only where there is nobody else.
    fn start(&mut self) {
        let now = Instant::now();
        let patience = if self.is_coming() {
            IN_VAIN_LATER
        } else {
            IN_VAIN_AFTER
        };
        let in_vain = self.moved.0.elapsed() >= patience;
        let alone = self.inner.book.left_alone();
        let others = self.known.iter().any(|(peer, known)| {
            !alone.contains(peer) && known.failures < FAILURES_MAX && !self.wrong.contains(peer)
        });
        for peer in self.order.clone() {
            if others && alone.contains(&peer) {
                continue;
            }
            if self.running.len() >= SOURCES_MAX {
                return;
            }
            let Some(known) = self.known.get_mut(&peer) else {
                continue;
            };
            let due = known.due.is_some_and(|due| due <= now);
            if !due || known.sent_away && !in_vain {
                continue;
            }
            known.due = None;
            self.number += 1;
            let source = Source {
                peer,
                addrs: known.addrs.clone(),
                in_vain: known.sent_away,
                silent: self.inner.silent.is(&peer),
                who: self.number,
            };
            let (inner, work) = (self.inner.clone(), self.work.clone());
            self.running
                .spawn(async move { (peer, source.run(inner, work).await) });
        }
    }

    /// Somebody said so lately.
    fn is_coming(&self) -> bool {
        self.coming.is_some_and(|at| at.elapsed() < 2 * LATER_MAX)
    }

    fn ended(&mut self, peer: Peer, end: End) -> Result<(), TransferError> {
        let now = Instant::now();
        tracing::debug!(%peer, shard = %self.shard.id, ?end, "a holder is no longer asked");
        let Some(known) = self.known.get_mut(&peer) else {
            return Ok(());
        };
        if matches!(end, End::Later | End::Elsewhere(_) | End::Missing) {
            self.work.answered(&peer);
        }
        match end {
            End::Done => {}
            End::Here(error) => return Err(error.into()),
            End::Later => {
                self.coming = Some(now);
                known.due = Some(now + known.later);
                known.later = (known.later * 2).min(LATER_MAX);
            }
            End::Elsewhere(peers) => {
                known.sent_away = true;
                known.due = Some(now);
                for named in peers {
                    self.know(named, Vec::new());
                }
            }
            // It may have it later: others name those that are getting it.
            End::Missing => {
                self.note(peer, format!("{peer} does not have it"));
                self.fail(peer, now);
            }
            End::Failed(why) => {
                self.note(peer, why);
                self.fail(peer, now);
            }
            End::Wrong(why) => {
                tracing::warn!(%peer, shard = %self.shard.id, why, "a peer sends what it should not: not asked again");
                self.inner.book.failed(peer, &why);
                self.wrong.insert(peer);
                self.note(peer, why);
            }
        }
        Ok(())
    }

    fn note(&mut self, peer: Peer, why: String) {
        self.last = Some(format!("{peer}: {why}"));
    }

    fn fail(&mut self, peer: Peer, now: Instant) {
        if let Some(known) = self.known.get_mut(&peer) {
            known.failures = (known.failures + 1).min(FAILURES_MAX);
            known.due = Some(now + AGAIN * known.failures.min(2));
        }
    }

    /// Those that were asked for long enough and said nothing, while others gave.
    fn note_silent(&self, gave: &HashSet<Peer>) {
        for (peer, asked) in self.work.asked() {
            if gave.contains(&peer) {
                self.inner.silent.spoke(&peer);
            } else if asked.elapsed() >= SLOW {
                self.inner.silent.note(peer);
            }
        }
    }

    fn give_up(&mut self, here: u64) -> Result<(), TransferError> {
        let waited = self.moved.0.elapsed();
        let patience = if self.is_coming() {
            GIVE_UP_LATER
        } else {
            GIVE_UP_AFTER
        };
        let hope = self
            .known
            .iter()
            .any(|(peer, known)| known.failures < FAILURES_MAX && !self.wrong.contains(peer));
        if waited < NOBODY_AFTER || hope && waited < patience {
            return Ok(());
        }
        Err(match self.last.take() {
            None if !hope => TransferError::NoHolder {
                id: self.id,
                kind: self.shard.kind,
            },
            last => TransferError::Stalled {
                id: self.id,
                kind: self.shard.kind,
                here,
                bytes: self.shard.bytes,
                waited,
                last: last.unwrap_or_else(|| "everybody is busy".into()),
            },
        })
    }
}
