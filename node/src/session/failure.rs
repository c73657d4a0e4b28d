//! How failures are built, kept honest on their way up, and blamed. Pure.

use swarm_proto::{Failure, FailureCode, Fault};

/// A failure at hop `at`.
pub(super) fn fail(at: u8, fault: Fault, code: FailureCode, message: impl Into<String>) -> Failure {
    Failure::new(at, fault, code, message)
}

/// This node takes no new sessions for now.
pub(super) fn paused(at: u8) -> Failure {
    let message = "this node is paused by its owner";
    fail(at, Fault::Local, FailureCode::ShuttingDown, message)
}

/// A failure reported from below hop `at` may accuse nobody but the hops below: otherwise a bad
/// peer could have its upstream avoided.
pub(super) fn clamp_to_below(failure: Failure, at: u8, hops: usize) -> Failure {
    clamp(failure, at.saturating_add(1), hops)
}

/// The same, said of hop `first` or those below it.
pub(super) fn clamp(mut failure: Failure, first: u8, hops: usize) -> Failure {
    let last = u8::try_from(hops.saturating_sub(1)).unwrap_or(u8::MAX);
    failure.at = failure.at.clamp(first.min(last), last);
    failure
}

/// The client closed its answer stream: nothing failed, and nobody is at fault.
pub(super) fn is_goodbye(failure: &Failure) -> bool {
    failure.fault == Fault::Caller && failure.code == FailureCode::DownstreamLost
}

/// The hop gave the session up in good order: it goes on with the others.
pub(super) fn is_leaving(failure: &Failure) -> bool {
    matches!(
        failure.code,
        FailureCode::HandedOver | FailureCode::ShuttingDown
    )
}

/// The hop to avoid when trying again: none when the client itself was wrong.
pub(super) fn culprit(failure: &Failure) -> Option<u8> {
    match failure.fault {
        Fault::Peer | Fault::Local => Some(failure.at),
        // What a hop received was wrong: the sender is the hop before it, or the client.
        Fault::Caller => match failure.code {
            FailureCode::BadFrame | FailureCode::WrongSession => failure.at.checked_sub(1),
            _ => None,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_accuses_a_hop_above_itself() {
        let f = |at| fail(at, Fault::Peer, FailureCode::Deadline, "");
        assert_eq!(clamp_to_below(f(0), 1, 4).at, 2);
        assert_eq!(clamp_to_below(f(3), 1, 4).at, 3);
        assert_eq!(clamp_to_below(f(200), 1, 4).at, 3);
    }

    #[test]
    fn who_is_avoided() {
        assert_eq!(
            culprit(&fail(2, Fault::Peer, FailureCode::Deadline, "")),
            Some(2)
        );
        assert_eq!(
            culprit(&fail(2, Fault::Caller, FailureCode::BadFrame, "")),
            Some(1)
        );
        assert_eq!(
            culprit(&fail(0, Fault::Caller, FailureCode::BadFrame, "")),
            None
        );
        assert_eq!(
            culprit(&fail(1, Fault::Caller, FailureCode::Deadline, "")),
            None
        );
    }
}
