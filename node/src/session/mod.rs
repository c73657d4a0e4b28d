//! Sessions: a route of hops that runs one conversation's tokens, and the client at its ends.
//!
//! ```text
//! client ─Open, Rows─▶ hop 0 ─▶ hop 1 … ─▶ tail ─Logits─▶ client
//!        ◀─Opened, Ack, Failed─  ◀─  …  ◀─
//! ```
//!
//! | file | what |
//! |---|---|
//! | `wire` | frames over one stream |
//! | `ledger`, `admit`, `failure`, `topk`, `row`, `payload` | rules that need neither streams nor clocks |
//! | `hop`, `held`, `relay`, `retained`, `tail`, `slot` | the service that every node runs |
//! | `fork` | a session that begins with another's beginning, on a hop |
//! | `chain`, `standby` | opening the next hop, first or again, and feeding who stands by for it |
//! | `open`, `client`, `error` | opening and driving a session |
//! | `bench` | what a hop costs |

mod admit;
mod bench;
mod chain;
mod client;
mod config;
mod error;
mod failure;
mod fork;
mod held;
mod hop;
mod ledger;
mod limits;
mod open;
mod payload;
mod relay;
mod retained;
mod row;
mod slot;
mod standby;
mod tail;
mod topk;
mod trace;
pub(crate) mod wire;

pub use bench::{BenchError, HopBench, HopCost, bench_hops};
pub use client::{Beginning, ClientSession, Lender};
pub use config::{Deadlines, SessionLimits};
pub use error::{ClientError, HopName};
pub use hop::{Dialer, Holdings, Served, Sessions};
pub use open::{Kind, Opener, Route};
pub use row::{BadRow, LogitsRow};
pub(crate) use topk::log_sum_exp;

#[cfg(test)]
mod tests;
