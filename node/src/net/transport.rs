//! The transports: TCP + Noise + Yamux and QUIC; with a pre-shared key TCP only, every byte of it
//! under the key, because libp2p's private networks do not cover QUIC.

use std::{error::Error, io, time::Duration};

use libp2p::{
    PeerId, Transport,
    core::{
        muxing::StreamMuxerBox,
        transport::{Boxed, OrTransport, upgrade},
        upgrade::Version,
    },
    dns,
    identity::Keypair,
    noise,
    pnet::{PnetConfig, PreSharedKey},
    quic,
    swarm::DialError,
    tcp, yamux,
};

/// Handshakes that take longer are given up: the slowest link we serve needs about two seconds.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A QUIC connection without any packet for this long is dead; keep-alives go every fifth of it.
const QUIC_IDLE: Duration = Duration::from_secs(25);
/// Streams per connection. Ours are limited to 192 by `streams`; the rest is libp2p's protocols.
const STREAMS_MAX: usize = 256;

type Wire = Boxed<(PeerId, StreamMuxerBox)>;

/// Why the transports could not be built.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Noise refused our key.
    #[error("noise: {0}")]
    Noise(#[from] noise::Error),
}

/// Builds what we dial and listen with. Names in addresses are resolved the way the system says;
/// without a resolver (an isolated machine) plain addresses still work.
pub(super) fn build(keypair: &Keypair, key: Option<[u8; 32]>) -> Result<Wire, TransportError> {
    match dns::tokio::Transport::system(plain(keypair, key)?) {
        Ok(resolving) => Ok(resolving.boxed()),
        Err(error) => {
            tracing::info!(%error, "no resolver: addresses with /dns names cannot be dialled");
            plain(keypair, key)
        }
    }
}

fn plain(keypair: &Keypair, key: Option<[u8; 32]>) -> Result<Wire, TransportError> {
    match key {
        Some(key) => private(keypair, key),
        None => open(keypair),
    }
}

fn tcp() -> tcp::tokio::Transport {
    // One small write per frame must leave at once.
    tcp::tokio::Transport::new(tcp::Config::default().nodelay(true))
}

fn muxer() -> yamux::Config {
    let mut config = yamux::Config::default();
    config.set_max_num_streams(STREAMS_MAX);
    config
}

fn open(keypair: &Keypair) -> Result<Wire, TransportError> {
    let tcp = tcp()
        .upgrade(Version::V1Lazy)
        .authenticate(noise::Config::new(keypair)?)
        .multiplex(muxer())
        .timeout(HANDSHAKE_TIMEOUT);
    let mut config = quic::Config::new(keypair);
    config.handshake_timeout = HANDSHAKE_TIMEOUT;
    config.max_idle_timeout = u32::try_from(QUIC_IDLE.as_millis()).unwrap_or(u32::MAX);
    config.keep_alive_interval = QUIC_IDLE / 5;
    let quic = quic::tokio::Transport::new(config);
    Ok(OrTransport::new(tcp, quic)
        .map(|either, _| match either {
            futures::future::Either::Left((peer, muxer)) => (peer, StreamMuxerBox::new(muxer)),
            futures::future::Either::Right((peer, muxer)) => (peer, StreamMuxerBox::new(muxer)),
        })
        .boxed())
}

fn private(keypair: &Keypair, key: [u8; 32]) -> Result<Wire, TransportError> {
    let pnet = PnetConfig::new(PreSharedKey::new(key));
    let sealed = tcp().and_then(move |socket, _| pnet.handshake(socket));
    Ok(upgrade::Builder::new(sealed, Version::V1Lazy)
        .authenticate(noise::Config::new(keypair)?)
        .multiplex(muxer())
        .timeout(HANDSHAKE_TIMEOUT)
        .boxed())
}

/// An I/O error's shortest useful text.
pub(super) fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => "the port is in use; choose another or 0".into(),
        io::ErrorKind::PermissionDenied => "not permitted; ports below 1024 need root".into(),
        io::ErrorKind::AddrNotAvailable => "this machine has no such address".into(),
        _ => error.to_string(),
    }
}

/// Addresses of one failed dial that are told.
const TOLD_MAX: usize = 3;

/// A failed dial in one line: the addresses, and why each failed.
pub(super) fn explain_dial(error: &DialError) -> String {
    match error {
        DialError::Denied { cause } => cause.to_string(),
        DialError::Transport(errors) => {
            let told = errors.iter().take(TOLD_MAX);
            let told = told.map(|(addr, error)| format!("{addr}: {}", said_once(error)));
            told.collect::<Vec<_>>().join("; ")
        }
        other => other.to_string(),
    }
}

/// Transports wrap each other's errors, and each prints those within it again.
fn said_once(error: &libp2p::TransportError<io::Error>) -> String {
    let text = error
        .source()
        .map_or_else(|| error.to_string(), |inner| inner.to_string());
    let mut parts: Vec<&str> = Vec::new();
    for part in text
        .lines()
        .flat_map(|line| line.trim_start_matches(" - ").split(": "))
    {
        if !part.ends_with(':') && !parts.contains(&part) {
            parts.push(part);
        }
    }
    parts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_dial_is_one_line_that_says_each_cause_once() {
        let wrapped = "Multiple dial errors occurred:\n - Connection refused (os error 111): \
                       Connection refused (os error 111)";
        let error = || libp2p::TransportError::Other(io::Error::other(wrapped));
        let addrs = ["/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/2"];
        let errors = addrs.map(|addr| (addr.parse().expect("an address"), error()));
        let told = explain_dial(&DialError::Transport(errors.into()));
        assert_eq!(
            told,
            "/ip4/127.0.0.1/tcp/1: Connection refused (os error 111); \
             /ip4/127.0.0.1/tcp/2: Connection refused (os error 111)"
        );
    }
}
