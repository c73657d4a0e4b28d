//! Many seeds on all cores, and what they add up to.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::log::lock;
use super::{Outcome, Settings, Violation, run_seed};

/// A seed takes well under a second; one that takes so long does not come to its end: some task runs
/// again and again without any time passing.
const STUCK_AFTER: Duration = Duration::from_secs(120);

/// What many seeds came to.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Summary {
    /// Seeds that ran.
    pub seeds: usize,
    /// Faults by name.
    pub faults: BTreeMap<&'static str, usize>,
    /// Requests that got their answer, that were given up, that failed for want of holders.
    pub answered: usize,
    /// Given up by their client.
    pub given_up: usize,
    /// Failed while some layer had no holder to be used.
    pub failed: usize,
    /// Rows that came, all of them right.
    pub rows: u64,
    /// Failures that were got over.
    pub recoveries: usize,
    /// How long these stopped a session, in virtual ms, in order.
    #[serde(skip)]
    pub stalls_ms: Vec<u64>,
    /// Half of the stalls were shorter, 99 of 100, all.
    pub stall_p50_ms: u64,
    /// 99 of 100.
    pub stall_p99_ms: u64,
    /// All.
    pub stall_max_ms: u64,
    /// Seeds that broke a rule, and which.
    pub broken: Vec<(u64, Violation)>,
    /// Real seconds.
    pub wall_s: f64,
}

/// A seed that does not come to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stuck {
    /// Which.
    pub seed: u64,
}

impl std::fmt::Display for Stuck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let s = STUCK_AFTER.as_secs();
        write!(f, "seed {} did not end within {s} s", self.seed)
    }
}

impl std::error::Error for Stuck {}

/// Seeds that break a rule before no more are started: enough to see whether it is one fault or several.
const BROKEN_MAX: usize = 8;

/// Runs the seeds on so many threads; `seen` hears of each that ended. Stops early where too many break a
/// rule.
///
/// # Errors
/// A seed does not end; its thread is left behind.
pub fn run_seeds(
    seeds: Range<u64>,
    settings: &Settings,
    threads: usize,
    mut seen: impl FnMut(&Outcome),
) -> Result<Summary, Stuck> {
    watch_panics();
    let (begin, settings) = (Instant::now(), *settings);
    let next = Arc::new(AtomicU64::new(seeds.start));
    let stop = Arc::new(AtomicBool::new(false));
    let running: Arc<Mutex<BTreeMap<usize, (u64, Instant)>>> = Arc::default();
    let (done, outcomes) = channel();
    for thread in 0..threads.max(1) {
        let (next, stop, running, done, end) = (
            next.clone(),
            stop.clone(),
            running.clone(),
            done.clone(),
            seeds.end,
        );
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= end {
                    break;
                }
                lock(&running).insert(thread, (seed, Instant::now()));
                let outcome = guarded(seed, &settings);
                lock(&running).remove(&thread);
                if done.send(outcome).is_err() {
                    break;
                }
            }
        });
    }
    drop(done);
    let mut summary = Summary::default();
    loop {
        match outcomes.recv_timeout(Duration::from_secs(1)) {
            Ok(outcome) => {
                seen(&outcome);
                summary.add(outcome);
                stop.store(summary.broken.len() >= BROKEN_MAX, Ordering::Relaxed);
            }
            Err(RecvTimeoutError::Timeout) => {
                let running = lock(&running);
                let mut late = running.values();
                if let Some((seed, _)) = late.find(|(_, since)| since.elapsed() > STUCK_AFTER) {
                    return Err(Stuck { seed: *seed });
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    summary.finish(begin.elapsed());
    Ok(summary)
}

impl Summary {
    fn add(&mut self, outcome: Outcome) {
        self.seeds += 1;
        for (name, n) in outcome.faults {
            *self.faults.entry(name).or_default() += n;
        }
        self.answered += outcome.answered;
        self.given_up += outcome.given_up;
        self.failed += outcome.failed;
        self.rows += outcome.rows;
        self.recoveries += outcome.stalls_ms.len();
        self.stalls_ms.extend(outcome.stalls_ms);
        if let Some(violation) = outcome.violation {
            self.broken.push((outcome.seed, violation));
        }
    }

    fn finish(&mut self, wall: Duration) {
        self.stalls_ms.sort_unstable();
        self.broken.sort_by_key(|(seed, _)| *seed);
        self.stall_p50_ms = stalls_ms(&self.stalls_ms, 50);
        self.stall_p99_ms = stalls_ms(&self.stalls_ms, 99);
        self.stall_max_ms = stalls_ms(&self.stalls_ms, 100);
        self.wall_s = wall.as_secs_f64();
    }
}

/// So many of a hundred of these sorted stalls are not longer; 0 where there are none.
pub fn stalls_ms(sorted: &[u64], of_100: usize) -> u64 {
    let at = (sorted.len() * of_100).div_ceil(100).max(1) - 1;
    sorted.get(at).copied().unwrap_or(0)
}

thread_local! {
    /// The first panic on this thread: one in a task of its own would only end that task.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs a seed; a panic anywhere in it is a rule broken.
fn guarded(seed: u64, settings: &Settings) -> Outcome {
    PANIC.with_borrow_mut(Option::take);
    let ran = catch_unwind(AssertUnwindSafe(|| run_seed(seed, settings)));
    let mut outcome = ran.unwrap_or_else(|_| Outcome {
        seed,
        ..Outcome::default()
    });
    if let Some(detail) = PANIC.with_borrow_mut(Option::take) {
        outcome.violation.get_or_insert(Violation {
            at_ms: 0,
            invariant: "nothing panics".into(),
            detail,
        });
    }
    outcome
}

fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info| {
            PANIC.with_borrow_mut(|panic| panic.get_or_insert_with(|| info.to_string()).len());
            before(info);
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_what_there_is() {
        assert_eq!(stalls_ms(&[], 50), 0);
        assert_eq!(stalls_ms(&[7], 99), 7);
        let stalls: Vec<u64> = (1..=100).collect();
        let quantiles = [50, 99, 100].map(|of_100| stalls_ms(&stalls, of_100));
        assert_eq!(quantiles, [50, 99, 100]);
    }
}
