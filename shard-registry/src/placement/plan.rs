//! Who should move when the swarm is better served otherwise.
//!
//! In a swarm of a home every node makes the same plan for all ([`plan`]): from today's placement and
//! from nothing, in four orders of the peers, and from a single pipeline cut by speed, each peer in turn
//! takes its best window given the others', until none finds a better one. Of each result counts what
//! can be reached by slides. The best is adopted if it gains [`GAIN_MIN`] or serves a layer that nobody
//! serves. Then the moves are made one at a time, in an order drawn anew each turn: whoever does not
//! follow (pinned layers, a newer program) is in nobody's way.
//!
//! In a larger swarm that would cost too much, and one window more or less is little: there only a few
//! peers ([`movers`]), drawn each turn, look for a better window for themselves ([`local`]), and only
//! where the placement can gain [`GAIN_MIN`] at all.
//!
//! Who says that its layers stay what they are moves in no plan, and is reckoned with in all.

use std::ops::Range;

use swarm_proto::{LayerRange, Peer};

use super::{
    Count, Facts, Holder, Holdings,
    draw::draw,
    join,
    slide::OTHERS_MIN,
    throughput::{Supply, levels, pour_over, throughput, upper_bound},
    windows,
};

/// Most holders for whom everything is planned: the search takes up to a second of one core then.
pub const HOME_PEERS_MAX: usize = 32;
/// A plan must be worth this many times today's placement: layers cost minutes to move, and figures are
/// some seconds old.
pub const GAIN_MIN: f64 = 1.15;
/// Peers in a large swarm for each that may look for another window in a turn.
const PEERS_PER_MOVER: usize = 32;
/// Rounds over all peers until no one moves; later ones seldom find anything.
const ROUNDS_MAX: usize = 12;
/// Rounds of pouring that compare placements.
const POURS: usize = 4;
/// Windows of a peer that are compared with everything poured anew; the rest are out by a first look.
const FINALISTS: usize = 4;
/// Plans within this share of the best are as good: that with the fewest layers to load is taken.
const AS_GOOD: f64 = 0.97;
/// A move is needless if all others together keep this share of the plan's worth.
const NEEDLESS: f64 = 0.99;

/// A peer's change of window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// Who.
    pub peer: Peer,
    /// What it holds.
    pub from: Vec<LayerRange>,
    /// What it is to hold.
    pub to: Range<u16>,
}

/// A better placement.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Tokens a second as things are, with what is intended.
    pub now: f64,
    /// Tokens a second when all have moved.
    pub then: f64,
    /// Who moves, each by slides that the rule of two holders allows once those before it have moved; in
    /// an order drawn for this turn. The first one goes, the others wait for the next turn.
    pub moves: Vec<Move>,
}

/// The plan of a small swarm; `None` where things are well, or there are more than
/// [`HOME_PEERS_MAX`] holders. `turn` is the number of the period in which it is made, the same on all
/// nodes: it only orders the moves.
pub fn plan(holdings: &Holdings, facts: &Facts, turn: u64) -> Option<Plan> {
    if holdings.holders.len() > HOME_PEERS_MAX || holdings.n_layer == 0 {
        return None;
    }
    let search = Search::new(holdings, facts);
    let today = search.today();
    let (before, now) = search.worth(&today);
    if before == 0 && now * GAIN_MIN >= search.upper_bound() {
        return None;
    }
    let way = |result: Placement| search.way(&search.without_needless(result, &today), turn);
    let ways: Vec<Way> = search.results(&today).into_iter().map(way).collect();
    let best = ways.iter().map(|way| way.worth).min_by(better)?;
    let as_good = |way: &&Way| way.worth.0 == best.0 && way.worth.1 >= best.1 * AS_GOOD;
    let way = ways.iter().filter(as_good).min_by_key(|way| way.to_load)?;
    let (after, then) = way.worth;
    if after >= before && then < now * GAIN_MIN {
        return None;
    }
    let moves: Vec<Move> = way
        .moves
        .iter()
        .filter_map(|i| search.step(*i, &way.end))
        .collect();
    (!moves.is_empty()).then_some(Plan { now, then, moves })
}

/// Who may look for another window this turn in a swarm of any size: a few, drawn; nobody where the
/// placement as it is, with what is intended, cannot gain [`GAIN_MIN`] by any change of windows of the
/// same lengths.
pub fn movers(holdings: &Holdings, turn: u64) -> Vec<Peer> {
    let flow = throughput(holdings.n_layer, &holdings.supplies(Count::Held));
    // What is given out in all does not change much with who gives it to which layer.
    let mean = flow.levels.iter().sum::<f64>() / holdings.n_layer.max(1) as f64;
    if flow.tokens_s * GAIN_MIN >= mean {
        return Vec::new();
    }
    let free = holdings
        .holders
        .iter()
        .filter(|holder| holder.layer_bytes_max.is_some());
    let mut peers: Vec<Peer> = free.map(|holder| holder.peer).collect();
    peers.sort_by_key(|peer| draw("move", *peer, turn));
    peers.truncate(holdings.holders.len().div_ceil(PEERS_PER_MOVER));
    peers
}

/// A better window for `me`, who is one of the [`movers`]: that of the join rule, if the swarm computes
/// more tokens with it or serves a layer more. `windows` are those that fit, `near` as in
/// [`Holdings::coverage`].
pub fn local(
    holdings: &Holdings,
    windows: &[Range<u16>],
    me: Peer,
    near: impl Fn(&Peer) -> bool,
) -> Option<Range<u16>> {
    let own = holdings
        .holders
        .iter()
        .position(|holder| holder.peer == me)?;
    let coverage = holdings.coverage(Count::Held, me, near);
    let window = join::choose(windows, &coverage, me)?;
    let layers: Vec<u16> = window.clone().collect();
    let mut supplies = holdings.supplies(Count::Held);
    let now = worth(holdings.n_layer, &supplies);
    supplies[own].layers = &layers;
    let then = worth(holdings.n_layer, &supplies);
    (better(&then, &now).is_lt() && layers != holdings.holders[own].held).then_some(window)
}

/// Layers that nobody holds, and tokens a second.
fn worth(n_layer: usize, supplies: &[Supply]) -> (usize, f64) {
    let flow = throughput(n_layer, supplies);
    let bare = flow.levels.iter().filter(|level| **level <= 0.0).count();
    (bare, flow.tokens_s)
}

/// Fewer layers that nobody holds, then more tokens a second.
fn better(a: &(usize, f64), b: &(usize, f64)) -> std::cmp::Ordering {
    a.0.cmp(&b.0).then_with(|| b.1.total_cmp(&a.1))
}

/// Which layers each holder has, in the order of the holders.
type Placement = Vec<Vec<u16>>;

struct Search<'a> {
    n_layer: usize,
    holders: &'a [Holder],
    /// For each holder the windows that fit it; none of one that stays where it is.
    windows: Vec<Vec<Range<u16>>>,
}

impl<'a> Search<'a> {
    fn new(holdings: &'a Holdings, facts: &Facts) -> Search<'a> {
        let fit = |holder: &Holder| match holder.layer_bytes_max {
            Some(bytes) => windows(facts.layer_bytes, bytes),
            None => Vec::new(),
        };
        Search {
            n_layer: holdings.n_layer,
            holders: &holdings.holders,
            windows: holdings.holders.iter().map(fit).collect(),
        }
    }

    /// Tokens a second that no placement exceeds.
    fn upper_bound(&self) -> f64 {
        let part = |(holder, windows): (&Holder, &Vec<Range<u16>>)| {
            let fit = windows.iter().map(ExactSizeIterator::len).max();
            let fit = fit.unwrap_or(holder.held.len());
            (holder.layer_tokens_s, holder.rows_s, fit)
        };
        let parts = self.holders.iter().zip(&self.windows).map(part);
        upper_bound(self.n_layer, parts)
    }

    fn today(&self) -> Placement {
        let held = self.holders.iter().map(|holder| holder.held.clone());
        held.collect()
    }

    fn supply<'b>(&self, i: usize, layers: &'b [u16]) -> Supply<'b> {
        Supply {
            layer_tokens_s: self.holders[i].layer_tokens_s,
            rows_s: self.holders[i].rows_s,
            layers,
        }
    }

    fn supplies<'b>(&self, placement: &'b Placement) -> Vec<Supply<'b>> {
        let layers = placement.iter().enumerate();
        layers.map(|(i, layers)| self.supply(i, layers)).collect()
    }

    fn worth(&self, placement: &Placement) -> (usize, f64) {
        worth(self.n_layer, &self.supplies(placement))
    }

    /// Where the search ends, from each of its beginnings: from today, with every peer free to go
    /// anywhere and with each held back by what it serves, from nothing, and from a single pipeline.
    fn results(&self, today: &Placement) -> Vec<Placement> {
        let by_id: Vec<usize> = (0..self.holders.len()).collect();
        let mut fastest = by_id.clone();
        let speed = |i: &usize| self.holders[*i].layer_tokens_s;
        fastest.sort_by(|a, b| speed(b).total_cmp(&speed(a)));
        let reversed = |order: &[usize]| order.iter().rev().copied().collect::<Vec<_>>();
        let orders = [reversed(&by_id), reversed(&fastest), by_id, fastest];
        let stays = |(windows, held): (&Vec<Range<u16>>, &Vec<u16>)| match windows.is_empty() {
            true => held.clone(),
            false => Vec::new(),
        };
        let nothing: Placement = self.windows.iter().zip(today).map(stays).collect();
        let mut results = Vec::new();
        for order in &orders {
            results.push(self.converge(today.clone(), order, None));
            results.push(self.converge(today.clone(), order, Some(self.live())));
            results.push(self.converge(nothing.clone(), order, None));
        }
        let pipeline = self.single_pipeline(today);
        results.push(self.converge(pipeline, &orders[3], None));
        results
    }

    fn live(&self) -> Placement {
        self.holders
            .iter()
            .map(|holder| holder.live.clone())
            .collect()
    }

    /// Each peer in turn takes its best window, until none finds a better one. Where `live` is given, a
    /// peer takes only windows that it can slide to, and serves there before the next one looks.
    fn converge(
        &self,
        mut placement: Placement,
        order: &[usize],
        mut live: Option<Placement>,
    ) -> Placement {
        for _ in 0..ROUNDS_MAX {
            let mut moved = false;
            for i in order {
                if self.respond(&mut placement, *i, live.as_ref()) {
                    moved = true;
                    if let Some(live) = &mut live {
                        live[*i].clone_from(&placement[*i]);
                    }
                }
            }
            if !moved {
                break;
            }
        }
        placement
    }

    /// Whether a peer may drop what it serves beside `to`: enough others serve that.
    fn can_slide(&self, live: &Placement, i: usize, to: &[u16]) -> bool {
        let mut leaves = live[i].iter().filter(|l| to.binary_search(l).is_err());
        leaves.all(|layer| {
            let others = live.iter().enumerate().filter(|(j, _)| *j != i);
            let serving = others.filter(|(_, layers)| layers.binary_search(layer).is_ok());
            serving.count() >= OTHERS_MIN as usize
        })
    }

    /// How much of a placement can be reached by slides: peers move in this turn's order, each as
    /// soon as it can; who never can stays.
    fn way(&self, target: &Placement, turn: u64) -> Way {
        let (mut end, mut live) = (self.today(), self.live());
        let changes = |i: &usize| target[*i] != end[*i];
        let mut waiting: Vec<usize> = (0..self.holders.len()).filter(changes).collect();
        waiting.sort_by_key(|i| draw("move", self.holders[*i].peer, turn));
        let mut moves = Vec::new();
        while let Some(at) = waiting
            .iter()
            .position(|i| self.can_slide(&live, *i, &target[*i]))
        {
            let i = waiting.remove(at);
            end[i].clone_from(&target[i]);
            live[i].clone_from(&target[i]);
            moves.push(i);
        }
        Way {
            worth: self.worth(&end),
            to_load: self.to_load(&end),
            end,
            moves,
        }
    }

    /// Puts one peer where it does most good; whether that is elsewhere.
    fn respond(&self, placement: &mut Placement, i: usize, live: Option<&Placement>) -> bool {
        let before = self.cost(placement);
        let own = std::mem::take(&mut placement[i]);
        let others = levels(self.n_layer, &self.supplies(placement), POURS);
        let mut looks: Vec<(Cost, &Range<u16>)> = self.windows[i]
            .iter()
            .map(|window| (self.first_look(&others, i, window), window))
            .collect();
        // Between equals the lower one.
        looks.sort_by(|a, b| a.0.order(&b.0).then_with(|| a.1.start.cmp(&b.1.start)));
        let mut best = (before, own.clone());
        let reach = |window: &Range<u16>| {
            let to: Vec<u16> = window.clone().collect();
            live.is_none_or(|live| self.can_slide(live, i, &to))
                .then_some(to)
        };
        let finalists = looks.into_iter().filter_map(|(_, window)| reach(window));
        for layers in finalists.take(FINALISTS) {
            placement[i] = layers;
            let cost = self.cost(placement);
            if cost.beats(&best.0) {
                best = (cost, placement[i].clone());
            }
        }
        let moved = best.1 != own;
        placement[i] = best.1;
        moved
    }

    /// What a window would cost if the others gave as they do without this peer.
    fn first_look(&self, others: &[f64], i: usize, window: &Range<u16>) -> Cost {
        let window = usize::from(window.start)..usize::from(window.end);
        let (compute, n) = (self.holders[i].layer_tokens_s, window.len() as f64);
        let limit = self.holders[i].rows_s.min(compute);
        let inside = &others[window.clone()];
        let given = pour_over(inside, compute.min(limit * n), limit);
        let raised = inside.iter().zip(given).map(|(level, given)| level + given);
        let outside = others[..window.start].iter().chain(&others[window.end..]);
        Cost::of(raised.chain(outside.copied()))
    }

    fn cost(&self, placement: &Placement) -> Cost {
        let levels = levels(self.n_layer, &self.supplies(placement), POURS);
        Cost::of(levels.into_iter())
    }

    /// One pipeline through all peers that can go at its pace: each takes as many layers as it computes
    /// at that pace, at the highest pace at which they suffice for the model. They stand in the order
    /// in which they do today, and fill their memory from where they begin; the rest stay.
    fn single_pipeline(&self, today: &Placement) -> Placement {
        let (mut low, mut high) = (0.0, 0.0f64);
        for holder in self.holders {
            high = high.max(holder.rows_s.min(holder.layer_tokens_s));
        }
        for _ in 0..48 {
            let pace = (low + high) / 2.0;
            let n: usize = (0..self.holders.len()).map(|i| self.at_pace(i, pace)).sum();
            if n >= self.n_layer {
                low = pace;
            } else {
                high = pace;
            }
        }
        let mut order: Vec<usize> = (0..self.holders.len()).collect();
        let middle = |i: &usize| today[*i].iter().map(|l| usize::from(*l)).sum::<usize>();
        order.sort_by_key(|i| middle(i) * 2 / today[*i].len().max(1));
        let (mut placement, mut begin) = (today.clone(), 0);
        for i in order {
            let n = self.at_pace(i, low);
            let starts_there = |w: &&Range<u16>| usize::from(w.start) <= begin;
            let window = self.windows[i].iter().rev().find(starts_there);
            if let (true, true, Some(window)) = (n > 0, begin < self.n_layer, window) {
                placement[i] = window.clone().collect();
                begin += n;
            }
        }
        placement
    }

    /// Layers that a peer takes of a pipeline of so many rows a second.
    fn at_pace(&self, i: usize, pace: f64) -> usize {
        let holder = &self.holders[i];
        let fit = self.windows[i].iter().map(ExactSizeIterator::len).max();
        if holder.rows_s < pace || pace <= 0.0 {
            return 0;
        }
        fit.unwrap_or(0)
            .min((holder.layer_tokens_s / pace) as usize)
    }

    /// Layers that would have to be loaded.
    fn to_load(&self, placement: &Placement) -> usize {
        let new = |(holder, layers): (&Holder, &Vec<u16>)| {
            layers
                .iter()
                .filter(|l| holder.held.binary_search(l).is_err())
                .count()
        };
        self.holders.iter().zip(placement).map(new).sum()
    }

    /// Leaves those alone whose move is not needed for what the rest gain.
    fn without_needless(&self, mut result: Placement, today: &Placement) -> Placement {
        let (bare, then) = self.worth(&result);
        for i in 0..result.len() {
            let to = std::mem::replace(&mut result[i], today[i].clone());
            let (now_bare, now) = self.worth(&result);
            if to != today[i] && (now_bare > bare || now < then * NEEDLESS) {
                result[i] = to;
            }
        }
        result
    }

    fn step(&self, i: usize, end: &Placement) -> Option<Move> {
        let single = |l: &u16| LayerRange::new(*l, l.checked_add(1)?);
        Some(Move {
            peer: self.holders[i].peer,
            from: LayerRange::merge(self.holders[i].held.iter().filter_map(single).collect()),
            to: *end[i].first()?..end[i].last()?.checked_add(1)?,
        })
    }
}

/// What of a placement can be reached, and how.
struct Way {
    end: Placement,
    worth: (usize, f64),
    to_load: usize,
    /// Who moves, one after the other.
    moves: Vec<usize>,
}

/// What a placement lacks: layers that nobody holds, then Σ level⁻⁴. Unlike the lowest level alone it
/// shows each step towards a better one, and weighs the lowest most.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cost {
    bare: usize,
    scarcity: f64,
}

impl Cost {
    fn of(levels: impl Iterator<Item = f64>) -> Cost {
        let mut cost = Cost {
            bare: 0,
            scarcity: 0.0,
        };
        for level in levels {
            if level > 0.0 {
                let square = 1.0 / level * (1.0 / level);
                cost.scarcity += square * square;
            } else {
                cost.bare += 1;
            }
        }
        cost
    }

    fn order(&self, other: &Cost) -> std::cmp::Ordering {
        let by_bare = self.bare.cmp(&other.bare);
        by_bare.then_with(|| self.scarcity.total_cmp(&other.scarcity))
    }

    /// By more than rounding: else two equal windows would be exchanged for ever.
    fn beats(&self, other: &Cost) -> bool {
        self.bare < other.bare
            || (self.bare == other.bare && self.scarcity < other.scarcity * (1.0 - 1e-6))
    }
}
