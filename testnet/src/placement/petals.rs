//! Petals' rule (its `block_selection`, as of 2.3), for comparison: the window whose sorted summed throughput
//! is lexicographically smallest; and a check every now and then whether the swarm would be much
//! better off if everybody chose again.

use std::ops::Range;

use node::Random;

use super::churn::Policy;
use super::machines::Machine;
use super::{N_LAYER, TICK_S, layers};

/// A server moves when the weakest layer has less than this of what it could have.
const BALANCE_QUALITY: f64 = 0.75;
/// Its tie-break in favour of where a server is.
const EPS: f64 = 1e-3;
/// Petals goes on until nobody moves; that need not happen, and seldom takes half as many rounds.
const ROUNDS_MAX: usize = 10;

/// A server as others see it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Server {
    pub(super) start: usize,
    pub(super) len: usize,
    /// What it says of itself, see [`declared`].
    pub(super) rows_s: f64,
}

/// A server's own figure: compute by the number of its layers that a request uses on average, at most
/// the network's.
pub(super) fn declared(layer_tokens_s: f64, rows_s: f64, len: usize) -> f64 {
    (layer_tokens_s / ((len + 1) as f64 / 2.0)).min(rows_s)
}

/// The servers of a snapshot.
#[derive(Debug, Clone)]
pub(super) struct Swarm {
    pub(super) servers: Vec<Server>,
    sums: Vec<f64>,
    /// What everybody choosing again would come to, once somebody asked.
    balanced: Option<f64>,
}

impl Swarm {
    pub(super) fn new(servers: Vec<Server>) -> Swarm {
        let mut swarm = Swarm {
            servers: Vec::new(),
            sums: vec![0.0; N_LAYER],
            balanced: None,
        };
        for server in &servers {
            swarm.add(server.start, server.len, server.rows_s);
        }
        swarm.servers = servers;
        swarm
    }

    /// Where a server of `len` layers begins.
    pub(super) fn best_start(&self, len: usize) -> usize {
        let len = len.min(N_LAYER);
        let mut best: (Vec<f64>, usize) = (Vec::new(), 0);
        for start in 0..=N_LAYER - len {
            // By its least sum alone most windows are out before they are sorted.
            let window = &self.sums[start..start + len];
            let least = window.iter().copied().fold(f64::INFINITY, f64::min);
            if best.0.first().is_some_and(|best| least > *best) {
                continue;
            }
            let mut sorted = window.to_vec();
            sorted.sort_unstable_by(f64::total_cmp);
            let smaller = |best: &[f64]| {
                let mut pairs = sorted.iter().zip(best).map(|(a, b)| a.total_cmp(b));
                pairs
                    .find(|order| order.is_ne())
                    .is_some_and(std::cmp::Ordering::is_lt)
            };
            if start == 0 || smaller(&best.0) {
                best = (sorted, start);
            }
        }
        best.1
    }

    /// Whether a server should choose again, as it decides by itself. What everybody choosing again
    /// would come to is computed for the first that asks of a snapshot: for the others it differs by their
    /// own first step and the order drawn.
    pub(super) fn should_move(&mut self, own: Server, dice: &Random) -> bool {
        let initial = self.least();
        let mean = self.sums.iter().sum::<f64>() / N_LAYER as f64;
        // Nobody's choice lifts the least over the mean.
        if initial >= (BALANCE_QUALITY - EPS) * mean {
            return false;
        }
        let mut after = self.clone();
        after.add(own.start, own.len, -own.rows_s * (1.0 + EPS));
        if initial > EPS && after.least() <= 0.0 {
            return false;
        }
        let start = after.best_start(own.len);
        if start == own.start {
            return false;
        }
        let balanced = match self.balanced {
            Some(balanced) => balanced,
            None => {
                after.add(own.start, own.len, own.rows_s * EPS);
                after.add(start, own.len, own.rows_s);
                let same =
                    |server: &&mut Server| server.start == own.start && server.len == own.len;
                if let Some(server) = after.servers.iter_mut().find(same) {
                    server.start = start;
                }
                *self.balanced.insert(after.balance(dice))
            }
        };
        balanced >= initial.max(EPS) && initial / balanced < BALANCE_QUALITY - EPS
    }

    /// All choose again, in an order drawn anew each round, until nobody moves; the least sum then.
    fn balance(&mut self, dice: &Random) -> f64 {
        let mut order: Vec<usize> = (0..self.servers.len()).collect();
        for _ in 0..ROUNDS_MAX {
            for i in (1..order.len()).rev() {
                order.swap(i, (dice.u64() % (i as u64 + 1)) as usize);
            }
            let mut moved = false;
            for i in &order {
                let Server { start, len, rows_s } = self.servers[*i];
                self.add(start, len, -rows_s * (1.0 + EPS));
                let better = self.best_start(len);
                self.add(start, len, rows_s * EPS);
                self.add(better, len, rows_s);
                self.servers[*i].start = better;
                moved |= better != start;
            }
            if !moved {
                break;
            }
        }
        self.least()
    }

    fn add(&mut self, start: usize, len: usize, rows_s: f64) {
        let end = (start + len).min(N_LAYER);
        self.sums[start..end]
            .iter_mut()
            .for_each(|sum| *sum += rows_s);
    }

    fn least(&self) -> f64 {
        self.sums.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

impl Server {
    pub(super) fn window(&self) -> Range<u16> {
        self.start as u16..(self.start + self.len).min(N_LAYER) as u16
    }
}

/// Seconds between two checks of a server, at most; drawn evenly from 0.
const CHECK_S_MAX: f64 = 120.0;

/// Nodes that place themselves by Petals' rule. They serve nothing until all their layers are loaded.
pub(super) struct Petals {
    dice: Random,
}

/// One of them.
pub(super) struct Node {
    machine: Machine,
    server: Server,
    /// When its layers are loaded.
    ready_s: f64,
    check_s: f64,
    live: Vec<u16>,
}

impl Petals {
    pub(super) fn new(seed: u64) -> Petals {
        Petals {
            dice: Random::seeded(seed ^ 0x7065_7461_6c73),
        }
    }
}

impl Policy for Petals {
    type Node = Node;
    type View = Swarm;

    fn view(&self, nodes: &[Node], _tick: u64) -> Swarm {
        Swarm::new(nodes.iter().map(|node| node.server).collect())
    }

    fn join(&self, view: &Swarm, machine: Machine) -> Node {
        let len = machine.fit();
        let rows_s = declared(machine.layer_tokens_s, machine.rows_s, len);
        let server = Server {
            start: view.best_start(len),
            len,
            rows_s,
        };
        // Set by the first tick, which knows the time.
        Node {
            machine,
            server,
            ready_s: f64::NAN,
            check_s: f64::INFINITY,
            live: Vec::new(),
        }
    }

    fn advance(&self, view: &mut Swarm, node: &mut Node, to: f64) {
        let begin = to - TICK_S;
        if node.ready_s.is_nan() {
            node.ready_s = begin + node.machine.load_s * node.server.len as f64;
        }
        if node.live.is_empty() && node.ready_s <= to {
            node.live = layers(&node.server.window());
            node.check_s = node.ready_s + self.dice.fraction() * CHECK_S_MAX;
        }
        while node.check_s <= to {
            let at = node.check_s;
            node.check_s += self.dice.fraction() * CHECK_S_MAX;
            if view.should_move(node.server, &self.dice) {
                self.restart(view, node, at);
            }
        }
    }

    fn live(node: &Node) -> &[u16] {
        &node.live
    }

    fn machine(node: &Node) -> &Machine {
        &node.machine
    }
}

impl Petals {
    /// It stops serving, chooses and loads what it does not have on disk yet.
    fn restart(&self, view: &mut Swarm, node: &mut Node, at: f64) {
        let own = node.server;
        view.add(own.start, own.len, -own.rows_s);
        node.server.start = view.best_start(own.len);
        view.add(own.start, own.len, own.rows_s);
        let known = node
            .live
            .iter()
            .filter(|l| node.server.window().contains(l))
            .count();
        let new = own.len.saturating_sub(known) as f64;
        node.ready_s = at + node.machine.load_s * new;
        node.check_s = f64::INFINITY;
        node.live.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(start: usize, len: usize) -> Server {
        Server {
            start,
            len,
            rows_s: 10.0,
        }
    }

    #[test]
    fn a_server_takes_the_weakest_window_and_the_first_of_equals() {
        let swarm = Swarm::new(vec![server(0, 40), server(0, 60)]);
        assert_eq!(swarm.best_start(20), 60);
        assert_eq!(
            swarm.best_start(30),
            50,
            "all the empty ones, then the weakest beside them"
        );
        assert_eq!(Swarm::new(Vec::new()).best_start(30), 0);
        assert_eq!(declared(100.0, 30.0, 9), 20.0);
        assert_eq!(declared(100.0, 3.0, 9), 3.0);
    }

    #[test]
    fn a_server_moves_only_where_that_makes_much_better_and_tears_nothing() {
        let dice = Random::seeded(1);
        let spare = vec![server(0, 40), server(0, 40), server(0, 40), server(40, 40)];
        assert!(Swarm::new(spare.clone()).should_move(spare[0], &dice));
        assert!(
            !Swarm::new(spare.clone()).should_move(spare[3], &dice),
            "nobody else has these"
        );
        let even = vec![server(0, 40), server(0, 40), server(40, 40), server(40, 40)];
        assert!(!Swarm::new(even.clone()).should_move(even[0], &dice));
    }
}
