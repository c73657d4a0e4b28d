//! Which requests run here, how far they are and how fast, and how the last ones ended: noted by whoever answers them,
//! read by whoever looks. Positions, counts and times; never a word of a prompt or an answer.
//!
//! ```text
//! Answers::begin ─▶ Seen: model ─▶ opened ─▶ piece, piece, … ─▶ ended    dropped before: the client hung up
//!                    │ lost, waiting, recovered: at once, from the session
//!                    ▼
//!                  Live ─▶ LiveView
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use node::answer::Source;
use serde::{Deserialize, Serialize};
use swarm_proto::Hop;

use super::node_view::NodeView;
use super::view::{NAME_CHARS_MAX, WHY_CHARS_MAX, ms, pair};
use crate::error::ApiError;
use crate::fields::printable;

/// Requests that are listed, the oldest first.
const RUNNING_MAX: usize = 128;
/// Finished ones that are remembered.
const FINISHED_MAX: usize = 32;
/// Losses of a request that are listed, the last ones.
const RECOVERIES_MAX: usize = 8;
/// Hops that are listed: a route has a few.
const HOPS_MAX: usize = 64;
/// No token for so long, where several would have come, is a stall: below it nobody notices.
const STALL: Duration = Duration::from_secs(1);
/// So many usual gaps without a token.
const STALL_GAPS: u32 = 4;
/// Tokens are counted in parts of a second, of so many of which the speed is made.
const SLOT: Duration = Duration::from_millis(250);
const SLOTS: usize = 12;

/// What runs here, and what ran.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LiveView {
    /// When this was, in milliseconds since 1970.
    pub at_ms: u64,
    /// Requests that are being answered, the oldest first.
    pub requests: Vec<RequestView>,
    /// Further ones.
    pub requests_left_out: usize,
    /// The last ones that ended, the latest first.
    pub finished: Vec<FinishedView>,
    /// Since the start.
    pub totals: Totals,
    /// The node of this home, where one runs.
    pub node: Option<NodeView>,
}

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Requests that came.
    pub requests: u64,
    /// Those that were answered to the end.
    pub answered: u64,
    /// Those whose client hung up.
    pub hung_up: u64,
    /// Those that failed.
    pub failed: u64,
    /// Tokens that were chosen.
    pub tokens: u64,
    /// Times that an answer stood still.
    pub stalls: u64,
    /// Routes that were lost and found again.
    pub recoveries: u64,
}

/// What a request does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Its model is looked for, its prompt read.
    #[default]
    Begins,
    /// It waits for a place on every hop.
    Opens,
    /// Its prompt is computed.
    Prompt,
    /// Tokens come.
    Answers,
    /// Its route is lost; another is opened.
    Reroutes,
    /// There is no other route just now.
    Waits,
}

/// A request that is being answered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RequestView {
    /// Its number since the start.
    pub id: u64,
    /// What its model is called; empty before that is known.
    pub model: String,
    /// The model's id.
    pub model_id: String,
    /// What it does.
    pub stage: Stage,
    /// Seconds since it came.
    pub age_s: f64,
    /// Tokens of its prompts.
    pub prompt_tokens: usize,
    /// Tokens of its answers so far.
    pub tokens: u64,
    /// Positions that its session holds.
    pub pos: usize,
    /// Tokens a second over the last moments.
    pub tokens_per_s: f64,
    /// Seconds since the last token, or since it came.
    pub last_token_s_ago: f64,
    /// Times that it stood still.
    pub stalls: u64,
    /// Longest time without a token, in seconds.
    pub longest_gap_s: f64,
    /// Who computes what, in order.
    pub route: Vec<HopView>,
    /// Who stands by for which layers.
    pub standbys: Vec<HopView>,
    /// Losses that were got over, the last ones.
    pub recoveries: Vec<RecoveryView>,
    /// What was lost, while it reroutes or waits.
    pub lost: Option<String>,
}

/// A part of a route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HopView {
    /// Who.
    pub peer: String,
    /// Which layers, as `[first, end)`.
    pub layers: [u16; 2],
}

/// A loss that was got over.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RecoveryView {
    /// At which position.
    pub pos: u32,
    /// What was lost, in words.
    pub lost: String,
    /// From the failure to the new route.
    pub took_ms: f64,
    /// Hops that are new.
    pub replaced: usize,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// With all of its answer.
    Answered,
    /// Its client did not wait for it.
    #[default]
    HungUp,
    /// It could not be answered.
    Failed,
}

/// A request that ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FinishedView {
    /// Its number since the start.
    pub id: u64,
    /// What its model is called.
    pub model: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it failed, where that is the swarm's or this server's affair.
    pub why: Option<String>,
    /// Seconds since then.
    pub s_ago: f64,
    /// Tokens of its prompts.
    pub prompt_tokens: usize,
    /// Tokens of its answers.
    pub tokens: u64,
    /// From the request to the first token.
    pub first_token_ms: Option<f64>,
    /// From the first token to the last.
    pub tokens_per_s: f64,
    /// From the request to the end.
    pub took_s: f64,
    /// Times that it stood still.
    pub stalls: u64,
    /// Routes that were lost and found again.
    pub recoveries: usize,
    /// Its last route.
    pub route: Vec<HopView>,
}

/// The book of requests; clones share it.
#[derive(Clone, Default)]
pub struct Live(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    running: BTreeMap<u64, Entry>,
    finished: VecDeque<(Instant, FinishedView)>,
    totals: Totals,
}

struct Entry {
    asked: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
    slots: Slots,
    recoveries: usize,
    outcome: (Outcome, Option<String>),
    view: RequestView,
}

/// Tokens of the last moments.
#[derive(Default)]
struct Slots {
    counts: [u32; SLOTS],
    /// Number of the newest one, since the first token.
    newest: u64,
}

/// One request in the book. Dropping it ends it.
pub struct Seen {
    live: Live,
    id: u64,
}

impl Live {
    /// Notes a request that comes.
    pub fn enter(&self) -> Seen {
        let mut inner = self.lock();
        inner.totals.requests += 1;
        let id = inner.totals.requests;
        let entry = Entry {
            asked: Instant::now(),
            first: None,
            last: None,
            slots: Slots::default(),
            recoveries: 0,
            outcome: Default::default(),
            view: RequestView {
                id,
                ..RequestView::default()
            },
        };
        inner.running.insert(id, entry);
        drop(inner);
        Seen {
            live: self.clone(),
            id,
        }
    }

    /// How things are; `node` is what its node says.
    pub fn view(&self, node: Option<NodeView>) -> LiveView {
        let now = Instant::now();
        let inner = self.lock();
        let finished = |(at, view): &(Instant, FinishedView)| FinishedView {
            s_ago: seconds(now - *at),
            ..view.clone()
        };
        LiveView {
            at_ms: node::net::now_ms(),
            requests: (inner.running.values().take(RUNNING_MAX))
                .map(|entry| entry.view(now))
                .collect(),
            requests_left_out: inner.running.len().saturating_sub(RUNNING_MAX),
            finished: inner.finished.iter().map(finished).collect(),
            totals: inner.totals,
            node,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change is small: no invariant spans a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    /// The model is known, and the prompts are read.
    pub fn model(&self, name: &str, id: &str, prompt_tokens: usize) {
        self.with(|entry, _| {
            entry.view.model = printable(name, NAME_CHARS_MAX);
            entry.view.model_id = id.to_owned();
            entry.view.prompt_tokens = prompt_tokens;
            entry.view.stage = Stage::Opens;
        });
    }

    /// A session is open, for a prompt of so many tokens. What happens to its route is noted from now on.
    pub fn opened(&self, source: &mut Source, prompt_tokens: usize) {
        self.with(|entry, _| {
            entry.view.stage = Stage::Prompt;
            entry.view.pos = prompt_tokens;
        });
        self.routed(source);
        let (live, id) = (self.live.clone(), self.id);
        source.on_event(Box::new(move |event| live.event(id, &event)));
    }

    /// Something of an answer came; a token, where one was chosen.
    pub fn piece(&self, source: &Source, token: bool) {
        let losses = source.recoveries().len();
        let mut rerouted = false;
        self.with(|entry, totals| {
            rerouted = losses != entry.recoveries;
            entry.recoveries = losses;
            if token {
                entry.token(Instant::now(), totals);
                entry.view.pos = source.held().len();
            }
        });
        if rerouted {
            self.routed(source);
        }
    }

    /// All of it was said.
    pub fn answered(&self) {
        self.with(|entry, _| entry.outcome = (Outcome::Answered, None));
    }

    /// It failed. What is the asker's mistake is said to the asker alone: it may quote what was asked.
    pub fn failed(&self, error: &ApiError) {
        let ours = error.status().is_server_error() || error.status().as_u16() == 429;
        let why = ours.then(|| printable(&error.to_string(), WHY_CHARS_MAX));
        self.with(|entry, _| entry.outcome = (Outcome::Failed, why));
    }

    fn routed(&self, source: &Source) {
        let (route, standbys) = (hops(&source.route()), hops(&source.standbys()));
        self.with(|entry, _| {
            entry.view.route = route;
            entry.view.standbys = standbys;
        });
    }

    fn with(&self, change: impl FnOnce(&mut Entry, &mut Totals)) {
        self.live.with(self.id, change);
    }
}

impl Drop for Seen {
    fn drop(&mut self) {
        let mut inner = self.live.lock();
        let Some(entry) = inner.running.remove(&self.id) else {
            return;
        };
        let totals = &mut inner.totals;
        match entry.outcome.0 {
            Outcome::Answered => totals.answered += 1,
            Outcome::HungUp => totals.hung_up += 1,
            Outcome::Failed => totals.failed += 1,
        }
        let now = Instant::now();
        inner.finished.push_front((now, entry.finish(now)));
        inner.finished.truncate(FINISHED_MAX);
    }
}

impl Live {
    fn with(&self, id: u64, change: impl FnOnce(&mut Entry, &mut Totals)) {
        let inner = &mut *self.lock();
        if let Some(entry) = inner.running.get_mut(&id) {
            change(entry, &mut inner.totals);
        }
    }

    fn event(&self, id: u64, event: &node::Event<'_>) {
        self.with(id, |entry, totals| match event {
            node::Event::Lost(why) => {
                entry.view.stage = Stage::Reroutes;
                entry.view.lost = Some(printable(&why.to_string(), WHY_CHARS_MAX));
            }
            node::Event::Waiting { why, .. } => {
                entry.view.stage = Stage::Waits;
                entry.view.lost = Some(printable(&why.to_string(), WHY_CHARS_MAX));
            }
            node::Event::Recovered(recovery) => {
                totals.recoveries += 1;
                entry.view.lost = None;
                entry.view.stage = match entry.first {
                    Some(_) => Stage::Answers,
                    None => Stage::Prompt,
                };
                let recoveries = &mut entry.view.recoveries;
                recoveries.push(RecoveryView {
                    pos: recovery.pos,
                    lost: printable(&recovery.lost, WHY_CHARS_MAX),
                    took_ms: ms(recovery.took),
                    replaced: recovery.replaced,
                });
                if recoveries.len() > RECOVERIES_MAX {
                    recoveries.remove(0);
                }
            }
        });
    }
}

impl Entry {
    fn token(&mut self, now: Instant, totals: &mut Totals) {
        if let (Some(first), Some(last)) = (self.first, self.last) {
            let gap = now - last;
            // The first gap is like any other: what is usual shows in the second.
            let gaps = u32::try_from(self.view.tokens.saturating_sub(1)).unwrap_or(u32::MAX);
            let usual = (last - first).checked_div(gaps);
            if gap > STALL && usual.is_some_and(|usual| gap > usual * STALL_GAPS) {
                self.view.stalls += 1;
                totals.stalls += 1;
            }
            self.view.longest_gap_s = self.view.longest_gap_s.max(seconds(gap));
        }
        let first = *self.first.get_or_insert(now);
        self.last = Some(now);
        self.slots.count(now - first);
        self.view.stage = Stage::Answers;
        self.view.tokens += 1;
        totals.tokens += 1;
    }

    fn view(&self, now: Instant) -> RequestView {
        let since = now - self.last.unwrap_or(self.asked);
        let gap = self.last.map_or(Duration::ZERO, |last| now - last);
        RequestView {
            age_s: seconds(now - self.asked),
            tokens_per_s: self.first.map_or(0.0, |first| self.slots.rate(now - first)),
            last_token_s_ago: seconds(since),
            longest_gap_s: self.view.longest_gap_s.max(seconds(gap)),
            ..self.view.clone()
        }
    }

    fn finish(self, now: Instant) -> FinishedView {
        let decode = self.first.zip(self.last).map(|(first, last)| last - first);
        let decode = decode.unwrap_or_default().as_secs_f64();
        let view = self.view;
        let rate = match view.tokens {
            0 | 1 => 0.0,
            n => (n - 1) as f64 / decode.max(1e-9),
        };
        FinishedView {
            id: view.id,
            model: view.model,
            outcome: self.outcome.0,
            why: self.outcome.1,
            s_ago: 0.0,
            prompt_tokens: view.prompt_tokens,
            tokens: view.tokens,
            first_token_ms: self.first.map(|first| ms(first - self.asked)),
            tokens_per_s: tenths(rate),
            took_s: seconds(now - self.asked),
            stalls: view.stalls,
            recoveries: self.recoveries.max(view.recoveries.len()),
            route: view.route,
        }
    }
}

impl Slots {
    fn at(since_first: Duration) -> u64 {
        (since_first.as_millis() / SLOT.as_millis()) as u64
    }

    fn count(&mut self, since_first: Duration) {
        let at = Self::at(since_first);
        for gone in (self.newest..at).take(SLOTS) {
            let next = (gone + 1) as usize % SLOTS;
            self.counts[next] = 0;
        }
        if at - self.newest > SLOTS as u64 {
            self.counts = [0; SLOTS];
        }
        self.newest = at;
        self.counts[at as usize % SLOTS] += 1;
    }

    /// Tokens a second, over as long as the slots reach back.
    fn rate(&self, since_first: Duration) -> f64 {
        let at = Self::at(since_first);
        let oldest = (at + 1).saturating_sub(SLOTS as u64);
        let counted = (oldest..=self.newest).map(|slot| self.counts[slot as usize % SLOTS]);
        let tokens: u32 = counted.sum();
        let begin = SLOT * u32::try_from(oldest).unwrap_or(u32::MAX);
        let time = (since_first - begin).max(SLOT).as_secs_f64();
        tenths(f64::from(tokens) / time)
    }
}

fn hops(hops: &[Hop]) -> Vec<HopView> {
    let hop = |hop: &Hop| HopView {
        peer: hop.peer.to_string(),
        layers: pair(&hop.layers),
    };
    hops.iter().take(HOPS_MAX).map(hop).collect()
}

/// Seconds, to the millisecond.
fn seconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e3).round() / 1e3
}

fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(live: &Live) -> RequestView {
        live.view(None).requests[0].clone()
    }

    #[test]
    fn a_request_is_seen_from_its_first_moment_to_its_last() {
        let live = Live::default();
        let seen = live.enter();
        assert_eq!(entry(&live).stage, Stage::Begins);
        seen.model("m\u{1b}[2J", "ab", 7);
        let view = entry(&live);
        assert_eq!((view.stage, view.prompt_tokens), (Stage::Opens, 7));
        assert!(!view.model.contains('\u{1b}'));
        let begin = Instant::now();
        for n in 0..40u32 {
            let now = begin + Duration::from_millis(100) * n;
            seen.with(|entry, totals| entry.token(now, totals));
        }
        let now = begin + Duration::from_millis(3900);
        let rate = live.lock().running[&1].view(now).tokens_per_s;
        assert!((9.0..=11.5).contains(&rate), "{rate}");
        let later = live.lock().running[&1].view(now + Duration::from_secs(2));
        assert!(later.tokens_per_s < rate / 2.0, "it stands still");
        assert_eq!((later.last_token_s_ago, later.longest_gap_s), (2.0, 2.0));
        let much_later = live.lock().running[&1].view(now + Duration::from_secs(60));
        assert_eq!(much_later.tokens_per_s, 0.0);
        seen.answered();
        drop(seen);
        let view = live.view(None);
        assert!(view.requests.is_empty());
        let ended = &view.finished[0];
        assert_eq!((ended.outcome, ended.tokens), (Outcome::Answered, 40));
        assert!((ended.tokens_per_s - 10.0).abs() < 0.2, "{ended:?}");
        assert_eq!((view.totals.answered, view.totals.tokens), (1, 40));
    }

    #[test]
    fn a_stall_is_longer_than_a_second_and_than_what_is_usual() {
        let live = Live::default();
        let (fast, slow) = (live.enter(), live.enter());
        let begin = Instant::now();
        for ms in [0, 50, 100, 1200, 1250] {
            let now = begin + Duration::from_millis(ms);
            fast.with(|entry, totals| entry.token(now, totals));
        }
        // A large model on a small machine says a word every two seconds: that is no stall.
        for s in [0, 2, 4, 6, 9] {
            let now = begin + Duration::from_secs(s);
            slow.with(|entry, totals| entry.token(now, totals));
        }
        let view = live.view(None);
        assert_eq!(view.requests[0].stalls, 1);
        assert_eq!(view.requests[0].longest_gap_s, 1.1);
        assert_eq!(view.requests[1].stalls, 0);
        assert_eq!(view.totals.stalls, 1);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_an_askers_mistake_is_not_quoted() {
        let live = Live::default();
        for _ in 0..2 * FINISHED_MAX {
            live.enter();
        }
        let mistaken = live.enter();
        mistaken.failed(&ApiError::malformed("`my secret prompt` is not JSON"));
        drop(mistaken);
        let full = live.enter();
        full.failed(&ApiError::full("no room at \u{7} layers 0..4"));
        drop(full);
        let waiting: Vec<Seen> = (0..2 * RUNNING_MAX).map(|_| live.enter()).collect();
        let view = live.view(None);
        assert_eq!(view.finished.len(), FINISHED_MAX);
        assert_eq!(view.requests.len(), RUNNING_MAX);
        assert_eq!(view.requests_left_out, RUNNING_MAX);
        assert_eq!(
            view.finished[0].why.as_deref(),
            Some("no room at   layers 0..4")
        );
        assert_eq!(view.finished[1].why, None);
        assert_eq!(view.finished[2].outcome, Outcome::HungUp);
        assert_eq!(view.totals.hung_up, 2 * FINISHED_MAX as u64);
        drop(waiting);
    }
}
