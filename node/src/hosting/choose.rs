//! Which layers a node takes that comes: those that the user said, else the window that the swarm needs most.

use std::{ops::Range, time::Duration};

use shard_registry::placement::{self, Count, Holdings, join};
use swarm_proto::LayerRange;

use super::{Place, span};
use crate::{
    load::{self, Found, Plan},
    swarm_node::StartError,
};

/// How long to wait for the first adverts before choosing.
pub(super) const LISTEN_FIRST: Duration = Duration::from_secs(3);
/// How long others get to object to a choice, each time.
const SETTLE: Duration = Duration::from_millis(700);
/// Rounds of choosing: nodes that start together see each other's choices after one.
const ROUNDS: u32 = 4;

/// The layers, announced.
pub(super) async fn layers(
    place: &Place,
    found: &Found,
    layer_bytes: &[u64],
    memory: u64,
    wanted: Option<Range<u32>>,
) -> Result<Plan, StartError> {
    let (net, board) = (&place.net, &place.board);
    if let Some(layers) = wanted {
        let plan = load::plan_fixed(&found.blueprint, layers, memory)?;
        board.intends(found, span(&plan.layers), None).await;
        return Ok(plan);
    }
    let windows = load::windows(layer_bytes, memory)?;
    let plan = |window: &Range<u16>| {
        let layers = window.start.into()..window.end.into();
        load::plan(&found.blueprint, layers, memory)
    };
    let layers = |window: &Range<u16>| LayerRange {
        start: window.start,
        end: window.end,
    };
    let most = Some(load::layer_budget(memory));
    if let [only] = &windows[..] {
        board.intends(found, layers(only), most).await;
        return Ok(plan(only));
    }
    if !place.alone && !net.synced(LISTEN_FIRST).await {
        tracing::info!("no other node was heard within {LISTEN_FIRST:?}");
    }
    let facts = found.facts(layer_bytes);
    let pick = || {
        let holdings = Holdings::of(&net.adverts().snapshot(), &facts);
        let near = placement::near(net.rtts());
        let coverage = holdings.coverage(Count::Held, net.me(), near);
        join::choose(&windows, &coverage, net.me())
    };
    let mut window = pick().unwrap_or(0..1);
    board.intends(found, layers(&window), most).await;
    for _ in 0..if place.alone { 0 } else { ROUNDS } {
        // Not a wait for one event: others' choices may come or not.
        tokio::time::sleep(SETTLE).await;
        match pick() {
            Some(better) if better != window => window = better,
            _ => break,
        }
        board.moves(&found.id, layers(&window)).await;
    }
    Ok(plan(&window))
}
