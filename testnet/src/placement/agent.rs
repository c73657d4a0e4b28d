//! A node that places itself by the product's rules: it joins, loads layer by layer, moves, slides.

use std::ops::Range;
use std::sync::Arc;

use shard_registry::Snapshot;
use shard_registry::placement::{
    Count, Facts, Holdings, join, plan,
    slide::{Slide, Step, step},
    windows,
};
use swarm_proto::Peer;

use super::churn::Policy;
use super::machines::{MODEL, Machine, region};
use super::{FRAME_BYTES, LAYER_BYTES, TICK_S, layer_bytes, layers};

/// Ticks of a turn, after which others may move.
const TURN_TICKS: u64 = 2;

/// A node and what it is doing.
#[derive(Debug, Clone)]
pub(super) struct Agent {
    pub(super) machine: Machine,
    pub(super) window: Range<u16>,
    pub(super) live: Vec<u16>,
    /// It knows how fast it is, and says so.
    pub(super) measured: bool,
    /// A layer on its way, and when it is there.
    loading: Option<(u16, f64)>,
}

/// What all see during a tick.
pub(super) struct View {
    holdings: Holdings,
    movers: Vec<Peer>,
    plan: Option<plan::Plan>,
}

/// The product's rules.
pub(super) struct Shoal;

impl Policy for Shoal {
    type Node = Agent;
    type View = View;

    fn view(&self, nodes: &[Agent], tick: u64) -> View {
        let snapshot = snapshot(nodes);
        let bytes = layer_bytes();
        let holdings = Holdings::of(&snapshot, &facts(&bytes));
        let (turn, new) = (tick / TURN_TICKS, tick.is_multiple_of(TURN_TICKS));
        let small = nodes.len() <= plan::HOME_PEERS_MAX;
        let plan = (new && small).then(|| plan::plan(&holdings, &facts(&bytes), turn));
        let movers = if new && !small {
            plan::movers(&holdings, turn)
        } else {
            Vec::new()
        };
        View {
            holdings,
            movers,
            plan: plan.flatten(),
        }
    }

    fn join(&self, view: &View, machine: Machine) -> Agent {
        let windows = windows(&layer_bytes(), room(&machine, 0));
        let coverage = view
            .holdings
            .coverage(Count::Held, machine.peer, near(&machine));
        let window = join::choose(&windows, &coverage, machine.peer);
        Agent {
            machine,
            window: window.unwrap_or(0..1),
            live: Vec::new(),
            measured: false,
            loading: None,
        }
    }

    fn advance(&self, view: &mut View, node: &mut Agent, to: f64) {
        if let Some(window) = another_window(view, node) {
            node.window = window;
        }
        let mut now = to - TICK_S;
        let mut seen: Option<(Vec<u32>, Vec<f64>)> = None;
        loop {
            match node.loading {
                Some((_, there)) if there > to => return,
                Some((layer, there)) => {
                    node.loading = None;
                    now = there;
                    let at = node.live.partition_point(|l| *l < layer);
                    node.live.insert(at, layer);
                    node.measured = true;
                }
                None => {}
            }
            if node.live == layers(&node.window) {
                return;
            }
            let (others, coverage) = seen.get_or_insert_with(|| {
                let me = node.machine.peer;
                let coverage = view.holdings.coverage(Count::Live, me, near(&node.machine));
                (view.holdings.others(Count::Live, me), coverage)
            });
            match node.step(others, coverage) {
                Step::Load(layer) => node.loading = Some((layer, now + node.machine.load_s)),
                Step::Drop(layer) => node.live.retain(|l| *l != layer),
                Step::Wait | Step::Done => return,
            }
        }
    }

    fn live(node: &Agent) -> &[u16] {
        &node.live
    }

    fn machine(node: &Agent) -> &Machine {
        &node.machine
    }
}

impl Agent {
    /// What it does next, by what it sees of the others.
    pub(super) fn step(&self, others: &[u32], coverage: &[f64]) -> Step {
        let slide = Slide {
            me: self.machine.peer,
            live: &self.live,
            window: self.window.clone(),
            layer_bytes: &layer_bytes(),
            // One layer more on the way: the memory that is no layer's holds that.
            room_bytes: room(&self.machine, 1),
        };
        step(&slide, others, coverage)
    }
}

fn another_window(view: &View, node: &Agent) -> Option<Range<u16>> {
    let me = node.machine.peer;
    if let Some(first) = view.plan.as_ref().and_then(|plan| plan.moves.first()) {
        return (first.peer == me).then(|| first.to.clone());
    }
    let settled = layers(&node.window).iter().all(|l| node.live.contains(l));
    if !settled || !view.movers.contains(&me) {
        return None;
    }
    let windows = windows(&layer_bytes(), room(&node.machine, 0));
    plan::local(&view.holdings, &windows, me, near(&node.machine))
}

/// What the nodes say of themselves.
pub(super) fn snapshot(nodes: &[Agent]) -> Snapshot {
    let advert = |node: &Agent| {
        let intended = layers(&node.window);
        node.machine.advert(&node.live, &intended, node.measured)
    };
    Snapshot::new(nodes.iter().map(|node| Arc::new(advert(node))).collect())
}

pub(super) fn facts(layer_bytes: &[u64]) -> Facts<'_> {
    Facts {
        model: MODEL,
        layer_bytes,
        frame_bytes: FRAME_BYTES,
    }
}

/// Bytes of the layers that fit, and so many more.
pub(super) fn room(machine: &Machine, more: usize) -> u64 {
    (machine.fit() + more) as u64 * LAYER_BYTES
}

fn near(machine: &Machine) -> impl Fn(&Peer) -> bool + use<> {
    let own = region(&machine.peer);
    move |peer| region(peer) == own
}
