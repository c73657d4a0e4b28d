//! Why a session of a client fails, in words that name the hop, its layers and whose fault it is.

use std::{fmt, time::Duration};

use shard_registry::route::NoRoute;
use swarm_proto::{Failure, FailureCode, Fault, Hop, LayerRange, Peer};

use super::failure::{culprit, is_leaving};

/// A hop as an error names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HopName {
    /// Its place on the route, from 0.
    pub at: usize,
    /// Who it is.
    pub peer: Peer,
    /// What it was to run.
    pub layers: LayerRange,
}

impl fmt::Display for HopName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "hop {} (peer {}, layers {})",
            self.at, self.peer, self.layers
        )
    }
}

/// Why a session could not be opened, or failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ClientError {
    /// The adverts hold no route through all layers.
    #[error("{0}; see `shoal status`")]
    NoRoute(NoRoute),
    /// The level is `trusted` and the peers on the list do not cover the model.
    #[error(
        "privacy is trusted and no trusted peer holds {}; peers that are not on the list do: {}",
        ranges(.missing), peers(.others)
    )]
    Untrusted {
        /// The layers that no trusted peer holds.
        missing: Vec<LayerRange>,
        /// Who does but is not trusted, and all that it holds.
        others: Vec<(Peer, Vec<LayerRange>)>,
    },
    /// A hop failed.
    #[error("{hop}: {}{}", .failure.message, whose(.failure))]
    Hop {
        /// Which.
        hop: HopName,
        /// What it said, or what was said of it. Control characters are replaced.
        failure: Failure,
    },
    /// Every route that was tried failed.
    #[error("{tries} routes were tried, the last failed: {last}")]
    Exhausted {
        /// How many.
        tries: usize,
        /// The last failure.
        last: Box<ClientError>,
    },
    /// The last answer was computed again by another route, as a check, and came out otherwise.
    #[error(
        "after a hop was replaced the answer at position {pos} came out otherwise (token {token} before, {again} now, its log-probability off by {by}); the peers do not compute the same, so the run ends here"
    )]
    Differs {
        /// Which row.
        pos: u32,
        /// Its likeliest token.
        token: u32,
        /// The likeliest token now.
        again: u32,
        /// How far the log-probability of the likeliest moved.
        by: f32,
    },
    /// Nobody who holds these layers has room for a session.
    #[error("{}: {last}", busy(.layers, .waited))]
    Busy {
        /// The layers: everybody who was asked for them is full.
        layers: Vec<LayerRange>,
        /// How long we waited for room.
        waited: Duration,
        /// The last refusal.
        last: Box<ClientError>,
    },
    /// The session holds as many positions as it was opened for.
    #[error(
        "context full: {pos} of {n_ctx} positions are used and {asked} more do not fit; open the session with a larger context, or shorten the prompt"
    )]
    ContextFull {
        /// The limit.
        n_ctx: u32,
        /// Positions used.
        pos: u32,
        /// Positions asked for.
        asked: usize,
    },
    /// A token id that the model does not have.
    #[error("token {token} is not in the vocabulary of {n_vocab}")]
    Token {
        /// The id.
        token: u32,
        /// The limit.
        n_vocab: u32,
    },
    /// Truncation beyond the end.
    #[error("cannot truncate to position {pos}, the session holds {held}")]
    Truncate {
        /// Where to.
        pos: u32,
        /// What is held.
        held: u32,
    },
    /// `next_logits` without a row asked for.
    #[error("no logits were asked for")]
    NothingAsked,
    /// The model's description could not be had.
    #[error("{0}")]
    Model(String),
}

impl ClientError {
    /// The failure of a hop of this route.
    pub(super) fn hop(route: &[Hop], mut failure: Failure) -> Self {
        let last = route.len().saturating_sub(1);
        let at = usize::from(failure.at).min(last);
        failure.at = u8::try_from(at).unwrap_or(u8::MAX);
        // A peer's words reach a terminal: they must not move its cursor.
        failure.message = failure.message.chars().map(printable).collect();
        match route.get(at) {
            Some(hop) => Self::Hop {
                hop: HopName {
                    at,
                    peer: hop.peer,
                    layers: hop.layers,
                },
                failure,
            },
            None => Self::Model(failure.to_string()),
        }
    }

    /// Whether the session can go on along another route.
    pub fn is_recoverable(&self) -> bool {
        matches!(self, Self::Hop { .. })
    }

    /// The peer that another route should avoid.
    pub(crate) fn culprit(&self, route: &[Hop]) -> Option<Peer> {
        let Self::Hop { failure, .. } = self else {
            return None;
        };
        route
            .get(usize::from(culprit(failure)?))
            .map(|hop| hop.peer)
    }

    /// Which hop it is about.
    pub(crate) fn hop_at(&self) -> Option<usize> {
        match self {
            Self::Hop { hop, .. } => Some(hop.at),
            _ => None,
        }
    }

    /// Whether a hop could not feed the next one, for it no longer retains what it sent.
    pub(crate) fn is_not_retained(&self) -> bool {
        matches!(self, Self::Hop { failure, .. } if failure.code == FailureCode::NotRetained)
    }

    /// Whether a hop gave the session up in good order, to go on elsewhere: no fault of its own.
    pub(crate) fn is_leaving(&self) -> bool {
        matches!(self, Self::Hop { failure, .. } if is_leaving(failure))
    }

    /// The hop that has no room now and may have some later. A session larger than it ever takes is
    /// the caller's fault, and waiting does not help.
    pub(crate) fn without_room(&self) -> Option<HopName> {
        match self {
            Self::Hop { hop, failure } if failure.code == FailureCode::Full => {
                (failure.fault != Fault::Caller).then_some(*hop)
            }
            _ => None,
        }
    }
}

fn printable(c: char) -> char {
    if c.is_control() { '\u{fffd}' } else { c }
}

fn whose(failure: &Failure) -> &'static str {
    match failure.fault {
        Fault::Peer => " (as its neighbour saw it)",
        Fault::Local => " (as it says itself)",
        Fault::Caller => " (it blames what it was sent)",
    }
}

fn busy(layers: &[LayerRange], waited: &Duration) -> String {
    let busy = format!("every holder of {} is busy", ranges(layers));
    match waited.as_secs() {
        0 => busy,
        s => format!("{busy}, after {s} s of waiting"),
    }
}

fn ranges(ranges: &[LayerRange]) -> String {
    let list: Vec<_> = ranges.iter().map(ToString::to_string).collect();
    format!("layers {}", list.join(", "))
}

fn peers(peers: &[(Peer, Vec<LayerRange>)]) -> String {
    let list: Vec<_> = peers
        .iter()
        .map(|(peer, held)| format!("{peer} ({})", ranges(held)))
        .collect();
    list.join(", ")
}
