//! Experts on other machines: a holder answers calls of any trunk, a trunk has an island of holders.
//!
//! ```text
//! stage thread ─place, ask─▶ Island ─frames─▶ link (a task a holder) ═stream═▶ served ─▶ ExpertWorker
//!              ◀──rows, by a channel of its own──┘                             (a task a stream)
//! ```
//!
//! | file | what |
//! |---|---|
//! | `wire` | calls as the engine has them, calls as they travel |
//! | `service`, `served` | the holder's side |
//! | `island`, `keeper` | the trunk's side: who is in it, and what others may know of it |
//! | `holder`, `link` | what is known of one holder, and the stream to it |
//! | `ask` | one layer's calls: sent, waited for, sent elsewhere |
//! | `loopback` | an island on one machine, for benches |
//! | `table`, `choose`, `timing`, `usage` | rules that need neither streams nor clocks |
//!
//! There are no sessions here and no KV: a call is all that a holder needs to know, so any of them that has the
//! experts can answer it, and a trunk that is left by one goes on with the others at once. What all rows of an
//! expert give depends on their number (`docs/decisions/0141`): they are never split.

mod ask;
mod choose;
mod holder;
mod island;
mod keeper;
mod link;
mod loopback;
mod served;
mod service;
mod table;
mod timing;
mod usage;
mod wire;

pub use holder::{HolderView, LinkState};
pub use island::{Island, IslandFacts, IslandOptions, PlacedExpert};
pub use loopback::Loopback;
pub use service::{ExpertService, ServiceStats};
