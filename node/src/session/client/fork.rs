//! What a session says of its beginning, so that another one of this client can begin with it; and how that begins.

use std::sync::Arc;

use engine::PREFILL_CHUNK;
use swarm_proto::{Epoch, Fork, SessionId, Want};
use tokio::sync::watch;

use super::{Chunk, ClientSession, Frame};
use crate::session::open::Route;

/// The beginning of a session in whole frames of [`PREFILL_CHUNK`] tokens: a prompt that begins as it would have gone
/// in the same frames, so that the bits are the same.
#[derive(Debug, Clone)]
pub struct Beginning {
    session: SessionId,
    epoch: Epoch,
    route: Route,
    tokens: Arc<[u32]>,
    computed: u32,
}

/// Where a session says it, whenever it changes; dropped when the session is over.
pub type Lender = watch::Sender<Option<Beginning>>;

impl Beginning {
    /// Its tokens, as far as they were fed.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// How many of them the first hop has computed, and holds for sure.
    pub fn computed(&self) -> u32 {
        self.computed.min(self.tokens.len() as u32)
    }

    /// Whole frames that both begin with, in tokens, but never all of `prompt`: the logits of its last one are needed.
    pub fn common(tokens: &[u32], prompt: &[u32]) -> u32 {
        let same = tokens.iter().zip(prompt).take_while(|(a, b)| a == b);
        let same = same.count().min(prompt.len().saturating_sub(1));
        u32::try_from(same).unwrap_or(u32::MAX) / PREFILL_CHUNK * PREFILL_CHUNK
    }

    /// Along which peers.
    pub(crate) fn route(&self) -> &Route {
        &self.route
    }

    /// Its first `positions`, in whole frames, as a hop is asked for them; and their tokens.
    pub(in crate::session) fn fork(&self, positions: u32) -> (Fork, &[u32]) {
        let positions = positions.min(self.computed()) / PREFILL_CHUNK * PREFILL_CHUNK;
        let fork = Fork {
            session: self.session,
            epoch: self.epoch,
            positions,
        };
        (fork, &self.tokens[..positions as usize])
    }
}

/// What a session keeps of its own beginning.
#[derive(Debug, Default)]
pub(super) struct Lending {
    to: Option<Lender>,
    /// Where its whole frames end.
    whole: u32,
    /// What the first hop acknowledged.
    acked: u32,
    /// What was said last: epoch, whole frames, and how far they were computed.
    said: Option<(Epoch, u32, u32)>,
}

impl ClientSession {
    /// Says its beginning to `to` from now on.
    pub fn lend(&mut self, to: Lender) {
        self.lending.to = Some(to);
        self.lending.said = None;
        self.say_beginning();
    }

    /// Positions that the first hop took over from another session as this one was opened.
    pub fn spared(&self) -> u32 {
        self.spared
    }

    /// Everything fed, by position.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// A frame was fed.
    pub(super) fn lend_frame(&mut self, pos0: u32, n_rows: u32) {
        if pos0 == self.lending.whole && n_rows == PREFILL_CHUNK {
            self.lending.whole += n_rows;
        }
    }

    /// The session forgot what it holds from `pos` on.
    pub(super) fn lend_no_more(&mut self, pos: u32) {
        let whole = pos / PREFILL_CHUNK * PREFILL_CHUNK;
        if whole < self.lending.whole {
            self.lending.whole = whole;
            self.lending.said = None;
        }
        self.lending.acked = self.lending.acked.min(pos);
        self.say_beginning();
    }

    /// The first hop holds positions up to `pos`.
    pub(super) fn lend_computed(&mut self, pos: u32) {
        self.lending.acked = pos;
        self.say_beginning();
    }

    /// Tells whoever listens, if there is anything new.
    pub(super) fn say_beginning(&mut self) {
        let Some(to) = &self.lending.to else {
            return;
        };
        let whole = self.lending.whole;
        if whole == 0 && to.borrow().is_none() {
            return;
        }
        // Beyond the floor hops may hold what was taken back.
        let sure = self.floor.unwrap_or(u32::MAX);
        let computed = self.lending.acked.min(sure).min(whole);
        let now = (self.epoch, whole, computed);
        if self.lending.said == Some(now) {
            return;
        }
        let same = self.lending.said.is_some_and(|said| said.1 == whole);
        to.send_modify(|said| {
            let tokens = match said.take().filter(|_| same) {
                Some(said) => said.tokens,
                None => self.tokens[..whole as usize].into(),
            };
            *said = Some(Beginning {
                session: self.session,
                epoch: self.epoch,
                route: self.route.clone(),
                tokens,
                computed,
            });
        });
        self.lending.said = Some(now);
    }

    /// The session begins with `tokens`, in whole frames, of which the first hop holds positions up to `held`: what
    /// comes after goes with the next that is fed.
    pub(in crate::session) fn begin_with(&mut self, tokens: &[u32], held: u32) {
        for (pos0, chunk) in (0..)
            .step_by(PREFILL_CHUNK as usize)
            .zip(tokens.chunks(PREFILL_CHUNK as usize))
        {
            let (n_rows, want) = (chunk.len() as u32, Want::NONE);
            let frame = Frame { pos0, n_rows, want };
            self.frames.push(frame);
            self.lend_frame(pos0, n_rows);
            self.rows_max = self.rows_max.max(n_rows);
            if frame.end() > held {
                let tokens = chunk.to_vec();
                self.queue.push_back(Chunk { pos0, tokens, want });
            }
            self.pos = frame.end();
        }
        self.tokens = tokens.to_vec();
        self.spared = held.min(self.pos);
        self.lending.acked = self.spared;
    }
}
