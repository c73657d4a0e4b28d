//! The fetch service: snapshots of adverts, manifests, metadata shards. One request a stream.
//!
//! The serving side bounds concurrency, sizes and time; the asking side believes nothing: every
//! reply is held against the hash that was asked for, or, in a snapshot, against each signature.
//! Weights do not travel here.

use std::{
    future::Future,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use shard_registry::{Manifest, ManifestError};
use swarm_proto::{
    CodecError, Fetch, Found, FrameDecoder, FrameError, FrameLimits, Message, ModelId, Peer,
    ShardId, decode_header, decode_snapshot, encode_frame, encode_snapshot,
    fetch::{CHUNK_BYTES_MAX, FETCH_HEADER_MAX, SNAPSHOT_BYTES_MAX},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Semaphore,
    task::JoinHandle,
};

use super::{
    handle::Net,
    stream::{OpenError, Proto, Stream},
    uplink,
};
use crate::{peer_book::PeerBook, shares::Shares};

/// Requests served at once: each may hold one reply (64 MiB at most, usually a few MiB) in memory.
const SERVED_MAX: usize = 16;
/// Requests that wait or are served, over all peers: a stream and a task each.
const REQUESTS_MAX: usize = 256;
/// Those of one peer: it asks for one thing after the other, and a few at once as it starts. What is
/// more is dropped, so that slow readers hold their own places and nobody else's.
const REQUESTS_PER_PEER_MAX: usize = 4;
/// How long an opener may take to say what it wants.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// How long a chunk may take to leave: 1 MiB on a 1 Mbit/s uplink needs eight seconds.
const CHUNK_DEADLINE: Duration = Duration::from_secs(20);
/// Payload of one chunk: small enough that a session's frames beside it are not held up long.
const CHUNK_BYTES: usize = 64 * 1024;
/// Holders that may fail one after the other before giving up.
const HOLDERS_MAX: usize = 5;
/// Holders that are asked at most: those that send something else are no reason to give up.
const ASKED_MAX: usize = 32;
/// How long one holder may take to open a stream.
const OPEN_DEADLINE: Duration = Duration::from_secs(5);
/// How long one holder may take to send everything.
const REPLY_DEADLINE: Duration = Duration::from_secs(60);
/// A whole reply, from our side: whoever asked has given up by then.
const SERVE_DEADLINE: Duration = REPLY_DEADLINE;
/// Kademlia is asked where adverts name nobody.
const PROVIDERS_DEADLINE: Duration = Duration::from_secs(5);

const REQUEST: FrameLimits = FrameLimits {
    header_max: Fetch::BYTES_MAX,
    payload_max: 0,
};
const REPLY: FrameLimits = FrameLimits {
    header_max: FETCH_HEADER_MAX,
    payload_max: CHUNK_BYTES_MAX,
};

/// What may be fetched from us besides adverts. Called on blocking threads.
pub trait Shelf: Send + Sync + 'static {
    /// A manifest in its canonical encoding.
    ///
    /// # Errors
    /// It is here and cannot be read.
    fn manifest(&self, id: &ModelId) -> io::Result<Option<Vec<u8>>>;

    /// The bytes of a metadata shard.
    ///
    /// # Errors
    /// It is here and cannot be read.
    fn shard(&self, id: &ShardId) -> io::Result<Option<Vec<u8>>>;
}

/// Nothing but adverts.
impl Shelf for () {
    fn manifest(&self, _: &ModelId) -> io::Result<Option<Vec<u8>>> {
        Ok(None)
    }

    fn shard(&self, _: &ShardId) -> io::Result<Option<Vec<u8>>> {
        Ok(None)
    }
}

/// Why something was not fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// No stream to the peer.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The stream broke.
    #[error("peer {peer} broke off: {source}")]
    Io {
        /// Whom we asked.
        peer: Peer,
        /// What happened.
        source: io::Error,
    },
    /// The peer sent what is no reply.
    #[error("peer {peer} sent a bad reply: {reason}")]
    Reply {
        /// Whom we asked.
        peer: Peer,
        /// What is wrong with it.
        reason: String,
    },
    /// The bytes are not those asked for.
    #[error("peer {peer} sent other bytes than {wanted}: refused")]
    Hash {
        /// Whom we asked.
        peer: Peer,
        /// What was asked for.
        wanted: String,
    },
    /// What its id stands for is no manifest that this program takes, whoever sends it.
    #[error("model {model} cannot be used: {source}")]
    Manifest {
        /// The model.
        model: ModelId,
        /// Why.
        source: ManifestError,
    },
    /// The peer has it and cannot give it.
    #[error("peer {peer} cannot give {wanted}: {why}")]
    Failed {
        /// Whom we asked.
        peer: Peer,
        /// What was asked for.
        wanted: String,
        /// Its own words.
        why: String,
    },
    /// The peer does not have it.
    #[error("peer {peer} does not have {wanted}")]
    Missing {
        /// Whom we asked.
        peer: Peer,
        /// What was asked for.
        wanted: String,
    },
    /// Too slow.
    #[error("peer {peer} did not send {wanted} within {REPLY_DEADLINE:?}")]
    Timeout {
        /// Whom we asked.
        peer: Peer,
        /// What was asked for.
        wanted: String,
    },
    /// Nobody is known to have it.
    #[error("no peer is known that holds model {model}; is one running in this swarm?")]
    NoHolder {
        /// The model.
        model: ModelId,
    },
}

impl Net {
    /// Answers fetch requests until shut down; `None` where somebody does so already.
    pub fn serve_fetch(&self, shelf: Arc<dyn Shelf>) -> Option<JoinHandle<()>> {
        let mut streams = self.accept(Proto::Fetch)?;
        let net = self.clone();
        let slots = Arc::new(Semaphore::new(SERVED_MAX));
        let shares = Shares::new(REQUESTS_MAX, REQUESTS_PER_PEER_MAX);
        Some(tokio::spawn(async move {
            while let Some((peer, stream)) = streams.recv().await {
                let share = match shares.take(peer) {
                    Ok(share) => share,
                    Err(why) => {
                        tracing::debug!(%peer, ?why, "fetch request dropped");
                        continue;
                    }
                };
                let (net, shelf, slots) = (net.clone(), shelf.clone(), slots.clone());
                tokio::spawn(async move {
                    let served = async {
                        // Never closed.
                        let _slot = slots.acquire().await;
                        serve(&net, shelf, stream).await
                    };
                    match tokio::time::timeout(SERVE_DEADLINE, served).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => {
                            tracing::debug!(%peer, %error, "fetch request not served");
                        }
                        Err(_) => tracing::debug!(%peer, "fetch request given up: too slow"),
                    }
                    drop(share);
                });
            }
        }))
    }

    /// Asks one peer for the adverts it knows and takes over those that are good; tells how many.
    ///
    /// # Errors
    /// See [`FetchError`].
    pub async fn fetch_snapshot(&self, peer: Peer, addrs: &[String]) -> Result<usize, FetchError> {
        let bytes = self
            .fetch_from(peer, addrs, Fetch::Snapshot, SNAPSHOT_BYTES_MAX as u64)
            .await?;
        let bad = |e: CodecError| FetchError::Reply {
            peer,
            reason: e.to_string(),
        };
        let adverts = decode_snapshot(&bytes).map_err(bad)?;
        Ok(self.adverts().insert_all(adverts).await)
    }

    /// A manifest, from whoever holds it: its bytes hash to `id`, and it passed its own checks. Who sends something
    /// else is written into `book`, and those in it are asked last.
    ///
    /// # Errors
    /// The last holder's, or that there is none.
    pub async fn fetch_manifest(
        &self,
        id: &ModelId,
        book: &PeerBook,
    ) -> Result<Manifest, FetchError> {
        self.ask_holders(id, book, |peer, addrs| async move {
            let bytes = self
                .fetch_from(peer, &addrs, Fetch::Manifest(*id), u64::MAX)
                .await?;
            if Manifest::id_of(&bytes) != *id {
                return Err(FetchError::Hash {
                    peer,
                    wanted: format!("manifest {id}"),
                });
            }
            Manifest::decode(&bytes).map_err(|source| FetchError::Manifest { model: *id, source })
        })
        .await
    }

    /// A metadata shard of `model`, from whoever holds it: its bytes hash to `id`. `book` as above.
    ///
    /// # Errors
    /// The last holder's, or that there is none.
    pub async fn fetch_shard(
        &self,
        model: &ModelId,
        id: &ShardId,
        book: &PeerBook,
    ) -> Result<Vec<u8>, FetchError> {
        self.ask_holders(model, book, |peer, addrs| async move {
            let bytes = self
                .fetch_from(peer, &addrs, Fetch::Shard(*id), u64::MAX)
                .await?;
            if ShardId::of(&bytes) == *id {
                Ok(bytes)
            } else {
                Err(FetchError::Hash {
                    peer,
                    wanted: format!("shard {id}"),
                })
            }
        })
        .await
    }

    async fn ask_holders<T, F: Future<Output = Result<T, FetchError>>>(
        &self,
        model: &ModelId,
        book: &PeerBook,
        ask: impl Fn(Peer, Vec<String>) -> F,
    ) -> Result<T, FetchError> {
        let mut holders = self.adverts().holders(model);
        if holders.is_empty() {
            let providers = self.providers(model.0.0, PROVIDERS_DEADLINE).await;
            holders = providers
                .into_iter()
                .map(|peer| (peer, Vec::new()))
                .collect();
        }
        let alone = book.left_alone();
        holders.sort_by_key(|(peer, _)| alone.contains(peer));
        let mut last = FetchError::NoHolder { model: *model };
        let mut failed = 0;
        for (peer, addrs) in holders.into_iter().take(ASKED_MAX) {
            match ask(peer, addrs).await {
                Ok(found) => return Ok(found),
                Err(error @ FetchError::Manifest { .. }) => return Err(error),
                Err(error @ (FetchError::Hash { .. } | FetchError::Reply { .. })) => {
                    tracing::warn!(%peer, %error, "a peer sends what it should not");
                    book.failed(peer, &error.to_string());
                    last = error;
                }
                Err(error) => {
                    tracing::debug!(%peer, %error, "trying the next holder");
                    last = error;
                    failed += 1;
                }
            }
            if failed == HOLDERS_MAX {
                break;
            }
        }
        Err(last)
    }

    /// One request to one peer; the reply is not verified here.
    async fn fetch_from(
        &self,
        peer: Peer,
        addrs: &[String],
        request: Fetch,
        bytes_max: u64,
    ) -> Result<Vec<u8>, FetchError> {
        let stream = self.open(peer, addrs, Proto::Fetch, OPEN_DEADLINE).await?;
        let wanted = || match request {
            Fetch::Snapshot => "adverts".to_owned(),
            Fetch::Manifest(id) => format!("manifest {id}"),
            Fetch::Shard(id) => format!("shard {id}"),
        };
        match tokio::time::timeout(REPLY_DEADLINE, ask(stream, request, bytes_max)).await {
            Err(_) => Err(FetchError::Timeout {
                peer,
                wanted: wanted(),
            }),
            Ok(Ok(Some(bytes))) => Ok(bytes),
            Ok(Ok(None)) => Err(FetchError::Missing {
                peer,
                wanted: wanted(),
            }),
            Ok(Err(AskError::Failed(why))) => Err(FetchError::Failed {
                peer,
                wanted: wanted(),
                why,
            }),
            Ok(Err(AskError::Io(source))) => Err(FetchError::Io { peer, source }),
            Ok(Err(AskError::Reply(reason))) => Err(FetchError::Reply { peer, reason }),
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{0}")]
    Reply(String),
    /// Its own words.
    #[error("{0}")]
    Failed(String),
}

impl From<FrameError> for AskError {
    fn from(error: FrameError) -> Self {
        AskError::Reply(error.to_string())
    }
}

async fn ask(stream: Stream, request: Fetch, bytes_max: u64) -> Result<Option<Vec<u8>>, AskError> {
    let mut frames = Frames::new(stream, REPLY);
    frames.send(&request, &[]).await?;
    let len = match frames.next::<Found>().await? {
        (Found::Bytes { len }, _) if len <= bytes_max => len,
        (Found::Bytes { len }, _) => {
            return Err(AskError::Reply(format!(
                "{len} bytes, the limit is {bytes_max}"
            )));
        }
        (Found::Missing, _) => return Ok(None),
        (Found::Failed(why), _) => return Err(AskError::Failed(why)),
        (Found::Chunk, _) => return Err(AskError::Reply("a chunk before the length".into())),
    };
    // Grows with what arrives, not with what was announced.
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < len {
        match frames.next::<Found>().await? {
            (Found::Chunk, chunk)
                if !chunk.is_empty() && (bytes.len() + chunk.len()) as u64 <= len =>
            {
                bytes.extend_from_slice(chunk);
            }
            (Found::Failed(why), _) => return Err(AskError::Failed(why)),
            (other, chunk) => {
                let n = chunk.len();
                return Err(AskError::Reply(format!(
                    "{other:?} with {n} bytes at {} of {len}",
                    bytes.len()
                )));
            }
        }
    }
    // It tells the holder that all was read; that the bytes are here does not depend on it.
    let _ = frames.close().await;
    Ok(Some(bytes))
}

async fn serve(net: &Net, shelf: Arc<dyn Shelf>, stream: Stream) -> Result<(), AskError> {
    let late = || AskError::Io(io::ErrorKind::TimedOut.into());
    let mut frames = Frames::new(stream, REQUEST);
    let request = tokio::time::timeout(REQUEST_DEADLINE, frames.next::<Fetch>()).await;
    let (request, _) = request.map_err(|_| late())??;
    let found = match request {
        Fetch::Snapshot => Ok(Some(encode_snapshot(&net.adverts().snapshot_signed()))),
        Fetch::Manifest(id) => blocking(move || shelf.manifest(&id)).await,
        Fetch::Shard(id) => blocking(move || shelf.shard(&id)).await,
    };
    let timed = |sending| tokio::time::timeout(CHUNK_DEADLINE, sending);
    let bytes = match found {
        Ok(Some(bytes)) => bytes,
        Ok(None) => {
            timed(frames.send(&Found::Missing, &[]))
                .await
                .map_err(|_| late())??;
            return frames.close().await;
        }
        Err(error) => {
            if net.unreadable().now(Instant::now()) {
                tracing::warn!(%error, "cannot read what peers ask for: was the model's file moved or changed?");
            } else {
                tracing::debug!(%error, "cannot read what a peer asks for");
            }
            // The system's words may name our files: they stay here.
            let failed = Found::Failed("it is here and cannot be read".into());
            timed(frames.send(&failed, &[]))
                .await
                .map_err(|_| late())??;
            return frames.close().await;
        }
    };
    let start = Instant::now();
    timed(frames.send(
        &Found::Bytes {
            len: bytes.len() as u64,
        },
        &[],
    ))
    .await
    .map_err(|_| late())??;
    for chunk in bytes.chunks(CHUNK_BYTES) {
        let sent = tokio::time::timeout(CHUNK_DEADLINE, frames.send(&Found::Chunk, chunk)).await;
        sent.map_err(|_| late())??;
    }
    frames.close().await?;
    if bytes.len() >= uplink::BYTES_MIN {
        let read = tokio::time::timeout(CHUNK_DEADLINE, frames.end()).await;
        read.map_err(|_| late())??;
        let now = Instant::now();
        net.with_uplink(|uplink| uplink.sent(bytes.len(), now - start, now));
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(
    read: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(read)
        .await
        .unwrap_or_else(|e| Err(io::Error::other(e)))
}

/// Frames over a stream, one direction at a time.
struct Frames {
    stream: Stream,
    decoder: FrameDecoder,
    chunk: Vec<u8>,
    out: Vec<u8>,
}

impl Frames {
    fn new(stream: Stream, limits: FrameLimits) -> Self {
        let chunk = vec![0; 16 * 1024];
        Self {
            stream,
            decoder: FrameDecoder::new(limits),
            chunk,
            out: Vec::new(),
        }
    }

    async fn send(&mut self, header: &impl Message, payload: &[u8]) -> Result<(), AskError> {
        self.out.clear();
        encode_frame(header, &mut self.out, |out| out.extend_from_slice(payload))?;
        self.stream.write_all(&self.out).await?;
        self.stream.flush().await?;
        Ok(())
    }

    async fn next<M: Message>(&mut self) -> Result<(M, &[u8]), AskError> {
        let (header, payload) = loop {
            if let Some(frame) = self.decoder.next()? {
                break frame;
            }
            let n = self.stream.read(&mut self.chunk).await?;
            if n == 0 {
                return Err(AskError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
            self.decoder.push(&self.chunk[..n]);
        };
        let header = decode_header(self.decoder.bytes(header))?;
        Ok((header, self.decoder.bytes(payload)))
    }

    async fn close(&mut self) -> Result<(), AskError> {
        Ok(self.stream.shutdown().await?)
    }

    /// Waits until the other side has closed its half, too.
    async fn end(&mut self) -> Result<(), AskError> {
        match self.stream.read(&mut self.chunk).await? {
            0 => Ok(()),
            n => Err(AskError::Reply(format!("{n} bytes after the request"))),
        }
    }
}
