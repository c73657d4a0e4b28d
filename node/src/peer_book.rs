//! What this client has seen of peers that failed: they are left alone for a while, longer each time, and
//! forgiven when they serve again. Only what was seen from here; nobody is told.
//!
//! ```text
//! failed ─▶ left alone for 40 s, 80 s, … ─▶ asked again ─▶ served: one failure is forgotten
//!                                                       └▶ failed: twice as long
//! $home/peer-book/<swarm>.json   {"version": 1, "peers": [{"peer", "failures", "last", "at_s", "until_s"}, …]}
//! ```

use std::{
    collections::HashMap,
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use swarm_proto::{Peer, SwarmId};
use tokio::time::Instant;

use crate::{experience::Experience, net::now_ms, swarm_file::SwarmFile};

/// Folder in the home directory.
const FOLDER: &str = "peer-book";
/// How long a peer that failed is not asked again; twice as long each further time. As long as the advert
/// of a peer that is gone is believed: before that it costs a wait to find out again.
const ALONE: Duration = Duration::from_secs(40);
/// Doublings at most: some 20 minutes.
const FAILURES_MAX: u32 = 6;
/// How long one without room is not asked again.
const FULL: Duration = Duration::from_secs(2);
/// Peers in the book; those that failed last stay.
const PEERS_MAX: usize = 256;
/// The most that this much can come to, and some room.
const FILE_BYTES_MAX: u64 = 256 * 1024;
/// Longest text of a failure that is kept.
const WHY_CHARS_MAX: usize = 200;
/// After a day without another failure a peer is as good as any.
const FORGET_AFTER_S: u64 = 24 * 3600;

/// What is known of one peer that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Who.
    pub peer: Peer,
    /// Failures that are not forgotten.
    pub failures: u32,
    /// The latest, in words.
    pub last: String,
    /// When, in seconds since 1970.
    pub at_s: u64,
    /// Until when it is left alone, in seconds since 1970.
    pub until_s: u64,
}

#[derive(Debug, Clone)]
struct Page {
    failures: u32,
    last: String,
    at_s: u64,
    until: Instant,
}

/// A client's book of peers; clones share it.
#[derive(Debug, Clone, Default)]
pub struct PeerBook {
    pages: Arc<Mutex<HashMap<Peer, Page>>>,
    file: Option<SwarmFile>,
    experience: Experience,
}

impl PeerBook {
    /// The book that this home keeps of `swarm`. What cannot be read is as good as nothing.
    pub fn of_home(home: &Path, swarm: &SwarmId) -> Self {
        let file = SwarmFile::new(home, FOLDER, swarm, FILE_BYTES_MAX);
        let (now, now_s) = (Instant::now(), now_ms() / 1000);
        let pages = file.read::<Entry>().into_iter();
        let pages = pages.filter(|entry| now_s.saturating_sub(entry.at_s) < FORGET_AFTER_S);
        let page = |entry: Entry| {
            let longest = ALONE * (1 << (FAILURES_MAX - 1));
            let left = Duration::from_secs(entry.until_s.saturating_sub(now_s)).min(longest);
            let page = Page {
                failures: entry.failures.min(FAILURES_MAX),
                last: entry.last.chars().take(WHY_CHARS_MAX).collect(),
                at_s: entry.at_s,
                until: now + left,
            };
            (entry.peer, page)
        };
        Self {
            pages: Arc::new(Mutex::new(pages.take(PEERS_MAX).map(page).collect())),
            file: Some(file),
            experience: Experience::of_home(home, swarm),
        }
    }

    /// Everybody in it, those that failed last first.
    pub fn entries(&self) -> Vec<Entry> {
        let (now, now_s) = (Instant::now(), now_ms() / 1000);
        let pages = self.lock();
        let mut entries: Vec<Entry> = pages
            .iter()
            .map(|(peer, page)| Entry {
                peer: *peer,
                failures: page.failures,
                last: page.last.clone(),
                at_s: page.at_s,
                until_s: now_s + page.until.saturating_duration_since(now).as_secs(),
            })
            .collect();
        entries.sort_unstable_by_key(|entry| (std::cmp::Reverse(entry.at_s), entry.peer));
        entries
    }

    /// Writes it down for the next client of this home.
    ///
    /// # Errors
    /// The home cannot be written.
    pub fn save(&self) -> io::Result<()> {
        self.experience.save()?;
        let Some(file) = &self.file else {
            return Ok(());
        };
        let mut peers = self.entries();
        if peers.is_empty() && !file.path().exists() {
            return Ok(());
        }
        peers.truncate(PEERS_MAX);
        file.write(peers)
    }

    /// How fast peers were seen to be.
    pub(crate) fn experience(&self) -> &Experience {
        &self.experience
    }

    /// A peer failed us, as we saw ourselves.
    pub(crate) fn failed(&self, peer: Peer, why: &str) {
        self.note(peer, why, |page| {
            page.failures = (page.failures + 1).min(FAILURES_MAX);
            ALONE * (1 << (page.failures - 1))
        });
    }

    /// Another peer says so: it is left alone once, and no longer each time. Who lies cannot make us leave
    /// others alone for long.
    pub(crate) fn accused(&self, peer: Peer, why: &str) {
        self.note(peer, why, |page| {
            page.failures = page.failures.max(1);
            ALONE
        });
    }

    /// A peer has no room: no fault, and it may have some any moment.
    pub(crate) fn full(&self, peer: Peer, why: &str) {
        self.note(peer, why, |_| FULL);
    }

    fn note(&self, peer: Peer, why: &str, alone: impl FnOnce(&mut Page) -> Duration) {
        let now = Instant::now();
        let mut pages = self.lock();
        let page = pages.entry(peer).or_insert_with(|| Page::new(now));
        let alone = alone(page);
        page.until = page.until.max(now + alone);
        page.last = why.chars().take(WHY_CHARS_MAX).collect();
        page.at_s = now_ms() / 1000;
        if pages.len() > PEERS_MAX {
            let least = pages.iter().min_by_key(|(peer, page)| {
                let no_fault = page.failures > 0;
                (no_fault, page.at_s, **peer)
            });
            if let Some(least) = least.map(|(peer, _)| *peer) {
                pages.remove(&least);
            }
        }
    }

    /// These served to the end: of each, one failure is forgotten.
    pub(crate) fn served(&self, peers: impl Iterator<Item = Peer>) {
        let mut pages = self.lock();
        for peer in peers {
            if let Some(page) = pages.get_mut(&peer) {
                page.failures = page.failures.saturating_sub(1);
                page.until = Instant::now();
                if page.failures == 0 {
                    pages.remove(&peer);
                }
            }
        }
    }

    /// It was not their fault.
    pub(crate) fn forgive(&self, peers: &[Peer]) {
        self.served(peers.iter().copied());
    }

    /// Who is left alone now, those first whose time is over first.
    pub(crate) fn left_alone(&self) -> Vec<Peer> {
        let now = Instant::now();
        let pages = self.lock();
        let alone = pages.iter().filter(|(_, page)| page.until > now);
        let mut alone: Vec<_> = alone.map(|(peer, page)| (page.until, *peer)).collect();
        alone.sort_unstable();
        alone.into_iter().map(|(_, peer)| peer).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Peer, Page>> {
        // Pages are changed one by one: no invariant spans a panic.
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Page {
    fn new(now: Instant) -> Self {
        Self {
            failures: 0,
            last: String::new(),
            at_s: 0,
            until: now,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> Peer {
        Peer([n; 32])
    }

    #[tokio::test(start_paused = true)]
    async fn who_fails_is_left_alone_longer_each_time_and_forgiven_for_serving() {
        let book = PeerBook::default();
        let mut alone = Vec::new();
        for _ in 0..3 {
            book.failed(peer(1), "it died");
            let begin = Instant::now();
            while !book.left_alone().is_empty() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            alone.push(begin.elapsed().as_secs());
        }
        assert_eq!(alone, [40, 80, 160]);
        for _ in 0..9 {
            book.failed(peer(1), "it died");
        }
        let longest = book.entries()[0].until_s - now_ms() / 1000;
        assert!((1200..1300).contains(&longest), "{longest} s");
        book.served([peer(1)].into_iter());
        assert!(book.left_alone().is_empty(), "it served");
        assert_eq!(book.entries()[0].failures, FAILURES_MAX - 1);
        for _ in 1..FAILURES_MAX {
            book.forgive(&[peer(1)]);
        }
        assert!(book.entries().is_empty());
        book.full(peer(2), "no room");
        assert_eq!(book.left_alone(), [peer(2)]);
        tokio::time::sleep(FULL).await;
        assert!(book.left_alone().is_empty());
    }

    #[tokio::test]
    async fn the_next_client_of_a_home_knows_and_a_spoilt_file_is_an_empty_book() {
        let home = tempfile::tempdir().expect("temp dir");
        let swarm = "book".parse().expect("a swarm id");
        let book = PeerBook::of_home(home.path(), &swarm);
        book.failed(peer(1), &"x".repeat(900));
        book.failed(peer(1), "it was silent");
        book.save().expect("writes");
        let again = PeerBook::of_home(home.path(), &swarm);
        assert_eq!(again.left_alone(), [peer(1)]);
        let entry = &again.entries()[0];
        assert_eq!((entry.failures, entry.last.as_str()), (2, "it was silent"));
        for n in 0..=255 {
            again.failed(peer(n), "why");
            again.failed(Peer([n, 1].repeat(16).try_into().expect("32")), "why");
        }
        assert_eq!(again.entries().len(), PEERS_MAX);
        let path = home.path().join(FOLDER).join("book.json");
        std::fs::write(&path, b"{ torn").expect("writes");
        let empty = PeerBook::of_home(home.path(), &swarm);
        assert!(empty.entries().is_empty());
    }
}
