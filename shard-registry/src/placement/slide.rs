//! How a node gets from the layers it serves to those it should: one at a time, make before break.
//!
//! A layer is loaded before another is dropped wherever there is room for it (the reserve for KV holds
//! one layer). A layer is dropped only while at least two others serve it. So nothing gets scarcer than
//! two holders by a slide; what a node may not drop it goes on serving, next to its window.
//!
//! Who drops a layer takes it out of its advert first, lets the sessions on it be handed over, and asks
//! again before it frees the memory: two that act on the same old snapshot see each other then.

use std::ops::Range;

use swarm_proto::Peer;

use super::{draw::draw, join::scarcest};

/// Others that must serve a layer before it is dropped here: a slide leaves two holders, so that one
/// may fail.
pub const OTHERS_MIN: u32 = 2;

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Load this layer and announce it.
    Load(u16),
    /// Stop serving this layer.
    Drop(u16),
    /// Nothing now: a layer must go and may not yet. Ask again with a fresh snapshot.
    Wait,
    /// Exactly the window is served.
    Done,
}

/// A node on its way.
#[derive(Debug, Clone)]
pub struct Slide<'a> {
    /// Who.
    pub me: Peer,
    /// The layers it serves, as it knows itself.
    pub live: &'a [u16],
    /// Where it is going.
    pub window: Range<u16>,
    /// Bytes of each layer of the model.
    pub layer_bytes: &'a [u64],
    /// Bytes that layers may take on the way: those of the window and one layer more, where the KV in
    /// use leaves that.
    pub room_bytes: u64,
}

/// The next step. `others` is how many peers but this one serve each layer now, `coverage` how well
/// (both without this node: [`super::Holdings::coverage`] and [`super::Holdings::others`]).
pub fn step(slide: &Slide, others: &[u32], coverage: &[f64]) -> Step {
    let bytes = |layer: u16| slide.layer_bytes.get(usize::from(layer)).copied();
    let n_others = |layer: u16| others.get(usize::from(layer)).copied().unwrap_or(0);
    let window = slide.window.clone();
    let missing = window.filter(|l| !slide.live.contains(l) && bytes(*l).is_some());
    let missing: Vec<u16> = missing.collect();
    let beside = slide.live.iter().copied();
    let beside: Vec<u16> = beside.filter(|l| !slide.window.contains(l)).collect();
    let used: u64 = slide.live.iter().filter_map(|layer| bytes(*layer)).sum();
    let fits = |layer: &u16| {
        bytes(*layer).is_some_and(|more| used.saturating_add(more) <= slide.room_bytes)
    };
    let may_go = beside
        .iter()
        .copied()
        .filter(|l| n_others(*l) >= OTHERS_MIN);
    // The one with most holders; between equals each peer draws, so that not all drop the same.
    let go = may_go.max_by_key(|l| (n_others(*l), draw("drop", slide.me, u64::from(*l))));
    let fitting: Vec<u16> = missing.iter().copied().filter(fits).collect();
    match (scarcest(&fitting, coverage, slide.me), go) {
        (Some(layer), _) => Step::Load(layer),
        (None, Some(layer)) => Step::Drop(layer),
        (None, None) if missing.is_empty() && beside.is_empty() => Step::Done,
        (None, None) => Step::Wait,
    }
}
