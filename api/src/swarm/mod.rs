//! The swarm as plain data, for whoever looks: the page at `/`, `GET /swarm`, its events, and `shoal top`.
//!
//! ```text
//! adverts, round trips, peer book ─▶ SwarmView ─┐
//! requests that run (Live) ─▶ LiveView ─────────┼─▶ watch: JSON, events once a second while somebody looks
//! the node of this home ─▶ NodeView ────────────┘
//! ```
//! No prompt, no answer and no file of this machine is in any of it. What peers say of themselves is cut to a length
//! and freed of control characters here; whoever shows it escapes it all the same.

mod live;
mod node_view;
mod page;
mod peer;
mod view;
mod watch;

pub(crate) use live::Seen;
pub use live::{
    FinishedView, HopView, LiveView, Outcome, RecoveryView, RequestView, Stage, Totals,
};
pub use node_view::{NodeView, ShardView};
pub(crate) use page::is_open;
pub use peer::{HeldView, NeighbourView, PartsView, PeerDetail, WhyView};
pub use view::{Facts, FailedView, HolderView, ModelView, PeerView, SwarmView};
pub use watch::Seeing;
pub(crate) use watch::{Watch, routes};
