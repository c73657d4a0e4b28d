//! One holder of a shard: a stream on which ranges are asked for, each verified on a blocking thread while the next
//! arrives, until there is none left or the holder is of no more use.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io::{self, Read},
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use shard_registry::blobs::{BlobError, Partial, TakeError, encoded_len};
use swarm_proto::{Ask, Give, ModelId, Peer};
use tokio::{
    sync::{Notify, mpsc},
    time::timeout,
};

use super::{
    Inner,
    ranges::Ranges,
    wire::{Buffers, GIVE, Wire, WireError},
};
use crate::net::{OpenError, Proto};

/// How long opening a stream may take, a dial included.
const OPEN_DEADLINE: Duration = Duration::from_secs(8);
/// How long the next frame may take. A holder that opens a shard hashes all of it first.
const FRAME_DEADLINE: Duration = Duration::from_secs(15);
/// How long one range may take: 1 MiB at 9 kB/s. One that takes long is asked of others too, see `ranges`.
const RANGE_DEADLINE: Duration = Duration::from_secs(120);
/// Ranges that are asked for before the first has come: the holder never waits for the way back.
const ASKED_AHEAD: usize = 3;
/// Parts between the task that reads and the thread that verifies and writes.
const PARTS_AHEAD: usize = 4;
/// How often one without a range looks for those that others are slow with.
const LOOK: Duration = Duration::from_millis(500);

/// What all holders of one shard work on.
pub(super) struct Work {
    pub(super) model: ModelId,
    pub(super) partial: Arc<Partial>,
    ranges: Mutex<Ranges>,
    /// Who gave a whole range.
    gave: Mutex<HashSet<Peer>>,
    /// Who was asked for one and did not refuse, and when first.
    asked: Mutex<HashMap<Peer, Instant>>,
    changed: Notify,
}

/// Why a holder is no longer asked.
#[derive(Debug)]
pub(super) enum End {
    /// Everything is here.
    Done,
    /// It does not have it.
    Missing,
    /// It has no room for us, or not what we asked for yet.
    Later,
    /// It named others.
    Elsewhere(Vec<Peer>),
    /// It could not be reached, or stopped.
    Failed(String),
    /// It sent what it should not have. Its fault.
    Wrong(String),
    /// Our own disk.
    Here(BlobError),
}

impl Work {
    pub(super) fn new(model: ModelId, partial: Arc<Partial>, range_groups: u32) -> Self {
        Self {
            ranges: Mutex::new(Ranges::new(partial.missing(range_groups))),
            model,
            partial,
            gave: Mutex::default(),
            asked: Mutex::default(),
            changed: Notify::new(),
        }
    }

    pub(super) fn gave(&self) -> HashSet<Peer> {
        self.gave
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn asked(&self) -> HashMap<Peer, Instant> {
        self.lock_asked().clone()
    }

    /// It said that it does not give it.
    pub(super) fn answered(&self, peer: &Peer) {
        self.lock_asked().remove(peer);
    }

    fn lock_asked(&self) -> MutexGuard<'_, HashMap<Peer, Instant>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_done(&self) -> bool {
        self.with(|ranges| ranges.is_done())
    }

    fn with<T>(&self, look: impl FnOnce(&mut Ranges) -> T) -> T {
        look(&mut self.ranges.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn next(self: &Arc<Self>, who: u64, silent: bool) -> Option<Lease> {
        let range = self.with(|ranges| ranges.next(who, silent, Instant::now()))?;
        Some(Lease {
            work: self.clone(),
            range,
            who,
        })
    }

    /// Waits for a range; none once everything is here.
    async fn wait_next(self: &Arc<Self>, who: u64, silent: bool) -> Option<Lease> {
        loop {
            let changed = self.changed.notified();
            if self.is_done() {
                return None;
            }
            if let Some(lease) = self.next(who, silent) {
                return Some(lease);
            }
            let _ = timeout(LOOK, changed).await;
        }
    }
}

/// A range that is asked for; given back when it is dropped before it is here.
struct Lease {
    work: Arc<Work>,
    range: Range<u32>,
    who: u64,
}

impl Lease {
    fn done(self, by: Peer) {
        self.work.with(|ranges| ranges.done(&self.range));
        let gave = self.work.gave.lock();
        gave.unwrap_or_else(PoisonError::into_inner).insert(by);
        if self.work.is_done() {
            self.work.changed.notify_waiters();
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // So that a link too slow for a whole range gets on all the same.
        let from = self.work.partial.first_missing(&self.range);
        self.work
            .with(|ranges| ranges.give_back(&self.range, from, self.who));
        self.work.changed.notify_waiters();
    }
}

/// One holder.
pub(super) struct Source {
    pub(super) peer: Peer,
    pub(super) addrs: Vec<String>,
    /// Those that it named did not give it.
    pub(super) in_vain: bool,
    /// It gave nothing when it was last asked: others need not wait for what it is asked for.
    pub(super) silent: bool,
    /// A number that no other holder of this shard has.
    pub(super) who: u64,
}

impl Source {
    /// Fetches from this holder for as long as there is something to fetch.
    pub(super) async fn run(self, inner: Arc<Inner>, work: Arc<Work>) -> End {
        match self.ask_for_all(&inner, &work).await {
            Ok(end) | Err(end) => end,
        }
    }

    async fn ask_for_all(&self, inner: &Inner, work: &Arc<Work>) -> Result<End, End> {
        let opened = inner
            .net
            .open(self.peer, &self.addrs, Proto::Transfer, OPEN_DEADLINE);
        let stream = opened
            .await
            .map_err(|e: OpenError| End::Failed(e.to_string()))?;
        let mut wire = Wire::new(stream);
        let buffers = Buffers::default();
        let mut asked: VecDeque<Lease> = VecDeque::new();
        loop {
            while asked.len() < ASKED_AHEAD {
                let lease = match asked.is_empty() {
                    true => match work.wait_next(self.who, self.silent).await {
                        Some(lease) => lease,
                        None => {
                            // So that it knows that all of it was read.
                            let _ = timeout(FRAME_DEADLINE, wire.close()).await;
                            return Ok(End::Done);
                        }
                    },
                    false => match work.next(self.who, self.silent) {
                        Some(lease) => lease,
                        None => break,
                    },
                };
                let ask = Ask {
                    model: work.model,
                    shard: work.partial.shard(),
                    first: lease.range.start,
                    groups: lease.range.end - lease.range.start,
                    shares: inner.shares,
                    in_vain: self.in_vain,
                };
                let sent = timeout(FRAME_DEADLINE, wire.send(&ask, &[])).await;
                sent.map_err(|_| slow())?.map_err(broken)?;
                work.lock_asked()
                    .entry(self.peer)
                    .or_insert_with(Instant::now);
                asked.push_back(lease);
            }
            let Some(lease) = asked.pop_front() else {
                continue;
            };
            let received = receive(inner, &mut wire, work, &lease.range, &buffers);
            let received = timeout(RANGE_DEADLINE, received).await;
            received.map_err(|_| slow())??;
            lease.done(self.peer);
        }
    }
}

/// Receives one range.
async fn receive(
    inner: &Inner,
    wire: &mut Wire,
    work: &Arc<Work>,
    range: &Range<u32>,
    buffers: &Buffers,
) -> Result<(), End> {
    let expected = encoded_len(work.partial.bytes(), range);
    let (parts, incoming) = mpsc::channel::<Vec<u8>>(PARTS_AHEAD);
    let taking = tokio::task::spawn_blocking({
        let (partial, range) = (work.partial.clone(), range.clone());
        let incoming = Incoming::new(incoming, buffers.clone());
        move || partial.take(&range, incoming)
    });
    let mut got = 0u64;
    while got < expected {
        let next = tokio::select! {
            biased;
            // What came was refused: why is said below. The stream is of no more use.
            () = parts.closed() => break,
            next = timeout(FRAME_DEADLINE, wire.next::<Give>(GIVE, buffers)) => next,
        };
        let Some((give, part)) = next.map_err(|_| slow())?.map_err(broken)? else {
            return Err(End::Failed("it closed the stream".into()));
        };
        match give {
            Give::Part => {
                got = got.saturating_add(part.len() as u64);
                inner
                    .counts
                    .came(work.model, work.partial.shard(), part.len());
                if part.is_empty() || got > expected {
                    let why = format!("{got} bytes of a range that takes {expected}");
                    return Err(End::Wrong(why));
                }
                inner.give_way(part.len()).await;
                if parts.send(part).await.is_err() {
                    break;
                }
            }
            _ if !part.is_empty() => return Err(End::Wrong("bytes beside a refusal".into())),
            Give::Missing => return Err(End::Missing),
            Give::Later => return Err(End::Later),
            Give::Elsewhere { peers } => return Err(End::Elsewhere(peers)),
            Give::Failed(why) => return Err(End::Failed(why)),
        }
    }
    drop(parts);
    let taken = taking.await.map_err(|e| End::Failed(e.to_string()))?;
    taken.map_err(|error| match error {
        TakeError::Wrong { .. } => End::Wrong(error.to_string()),
        TakeError::Broken(_) => End::Failed(error.to_string()),
        TakeError::Blob(error) => End::Here(error),
    })
}

fn slow() -> End {
    End::Failed("it is too slow, or silent".into())
}

fn broken(error: WireError) -> End {
    match error {
        WireError::Io(error) => End::Failed(error.to_string()),
        WireError::Frame(error) => End::Wrong(error.to_string()),
    }
}

/// Parts as one reader; ends where they end.
struct Incoming {
    parts: mpsc::Receiver<Vec<u8>>,
    part: Vec<u8>,
    at: usize,
    buffers: Buffers,
}

impl Incoming {
    fn new(parts: mpsc::Receiver<Vec<u8>>, buffers: Buffers) -> Self {
        Self {
            buffers,
            parts,
            part: Vec::new(),
            at: 0,
        }
    }
}

impl Read for Incoming {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.at == self.part.len() {
            match self.parts.blocking_recv() {
                Some(part) => {
                    self.buffers.put(std::mem::replace(&mut self.part, part));
                    self.at = 0;
                }
                None => return Ok(0),
            }
        }
        let n = out.len().min(self.part.len() - self.at);
        out[..n].copy_from_slice(&self.part[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}
