//! What a placement is worth: the tokens a second that the swarm can compute with it.
//!
//! The largest T for which peers can share their work so that every layer gets T rows a second:
//!
//! ```text
//! Σ_i x_il ≥ T for every layer l     Σ_l x_il ≤ s_i (compute)     0 ≤ x_il ≤ w_i (uplink)
//! x_il = 0 where peer i does not serve layer l
//! ```
//!
//! Peer by peer the work is poured over its layers like water, over what the others give them
//! (Gauss–Seidel on Σ level²); a few rounds level nearly everything. By max-flow min-cut T is the least,
//! over sets of layers, of what all peers can give to the set, divided by its size. So each set is a bound
//! from above, and where the lowest level does not reach the bound of the lowest layers, rows are moved
//! along shortest paths (Edmonds–Karp) until it does or until a tighter set shows that nothing can
//! (Dinkelbach's iteration on the cut's ratio, which ends after finitely many sets).

use std::collections::VecDeque;

/// Rounds of pouring before the exact part; each costs a sort of every peer's layers.
const ROUNDS_MAX: usize = 12;
/// Levels and bounds that differ by less, relatively, are the same.
const EXACT: f64 = 1e-9;
/// A set must be tighter by this share to be worth looking at: more than rounding.
const TIGHTER: f64 = 1e-12;
/// Sets looked at; each is tighter than the one before, a handful does.
const SETS_MAX: usize = 64;

/// What one peer can give.
#[derive(Debug, Clone, Copy)]
pub struct Supply<'a> {
    /// Rows a second through one layer. What is not a number or below 0 counts as 0.
    pub layer_tokens_s: f64,
    /// Rows a second of each of its layers that its uplink carries; may be infinite.
    pub rows_s: f64,
    /// The layers it serves, each once. Those that the model does not have are not looked at.
    pub layers: &'a [u16],
}

/// How the work is shared.
#[derive(Debug, Clone, PartialEq)]
pub struct Flow {
    /// Tokens a second of the whole swarm: what the layer gets that gets least. 0 where a layer has no
    /// peer, or there is no layer.
    pub tokens_s: f64,
    /// Tokens a second that no way of sharing exceeds: the bound that ended the search. Equal to
    /// `tokens_s` but for rounding, or a search that was cut short.
    pub bound: f64,
    /// Rows a second that each layer gets.
    pub levels: Vec<f64>,
    /// Rows a second that each peer gives to each of its layers, in the order of its `layers`,
    /// without those that the model does not have: weights for routes.
    pub shares: Vec<Vec<f64>>,
}

/// The best that these peers can do together.
pub fn throughput(n_layer: usize, supplies: &[Supply]) -> Flow {
    let mut water = Water::new(n_layer, supplies);
    let mut bound = f64::INFINITY;
    for _ in 0..ROUNDS_MAX {
        water.pour();
        bound = bound.min(water.lowest_bound());
        if water.lowest() >= bound * (1.0 - EXACT) {
            return water.flow(bound);
        }
    }
    for _ in 0..SETS_MAX {
        match water.raise(bound) {
            Some(tighter) if tighter < bound * (1.0 - TIGHTER) => bound = tighter,
            _ => break,
        }
    }
    water.flow(bound)
}

/// Roughly the rows a second that each layer gets: `rounds` of pouring only.
pub(super) fn levels(n_layer: usize, supplies: &[Supply], rounds: usize) -> Vec<f64> {
    let mut water = Water::new(n_layer, supplies);
    (0..rounds).for_each(|_| water.pour());
    water.level
}

/// The most tokens a second that any placement of these peers could have: all work is given out, and
/// evenly. Each with its compute and uplink as in [`Supply`] and the layers that fit its memory.
pub fn upper_bound(n_layer: usize, peers: impl Iterator<Item = (f64, f64, usize)>) -> f64 {
    let given = |(layer_tokens_s, rows_s, fit): (f64, f64, usize)| {
        let (compute, rows_s) = (finite(layer_tokens_s), sane(rows_s));
        compute.min(rows_s.min(compute) * fit as f64)
    };
    peers.map(given).sum::<f64>() / n_layer.max(1) as f64
}

/// Rows a second that one peer gives to layers that have `levels` already: it raises the lowest
/// first, each by at most `limit`, all together by `work`. Returns what each gets.
pub(super) fn pour_over(levels: &[f64], work: f64, limit: f64) -> Vec<f64> {
    let mut order: Vec<(f64, usize)> = levels.iter().copied().zip(0..).collect();
    let line = water_line(&mut order, work, limit);
    let share = |level: &f64| (line - level).clamp(0.0, limit);
    levels.iter().map(share).collect()
}

/// The level up to which `work` fills these, each by at most `limit`; sorts them.
fn water_line<T>(levels: &mut [(f64, T)], work: f64, limit: f64) -> f64 {
    levels.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    let Some(&(mut line, _)) = levels.first() else {
        return 0.0;
    };
    // `wet` layers are under the line, `full` of them took their limit already.
    let (mut wet, mut full, mut left) = (0, 0, work);
    loop {
        let next_wet = levels.get(wet).map_or(f64::INFINITY, |next| next.0);
        let next_full = levels
            .get(full)
            .map_or(f64::INFINITY, |next| next.0 + limit);
        let next = next_wet.min(next_full);
        let rising = (wet - full) as f64;
        let needed = (next - line) * rising;
        if rising > 0.0 && needed >= left {
            return line + left / rising;
        }
        if full == levels.len() {
            return line;
        }
        left -= needed.max(0.0);
        line = next;
        if next_wet <= next_full {
            wet += 1;
        } else {
            full += 1;
        }
    }
}

/// All edges (peer, layer) with what flows over them.
struct Water {
    /// Where each peer's edges begin; one more at the end.
    begin: Vec<usize>,
    layer: Vec<usize>,
    share: Vec<f64>,
    /// Rows a second of all layers of a peer together, and of each.
    work: Vec<f64>,
    limit: Vec<f64>,
    level: Vec<f64>,
    /// For each layer its edges, as (peer, edge).
    givers: Vec<Vec<(usize, usize)>>,
    sorted: Vec<(f64, usize)>,
}

impl Water {
    fn new(n_layer: usize, supplies: &[Supply]) -> Water {
        let n_edge = supplies.iter().map(|supply| supply.layers.len()).sum();
        let mut water = Water {
            begin: Vec::with_capacity(supplies.len() + 1),
            layer: Vec::with_capacity(n_edge),
            share: Vec::new(),
            work: Vec::with_capacity(supplies.len()),
            limit: Vec::with_capacity(supplies.len()),
            level: vec![0.0; n_layer],
            givers: vec![Vec::new(); n_layer],
            sorted: Vec::new(),
        };
        for (peer, supply) in supplies.iter().enumerate() {
            let begin = water.layer.len();
            water.begin.push(begin);
            for layer in supply.layers.iter().map(|layer| usize::from(*layer)) {
                if let Some(givers) = water.givers.get_mut(layer) {
                    givers.push((peer, water.layer.len()));
                    water.layer.push(layer);
                }
            }
            let n = (water.layer.len() - begin) as f64;
            let compute = finite(supply.layer_tokens_s);
            let limit = sane(supply.rows_s).min(compute);
            water.limit.push(limit);
            water.work.push(compute.min(limit * n));
        }
        water.begin.push(water.layer.len());
        water.share = vec![0.0; water.layer.len()];
        water
    }

    /// Each peer in turn takes its work back and pours it over its layers anew.
    fn pour(&mut self) {
        for peer in 0..self.work.len() {
            let edges = self.begin[peer]..self.begin[peer + 1];
            self.sorted.clear();
            for edge in edges {
                let rest = self.level[self.layer[edge]] - self.share[edge];
                self.sorted.push((rest, edge));
            }
            let (work, limit) = (self.work[peer], self.limit[peer]);
            let line = water_line(&mut self.sorted, work, limit);
            for (rest, edge) in &self.sorted {
                self.share[*edge] = (line - rest).clamp(0.0, limit);
                self.level[self.layer[*edge]] = rest + self.share[*edge];
            }
        }
        self.settle();
    }

    /// Adds the levels up again, so that rounding does not gather in them.
    fn settle(&mut self) {
        self.level.fill(0.0);
        for (layer, share) in self.layer.iter().zip(&self.share) {
            self.level[*layer] += share;
        }
    }

    fn lowest(&self) -> f64 {
        self.level
            .iter()
            .copied()
            .min_by(f64::total_cmp)
            .unwrap_or(0.0)
    }

    /// The least bound of the sets "the k lowest layers".
    fn lowest_bound(&self) -> f64 {
        let mut layers: Vec<usize> = (0..self.level.len()).collect();
        layers.sort_by(|a, b| self.level[*a].total_cmp(&self.level[*b]));
        let mut n_in_set = vec![0.0; self.work.len()];
        let (mut given, mut least, mut n) = (0.0, f64::INFINITY, 0.0);
        for layer in layers {
            n += 1.0;
            for (peer, _) in &self.givers[layer] {
                let limit = self.limit[*peer];
                let before = self.work[*peer].min(limit * n_in_set[*peer]);
                n_in_set[*peer] += 1.0;
                given += self.work[*peer].min(limit * n_in_set[*peer]) - before;
            }
            least = least.min(given / n);
        }
        if least.is_finite() { least } else { 0.0 }
    }

    /// Moves rows until every layer has `goal`; where that cannot be, the bound of the set of layers
    /// that stays below. `goal` is at least the lowest level.
    fn raise(&mut self, goal: f64) -> Option<f64> {
        let low = goal * (1.0 - EXACT / 4.0);
        // Each path empties or fills an edge; more than was ever needed, and an end in any case.
        for _ in 0..self.share.len() + 64 {
            if self.lowest() >= low {
                break;
            }
            match self.path(goal, low) {
                Ok(path) => self.shift(goal, &path),
                Err(set) => return Some(self.bound_of(&set)),
            }
        }
        self.settle();
        None
    }

    /// The shortest way from a layer that has more than `goal` to one that has less than `low`, as edges
    /// (taken from, given to, taken from, …); else the layers from which nothing more can come to
    /// those that have too little.
    fn path(&self, goal: f64, low: f64) -> Result<Vec<usize>, Vec<bool>> {
        let tiny = goal * TIGHTER;
        let mut onward: Vec<Option<(usize, usize)>> = vec![None; self.level.len()];
        let mut reached: Vec<bool> = self.level.iter().map(|level| *level < low).collect();
        let mut asked = vec![false; self.work.len()];
        let mut queue: VecDeque<usize> = (0..reached.len()).filter(|l| reached[*l]).collect();
        while let Some(to) = queue.pop_front() {
            for (peer, gives) in &self.givers[to] {
                if asked[*peer] || self.share[*gives] >= self.limit[*peer] - tiny {
                    continue;
                }
                asked[*peer] = true;
                for takes in self.begin[*peer]..self.begin[*peer + 1] {
                    let from = self.layer[takes];
                    if reached[from] || self.share[takes] <= tiny {
                        continue;
                    }
                    (reached[from], onward[from]) = (true, Some((takes, *gives)));
                    if self.level[from] > goal + tiny {
                        return Ok(self.follow(from, &onward));
                    }
                    queue.push_back(from);
                }
            }
        }
        Err(reached)
    }

    fn follow(&self, from: usize, onward: &[Option<(usize, usize)>]) -> Vec<usize> {
        let (mut path, mut at) = (Vec::new(), from);
        while let Some((takes, gives)) = onward[at] {
            path.extend([takes, gives]);
            at = self.layer[gives];
        }
        path
    }

    /// Moves along a path as much as it bears, at most what one end has above `goal` and the other
    /// lacks.
    fn shift(&mut self, goal: f64, path: &[usize]) {
        let (Some(first), Some(last)) = (path.first(), path.last()) else {
            return;
        };
        let (from, to) = (self.layer[*first], self.layer[*last]);
        let mut rows = (self.level[from] - goal).min(goal - self.level[to]);
        for pair in path.chunks_exact(2) {
            let peer = self.begin.partition_point(|begin| *begin <= pair[1]) - 1;
            rows = rows
                .min(self.share[pair[0]])
                .min(self.limit[peer] - self.share[pair[1]]);
        }
        for pair in path.chunks_exact(2) {
            self.share[pair[0]] -= rows;
            self.share[pair[1]] += rows;
        }
        self.level[from] -= rows;
        self.level[to] += rows;
    }

    /// What all peers can give to a set of layers, for each of them.
    fn bound_of(&self, set: &[bool]) -> f64 {
        let mut given = 0.0;
        for (peer, work) in self.work.iter().enumerate() {
            let edges = &self.layer[self.begin[peer]..self.begin[peer + 1]];
            let n = edges.iter().filter(|layer| set[**layer]).count();
            given += work.min(self.limit[peer] * n as f64);
        }
        let n = set.iter().filter(|in_set| **in_set).count();
        given / n.max(1) as f64
    }

    fn flow(self, bound: f64) -> Flow {
        let peers = self.begin.windows(2);
        Flow {
            tokens_s: self.lowest(),
            bound,
            shares: peers.map(|w| self.share[w[0]..w[1]].to_vec()).collect(),
            levels: self.level,
        }
    }
}

/// A rate as it was meant: nothing below 0, nothing that is not a number.
fn sane(rate: f64) -> f64 {
    if rate > 0.0 { rate } else { 0.0 }
}

/// As [`sane`], and within what can be added up.
fn finite(rate: f64) -> f64 {
    sane(rate).min(1e15)
}
