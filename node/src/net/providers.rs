//! Which provider records of others we keep: so many of a peer, so many in all, each for an hour. Pure:
//! time is passed in, the records themselves lie in Kademlia's store.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use libp2p::{PeerId, kad::RecordKey};
use swarm_proto::advert::ADVERT_MODELS_MAX;

/// Records in all: two kilobytes each at most.
pub(super) const RECORDS_MAX: usize = 4096;
/// Records of one peer: as many models as its advert may name.
pub(super) const RECORDS_PER_PEER_MAX: usize = ADVERT_MODELS_MAX;
/// How often we say what we provide.
pub(super) const PROVIDE_INTERVAL: Duration = Duration::from_secs(20 * 60);
/// How long others believe it: two announcements may be lost.
pub(super) const RECORD_TTL: Duration = Duration::from_secs(60 * 60);
/// What expired is looked for this often at most: it costs a walk over all records.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

/// Who gave us which keys, and until when they hold.
#[derive(Default)]
pub(super) struct Providers {
    until: HashMap<PeerId, HashMap<RecordKey, Instant>>,
    records: usize,
    swept: Option<Instant>,
}

impl Providers {
    /// Whether to keep this record; one that is kept already is renewed.
    pub(super) fn keep(&mut self, provider: PeerId, key: &RecordKey, now: Instant) -> bool {
        let (full, keys) = (
            self.records >= RECORDS_MAX,
            self.until.entry(provider).or_default(),
        );
        let known = keys.contains_key(key);
        let keep = known || !full && keys.len() < RECORDS_PER_PEER_MAX;
        if keep {
            keys.insert(key.clone(), now + RECORD_TTL);
            self.records += usize::from(!known);
        } else if keys.is_empty() {
            self.until.remove(&provider);
        }
        keep
    }

    /// Forgets what has expired and tells what it was; looks only once a minute.
    pub(super) fn sweep(&mut self, now: Instant) -> Vec<(PeerId, RecordKey)> {
        let soon = |at: Instant| now < at + SWEEP_INTERVAL;
        if self.swept.is_some_and(soon) {
            return Vec::new();
        }
        self.swept = Some(now);
        let mut expired = Vec::new();
        self.until.retain(|provider, keys| {
            expired.extend(
                keys.extract_if(|_, until| *until <= now)
                    .map(|(key, _)| (*provider, key)),
            );
            !keys.is_empty()
        });
        self.records -= expired.len();
        expired
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: usize) -> RecordKey {
        RecordKey::new(&n.to_le_bytes())
    }

    #[test]
    fn one_peer_cannot_fill_the_table_and_what_expires_makes_room() {
        let now = Instant::now();
        let mut table = Providers::default();
        let liar = PeerId::random();
        let kept = (0..100).filter(|n| table.keep(liar, &key(*n), now)).count();
        assert_eq!(kept, RECORDS_PER_PEER_MAX);
        let later = now + RECORD_TTL / 2;
        assert!(table.keep(liar, &key(0), later), "renewed");
        let mut others = RECORDS_PER_PEER_MAX;
        while table.keep(PeerId::random(), &key(0), later) {
            others += 1;
        }
        assert_eq!(others, RECORDS_MAX);
        assert_eq!(table.until.len(), others - RECORDS_PER_PEER_MAX + 1);

        assert!(table.sweep(later).is_empty());
        let end = now + RECORD_TTL;
        let expired = table.sweep(end);
        assert_eq!(
            expired.len(),
            RECORDS_PER_PEER_MAX - 1,
            "not the renewed one"
        );
        assert!(!expired.contains(&(liar, key(0))));
        assert!(table.keep(PeerId::random(), &key(7), end));
        assert_eq!(table.records, RECORDS_MAX - expired.len() + 1);
        let end = later + RECORD_TTL;
        assert_eq!(table.sweep(end).len(), others - RECORDS_PER_PEER_MAX + 1);
        assert_eq!((table.records, table.until.len()), (1, 1));
    }
}
