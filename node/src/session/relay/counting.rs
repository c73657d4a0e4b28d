//! What is counted of each frame, and where its time went.

use engine::Done;
use swarm_proto::{Rows, WantRows};

use super::{Below, Relay};
use crate::phases::{Phase, Sums};

impl Relay {
    /// A frame goes to the stage.
    pub(super) fn count_begun(&mut self, rows: &Rows) {
        let answered = rows.want.rows != WantRows::None;
        let phase = Phase::of(usize::from(rows.n_rows), answered);
        self.phases.begin(phase, !self.in_flight.is_empty());
    }

    /// It comes back.
    pub(super) fn count(&mut self, rows: &Rows, done: &Done) {
        (self.p.metrics).step(rows.n_rows, done.queued, done.compute);
        let below = match &mut self.p.below {
            Below::Nobody => Default::default(),
            Below::Next(pipe) => pipe.take_waited(),
            Below::Client { answers, .. } => answers.take_waited(),
        };
        let times = Sums {
            frames: 1,
            rows: rows.n_rows.into(),
            queue: done.queued,
            compute: done.compute,
            wire_in: self.p.up.take_waited().wire_in,
            wire_out: below.wire_out,
            ..Sums::default()
        };
        self.phases.add(times, self.in_flight.is_empty());
    }
}
