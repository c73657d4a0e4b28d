//! A byte stream between two simulated machines: bytes take their time, may be held up, and end as
//! streams of a real connection end.
//!
//! ```text
//! End (side 0) ──lane 0──▶ packets, each due at its time ──▶ End (side 1)
//!              ◀──lane 1──                               ──
//! ```
//!
//! A link that is blocked keeps what is under way, as a transport does that sends again. A dropped end
//! resets the stream, a machine that dies either does so too or leaves silence.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use super::log::lock;
use super::network::Network;
use super::tap::{Seen, Tap};

/// What a stream takes before its reader has read: as yamux does at the start.
const WINDOW_BYTES: usize = 256 * 1024;

/// What one packet takes. Less than a reader asks for at once, so that a packet arrives whole.
const PACKET_BYTES: usize = 8 * 1024;

/// How the bytes of a lane end.
#[derive(Clone, Copy)]
enum Ended {
    Closed,
    Reset,
}

struct Packet {
    due: Instant,
    bytes: Vec<u8>,
    read: usize,
    /// The frames that end in it.
    seen: Vec<Seen>,
}

/// One direction.
struct Lane {
    packets: VecDeque<Packet>,
    bytes: usize,
    /// When the line is free for the next packet.
    free: Instant,
    end: Option<(Instant, Ended)>,
    /// When the writer learns that nobody reads any more.
    refused: Option<Instant>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// Both directions, and where its ends are.
pub(super) struct Line {
    network: Arc<Network>,
    at: [usize; 2],
    lanes: [Mutex<Lane>; 2],
    /// A side whose machine died.
    dead: Mutex<[bool; 2]>,
    tap: Mutex<Tap>,
}

/// One end of a line.
pub(super) struct End {
    line: Arc<Line>,
    side: usize,
    timer: Pin<Box<Sleep>>,
}

impl Line {
    /// A line from machine `at[0]`, which opened it, to machine `at[1]`.
    pub(super) fn open(network: Arc<Network>, at: [usize; 2], tap: Tap) -> (Arc<Self>, End, End) {
        let lane = || {
            Mutex::new(Lane {
                packets: VecDeque::new(),
                bytes: 0,
                free: Instant::now(),
                end: None,
                refused: None,
                reader: None,
                writer: None,
            })
        };
        let line = Arc::new(Self {
            network,
            at,
            lanes: [lane(), lane()],
            dead: Mutex::new([false; 2]),
            tap: Mutex::new(tap),
        });
        let end = |side| End {
            line: line.clone(),
            side,
            timer: Box::pin(sleep_until(Instant::now())),
        };
        let ends = (end(0), end(1));
        (line, ends.0, ends.1)
    }

    /// Whether one end is at this machine.
    pub(super) fn touches(&self, machine: usize) -> bool {
        self.at.contains(&machine)
    }

    /// Whether it runs between these two.
    pub(super) fn joins(&self, a: usize, b: usize) -> bool {
        self.at == [a, b] || self.at == [b, a]
    }

    /// The machine died: its end is gone at once. `heard`: the other end is told, as by an operating
    /// system that outlives its process.
    pub(super) fn die(&self, machine: usize, heard: bool) {
        for side in 0..2 {
            if self.at[side] == machine {
                lock(&self.dead)[side] = true;
                if heard {
                    self.reset(side);
                }
            }
        }
        self.wake();
    }

    /// The connection is given up on both sides.
    pub(super) fn break_off(&self) {
        *lock(&self.dead) = [true; 2];
        self.wake();
    }

    /// Lets everybody look again.
    pub(super) fn wake(&self) {
        for lane in &self.lanes {
            let mut lane = lock(lane);
            let wakers = [lane.reader.take(), lane.writer.take()];
            drop(lane);
            wakers.into_iter().flatten().for_each(Waker::wake);
        }
    }

    /// The end of `side` is gone; the other one hears of it.
    fn reset(&self, side: usize) {
        let due = Instant::now() + self.network.delay(self.at[side], self.at[1 - side]);
        let mut out = lock(&self.lanes[side]);
        let last = due.max(out.free);
        out.end.get_or_insert((last, Ended::Reset));
        drop(out);
        let mut back = lock(&self.lanes[1 - side]);
        back.refused.get_or_insert(due);
        back.packets.clear();
        back.bytes = 0;
    }

    fn is_dead(&self, side: usize) -> bool {
        lock(&self.dead)[side]
    }

    fn blocked(&self, from: usize) -> bool {
        self.network.blocked(self.at[from], self.at[1 - from])
    }
}

impl End {
    /// Waits in the reader's place until `due`; whether that is now.
    fn is_due(&mut self, cx: &mut Context<'_>, due: Instant) -> bool {
        if due <= Instant::now() {
            return true;
        }
        self.timer.as_mut().reset(due);
        self.timer.as_mut().poll(cx).is_ready()
    }

    fn next_due(&self) -> Option<Instant> {
        let lane = lock(&self.line.lanes[1 - self.side]);
        let packet = lane.packets.front().map(|packet| packet.due);
        packet.or(lane.end.map(|(due, _)| due))
    }

    fn take(&mut self, buf: &mut ReadBuf<'_>) -> io::Result<()> {
        let from = 1 - self.side;
        let mut lane = lock(&self.line.lanes[from]);
        let Some(packet) = lane.packets.front_mut() else {
            return match lane.end {
                Some((_, Ended::Reset)) => Err(io::ErrorKind::ConnectionReset.into()),
                _ => Ok(()),
            };
        };
        let rest = &packet.bytes[packet.read..];
        let n = rest.len().min(buf.remaining());
        buf.put_slice(&rest[..n]);
        packet.read += n;
        let mut seen = Vec::new();
        if packet.read == packet.bytes.len() {
            seen = std::mem::take(&mut packet.seen);
            lane.packets.pop_front();
        }
        lane.bytes -= n;
        let writer = lane.writer.take();
        drop(lane);
        if let Some(writer) = writer {
            writer.wake();
        }
        let mut tap = lock(&self.line.tap);
        seen.iter().for_each(|frame| tap.delivered(from, frame));
        Ok(())
    }
}

impl AsyncRead for End {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let from = 1 - self.side;
        lock(&self.line.lanes[from]).reader = Some(cx.waker().clone());
        if self.line.is_dead(self.side) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if self.line.blocked(from) {
            return Poll::Pending;
        }
        match self.next_due() {
            Some(due) if self.is_due(cx, due) => Poll::Ready(self.take(buf)),
            _ => Poll::Pending,
        }
    }
}

impl AsyncWrite for End {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let (line, side) = (&self.line, self.side);
        if line.is_dead(side) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let (here, there) = (line.at[side], line.at[1 - side]);
        let mut lane = lock(&line.lanes[side]);
        let now = Instant::now();
        if lane.end.is_some()
            || lane.refused.is_some_and(|due| due <= now) && !line.network.blocked(there, here)
        {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let room = WINDOW_BYTES.saturating_sub(lane.bytes).min(PACKET_BYTES);
        let n = bytes.len().min(room);
        if n == 0 && !bytes.is_empty() {
            lane.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let seen = lock(&line.tap).written(side, &bytes[..n]);
        lane.free = lane.free.max(now) + line.network.sending(here, there, n);
        let due = lane.free + line.network.delay(here, there);
        // Nothing overtakes on a stream, not even when the line has become faster.
        let due = lane.packets.back().map_or(due, |last| due.max(last.due));
        lane.bytes += n;
        lane.packets.push_back(Packet {
            due,
            bytes: bytes[..n].to_vec(),
            read: 0,
            seen,
        });
        let reader = lane.reader.take();
        drop(lane);
        if let Some(reader) = reader {
            reader.wake();
        }
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (line, side) = (&self.line, self.side);
        let due = Instant::now() + line.network.delay(line.at[side], line.at[1 - side]);
        let mut lane = lock(&line.lanes[side]);
        let due = lane.packets.back().map_or(due, |last| due.max(last.due));
        lane.end.get_or_insert((due, Ended::Closed));
        if let Some(reader) = lane.reader.take() {
            reader.wake();
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if !self.line.is_dead(self.side) {
            self.line.reset(self.side);
        }
        self.line.wake();
    }
}
