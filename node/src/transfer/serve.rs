//! The giving side: bounded in streams, in ranges under way, in time and, if wanted, in bytes a second. Waits are
//! short and said, so that an asker with other holders goes to them.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use shard_registry::blobs::{GiveError, OpenShard};
use swarm_proto::{Ask, Give, Peer, codec::cut_text};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinHandle,
    time::timeout,
};

use super::{
    Inner, Transfer, blocking,
    bucket::Bucket,
    grants::{Asker, Grants, Uplink, Verdict},
    wire::{ASK, Buffers, Wire, WireError},
};
use crate::{
    net::{Net, Proto, Stream},
    seldom::Seldom,
    shares::Shares,
};

/// Streams that may be open, over all peers.
const STREAMS_MAX: usize = 128;
/// Those of one peer: it needs one, and a second while it starts anew.
const STREAMS_PER_PEER_MAX: usize = 4;
/// Ranges that are given at once: each holds a thread and a few buffers.
const GIVEN_MAX: usize = 8;
/// How long a request waits for its turn before the asker is sent away for a moment.
const TURN_DEADLINE: Duration = Duration::from_secs(5);
/// How long a stream may stay without a request.
const IDLE_DEADLINE: Duration = Duration::from_secs(30);
/// How long one part may take to leave: 128 KiB on a 128 kbit/s uplink need eight seconds.
const PART_DEADLINE: Duration = Duration::from_secs(20);
/// How long one range may take, as on the asking side: it holds one of a few turns.
const RANGE_DEADLINE: Duration = Duration::from_secs(120);
/// Payload of one frame: a wake-up each on five tasks and threads, and what a pause for the upload limit is counted in.
const PART_BYTES: usize = 128 * 1024;
/// The same while a session runs here: its frames wait for one at most.
const PART_BYTES_BESIDE: usize = 32 * 1024;
/// How much may leave at once, in time at the full rate.
const BURST: Duration = Duration::from_millis(50);
/// Parts between the thread that reads and hashes and the task that sends.
const PARTS_AHEAD: usize = 4;

/// What serving shares.
struct Uploads {
    transfer: Arc<Inner>,
    turns: Semaphore,
    grants: Mutex<Grants>,
    bucket: Option<Mutex<Bucket>>,
    /// Files that peers ask for cannot be read, or changed.
    unreadable: Seldom,
}

/// Why a stream of requests ends.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("too slow")]
    Slow,
    #[error("{0}")]
    Request(GiveError),
    #[error(transparent)]
    Task(#[from] tokio::task::JoinError),
}

impl Transfer {
    /// Gives what is here to peers until the network is shut down; `None` where somebody does so already.
    pub fn serve(&self) -> Option<JoinHandle<()>> {
        let mut streams = self.inner.net.accept(Proto::Transfer)?;
        let limit = self.inner.limits.upload_bytes_s;
        let uploads = Arc::new(Uploads {
            transfer: self.inner.clone(),
            turns: Semaphore::new(GIVEN_MAX),
            grants: Mutex::default(),
            bucket: limit.map(|bytes_s| Mutex::new(Bucket::new(bytes_s, BURST, Instant::now()))),
            unreadable: Seldom::default(),
        });
        let shares = Shares::new(STREAMS_MAX, STREAMS_PER_PEER_MAX);
        Some(tokio::spawn(async move {
            while let Some((peer, stream)) = streams.recv().await {
                let share = match shares.take(peer) {
                    Ok(share) => share,
                    Err(why) => {
                        tracing::debug!(%peer, ?why, "transfer stream dropped");
                        continue;
                    }
                };
                let uploads = uploads.clone();
                tokio::spawn(async move {
                    if let Err(error) = uploads.serve(peer, stream).await {
                        tracing::debug!(%peer, %error, "transfer stream ended");
                    }
                    drop(share);
                });
            }
        }))
    }
}

impl Uploads {
    async fn serve(self: &Arc<Self>, peer: Peer, stream: Stream) -> Result<(), ServeError> {
        let mut wire = Wire::new(stream);
        let buffers = Buffers::default();
        let mut sent = Sent::default();
        loop {
            let asked = timeout(IDLE_DEADLINE, wire.next::<Ask>(ASK, &buffers)).await;
            let Some((ask, _)) = asked.map_err(|_| ServeError::Slow)?? else {
                sent.measure(&self.transfer.net);
                return Ok(());
            };
            let said = match timeout(TURN_DEADLINE, self.turns.acquire()).await {
                Ok(_turn) => {
                    let answered = self.answer(peer, &ask, &mut wire, &buffers, &mut sent);
                    let answered = timeout(RANGE_DEADLINE, answered).await;
                    answered.map_err(|_| ServeError::Slow)??
                }
                Err(_) => Some(Give::Later),
            };
            if let Some(said) = said {
                let sent = timeout(PART_DEADLINE, wire.send(&said, &[])).await;
                sent.map_err(|_| ServeError::Slow)??;
            }
        }
    }

    /// Gives the range, or says what to say instead.
    async fn answer(
        self: &Arc<Self>,
        peer: Peer,
        ask: &Ask,
        wire: &mut Wire,
        buffers: &Buffers,
        sent: &mut Sent,
    ) -> Result<Option<Give>, ServeError> {
        if self.transfer.paused.load(Ordering::Relaxed) {
            return Ok(Some(Give::Failed("it is paused by its owner".into())));
        }
        if self.transfer.limits.upload_bytes_s == Some(0) {
            return Ok(Some(Give::Missing));
        }
        let (transfer, wanted) = (self.transfer.clone(), *ask);
        let found = blocking(move || {
            let found = transfer.shards.get(wanted.model, wanted.shard)?;
            let Some(shard) = found else { return Ok(None) };
            shard.check(&wanted.range()).map(|()| Some(shard))
        })
        .await?;
        let shard = match found {
            Ok(Some(shard)) => shard,
            Ok(None) => return Ok(Some(Give::Missing)),
            Err(GiveError::NotYet) => return Ok(Some(Give::Later)),
            Err(error @ GiveError::Range { .. }) => return Err(ServeError::Request(error)),
            Err(error) => return Ok(Some(self.cannot(ask, &error))),
        };
        let asker = Asker {
            peer,
            shares: ask.shares,
            in_vain: ask.in_vain,
        };
        let verdict = {
            let peers = self.transfer.net.peers();
            let there = peers.borrow();
            let live = |peer: &Peer| there.contains(peer);
            let mut grants = self.grants();
            let now = Instant::now();
            grants.ask(ask.shard, shard.bytes(), asker, now, self.uplink(now), live)
        };
        match verdict {
            Verdict::Serve => {}
            Verdict::Later => return Ok(Some(Give::Later)),
            Verdict::Elsewhere(peers) => return Ok(Some(Give::Elsewhere { peers })),
        }
        match self.give(peer, shard, ask, wire, buffers, sent).await? {
            Ok(sent) => {
                let mut grants = self.grants();
                grants.sent(&ask.shard, &peer, sent);
                Ok(None)
            }
            Err(error) => {
                self.transfer.shards.forget(&ask.shard);
                Ok(Some(self.cannot(ask, &error)))
            }
        }
    }

    /// Reads, checks and hashes on a thread, and sends what is right.
    async fn give(
        &self,
        peer: Peer,
        shard: Arc<OpenShard>,
        ask: &Ask,
        wire: &mut Wire,
        buffers: &Buffers,
        all: &mut Sent,
    ) -> Result<Result<u64, GiveError>, ServeError> {
        let (parts, mut ready) = mpsc::channel::<Vec<u8>>(PARTS_AHEAD);
        let (spare, range) = (buffers.clone(), ask.range());
        let part_bytes = match self.transfer.net.sessions_run() {
            true => PART_BYTES_BESIDE,
            false => PART_BYTES,
        };
        // One a second: the asker waits for the next no longer than for a silent one.
        let limit = self.transfer.limits.upload_bytes_s.unwrap_or(u64::MAX);
        let part_bytes = part_bytes.min(usize::try_from(limit).unwrap_or(usize::MAX));
        let giving = tokio::task::spawn_blocking(move || {
            let mut out = Parts {
                parts,
                part: Vec::new(),
                part_bytes,
                buffers: spare,
            };
            shard.give(&range, &mut out)?;
            out.flush().map_err(|_| GiveError::Left)
        });
        let mut sent = 0;
        while let Some(part) = ready.recv().await {
            all.begin();
            all.paced |= self.pause(part.len()).await;
            self.grants().sending(&ask.shard, &peer, Instant::now());
            let sending = timeout(PART_DEADLINE, wire.send(&Give::Part, &part)).await;
            sending.map_err(|_| ServeError::Slow)??;
            sent += part.len() as u64;
            all.bytes += part.len();
            self.transfer.counts.gave(ask.model, ask.shard, part.len());
            buffers.put(part);
        }
        Ok(giving.await?.map(|()| sent))
    }

    fn grants(&self) -> MutexGuard<'_, Grants> {
        // Whose every change is one call: no invariant spans a panic.
        self.grants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn uplink(&self, now: Instant) -> Uplink {
        self.bucket.as_ref().map_or(Uplink::Free, |bucket| {
            let bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
            Uplink::Limited {
                full: bucket.is_full(now),
            }
        })
    }

    /// Waits for its turn under the limits; true where they made it wait.
    async fn pause(&self, bytes: usize) -> bool {
        let gave_way = self.transfer.give_way(bytes).await;
        let Some(bucket) = &self.bucket else {
            return gave_way;
        };
        let wait = {
            let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.take(bytes, Instant::now())
        };
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        gave_way || !wait.is_zero()
    }

    fn cannot(&self, ask: &Ask, error: &GiveError) -> Give {
        if matches!(error, GiveError::Changed { .. }) {
            self.transfer.mend(ask.model, ask.shard);
        }
        if self.unreadable.now(Instant::now()) {
            tracing::warn!(shard = %ask.shard, %error, "cannot give a shard that a peer asks for");
        } else {
            tracing::debug!(shard = %ask.shard, %error, "cannot give a shard that a peer asks for");
        }
        // The error's own words name our files: they stay here.
        let mut why = match error {
            GiveError::Changed { .. } => "its bytes here are not what they were".to_owned(),
            _ => "it is here and cannot be read".to_owned(),
        };
        cut_text(&mut why, 512);
        Give::Failed(why)
    }
}

/// What one stream of requests got, as far as it says how fast we upload.
#[derive(Default)]
struct Sent {
    /// Before the first part.
    start: Option<Instant>,
    bytes: usize,
    /// Something of ours held it back.
    paced: bool,
}

impl Sent {
    fn begin(&mut self) {
        self.start.get_or_insert_with(Instant::now);
    }

    /// The asker closed the stream: it has read all of it. An upload limit, or sessions that go first, say nothing of
    /// the line.
    fn measure(&self, net: &Net) {
        let Some(start) = self.start.filter(|_| !self.paced) else {
            return;
        };
        let now = Instant::now();
        net.with_uplink(|uplink| uplink.sent(self.bytes, now - start, now));
    }
}

/// Collects what is written into parts and hands them over; fails once nobody takes them.
struct Parts {
    parts: mpsc::Sender<Vec<u8>>,
    part: Vec<u8>,
    part_bytes: usize,
    buffers: Buffers,
}

impl Write for Parts {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.part.len() + bytes.len() > self.part_bytes {
            self.flush()?;
        }
        self.part.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.part.is_empty() {
            return Ok(());
        }
        let mut next = self.buffers.get();
        next.clear();
        let part = std::mem::replace(&mut self.part, next);
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        self.parts.blocking_send(part).map_err(gone)
    }
}
