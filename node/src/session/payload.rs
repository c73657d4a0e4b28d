//! Between the worker's numbers and a frame's bytes: rows in, hidden rows or logits out.

use std::time::Duration;

use swarm_proto::{Answer, Content, Form, Logits, LogitsForm, Rows, WantRows, activation};

use super::{topk::TopK, wire::Pipe};

/// Puts one row of logits into the buffer towards the client.
pub(super) fn push_logits(
    answers: &mut Pipe,
    top: &mut TopK,
    rows: &Rows,
    pos: u32,
    row: &[f32],
    lse: f32,
    spent_us: u32,
) {
    let (header, found) = match rows.want.form {
        // The other is a row of another kind.
        Form::Full | Form::Normed => (LogitsForm::Full, None),
        Form::Top(k) => {
            let found = top.select(row, usize::from(k));
            (
                LogitsForm::Top {
                    k: found.len() as u16,
                    lse,
                },
                Some(found),
            )
        }
    };
    let n_vocab = row.len() as u32;
    let header = Logits {
        epoch: rows.epoch,
        pos,
        n_vocab,
        form: header,
        spent_us,
    };
    answers.push_with(&Answer::Logits(header), |out| match found {
        None => row
            .iter()
            .for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Some(found) => {
            for (id, logit) in found {
                out.extend_from_slice(&id.to_le_bytes());
                out.extend_from_slice(&logit.to_le_bytes());
            }
        }
    });
}

/// Puts hidden rows behind the last norm into the buffer towards the client: of `out`, which has one for each row of
/// the frame, those that it wants. Finite: the stage has looked.
pub(super) fn push_normed(
    answers: &mut Pipe,
    rows: &Rows,
    out: &[f32],
    n_embd: u32,
    spent_us: u32,
) {
    let all = out.chunks_exact(n_embd.max(1) as usize);
    let unwanted = match rows.want.rows {
        WantRows::None => all.len(),
        WantRows::Last => all.len().saturating_sub(1),
        WantRows::All => 0,
    };
    for (pos, row) in (rows.pos0..).zip(all).skip(unwanted) {
        let header = Logits {
            epoch: rows.epoch,
            pos,
            n_vocab: n_embd,
            form: LogitsForm::Normed,
            spent_us,
        };
        answers.push_with(&Answer::Logits(header), |out| {
            row.iter()
                .for_each(|x| out.extend_from_slice(&x.to_le_bytes()));
        });
    }
}

/// The payload as the worker takes it; `out` is a buffer to reuse. NaN and infinity end here: no C code sees them.
pub(super) fn decode(
    rows: &Rows,
    payload: &[u8],
    n_embd: u32,
    mut out: Vec<f32>,
) -> Result<engine::Rows, String> {
    match rows.content {
        Content::Tokens => {
            let (ids, _) = payload.as_chunks::<4>();
            Ok(engine::Rows::Tokens(
                ids.iter().map(|id| u32::from_le_bytes(*id)).collect(),
            ))
        }
        Content::Hidden(dtype) => {
            out.clear();
            activation::decode(payload, n_embd, dtype, &mut out).map_err(|e| e.to_string())?;
            Ok(engine::Rows::Hidden(out))
        }
    }
}

/// As it travels.
pub(super) fn micros(d: Duration) -> u32 {
    u32::try_from(d.as_micros()).unwrap_or(u32::MAX)
}
