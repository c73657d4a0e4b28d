//! Why a route is what it is: what each hop costs and by which parts, and why everybody else is not on it.
//!
//! Told by the planner's own table, only when somebody asks: planning itself does none of this.

use std::{fmt, time::Duration};

use swarm_proto::{Advert, Hop, LayerRange, ModelAdvert, Peer};

use super::{
    HOP_SHARE, Query,
    standby::ROOM_FOR,
    table::{Table, Usable, room, usable_peers},
};
use crate::adverts::Snapshot;

/// What a route costs by the planner's figures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Priced {
    /// Each hop.
    pub hops: Vec<Parts>,
    /// From the tail back to the client.
    pub reply: Duration,
}

/// What one hop costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts {
    /// One way from whoever is before it, and sending the rows.
    pub network: Duration,
    /// Whether that way was measured; else it is estimated from both ends' round trips to the client.
    pub measured: bool,
    /// Frames that wait for it already.
    pub queue: Duration,
    /// Being a hop at all.
    pub overhead: Duration,
    /// Its layers, as the planner weighs them.
    pub compute: Duration,
}

impl Parts {
    /// All of it.
    pub fn total(&self) -> Duration {
        self.network + self.queue + self.overhead + self.compute
    }
}

impl Priced {
    /// One token, from the client back to the client.
    pub fn total(&self) -> Duration {
        self.hops.iter().map(Parts::total).sum::<Duration>() + self.reply
    }
}

/// A peer that names the model and is not on the route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Other {
    /// Who.
    pub peer: Peer,
    /// What it serves.
    pub live: Vec<LayerRange>,
    /// What it is loading or means to.
    pub intended: Vec<LayerRange>,
    /// Why not.
    pub why: WhyNot,
}

/// Why a peer is not on a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhyNot {
    /// It is shutting down.
    Leaving,
    /// It is to be avoided.
    Avoided,
    /// Only others are allowed.
    NotAllowed,
    /// It says that the model has so many layers.
    OtherLayers(u16),
    /// It serves nothing of it yet.
    Loading,
    /// No room for such a session, by its advert.
    NoRoom,
    /// Nothing: there is no route without others.
    Usable,
    /// The cheapest way to use it is for these layers, and dearer.
    Dearer {
        /// By so much.
        by: Duration,
        /// The layers.
        layers: LayerRange,
    },
    /// It would be one more hop and save too little for that.
    NoHelp {
        /// So much.
        saves: Duration,
        /// The layers.
        layers: LayerRange,
    },
    /// About as cheap; clients are spread over such routes by a draw.
    Drawn {
        /// What it would save.
        saves: Duration,
        /// The layers.
        layers: LayerRange,
    },
}

impl fmt::Display for WhyNot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: &Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        match self {
            WhyNot::Leaving => f.write_str("it is shutting down"),
            WhyNot::Avoided => {
                f.write_str("left alone after failures (`shoal status --why`), or out of reach")
            }
            WhyNot::NotAllowed => f.write_str("not on the list of trusted peers"),
            WhyNot::OtherLayers(1) => f.write_str("it says that the model has 1 layer"),
            WhyNot::OtherLayers(n) => write!(f, "it says that the model has {n} layers"),
            WhyNot::Loading => f.write_str("it serves nothing of it yet"),
            WhyNot::NoRoom => f.write_str("no free KV for this context"),
            WhyNot::Usable => f.write_str("it could be used, others are missing"),
            WhyNot::Dearer { by, layers } if by.is_zero() => {
                write!(f, "no cheaper, for {layers}")
            }
            WhyNot::Dearer { by, layers } => {
                write!(f, "{} ms dearer, at best for {layers}", ms(by))
            }
            WhyNot::NoHelp { saves, layers } => write!(
                f,
                "no help: one more hop for {layers} would save {} ms",
                ms(saves)
            ),
            WhyNot::Drawn { saves, layers } => write!(
                f,
                "about as cheap ({} ms less for {layers}): the draw that spreads clients fell on another",
                ms(saves)
            ),
        }
    }
}

/// Why nobody stands by for a hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoStandby {
    /// Nobody else off the route serves all its layers.
    NobodyElse,
    /// Those who do would compute other bits.
    OtherBits,
    /// Those who do have no room to spare.
    NoRoom,
    /// Those who do stand by for other hops, or too many stand by already.
    Taken,
}

impl fmt::Display for NoStandby {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NoStandby::NobodyElse => "nobody else serves all these layers",
            NoStandby::OtherBits => "who else serves them would compute other bits",
            NoStandby::NoRoom => "who else serves them has no room to spare",
            NoStandby::Taken => "who else serves them stands by elsewhere",
        })
    }
}

/// What the planner counts for each hop of a route; `None` when it uses a peer or layer that may not be used.
pub fn price(snapshot: &Snapshot, query: &Query, hops: &[Hop]) -> Option<Priced> {
    let table = Table::of(snapshot, query);
    table.price(&table.find(hops)?, query)
}

/// Everybody who names the model and is not on `hops`, with the reason; without a route too.
pub fn others(snapshot: &Snapshot, query: &Query, hops: Option<&[Hop]>) -> Vec<Other> {
    let table = Table::of(snapshot, query);
    let route = hops.and_then(|hops| table.find(hops));
    let off = |advert: &&Advert| {
        !hops
            .unwrap_or_default()
            .iter()
            .any(|hop| hop.peer == advert.peer)
    };
    let adverts = snapshot.adverts.iter().map(|advert| &**advert).filter(off);
    let other = |advert: &Advert| {
        let named = advert
            .models
            .iter()
            .find(|model| model.model == query.model)?;
        Some(Other {
            peer: advert.peer,
            live: named.live.clone(),
            intended: named.intended.clone(),
            why: why_not(&table, query, advert, named, route.as_deref()),
        })
    };
    adverts.filter_map(other).collect()
}

fn why_not(
    table: &Table,
    query: &Query,
    advert: &Advert,
    named: &ModelAdvert,
    route: Option<&[(usize, LayerRange)]>,
) -> WhyNot {
    if advert.leaving {
        return WhyNot::Leaving;
    }
    if query.avoid.contains(&advert.peer) {
        return WhyNot::Avoided;
    }
    if query
        .allow
        .is_some_and(|allow| !allow.contains(&advert.peer))
    {
        return WhyNot::NotAllowed;
    }
    if named.n_layer != query.n_layer {
        return WhyNot::OtherLayers(named.n_layer);
    }
    if named.live.is_empty() {
        return WhyNot::Loading;
    }
    let at = table
        .peers
        .iter()
        .position(|peer| peer.advert.peer == advert.peer);
    let (Some(at), Some(route)) = (at, route) else {
        let full = room(named, query) == 0;
        return if full { WhyNot::NoRoom } else { WhyNot::Usable };
    };
    let Some((ns, n_hops, layers)) = cheapest_with(table, at, route) else {
        return WhyNot::NoRoom;
    };
    let chosen = table.cost(route, &table.prices);
    let saves = Duration::from_nanos(chosen.saturating_sub(ns));
    if ns >= chosen {
        let by = Duration::from_nanos(ns - chosen);
        WhyNot::Dearer { by, layers }
    } else if n_hops > route.len() && saves < Duration::from_nanos(chosen).mul_f64(HOP_SHARE) {
        WhyNot::NoHelp { saves, layers }
    } else {
        WhyNot::Drawn { saves, layers }
    }
}

/// The cheapest route that is this one but for some layers in a row, which `peer` computes: its cost, its
/// hops, those layers. `None` where the peer has no room for any.
fn cheapest_with(
    table: &Table,
    peer: usize,
    route: &[(usize, LayerRange)],
) -> Option<(u64, usize, LayerRange)> {
    let usable = &table.peers[peer];
    let mut best = None;
    for span in usable.live.iter() {
        let inside = |edge: u16| span.start <= edge && edge <= span.end;
        let edges = route
            .iter()
            .flat_map(|(_, layers)| [layers.start, layers.end]);
        let mut edges: Vec<u16> = edges.filter(|edge| inside(*edge)).collect();
        edges.extend([span.start, span.end]);
        edges.sort_unstable();
        edges.dedup();
        for (i, &start) in edges.iter().enumerate() {
            for &end in &edges[i + 1..] {
                let layers = LayerRange { start, end };
                if usize::from(layers.len()) > usable.room {
                    continue;
                }
                let other = with(route, peer, layers);
                let found = (table.cost(&other, &table.prices), other.len(), layers);
                if best.is_none_or(|least| found < least) {
                    best = Some(found);
                }
            }
        }
    }
    best
}

/// The same route with `layers` computed by `peer`.
fn with(
    route: &[(usize, LayerRange)],
    peer: usize,
    layers: LayerRange,
) -> Vec<(usize, LayerRange)> {
    let mut out = Vec::with_capacity(route.len() + 2);
    for (other, held) in route {
        let before = LayerRange {
            start: held.start,
            end: held.end.min(layers.start),
        };
        let after = LayerRange {
            start: held.start.max(layers.end),
            end: held.end,
        };
        let begins_here = held.contains(layers.start);
        let parts = [(*other, before), (peer, layers), (*other, after)];
        let parts = parts.into_iter().enumerate();
        let kept = parts.filter(|(i, (_, range))| match i {
            1 => begins_here,
            _ => range.start < range.end,
        });
        out.extend(kept.map(|(_, part)| part));
    }
    out
}

/// Why nobody stands by for the hop `at` of a route, where nobody does.
pub fn why_no_standby(snapshot: &Snapshot, query: &Query, hops: &[Hop], at: usize) -> NoStandby {
    let Some(hop) = hops.get(at) else {
        return NoStandby::NobodyElse;
    };
    let peers = usable_peers(snapshot, query, |_| true);
    let bits = snapshot.of_model(&hop.peer, &query.model);
    let bits = bits.map(|model| model.numerics);
    let off = |peer: &&Usable| !hops.iter().any(|hop| hop.peer == peer.advert.peer);
    let able = peers.iter().filter(off);
    let mut able = able.filter(|peer| peer.holds(hop.layers)).peekable();
    if able.peek().is_none() {
        return NoStandby::NobodyElse;
    }
    let mut alike = able
        .filter(|peer| Some(peer.model.numerics) == bits)
        .peekable();
    if alike.peek().is_none() {
        return NoStandby::OtherBits;
    }
    let need = usize::from(hop.layers.len()).saturating_mul(ROOM_FOR);
    if alike.any(|peer| peer.room >= need) {
        NoStandby::Taken
    } else {
        NoStandby::NoRoom
    }
}

impl Table<'_> {
    /// What a route costs, by its parts.
    fn price(&self, route: &[(usize, LayerRange)], query: &Query) -> Option<Priced> {
        let mut last: Option<usize> = None;
        let mut hops = Vec::with_capacity(route.len());
        for &(at, layers) in route {
            let (peer, price) = (&self.peers[at], &self.prices[at]);
            let name = peer.advert.peer;
            let (network, measured) = match last {
                None => (
                    peer.half_ns,
                    query.rtts.iter().any(|(other, _)| *other == name),
                ),
                Some(from) => (self.link(from, at), self.measured(from, at).is_some()),
            };
            hops.push(Parts {
                network: Duration::from_nanos(network),
                measured,
                queue: Duration::from_nanos(price.queued_ns),
                overhead: Duration::from_nanos(price.enter_ns - price.queued_ns),
                compute: Duration::from_nanos(price.layer_ns * u64::from(layers.len())),
            });
            last = Some(at);
        }
        let reply = Duration::from_nanos(self.peers[last?].exit_ns);
        Some(Priced { hops, reply })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use swarm_proto::{Hash, Measured, ModelId};

    use super::*;
    use crate::route::{estimate, plan, spread, standbys};

    const MODEL: ModelId = ModelId(Hash([7; 32]));

    fn span(start: u16, end: u16) -> LayerRange {
        LayerRange { start, end }
    }

    /// A peer that is 100 µs away from everybody.
    fn advert(n: u8, live: &[LayerRange], speed: f32) -> Advert {
        let figure = |value| Some(Measured { value, age_s: 1 });
        Advert {
            peer: Peer([n; 32]),
            seq: 1,
            ttl_ms: 30_000,
            addrs: vec![],
            models: vec![ModelAdvert {
                model: MODEL,
                name: String::new(),
                n_layer: 8,
                live: live.to_vec(),
                intended: vec![span(0, 8)],
                layer_tokens_s: figure(speed),
                n_ctx_max: 1024,
                free_cells: 100_000,
                n_embd: 64,
                numerics: 0,
                stored: Vec::new(),
                layer_bytes_max: None,
                experts: None,
            }],
            uplink_bytes_s: figure(1e9),
            queue: 0,
            rtts: (1..=20).map(|n| (Peer([n; 32]), 100)).collect(),
            leaving: false,
            agent: String::new(),
        }
    }

    fn snapshot(adverts: Vec<Advert>) -> Snapshot {
        Snapshot::new(adverts.into_iter().map(Arc::new).collect())
    }

    fn near() -> Vec<(Peer, u32)> {
        (1..=20).map(|n| (Peer([n; 32]), 100)).collect()
    }

    #[test]
    fn the_parts_add_up_to_the_estimate() {
        let mut busy = advert(2, &[span(3, 8)], 1000.0);
        busy.queue = 3;
        busy.rtts = vec![];
        let swarm = snapshot(vec![advert(1, &[span(0, 4)], 2000.0), busy]);
        let rtts = [(Peer([1; 32]), 100)];
        let query = Query {
            rtts: &rtts,
            hop_extra: Duration::from_micros(7),
            ..Query::new(MODEL, 8)
        };
        let route = plan(&swarm, &query).unwrap();
        let priced = price(&swarm, &query, &route.hops).unwrap();
        assert_eq!(priced.total(), route.estimate);
        assert_eq!(estimate(&swarm, &query, &route.hops), Some(route.estimate));
        let [first, second] = priced.hops[..] else {
            panic!("{priced:?}");
        };
        assert_eq!((first.measured, second.measured), (true, true));
        assert_eq!(first.network, Duration::from_micros(50));
        assert!(first.queue.is_zero() && second.queue > second.compute);
        assert_eq!(first.overhead, Duration::from_micros(87));
        let unmeasured = Query {
            rtts: &[],
            ..query.clone()
        };
        assert!(!price(&swarm, &unmeasured, &route.hops).unwrap().hops[0].measured);
        let avoid = [Peer([1; 32])];
        let avoided = Query {
            avoid: &avoid,
            ..query
        };
        assert_eq!(price(&swarm, &avoided, &route.hops), None);
    }

    const WHOLE: LayerRange = LayerRange { start: 0, end: 8 };

    /// Peers of all kinds; the cheapest route is the first of them alone.
    fn crowd() -> Snapshot {
        let change = |n: u8, change: fn(&mut Advert)| {
            let mut advert = advert(n, &[WHOLE], 1000.0);
            change(&mut advert);
            advert
        };
        snapshot(vec![
            advert(1, &[WHOLE], 1000.0),
            advert(2, &[WHOLE], 1000.0),
            change(3, |a| a.leaving = true),
            advert(4, &[WHOLE], 9000.0),
            advert(5, &[WHOLE], 9000.0),
            change(6, |a| a.models[0].n_layer = 9),
            change(7, |a| a.models[0].live = vec![]),
            change(8, |a| a.models[0].free_cells = 0),
            advert(9, &[WHOLE], 500.0),
            // Less time for two layers, and a hop more than that is worth.
            advert(10, &[span(0, 2)], 1200.0),
            change(11, |a| a.models[0].model = ModelId(Hash([8; 32]))),
        ])
    }

    /// Everybody's reason, where 4 is avoided and 5 not allowed.
    fn reasons(hops: Option<&[Hop]>) -> Vec<(u8, WhyNot)> {
        let (rtts, avoid) = (near(), [Peer([4; 32])]);
        let allow: Vec<Peer> = (1..=20)
            .filter(|n| *n != 5)
            .map(|n| Peer([n; 32]))
            .collect();
        let query = Query {
            rtts: &rtts,
            avoid: &avoid,
            allow: Some(&allow),
            n_ctx: 256,
            ..Query::new(MODEL, 8)
        };
        let swarm = crowd();
        assert_eq!(spread(&swarm, &query).unwrap().hops, [hop(1)]);
        let others = others(&swarm, &query, hops).into_iter();
        others.map(|other| (other.peer.0[0], other.why)).collect()
    }

    fn hop(n: u8) -> Hop {
        Hop {
            peer: Peer([n; 32]),
            addrs: vec![],
            layers: WHOLE,
        }
    }

    #[test]
    fn everybody_else_has_a_reason() {
        let layers = WHOLE;
        let dearer = |ms| WhyNot::Dearer {
            by: Duration::from_millis(ms),
            layers,
        };
        let found = reasons(Some(&[hop(1)]));
        let expected = [
            (2, dearer(0)),
            (3, WhyNot::Leaving),
            (4, WhyNot::Avoided),
            (5, WhyNot::NotAllowed),
            (6, WhyNot::OtherLayers(9)),
            (7, WhyNot::Loading),
            (8, WhyNot::NoRoom),
            (9, dearer(12)),
        ];
        assert_eq!(found[..8], expected);
        match found[8..] {
            [(10, WhyNot::NoHelp { saves, layers })] => {
                assert_eq!(layers, span(0, 2));
                assert!(saves < Duration::from_micros(400), "{saves:?}");
            }
            ref other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_drawn_route_and_none_have_reasons_too() {
        let found = reasons(Some(&[hop(9)]));
        let saves = Duration::from_millis(12);
        let layers = WHOLE;
        assert_eq!(found[0], (1, WhyNot::Drawn { saves, layers }));
        let found = reasons(None);
        assert_eq!(
            (found[0], found[7]),
            ((1, WhyNot::Usable), (8, WhyNot::NoRoom))
        );
        assert_eq!(found.len(), 10);
    }

    #[test]
    fn who_is_used_for_some_layers_takes_them_from_whoever_has_them() {
        let route = [(0, span(0, 3)), (1, span(3, 6)), (2, span(6, 8))];
        assert_eq!(
            with(&route, 9, span(2, 7)),
            [(0, span(0, 2)), (9, span(2, 7)), (2, span(7, 8))]
        );
        assert_eq!(with(&route, 9, span(0, 8)), [(9, span(0, 8))]);
        assert_eq!(
            with(&route, 9, span(4, 5)),
            [
                (0, span(0, 3)),
                (1, span(3, 4)),
                (9, span(4, 5)),
                (1, span(5, 6)),
                (2, span(6, 8))
            ]
        );
    }

    #[test]
    fn why_nobody_stands_by() {
        let whole = span(0, 8);
        let reason = |others: Vec<Advert>| {
            let swarm = snapshot([vec![advert(1, &[whole], 1000.0)], others].concat());
            let query = Query {
                n_ctx: 1024,
                ..Query::new(MODEL, 8)
            };
            let hops = [Hop {
                peer: Peer([1; 32]),
                addrs: vec![],
                layers: whole,
            }];
            let found = standbys(&swarm, &query, &hops);
            (found[0].is_some(), why_no_standby(&swarm, &query, &hops, 0))
        };
        assert_eq!(reason(vec![]), (false, NoStandby::NobodyElse));
        let half = advert(2, &[span(0, 4)], 1000.0);
        assert_eq!(reason(vec![half]), (false, NoStandby::NobodyElse));
        let mut other = advert(2, &[whole], 1000.0);
        other.models[0].numerics = 5;
        assert_eq!(reason(vec![other]), (false, NoStandby::OtherBits));
        let mut full = advert(2, &[whole], 1000.0);
        full.models[0].free_cells = 15 * 1024;
        assert_eq!(reason(vec![full]), (false, NoStandby::NoRoom));
        assert!(reason(vec![advert(2, &[whole], 1000.0)]).0);
    }

    #[test]
    fn every_reason_is_a_sentence_of_its_own() {
        let layers = LayerRange { start: 0, end: 2 };
        let time = Duration::from_millis(2);
        let all = [
            WhyNot::Leaving,
            WhyNot::Avoided,
            WhyNot::NotAllowed,
            WhyNot::OtherLayers(3),
            WhyNot::Loading,
            WhyNot::NoRoom,
            WhyNot::Usable,
            WhyNot::Dearer { by: time, layers },
            WhyNot::Dearer {
                by: Duration::ZERO,
                layers,
            },
            WhyNot::NoHelp {
                saves: time,
                layers,
            },
            WhyNot::Drawn {
                saves: time,
                layers,
            },
        ];
        let texts: std::collections::BTreeSet<String> =
            all.iter().map(ToString::to_string).collect();
        assert_eq!(texts.len(), all.len());
        assert!(texts.contains("2 ms dearer, at best for 0..2"), "{texts:?}");
    }
}
