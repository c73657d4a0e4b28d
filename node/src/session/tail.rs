//! Pairs a client's answer stream with its session at the tail, whichever comes first.
//!
//! Keyed by the client's peer id as well as the session's, so that nobody attaches to, or squats
//! on, the session of another. Bounded, in all and for each client, and nothing waits longer than the
//! pairing deadline.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, PoisonError},
};

use swarm_proto::{Epoch, Peer, SessionId};
use tokio::sync::oneshot;

use crate::net::Stream;

/// Whose answers: client, session, epoch.
pub(super) type Key = (Peer, SessionId, Epoch);

/// What waits.
enum Half {
    Session(oneshot::Sender<Stream>),
    Answer(oneshot::Sender<oneshot::Sender<Stream>>),
}

/// Why a half cannot wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum PairError {
    /// Another stream of the same client already claims this session.
    #[error("this session is already open, or already has an answer stream")]
    Taken,
    /// Too many wait.
    #[error("{0} answer streams wait already")]
    Full(usize),
    /// Too many of this client wait.
    #[error("{0} answer streams of this client wait already")]
    ClientFull(usize),
}

/// The table.
#[derive(Clone)]
pub(super) struct Pairing {
    waiting: Arc<Mutex<HashMap<Key, Half>>>,
    max: usize,
    per_client_max: usize,
}

/// A place in the table, given back when dropped.
pub(super) struct Place {
    pairing: Pairing,
    key: Key,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut waiting = self.pairing.lock();
        // After a match the place may belong to somebody else already: only a dead half is ours.
        if let Entry::Occupied(half) = waiting.entry(self.key) {
            let dead = match half.get() {
                Half::Session(to) => to.is_closed(),
                Half::Answer(to) => to.is_closed(),
            };
            if dead {
                half.remove();
            }
        }
    }
}

impl Pairing {
    pub(super) fn new(max: usize, per_client_max: usize) -> Self {
        Self {
            waiting: Arc::default(),
            max,
            per_client_max,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Half>> {
        // Single inserts and removals: no invariant spans a panic.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session's side: the stream arrives on the receiver. Drop the receiver before the place.
    pub(super) fn session(
        &self,
        key: Key,
    ) -> Result<(oneshot::Receiver<Stream>, Place), PairError> {
        let (to, stream) = oneshot::channel();
        let place = Place {
            pairing: self.clone(),
            key,
        };
        let mut waiting = self.lock();
        match waiting.remove(&key) {
            Some(Half::Answer(answer)) => {
                // A client that gave up meanwhile shows as an end of the receiver.
                let _ = answer.send(to);
            }
            Some(taken @ Half::Session(_)) => {
                waiting.insert(key, taken);
                drop(waiting);
                return Err(PairError::Taken);
            }
            None => {
                waiting.insert(key, Half::Session(to));
            }
        }
        drop(waiting);
        Ok((stream, place))
    }

    /// The answer stream's side: where to hand the stream, at once or later.
    pub(super) fn answer(&self, key: Key) -> Result<Claim, PairError> {
        let mut waiting = self.lock();
        match waiting.remove(&key) {
            Some(Half::Session(to)) => return Ok(Claim::Now(to)),
            Some(taken @ Half::Answer(_)) => {
                waiting.insert(key, taken);
                return Err(PairError::Taken);
            }
            None => {}
        }
        if waiting.len() >= self.max {
            return Err(PairError::Full(waiting.len()));
        }
        let of_client =
            |(other, half): (&Key, &Half)| other.0 == key.0 && matches!(half, Half::Answer(_));
        let parked = waiting.iter().filter(|entry| of_client(*entry)).count();
        if parked >= self.per_client_max {
            return Err(PairError::ClientFull(parked));
        }
        let (to, later) = oneshot::channel();
        waiting.insert(key, Half::Answer(to));
        drop(waiting);
        Ok(Claim::Later(
            later,
            Place {
                pairing: self.clone(),
                key,
            },
        ))
    }

    /// Halves that wait.
    pub(super) fn len(&self) -> usize {
        self.lock().len()
    }
}

/// What the answer stream's side got.
pub(super) enum Claim {
    /// The session is here.
    Now(oneshot::Sender<Stream>),
    /// The session will come, or not: the caller waits with a deadline.
    Later(oneshot::Receiver<oneshot::Sender<Stream>>, Place),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(client: u8) -> Key {
        (Peer([client; 32]), SessionId([1; 16]), Epoch(0))
    }

    fn stream() -> Stream {
        Stream::new(tokio::io::duplex(8).0)
    }

    #[tokio::test]
    async fn either_may_come_first_and_nothing_stays() {
        let pairing = Pairing::new(4, 4);
        let (session, place) = pairing.session(key(1)).unwrap();
        let Ok(Claim::Now(to)) = pairing.answer(key(1)) else {
            panic!("no session")
        };
        to.send(stream()).unwrap();
        session.await.unwrap();
        drop(place);
        assert_eq!(pairing.len(), 0);

        let Ok(Claim::Later(later, place)) = pairing.answer(key(1)) else {
            panic!("a session")
        };
        let (session, session_place) = pairing.session(key(1)).unwrap();
        later.await.unwrap().send(stream()).unwrap();
        session.await.unwrap();
        drop((place, session_place));
        assert_eq!(pairing.len(), 0);
    }

    #[tokio::test]
    async fn another_client_gets_nothing_and_the_table_is_bounded() {
        let pairing = Pairing::new(2, 2);
        let (session, place) = pairing.session(key(1)).unwrap();
        let Ok(Claim::Later(later, other)) = pairing.answer(key(2)) else {
            panic!("stolen")
        };
        assert_eq!(pairing.answer(key(2)).err(), Some(PairError::Taken));
        assert_eq!(pairing.session(key(1)).err(), Some(PairError::Taken));
        assert_eq!(pairing.answer(key(3)).err(), Some(PairError::Full(2)));
        drop((later, session));
        drop((other, place));
        assert_eq!(pairing.len(), 0);
    }

    #[tokio::test]
    async fn one_client_cannot_fill_the_table() {
        let pairing = Pairing::new(8, 2);
        let nth = |client, n| (Peer([client; 32]), SessionId([n; 16]), Epoch(0));
        // What hops say in its name is bounded by their sessions, and does not count here.
        let (_waiting, _place) = pairing.session(nth(1, 0)).unwrap();
        let _first = pairing.answer(nth(1, 1)).unwrap();
        let second = pairing.answer(nth(1, 2)).unwrap();
        let full = Some(PairError::ClientFull(2));
        assert_eq!(pairing.answer(nth(1, 3)).err(), full);
        assert!(pairing.answer(nth(2, 3)).is_ok(), "others get in");
        let own = pairing.answer(nth(1, 0));
        assert!(
            matches!(own, Ok(Claim::Now(_))),
            "who pairs waits for nothing"
        );
        drop(second);
        assert!(pairing.answer(nth(1, 3)).is_ok());
    }
}
