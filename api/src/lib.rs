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
//! | `fields`, `ask`, `messages_in`, `sampling`, `tools` | from JSON to what is asked, each mistake by name |
//! | `answers` | what is asked, as a task that gives events |
//! | `chat`, `completions`, `messages`, `listing` | the shapes of the answers |
//!
//! It keeps no prompt and logs none. It does not know where models come from: that is behind [`Models`].

mod answers;
mod ask;
mod body;
mod chat;
mod completions;
mod error;
mod extra;
mod fields;
mod frame;
mod guard;
mod impatient;
mod listing;
mod messages;
mod messages_in;
mod models;
mod sampling;
mod server;
mod state;
mod tools;

pub use error::ApiError;
pub use guard::{Guard, Keys};
pub use models::{Asked, Found, Listed, Models};
pub use server::{Config, ServeError, Server, Tls};
