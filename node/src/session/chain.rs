//! Opens the next hop of a route, for the client and for every hop: over a stream there is already,
//! or over a new one.

use std::time::Duration;

use swarm_proto::{Down, Failure, FailureCode, Fault, Open, Up};
use tokio::time::{Instant, timeout, timeout_at};

use super::{
    failure::{clamp, fail},
    hop::dial_code,
    limits::UP,
    wire::{Pipe, WireError},
};
use crate::net::{OpenError, Stream};

/// For a stream to a hop of another route, where an answer is waited for: three round trips of a slow link.
const REDIAL: Duration = Duration::from_secs(2);

/// What every hop of a route must say of the model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// Numbers in a hidden row.
    pub(super) n_embd: u32,
    /// Tokens in the vocabulary.
    pub(super) n_vocab: u32,
}

/// A hop that is open.
pub(super) struct Next {
    pub(super) pipe: Pipe,
    /// Positions that it holds.
    pub(super) held: u32,
}

/// Opens hop `open.at` of the route. `current` is a stream on which it holds the session already;
/// where that is gone, or there is none, `dial` brings one.
pub(super) async fn open_next(
    open: &Open,
    shape: Shape,
    current: Option<Pipe>,
    deadline: Instant,
    dial: impl AsyncFnOnce() -> Result<Stream, OpenError>,
) -> Result<Next, Failure> {
    let lost = |code, message: String| fail(open.at, Fault::Peer, code, message);
    let late = |_| lost(FailureCode::Deadline, "it did not open in time".into());
    if let Some(pipe) = current {
        match timeout_at(deadline, ask(pipe, open, shape, SILENCE_HELD))
            .await
            .map_err(late)?
        {
            // The stream is gone, perhaps not the hop.
            Err(gone) if gone.at == open.at && gone.code == FailureCode::DownstreamLost => {}
            asked => return asked,
        }
    }
    let dialled = match open.epoch.0 {
        0 => deadline,
        // There may be others who are there.
        _ => deadline.min(Instant::now() + REDIAL),
    };
    let stream = timeout_at(dialled, dial()).await.map_err(late)?;
    let stream = stream.map_err(|e| lost(dial_code(&e), e.to_string()))?;
    let asked = ask(Pipe::new(stream, UP), open, shape, SILENCE_NEW);
    timeout_at(deadline, asked).await.map_err(late)?
}

/// A hop that opens a session again says so every beat until the chain below it is open: one that is
/// silent this long is dead, frozen or cut off. A slow link's round trip, and two beats.
const SILENCE_NEW: Duration = Duration::from_millis(1200);
/// The same for one that holds the session already: it has nothing to set up, as between two frames.
const SILENCE_HELD: Duration = Duration::from_millis(600);

async fn ask(
    mut pipe: Pipe,
    open: &Open,
    shape: Shape,
    silence: Duration,
) -> Result<Next, Failure> {
    let lost = |code, message: String| fail(open.at, Fault::Peer, code, message);
    let gone = |why: &dyn std::fmt::Display| lost(FailureCode::DownstreamLost, why.to_string());
    pipe.push(&Down::Open(open.clone()));
    pipe.flush().await.map_err(|e| gone(&e))?;
    loop {
        let frame = match open.epoch.0 {
            0 => pipe.frame::<Up>().await,
            _ => match timeout(silence, pipe.frame::<Up>()).await {
                Ok(frame) => frame,
                Err(_) => {
                    let why = format!("it was silent for {silence:?} while opening");
                    return Err(lost(FailureCode::Deadline, why));
                }
            },
        };
        return match frame {
            // What was under way in the epoch before.
            Ok(Some(Up::Ack { epoch, .. })) if epoch < open.epoch => continue,
            Ok(Some(Up::Lost { epoch, .. })) if epoch < open.epoch => continue,
            Ok(Some(Up::Working)) if open.epoch.0 > 0 => continue,
            Ok(Some(Up::Opened {
                n_embd,
                n_vocab,
                held,
            })) => {
                let refused = check(open, shape, (n_embd, n_vocab), held);
                match refused {
                    None => Ok(Next { pipe, held }),
                    Some(why) => Err(lost(FailureCode::BadFrame, why)),
                }
            }
            Ok(Some(Up::Failed(failure) | Up::Lost { failure, .. })) => {
                Err(clamp(failure, open.at, open.hops.len()))
            }
            Ok(Some(Up::Ack { .. } | Up::Working)) => {
                let why = "it acknowledged before it opened";
                Err(lost(FailureCode::BadFrame, why.into()))
            }
            Ok(None) => Err(gone(&"it closed the stream while opening")),
            Err(WireError::Frame(e)) => Err(lost(FailureCode::BadFrame, e.to_string())),
            Err(e) => Err(gone(&e)),
        };
    }
}

fn check(open: &Open, shape: Shape, told: (u32, u32), held: u32) -> Option<String> {
    let n_embd = shape.n_embd;
    if told != (n_embd, shape.n_vocab) {
        return Some(format!(
            "it opened with n_embd {} and n_vocab {}, the model has {n_embd} and {}",
            told.0, told.1, shape.n_vocab
        ));
    }
    let max = open.held_max();
    if held > max {
        return Some(format!(
            "it holds {held} positions of a session that goes on at {max}"
        ));
    }
    None
}
