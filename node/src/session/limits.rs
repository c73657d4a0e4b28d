//! How large a frame may be in each state: refused by its length before a byte of it is kept.

use swarm_proto::{
    Dtype, FrameLimits, ROWS_MAX,
    session::{OPEN_BYTES_MAX, SESSION_HEADER_MAX},
};

use super::chain::Shape;

// A frame is a step.
const _: () = assert!(ROWS_MAX as u32 == engine::PREFILL_CHUNK);

/// The first message of a session stream.
pub(super) const OPEN: FrameLimits = FrameLimits {
    header_max: OPEN_BYTES_MAX,
    payload_max: 0,
};
/// What comes back up: the largest is a failure with its text.
pub(super) const UP: FrameLimits = FrameLimits {
    header_max: SESSION_HEADER_MAX,
    payload_max: 0,
};
/// What a client says on its answer stream.
pub(super) const ATTACH: FrameLimits = FrameLimits {
    header_max: 128,
    payload_max: 0,
};

/// Rows towards a hop, once the session is open: dimensions are known and checked by then.
pub(super) fn down_rows(n_embd: u32) -> FrameLimits {
    let row = Dtype::F32.row_len(n_embd).max(size_of::<u32>());
    FrameLimits {
        // The session may be opened again on the same stream.
        header_max: OPEN_BYTES_MAX,
        payload_max: usize::from(ROWS_MAX) * row,
    }
}

/// Logits, or what comes instead, towards the client.
pub(super) fn answers(shape: Shape) -> FrameLimits {
    // A pair of id and logit is twice a logit, and k is at most 65,535 and the vocabulary.
    let logits = shape.n_vocab as usize * 8;
    FrameLimits {
        header_max: SESSION_HEADER_MAX,
        payload_max: logits.max(Dtype::F32.row_len(shape.n_embd)),
    }
}
