//! The HTTP server: answers as OpenAI's API does, out of the swarm.
//!
//! ```text
//! connection ─▶ guard (host, key, CORS) ─▶ route ─▶ Ask ─▶ Answers ─▶ JSON or server-sent events
//!                                                            │
//!                                          node::answer over a Source that `Models` opens
//! ```
//!
//! | file | what |
//! |---|---|
//! | `server`, `impatient` | sockets, TLS, the end |
//! | `guard`, `body` | who may ask, and how much at once |
//! | `observe`, `metrics` | what is counted, logged and traced of a request: no word of it |
//! | `fields`, `ask`, `messages_in`, `sampling`, `tools` | from JSON to what is asked, each mistake by name |
//! | `answers` | what is asked, as a task that gives events |
//! | `chat`, `completions`, `messages`, `listing` | the shapes of the answers |
//! | `embeddings` | vectors instead of answers |
//! | `swarm` | what there is to see: the page at `/`, `/swarm` and its events |
//!
//! It keeps no prompt and logs none. It does not know where models come from: that is behind [`Models`].

mod answers;
mod ask;
mod body;
mod chat;
mod completions;
mod embeddings;
mod error;
mod extra;
mod fields;
mod frame;
mod guard;
mod impatient;
mod listing;
mod messages;
mod messages_in;
mod metrics;
mod models;
mod observe;
mod sampling;
mod server;
mod state;
pub mod swarm;
mod tools;

pub use error::ApiError;
pub use guard::Guard;
pub use models::{Asked, Embeds, Found, Listed, Models};
pub use node::keys::Keys;
pub use server::{Config, ServeError, Server, Tls};
