//! How fast this node's stage is: a short run before it serves, and real steps from then on.

use std::{
    fs::{File, OpenOptions},
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use engine::{Bench, EngineError, Input, Loaded, Slot, Stage, StageShape, StageStats, Step, Want};
use swarm_proto::Measured;

use crate::cpu_share::CpuShare;

/// How long the run at start may take: some hundred steps of a small model, a few of a large one.
const RUN_MAX: Duration = Duration::from_millis(250);
/// Steps of it at most and at least.
const STEPS: Range<u32> = 2..48;
/// Its context: short, because speed at the start of a conversation is what adverts compare.
const RUN_CTX: u32 = 64;
/// Nodes of one machine measure one after the other; who waits longer than this measures beside
/// others, and real steps correct the figure.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// How often the lock is tried.
const LOCK_POLL: Duration = Duration::from_millis(20);
/// Weight of the newest step: the figure follows within some twenty tokens.
const NEWEST: f64 = 0.1;

/// Layer-tokens a second, shared between the stage's thread and the adverts.
#[derive(Debug, Clone, Default)]
pub struct Speed {
    figure: Arc<Mutex<Option<(f64, Instant)>>>,
}

impl Speed {
    /// The figure and its age.
    pub fn get(&self) -> Option<Measured> {
        let (value, at) = (*self.figure.lock().unwrap_or_else(PoisonError::into_inner))?;
        let age_s = u32::try_from(at.elapsed().as_secs()).unwrap_or(u32::MAX);
        Some(Measured {
            value: value as f32,
            age_s,
        })
    }

    fn start(&self, value: f64) {
        *self.figure.lock().unwrap_or_else(PoisonError::into_inner) = Some((value, Instant::now()));
    }

    fn step(&self, layers: usize, took: Duration) {
        let value = layers as f64 / took.as_secs_f64().max(1e-9);
        let mut figure = self.figure.lock().unwrap_or_else(PoisonError::into_inner);
        let old = figure.map_or(value, |(old, _)| old);
        *figure = Some((old + (value - old) * NEWEST, Instant::now()));
    }
}

/// A stage that times its own steps, and rests between them where it may not have all of the time. Only steps of one
/// row count: prefill is another regime, and what a route is chosen for is the next token. What a rest costs is in the
/// figure, so that others reckon with it.
pub struct Timed<S> {
    stage: S,
    speed: Speed,
    share: CpuShare,
    /// It rests until then. Time in which nobody wanted anything counts as rest.
    rested: Instant,
}

impl<S: Stage> Timed<S> {
    /// Measures the stage, waiting for its turn on this machine, and goes on measuring.
    pub fn new(mut stage: S, speed: Speed, share: CpuShare) -> Self {
        let turn = Turn::wait();
        match run(&mut stage) {
            Ok(value) => speed.start(share.of(value)),
            Err(error) => tracing::warn!(%error, "the stage could not be measured"),
        }
        drop(turn);
        Self {
            stage,
            speed,
            share,
            rested: Instant::now(),
        }
    }

    /// Rests, then runs; how long that took, with the rest after it.
    fn rested<T>(&mut self, run: impl FnOnce(&mut S) -> T) -> (T, Duration) {
        std::thread::sleep(self.rested.saturating_duration_since(Instant::now()));
        let start = Instant::now();
        let ran = run(&mut self.stage);
        let took = start.elapsed();
        let rest = self.share.rest(took);
        self.rested = Instant::now() + rest;
        (ran, took + rest)
    }
}

impl<S: Stage> Stage for Timed<S> {
    fn shape(&self) -> StageShape {
        self.stage.shape()
    }

    fn open(&mut self, n_ctx: u32, layers: Range<u32>) -> Result<Slot, EngineError> {
        self.stage.open(n_ctx, layers)
    }

    fn open_beside(
        &mut self,
        n_ctx: u32,
        layers: Range<u32>,
        fast: bool,
    ) -> Result<Slot, EngineError> {
        self.stage.open_beside(n_ctx, layers, fast)
    }

    fn bench(&self, slot: Slot) -> Option<Bench> {
        self.stage.bench(slot)
    }

    fn worth_waiting(&self, bench: Bench, rows: u32) -> Option<Duration> {
        self.stage.worth_waiting(bench, rows)
    }

    fn copy(&mut self, from: Slot, to: Slot, n: u32) -> Result<u32, EngineError> {
        self.stage.copy(from, to, n)
    }

    fn close(&mut self, slot: Slot) {
        self.stage.close(slot);
    }

    fn run(
        &mut self,
        step: &Step,
        input: &Input<'_>,
        out: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        let (ran, took) = self.rested(|stage| stage.run(step, input, out));
        if ran.is_ok() && step.n_rows == 1 {
            self.speed.step(step.layers.len(), took);
        }
        ran
    }

    fn run_rows(
        &mut self,
        steps: &[Step],
        inputs: &[Input<'_>],
        outs: &mut [Vec<f32>],
    ) -> Vec<Result<(), EngineError>> {
        // What a token waits for is a pass, however many rows are in it, but its cost is that of one row: others
        // reckon with a stage that has nothing else to do.
        self.rested(|stage| stage.run_rows(steps, inputs, outs)).0
    }

    fn add(&mut self, loaded: Loaded) -> Result<(), EngineError> {
        self.stage.add(loaded)
    }

    fn remove(&mut self, layers: &Range<u32>) {
        self.stage.remove(layers);
    }

    fn limit(&mut self, kv_bytes_max: u64) {
        self.stage.limit(kv_bytes_max);
    }

    fn stats(&self) -> StageStats {
        self.stage.stats()
    }
}

/// Decodes rows one by one for a moment: layer-tokens a second.
fn run(stage: &mut impl Stage) -> Result<f64, EngineError> {
    let shape = stage.shape();
    let layers = stage.stats().held.spans().first().cloned();
    let layers = layers.unwrap_or_default();
    let slot = stage.open(RUN_CTX.min(shape.n_ctx_max), layers.clone())?;
    let timed = steps(stage, slot, &shape, &layers);
    stage.close(slot);
    let (count, took) = timed?;
    Ok(f64::from(count) * layers.len() as f64 / took.as_secs_f64().max(1e-9))
}

fn steps(
    stage: &mut impl Stage,
    slot: Slot,
    shape: &StageShape,
    layers: &Range<u32>,
) -> Result<(u32, Duration), EngineError> {
    // Any finite row costs the same; one that is not all zeros stays far from denormal numbers.
    let row = vec![0.5f32; shape.n_embd as usize];
    let input = if layers.start == 0 {
        Input::Tokens(&[0])
    } else {
        Input::Hidden(&row)
    };
    let mut out = Vec::new();
    let mut one = |pos0| {
        let layers = layers.clone();
        let step = Step {
            slot,
            layers,
            pos0,
            n_rows: 1,
            want: Want::Last,
        };
        stage.run(&step, &input, &mut out)
    };
    // The first step pays for what is set up lazily.
    one(0)?;
    let last = STEPS.end.min(shape.n_ctx_max.saturating_sub(1));
    let start = Instant::now();
    let mut count = 0;
    while count < last && (count < STEPS.start || start.elapsed() < RUN_MAX) {
        count += 1;
        one(count)?;
    }
    Ok((count.max(1), start.elapsed()))
}

/// This machine's one turn to measure; given back when dropped.
struct Turn(#[allow(dead_code)] Option<File>);

impl Turn {
    fn wait() -> Self {
        let path = std::env::temp_dir().join("shoal-measure.lock");
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let Ok(file) = file else { return Self(None) };
        let patience = Instant::now() + LOCK_PATIENCE;
        loop {
            match file.try_lock() {
                Ok(()) => return Self(Some(file)),
                Err(std::fs::TryLockError::WouldBlock) if Instant::now() < patience => {
                    std::thread::sleep(LOCK_POLL);
                }
                Err(_) => return Self(None),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::ChainStage;

    #[test]
    fn a_stage_is_measured_at_the_start_and_by_its_own_steps() {
        for layers in [0..3, 1..3, 3..6] {
            let speed = Speed::default();
            assert_eq!(speed.get(), None);
            let pace = Duration::from_millis(2);
            let chain = ChainStage::new(6, 8, 32, layers.clone(), 1).with_pace(pace);
            let mut stage = Timed::new(chain, speed.clone(), CpuShare::default());
            let first = speed.get().expect("measured").value;
            assert!(first.is_finite() && first > 0.0, "{first}");
            assert_eq!(stage.stats().sessions, 0, "the run's session is closed");
            let slot = stage.open(8, layers.clone()).expect("opens");
            let row = [0.5; 8];
            let input = if layers.start == 0 {
                Input::Tokens(&[1])
            } else {
                Input::Hidden(&row)
            };
            let step = Step {
                slot,
                layers,
                pos0: 0,
                n_rows: 1,
                want: Want::Last,
            };
            stage.run(&step, &input, &mut Vec::new()).expect("runs");
            assert_eq!(speed.get().expect("measured").age_s, 0);
        }
    }

    #[test]
    fn a_stage_takes_its_share_of_the_time_and_its_figure_says_so() {
        let layers = 1..3;
        let pace = Duration::from_millis(2);
        let speeds = ["100", "25"].map(|share| {
            let speed = Speed::default();
            let chain = ChainStage::new(6, 8, 32, layers.clone(), 1).with_pace(pace);
            let mut stage = Timed::new(chain, speed.clone(), share.parse().expect("a share"));
            let first = speed.get().expect("measured").value;
            let slot = stage.open(64, layers.clone()).expect("opens");
            let begun = Instant::now();
            for pos0 in 0..10 {
                let step = Step {
                    slot,
                    layers: layers.clone(),
                    pos0,
                    n_rows: 1,
                    want: Want::Last,
                };
                stage
                    .run(&step, &Input::Hidden(&[0.5; 8]), &mut Vec::new())
                    .expect("runs");
            }
            (first, speed.get().expect("measured").value, begun.elapsed())
        });
        let [(first, then, _), (first_share, then_share, took)] = speeds;
        // Ten steps of 4 ms each, and nine rests of 12 ms.
        assert!(took >= Duration::from_millis(140), "{took:?}");
        assert!(first_share < first * 0.75, "{first_share} of {first}");
        assert!(then_share < then * 0.75, "{then_share} of {then}");
    }
}
