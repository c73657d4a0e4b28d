//! What goes on the wire: ids, messages, frames, limits. No I/O, no clock, no async, no libp2p.
//!
//! ```text
//! bytes ─▶ FrameDecoder ─▶ header ─▶ decode_header (codec) ─▶ a message that passed its check
//!                       └▶ payload ─▶ activation::decode ─▶ finite rows
//! ```
//!
//! Nothing is allocated on a peer's word: lengths are held against limits first.

pub mod activation;
pub mod advert;
pub mod codec;
pub mod expert_call;
pub mod experts;
pub mod fetch;
pub mod frame;
mod hash;
mod ids;
mod numerics;
mod protocol;
mod publisher;
pub mod session;
mod span;
pub mod ticket;
pub mod transfer;

pub use activation::ActivationError;
pub use advert::{Advert, AdvertError, Measured, ModelAdvert, SignedAdvert};
pub use codec::{CheckError, CodecError, Message};
pub use expert_call::{ExpertAsk, ExpertForm, ExpertGive, ExpertGroup, ExpertRefusal, ExpertRows};
pub use experts::{ExpertSet, ExpertSpan, ExpertsAdvert, HotExpert};
pub use fetch::{Fetch, Found, decode_snapshot, encode_snapshot};
pub use frame::{FrameDecoder, FrameError, FrameLimits, decode_header, encode_frame};
pub use hash::{Hash, HashError, ModelId, ShardId};
pub use ids::{Peer, PeerError, SwarmId, SwarmIdError};
pub use numerics::{Numerics, NumericsError};
pub use protocol::PROTOCOL_VERSION;
pub use publisher::{ModelSignature, ModelSignatureError};
pub use session::{
    Answer, Attach, Content, Down, Dtype, DtypeError, Epoch, Failure, FailureCode, Fault, Fork,
    Form, Hop, Logits, LogitsForm, Open, ROWS_MAX, Rows, SessionId, Standby, Standbys, TraceParent,
    Up, Want, WantRows,
};
pub use span::{LayerRange, LayerRangeError};
pub use ticket::{Ticket, TicketError};
pub use transfer::{Ask, Give};
