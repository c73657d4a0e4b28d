//! A swarm under churn: nodes come and go for hours, and once a whole region goes.

use shard_registry::placement::throughput::{Supply, throughput, upper_bound};

use super::agent::Shoal;
use super::machines::{Machine, region};
use super::petals::Petals;
use super::{N_LAYER, Rule, TICK_S};

/// Seconds over which the first nodes come.
const ARRIVAL_S: f64 = 1800.0;
/// Seconds before figures count.
const WARM_UP_S: f64 = 3600.0;
/// Seconds of a run.
const END_S: f64 = 4.0 * 3600.0;
/// Ticks from one figure to the next.
const SAMPLE_TICKS: u64 = 2;

/// How a node decides, and what it sees.
pub(super) trait Policy {
    /// A node.
    type Node;
    /// What all nodes see during a tick.
    type View;
    /// What is to be seen at the beginning of this tick.
    fn view(&self, nodes: &[Self::Node], tick: u64) -> Self::View;
    /// A node that comes.
    fn join(&self, view: &Self::View, machine: Machine) -> Self::Node;
    /// One tick of a node, up to this time.
    fn advance(&self, view: &mut Self::View, node: &mut Self::Node, to: f64);
    /// The layers it serves.
    fn live(node: &Self::Node) -> &[u16];
    /// What it runs on.
    fn machine(node: &Self::Node) -> &Machine;
}

/// Shares of the upper bound, T/U, once a minute from the first to the fourth hour of a swarm of `n_node`
/// nodes, each of whom is replaced when it goes.
pub fn churn(seed: u64, n_node: usize, rule: Rule) -> Vec<f64> {
    match rule {
        Rule::Shoal => Swarm::new(seed, n_node, Shoal).run_for_hours(),
        Rule::Petals => Swarm::new(seed, n_node, Petals::new(seed)).run_for_hours(),
    }
}

/// T/U a minute after the largest region died at once, of those who are left. Nobody joins any more. With
/// `churn` after hours of coming and going, so that some are still loading; else in a swarm whose nodes
/// stayed from the beginning.
pub fn region_loss(seed: u64, n_node: usize, churn: bool, rule: Rule) -> f64 {
    match rule {
        Rule::Shoal => Swarm::new(seed, n_node, Shoal).run_until_loss(churn),
        Rule::Petals => Swarm::new(seed, n_node, Petals::new(seed)).run_until_loss(churn),
    }
}

struct Swarm<P: Policy> {
    policy: P,
    seed: u64,
    n_node: usize,
    /// Nobody goes.
    immortal: bool,
    tick: u64,
    /// Machines drawn so far.
    drawn: u64,
    /// With the time when each goes.
    nodes: Vec<P::Node>,
    leaves_s: Vec<f64>,
}

impl<P: Policy> Swarm<P> {
    fn new(seed: u64, n_node: usize, policy: P) -> Self {
        Self {
            policy,
            seed,
            n_node,
            immortal: false,
            tick: 0,
            drawn: 0,
            nodes: Vec::new(),
            leaves_s: Vec::new(),
        }
    }

    fn run_for_hours(mut self) -> Vec<f64> {
        let mut shares = Vec::new();
        while self.now_s() < END_S {
            self.step();
            if self.now_s() >= WARM_UP_S && self.tick.is_multiple_of(SAMPLE_TICKS) {
                shares.push(self.share());
            }
        }
        shares
    }

    fn run_until_loss(mut self, churn: bool) -> f64 {
        self.immortal = !churn;
        while self.now_s() < END_S {
            self.step();
        }
        // Whoever looks within this tick has heard of the dead a moment ago.
        let mut view = self.policy.view(&self.nodes, self.tick);
        self.nodes
            .retain(|node| region(&P::machine(node).peer) != 0);
        for _ in 0..2 {
            self.tick += 1;
            let now = self.now_s();
            self.nodes
                .iter_mut()
                .for_each(|node| self.policy.advance(&mut view, node, now));
            view = self.policy.view(&self.nodes, self.tick);
        }
        self.share()
    }

    fn now_s(&self) -> f64 {
        self.tick as f64 * TICK_S
    }

    /// One tick: all act on the snapshot of its beginning; those whose time has come go; then those who
    /// came within it join, by the same snapshot.
    fn step(&mut self) {
        let mut view = self.policy.view(&self.nodes, self.tick);
        self.tick += 1;
        let now = self.now_s();
        for node in &mut self.nodes {
            self.policy.advance(&mut view, node, now);
        }
        let stays: Vec<bool> = self.leaves_s.iter().map(|at| *at > now).collect();
        let mut stay = stays.iter();
        self.nodes.retain(|_| *stay.next().unwrap_or(&true));
        self.leaves_s.retain(|at| *at > now);
        let expected = (self.n_node as f64 * now / ARRIVAL_S) as usize;
        while self.nodes.len() < expected.min(self.n_node) {
            let machine = Machine::draw(self.seed, self.drawn);
            self.drawn += 1;
            let life_s = if self.immortal {
                f64::INFINITY
            } else {
                machine.life_s
            };
            self.leaves_s.push(now + life_s);
            self.nodes.push(self.policy.join(&view, machine));
        }
    }

    /// T/U of those who are there.
    fn share(&self) -> f64 {
        let supplies: Vec<_> = self.nodes.iter().map(supply::<P>).collect();
        let bound = upper_bound(
            N_LAYER,
            self.nodes.iter().map(|node| P::machine(node).part()),
        );
        throughput(N_LAYER, &supplies).tokens_s / bound
    }
}

fn supply<P: Policy>(node: &P::Node) -> Supply<'_> {
    let machine = P::machine(node);
    Supply {
        layer_tokens_s: machine.layer_tokens_s,
        rows_s: machine.rows_s,
        layers: P::live(node),
    }
}
