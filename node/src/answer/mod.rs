//! From a prompt to an answer: tokens in, candidates out of a session or of the whole model here, chosen tokens as
//! text. The commands and the HTTP server answer through this one piece.
//!
//! ```text
//! prompt ─▶ token ids ─▶ Answering ─▶ pieces (token, text, its row)
//!                         │     ▲
//!                         ▼     │ candidates
//!                        Source: a session over the swarm, or the whole model in this process
//! ```
//!
//! It prints nothing, and knows no flags and no HTTP.

mod answering;
mod cancel;
mod embedding;
mod fed;
mod prompt;
mod source;
mod text_out;

pub use answering::{Answer, Answering, Piece, Question, Stop, Words, keep, top};
pub use cancel::Cancel;
pub use fed::Fed;
pub use prompt::{PromptError, n_ctx, not_empty, of_chat, of_text};
pub use source::{Left, Row, Source, SourceError, Spare};
pub use text_out::TextOut;
