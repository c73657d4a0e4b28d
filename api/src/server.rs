//! Sockets: accepting, TLS, limits on connections, and the end, at which running answers are given a moment.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use node::answer::Cancel;
use node::keys::Keys;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tower_http::cors::{AllowOrigin, CorsLayer};

use crate::guard::{Guard, guard};
use crate::impatient::Impatient;
use crate::metrics::{self, ApiMetrics};
use crate::models::Models;
use crate::observe::observe;
use crate::state::State;
use crate::swarm::{self, Watch};
use crate::{chat, completions, embeddings, listing, messages};

/// Connections at once; further ones wait in the system's queue.
const CONNECTIONS_MAX: usize = 1024;
/// A connection that asks nothing for so long is closed; a request's head must come within it.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest head of a request.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// A TLS handshake may take this long.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Who reads nothing for so long is gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// After a failure to accept: the system is out of files, and will have some again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// What is cut off at the end has this long to say so.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// How to serve.
#[derive(Clone)]
pub struct Config {
    /// Where.
    pub bind: SocketAddr,
    /// Serve others than this machine without asking for a key.
    pub without_key: bool,
    /// Keys of which every request must have one, if there are any.
    pub keys: Keys,
    /// Web pages that may ask, by their origin; `*` is any.
    pub cors: Vec<String>,
    /// Certificate and key, for https.
    pub tls: Option<Tls>,
    /// Longest body of a request.
    pub body_bytes_max: usize,
    /// Requests answered at once.
    pub requests_max: usize,
    /// Tokens of an answer where the request does not say.
    pub max_tokens: u32,
    /// How long running answers may go on at the end.
    pub drain: Duration,
}

/// Files in PEM.
#[derive(Clone, Debug)]
pub struct Tls {
    /// The certificate, and those that vouch for it.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Others could ask, and no key is asked for.
    #[error("{0} can be reached from other machines, and there is no key that they must know")]
    Open(SocketAddr),
    /// The address cannot be had.
    #[error("cannot listen on {addr}: {source}")]
    Bind {
        /// Which.
        addr: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// An origin that no browser sends.
    #[error("`{0}` is not an origin: write for example https://chat.example, or *")]
    Origin(String),
    /// A certificate or key cannot be used.
    #[error("{}: {why}", .file.display())]
    Tls {
        /// Which file.
        file: PathBuf,
        /// Why.
        why: String,
    },
}

/// A server that listens.
pub struct Server {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    router: Router,
    drain: Duration,
    closing: Cancel,
    ending: Cancel,
}

impl Server {
    /// Listens, without answering yet.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub async fn bind(config: Config, models: Arc<dyn Models>) -> Result<Self, ServeError> {
        let loopback = config.bind.ip().is_loopback();
        if !loopback && config.keys.is_empty() && !config.without_key {
            return Err(ServeError::Open(config.bind));
        }
        let tls = config.tls.as_ref().map(acceptor).transpose()?;
        let (closing, ending) = (Cancel::new(), Cancel::new());
        let state = Arc::new(State {
            metrics: ApiMetrics::new(&models.metrics(), config.requests_max),
            models,
            places: Arc::new(Semaphore::new(config.requests_max)),
            places_max: config.requests_max,
            body_bytes_max: config.body_bytes_max,
            bodies: Semaphore::new(config.requests_max),
            max_tokens: config.max_tokens,
            watch: Watch::default(),
            closing: closing.clone(),
            ending: ending.clone(),
        });
        let guarded = Guard {
            own_names_only: loopback && config.keys.is_empty(),
            keys: config.keys,
        };
        let router = router(state, guarded, cors(&config.cors)?);
        let addr = config.bind;
        let bound = TcpListener::bind(addr).await;
        Ok(Self {
            listener: bound.map_err(|source| ServeError::Bind { addr, source })?,
            tls,
            router,
            drain: config.drain,
            closing,
            ending,
        })
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let addr = self.listener.local_addr();
        addr.map_or_else(|_| String::new(), |addr| format!("{scheme}://{addr}"))
    }

    /// Answers until `end`; then running answers have a moment to end by themselves.
    pub async fn run(self, end: impl Future<Output = ()>) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut connections = JoinSet::new();
        tokio::pin!(end);
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut end => break,
                Some(_) = connections.join_next() => continue,
                accepted = accept(&self.listener, &places) => accepted,
            };
            let Some((stream, place)) = accepted else {
                sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let (tls, router) = (self.tls.clone(), self.router.clone());
            connections.spawn(connection(stream, tls, router, self.closing.clone(), place));
        }
        drop(self.listener);
        self.closing.set();
        let all = async { while connections.join_next().await.is_some() {} };
        tokio::pin!(all);
        if timeout(self.drain, &mut all).await.is_err() {
            self.ending.set();
            let _ = timeout(LAST_WORDS, all).await;
        }
    }
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> Option<(TcpStream, OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.ok()?;
    let (stream, _) = listener.accept().await.ok()?;
    // A token is a small packet, and the next one is not there yet.
    let _ = stream.set_nodelay(true);
    Some((stream, place))
}

async fn connection(
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    router: Router,
    closing: Cancel,
    _place: OwnedSemaphorePermit,
) {
    match tls {
        None => serve(stream, router, &closing).await,
        Some(tls) => {
            let handshake = timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await;
            if let Ok(Ok(stream)) = handshake {
                serve(stream, router, &closing).await;
            }
        }
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, router: Router, closing: &Cancel) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(
            TokioIo::new(Impatient::new(stream, WRITE_TIMEOUT)),
            TowerToHyperService::new(router),
        );
    tokio::pin!(connection);
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = closing.wait() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "a connection ended");
    }
}

fn router(state: Arc<State>, guarded: Guard, cors: CorsLayer) -> Router {
    Router::new()
        .route("/health", get(listing::health))
        .route("/metrics", get(metrics::metrics))
        .route("/v1/models", get(listing::models))
        .route("/v1/models/{*name}", get(listing::model))
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(completions::complete))
        .route("/v1/messages", post(messages::message))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .route("/v1/embeddings", post(embeddings::embed))
        .merge(swarm::routes())
        .fallback(listing::no_path)
        .method_not_allowed_fallback(listing::no_method)
        .with_state(Arc::clone(&state))
        .layer(from_fn_with_state(Arc::new(guarded), guard))
        .layer(cors)
        .layer(from_fn_with_state(state, observe))
}

fn cors(origins: &[String]) -> Result<CorsLayer, ServeError> {
    let layer = CorsLayer::new()
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(tower_http::cors::AllowHeaders::mirror_request())
        .expose_headers([HeaderName::from_static("x-request-id"), header::RETRY_AFTER]);
    if origins.iter().any(|origin| origin == "*") {
        return Ok(layer.allow_origin(AllowOrigin::any()));
    }
    let origin = |text: &String| {
        let wrong = || ServeError::Origin(text.clone());
        if !text.contains("://") || text.ends_with('/') {
            return Err(wrong());
        }
        HeaderValue::from_str(text).map_err(|_| wrong())
    };
    let origins = origins.iter().map(origin).collect::<Result<Vec<_>, _>>()?;
    Ok(layer.allow_origin(AllowOrigin::list(origins)))
}

fn acceptor(tls: &Tls) -> Result<TlsAcceptor, ServeError> {
    let wrong = |file: &PathBuf, why: String| ServeError::Tls {
        file: file.clone(),
        why,
    };
    let of_cert = |error: &dyn std::fmt::Display| wrong(&tls.cert, error.to_string());
    let certs = CertificateDer::pem_file_iter(&tls.cert)
        .and_then(|certs| certs.collect::<Result<Vec<_>, _>>())
        .map_err(|error| of_cert(&error))?;
    if certs.is_empty() {
        return Err(of_cert(&"there is no certificate in it"));
    }
    let key = PrivateKeyDer::from_pem_file(&tls.key)
        .map_err(|error| wrong(&tls.key, error.to_string()))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| of_cert(&error))?
        .with_no_client_auth()
        .with_single_cert(certs, key)
        .map_err(|error| wrong(&tls.key, error.to_string()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
