//! What a session's two streams carry: the session stream from hop to hop (`Down` with the rows,
//! `Up` against them) and the answer stream, which the client opens to the tail.
//!
//! ```text
//! client ──Down──▶ hop 0 ──Down──▶ … ──Down──▶ tail ──Answer──▶ client
//!        ◀──Up──         ◀──Up──       ◀──Up──      ◀──Attach──
//! ```
//!
//! A session outlives its streams. When a hop is lost, those above say so and keep what they hold;
//! the client opens the same session again in a higher epoch, along a route around the lost one.
//! Hops that are on both routes keep their KV, and each link goes on where the lower side stands.
//!
//! A standby is a hop that is opened before it is needed: whoever is before the hop it stands by for
//! sends it the same rows, and it has nobody below until the session is opened again with it.

use std::fmt;

use bincode::{Decode, Encode};
use serde::Serialize;

use crate::{
    LayerRange, ModelId, Peer,
    codec::{CheckError, Message, at_most, cut_text, wrong},
    numerics::Numerics,
};

/// Most hops of a route: `at` is a byte, and no model we know has more layers.
pub const HOPS_MAX: usize = 128;
/// Most addresses of a hop: a peer behind more is not reachable through the fifth either.
pub const HOP_ADDRS_MAX: usize = 4;
/// Most standbys of a route: with their addresses they must fit into the open message beside the hops.
pub const STANDBYS_MAX: usize = 16;
/// Longest address: a DNS name, a port, a transport and a peer id stay below.
pub const ADDR_BYTES_MAX: usize = 128;
/// Most rows of one frame: what an engine takes in one step, so that a hop buffers no frame that it
/// would refuse.
pub const ROWS_MAX: u16 = 32;
/// Most logits of a `Top` row: samplers rarely look past some hundred.
pub const TOP_MAX: u16 = 4096;
/// Most bytes of whole rows of logits that one frame may ask for, where it asks for several: they wait
/// at the tail until the client reads them. Eight rows of a vocabulary of 131,072.
pub const LOGITS_BYTES_MAX: usize = 4 << 20;
/// Longest text of a failure.
pub const FAILURE_BYTES_MAX: usize = 512;
/// Largest header of a session or answer stream once the session is open.
pub const SESSION_HEADER_MAX: usize = 1024;
/// Largest open message: a frame's header length is a `u16`.
pub const OPEN_BYTES_MAX: usize = 60 * 1024;

/// A session: drawn at random by the client.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode)]
pub struct SessionId(pub [u8; 16]);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({self})")
    }
}

/// A number that only the client raises: frames of an older one are refused.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Encode, Decode,
)]
pub struct Epoch(pub u32);

/// How numbers of hidden states are written on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Encode, Decode)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// Four bytes each, exact.
    F32,
    /// The upper half of an f32: its range, 8 bits of precision.
    Bf16,
    /// Blocks of 32: an f16 scale and 32 signed bytes, as ggml's `q8_0`.
    Q8_0,
}

impl Dtype {
    /// Bytes of one row of `n` numbers.
    pub fn row_len(self, n: u32) -> usize {
        let n = n as usize;
        match self {
            Dtype::F32 => 4 * n,
            Dtype::Bf16 => 2 * n,
            Dtype::Q8_0 => n.div_ceil(32) * 34,
        }
    }

    /// As the user writes it.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
            Dtype::Q8_0 => "q8_0",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a text is no dtype.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a wire type: f32, bf16 or q8_0")]
pub struct DtypeError {
    /// What was given, shortened.
    pub text: String,
}

impl std::str::FromStr for Dtype {
    type Err = DtypeError;

    fn from_str(text: &str) -> Result<Self, DtypeError> {
        [Dtype::F32, Dtype::Bf16, Dtype::Q8_0]
            .into_iter()
            .find(|dtype| dtype.name() == text)
            .ok_or_else(|| DtypeError {
                text: text.chars().take(32).collect(),
            })
    }
}

/// A W3C trace parent without its text form: version, trace id, span id, flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct TraceParent(pub [u8; 25]);

impl TraceParent {
    /// From the ids of a span.
    pub fn new(trace_id: [u8; 16], span_id: [u8; 8], sampled: bool) -> Self {
        let mut bytes = [0; 25];
        bytes[..16].copy_from_slice(&trace_id);
        bytes[16..24].copy_from_slice(&span_id);
        bytes[24] = sampled.into();
        Self(bytes)
    }

    /// The trace's id.
    pub fn trace_id(&self) -> [u8; 16] {
        std::array::from_fn(|i| self.0[i])
    }

    /// The parent span's id.
    pub fn span_id(&self) -> [u8; 8] {
        std::array::from_fn(|i| self.0[16 + i])
    }

    /// Whether the trace is recorded.
    pub fn sampled(&self) -> bool {
        self.0[24] & 1 == 1
    }
}

/// One element of a route.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Hop {
    /// Who computes.
    pub peer: Peer,
    /// Where it may be reached; the dialler may know more.
    pub addrs: Vec<String>,
    /// What it computes.
    pub layers: LayerRange,
}

/// Another holder of a hop's layers, who can take its place at once.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Standby {
    /// For which hop of the route.
    pub at: u8,
    /// Who.
    pub peer: Peer,
    /// As a hop's.
    pub addrs: Vec<String>,
}

/// Who stands by on a route.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Standbys {
    /// At most one for each hop, in order.
    pub peers: Vec<Standby>,
    /// Decoded rows that are sent to a standby as one frame: more than one only where the model's kernels
    /// give them the same bits as one by one. 0 is 1.
    pub batch: u16,
}

impl Standbys {
    /// Who stands by for hop `at`.
    pub fn of(&self, at: u8) -> Option<&Standby> {
        self.peers.iter().find(|standby| standby.at == at)
    }

    fn check_shape(&self, hops: &[Hop]) -> Result<(), CheckError> {
        at_most("standbys of a route", self.peers.len(), STANDBYS_MAX)?;
        at_most("rows of a batch", self.batch.into(), ROWS_MAX.into())?;
        let mut next = 0;
        for standby in &self.peers {
            check_addrs(&standby.addrs, HOP_ADDRS_MAX)?;
            let at = usize::from(standby.at);
            if at < next || at >= hops.len() {
                let hops = hops.len();
                return Err(wrong(format!("a standby for hop {at} of {hops}")));
            }
            let on_the_route = hops.iter().any(|hop| hop.peer == standby.peer);
            let earlier = self.peers.iter().take_while(|other| other.at < standby.at);
            if on_the_route || earlier.clone().any(|other| other.peer == standby.peer) {
                return Err(wrong(format!(
                    "the standby for hop {at} has another part in the route"
                )));
            }
            next = at + 1;
        }
        Ok(())
    }
}

/// Another session of the same client, whose beginning a new one takes over instead of computing it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Fork {
    /// Which.
    pub session: SessionId,
    /// Its epoch. A hop that holds it in another one may hold what was taken back.
    pub epoch: Epoch,
    /// So many of its positions at most. The client does not write them anew before the new session is open.
    pub positions: u32,
}

/// Opens a session on a hop, which opens the next hop in turn; or, in a higher epoch, opens it again:
/// a hop that holds the session for the same layers keeps what it holds before `resume`.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Open {
    /// The session.
    pub session: SessionId,
    /// Frames of an older one are refused from now on.
    pub epoch: Epoch,
    /// Positions from here on are sent again by the client; 0 when the session is opened first.
    pub resume: u32,
    /// The last epoch in which rows ran. A hop that was not there holds nothing of use: what it has may
    /// have been written anew since.
    pub since: Epoch,
    /// What it begins with, when it is opened first: a hop that holds that session for the same layers copies
    /// it, any other begins empty.
    pub fork: Option<Fork>,
    /// Who may attach to the tail.
    pub client: Peer,
    /// The model.
    pub model: ModelId,
    /// Positions to reserve.
    pub n_ctx: u32,
    /// How hidden states are written between hops.
    pub dtype: Dtype,
    /// What may be done with its numbers.
    pub numerics: Numerics,
    /// The whole route.
    pub hops: Vec<Hop>,
    /// Which hop this message is for.
    pub at: u8,
    /// Who stands by; each is opened by the hop before, or by the client.
    pub standbys: Standbys,
    /// The hop this message is for stands by: it computes and keeps what it is sent, and opens nobody
    /// below.
    pub standing_by: bool,
    /// The sender's span.
    pub trace: Option<TraceParent>,
}

impl Open {
    /// Holds the route against the model: contiguous from layer 0 to `n_layer`.
    ///
    /// # Errors
    /// The first gap, overlap or wrong end.
    pub fn check(&self, n_layer: u16) -> Result<(), CheckError> {
        self.check_shape()?;
        let end = self.hops.last().map_or(0, |hop| hop.layers.end);
        if end == n_layer {
            return Ok(());
        }
        Err(wrong(format!(
            "the route ends at layer {end}, the model has {n_layer}"
        )))
    }

    fn check_shape(&self) -> Result<(), CheckError> {
        at_most("hops of a route", self.hops.len(), HOPS_MAX)?;
        if usize::from(self.at) >= self.hops.len() {
            let (at, hops) = (self.at, self.hops.len());
            return Err(wrong(format!("hop {at} of a route of {hops} hops")));
        }
        if self.n_ctx == 0 {
            return Err(wrong("a context of 0 positions"));
        }
        if self.since > self.epoch {
            let (since, epoch) = (self.since.0, self.epoch.0);
            return Err(wrong(format!(
                "epoch {epoch} of a session that ran in {since}"
            )));
        }
        if self.resume > self.n_ctx {
            let (resume, n_ctx) = (self.resume, self.n_ctx);
            return Err(wrong(format!(
                "a session of {n_ctx} positions resumed at {resume}"
            )));
        }
        if let Some(fork) = self.fork {
            self.check_fork(fork)?;
        }
        let mut next = 0;
        for (i, hop) in self.hops.iter().enumerate() {
            check_addrs(&hop.addrs, HOP_ADDRS_MAX)?;
            let layers = hop.layers;
            if layers.start != next || layers.is_empty() {
                return Err(wrong(format!(
                    "hop {i} of the route has layers {layers}, {next} comes next"
                )));
            }
            next = layers.end;
        }
        self.standbys.check_shape(&self.hops)
    }

    fn check_fork(&self, fork: Fork) -> Result<(), CheckError> {
        if fork.positions > self.n_ctx {
            let (positions, n_ctx) = (fork.positions, self.n_ctx);
            return Err(wrong(format!(
                "a session of {n_ctx} positions forked at {positions}"
            )));
        }
        if fork.session == self.session {
            return Err(wrong("a session forked from itself"));
        }
        if self.epoch > Epoch(0) {
            let epoch = self.epoch.0;
            return Err(wrong(format!("a session forked in epoch {epoch}")));
        }
        Ok(())
    }

    /// Positions that a hop may hold when it opens: no more than there are of the session.
    pub fn held_max(&self) -> u32 {
        self.fork.map_or(self.resume, |fork| fork.positions)
    }
}

pub(crate) fn check_addrs(addrs: &[String], max: usize) -> Result<(), CheckError> {
    at_most("addresses of a peer", addrs.len(), max)?;
    addrs
        .iter()
        .try_for_each(|addr| at_most("bytes of an address", addr.len(), ADDR_BYTES_MAX))
}

/// What the payload of a `Rows` frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Content {
    /// Token ids, `u32` LE each: to the first hop.
    Tokens,
    /// Hidden states, row after row: to the others.
    Hidden(Dtype),
}

/// For which rows of a frame the client wants logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum WantRows {
    /// None: prefill.
    None,
    /// The last one.
    Last,
    /// Every one: verifying drafts, perplexity.
    All,
}

/// How logits are returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Form {
    /// The largest so many, with the log-sum-exp of the row.
    Top(u16),
    /// The whole row.
    Full,
    /// No logits: the hidden row behind the last norm, from which embeddings are made.
    Normed,
}

/// Which logits the client wants of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Want {
    /// Of which rows.
    pub rows: WantRows,
    /// In which form.
    pub form: Form,
}

impl Want {
    /// No logits.
    pub const NONE: Want = Want {
        rows: WantRows::None,
        form: Form::Full,
    };

    /// Rows that one frame with this wish may have, for a model of `n_vocab` tokens: as many as any
    /// frame, but for whole rows of logits not more than [`LOGITS_BYTES_MAX`] holds, and one always.
    pub fn rows_max(self, n_vocab: u32) -> u16 {
        if self.rows != WantRows::All || self.form != Form::Full {
            return ROWS_MAX;
        }
        let fit = LOGITS_BYTES_MAX / 4 / n_vocab.max(1) as usize;
        u16::try_from(fit).unwrap_or(ROWS_MAX).clamp(1, ROWS_MAX)
    }
}

/// Header of a frame of rows; the payload's length follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Rows {
    /// The session.
    pub session: SessionId,
    /// Its epoch.
    pub epoch: Epoch,
    /// Position of the first row. Writing there truncates what the KV holds from there on.
    pub pos0: u32,
    /// Number of rows, 1 to [`ROWS_MAX`].
    pub n_rows: u16,
    /// What they are.
    pub content: Content,
    /// What is to come back.
    pub want: Want,
    /// Time spent computing this frame on the hops so far, in µs.
    pub spent_us: u32,
}

impl Rows {
    /// Bytes of the payload for a model of `n_embd` numbers a row.
    pub fn payload_len(&self, n_embd: u32) -> usize {
        let row = match self.content {
            Content::Tokens => 4,
            Content::Hidden(dtype) => dtype.row_len(n_embd),
        };
        row.saturating_mul(self.n_rows.into())
    }

    fn check_shape(&self) -> Result<(), CheckError> {
        if self.n_rows == 0 {
            return Err(wrong("a frame of 0 rows"));
        }
        at_most("rows of a frame", self.n_rows.into(), ROWS_MAX.into())?;
        if self.pos0.checked_add(self.n_rows.into()).is_none() {
            return Err(wrong(format!("rows beyond position {}", u32::MAX)));
        }
        match self.want.form {
            Form::Top(0) => Err(wrong("the top 0 of the logits")),
            Form::Top(k) => at_most("logits of a row", k.into(), TOP_MAX.into()),
            Form::Full | Form::Normed => Ok(()),
        }
    }
}

/// Down the route.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Down {
    /// The first message of a stream.
    Open(Open),
    /// Rows, with a payload.
    Rows(Rows),
    /// The session is over: its KV may go.
    Close,
}

impl Message for Down {
    const NAME: &'static str = "session message";
    const BYTES_MAX: usize = OPEN_BYTES_MAX;

    fn check(&self) -> Result<(), CheckError> {
        match self {
            Down::Open(open) => open.check_shape(),
            Down::Rows(rows) => rows.check_shape(),
            Down::Close => Ok(()),
        }
    }
}

/// Up the route.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Up {
    /// This hop and all below are ready.
    Opened {
        /// Numbers in a row, as this hop and all below have it.
        n_embd: u32,
        /// Tokens in the vocabulary, as this hop and all below have it.
        n_vocab: u32,
        /// Positions that this hop holds: its upstream goes on from here.
        held: u32,
    },
    /// Rows before `pos_end` were computed and forwarded.
    Ack {
        /// Of this epoch.
        epoch: Epoch,
        /// One after the last position.
        pos_end: u32,
    },
    /// The session is over: nothing is kept.
    Failed(Failure),
    /// The route below is broken; what this hop and those above hold is kept for a while, so that
    /// the session can be opened again.
    Lost {
        /// In this epoch.
        epoch: Epoch,
        /// What broke.
        failure: Failure,
    },
    /// Nothing is ready yet, and this hop is at work on it.
    Working,
}

impl Message for Up {
    const NAME: &'static str = "session reply";
    const BYTES_MAX: usize = SESSION_HEADER_MAX;

    fn check(&self) -> Result<(), CheckError> {
        match self {
            Up::Lost { failure, .. } | Up::Failed(failure) => failure.check(),
            Up::Opened { .. } | Up::Ack { .. } | Up::Working => Ok(()),
        }
    }
}

/// The client claims a session's answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Attach {
    /// The session.
    pub session: SessionId,
    /// Its epoch.
    pub epoch: Epoch,
}

impl Message for Attach {
    const NAME: &'static str = "attach message";
    const BYTES_MAX: usize = 64;
}

/// From the tail to the client.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum Answer {
    /// Logits will come on this stream.
    Attached,
    /// One row of logits, with a payload.
    Logits(Logits),
    /// The session is over.
    Failed(Failure),
}

impl Message for Answer {
    const NAME: &'static str = "answer";
    const BYTES_MAX: usize = SESSION_HEADER_MAX;

    fn check(&self) -> Result<(), CheckError> {
        match self {
            Answer::Attached => Ok(()),
            Answer::Logits(logits) => logits.check(),
            Answer::Failed(failure) => failure.check(),
        }
    }
}

/// Header of a row of logits; the payload's length follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Encode, Decode)]
pub struct Logits {
    /// The session's epoch.
    pub epoch: Epoch,
    /// Position of the row that the logits belong to.
    pub pos: u32,
    /// Numbers in a whole row.
    pub n_vocab: u32,
    /// What the payload holds.
    pub form: LogitsForm,
    /// Time spent computing this row on all hops, in µs.
    pub spent_us: u32,
}

/// What the payload of a row of logits holds.
#[derive(Debug, Clone, Copy, PartialEq, Encode, Decode)]
pub enum LogitsForm {
    /// `k` pairs of (`u32` LE token, `f32` LE logit), the largest logit first.
    Top {
        /// Number of pairs.
        k: u16,
        /// Log-sum-exp of the whole row: what is missing for probabilities.
        lse: f32,
    },
    /// `n_vocab` numbers, `f32` LE.
    Full,
    /// The same, but they are the hidden row behind the last norm: `n_vocab` counts its numbers.
    Normed,
}

impl Logits {
    /// Bytes of the payload.
    pub fn payload_len(&self) -> usize {
        match self.form {
            LogitsForm::Top { k, .. } => 8 * usize::from(k),
            LogitsForm::Full | LogitsForm::Normed => (self.n_vocab as usize).saturating_mul(4),
        }
    }

    fn check(&self) -> Result<(), CheckError> {
        match self.form {
            LogitsForm::Full | LogitsForm::Normed => Ok(()),
            LogitsForm::Top { lse, .. } if !lse.is_finite() => {
                Err(wrong(format!("a log-sum-exp of {lse}")))
            }
            LogitsForm::Top { k, .. } => at_most("logits of a row", k.into(), TOP_MAX.into()),
        }
    }
}

/// Who was wrong, as the reporting hop sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// Another peer that the reporter depends on.
    Peer,
    /// The reporter itself.
    Local,
    /// Whoever asked.
    Caller,
}

/// What went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// The model is not served here.
    UnknownModel,
    /// The model is served here, these layers are not.
    LayersNotHeld,
    /// No room for another session, or for one so large.
    Full,
    /// A frame that breaks the protocol.
    BadFrame,
    /// A session, or an epoch, that is not open here.
    WrongSession,
    /// Something did not come in time.
    Deadline,
    /// The next hop, or the client's answer stream, is gone.
    DownstreamLost,
    /// The computation failed.
    Engine,
    /// This node takes no new sessions: it is leaving, or paused by its owner.
    ShuttingDown,
    /// The other side speaks another version.
    Version,
    /// What would have to be sent again was not kept.
    NotRetained,
    /// The session ran here and is given up in good order, to go on elsewhere: its layers leave, or its owner wants
    /// the machine for something else. Nobody is at fault.
    HandedOver,
}

/// Why a session is over.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, thiserror::Error)]
#[error("hop {at}: {message}")]
pub struct Failure {
    /// The hop it is about.
    pub at: u8,
    /// Who was wrong.
    pub fault: Fault,
    /// What went wrong.
    pub code: FailureCode,
    /// The cause in words, at most [`FAILURE_BYTES_MAX`] bytes.
    pub message: String,
}

impl Failure {
    /// A failure; the text is cut to what a message may carry.
    pub fn new(at: u8, fault: Fault, code: FailureCode, message: impl Into<String>) -> Self {
        let mut message = message.into();
        cut_text(&mut message, FAILURE_BYTES_MAX);
        Self {
            at,
            fault,
            code,
            message,
        }
    }

    fn check(&self) -> Result<(), CheckError> {
        at_most(
            "bytes of a failure's text",
            self.message.len(),
            FAILURE_BYTES_MAX,
        )
    }
}
