//! A relay in front of a node, that can be stopped or cut.

use tokio::sync::watch;

use super::swarm::*;
use crate::net::{Proto, Stream};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Mode {
    Pass,
    Hang,
    Cut,
}

/// Streams to `at` go through the test, which passes them on to the node while told to.
pub(super) fn interpose(swarm: &Swarm, at: usize) -> watch::Sender<Mode> {
    let (mode, seen) = watch::channel(Mode::Pass);
    let (to, mut streams) = tokio::sync::mpsc::unbounded_channel();
    let sessions = swarm.nodes[at].sessions.clone();
    swarm.wires.set(swarm.nodes[at].peer, Behaviour::Test(to));
    tokio::spawn(async move {
        while let Some((from, proto, near)) = streams.recv().await {
            let (ours, theirs) = tokio::io::duplex(4096);
            match proto {
                Proto::Answer => sessions.accept_answer(from, Stream::new(theirs)),
                _ => sessions.accept_session(from, Stream::new(theirs)),
            }
            tokio::spawn(pass(near, ours, seen.clone()));
        }
    });
    mode
}

async fn pass(mut near: Stream, mut far: tokio::io::DuplexStream, mut mode: watch::Receiver<Mode>) {
    let passing = tokio::io::copy_bidirectional(&mut near, &mut far);
    tokio::pin!(passing);
    loop {
        let stop = async {
            let _ = mode.wait_for(|m| *m != Mode::Pass).await;
        };
        tokio::select! { biased; () = stop => {}, _ = &mut passing => return }
        match mode.wait_for(|m| *m != Mode::Hang).await.map(|m| *m) {
            Ok(Mode::Pass) => {}
            Ok(_) => return,
            Err(_) => std::future::pending().await,
        }
    }
}
