//! Sessions whose answer is complete, kept for the next turn of the conversation: it begins with what they hold, so
//! that only what is new is computed. Each belongs to whoever asked, and nobody else gets it. Pure: the time is
//! passed in.

use std::time::{Duration, Instant};

use node::answer::{Source, keep};
use swarm_proto::ModelId;

/// Sessions kept at once: each holds memory on every hop of its route, until others need it.
const SESSIONS_MAX: usize = 8;
/// A beginning shorter than this is computed again sooner than a session is taken from another conversation.
const COMMON_MIN: usize = 32;
/// Who comes back at all has mostly done so by then: an older session may serve another conversation.
const FRESH: Duration = Duration::from_secs(30);

/// Whose a session is: the model, and the hash of the key that was asked with.
pub type Owner = (ModelId, Option<[u8; 32]>);

/// What can be kept.
pub trait Holds {
    /// Tokens that it holds.
    fn held(&self) -> &[u32];
    /// Positions that it has.
    fn n_ctx(&self) -> u32;
}

impl Holds for Source {
    fn held(&self) -> &[u32] {
        Source::held(self)
    }

    fn n_ctx(&self) -> u32 {
        Source::n_ctx(self)
    }
}

/// The sessions.
pub struct Kept<T> {
    all: Vec<Entry<T>>,
    /// How long; nothing is kept where it is zero.
    time: Duration,
}

struct Entry<T> {
    owner: Owner,
    since: Instant,
    what: T,
}

impl<T: Holds> Kept<T> {
    /// Nothing yet; each will be kept for so long.
    pub fn new(time: Duration) -> Self {
        let all = Vec::new();
        Self { all, time }
    }

    /// The session that spares most of `prompt`, with room for `n_ctx` positions; it is the caller's from now on.
    pub fn take(&mut self, owner: Owner, prompt: &[u32], n_ctx: u32, now: Instant) -> Option<T> {
        let spared = |entry: &Entry<T>| keep(entry.what.held(), prompt);
        let fits = |entry: &Entry<T>| {
            let common = spared(entry);
            let lost = entry.what.held().len() - common;
            let fresh = now.saturating_duration_since(entry.since) < FRESH;
            entry.owner == owner
                && entry.what.n_ctx() >= n_ctx
                && common > 0
                && (lost <= common || common >= COMMON_MIN && !fresh)
        };
        let at = self.all.iter().enumerate().filter(|(_, entry)| fits(entry));
        let (at, _) = at.max_by_key(|(_, entry)| (spared(entry), entry.since))?;
        Some(self.all.remove(at).what)
    }

    /// Keeps a session; gives back what goes for it.
    #[must_use]
    pub fn keep(&mut self, owner: Owner, what: T, now: Instant) -> Vec<T> {
        if self.time.is_zero() {
            return vec![what];
        }
        let since = now;
        self.all.push(Entry { owner, since, what });
        let over = self.all.len().saturating_sub(SESSIONS_MAX);
        self.all.drain(..over).map(|entry| entry.what).collect()
    }

    /// Gives back those whose time is over.
    #[must_use]
    pub fn expired(&mut self, now: Instant) -> Vec<T> {
        let time = self.time;
        let over = |entry: &mut Entry<T>| now.saturating_duration_since(entry.since) >= time;
        self.all
            .extract_if(.., over)
            .map(|entry| entry.what)
            .collect()
    }

    /// Gives all back.
    #[must_use]
    pub fn clear(&mut self) -> Vec<T> {
        self.all.drain(..).map(|entry| entry.what).collect()
    }

    /// How long each is kept.
    pub fn time(&self) -> Duration {
        self.time
    }
}

#[cfg(test)]
mod tests {
    use swarm_proto::Hash;

    use super::*;

    struct Some1(Vec<u32>, u32);

    impl Holds for Some1 {
        fn held(&self) -> &[u32] {
            &self.0
        }
        fn n_ctx(&self) -> u32 {
            self.1
        }
    }

    const MINUTE: Duration = Duration::from_secs(60);

    fn owner(key: u8) -> Owner {
        (ModelId(Hash([1; 32])), Some([key; 32]))
    }

    fn tokens(system: u32, said: &[u32]) -> Vec<u32> {
        (0..system).chain(said.iter().copied()).collect()
    }

    #[test]
    fn the_next_turn_finds_its_session_and_nobody_else_does() {
        let now = Instant::now();
        let mut kept = Kept::new(MINUTE);
        let first = tokens(40, &[901, 902]);
        assert!(
            kept.keep(owner(1), Some1(first.clone(), 256), now)
                .is_empty()
        );
        let next = tokens(40, &[901, 902, 903]);
        assert!(
            kept.take(owner(2), &next, 100, now).is_none(),
            "another key"
        );
        let other_model = (ModelId(Hash([2; 32])), owner(1).1);
        assert!(kept.take(other_model, &next, 100, now).is_none());
        assert!(kept.take(owner(1), &next, 257, now).is_none(), "too small");
        let nothing = [7, 8];
        assert!(kept.take(owner(1), &nothing, 100, now).is_none());
        let took = kept.take(owner(1), &next, 256, now).unwrap();
        assert_eq!(took.0, first);
        assert!(kept.take(owner(1), &next, 256, now).is_none(), "it is gone");
    }

    #[test]
    fn another_conversation_gets_the_common_beginning_of_an_old_one() {
        let now = Instant::now();
        let mut kept = Kept::new(MINUTE);
        let long: Vec<u32> = (500..600).collect();
        let _ = kept.keep(owner(1), Some1(tokens(40, &long), 256), now);
        let other = tokens(40, &[7]);
        assert!(
            kept.take(owner(1), &other, 100, now).is_none(),
            "its own turn may come"
        );
        // What begins mostly alike is taken at once: the longest first.
        let _ = kept.keep(owner(1), Some1(tokens(30, &[]), 256), now);
        let _ = kept.keep(owner(1), Some1(tokens(38, &[1]), 256), now);
        assert_eq!(kept.take(owner(1), &other, 100, now).unwrap().0.len(), 39);
        assert_eq!(kept.take(owner(1), &other, 100, now).unwrap().0.len(), 30);
        let old = kept.take(owner(1), &other, 100, now + FRESH).unwrap();
        assert_eq!(old.0.len(), 140);
    }

    #[test]
    fn what_is_kept_is_bounded_and_expires() {
        let now = Instant::now();
        let mut kept = Kept::new(MINUTE);
        for i in 0..10 {
            let gone = kept.keep(owner(1), Some1(vec![i], 256), now);
            assert_eq!(gone.len(), usize::from(i >= 8));
        }
        assert!(kept.expired(now + MINUTE / 2).is_empty());
        assert_eq!(kept.expired(now + MINUTE).len(), 8);
        assert!(kept.clear().is_empty());
        let mut none = Kept::new(Duration::ZERO);
        assert_eq!(none.keep(owner(1), Some1(vec![1], 256), now).len(), 1);
    }
}
