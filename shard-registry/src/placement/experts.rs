//! Which experts of a mixture a node holds.
//!
//! Those that fewest others hold, for each of the rows that they are picked for: an expert that is picked twice as
//! often as its like wants twice as many holders. Experts spread over nodes because each draws its own between equals,
//! and stay where they are unless one is missing somewhere or is clearly wanted more.

use std::collections::{BTreeMap, BTreeSet};

use swarm_proto::{ExpertSpan, ModelAdvert, ModelId, Peer};

use super::draw::draw;
use crate::adverts::Snapshot;

/// An expert: its layer and its index.
pub type Expert = (u16, u16);

/// Holders that a swap must leave behind, where what is taken has some already.
const OTHERS_MIN: u32 = 2;
/// How much better off the rows of an expert that has so many must be with a holder more than those of another with one
/// less.
const WORTH_MOVING: f64 = 1.5;

/// Who holds which experts of one model, and how often they are picked: what a snapshot says of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ExpertHoldings {
    /// Others that hold it or are about to.
    others: BTreeMap<Expert, u32>,
    /// Picks over the fair share, of those that are picked more often than that.
    picked: BTreeMap<Expert, f64>,
}

/// What a node does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Hold this one too.
    Take(Expert),
    /// Hold the first in place of the second.
    Swap(Expert, Expert),
    /// Nothing.
    Stay,
}

impl ExpertHoldings {
    /// What the peers of a snapshot but `me` say, of those that `count`: an island is made of near peers.
    /// `n_expert` is the number of experts of a layer.
    pub fn of(
        snapshot: &Snapshot,
        model: ModelId,
        n_expert: u16,
        me: Peer,
        count: impl Fn(&Peer) -> bool,
    ) -> ExpertHoldings {
        let mut holdings = ExpertHoldings::default();
        let others = snapshot
            .adverts
            .iter()
            .filter(|advert| advert.peer != me && !advert.leaving && count(&advert.peer));
        let said = others
            .flat_map(|advert| &advert.models)
            .filter(|said: &&ModelAdvert| said.model == model)
            .filter_map(|said| said.experts.as_ref());
        for said in said {
            let held = ExpertSpan::each(&said.live).chain(ExpertSpan::each(&said.intended));
            for expert in held.collect::<BTreeSet<Expert>>() {
                *holdings.others.entry(expert).or_default() += 1;
            }
            for hot in &said.hot {
                let over = f64::from(hot.per_mille) * f64::from(n_expert) / 1000.0;
                let most = holdings
                    .picked
                    .entry((hot.layer, hot.expert))
                    .or_insert(1.0);
                *most = most.max(over);
            }
        }
        holdings
    }

    /// How many others hold it or are about to.
    pub fn others(&self, expert: Expert) -> u32 {
        self.others.get(&expert).copied().unwrap_or(0)
    }

    /// Holders for each of its rows, with so many holders.
    fn served(&self, expert: Expert, holders: u32) -> f64 {
        f64::from(holders) / self.picked.get(&expert).copied().unwrap_or(1.0)
    }
}

/// As many of `all` as `room` has place for, those that are served worst; of equals those that are held already, then
/// as each peer draws them.
pub fn choose(
    all: &[Expert],
    holdings: &ExpertHoldings,
    held: &BTreeSet<Expert>,
    room: usize,
    me: Peer,
) -> BTreeSet<Expert> {
    let mut ranked: Vec<_> = all
        .iter()
        .map(|expert| {
            let served = holdings.served(*expert, holdings.others(*expert));
            (served, !held.contains(expert), tie(*expert, me), *expert)
        })
        .collect();
    ranked.sort_unstable_by(|a, b| {
        let by_served = a.0.total_cmp(&b.0);
        by_served.then_with(|| (a.1, a.2).cmp(&(b.1, b.2)))
    });
    ranked
        .into_iter()
        .take(room)
        .map(|(.., expert)| expert)
        .collect()
}

/// One step from what is held towards what is wanted: place that is free is filled, an expert that nobody else holds
/// takes the place of one that others hold, and one whose rows would gain clearly that of one that has holders enough.
pub fn next(
    all: &[Expert],
    holdings: &ExpertHoldings,
    held: &BTreeSet<Expert>,
    room: usize,
    me: Peer,
) -> Next {
    let missing: Vec<Expert> = all.iter().copied().filter(|e| !held.contains(e)).collect();
    let Some(take) = choose(&missing, holdings, &BTreeSet::new(), 1, me).pop_first() else {
        return Next::Stay;
    };
    if held.len() < room {
        return Next::Take(take);
    }
    let served = |expert: &Expert| holdings.served(*expert, holdings.others(*expert));
    let most = held.iter().copied().max_by(|a, b| {
        served(a)
            .total_cmp(&served(b))
            .then_with(|| tie(*a, me).cmp(&tie(*b, me)))
    });
    let Some(most) = most else {
        return Next::Stay;
    };
    let left = holdings.others(most);
    let alone = holdings.others(take) == 0;
    let worth = match holdings.others(take) < OTHERS_MIN {
        true => 1.0,
        false => WORTH_MOVING,
    };
    let gains =
        holdings.served(take, holdings.others(take) + 1) * worth <= holdings.served(most, left);
    let may = match alone {
        true => left >= 1,
        false => left >= OTHERS_MIN && gains,
    };
    match may {
        true => Next::Swap(take, most),
        false => Next::Stay,
    }
}

fn tie((layer, expert): Expert, me: Peer) -> u64 {
    draw("expert", me, u64::from(layer) << 16 | u64::from(expert))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> Peer {
        Peer([n; 32])
    }

    fn all(n_layer: u16, n_expert: u16) -> Vec<Expert> {
        let of = |layer| (0..n_expert).map(move |expert| (layer, expert));
        (0..n_layer).flat_map(of).collect()
    }

    /// What each of these nodes sees of the others.
    fn seen(nodes: &[BTreeSet<Expert>], me: usize) -> ExpertHoldings {
        let mut holdings = ExpertHoldings::default();
        for (_, node) in nodes.iter().enumerate().filter(|(i, _)| *i != me) {
            for expert in node {
                *holdings.others.entry(*expert).or_default() += 1;
            }
        }
        holdings
    }

    fn covered(nodes: &[BTreeSet<Expert>]) -> usize {
        nodes.iter().flatten().collect::<BTreeSet<_>>().len()
    }

    #[test]
    fn nodes_that_come_one_by_one_cover_every_expert_before_any_twice() {
        let all = all(5, 8);
        let mut nodes: Vec<BTreeSet<Expert>> = Vec::new();
        for n in 0..8 {
            let holdings = seen(&nodes, usize::MAX);
            nodes.push(choose(&all, &holdings, &BTreeSet::new(), 10, peer(n)));
        }
        assert_eq!(covered(&nodes[..4]), 40);
        let holdings = seen(&nodes, usize::MAX);
        assert!(all.iter().all(|expert| holdings.others(*expert) == 2));
    }

    #[test]
    fn nodes_that_start_together_get_there_and_then_stay() {
        let all = all(5, 8);
        let none = ExpertHoldings::default();
        let first = |n| choose(&all, &none, &BTreeSet::new(), 10, peer(n));
        let mut nodes: Vec<BTreeSet<Expert>> = (0..5).map(first).collect();
        assert!(covered(&nodes) < 40, "else there is nothing to show");
        let mut steps = 0;
        loop {
            let mut moved = false;
            for i in 0..nodes.len() {
                let holdings = seen(&nodes, i);
                match next(&all, &holdings, &nodes[i], 10, peer(i as u8)) {
                    Next::Stay => continue,
                    Next::Take(take) => nodes[i].insert(take),
                    Next::Swap(take, drop) => {
                        assert!(nodes[i].remove(&drop) && holdings.others(drop) > 0);
                        nodes[i].insert(take)
                    }
                };
                moved = true;
            }
            steps += 1;
            if !moved {
                break;
            }
            assert!(steps < 40, "it goes on and on");
        }
        assert_eq!(covered(&nodes), 40);
    }

    #[test]
    fn nobody_holds_a_third_copy_while_another_expert_has_one() {
        let all = all(1, 2);
        let holdings = |a, b| ExpertHoldings {
            others: BTreeMap::from([((0, 0), a), ((0, 1), b)]),
            picked: BTreeMap::new(),
        };
        let held = BTreeSet::from([(0, 0)]);
        let next = |a, b| next(&all, &holdings(a, b), &held, 1, peer(1));
        assert_eq!(next(2, 1), Next::Swap((0, 1), (0, 0)));
        assert_eq!(next(1, 1), Next::Stay);
        assert_eq!(next(2, 2), Next::Stay);
    }

    #[test]
    fn an_expert_that_is_picked_often_gets_more_holders_and_the_last_copy_of_none_goes() {
        let all = all(1, 4);
        let mut holdings = ExpertHoldings {
            others: BTreeMap::from([((0, 0), 3), ((0, 1), 1), ((0, 2), 1), ((0, 3), 1)]),
            picked: BTreeMap::new(),
        };
        let held = BTreeSet::from([(0, 0)]);
        let next = |holdings: &ExpertHoldings, held| next(&all, holdings, held, 1, peer(1));
        holdings.picked.insert((0, 2), 3.0);
        assert_eq!(next(&holdings, &held), Next::Swap((0, 2), (0, 0)));
        holdings.others.insert((0, 0), 1);
        assert_eq!(next(&holdings, &held), Next::Stay, "two holders are few");
        holdings.others.insert((0, 3), 0);
        assert_eq!(next(&holdings, &held), Next::Swap((0, 3), (0, 0)));
        holdings.others.insert((0, 0), 0);
        assert_eq!(
            next(&holdings, &held),
            Next::Stay,
            "nobody else has what is held"
        );
    }
}
