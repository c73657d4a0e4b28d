//! Sessions whose answer is complete, kept for the next turn of the conversation: it begins with what they hold, so
//! that only what is new is computed. Each belongs to whoever asked, and nobody else gets it. Pure: the time is
//! passed in.

use std::time::{Duration, Instant};

use node::answer::{Source, keep};
use swarm_proto::ModelId;

/// Sessions kept at once: each holds memory on every hop of its route, until others need it.
const SESSIONS_MAX: usize = 8;
/// Tokens at the end of a prompt that its next turn may write in another way: templates that show the answer's
/// beginning to the model (as `<think>`) leave that out later.
const REWRITTEN_MAX: usize = 4;

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
    /// Tokens of the prompt that was answered.
    asked: usize,
    what: T,
}

impl<T: Holds> Kept<T> {
    /// Nothing yet; each will be kept for so long.
    pub fn new(time: Duration) -> Self {
        let all = Vec::new();
        Self { all, time }
    }

    /// The session of the conversation that `prompt` goes on with, the one that spares most, with room for `n_ctx`
    /// positions; it is the caller's from now on. Another conversation does not get it: that one forks it.
    pub fn take(&mut self, owner: Owner, prompt: &[u32], n_ctx: u32) -> Option<T> {
        let spared = |entry: &Entry<T>| keep(entry.what.held(), prompt);
        let goes_on = |entry: &Entry<T>| {
            let common = spared(entry);
            entry.owner == owner
                && entry.what.n_ctx() >= n_ctx
                && common > 0
                && common + REWRITTEN_MAX >= entry.asked
        };
        let all = self.all.iter().enumerate();
        let at = all.filter(|(_, entry)| goes_on(entry));
        let (at, _) = at.max_by_key(|(_, entry)| (spared(entry), entry.since))?;
        Some(self.all.remove(at).what)
    }

    /// Keeps a session that answered a prompt of `asked` tokens; gives back what goes for it.
    #[must_use]
    pub fn keep(&mut self, owner: Owner, what: T, asked: usize, now: Instant) -> Vec<T> {
        if self.time.is_zero() {
            return vec![what];
        }
        self.all.push(Entry {
            owner,
            since: now,
            asked,
            what,
        });
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
            kept.keep(owner(1), Some1(first.clone(), 256), 40, now)
                .is_empty()
        );
        let next = tokens(40, &[901, 902, 903]);
        assert!(kept.take(owner(2), &next, 100).is_none(), "another key");
        let other_model = (ModelId(Hash([2; 32])), owner(1).1);
        assert!(kept.take(other_model, &next, 100).is_none());
        assert!(kept.take(owner(1), &next, 257).is_none(), "too small");
        assert!(kept.take(owner(1), &[7, 8], 100).is_none());
        let took = kept.take(owner(1), &next, 256).unwrap();
        assert_eq!(took.0, first);
        assert!(kept.take(owner(1), &next, 256).is_none(), "it is gone");
    }

    #[test]
    fn another_conversation_leaves_a_session_to_its_own() {
        let now = Instant::now();
        let mut kept = Kept::new(MINUTE);
        // What both begin with, then a question, and its answer.
        let held = tokens(40, &[801, 802, 803, 804, 805, 901, 902]);
        let _ = kept.keep(owner(1), Some1(held, 256), 45, now);
        let other = tokens(40, &[7, 8, 9]);
        assert!(kept.take(owner(1), &other, 100).is_none());
        assert!(kept.take(owner(1), &other[..40], 100).is_none());
        // Its next turn rewrites the last token of the prompt and all that was said.
        let next = tokens(40, &[801, 802, 803, 804, 7, 8, 9]);
        assert_eq!(kept.take(owner(1), &next, 100).unwrap().0.len(), 47);

        // Of several turns of one conversation, the one that spares most.
        let _ = kept.keep(owner(1), Some1(tokens(38, &[1]), 256), 36, now);
        let _ = kept.keep(owner(1), Some1(tokens(30, &[]), 256), 28, now);
        assert_eq!(kept.take(owner(1), &other, 100).unwrap().0.len(), 39);
        assert_eq!(kept.take(owner(1), &other, 100).unwrap().0.len(), 30);
    }

    #[test]
    fn what_is_kept_is_bounded_and_expires() {
        let now = Instant::now();
        let mut kept = Kept::new(MINUTE);
        for i in 0..10 {
            let gone = kept.keep(owner(1), Some1(vec![i], 256), 1, now);
            assert_eq!(gone.len(), usize::from(i >= 8));
        }
        assert!(kept.expired(now + MINUTE / 2).is_empty());
        assert_eq!(kept.expired(now + MINUTE).len(), 8);
        assert!(kept.clear().is_empty());
        let mut none = Kept::new(Duration::ZERO);
        assert_eq!(none.keep(owner(1), Some1(vec![1], 256), 1, now).len(), 1);
    }
}
