//! Whose fault it is that a relay stops.

use engine::EngineError;
use swarm_proto::{Failure, FailureCode, Fault};

use super::{Halt, Relay};
use crate::session::failure::fail;

impl Relay {
    pub(super) fn bad_frame(&self, what: &str) -> Failure {
        fail(self.at(), Fault::Caller, FailureCode::BadFrame, what)
    }

    pub(super) fn bad_below(&self, what: &str) -> Halt {
        Halt::Below(fail(
            self.at() + 1,
            Fault::Peer,
            FailureCode::BadFrame,
            format!("its upstream refused: {what}"),
        ))
    }

    pub(super) fn lost_below(&self, why: &impl std::fmt::Display) -> Halt {
        Halt::Below(fail(
            self.at() + 1,
            Fault::Peer,
            FailureCode::DownstreamLost,
            format!("connection lost: {why}"),
        ))
    }

    pub(super) fn client_gone(&self) -> Halt {
        let message = "the client closed its answer stream";
        Halt::Below(fail(
            self.at(),
            Fault::Caller,
            FailureCode::DownstreamLost,
            message,
        ))
    }

    pub(super) fn engine_failure(&self, e: &EngineError) -> Halt {
        let (fault, code) = match e.fault() {
            engine::Fault::Caller => (Fault::Caller, FailureCode::BadFrame),
            engine::Fault::Local => (Fault::Local, FailureCode::Engine),
        };
        Halt::Ours(fail(self.at(), fault, code, e.to_string()))
    }
}
