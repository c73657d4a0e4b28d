//! Reads along on every stream and holds what passes against the rules of the protocol: who accepts
//! which epoch, what is acknowledged, and that no position is left out.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use node::Proto;
use swarm_proto::session::{OPEN_BYTES_MAX, SESSION_HEADER_MAX};
use swarm_proto::{
    Answer, Attach, Down, Epoch, FrameDecoder, FrameLimits, LayerRange, Peer, SessionId, Up,
    decode_header,
};

use super::log::{Log, lock};

/// A frame, as far as the rules need it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    Open(Key, Epoch),
    Rows {
        epoch: Epoch,
        pos0: u32,
        end: u32,
    },
    Opened {
        held: u32,
    },
    Ack {
        epoch: Epoch,
        end: u32,
    },
    Attach(Epoch),
    Logits {
        epoch: Epoch,
    },
    /// Close, Failed, Lost, Working, Attached.
    Other,
}

/// Whose session, and where on its route: a machine may be there twice.
pub(super) type Key = (Peer, SessionId, LayerRange);

/// The highest epoch of each session that each machine accepted.
#[derive(Default)]
pub(super) struct Epochs(Mutex<BTreeMap<(usize, Key), Epoch>>);

impl Epochs {
    /// The machine begins anew and knows nothing.
    pub(super) fn forget(&self, machine: usize) {
        lock(&self.0).retain(|(at, _), _| *at != machine);
    }

    fn of(&self, machine: usize, key: Key) -> Option<Epoch> {
        lock(&self.0).get(&(machine, key)).copied()
    }

    fn accept(&self, machine: usize, key: Key, epoch: Epoch) -> Option<Epoch> {
        lock(&self.0).insert((machine, key), epoch)
    }
}

/// Reads along on one stream. Side 0 opened it.
pub(super) struct Tap {
    log: Arc<Log>,
    epochs: Arc<Epochs>,
    proto: Proto,
    at: [usize; 2],
    decoders: [FrameDecoder; 2],
    key: Option<Key>,
    /// Of the latest opening (or claim) that was written, that arrived, that was answered.
    asked: Epoch,
    arrived: Epoch,
    accepted: Epoch,
    /// Where the rows that were written end, and those that arrived.
    sent_end: u32,
    arrived_end: u32,
}

impl Tap {
    pub(super) fn new(
        log: Arc<Log>,
        epochs: Arc<Epochs>,
        proto: Proto,
        from: usize,
        to: usize,
    ) -> Self {
        let limits = FrameLimits {
            header_max: OPEN_BYTES_MAX.max(SESSION_HEADER_MAX),
            payload_max: 1 << 24,
        };
        Self {
            log,
            epochs,
            proto,
            at: [from, to],
            decoders: [FrameDecoder::new(limits), FrameDecoder::new(limits)],
            key: None,
            asked: Epoch(0),
            arrived: Epoch(0),
            accepted: Epoch(0),
            sent_end: 0,
            arrived_end: 0,
        }
    }

    /// Bytes that `side` wrote; the frames that are whole with them.
    pub(super) fn written(&mut self, side: usize, bytes: &[u8]) -> Vec<Seen> {
        let mut seen = Vec::new();
        self.decoders[side].push(bytes);
        loop {
            match self.decoders[side].next() {
                Ok(Some((header, payload))) => {
                    let header = self.decoders[side].bytes(header);
                    match decode(self.proto, side, header) {
                        Ok(frame) => {
                            self.wrote(side, &frame, payload.len());
                            seen.push(frame);
                        }
                        Err(why) => self.broken("what is written are frames", &why),
                    }
                }
                Ok(None) => return seen,
                Err(why) => {
                    self.broken("what is written are frames", &why.to_string());
                    return seen;
                }
            }
        }
    }

    fn wrote(&mut self, side: usize, frame: &Seen, payload: usize) {
        let (from, to) = (self.at[side], self.at[1 - side]);
        self.log
            .mark(format!("{from}>{to} {frame:?} {payload}").as_bytes());
        tracing::trace!(target: "sim", from, to, ?frame, payload, "written");
        match *frame {
            Seen::Open(key, epoch) => (self.key, self.asked) = (Some(key), epoch),
            Seen::Attach(epoch) => self.asked = epoch,
            Seen::Rows { epoch, pos0, end } => {
                if epoch != self.asked {
                    let detail = format!("{frame:?} on a stream opened for {:?}", self.asked);
                    self.broken("rows carry the epoch of their stream", &detail);
                }
                if pos0 > self.sent_end {
                    let detail = format!("{frame:?} after position {}", self.sent_end);
                    self.broken("no position is left out", &detail);
                }
                self.sent_end = end;
            }
            Seen::Opened { .. } => self.accept(),
            Seen::Ack { epoch, end } => {
                let newest = self.key.and_then(|key| self.epochs.of(self.at[1], key));
                if epoch != self.accepted || newest.is_some_and(|newest| newest > epoch) {
                    let detail = format!(
                        "{frame:?}, accepted {:?} here, {newest:?} at all",
                        self.accepted
                    );
                    self.broken("no stale epoch is accepted", &detail);
                }
                if end > self.arrived_end {
                    let detail = format!("{frame:?}, rows came up to {}", self.arrived_end);
                    self.broken("only rows that came are acknowledged", &detail);
                }
            }
            Seen::Logits { epoch } if epoch != self.asked => {
                let detail = format!("{frame:?} to who claimed {:?}", self.asked);
                self.broken("no stale epoch is accepted", &detail);
            }
            Seen::Logits { .. } | Seen::Other => {}
        }
    }

    /// The lower side says that it is open.
    fn accept(&mut self) {
        let Some(key) = self.key else { return };
        self.accepted = self.arrived;
        self.arrived_end = 0;
        let before = self.epochs.accept(self.at[1], key, self.accepted);
        if before.is_some_and(|before| before >= self.accepted) {
            let detail = format!("{:?} after {before:?}", self.accepted);
            self.broken("no stale epoch is accepted", &detail);
        }
    }

    /// A frame that `side` wrote arrived.
    pub(super) fn delivered(&mut self, side: usize, frame: &Seen) {
        let (from, to) = (self.at[side], self.at[1 - side]);
        tracing::trace!(target: "sim", from, to, ?frame, "arrived");
        match *frame {
            Seen::Open(_, epoch) => self.arrived = epoch,
            Seen::Opened { held } => self.sent_end = held,
            Seen::Rows { epoch, end, .. } if epoch == self.accepted => {
                self.arrived_end = self.arrived_end.max(end);
            }
            _ => {}
        }
    }

    fn broken(&self, invariant: &str, detail: &str) {
        let [from, to] = self.at;
        let key = self.key.map(|(_, session, _)| session.to_string());
        self.log.broken(
            invariant,
            format_args!(
                "stream {from} to {to}, session {}: {detail}",
                key.unwrap_or_default()
            ),
        );
    }
}

fn decode(proto: Proto, side: usize, header: &[u8]) -> Result<Seen, String> {
    let text = |e: swarm_proto::FrameError| e.to_string();
    Ok(match (proto, side) {
        (Proto::Session, 0) => match decode_header::<Down>(header).map_err(text)? {
            Down::Open(open) => {
                let hop = open.hops.get(usize::from(open.at));
                let layers = hop.map(|hop| hop.layers).ok_or("a hop beyond its route")?;
                Seen::Open((open.client, open.session, layers), open.epoch)
            }
            Down::Rows(rows) => Seen::Rows {
                epoch: rows.epoch,
                pos0: rows.pos0,
                end: rows.pos0 + u32::from(rows.n_rows),
            },
            Down::Close => Seen::Other,
        },
        (Proto::Session, _) => match decode_header::<Up>(header).map_err(text)? {
            Up::Opened { held, .. } => Seen::Opened { held },
            Up::Ack { epoch, pos_end } => Seen::Ack {
                epoch,
                end: pos_end,
            },
            Up::Failed(_) | Up::Lost { .. } | Up::Working => Seen::Other,
        },
        (_, 0) => Seen::Attach(decode_header::<Attach>(header).map_err(text)?.epoch),
        (_, _) => match decode_header::<Answer>(header).map_err(text)? {
            Answer::Logits(logits) => Seen::Logits {
                epoch: logits.epoch,
            },
            Answer::Attached | Answer::Failed(_) => Seen::Other,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: Epoch = Epoch(2);

    /// A session that is open between machines 0 and 1.
    fn open(log: &Arc<Log>, epochs: &Arc<Epochs>) -> Tap {
        let mut tap = Tap::new(log.clone(), epochs.clone(), Proto::Session, 0, 1);
        let layers = LayerRange { start: 0, end: 4 };
        let opening = Seen::Open((Peer([1; 32]), SessionId([2; 16]), layers), EPOCH);
        tap.wrote(0, &opening, 0);
        tap.delivered(0, &opening);
        let opened = Seen::Opened { held: 3 };
        tap.wrote(1, &opened, 0);
        tap.delivered(1, &opened);
        tap
    }

    fn rows(epoch: Epoch, pos0: u32) -> Seen {
        let end = pos0 + 2;
        Seen::Rows { epoch, pos0, end }
    }

    fn ack(epoch: Epoch, end: u32) -> Seen {
        Seen::Ack { epoch, end }
    }

    /// The rule that is broken by what a machine writes on an open session.
    fn broken_by(side: usize, frame: Seen) -> Option<String> {
        let (log, epochs) = (Arc::new(Log::new()), Arc::default());
        let mut tap = open(&log, &epochs);
        tap.wrote(0, &rows(EPOCH, 3), 0);
        tap.delivered(0, &rows(EPOCH, 3));
        tap.wrote(side, &frame, 0);
        log.violation().map(|violation| violation.invariant)
    }

    #[test]
    fn what_is_right_breaks_no_rule() {
        for (side, frame) in [
            (0, rows(EPOCH, 5)),
            (0, rows(EPOCH, 0)),
            (1, ack(EPOCH, 5)),
            (1, Seen::Other),
        ] {
            assert_eq!(broken_by(side, frame), None, "{frame:?}");
        }
    }

    #[test]
    fn each_rule_can_be_broken() {
        for (side, frame, rule) in [
            (0, rows(Epoch(1), 5), "rows carry the epoch of their stream"),
            (0, rows(EPOCH, 6), "no position is left out"),
            (1, ack(Epoch(1), 5), "no stale epoch is accepted"),
            (1, ack(EPOCH, 6), "only rows that came are acknowledged"),
            (1, Seen::Opened { held: 3 }, "no stale epoch is accepted"),
        ] {
            assert_eq!(broken_by(side, frame).as_deref(), Some(rule), "{frame:?}");
        }
    }

    #[test]
    fn an_epoch_that_was_left_on_another_stream_is_stale() {
        let (log, epochs) = (Arc::new(Log::new()), Arc::default());
        let mut old = open(&log, &epochs);
        epochs.forget(0);
        assert!(log.violation().is_none());
        let key = old.key.expect("it is open");
        epochs.accept(1, key, Epoch(3));
        old.delivered(0, &rows(EPOCH, 3));
        old.wrote(1, &ack(EPOCH, 5), 0);
        let violation = log.violation().expect("a violation");
        assert_eq!(violation.invariant, "no stale epoch is accepted");
    }
}
