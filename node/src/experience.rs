//! How fast this client saw peers compute, of each as much as it showed: what they claim is counted up to a little
//! more (`shard_registry::route::SEEN_FACTOR`). Only what was seen from here; nobody is told.
//!
//! ```text
//! steps of a session ─▶ a quick one of them ─▶ each hop had at least so much ─▶ the best of a window counts
//! $home/experience/<swarm>.json   {"version": 1, "peers": [{"peer", "model", "seen", "at_s"}, …]}
//! ```
//!
//! Load, a slow neighbour on the route or a bad line make a step longer, nothing makes it shorter: the best is what
//! a peer can do. It is forgotten after a while, so that who was busy then is tried again.

use std::{
    collections::{HashMap, VecDeque},
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use swarm_proto::{ModelId, Peer, SwarmId};
use tokio::time::Instant;

use crate::{net::now_ms, swarm_file::SwarmFile};

/// Folder in the home directory.
const FOLDER: &str = "experience";
/// Steps of which one figure is made; of fewer none.
pub(crate) const STEPS: usize = 16;
/// Of the steps that many are quicker than the one that counts, as a share: the quickest may be an accident.
const QUICKER: usize = 4;
/// Figures of a peer before they count: one may be of a bad moment.
const FIGURES_MIN: usize = 2;
/// Figures that are kept of a peer.
const FIGURES_MAX: usize = 8;
/// How long a figure counts. A peer that was slow for a busy hour is asked again some minutes after it.
const EXPIRES: Duration = Duration::from_secs(600);
/// Peers and models that are kept; those seen last stay.
const PAGES_MAX: usize = 512;
/// The most that this much can come to, and some room.
const FILE_BYTES_MAX: u64 = 256 * 1024;

/// Figures of a peer, with their time, the oldest first.
type Page = VecDeque<(Instant, f32)>;

/// What a client saw; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Experience {
    pages: Arc<Mutex<HashMap<(Peer, ModelId), Page>>>,
    file: Option<SwarmFile>,
}

/// The best of what was seen of a peer, as it is written down.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    peer: Peer,
    model: String,
    /// Layer-tokens a second.
    seen: f32,
    /// When, in seconds since 1970.
    at_s: u64,
}

impl Experience {
    /// What this home knows of `swarm`. What cannot be read is as good as nothing.
    pub(crate) fn of_home(home: &Path, swarm: &SwarmId) -> Self {
        let file = SwarmFile::new(home, FOLDER, swarm, FILE_BYTES_MAX);
        let (now, now_s) = (Instant::now(), now_ms() / 1000);
        let page = |entry: Entry| {
            let age = Duration::from_secs(now_s.saturating_sub(entry.at_s));
            let at = now.checked_sub(age).filter(|_| age < EXPIRES)?;
            let good = entry.seen.is_finite() && entry.seen > 0.0;
            let model = entry.model.parse().ok().filter(|_| good).map(ModelId)?;
            let figures = std::iter::repeat_n((at, entry.seen), FIGURES_MIN);
            Some(((entry.peer, model), figures.collect()))
        };
        let pages = file.read::<Entry>().into_iter().filter_map(page);
        Self {
            pages: Arc::new(Mutex::new(pages.take(PAGES_MAX).collect())),
            file: Some(file),
        }
    }

    /// Writes it down for the next client of this home.
    ///
    /// # Errors
    /// The home cannot be written.
    pub(crate) fn save(&self) -> io::Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let (now, now_s) = (Instant::now(), now_ms() / 1000);
        let pages = self.lock();
        let entry = |(key, page): (&(Peer, ModelId), &Page)| {
            let (at, seen) = best(page, now)?;
            Some(Entry {
                peer: key.0,
                model: key.1.to_string(),
                seen,
                at_s: now_s.saturating_sub(now.saturating_duration_since(at).as_secs()),
            })
        };
        let mut entries: Vec<Entry> = pages.iter().filter_map(entry).collect();
        drop(pages);
        if entries.is_empty() && !file.path().exists() {
            return Ok(());
        }
        entries.sort_by(|a, b| (b.at_s, a.peer, &a.model).cmp(&(a.at_s, b.peer, &b.model)));
        file.write(entries)
    }

    /// A peer computed at least so many layer-tokens a second.
    pub(crate) fn note(&self, peer: Peer, model: ModelId, seen: f32) {
        if !(seen.is_finite() && seen > 0.0) {
            return;
        }
        let now = Instant::now();
        let mut pages = self.lock();
        let page = pages.entry((peer, model)).or_default();
        page.push_back((now, seen));
        if page.len() > FIGURES_MAX {
            page.pop_front();
        }
        if pages.len() > PAGES_MAX {
            let last = |page: &Page| page.back().map(|(at, _)| *at);
            let oldest = pages.iter().min_by_key(|(key, page)| (last(page), **key));
            if let Some(oldest) = oldest.map(|(key, _)| *key) {
                pages.remove(&oldest);
            }
        }
    }

    /// Layer-tokens a second that each peer showed with a model, the best of a while; sorted by peer.
    pub fn seen(&self, model: &ModelId) -> Vec<(Peer, f32)> {
        let now = Instant::now();
        let pages = self.lock();
        let of_model = pages.iter().filter(|((_, of), _)| of == model);
        let seen = of_model.filter_map(|((peer, _), page)| Some((*peer, best(page, now)?.1)));
        let mut seen: Vec<(Peer, f32)> = seen.collect();
        seen.sort_by_key(|(peer, _)| *peer);
        seen
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(Peer, ModelId), Page>> {
        // Pages are changed one by one: no invariant spans a panic.
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The best figure that still counts, where there are enough of them.
fn best(page: &Page, now: Instant) -> Option<(Instant, f32)> {
    let fresh = page
        .iter()
        .filter(|(at, _)| now.saturating_duration_since(*at) < EXPIRES);
    let enough = fresh.clone().count() >= FIGURES_MIN;
    let best = fresh.max_by(|a, b| a.1.total_cmp(&b.1));
    best.copied().filter(|_| enough)
}

/// The step that counts of so many: a quick one, not the quickest. None of too few.
pub(crate) fn quick(mut steps: Vec<Duration>) -> Option<Duration> {
    steps.sort_unstable();
    let counts = steps.get(steps.len() / QUICKER);
    counts.copied().filter(|_| steps.len() >= STEPS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use swarm_proto::Hash;

    const MODEL: ModelId = ModelId(Hash([7; 32]));

    fn peer(n: u8) -> Peer {
        Peer([n; 32])
    }

    #[tokio::test(start_paused = true)]
    async fn the_best_of_a_while_counts_and_is_forgotten() {
        let experience = Experience::default();
        let seen = || experience.seen(&MODEL);
        experience.note(peer(1), MODEL, 40.0);
        assert_eq!(seen(), [], "one figure is none");
        experience.note(peer(1), MODEL, 30.0);
        assert_eq!(seen(), [(peer(1), 40.0)]);
        // It was busy, and is not any more.
        experience.note(peer(1), MODEL, 900.0);
        experience.note(peer(1), MODEL, f32::NAN);
        experience.note(peer(1), MODEL, 0.0);
        assert_eq!(seen(), [(peer(1), 900.0)]);
        // It has got slow: what it could once do goes after so many figures.
        for _ in 0..FIGURES_MAX {
            experience.note(peer(1), MODEL, 50.0);
        }
        assert_eq!(seen(), [(peer(1), 50.0)]);
        assert_eq!(experience.seen(&ModelId(Hash([8; 32]))), []);
        // Nobody is slow for ever.
        tokio::time::sleep(EXPIRES).await;
        assert_eq!(seen(), []);
    }

    #[tokio::test]
    async fn it_is_bounded_and_the_next_client_of_a_home_knows() {
        let home = tempfile::tempdir().expect("temp dir");
        let swarm = "seen".parse().expect("a swarm id");
        let experience = Experience::of_home(home.path(), &swarm);
        for n in 0..=255 {
            for peer in [peer(n), Peer([n, 1].repeat(16).try_into().expect("32"))] {
                experience.note(peer, MODEL, 10.0);
                experience.note(peer, MODEL, f32::from(n) + 1.0);
            }
        }
        experience.note(Peer([3; 32]), ModelId(Hash([8; 32])), 5.0);
        assert_eq!(experience.lock().len(), PAGES_MAX);
        experience.save().expect("writes");
        let again = Experience::of_home(home.path(), &swarm);
        assert_eq!(again.seen(&MODEL), experience.seen(&MODEL));
        std::fs::write(home.path().join(FOLDER).join("seen.json"), b"{ torn").expect("writes");
        assert_eq!(Experience::of_home(home.path(), &swarm).seen(&MODEL), []);
    }

    #[test]
    fn a_quick_step_counts_and_not_the_quickest() {
        let ms = |n| Duration::from_millis(n);
        assert_eq!(quick((0..15).map(ms).collect()), None);
        assert_eq!(quick((0..16).rev().map(ms).collect()), Some(ms(4)));
    }
}
