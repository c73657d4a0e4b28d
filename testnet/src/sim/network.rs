//! The simulated network: who is where, how far apart, what is cut, and how streams are opened.
//!
//! Machines are numbered: nodes first, then clients.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use node::session::{Dialer, Sessions};
use node::{OpenError, Proto, Stream};
use swarm_proto::Peer;
use tokio::sync::watch;
use tokio::time::sleep;

use super::dice::Dice;
use super::log::{Log, lock};
use super::tap::{Epochs, Tap};
use super::wire::Line;

/// What a machine does with who knocks.
#[derive(Clone)]
pub(super) enum Door {
    Serves(Sessions),
    /// The system is there, the program is not.
    Refuses,
    /// Nobody is there.
    Silent,
}

/// Where a machine is, in time: a delay is the sum of both halves.
#[derive(Clone, Copy)]
struct Place {
    half: Duration,
    bytes_s: u64,
}

/// The network of one seed.
pub(super) struct Network {
    log: Arc<Log>,
    epochs: Arc<Epochs>,
    peers: Vec<Peer>,
    numbers: BTreeMap<Peer, usize>,
    places: Vec<Place>,
    state: Mutex<State>,
    /// Changes whenever something is cut or joined again.
    changes: watch::Sender<u64>,
}

struct State {
    doors: Vec<Door>,
    /// Nothing passes from the first to the second.
    cut: BTreeSet<(usize, usize)>,
    /// Nothing passes to or from them.
    off: BTreeSet<usize>,
    /// So many times slower.
    slow: BTreeMap<usize, u32>,
    /// Who is connected with whom already.
    met: BTreeSet<(usize, usize)>,
    lines: Vec<Weak<Line>>,
}

impl Network {
    /// A network of these peers; nobody is there yet.
    pub(super) fn new(log: Arc<Log>, dice: &Dice, peers: Vec<Peer>) -> Arc<Self> {
        let place = |_: &Peer| Place {
            half: dice.millis(1, 20),
            bytes_s: 1_000_000 * (1 + dice.below(50) as u64),
        };
        let state = State {
            doors: vec![Door::Silent; peers.len()],
            cut: BTreeSet::new(),
            off: BTreeSet::new(),
            slow: BTreeMap::new(),
            met: BTreeSet::new(),
            lines: Vec::new(),
        };
        Arc::new(Self {
            log,
            epochs: Arc::default(),
            places: peers.iter().map(place).collect(),
            numbers: peers.iter().copied().zip(0..).collect(),
            peers,
            state: Mutex::new(state),
            changes: watch::Sender::new(0),
        })
    }

    pub(super) fn peer(&self, machine: usize) -> Peer {
        self.peers[machine]
    }

    pub(super) fn number(&self, peer: &Peer) -> Option<usize> {
        self.numbers.get(peer).copied()
    }

    /// How long a byte is on its way.
    pub(super) fn delay(&self, from: usize, to: usize) -> Duration {
        let state = lock(&self.state);
        let slow = |machine| state.slow.get(&machine).copied().unwrap_or(1);
        self.places[from].half * slow(from) + self.places[to].half * slow(to)
    }

    /// How long so many bytes take to be sent.
    pub(super) fn sending(&self, from: usize, to: usize, bytes: usize) -> Duration {
        let state = lock(&self.state);
        let rate = |machine: usize| {
            let slow = state.slow.get(&machine).copied().unwrap_or(1);
            self.places[machine].bytes_s / u64::from(slow)
        };
        let rate = rate(from).min(rate(to)).max(1);
        Duration::from_micros(bytes as u64 * 1_000_000 / rate)
    }

    /// Whether nothing passes from one to the other just now.
    pub(super) fn blocked(&self, from: usize, to: usize) -> bool {
        let state = lock(&self.state);
        state.cut.contains(&(from, to)) || state.off.contains(&from) || state.off.contains(&to)
    }

    /// Cuts one direction, or joins it again.
    pub(super) fn set_cut(&self, from: usize, to: usize, cut: bool) {
        self.change(|state| match cut {
            true => state.cut.insert((from, to)),
            false => state.cut.remove(&(from, to)),
        });
    }

    /// Takes a machine off the network, or brings it back.
    pub(super) fn set_off(&self, machine: usize, off: bool) {
        self.change(|state| match off {
            true => state.off.insert(machine),
            false => state.off.remove(&machine),
        });
    }

    /// Makes a machine's lines so many times slower.
    pub(super) fn set_slow(&self, machine: usize, times: u32) {
        self.change(|state| state.slow.insert(machine, times).is_none());
    }

    /// What a machine does with who knocks from now on.
    pub(super) fn set_door(&self, machine: usize, door: Door) {
        self.change(|state| {
            state.doors[machine] = door;
            true
        });
    }

    /// Everything is joined again, and as fast as it was.
    pub(super) fn heal(&self) {
        self.change(|state| {
            state.cut.clear();
            state.off.clear();
            state.slow.clear();
            true
        });
    }

    /// A machine dies, see [`Line::die`]; what it knew of epochs is gone.
    pub(super) fn die(&self, machine: usize, heard: bool) {
        let door = if heard { Door::Refuses } else { Door::Silent };
        self.set_door(machine, door);
        self.epochs.forget(machine);
        lock(&self.state)
            .met
            .retain(|(a, b)| *a != machine && *b != machine);
        for line in self.lines(|line| line.touches(machine)) {
            line.die(machine, heard);
        }
    }

    /// Gives up what is open to a machine, as transports do that heard nothing for long.
    pub(super) fn break_all(&self, machine: usize) {
        for line in self.lines(|line| line.touches(machine)) {
            line.break_off();
        }
    }

    /// Gives up what is open between two machines.
    pub(super) fn break_between(&self, a: usize, b: usize) {
        for line in self.lines(|line| line.joins(a, b)) {
            line.break_off();
        }
    }

    /// How `machine` opens streams.
    pub(super) fn dialer(self: &Arc<Self>, machine: usize) -> Arc<dyn Dialer> {
        Arc::new(Phone {
            network: self.clone(),
            machine,
        })
    }

    fn change(&self, with: impl FnOnce(&mut State) -> bool) {
        with(&mut lock(&self.state));
        self.changes.send_modify(|version| *version += 1);
        self.lines(|_| true).iter().for_each(|line| line.wake());
    }

    fn lines(&self, pick: impl Fn(&Line) -> bool) -> Vec<Arc<Line>> {
        let mut state = lock(&self.state);
        state.lines.retain(|line| line.strong_count() > 0);
        let lines = state.lines.iter().filter_map(Weak::upgrade);
        lines.filter(|line| pick(line)).collect()
    }

    /// Waits until something passes both ways.
    async fn passable(&self, a: usize, b: usize) {
        let mut changes = self.changes.subscribe();
        while self.blocked(a, b) || self.blocked(b, a) {
            let _ = changes.changed().await;
        }
    }

    /// Opens a stream; waits as long as nobody says no.
    async fn open(
        self: Arc<Self>,
        from: usize,
        peer: Peer,
        proto: Proto,
    ) -> Result<Stream, OpenError> {
        let Some(to) = self.number(&peer) else {
            return Err(OpenError::NoAddress { peer });
        };
        self.passable(from, to).await;
        let pair = (from.min(to), from.max(to));
        let round_trips = if lock(&self.state).met.contains(&pair) {
            1
        } else {
            3
        };
        sleep((self.delay(from, to) + self.delay(to, from)) * round_trips).await;
        self.passable(from, to).await;
        let door = lock(&self.state).doors[to].clone();
        let sessions = match door {
            Door::Serves(sessions) => sessions,
            Door::Refuses => {
                let reason = "connection refused".into();
                return Err(OpenError::Unreachable { peer, reason });
            }
            Door::Silent => std::future::pending().await,
        };
        let tap = Tap::new(self.log.clone(), self.epochs.clone(), proto, from, to);
        let (line, near, far) = Line::open(self.clone(), [from, to], tap);
        let mut state = lock(&self.state);
        state.lines.push(Arc::downgrade(&line));
        state.met.insert(pair);
        drop(state);
        match proto {
            Proto::Answer => sessions.accept_answer(self.peers[from], Stream::new(far)),
            _ => sessions.accept_session(self.peers[from], Stream::new(far)),
        }
        Ok(Stream::new(near))
    }
}

struct Phone {
    network: Arc<Network>,
    machine: usize,
}

impl Dialer for Phone {
    fn open<'a>(
        &'a self,
        peer: Peer,
        _: &'a [String],
        proto: Proto,
    ) -> Pin<Box<dyn Future<Output = Result<Stream, OpenError>> + Send + 'a>> {
        Box::pin(self.network.clone().open(self.machine, peer, proto))
    }
}
