//! What may come next on a session: the pure part of a hop. No I/O, no clock.
//!
//! ```text
//! Rows ─▶ Ledger::accept ─▶ worker …        (wrong session, epoch, position, size: refused)
//! forwarded ─▶ Outbox::sent ─▶ … Ack ─▶ Outbox::acked   (an Ack that was not owed: refused)
//! ```

use std::collections::VecDeque;

use swarm_proto::{Content, Dtype, Epoch, ROWS_MAX, Rows, SessionId};

/// Why a frame is refused. The text goes to the other side, so it names value and limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    /// The frame belongs to another session.
    #[error("frame of session {got} on the stream of session {ours}")]
    Session {
        /// As the frame says.
        got: SessionId,
        /// As the open message said.
        ours: SessionId,
    },
    /// The frame belongs to another epoch.
    #[error("frame of epoch {got}, this session is at epoch {ours}")]
    Epoch {
        /// As the frame says.
        got: u32,
        /// As the open message said.
        ours: u32,
    },
    /// No rows, or too many.
    #[error("frame of {got} rows, 1 to {ROWS_MAX} are allowed")]
    RowCount {
        /// As the frame says.
        got: u32,
    },
    /// A gap: rows before this position have not been seen.
    #[error("frame at position {pos0}, this session holds {end} positions")]
    Gap {
        /// Where the frame starts.
        pos0: u32,
        /// How many positions are held.
        end: u32,
    },
    /// More positions than the session's context.
    #[error("frame of {n_rows} rows at position {pos0} exceeds the context of {n_ctx}")]
    Context {
        /// Where the frame starts.
        pos0: u32,
        /// Its rows.
        n_rows: u32,
        /// The limit.
        n_ctx: u32,
    },
    /// More whole rows of logits than may wait for a client.
    #[error(
        "frame of {n_rows} rows asks for the whole logits of each, {max} rows of {n_vocab} are allowed"
    )]
    Logits {
        /// Its rows.
        n_rows: u32,
        /// The limit for this vocabulary.
        max: u16,
        /// Floats in a row of logits.
        n_vocab: u32,
    },
    /// Token ids where hidden states belong, the reverse, or another dtype than agreed on.
    #[error("frame holds {got}, this hop was opened for {ours}")]
    Content {
        /// What the frame holds.
        got: String,
        /// What the open message said.
        ours: String,
    },
    /// The payload's length does not follow from the header.
    #[error("payload of {got} bytes, {expected} expected for {n_rows} rows")]
    Length {
        /// Bytes received.
        got: usize,
        /// Bytes that the header implies.
        expected: usize,
        /// The header's row count.
        n_rows: u32,
    },
}

/// One session as a hop sees its upstream.
#[derive(Debug, Clone)]
pub(super) struct Ledger {
    pub(super) session: SessionId,
    pub(super) epoch: Epoch,
    pub(super) n_ctx: u32,
    pub(super) n_embd: u32,
    pub(super) n_vocab: u32,
    /// What the upstream sends: token ids to the first hop, hidden states to the others.
    pub(super) content: Content,
    end: u32,
    rows_max: u32,
}

impl Ledger {
    pub(super) fn new(
        session: SessionId,
        epoch: Epoch,
        n_ctx: u32,
        (n_embd, n_vocab): (u32, u32),
        content: Content,
    ) -> Self {
        Self {
            session,
            epoch,
            n_ctx,
            n_embd,
            n_vocab,
            content,
            end: 0,
            rows_max: 1,
        }
    }

    /// Checks a frame and moves the end to behind its rows: writing truncates.
    pub(super) fn accept(&mut self, rows: &Rows, payload_len: usize) -> Result<(), BadFrame> {
        if rows.session != self.session {
            return Err(BadFrame::Session {
                got: rows.session,
                ours: self.session,
            });
        }
        if rows.epoch != self.epoch {
            return Err(BadFrame::Epoch {
                got: rows.epoch.0,
                ours: self.epoch.0,
            });
        }
        let (pos0, n_rows) = (rows.pos0, u32::from(rows.n_rows));
        if n_rows == 0 || n_rows > u32::from(ROWS_MAX) {
            return Err(BadFrame::RowCount { got: n_rows });
        }
        let max = rows.want.rows_max(self.n_vocab);
        if n_rows > u32::from(max) {
            return Err(BadFrame::Logits {
                n_rows,
                max,
                n_vocab: self.n_vocab,
            });
        }
        if pos0 > self.end {
            return Err(BadFrame::Gap {
                pos0,
                end: self.end,
            });
        }
        let end = pos0.checked_add(n_rows).filter(|end| *end <= self.n_ctx);
        let Some(end) = end else {
            return Err(BadFrame::Context {
                pos0,
                n_rows,
                n_ctx: self.n_ctx,
            });
        };
        if rows.content != self.content {
            return Err(BadFrame::Content {
                got: name(rows.content),
                ours: name(self.content),
            });
        }
        let expected = rows.payload_len(self.n_embd);
        if expected != payload_len {
            return Err(BadFrame::Length {
                got: payload_len,
                expected,
                n_rows,
            });
        }
        self.end = end;
        self.rows_max = self.rows_max.max(n_rows);
        Ok(())
    }

    /// A session that holds positions as it opens: a prompt's frames, which may be sent on.
    pub(super) fn begin_at(&mut self, held: u32) {
        self.end = held.min(self.n_ctx);
        if held > 0 {
            self.rows_max = ROWS_MAX.into();
        }
    }

    /// A higher epoch: positions from `resume` on come again.
    pub(super) fn reopen(&mut self, epoch: Epoch, resume: u32) {
        self.epoch = epoch;
        self.end = self.end.min(resume);
    }

    /// Positions that this hop holds.
    pub(super) fn end(&self) -> u32 {
        self.end
    }

    /// Rows of the largest frame so far: what deadlines scale with. The same at every hop of a
    /// chain, which is what makes deadlines nest.
    pub(super) fn rows_max(&self) -> u32 {
        self.rows_max
    }
}

fn name(content: Content) -> String {
    match content {
        Content::Tokens => "token ids".into(),
        Content::Hidden(Dtype::F32) => "hidden states in f32".into(),
        Content::Hidden(Dtype::Bf16) => "hidden states in bf16".into(),
        Content::Hidden(Dtype::Q8_0) => "hidden states in q8_0".into(),
    }
}

/// Frames forwarded and not yet acknowledged, oldest first. Acknowledgements come one a frame, in
/// order, so each is checked against the oldest.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    owed: VecDeque<u32>,
}

/// An acknowledgement that nothing was sent for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("acknowledged position {got} of epoch {epoch}, owed was {owed}")]
pub struct BadAck {
    /// The position acknowledged.
    pub got: u32,
    /// The epoch acknowledged.
    pub epoch: u32,
    /// What was owed.
    pub owed: String,
}

impl Outbox {
    pub(super) fn sent(&mut self, pos_end: u32) {
        self.owed.push_back(pos_end);
    }

    pub(super) fn len(&self) -> usize {
        self.owed.len()
    }

    /// Everything is out: nobody below acknowledges.
    pub(super) fn clear(&mut self) {
        self.owed.clear();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.owed.is_empty()
    }

    pub(super) fn acked(&mut self, ours: Epoch, epoch: Epoch, pos_end: u32) -> Result<(), BadAck> {
        let bad = |owed: String| BadAck {
            got: pos_end,
            epoch: epoch.0,
            owed,
        };
        match self.owed.front() {
            Some(owed) if *owed == pos_end && ours == epoch => {
                self.owed.pop_front();
                Ok(())
            }
            Some(owed) => Err(bad(format!("position {owed} of epoch {}", ours.0))),
            None => Err(bad("nothing".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swarm_proto::{Form, Want, WantRows};

    #[test]
    fn whole_logits_of_many_rows_of_a_large_vocabulary_are_refused() {
        let accepts = |n_vocab, n_rows, rows, form| {
            let (session, epoch) = (SessionId([1; 16]), Epoch(0));
            let mut ledger = Ledger::new(session, epoch, 512, (8, n_vocab), Content::Tokens);
            let want = Want { rows, form };
            let rows = Rows {
                session,
                epoch,
                pos0: 0,
                n_rows,
                content: Content::Tokens,
                want,
                spent_us: 0,
            };
            ledger.accept(&rows, 4 * usize::from(n_rows)).is_ok()
        };
        let (all, last) = (WantRows::All, WantRows::Last);
        assert!(accepts(128 * 1024, 8, all, Form::Full));
        assert!(!accepts(128 * 1024, 9, all, Form::Full));
        assert!(accepts(128 * 1024, 32, all, Form::Top(4096)));
        assert!(accepts(128 * 1024, 32, last, Form::Full));
        assert!(accepts(u32::MAX, 1, all, Form::Full), "one row always goes");
        assert!(accepts(97, 32, all, Form::Full));
    }
}
