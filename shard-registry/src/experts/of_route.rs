//! What the machines of a planned route would take as an island: for whoever asks why a mixture runs as it does.

use std::time::Duration;

use swarm_proto::{Hop, ModelAdvert, ModelId, Peer};

use super::{
    assign::assign_experts,
    choice::{Choice, Wish, choose},
    cost::{
        Holder, IslandTime, Link, Machine, Overheads, Stage, Unfit, island_time, pipeline_time,
    },
    shape::{ExpertUse, MixtureShape},
};
use crate::{adverts::Snapshot, route::RTT_UNKNOWN};

/// A home's uplink, where it was not measured.
const UPLINK_UNKNOWN: f64 = 2.5e6;

/// A route of a mixture, held against an island of the same machines.
#[derive(Debug, Clone, PartialEq)]
pub struct Compared {
    /// Who would be the trunk.
    pub trunk: Peer,
    /// Which way is better, or why neither is one.
    pub choice: Result<Choice, (Unfit, Unfit)>,
}

/// An advert does not say what memory a peer has. So much more than what it serves counts as there: experts do not
/// come in the sizes of layers.
const SPARE: u64 = 8;

/// Compares a route with an island of its own machines, each with room for little more than what it serves now; the trunk is the one
/// with which the island is fastest. `layers_s` says how fast a peer is believed to be, in layers a second. `None`
/// where one machine has everything, or one did not say how fast it is.
pub fn compare(
    snapshot: &Snapshot,
    model: ModelId,
    shape: &MixtureShape,
    hops: &[Hop],
    layers_s: impl Fn(&Peer, &ModelAdvert) -> Option<f32>,
) -> Option<Compared> {
    let machine = |hop: &Hop| {
        let of_model = snapshot.of_model(&hop.peer, &model)?;
        let layers_s = f64::from(layers_s(&hop.peer, of_model)?);
        let serves = of_model.live.iter().map(|span| shape.span_bytes(*span));
        let serves: u64 = serves.sum();
        let room = serves.saturating_add(serves / SPARE);
        Some(Machine::of_layers_s(shape, layers_s, room))
    };
    let machines: Vec<Machine> = hops.iter().map(machine).collect::<Option<_>>()?;
    let mut peers: Vec<(Peer, Machine)> = Vec::new();
    for (hop, machine) in hops.iter().zip(&machines) {
        if !peers.iter().any(|(peer, _)| *peer == hop.peer) {
            peers.push((hop.peer, *machine));
        }
    }
    if peers.len() < 2 {
        return None;
    }
    let overheads = Overheads::default();
    let stages: Vec<Stage> = hops
        .iter()
        .zip(machines)
        .enumerate()
        .map(|(at, (hop, machine))| Stage {
            machine,
            link: match at.checked_sub(1).and_then(|before| hops.get(before)) {
                Some(before) => link(snapshot, before.peer, hop.peer, Some(RTT_UNKNOWN)),
                None => Some(Link::NONE),
            }
            .unwrap_or(Link::NONE),
            layers: hop.layers,
        })
        .collect();
    let pipeline = pipeline_time(shape, shape.span(), &stages, &overheads);
    let islands = (0..peers.len()).map(|at| (at, island(snapshot, shape, &peers, at, &overheads)));
    // Those that cannot be come last.
    let takes = |island: &Result<IslandTime, Unfit>| match island {
        Ok(island) => island.total,
        Err(_) => Duration::MAX,
    };
    let (trunk, island) = islands.min_by_key(|(_, island)| takes(island))?;
    Some(Compared {
        trunk: peers.get(trunk)?.0,
        choice: choose(island, pipeline, Wish::Near),
    })
}

/// An island with this trunk, which holds experts too as far as it has room.
fn island(
    snapshot: &Snapshot,
    shape: &MixtureShape,
    peers: &[(Peer, Machine)],
    trunk: usize,
    overheads: &Overheads,
) -> Result<IslandTime, Unfit> {
    let own = shape.layers.iter().map(|layer| layer.trunk_bytes);
    let own = own.sum::<u64>() + shape.head_bytes;
    let mut budgets: Vec<Machine> = peers.iter().map(|(_, machine)| *machine).collect();
    let of_trunk = &mut budgets[trunk];
    of_trunk.memory_bytes = of_trunk.memory_bytes.saturating_sub(own);
    let used = ExpertUse::default();
    let sets = assign_experts(shape, &used, &budgets).map_err(|none| Unfit::Memory {
        who: "an island of these machines".into(),
        needs: own + none.bytes,
        has: own + none.room,
    })?;
    let mut holders = Vec::with_capacity(peers.len());
    for (at, ((peer, machine), experts)) in peers.iter().zip(sets).enumerate() {
        let link = match at == trunk {
            true => Some(Link::NONE),
            false => link(snapshot, peers[trunk].0, *peer, None),
        };
        let link = link.ok_or(Unfit::Unmeasured(*peer))?;
        holders.push(Holder {
            machine: *machine,
            link,
            experts,
        });
    }
    let machine = &peers[trunk].1;
    island_time(shape, &used, shape.span(), machine, &holders, overheads)
}

/// The way between two peers, by the smallest round trip that either measured; else by `unknown`.
fn link(snapshot: &Snapshot, from: Peer, to: Peer, unknown: Option<Duration>) -> Option<Link> {
    let of = |one: Peer, other: Peer| {
        let rtts = snapshot
            .get(&one)
            .into_iter()
            .flat_map(|advert| &advert.rtts);
        rtts.filter(move |(peer, _)| *peer == other)
            .map(|(_, rtt_us)| *rtt_us)
    };
    let measured = of(from, to).chain(of(to, from)).min();
    let rtt = measured
        .map(|rtt_us| Duration::from_micros(rtt_us.into()))
        .or(unknown)?;
    let uplink = snapshot.get(&from).and_then(|advert| advert.uplink_bytes_s);
    Some(Link {
        rtt,
        bytes_s: uplink.map_or(UPLINK_UNKNOWN, |measured| {
            f64::from(measured.value).max(1.0)
        }),
    })
}
