//! What goes wrong: drawn from the seed, mostly where a session is.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use super::dice::Dice;
use super::gossip::Known;
use super::log::{Log, lock};
use super::network::Network;
use super::peer::Node;
use super::request::Progress;

/// A kind of fault, by the name that the report has for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Killed,
    KilledAndBack,
    PowerCut,
    Frozen,
    CutOneWay,
    CutBothWays,
    Slow,
    WholeRoute,
    Neighbours,
    ClientAway,
    StaleAdverts,
    Full,
}

const KINDS: [Kind; 12] = [
    Kind::Killed,
    Kind::KilledAndBack,
    Kind::PowerCut,
    Kind::Frozen,
    Kind::CutOneWay,
    Kind::CutBothWays,
    Kind::Slow,
    Kind::WholeRoute,
    Kind::Neighbours,
    Kind::ClientAway,
    Kind::StaleAdverts,
    Kind::Full,
];

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Killed => "killed",
            Kind::KilledAndBack => "killed, back empty",
            Kind::PowerCut => "power cut",
            Kind::Frozen => "frozen",
            Kind::CutOneWay => "cut one way",
            Kind::CutBothWays => "cut both ways",
            Kind::Slow => "slow",
            Kind::WholeRoute => "whole route",
            Kind::Neighbours => "two neighbours",
            Kind::ClientAway => "client away",
            Kind::StaleAdverts => "stale adverts",
            Kind::Full => "full",
        }
    }
}

/// After this long without a word a transport gives a connection up.
const GIVEN_UP: Duration = Duration::from_secs(15);

/// Everything that faults are done to.
pub(super) struct Faults {
    pub(super) log: Arc<Log>,
    pub(super) network: Arc<Network>,
    pub(super) nodes: Vec<Arc<Node>>,
    pub(super) clients: Vec<Arc<Known>>,
    pub(super) requests: Vec<Arc<Progress>>,
    pub(super) dice: Dice,
    /// Since when a machine is well; none: not now.
    pub(super) well: Mutex<Vec<Option<Instant>>>,
    pub(super) done: Mutex<BTreeMap<Kind, usize>>,
}

impl Faults {
    /// So many faults within `span`.
    pub(super) async fn run(self: Arc<Self>, n: usize, span: Duration) {
        let start = Instant::now();
        let last = span.as_millis() as u64;
        let mut times: Vec<Duration> = (0..n).map(|_| self.dice.millis(500, last)).collect();
        times.sort_unstable();
        let mut under_way = tokio::task::JoinSet::new();
        for at in times {
            sleep_until(start + at).await;
            if let Some(kind) = self.dice.pick(&KINDS) {
                *lock(&self.done).entry(kind).or_default() += 1;
                under_way.spawn(self.clone().happen(kind));
            }
        }
        under_way.join_all().await;
    }

    /// Whether a machine was well for so long.
    pub(super) fn is_well(&self, machine: usize, long: Duration) -> bool {
        lock(&self.well)[machine].is_some_and(|since| since.elapsed() >= long)
    }

    /// Everything that still can be is well again.
    pub(super) fn heal(&self) {
        self.network.heal();
        self.nodes.iter().for_each(|node| node.freeze(false));
        self.clients
            .iter()
            .for_each(|client| client.set_deaf(false));
    }

    async fn happen(self: Arc<Self>, kind: Kind) {
        let route = self.route();
        let on_route = |n: usize| {
            let from = self.dice.below(route.len().saturating_sub(n - 1));
            route.iter().copied().skip(from).take(n).collect::<Vec<_>>()
        };
        let mut victims = match kind {
            Kind::WholeRoute => route.clone(),
            Kind::Neighbours | Kind::CutOneWay | Kind::CutBothWays => on_route(2),
            Kind::ClientAway => vec![self.nodes.len() + self.dice.below(self.clients.len())],
            Kind::StaleAdverts => Vec::new(),
            _ => on_route(1),
        };
        if victims.is_empty() && kind != Kind::StaleAdverts {
            victims.push(self.dice.below(self.nodes.len()));
        }
        // One fault at a time for one machine.
        victims.retain(|machine| lock(&self.well)[*machine].is_some());
        for machine in &victims {
            lock(&self.well)[*machine] = None;
        }
        let long = self.dice.millis(100, 12_000);
        self.log.note(format_args!(
            "fault: {} of {victims:?} for {long:?}",
            kind.name()
        ));
        let back = self.act(kind, &victims, long).await;
        if back {
            for machine in victims {
                lock(&self.well)[machine] = Some(Instant::now());
            }
        }
    }

    /// Does it, and ends it where it ends; whether the victims are well after it.
    async fn act(&self, kind: Kind, victims: &[usize], long: Duration) -> bool {
        let heard = kind != Kind::PowerCut && !self.dice.percent(20);
        match kind {
            Kind::Killed | Kind::PowerCut | Kind::WholeRoute | Kind::Neighbours => {
                self.kill(victims, heard);
                if !heard {
                    sleep(GIVEN_UP).await;
                    victims.iter().for_each(|n| self.network.break_all(*n));
                }
                return false;
            }
            Kind::KilledAndBack => {
                self.kill(victims, heard);
                sleep(long).await;
                for node in victims.iter().filter_map(|n| self.nodes.get(*n)) {
                    self.network.break_all(node.number);
                    node.start();
                }
            }
            Kind::Frozen => {
                self.freeze(victims, true);
                sleep(long).await;
                self.freeze(victims, false);
            }
            Kind::CutOneWay | Kind::CutBothWays => self.cut(kind, victims, long).await,
            Kind::Slow => {
                let times = 2 + self.dice.below(40) as u32;
                victims
                    .iter()
                    .for_each(|n| self.network.set_slow(*n, times));
                sleep(long).await;
                victims.iter().for_each(|n| self.network.set_slow(*n, 1));
            }
            Kind::ClientAway => {
                victims.iter().for_each(|n| self.network.set_off(*n, true));
                sleep(long).await;
                if self.dice.percent(50) {
                    victims.iter().for_each(|n| self.network.break_all(*n));
                }
                victims.iter().for_each(|n| self.network.set_off(*n, false));
            }
            Kind::StaleAdverts => {
                self.clients.iter().for_each(|client| client.set_deaf(true));
                sleep(long * 4).await;
                self.clients
                    .iter()
                    .for_each(|client| client.set_deaf(false));
            }
            Kind::Full => {
                for node in victims.iter().filter_map(|n| self.nodes.get(*n)) {
                    node.fill(long).await;
                }
            }
        }
        true
    }

    /// Cuts the first victim off the second, or off everybody where it is alone.
    async fn cut(&self, kind: Kind, victims: &[usize], long: Duration) {
        let Some((one, others)) = victims.split_first() else {
            return;
        };
        let both = kind == Kind::CutBothWays;
        let all: Vec<usize> = (0..self.nodes.len() + self.clients.len()).collect();
        let others = if others.is_empty() { &all } else { others };
        let set = |cut| {
            for other in others {
                self.network.set_cut(*one, *other, cut);
                if both {
                    self.network.set_cut(*other, *one, cut);
                }
            }
        };
        set(true);
        sleep(long).await;
        if self.dice.percent(50) {
            others
                .iter()
                .for_each(|other| self.network.break_between(*one, *other));
        }
        set(false);
    }

    fn kill(&self, victims: &[usize], heard: bool) {
        for node in victims.iter().filter_map(|n| self.nodes.get(*n)) {
            node.die(heard);
        }
    }

    fn freeze(&self, victims: &[usize], frozen: bool) {
        for node in victims.iter().filter_map(|n| self.nodes.get(*n)) {
            node.freeze(frozen);
        }
    }

    /// The nodes of some request's route; mostly.
    fn route(&self) -> Vec<usize> {
        if self.dice.percent(15) {
            return Vec::new();
        }
        let routes: Vec<Vec<usize>> = self
            .requests
            .iter()
            .map(|request| {
                let route = lock(&request.route);
                let hops = route.iter();
                hops.filter_map(|hop| self.network.number(&hop.peer))
                    .collect()
            })
            .filter(|route: &Vec<usize>| !route.is_empty())
            .collect();
        let at = self.dice.below(routes.len());
        routes.get(at).cloned().unwrap_or_default()
    }
}
