//! Frames: what every stream of ours carries.
//!
//! ```text
//! u32 LE total │ u16 LE header_len │ header (a Message) │ payload (raw)
//!              └───────────────────── total bytes ────────────────────┘
//! ```

use std::ops::Range;

use crate::codec::{CodecError, Message, decode, encode};

/// Bytes before the header.
pub const PREFIX: usize = 6;
/// What a drained decoder keeps of its buffer: a long prefill's memory is given back.
const KEEP_BYTES: usize = 256 * 1024;
/// A header's length is a `u16`.
pub const HEADER_BYTES_MAX: usize = u16::MAX as usize;

/// How long a frame may be in the state a stream is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameLimits {
    /// Most bytes of header.
    pub header_max: usize,
    /// Most bytes of payload.
    pub payload_max: usize,
}

impl FrameLimits {
    /// Bytes of the header and of the payload that a frame's first six bytes announce.
    ///
    /// # Errors
    /// One of them is over its limit.
    pub fn lengths(&self, prefix: [u8; PREFIX]) -> Result<(usize, usize), FrameError> {
        let [a, b, c, d, e, f] = prefix;
        self.parts(self.total([a, b, c, d])?, [e, f])
    }

    fn total(&self, bytes: [u8; 4]) -> Result<usize, FrameError> {
        let len = u32::from_le_bytes(bytes) as usize;
        let max = self
            .header_max
            .saturating_add(self.payload_max)
            .saturating_add(2);
        if len > max {
            return Err(FrameError::Large { len, max });
        }
        Ok(len)
    }

    fn parts(&self, total: usize, header: [u8; 2]) -> Result<(usize, usize), FrameError> {
        let header = usize::from(u16::from_le_bytes(header));
        if header > self.header_max {
            return Err(FrameError::LargeHeader {
                len: header,
                max: self.header_max,
            });
        }
        let Some(payload) = total.checked_sub(header + 2) else {
            return Err(FrameError::Short { total, header });
        };
        if payload > self.payload_max {
            return Err(FrameError::LargePayload {
                len: payload,
                max: self.payload_max,
            });
        }
        Ok((header, payload))
    }
}

/// Why bytes are no frame, or a frame cannot be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length alone is over the limit.
    #[error("frame of {len} bytes, the limit here is {max}")]
    Large {
        /// The length announced.
        len: usize,
        /// Prefix, header and payload together.
        max: usize,
    },
    /// The header is over its limit.
    #[error("frame header of {len} bytes, the limit here is {max}")]
    LargeHeader {
        /// The length announced.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The payload is over its limit.
    #[error("frame payload of {len} bytes, the limit here is {max}")]
    LargePayload {
        /// The length announced.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The frame is too short for its own header.
    #[error("frame of {total} bytes cannot hold a header of {header}")]
    Short {
        /// Bytes after the length.
        total: usize,
        /// The header's length.
        header: usize,
    },
    /// The header cannot be decoded or encoded.
    #[error(transparent)]
    Header(#[from] CodecError),
}

/// Appends a frame to `out`: `payload` appends the payload's bytes behind the header.
///
/// On an error `out` is as before.
///
/// # Errors
/// A header that breaks its own rules or limit, or a frame of 4 GiB and more.
pub fn encode_frame<M: Message>(
    header: &M,
    out: &mut Vec<u8>,
    payload: impl FnOnce(&mut Vec<u8>),
) -> Result<(), FrameError> {
    let start = out.len();
    let fits = put_frame(header, out, payload);
    if fits.is_err() {
        out.truncate(start);
    }
    fits
}

fn put_frame<M: Message>(
    header: &M,
    out: &mut Vec<u8>,
    payload: impl FnOnce(&mut Vec<u8>),
) -> Result<(), FrameError> {
    let start = out.len();
    out.extend_from_slice(&[0; PREFIX]);
    encode(header, out)?;
    let len = out.len() - start - PREFIX;
    let header_len = u16::try_from(len).map_err(|_| FrameError::LargeHeader {
        len,
        max: HEADER_BYTES_MAX,
    })?;
    payload(out);
    let len = out.len() - start - 4;
    let total = u32::try_from(len).map_err(|_| FrameError::Large {
        len,
        max: u32::MAX as usize,
    })?;
    out[start..start + 4].copy_from_slice(&total.to_le_bytes());
    out[start + 4..start + PREFIX].copy_from_slice(&header_len.to_le_bytes());
    Ok(())
}

/// Decodes a header from exactly these bytes.
///
/// # Errors
/// Anything that an honest sender of this version does not send.
pub fn decode_header<M: Message>(bytes: &[u8]) -> Result<M, FrameError> {
    Ok(decode(bytes)?)
}

/// Where the header and the payload of a frame are in the decoder's buffer.
pub type FrameParts = (Range<usize>, Range<usize>);

/// Cuts a stream of bytes into frames: bytes are pushed, frames are asked for.
///
/// It never holds more than what was pushed, and the caller pushes only when
/// [`FrameDecoder::next`] says that more is needed: a length over the limit is refused as soon as
/// its four bytes are there.
#[derive(Debug)]
pub struct FrameDecoder {
    limits: FrameLimits,
    buf: Vec<u8>,
    at: usize,
}

impl FrameDecoder {
    /// A decoder at the start of a stream.
    pub fn new(limits: FrameLimits) -> Self {
        Self {
            limits,
            buf: Vec::new(),
            at: 0,
        }
    }

    /// What frames may be from here on, those already pushed and not asked for included.
    pub fn set_limits(&mut self, limits: FrameLimits) {
        self.limits = limits;
    }

    /// Adds bytes. Ranges given out before are void.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.at > 0 {
            self.buf.drain(..self.at);
            self.at = 0;
            if self.buf.is_empty() {
                self.buf.shrink_to(KEEP_BYTES);
            }
        }
        self.buf.extend_from_slice(bytes);
    }

    /// Whether nothing is left over: a stream that ends here ends between frames.
    pub fn is_empty(&self) -> bool {
        self.at == self.buf.len()
    }

    /// The next whole frame as (header, payload), to be read with [`FrameDecoder::bytes`] before
    /// the next push; `None` when more bytes are needed.
    ///
    /// # Errors
    /// A frame over the limits. The stream is of no use after that: the same error comes again.
    #[allow(clippy::should_implement_trait)] // an iterator's `None` is an end, this one is a wait
    pub fn next(&mut self) -> Result<Option<FrameParts>, FrameError> {
        let rest = &self.buf[self.at..];
        let Some((total, rest)) = rest.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let total = self.limits.total(*total)?;
        let Some((header, _)) = rest.split_first_chunk::<2>() else {
            return Ok(None);
        };
        let (header, payload) = self.limits.parts(total, *header)?;
        if rest.len() < total {
            return Ok(None);
        }
        let header_at = self.at + PREFIX;
        let payload_at = header_at + header;
        self.at = payload_at + payload;
        Ok(Some((header_at..payload_at, payload_at..self.at)))
    }

    /// The bytes of a range from [`FrameDecoder::next`]; none when the range is void.
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.buf.get(range).unwrap_or_default()
    }
}
