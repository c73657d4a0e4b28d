//! What a trunk knows of one holder: whether it can be asked, how long it takes, what it did.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde::Serialize;
use swarm_proto::Peer;
use tokio::sync::mpsc;

use super::{
    link::{CALLS_MAX, Request},
    timing::Timing,
};

/// How it stands with a holder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkState {
    /// It is being reached.
    Opening,
    /// It is asked.
    Up,
    /// It is not, and why.
    Down(String),
}

/// A holder, as others may see it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HolderView {
    /// Who; none: this node itself.
    pub peer: Option<Peer>,
    /// How it stands with it.
    pub state: LinkState,
    /// Experts that it holds.
    pub experts: usize,
    /// Calls that it answered.
    pub calls: u64,
    /// Rows in these answers.
    pub rows: u64,
    /// The least round trip, in microseconds.
    pub rtt_us: Option<u64>,
    /// What a call takes beyond its computing, in microseconds.
    pub wire_us: Option<u64>,
    /// What a row of one expert takes it, in microseconds.
    pub row_us: Option<u64>,
    /// Calls that others were asked, too, because it was late.
    pub hedges: u64,
    /// Times that it was lost.
    pub losses: u64,
}

/// What is known of one holder.
pub(super) struct Holder {
    pub(super) number: u32,
    pub(super) peer: Peer,
    link: Mutex<Option<mpsc::Sender<Request>>>,
    pub(super) timing: Mutex<Timing>,
    seen: Mutex<Seen>,
    next_id: AtomicU32,
    calls: AtomicU64,
    rows: AtomicU64,
    hedges: AtomicU64,
    losses: AtomicU64,
}

struct Seen {
    state: LinkState,
    rtt: Option<Duration>,
}

impl Holder {
    pub(super) fn new(number: u32, peer: Peer) -> Self {
        Self {
            number,
            peer,
            link: Mutex::default(),
            timing: Mutex::default(),
            seen: Mutex::new(Seen {
                state: LinkState::Opening,
                rtt: None,
            }),
            next_id: AtomicU32::new(0),
            calls: AtomicU64::new(0),
            rows: AtomicU64::new(0),
            hedges: AtomicU64::new(0),
            losses: AtomicU64::new(0),
        }
    }

    /// A queue for calls, whose other end the link has.
    pub(super) fn connect(&self) -> mpsc::Receiver<Request> {
        let (requests, receiver) = mpsc::channel(CALLS_MAX);
        *lock(&self.link) = Some(requests);
        self.set_state(LinkState::Up);
        receiver
    }

    /// No more calls; whether there were.
    pub(super) fn disconnect(&self) -> bool {
        lock(&self.link).take().is_some()
    }

    pub(super) fn is_up(&self) -> bool {
        lock(&self.link).is_some()
    }

    /// Hands a call to the link's task.
    pub(super) fn send(&self, request: Request) -> Result<(), Request> {
        let link = lock(&self.link);
        let Some(link) = &*link else {
            return Err(request);
        };
        link.try_send(request).map_err(|why| match why {
            mpsc::error::TrySendError::Full(request)
            | mpsc::error::TrySendError::Closed(request) => request,
        })
    }

    pub(super) fn next_id(&self) -> u32 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn answered(&self, rows: u32, took: Duration, spent: Duration) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.rows.fetch_add(rows.into(), Ordering::Relaxed);
        lock(&self.timing).answered(rows, took, spent, Instant::now());
    }

    pub(super) fn deadline(&self, rows: u32) -> Duration {
        lock(&self.timing).deadline(rows)
    }

    /// It is asked less from now on.
    pub(super) fn late(&self, waited: Duration) {
        lock(&self.timing).late(waited, Instant::now());
    }

    /// Another one was asked for what it is late with.
    pub(super) fn hedged(&self) {
        self.hedges.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn set_state(&self, state: LinkState) {
        lock(&self.seen).state = state;
    }

    pub(super) fn lost(&self) {
        self.losses.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn set_rtt(&self, rtt: Duration) {
        lock(&self.seen).rtt = Some(rtt);
    }

    pub(super) fn view(&self, experts: usize) -> HolderView {
        let seen = lock(&self.seen);
        let figures = lock(&self.timing).figures();
        HolderView {
            peer: Some(self.peer),
            state: seen.state.clone(),
            experts,
            calls: self.calls.load(Ordering::Relaxed),
            rows: self.rows.load(Ordering::Relaxed),
            rtt_us: seen.rtt.map(us),
            wire_us: figures.map(|(wire, _)| us(wire)),
            row_us: figures.map(|(_, row)| us(row)),
            hedges: self.hedges.load(Ordering::Relaxed),
            losses: self.losses.load(Ordering::Relaxed),
        }
    }
}

/// For people and JSON.
pub(super) fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is one call, or leaves what any reader can take: no invariant spans a panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
