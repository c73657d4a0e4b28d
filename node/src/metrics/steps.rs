//! What the session service of a node counts as it runs: a step costs three additions here.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use swarm_proto::{Failure, FailureCode};

use super::seconds_buckets;

/// Counters of a session service. Clones share them.
#[derive(Clone, Debug)]
pub struct SessionMetrics {
    opened: Counter,
    refused: Family<[(&'static str, &'static str); 1], Counter>,
    ended: Family<[(&'static str, &'static str); 1], Counter>,
    forked: Counter,
    step_rows: Histogram,
    step_queue: Histogram,
    step_compute: Histogram,
}

impl Default for SessionMetrics {
    fn default() -> Self {
        // From one token to more than the longest chunk of a prompt.
        let rows = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];
        Self {
            opened: Counter::default(),
            refused: Family::default(),
            ended: Family::default(),
            forked: Counter::default(),
            step_rows: Histogram::new(rows),
            step_queue: Histogram::new(seconds_buckets()),
            step_compute: Histogram::new(seconds_buckets()),
        }
    }
}

impl SessionMetrics {
    /// Adds them to those of the process.
    pub fn register(&self, to: &mut Registry) {
        to.register(
            "shoal_sessions_opened",
            "Sessions that were opened here",
            self.opened.clone(),
        );
        to.register(
            "shoal_sessions_refused",
            "Sessions that were not opened here, by the reason that the peer was told",
            self.refused.clone(),
        );
        to.register(
            "shoal_forked_positions",
            "Positions that sessions took over from others here instead of computing them",
            self.forked.clone(),
        );
        to.register(
            "shoal_sessions_ended",
            "Sessions that ended here",
            self.ended.clone(),
        );
        to.register(
            "shoal_step_rows",
            "Rows of a session's frame that one step computed",
            self.step_rows.clone(),
        );
        to.register(
            "shoal_step_queue_seconds",
            "From a frame's arrival to its turn at the stage",
            self.step_queue.clone(),
        );
        to.register(
            "shoal_step_compute_seconds",
            "Time of the stage for a frame",
            self.step_compute.clone(),
        );
    }

    pub(crate) fn opened(&self) {
        self.opened.inc();
    }

    pub(crate) fn forked(&self, positions: u32) {
        self.forked.inc_by(positions.into());
    }

    pub(crate) fn refused(&self, why: &Failure) {
        self.refused
            .get_or_create(&[("reason", word(why.code))])
            .inc();
    }

    pub(crate) fn ended(&self, how: &'static str) {
        self.ended.get_or_create(&[("how", how)]).inc();
    }

    pub(crate) fn step(&self, rows: u16, queued: Duration, compute: Duration) {
        self.step_rows.observe(rows.into());
        self.step_queue.observe(queued.as_secs_f64());
        self.step_compute.observe(compute.as_secs_f64());
    }
}

fn word(code: FailureCode) -> &'static str {
    match code {
        FailureCode::UnknownModel => "unknown_model",
        FailureCode::LayersNotHeld => "layers_not_held",
        FailureCode::Full => "full",
        FailureCode::BadFrame => "bad_frame",
        FailureCode::WrongSession => "wrong_session",
        FailureCode::Deadline => "deadline",
        FailureCode::DownstreamLost => "downstream_lost",
        FailureCode::Engine => "engine",
        FailureCode::ShuttingDown => "shutting_down",
        FailureCode::Version => "version",
        FailureCode::NotRetained => "not_retained",
        FailureCode::HandedOver => "handed_over",
    }
}
