//! `GET /metrics` of a node, on a port of its own. It answers nothing else but `/health`, and never touches what it
//! serves metrics of: what is read is read from the registry.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue, WWW_AUTHENTICATE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::Metrics;
use crate::keys::{Keys, is_own_name, key_of};

/// A few collectors, and whoever looks by hand.
const CONNECTIONS_MAX: usize = 16;
/// Longest head of a request.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// A request's head must come within this.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection lives no longer: collectors open another one, and one that reads nothing is gone.
const CONNECTION_MAX: Duration = Duration::from_secs(300);
/// After a failure to accept: the system is out of files, and will have some again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where metrics are served: an address with a port, or a port of this machine's loopback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetricsAddr(pub SocketAddr);

impl FromStr for MetricsAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let of_port = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
        let port = text.strip_prefix(':').unwrap_or(text).parse().map(of_port);
        port.or_else(|_| text.parse()).map(Self).map_err(|_| {
            "write a port, for example 9464, or an address with one: 0.0.0.0:9464".into()
        })
    }
}

/// Why metrics are not served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Others could ask, and no key is asked for.
    #[error(
        "metrics at {0} can be read from other machines: give --metrics-key-file FILE with keys that they must know, \
         --metrics-without-key if everybody may, or a port alone to serve this machine"
    )]
    Open(SocketAddr),
    /// The address cannot be had.
    #[error("cannot serve metrics at {addr}: {source}; try --metrics with another port")]
    Bind {
        /// Which.
        addr: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
}

/// A server that runs until it is dropped.
#[derive(Debug)]
pub struct MetricsServer {
    addr: SocketAddr,
    serving: JoinHandle<()>,
}

/// Who may ask for what.
struct Door {
    metrics: Metrics,
    keys: Keys,
    /// Only requests to this machine's own address are answered: a web page that had its name resolved to it asks
    /// by that name.
    own_names_only: bool,
}

impl MetricsServer {
    /// Listens and answers from now on, inside the runtime.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub async fn start(
        at: MetricsAddr,
        keys: Keys,
        without_key: bool,
        metrics: Metrics,
    ) -> Result<Self, ServerError> {
        let MetricsAddr(addr) = at;
        let loopback = addr.ip().is_loopback();
        if !loopback && keys.is_empty() && !without_key {
            return Err(ServerError::Open(addr));
        }
        let refused = |source| ServerError::Bind { addr, source };
        let listener = TcpListener::bind(addr).await.map_err(refused)?;
        let addr = listener.local_addr().map_err(refused)?;
        let door = Arc::new(Door {
            metrics,
            own_names_only: loopback && keys.is_empty(),
            keys,
        });
        let serving = tokio::spawn(serve(listener, door));
        Ok(Self { addr, serving })
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        format!("http://{}/metrics", self.addr)
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(listener: TcpListener, door: Arc<Door>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "a connection for metrics failed");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let door = door.clone();
        tokio::spawn(async move {
            let answer = service_fn(|request| {
                let response = door.answer(&request);
                async { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(HEAD_BYTES_MAX)
                .serve_connection(TokioIo::new(stream), answer);
            let _ = timeout(CONNECTION_MAX, connection).await;
            drop(place);
        });
    }
}

impl Door {
    fn answer(&self, request: &Request<Incoming>) -> Response<String> {
        let headers = request.headers();
        let host = headers.get(HOST).and_then(|host| host.to_str().ok());
        if self.own_names_only && !host.is_some_and(is_own_name) {
            let why = "this server has no key and answers only by its own address\n";
            return plain(StatusCode::FORBIDDEN, why.into());
        }
        let path = request.uri().path();
        if path == "/health" {
            return plain(StatusCode::OK, "ok\n".into());
        }
        if !self.keys.is_empty() && !key_of(headers).is_some_and(|key| self.keys.has(key)) {
            let why = "this server asks for a key: `Authorization: Bearer KEY`\n";
            let mut response = plain(StatusCode::UNAUTHORIZED, why.into());
            let scheme = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(WWW_AUTHENTICATE, scheme);
            return response;
        }
        match (path, request.method()) {
            ("/metrics", &Method::GET | &Method::HEAD) => {
                let mut response = Response::new(self.metrics.text());
                let kind = HeaderValue::from_static(super::CONTENT_TYPE);
                response.headers_mut().insert(CONTENT_TYPE, kind);
                response
            }
            ("/metrics", _) => plain(StatusCode::METHOD_NOT_ALLOWED, "GET it\n".into()),
            _ => plain(StatusCode::NOT_FOUND, "there is only /metrics\n".into()),
        }
    }
}

fn plain(status: StatusCode, text: String) -> Response<String> {
    let mut response = Response::new(text);
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    const DEADLINE: Duration = Duration::from_secs(30);

    async fn ask(server: &MetricsServer, head: &str) -> String {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        let request = format!("{head}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        let read = stream.read_to_string(&mut text);
        timeout(DEADLINE, read).await.unwrap().unwrap();
        text
    }

    async fn start(at: &str, keys: &[&str]) -> Result<MetricsServer, ServerError> {
        let at = at.parse().unwrap();
        MetricsServer::start(at, Keys::new(keys), false, Metrics::new("test")).await
    }

    #[test]
    fn a_port_alone_is_this_machines() {
        for (text, addr) in [
            ("9464", "127.0.0.1:9464"),
            (":9464", "127.0.0.1:9464"),
            ("0.0.0.0:1", "0.0.0.0:1"),
            ("[::1]:9464", "[::1]:9464"),
        ] {
            assert_eq!(text.parse(), Ok(MetricsAddr(addr.parse().unwrap())));
        }
        for wrong in ["", "host", "1.2.3.4", "99999", "-1"] {
            assert!(wrong.parse::<MetricsAddr>().is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn programs_of_this_machine_read_metrics_and_web_pages_do_not() {
        let server = start("0", &[]).await.unwrap();
        let text = ask(&server, "GET /metrics HTTP/1.1\r\nHost: localhost").await;
        assert!(
            text.starts_with("HTTP/1.1 200") && text.contains("# EOF"),
            "{text}"
        );
        assert!(
            text.to_lowercase().contains("application/openmetrics-text"),
            "{text}"
        );
        for (head, status) in [
            ("GET /metrics HTTP/1.1\r\nHost: evil.example", "403"),
            ("GET / HTTP/1.1\r\nHost: localhost", "404"),
            ("POST /metrics HTTP/1.1\r\nHost: localhost", "405"),
            ("GET /health HTTP/1.1\r\nHost: localhost", "200"),
            ("nonsense", "400"),
        ] {
            let text = ask(&server, head).await;
            assert!(
                text.starts_with(&format!("HTTP/1.1 {status}")),
                "{head}: {text}"
            );
        }
    }

    #[tokio::test]
    async fn other_machines_need_a_key() {
        assert!(matches!(
            start("0.0.0.0:0", &[]).await,
            Err(ServerError::Open(_))
        ));
        let server = start("127.0.0.1:0", &["right"]).await.unwrap();
        for (head, status) in [
            ("Authorization: Bearer right", "200"),
            ("Authorization: Bearer wrong", "401"),
            ("X-Nothing: 1", "401"),
        ] {
            let text = ask(
                &server,
                &format!("GET /metrics HTTP/1.1\r\nHost: a\r\n{head}"),
            )
            .await;
            assert!(
                text.starts_with(&format!("HTTP/1.1 {status}")),
                "{head}: {text}"
            );
        }
        let taken = start(&server.addr.to_string(), &["right"]).await;
        assert!(matches!(taken, Err(ServerError::Bind { .. })));
    }
}
