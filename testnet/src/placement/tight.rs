//! A few nodes whose memory holds the model hardly more than twice: what is loaded is live at once, nobody
//! goes; they join, then move until nobody wants to.

use node::Random;
use shard_registry::placement::throughput::{Supply, throughput, upper_bound};
use shard_registry::placement::{Count, Holdings, plan, slide::Step};

use super::agent::{Agent, Shoal, facts, snapshot};
use super::churn::Policy;
use super::machines::Machine;
use super::petals::{self, Server};
use super::{LAYER_BYTES, N_LAYER, Rule, layer_bytes, layers};

/// Turns after which a swarm counts as settled in any case.
const TURNS_MAX: u64 = 100;

/// T/U of a swarm of `n_node` nodes whose memory sums to `ratio` times the model, settled. `together`: all
/// are there before the first serves anything, as when a house is switched on; else each serves before the next
/// one comes. That changes nothing for Petals' rule, under which nobody waits for anybody.
pub fn tight(seed: u64, n_node: usize, ratio: f64, together: bool, rule: Rule) -> f64 {
    let machines = machines(seed, n_node, ratio);
    let live = match rule {
        Rule::Shoal => shoal(&machines, together),
        Rule::Petals => petals(&machines, &Random::seeded(seed)),
    };
    let supply = |(machine, layers)| supply(machine, layers);
    let supplies: Vec<Supply> = machines.iter().zip(&live).map(supply).collect();
    let bound = upper_bound(N_LAYER, machines.iter().map(Machine::part));
    throughput(N_LAYER, &supplies).tokens_s / bound
}

fn supply<'a>(machine: &Machine, layers: &'a Vec<u16>) -> Supply<'a> {
    Supply {
        layer_tokens_s: machine.layer_tokens_s,
        rows_s: machine.rows_s,
        layers,
    }
}

/// Machines as everywhere, with their memory scaled to the sum.
fn machines(seed: u64, n_node: usize, ratio: f64) -> Vec<Machine> {
    let draw = |number| Machine::draw(seed, number as u64);
    let mut machines: Vec<Machine> = (0..n_node).map(draw).collect();
    let sum: f64 = machines.iter().map(|machine| machine.memory).sum();
    let scale = ratio * (N_LAYER as u64 * LAYER_BYTES) as f64 / sum;
    machines
        .iter_mut()
        .for_each(|machine| machine.memory *= scale);
    machines
}

fn shoal(machines: &[Machine], together: bool) -> Vec<Vec<u16>> {
    let mut nodes: Vec<Agent> = Vec::new();
    for machine in machines {
        let mut node = Shoal.join(&Shoal.view(&nodes, 1), *machine);
        node.measured = true;
        nodes.push(node);
        if !together {
            settle(&mut nodes);
        }
    }
    settle(&mut nodes);
    nodes.into_iter().map(|node| node.live).collect()
}

/// Turn after turn the first one of the plan moves, until nobody is to; then all serve.
fn settle(nodes: &mut [Agent]) {
    let bytes = layer_bytes();
    for turn in 0..TURNS_MAX {
        let holdings = Holdings::of(&snapshot(nodes), &facts(&bytes));
        let Some(plan) = plan::plan(&holdings, &facts(&bytes), turn) else {
            break;
        };
        let Some(first) = plan.moves.first() else {
            break;
        };
        if let Some(node) = nodes
            .iter_mut()
            .find(|node| node.machine.peer == first.peer)
        {
            slide(node, first.to.clone(), &holdings);
        }
    }
    for node in nodes.iter_mut().filter(|node| node.live.is_empty()) {
        node.live = layers(&node.window);
    }
}

/// Takes a node to its window; one that serves nothing yet just goes there.
fn slide(node: &mut Agent, window: std::ops::Range<u16>, holdings: &Holdings) {
    node.window = window;
    let me = node.machine.peer;
    let others = holdings.others(Count::Live, me);
    let coverage = holdings.coverage(Count::Live, me, |_| false);
    while !node.live.is_empty() {
        match node.step(&others, &coverage) {
            Step::Load(layer) => {
                let at = node.live.partition_point(|l| *l < layer);
                node.live.insert(at, layer);
            }
            Step::Drop(layer) => node.live.retain(|l| *l != layer),
            Step::Wait | Step::Done => return,
        }
    }
}

fn petals(machines: &[Machine], dice: &Random) -> Vec<Vec<u16>> {
    let mut servers: Vec<Server> = Vec::new();
    for machine in machines {
        let len = machine.fit();
        let rows_s = petals::declared(machine.layer_tokens_s, machine.rows_s, len);
        let start = petals::Swarm::new(servers.clone()).best_start(len);
        servers.push(Server { start, len, rows_s });
    }
    for _ in 0..TURNS_MAX {
        let mut moved = false;
        for i in 0..servers.len() {
            let own = servers[i];
            if petals::Swarm::new(servers.clone()).should_move(own, dice) {
                let others = servers.iter().enumerate().filter(|(j, _)| *j != i);
                let others = petals::Swarm::new(others.map(|(_, server)| *server).collect());
                servers[i].start = others.best_start(own.len);
                moved |= servers[i].start != own.start;
            }
        }
        if !moved {
            break;
        }
    }
    servers
        .iter()
        .map(|server| layers(&server.window()))
        .collect()
}
