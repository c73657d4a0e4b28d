//! How a session goes on along another route, and what a standby of its first hop is fed from.

use std::io;

use swarm_proto::{Epoch, Hop, Open, Peer, Want, WantRows};
use tokio::time::Instant;

use super::{Chunk, ClientSession, Frame};
use crate::session::{
    chain::Shape,
    limits::UP,
    open::Route,
    standby::{Fed, Follower, Sent, streams_to},
    trace,
    wire::Pipe,
};

/// What it takes to open a session again.
pub(in crate::session) struct Again {
    pub(in crate::session) open: Open,
    pub(in crate::session) shape: Shape,
    /// The stream to the first hop, where there is one.
    pub(in crate::session) current: Option<Fed>,
    /// The stream to who stands by for it, where there is one.
    pub(in crate::session) standby: Option<Fed>,
}

/// What was fed, as a standby of the first hop gets it.
pub(super) struct History<'a> {
    pub(super) tokens: &'a [u32],
    pub(super) frames: &'a [Frame],
}

impl History<'_> {
    fn at(&self, pos: u32) -> Option<&Frame> {
        let index = self.frames.partition_point(|frame| frame.pos0 < pos);
        self.frames.get(index).filter(|frame| frame.pos0 == pos)
    }
}

impl Sent for History<'_> {
    fn end(&self) -> u32 {
        self.frames.last().map_or(0, Frame::end)
    }

    fn rows_at(&self, pos: u32) -> Option<u16> {
        u16::try_from(self.at(pos)?.n_rows).ok()
    }

    fn append(&mut self, pos: u32, out: &mut Vec<u8>) -> io::Result<()> {
        let frame = self.at(pos).ok_or(io::ErrorKind::NotFound)?;
        let tokens = self.tokens.get(pos as usize..frame.end() as usize);
        let tokens = tokens.ok_or(io::ErrorKind::NotFound)?;
        out.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
        Ok(())
    }
}

impl ClientSession {
    /// The last answer comes again when the session is opened again: its log-probability may differ by
    /// so much. 0: not at all.
    pub(crate) fn tolerate(&mut self, by: f32) {
        self.tolerance = by;
    }

    /// Forgets what was fed from `pos` on; what was answered there will be answered anew.
    pub(super) fn forget(&mut self, pos: u32) {
        let takes_back = self.tokens.len() > pos as usize;
        self.tokens.truncate(pos as usize);
        while let Some(last) = self.frames.last_mut() {
            if last.end() <= pos {
                break;
            }
            if last.pos0 < pos {
                last.n_rows = pos - last.pos0;
                break;
            }
            self.frames.pop();
        }
        if self.last.is_some_and(|last| last.pos >= pos) {
            self.last = None;
        }
        self.answered = self.answered.min(pos);
        if takes_back {
            self.floor = Some(self.floor.map_or(pos, |floor| floor.min(pos)));
        }
        let queued = self.queue.iter().map(|chunk| match chunk.want.rows {
            WantRows::None => 0,
            WantRows::Last => 1,
            WantRows::All => chunk.tokens.len(),
        });
        self.stale = self.asked.len() + queued.sum::<usize>();
        if let Some(standby) = &mut self.standby {
            standby.truncate(pos);
        }
        self.lend_no_more(pos);
    }

    /// What it takes to open the session along another route. What it had of streams is gone after
    /// this.
    pub(in crate::session) fn begin_again(&mut self, me: Peer, route: &Route) -> Again {
        self.epoch.0 += 1;
        let first = |hops: &[Hop]| hops.first().map(|hop| (hop.peer, hop.layers));
        let up = std::mem::replace(&mut self.up, Pipe::detached(UP));
        let same = first(&route.hops) == first(&self.route.hops) && up.has_stream();
        self.answers = Pipe::detached(UP);
        let open = Open {
            session: self.session,
            epoch: self.epoch,
            resume: self.resume(),
            since: self.ran,
            fork: None,
            client: me,
            model: self.model,
            n_ctx: self.n_ctx,
            dtype: self.dtype,
            numerics: self.numerics,
            hops: route.hops.clone(),
            at: 0,
            standbys: route.standbys.clone(),
            standing_by: false,
            trace: trace::current(),
        };
        let current = same.then_some(Fed::next_hop(up));
        let (current, standby) = streams_to(&open, 0, current, self.standby.take());
        Again {
            open,
            shape: self.shape,
            current,
            standby,
        }
    }

    /// Where the hops are to go on: with the frame of the last answer, which then comes again, or with
    /// the first that is to be answered, but not beyond what was written anew. What comes before needs no
    /// answer any more.
    fn resume(&self) -> u32 {
        let frame = match self.last {
            Some(last) => self.frames.iter().rfind(|frame| frame.pos0 <= last.pos),
            None => self
                .frames
                .iter()
                .find(|frame| frame.want.rows != WantRows::None && frame.end() > self.answered),
        };
        let resume = frame.map_or(self.pos, |frame| frame.pos0);
        self.floor.map_or(resume, |floor| floor.min(resume))
    }

    /// The session is open again, its first hop holds positions up to `held`: what comes after is
    /// queued.
    pub(in crate::session) fn go_on(
        &mut self,
        up: Pipe,
        answers: Pipe,
        route: Route,
        epoch: Epoch,
        held: u32,
        standby: Option<Follower>,
    ) {
        let resume = self.resume();
        (self.up, self.answers, self.route, self.epoch) = (up, answers, route, epoch);
        self.standby = standby;
        (self.ran, self.again) = (epoch, self.last.map(|last| last.pos));
        self.stale = 0;
        self.queue.clear();
        self.outbox.clear();
        self.asked.clear();
        for frame in self.frames.iter().filter(|frame| frame.end() > held) {
            let tokens = self.tokens.get(frame.pos0 as usize..frame.end() as usize);
            self.queue.push_back(Chunk {
                pos0: frame.pos0,
                tokens: tokens.unwrap_or_default().to_vec(),
                want: if frame.pos0 < resume {
                    Want::NONE
                } else {
                    frame.want
                },
            });
        }
        self.failed = None;
        self.answers_over = None;
        let now = Instant::now();
        (self.progress, self.heard) = (now, now);
        self.lend_computed(held);
    }
}
