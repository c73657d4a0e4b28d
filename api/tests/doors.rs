//! Who gets in, without any model: keys, origins, TLS, places. Opening a session never ends here, so that a test sees
//! who waits and who has gone.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use api::swarm::{PeerDetail, Seeing, SwarmView};
use api::{ApiError, Config, Found, Keys, Listed, Models, ServeError, Server, Tls};
use futures::FutureExt;
use futures::future::BoxFuture;
use node::answer::Source;
use node::control::NodeStatus;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(30);

/// One model that is never opened.
#[derive(Default)]
struct Closed {
    /// Openings that somebody waits for.
    opening: Arc<AtomicUsize>,
}

struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Seeing for Closed {
    fn swarm(&self) -> SwarmView {
        SwarmView::default()
    }

    fn peer<'a>(
        &'a self,
        peer: &'a str,
        _: Option<&'a str>,
    ) -> BoxFuture<'a, Result<PeerDetail, ApiError>> {
        async move { Err(ApiError::no_peer(peer)) }.boxed()
    }

    fn node(&self) -> BoxFuture<'_, Option<NodeStatus>> {
        async { None }.boxed()
    }
}

impl Models for Closed {
    fn listed(&self) -> Vec<Listed> {
        vec![Listed {
            id: "ab".repeat(32),
            name: "closed".into(),
            n_layer: 4,
            n_ctx: 64,
        }]
    }

    fn peers(&self) -> usize {
        1
    }

    fn find<'a>(&'a self, asked: Option<&'a str>) -> BoxFuture<'a, Result<Arc<Found>, ApiError>> {
        let found = match asked {
            Some("closed") | None => Ok(Arc::new(Found {
                id: "ab".repeat(32),
                name: "closed".into(),
                vocab: None,
                n_ctx_max: 64,
                embeds: Err("it is never opened".into()),
            })),
            Some(other) => Err(ApiError::unknown_model(format!("no {other}, only closed"))),
        };
        async { found }.boxed()
    }

    fn open<'a>(&'a self, _: &'a Found, _: u32) -> BoxFuture<'a, Result<Source, ApiError>> {
        self.opening.fetch_add(1, Ordering::SeqCst);
        let counted = Counted(Arc::clone(&self.opening));
        async move {
            let _counted = counted;
            std::future::pending().await
        }
        .boxed()
    }

    fn privacy(&self) -> &'static str {
        "open"
    }

    fn wire(&self) -> String {
        "f32".into()
    }
}

fn config() -> Config {
    Config {
        bind: SocketAddr::from(([127, 0, 0, 1], 0)),
        without_key: false,
        keys: Keys::default(),
        cors: Vec::new(),
        tls: None,
        body_bytes_max: 1 << 16,
        requests_max: 2,
        max_tokens: 16,
        drain: Duration::from_millis(100),
    }
}

/// Serves in the background until the test ends; gives the address and who waits.
async fn start(config: Config) -> Result<(SocketAddr, Arc<AtomicUsize>)> {
    let models = Closed::default();
    let opening = Arc::clone(&models.opening);
    let server = Server::bind(config, Arc::new(models)).await?;
    let url = server.url();
    let addr = url.split("://").nth(1).context("no address")?.parse()?;
    tokio::spawn(server.run(std::future::pending()));
    Ok((addr, opening))
}

async fn ask(addr: SocketAddr, request: &str) -> Result<String> {
    read(TcpStream::connect(addr).await?, request).await
}

async fn read(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> Result<String> {
    let request = request.replace('\n', "\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    // A peer may leave without TLS's goodbye.
    let _ = timeout(PATIENCE, stream.read_to_end(&mut answer)).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\nHost: localhost\nConnection: close\n{headers}\n")
}

fn prompt() -> String {
    let body = "{\"prompt\": [1, 2]}";
    let length = body.len();
    format!(
        "POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: {length}\n\n{body}"
    )
}

async fn until(what: &str, mut seen: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !seen() {
        ensure!(Instant::now() < deadline, "still not: {what}");
        sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn others_need_a_key() -> Result<()> {
    let open = Config {
        bind: SocketAddr::from(([0, 0, 0, 0], 0)),
        ..config()
    };
    let refused = Server::bind(open.clone(), Arc::new(Closed::default())).await;
    ensure!(matches!(refused, Err(ServeError::Open(_))));
    let keys = Keys::new(["secret"]);
    let keyed = Config {
        keys,
        ..open.clone()
    };
    let (addr, _) = start(keyed).await?;
    let local = SocketAddr::from(([127, 0, 0, 1], addr.port()));
    let answer = ask(local, &get("/v1/models", "")).await?;
    ensure!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    ensure!(answer.contains("invalid_api_key"), "{answer}");
    let answer = ask(local, &get("/v1/models", "Authorization: Bearer secret\n")).await?;
    ensure!(
        answer.starts_with("HTTP/1.1 200") && answer.contains("closed"),
        "{answer}"
    );
    ensure!(
        ask(local, &get("/health", ""))
            .await?
            .starts_with("HTTP/1.1 200")
    );
    let anybody = Config {
        without_key: true,
        ..open
    };
    let (addr, _) = start(anybody).await?;
    let local = SocketAddr::from(([127, 0, 0, 1], addr.port()));
    ensure!(
        ask(local, &get("/v1/models", ""))
            .await?
            .starts_with("HTTP/1.1 200")
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn only_listed_origins_may_read() -> Result<()> {
    let cors = vec!["https://chat.example".to_owned()];
    let (addr, _) = start(Config { cors, ..config() }).await?;
    for (origin, allowed) in [
        ("https://chat.example", true),
        ("https://evil.example", false),
    ] {
        let preflight = format!(
            "OPTIONS /v1/chat/completions HTTP/1.1\nHost: localhost\nConnection: close\nOrigin: {origin}\n\
             Access-Control-Request-Method: POST\nAccess-Control-Request-Headers: content-type\n\n"
        );
        for request in [preflight, get("/v1/models", &format!("Origin: {origin}\n"))] {
            let answer = ask(addr, &request).await?.to_lowercase();
            let said = answer.contains(&format!("access-control-allow-origin: {origin}"));
            assert_eq!(said, allowed, "{origin}: {answer}");
        }
    }
    for wrong in ["chat.example", "https://chat.example/"] {
        let cors = vec![wrong.to_owned()];
        let refused = Server::bind(Config { cors, ..config() }, Arc::new(Closed::default())).await;
        ensure!(matches!(refused, Err(ServeError::Origin(_))), "{wrong}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn places_are_few_and_free_when_somebody_leaves() -> Result<()> {
    let (addr, opening) = start(config()).await?;
    let mut waiting = Vec::new();
    for n in 1..=2 {
        let mut stream = TcpStream::connect(addr).await?;
        stream
            .write_all(prompt().replace('\n', "\r\n").as_bytes())
            .await?;
        waiting.push(stream);
        until("it waits for a session", || {
            opening.load(Ordering::SeqCst) == n
        })
        .await?;
    }
    let refused = ask(addr, &prompt().replace("Host", "Connection: close\nHost")).await?;
    ensure!(refused.starts_with("HTTP/1.1 429"), "{refused}");
    ensure!(
        refused.to_lowercase().contains("retry-after: 1"),
        "{refused}"
    );
    // Those who ask nothing of the swarm are answered all the same.
    ensure!(
        ask(addr, &get("/health", ""))
            .await?
            .contains("\"answering\":2")
    );
    waiting.pop();
    until("the opening is given up", || {
        opening.load(Ordering::SeqCst) == 1
    })
    .await?;
    let mut stream = TcpStream::connect(addr).await?;
    stream
        .write_all(prompt().replace('\n', "\r\n").as_bytes())
        .await?;
    until("the place is taken again", || {
        opening.load(Ordering::SeqCst) == 2
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn https_by_certificate_and_key() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()])?;
    let (cert, key) = (
        folder.path().join("cert.pem"),
        folder.path().join("key.pem"),
    );
    std::fs::write(&cert, made.cert.pem())?;
    std::fs::write(&key, made.key_pair.serialize_pem())?;
    let tls = Some(Tls {
        cert: cert.clone(),
        key: key.clone(),
    });
    let (addr, _) = start(Config { tls, ..config() }).await?;
    let answer = over_tls(addr, &cert, &get("/v1/models", "")).await?;
    ensure!(
        answer.starts_with("HTTP/1.1 200") && answer.contains("closed"),
        "{answer}"
    );
    // Somebody who speaks no TLS holds nobody up.
    let _idle = TcpStream::connect(addr).await?;
    ensure!(!ask(addr, &get("/health", "")).await?.contains("200"));
    ensure!(
        over_tls(addr, &cert, &get("/health", ""))
            .await?
            .contains("200")
    );
    for (cert, key) in [
        (&key, &key),
        (&cert, &cert),
        (&folder.path().join("none"), &key),
    ] {
        let tls = Some(Tls {
            cert: cert.clone(),
            key: key.clone(),
        });
        let refused = Server::bind(Config { tls, ..config() }, Arc::new(Closed::default())).await;
        ensure!(matches!(refused, Err(ServeError::Tls { .. })));
    }
    Ok(())
}

async fn over_tls(addr: SocketAddr, cert: &Path, request: &str) -> Result<String> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(cert)?)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let stream = TcpStream::connect(addr).await?;
    let name = ServerName::try_from("localhost")?;
    read(connector.connect(name, stream).await?, request).await
}
