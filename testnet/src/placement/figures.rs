//! All cells of a run on all cores, and what they come to.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;

use serde::Serialize;

use super::{Rule, churn::churn, churn::region_loss, tight::tight};

/// Nodes of the swarm that loses a region.
const LOSS_NODES: usize = 100;
/// Nodes of a tight swarm, and how many times their memory holds the model.
const TIGHT: (usize, f64) = (16, 2.5);
/// Swarms that lose a region, and tight ones, for each seed of a long run: they are short.
const SHORT_RUNS: u64 = 6;

/// What to run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Nodes of the swarms under churn.
    pub nodes: Vec<usize>,
    /// The first seed.
    pub seed: u64,
    /// How many.
    pub seeds: u64,
}

/// What swarms are put to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "workload")]
pub enum Workload {
    /// Hours of coming and going.
    Churn {
        /// Nodes.
        nodes: usize,
    },
    /// A minute after the largest of four regions, 40 of 100 nodes, died.
    RegionLoss {
        /// Nodes before.
        nodes: usize,
        /// After hours of coming and going; else all had stayed.
        churn: bool,
    },
    /// Hardly enough memory.
    Tight {
        /// Nodes.
        nodes: usize,
        /// How many times their memory holds the model.
        ratio: f64,
        /// All are there before the first serves anything.
        together: bool,
    },
}

/// One swarm.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    /// What it is put to.
    pub workload: Workload,
    /// How its nodes decide.
    pub rule: Rule,
    /// What it is drawn from.
    pub seed: u64,
}

/// What all swarms of one workload and rule came to.
#[derive(Debug, Clone, Serialize)]
pub struct Cell {
    /// What they were put to.
    #[serde(flatten)]
    pub workload: Workload,
    /// How their nodes decided.
    pub rule: Rule,
    /// How many swarms.
    pub swarms: usize,
    /// T/U: the mean of all figures.
    pub mean: f64,
    /// T/U: 5 of 100 figures are lower.
    pub p5: f64,
}

impl Settings {
    /// All swarms, the longest first, so that no core is left with one in the end.
    fn jobs(&self) -> Vec<Job> {
        let mut nodes = self.nodes.clone();
        nodes.sort_unstable_by(|a, b| b.cmp(a));
        let mut cells: Vec<(Workload, u64)> = Vec::new();
        let churn = |nodes: &usize| (Workload::Churn { nodes: *nodes }, self.seeds);
        cells.extend(nodes.iter().map(churn));
        for yes in [false, true] {
            let loss = Workload::RegionLoss {
                nodes: LOSS_NODES,
                churn: yes,
            };
            let tight = Workload::Tight {
                nodes: TIGHT.0,
                ratio: TIGHT.1,
                together: yes,
            };
            cells.extend([loss, tight].map(|workload| (workload, self.seeds * SHORT_RUNS)));
        }
        let mut jobs = Vec::new();
        for (workload, seeds) in cells {
            for seed in self.seed..self.seed.saturating_add(seeds) {
                jobs.extend(Rule::ALL.map(|rule| Job {
                    workload,
                    rule,
                    seed,
                }));
            }
        }
        jobs
    }
}

impl Job {
    fn run(&self) -> Vec<f64> {
        match self.workload {
            Workload::Churn { nodes } => churn(self.seed, nodes, self.rule),
            Workload::RegionLoss { nodes, churn } => {
                vec![region_loss(self.seed, nodes, churn, self.rule)]
            }
            Workload::Tight {
                nodes,
                ratio,
                together,
            } => {
                vec![tight(self.seed, nodes, ratio, together, self.rule)]
            }
        }
    }
}

/// Runs them on so many threads; `seen` hears how many have ended, of how many.
pub fn run(settings: &Settings, threads: usize, mut seen: impl FnMut(usize, usize)) -> Vec<Cell> {
    let jobs = settings.jobs();
    let next = AtomicUsize::new(0);
    let mut shares: Vec<Vec<f64>> = vec![Vec::new(); jobs.len()];
    std::thread::scope(|scope| {
        let (done, ended) = channel();
        for _ in 0..threads.max(1) {
            let (jobs, next, done) = (&jobs, &next, done.clone());
            scope.spawn(move || {
                while let Some((at, job)) = take(jobs, next) {
                    if done.send((at, job.run())).is_err() {
                        return;
                    }
                }
            });
        }
        drop(done);
        for (n, (at, ran)) in ended.into_iter().enumerate() {
            shares[at] = ran;
            seen(n + 1, jobs.len());
        }
    });
    cells(&jobs, &shares)
}

fn take<'a>(jobs: &'a [Job], next: &AtomicUsize) -> Option<(usize, &'a Job)> {
    let at = next.fetch_add(1, Ordering::Relaxed);
    Some((at, jobs.get(at)?))
}

fn cells(jobs: &[Job], shares: &[Vec<f64>]) -> Vec<Cell> {
    let mut kinds: Vec<(Workload, Rule)> = Vec::new();
    for job in jobs {
        if !kinds.contains(&(job.workload, job.rule)) {
            kinds.push((job.workload, job.rule));
        }
    }
    let cell = |(workload, rule)| {
        let of = |job: &Job| (job.workload, job.rule) == (workload, rule);
        let swarms: Vec<_> = jobs.iter().zip(shares).filter(|(job, _)| of(job)).collect();
        let mut all: Vec<f64> = swarms
            .iter()
            .flat_map(|(_, shares)| shares.iter().copied())
            .collect();
        all.sort_unstable_by(f64::total_cmp);
        Cell {
            workload,
            rule,
            swarms: swarms.len(),
            mean: all.iter().sum::<f64>() / all.len().max(1) as f64,
            p5: all.get(all.len() * 5 / 100).copied().unwrap_or(0.0),
        }
    };
    kinds.into_iter().map(cell).collect()
}
