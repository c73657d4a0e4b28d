//! Frames over one stream: one read buffer, one write buffer, nothing else waits anywhere.
//!
//! A [`Pipe`] is driven by polling, so that one task can own several. Frames that are pushed gather
//! in the buffer and leave in one write: a write wakes the connection's task.

use std::{
    future::poll_fn,
    io,
    ops::Range,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use swarm_proto::{FrameDecoder, FrameError, FrameLimits, Message, decode_header, encode_frame};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    time::Instant,
};

use crate::{metrics::TRAFFIC, net::Stream};

/// Bytes asked of the stream at once: yamux sends at most 16 KiB a frame.
const READ_BYTES: usize = 16 * 1024;
/// A write buffer that grew beyond this is given back once empty: a long prefill is over.
const KEEP_BYTES: usize = 256 * 1024;

/// Why reading a frame failed.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The stream broke.
    #[error("the stream broke: {0}")]
    Io(#[from] io::Error),
    /// The bytes are not a frame, or not one of this protocol.
    #[error("{0}")]
    Frame(#[from] FrameError),
    /// The stream ended within a frame.
    #[error("the stream ended within a frame")]
    Torn,
}

/// How long a stream kept somebody waiting who had begun to read or to write.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Waited {
    /// For the rest of a frame.
    pub(crate) wire_in: Duration,
    /// For room.
    pub(crate) wire_out: Duration,
}

/// Frames in and out over one stream.
pub(crate) struct Pipe {
    io: Option<Stream>,
    decoder: FrameDecoder,
    chunk: Box<[u8]>,
    payload: Range<usize>,
    out: Vec<u8>,
    written: usize,
    moved: u64,
    flushed: bool,
    /// Since when a part of a frame is here, and since when the stream takes nothing.
    partial_since: Option<Instant>,
    stuck_since: Option<Instant>,
    waited: Waited,
    /// A frame that breaks our own limits: said by the next flush, so that pushing cannot fail.
    unsendable: Option<FrameError>,
}

impl Pipe {
    pub(crate) fn new(io: Stream, limits: FrameLimits) -> Self {
        let mut pipe = Self::detached(limits);
        pipe.io = Some(io);
        pipe
    }

    /// A pipe whose stream comes later: frames gather until then.
    pub(crate) fn detached(limits: FrameLimits) -> Self {
        Self {
            io: None,
            decoder: FrameDecoder::new(limits),
            chunk: vec![0; READ_BYTES].into_boxed_slice(),
            payload: 0..0,
            out: Vec::new(),
            written: 0,
            moved: 0,
            flushed: true,
            partial_since: None,
            stuck_since: None,
            waited: Waited::default(),
            unsendable: None,
        }
    }

    /// The stream that a detached pipe waited for.
    pub(crate) fn attach(&mut self, io: Stream) {
        self.io = Some(io);
    }

    /// Whether a part of a frame is here.
    pub(crate) fn is_receiving(&self) -> bool {
        !self.decoder.is_empty()
    }

    /// Whether there is one.
    pub(crate) fn has_stream(&self) -> bool {
        self.io.is_some()
    }

    /// The stream, unless bytes beyond the last frame were already read from it.
    pub(crate) fn into_stream(self) -> Option<Stream> {
        if self.decoder.is_empty() {
            self.io
        } else {
            None
        }
    }

    /// What frames may be from here on.
    pub(crate) fn set_limits(&mut self, limits: FrameLimits) {
        self.decoder.set_limits(limits);
    }

    /// Puts a frame into the write buffer.
    pub(crate) fn push(&mut self, header: &impl Message) {
        self.push_with(header, |_| {});
    }

    /// The same with a payload that is written straight into the buffer.
    pub(crate) fn push_with(&mut self, header: &impl Message, payload: impl FnOnce(&mut Vec<u8>)) {
        self.flushed = false;
        TRAFFIC.sent(1, 0);
        if let Err(e) = encode_frame(header, &mut self.out, payload) {
            self.unsendable = Some(e);
        }
    }

    /// The payload of the frame that was pushed last: its last `len` bytes.
    pub(crate) fn pushed(&self, len: usize) -> &[u8] {
        &self.out[self.out.len().saturating_sub(len)..]
    }

    /// Puts a frame into the write buffer that was encoded elsewhere.
    pub(crate) fn push_encoded(&mut self, frame: &[u8]) {
        self.flushed = false;
        TRAFFIC.sent(1, 0);
        self.out.extend_from_slice(frame);
    }

    /// Bytes that came and went so far: what moves is not silent.
    pub(crate) fn moved(&self) -> u64 {
        self.moved
    }

    /// How long the rest of a frame, or room for one, has been waited for.
    pub(crate) fn stuck(&self) -> Option<Duration> {
        let since = self.partial_since.into_iter().chain(self.stuck_since);
        since.min().map(|since| since.elapsed())
    }

    /// Bytes that the stream has not taken yet.
    pub(crate) fn backlog(&self) -> usize {
        self.out.len() - self.written
    }

    /// Moves the write buffer into the stream; ready when all of it is on its way.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.flushed {
            return Poll::Ready(Ok(()));
        }
        if let Some(e) = self.unsendable.take() {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidInput, e)));
        }
        let Some(io) = &mut self.io else {
            return Poll::Pending;
        };
        while self.written < self.out.len() {
            match Pin::new(&mut *io).poll_write(cx, &self.out[self.written..]) {
                Poll::Pending => {
                    self.stuck_since.get_or_insert_with(Instant::now);
                    return Poll::Pending;
                }
                Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(n)) => {
                    TRAFFIC.sent(0, n);
                    self.moved = self.moved.wrapping_add(n as u64);
                    self.written += n;
                }
            }
        }
        if let Some(since) = self.stuck_since.take() {
            self.waited.wire_out = self.waited.wire_out.saturating_add(since.elapsed());
        }
        self.out.clear();
        self.out.shrink_to(KEEP_BYTES);
        self.written = 0;
        match Pin::new(io).poll_flush(cx) {
            Poll::Ready(Ok(())) => {
                self.flushed = true;
                Poll::Ready(Ok(()))
            }
            other => other,
        }
    }

    /// The next frame's header, its payload in [`Pipe::payload`]; `None` when the other side closed
    /// the stream between frames.
    pub(crate) fn poll_frame<H: Message>(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<H>, WireError>> {
        loop {
            if let Some((header, payload)) = self.decoder.next()? {
                let header = decode_header(self.decoder.bytes(header))?;
                self.payload = payload;
                TRAFFIC.came(1, 0);
                if let Some(since) = self.partial_since.take() {
                    self.waited.wire_in = self.waited.wire_in.saturating_add(since.elapsed());
                }
                return Poll::Ready(Ok(Some(header)));
            }
            if !self.decoder.is_empty() {
                self.partial_since.get_or_insert_with(Instant::now);
            }
            let Some(io) = &mut self.io else {
                return Poll::Pending;
            };
            let mut buf = ReadBuf::new(&mut self.chunk);
            match Pin::new(io).poll_read(cx, &mut buf) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(e)) => return Poll::Ready(Err(e.into())),
                Poll::Ready(Ok(())) if buf.filled().is_empty() => {
                    let torn = !self.decoder.is_empty();
                    return Poll::Ready(if torn { Err(WireError::Torn) } else { Ok(None) });
                }
                Poll::Ready(Ok(())) => {
                    TRAFFIC.came(0, buf.filled().len());
                    self.moved = self.moved.wrapping_add(buf.filled().len() as u64);
                    self.decoder.push(buf.filled());
                }
            }
        }
    }

    /// How long it waited since this was last asked.
    pub(crate) fn take_waited(&mut self) -> Waited {
        std::mem::take(&mut self.waited)
    }

    /// The payload of the last frame.
    pub(crate) fn payload(&self) -> &[u8] {
        self.decoder.bytes(self.payload.clone())
    }

    /// Waits for the next frame. Cancel safe: bytes read stay in the decoder.
    pub(crate) async fn frame<H: Message>(&mut self) -> Result<Option<H>, WireError> {
        poll_fn(|cx| self.poll_frame(cx)).await
    }

    /// Writes everything out. Cancel safe: what is left stays in the buffer.
    pub(crate) async fn flush(&mut self) -> io::Result<()> {
        poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// Writes everything out and closes our half.
    pub(crate) async fn close(&mut self) -> io::Result<()> {
        if self.io.is_none() {
            return Ok(());
        }
        self.flush().await?;
        match &mut self.io {
            Some(io) => io.shutdown().await,
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swarm_proto::{Attach, Epoch, SessionId};

    const LIMITS: FrameLimits = FrameLimits {
        header_max: 64,
        payload_max: 64,
    };

    fn attach() -> Attach {
        Attach {
            session: SessionId([7; 16]),
            epoch: Epoch(3),
        }
    }

    #[tokio::test]
    async fn frames_survive_any_chopping() {
        let (a, b) = tokio::io::duplex(3);
        let (mut a, mut b) = (
            Pipe::new(Stream::new(a), LIMITS),
            Pipe::new(Stream::new(b), LIMITS),
        );
        for n in 0..5u8 {
            a.push_with(&attach(), |out| {
                out.extend(std::iter::repeat_n(n, usize::from(n)))
            });
        }
        let read = async {
            for n in 0..5u8 {
                assert_eq!(b.frame::<Attach>().await.unwrap(), Some(attach()));
                assert_eq!(b.payload(), vec![n; usize::from(n)]);
            }
            assert!(b.frame::<Attach>().await.unwrap().is_none());
        };
        let write = async {
            a.close().await.unwrap();
        };
        tokio::join!(read, write);
    }

    #[tokio::test]
    async fn a_torn_or_oversize_frame_is_an_error() {
        let (mut a, b) = tokio::io::duplex(64);
        let mut b = Pipe::new(Stream::new(b), LIMITS);
        a.write_all(&[9, 0, 0]).await.unwrap();
        drop(a);
        assert!(matches!(b.frame::<Attach>().await, Err(WireError::Torn)));

        let (mut a, b) = tokio::io::duplex(64);
        let mut b = Pipe::new(Stream::new(b), LIMITS);
        a.write_all(&[0xff, 0xff, 0xff, 0x7f, 4, 0]).await.unwrap();
        assert!(matches!(
            b.frame::<Attach>().await,
            Err(WireError::Frame(_))
        ));
    }
}
