//! Experts of a mixture that are somewhere else than the rest of their layer.
//!
//! ```text
//! trunk: attention, router, shared experts              holders: experts
//!   llama.cpp ─ MUL_MAT_ID … GLU … ─▶ block ─▶ dispatch ─▶ ExpertHolders ─▶ ExpertHolder
//!             ◀──────────── rows, in the order of the picks ◀─────────────┘
//! ```
//!
//! The trunk is stock llama.cpp: the experts' tensors are mapped to a buffer
//! without storage, so its scheduler gives what is computed with them to a
//! backend of ours (`llama::experts`). Messages are plain: who carries them to
//! which machine is not the engine's business.
//!
//! What makes the result exact: a holder runs the operations of the trunk's own
//! graph, on weights that lie in memory as llama.cpp would lay them, and all
//! rows that one call has for one expert go to one holder, together. ggml
//! chooses its kernel by the number of rows.

mod block;
mod dispatch;
mod holder;
mod in_process;
mod message;
mod tensors;
mod trunk;
mod worker;

pub(crate) use block::{Glu, Node, Op, Source, Unary, recognise};
pub(crate) use dispatch::{Picks, dispatch};
pub(crate) use tensors::{Kind, PATTERN, Part, Weight};

pub use dispatch::{ExpertHolders, HolderId};
pub use holder::{ExpertHolder, HolderStats, LoadedExpert};
pub use in_process::{ExpertUse, InProcess, Placement};
pub use message::{Activation, ExpertCall, ExpertError, ExpertReply, Form, Group};
pub use tensors::{ExpertLayout, ExpertSource, Parts};
pub use worker::{ExpertWorker, HolderReply, Rest};
