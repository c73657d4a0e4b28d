//! Frames of a transfer stream: read straight into the buffer that goes on to a blocking thread, and written from
//! one that is used again.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use swarm_proto::{
    FrameError, FrameLimits, Give, Message, decode_header, encode_frame, frame::PREFIX,
    transfer::PART_BYTES_MAX,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::net::Stream;

/// Replies: those with bytes of a shard are the largest.
pub(super) const GIVE: FrameLimits = FrameLimits {
    header_max: Give::BYTES_MAX,
    payload_max: PART_BYTES_MAX,
};
/// Requests.
pub(super) const ASK: FrameLimits = FrameLimits {
    header_max: swarm_proto::Ask::BYTES_MAX,
    payload_max: 0,
};

/// Why a frame did not come or go.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireError {
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The peer's fault.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// Buffers between a task and a thread.
const BUFFERS_MAX: usize = 8;

/// Buffers that go round between a task and a thread: asking the system for memory for each part, and giving them
/// back on another thread, costs as much as hashing them.
#[derive(Clone, Default)]
pub(super) struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

impl Buffers {
    /// One with whatever was in it.
    pub(super) fn get(&self) -> Vec<u8> {
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spare.pop().unwrap_or_default()
    }

    pub(super) fn put(&self, buffer: Vec<u8>) {
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < BUFFERS_MAX {
            spare.push(buffer);
        }
    }
}

/// One transfer stream.
pub(super) struct Wire {
    stream: Stream,
    out: Vec<u8>,
}

impl Wire {
    pub(super) fn new(stream: Stream) -> Self {
        let out = Vec::new();
        Self { stream, out }
    }

    pub(super) async fn send(
        &mut self,
        header: &impl Message,
        payload: &[u8],
    ) -> Result<(), WireError> {
        self.out.clear();
        encode_frame(header, &mut self.out, |out| out.extend_from_slice(payload))?;
        self.stream.write_all(&self.out).await?;
        Ok(self.stream.flush().await?)
    }

    /// Says that nothing more will be sent.
    pub(super) async fn close(&mut self) -> Result<(), WireError> {
        Ok(self.stream.shutdown().await?)
    }

    /// The next frame: its header, and its payload in one of `buffers`. None where the stream ends between two.
    pub(super) async fn next<M: Message>(
        &mut self,
        limits: FrameLimits,
        buffers: &Buffers,
    ) -> Result<Option<(M, Vec<u8>)>, WireError> {
        let mut prefix = [0; PREFIX];
        match self.stream.read(&mut prefix).await? {
            0 => return Ok(None),
            n => self.stream.read_exact(&mut prefix[n..]).await?,
        };
        let (header, payload) = limits.lengths(prefix)?;
        let mut bytes = vec![0; header];
        self.stream.read_exact(&mut bytes).await?;
        let header = decode_header(&bytes)?;
        if payload == 0 {
            return Ok(Some((header, Vec::new())));
        }
        let mut part = buffers.get();
        part.resize(payload, 0);
        self.stream.read_exact(&mut part).await?;
        Ok(Some((header, part)))
    }
}
