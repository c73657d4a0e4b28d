//! What sessions that run or are kept begin with, by whose they are: a request that begins as one of them takes that
//! over, and waits for it while it is still being computed. Whoever computed the same beside it would be no faster.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use node::{Beginning, Lender};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::kept::Owner;

/// Tokens that are worth it: a frame of a prompt.
const COMMON_MIN: u32 = engine::PREFILL_CHUNK;
/// A session that did not come forward for so long is not waited for: a stage computes a frame within six seconds,
/// however much it has to do.
const STALLED: Duration = Duration::from_secs(10);

/// The beginnings. Clones share them.
#[derive(Clone, Default)]
pub struct Beginnings(Arc<Mutex<All>>);

#[derive(Default)]
struct All {
    entries: Vec<Entry>,
    next: u64,
}

struct Entry {
    /// In the order of coming.
    id: u64,
    owner: Owner,
    /// What will be fed, as long as nothing is said.
    prompt: Arc<[u32]>,
    said: watch::Receiver<Option<Beginning>>,
}

/// Whether another session's beginning is there.
enum Ready {
    /// So many tokens of it.
    Yes(Beginning, u32),
    /// It ended.
    Gone,
    No,
}

impl Beginnings {
    /// A request with this prompt: where its session is to say what it begins with, and what it may begin with
    /// itself, of which so many tokens are alike. Only those who came before are waited for.
    ///
    /// # Cancel safety
    /// Who is dropped is waited for no more.
    pub async fn enter(&self, owner: Owner, prompt: &[u32]) -> (Lender, Option<(Beginning, u32)>) {
        let (lender, id) = self.register(owner, prompt);
        while let Some(other) = self.best(id, owner, prompt) {
            match ready(other, prompt).await {
                Ready::Yes(beginning, common) => return (lender, Some((beginning, common))),
                Ready::Gone => {}
                Ready::No => break,
            }
        }
        (lender, None)
    }

    fn register(&self, owner: Owner, prompt: &[u32]) -> (Lender, u64) {
        let (lender, said) = watch::channel(None);
        let mut all = self.lock();
        let id = all.next;
        all.next += 1;
        all.entries.push(Entry {
            id,
            owner,
            prompt: prompt.into(),
            said,
        });
        (lender, id)
    }

    /// Of those who came before `id`, the one with most in common, of several the first.
    fn best(&self, id: u64, owner: Owner, prompt: &[u32]) -> Option<Expected> {
        let mut all = self.lock();
        // Whose session is over says nothing more.
        all.entries.retain(|entry| entry.said.has_changed().is_ok());
        let others = all.entries.iter();
        let others = others.filter(|entry| entry.id < id && entry.owner == owner);
        let common = |entry: &Entry| match &*entry.said.borrow() {
            Some(beginning) => Beginning::common(beginning.tokens(), prompt),
            None => Beginning::common(&entry.prompt, prompt),
        };
        let (common, best) = others
            .map(|entry| (common(entry), entry))
            .filter(|(common, _)| *common >= COMMON_MIN)
            .max_by_key(|(common, entry)| (*common, std::cmp::Reverse(entry.id)))?;
        Some(Expected {
            common,
            said: best.said.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, All> {
        // Single pushes and removals: no invariant spans a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A session that begins as the prompt does.
struct Expected {
    /// As far as is known before it says anything.
    common: u32,
    said: watch::Receiver<Option<Beginning>>,
}

async fn ready(mut other: Expected, prompt: &[u32]) -> Ready {
    loop {
        let said = other.said.borrow_and_update().clone();
        let (common, computed) = match &said {
            Some(beginning) => (
                Beginning::common(beginning.tokens(), prompt),
                beginning.computed(),
            ),
            None => (other.common, 0),
        };
        if common < COMMON_MIN {
            return Ready::No;
        }
        let there = match computed >= common {
            true => common,
            false => match timeout(STALLED, other.said.changed()).await {
                Ok(Ok(())) => continue,
                Ok(Err(_)) => return Ready::Gone,
                Err(_) => computed,
            },
        };
        return match said {
            Some(beginning) if there >= COMMON_MIN => Ready::Yes(beginning, there),
            _ => Ready::No,
        };
    }
}

#[cfg(test)]
mod tests {
    use swarm_proto::{Hash, ModelId};

    use super::*;

    fn owner(key: u8) -> Owner {
        (ModelId(Hash([1; 32])), Some([key; 32]))
    }

    fn prompt(system: u32, own: u32) -> Vec<u32> {
        (0..system).chain([900 + own, 901]).collect()
    }

    #[test]
    fn only_who_came_before_and_has_the_same_key_is_waited_for() {
        let all = Beginnings::default();
        let common = |id, key, prompt: &[u32]| {
            let best = all.best(id, owner(key), prompt);
            best.map(|best| best.common)
        };
        let (first, id) = all.register(owner(1), &prompt(100, 1));
        assert_eq!(common(id, 1, &prompt(100, 1)), None, "itself");
        let (_second, id) = all.register(owner(1), &prompt(70, 2));
        assert_eq!(common(id, 1, &prompt(100, 2)), Some(96));
        assert_eq!(common(id, 1, &prompt(31, 2)), None, "less than a frame");
        let (_stranger, id) = all.register(owner(2), &prompt(100, 3));
        assert_eq!(common(id, 2, &prompt(100, 3)), None, "another key");
        assert_eq!(common(id, 1, &prompt(100, 3)), Some(96));
        assert_eq!(common(0, 1, &prompt(100, 3)), None, "nobody before");
        drop(first);
        assert_eq!(common(id, 1, &prompt(100, 3)), Some(64), "it ended");
    }

    #[tokio::test(start_paused = true)]
    async fn who_ends_or_stalls_is_not_waited_for() {
        let all = Beginnings::default();
        let (first, _) = all.register(owner(1), &prompt(100, 1));
        let (_stalled, _) = all.register(owner(1), &prompt(70, 2));
        let mine = prompt(100, 3);
        let entered = all.enter(owner(1), &mine);
        tokio::pin!(entered);
        assert!(futures::poll!(&mut entered).is_pending());
        drop(first);
        let begun = tokio::time::Instant::now();
        assert!(entered.await.1.is_none());
        assert_eq!(begun.elapsed(), STALLED);
    }
}
