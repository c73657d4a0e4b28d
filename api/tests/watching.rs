//! Who looks at the swarm over HTTP, without any: the page and its rules, the key, events and their end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use api::swarm::{PeerDetail, PeerView, Seeing, SwarmView};
use api::{ApiError, Config, Found, Keys, Listed, Models, Server};
use futures::FutureExt;
use futures::future::BoxFuture;
use node::answer::Source;
use node::control::NodeStatus;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(30);
/// As many as may watch at once.
const WATCHERS: usize = 16;
/// What a peer might call itself.
const NASTY: &str = "</script><img src=x onerror=alert(1)>";

/// One peer, and no model.
struct Drawn;

impl Seeing for Drawn {
    fn swarm(&self) -> SwarmView {
        SwarmView {
            swarm: "drawn".into(),
            peers: vec![PeerView {
                peer: NASTY.into(),
                ..PeerView::default()
            }],
            ..SwarmView::default()
        }
    }

    fn peer<'a>(
        &'a self,
        peer: &'a str,
        model: Option<&'a str>,
    ) -> BoxFuture<'a, Result<PeerDetail, ApiError>> {
        let detail = PeerDetail {
            peer: peer.into(),
            agent: model.unwrap_or("none").into(),
            ..PeerDetail::default()
        };
        let known = (peer == "known").then_some(detail);
        async move { known.ok_or_else(|| ApiError::no_peer(peer)) }.boxed()
    }

    fn node(&self) -> BoxFuture<'_, Option<NodeStatus>> {
        // A node that hangs keeps nobody who looks waiting.
        std::future::pending().boxed()
    }
}

impl Models for Drawn {
    fn listed(&self) -> Vec<Listed> {
        Vec::new()
    }

    fn peers(&self) -> usize {
        1
    }

    fn find<'a>(&'a self, _: Option<&'a str>) -> BoxFuture<'a, Result<Arc<Found>, ApiError>> {
        async { Err(ApiError::unknown_model("there is none")) }.boxed()
    }

    fn open<'a>(&'a self, _: &'a Found, _: u32) -> BoxFuture<'a, Result<Source, ApiError>> {
        async { Err(ApiError::unavailable("nobody is there")) }.boxed()
    }

    fn privacy(&self) -> &'static str {
        "open"
    }

    fn wire(&self) -> String {
        "f32".into()
    }
}

struct Running {
    addr: SocketAddr,
    end: Option<oneshot::Sender<()>>,
    server: JoinHandle<()>,
}

async fn start(keys: &[&str]) -> Result<Running> {
    let config = Config {
        bind: SocketAddr::from(([127, 0, 0, 1], 0)),
        without_key: false,
        keys: Keys::new(keys),
        cors: Vec::new(),
        tls: None,
        body_bytes_max: 1 << 16,
        requests_max: 2,
        max_tokens: 16,
        drain: PATIENCE,
    };
    let server = Server::bind(config, Arc::new(Drawn)).await?;
    let addr = server
        .url()
        .split("://")
        .nth(1)
        .context("no address")?
        .parse()?;
    let (end, ended) = oneshot::channel::<()>();
    let server = tokio::spawn(server.run(async move {
        let _ = ended.await;
    }));
    Ok(Running {
        addr,
        end: Some(end),
        server,
    })
}

async fn send(addr: SocketAddr, path: &str, headers: &str) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(addr).await?;
    let host = match headers.starts_with("Host:") {
        true => "",
        false => "Host: localhost\r\n",
    };
    let ask = format!("GET {path} HTTP/1.1\r\n{host}Connection: close\r\n{headers}\r\n");
    stream.write_all(ask.as_bytes()).await?;
    Ok(stream)
}

/// Head and body of a whole answer.
async fn get(addr: SocketAddr, path: &str, headers: &str) -> Result<(String, String)> {
    let mut stream = send(addr, path, headers).await?;
    let mut bytes = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut bytes)).await??;
    let text = String::from_utf8(bytes)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no whole head")?;
    Ok((head.to_owned(), body.to_owned()))
}

/// Somebody who watches.
struct Watching(BufReader<TcpStream>);

impl Watching {
    async fn begin(addr: SocketAddr) -> Result<Self> {
        Ok(Self(BufReader::new(send(addr, "/swarm/events", "").await?)))
    }

    /// The next line that begins so; none at the end.
    async fn line(&mut self, begin: &str) -> Result<Option<String>> {
        loop {
            let mut line = String::new();
            if timeout(PATIENCE, self.0.read_line(&mut line)).await?? == 0 {
                return Ok(None);
            }
            if line.starts_with(begin) {
                return Ok(Some(line.trim_end().to_owned()));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_needs_no_key_and_may_load_nothing_from_elsewhere() -> Result<()> {
    let running = start(&["secret"]).await?;
    let (head, page) = get(running.addr, "/", "").await?;
    let head = head.to_lowercase();
    ensure!(head.starts_with("http/1.1 200"), "{head}");
    for said in [
        "content-type: text/html; charset=utf-8",
        "default-src 'none'",
        "script-src 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "x-content-type-options: nosniff",
        "referrer-policy: no-referrer",
    ] {
        ensure!(head.contains(said), "{said} is not in {head}");
    }
    ensure!(!head.contains("unsafe"), "{head}");
    // Every part that the page names is there, of the right type, and asked for again only if it is another.
    let named = page.split('"').filter(|word| word.starts_with("/ui/"));
    let mut parts: Vec<String> = named.map(str::to_owned).collect();
    for script in ["dom", "source", "map", "tiles", "lists", "panel", "chat"] {
        parts.push(format!("/ui/{script}.js"));
    }
    ensure!(parts.len() >= 11, "{parts:?}");
    for part in parts {
        let (head, body) = get(running.addr, &part, "").await?;
        let kind = match part.rsplit('.').next() {
            Some("js") => "text/javascript",
            Some("css") => "text/css",
            _ => "image/svg+xml",
        };
        ensure!(head.starts_with("HTTP/1.1 200"), "{part}: {head}");
        ensure!(head.contains(kind), "{part}: {head}");
        let mut addresses = body.match_indices("http").map(|(at, _)| &body[at..]);
        let own = |it: &str| !it.starts_with("http://") && !it.starts_with("https://");
        let ours = |it: &str| own(it) || it.starts_with("http://www.w3.org/");
        ensure!(addresses.all(ours), "{part} names an address");
        for markup in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
        ] {
            ensure!(!body.contains(markup), "{part} uses {markup}");
        }
        let tag = head.lines().find_map(|line| line.strip_prefix("etag: "));
        let known = format!("If-None-Match: {}\r\n", tag.context("no etag")?);
        let (head, body) = get(running.addr, &part, &known).await?;
        ensure!(
            head.starts_with("HTTP/1.1 304") && body.is_empty(),
            "{part}: {head}"
        );
    }
    ensure!(
        !page.contains("<style") && !page.contains(" style="),
        "style in the page"
    );
    ensure!(
        get(running.addr, "/ui/none.js", "")
            .await?
            .0
            .starts_with("HTTP/1.1 404")
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_seen_needs_the_key_and_is_for_own_pages() -> Result<()> {
    let running = start(&["secret"]).await?;
    for path in ["/swarm", "/swarm/events", "/swarm/peers/known"] {
        let (head, _) = get(running.addr, path, "").await?;
        ensure!(head.starts_with("HTTP/1.1 401"), "{path}: {head}");
    }
    let key = "Authorization: Bearer secret\r\n";
    let (head, body) = get(running.addr, "/swarm", key).await?;
    ensure!(
        head.contains("application/json") && head.contains("no-store"),
        "{head}"
    );
    let view: SwarmView = serde_json::from_str(&body)?;
    assert_eq!(
        (view.swarm.as_str(), view.peers[0].peer.as_str()),
        ("drawn", NASTY)
    );
    assert_eq!(view.live.node, None);
    let (head, body) = get(running.addr, "/swarm/peers/known/m", key).await?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
    let detail: PeerDetail = serde_json::from_str(&body)?;
    assert_eq!(
        (detail.peer.as_str(), detail.agent.as_str()),
        ("known", "m")
    );
    let (head, body) = get(running.addr, "/swarm/peers/other", key).await?;
    ensure!(
        head.starts_with("HTTP/1.1 404") && body.contains("peer_not_found"),
        "{head}"
    );

    let open = start(&[]).await?;
    for (site, mode, status) in [
        ("same-origin", "cors", "200"),
        ("cross-site", "no-cors", "403"),
        ("cross-site", "navigate", "403"),
        ("none", "navigate", "200"),
    ] {
        let headers = format!("Sec-Fetch-Site: {site}\r\nSec-Fetch-Mode: {mode}\r\n");
        let (head, _) = get(open.addr, "/swarm", &headers).await?;
        ensure!(
            head.starts_with(&format!("HTTP/1.1 {status}")),
            "{site} {mode}: {head}"
        );
    }
    let (head, _) = get(open.addr, "/swarm", "Host: evil.example\r\n").await?;
    ensure!(!head.starts_with("HTTP/1.1 200"), "{head}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn events_come_once_a_second_to_few_and_end_when_their_reader_leaves() -> Result<()> {
    let running = start(&[]).await?;
    let mut watching = Vec::new();
    for _ in 0..WATCHERS {
        let mut one = Watching::begin(running.addr).await?;
        let first = one.line("event:").await?.context("no event")?;
        assert_eq!(first, "event: swarm");
        watching.push(one);
    }
    let (head, body) = get(running.addr, "/swarm/events", "").await?;
    ensure!(
        head.starts_with("HTTP/1.1 429") && body.contains("too_many_watchers"),
        "{head}"
    );
    let first = &mut watching[0];
    let mut last = 0;
    for _ in 0..3 {
        let data = first.line("data:").await?.context("no data")?;
        let said: serde_json::Value = serde_json::from_str(data.trim_start_matches("data:"))?;
        let at = said["at_ms"].as_u64().context("no time")?;
        ensure!(at > last, "each is newer than the one before");
        last = at;
    }
    // One leaves: there is a place again, at the latest when the next event cannot be written.
    watching.pop();
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let mut next = Watching::begin(running.addr).await?;
        if next
            .line("HTTP/1.1")
            .await?
            .is_some_and(|line| line.contains("200"))
        {
            break;
        }
        ensure!(
            tokio::time::Instant::now() < deadline,
            "the place is never free"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_ends_does_not_wait_for_those_who_watch() -> Result<()> {
    let mut running = start(&[]).await?;
    let mut one = Watching::begin(running.addr).await?;
    one.line("event:").await?.context("no event")?;
    running
        .end
        .take()
        .context("it runs")?
        .send(())
        .map_err(|()| anyhow::anyhow!("gone"))?;
    // It would let a running answer go on for longer than this.
    timeout(PATIENCE / 2, running.server).await??;
    while one.line("event:").await?.is_some() {}
    Ok(())
}
