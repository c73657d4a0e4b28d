//! `shoal serve` as a child, or a node's own API, and just enough HTTP to ask it byte by byte: tests see what is on the wire.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testnet::client::Client;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Child;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::PATIENCE;

/// A server over a swarm. Dropping it kills the process.
pub struct Api {
    /// The process, where it is a server of its own.
    pub child: Option<Child>,
    /// Where it answers.
    pub addr: SocketAddr,
    /// The same, as clients take it.
    pub url: String,
    log: Arc<Mutex<Vec<u8>>>,
}

impl Api {
    /// Starts `shoal serve` for this user of a swarm, on a free port.
    ///
    /// # Errors
    /// It does not say that it is ready.
    pub async fn start(client: &Client, more: &[&str]) -> Result<Self> {
        let mut args = vec!["serve".to_owned()];
        args.extend(client.swarm_args());
        args.extend(["--bind", "127.0.0.1:0", "--ready-json"].map(str::to_owned));
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        let mut child = client.start(&args)?;
        let mut line = String::new();
        let stdout = child.stdout.take().context("no stdout")?;
        let said = timeout(PATIENCE, BufReader::new(stdout).read_line(&mut line)).await?;
        if said? == 0 {
            let output = child.wait_with_output().await?;
            anyhow::bail!("it ended: {}", String::from_utf8_lossy(&output.stderr));
        }
        // What it logs is read to the end: a full pipe would stop it.
        let mut said = child.stderr.take().context("no stderr")?;
        let log: Arc<Mutex<Vec<u8>>> = Arc::default();
        let into = Arc::clone(&log);
        tokio::spawn(async move {
            let mut some = vec![0; 16 << 10];
            while let Ok(n @ 1..) = said.read(&mut some).await {
                let mut log = into.lock().unwrap_or_else(PoisonError::into_inner);
                log.extend_from_slice(&some[..n]);
            }
        });
        let ready: Value = serde_json::from_str(&line)?;
        let url = ready["url"].as_str().context("no url")?.to_owned();
        Ok(Self {
            child: Some(child),
            log,
            ..Self::at(&url)?
        })
    }

    /// One that answers at a URL already.
    ///
    /// # Errors
    /// It is none.
    pub fn at(url: &str) -> Result<Self> {
        Ok(Self {
            child: None,
            addr: url.split("://").nth(1).context("no address")?.parse()?,
            url: url.to_owned(),
            log: Arc::default(),
        })
    }

    /// Asks with a JSON body and reads the whole answer.
    ///
    /// # Errors
    /// There is none.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Response> {
        self.post_text(path, &body.to_string()).await
    }

    /// The same with a body that may be anything.
    ///
    /// # Errors
    /// There is no answer.
    pub async fn post_text(&self, path: &str, body: &str) -> Result<Response> {
        let json = "Content-Type: application/json";
        self.ask("POST", path, &[json], body.as_bytes()).await
    }

    /// Asks without a body.
    ///
    /// # Errors
    /// There is no answer.
    pub async fn get(&self, path: &str) -> Result<Response> {
        self.ask("GET", path, &[], b"").await
    }

    /// Asks and reads the whole answer.
    ///
    /// # Errors
    /// There is none.
    pub async fn ask(
        &self,
        method: &str,
        path: &str,
        headers: &[&str],
        body: &[u8],
    ) -> Result<Response> {
        let mut stream = self.send(method, path, headers, body).await?;
        let mut bytes = Vec::new();
        timeout(PATIENCE, stream.read_to_end(&mut bytes)).await??;
        Response::read(&bytes)
    }

    /// Asks and reads nothing: dropping the stream hangs up.
    ///
    /// # Errors
    /// The server does not take it.
    pub async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[&str],
        body: &[u8],
    ) -> Result<TcpStream> {
        let mut stream = TcpStream::connect(self.addr).await?;
        let own = format!("Host: {}", self.addr);
        let named = headers.iter().any(|header| header.starts_with("Host:"));
        let mut head = format!("{method} {path} HTTP/1.1\r\n");
        let length = format!("Content-Length: {}", body.len());
        let host = (!named).then_some(own.as_str());
        let all = headers.iter().copied().chain(host);
        for header in all.chain([length.as_str(), "Connection: close"]) {
            head += header;
            head += "\r\n";
        }
        head += "\r\n";
        stream.write_all(head.as_bytes()).await?;
        // A server that refuses a body may stop reading it.
        let _ = stream.write_all(body).await;
        Ok(stream)
    }

    /// What it has said on standard error so far.
    pub fn log(&self) -> String {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Ends it as Ctrl-C does.
    ///
    /// # Errors
    /// It does not end in time, or says that it failed.
    pub async fn stop(self, limit: Duration) -> Result<()> {
        let mut child = self.child.context("it is no process of its own")?;
        let pid = child.id().context("it has ended")?;
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("no process")?;
        rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
        let ended = timeout(limit, child.wait()).await??;
        ensure!(ended.success(), "it ended with {ended}");
        Ok(())
    }
}

/// An answer.
#[derive(Debug)]
pub struct Response {
    /// Its status.
    pub status: u16,
    /// Its headers, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Its body.
    pub body: String,
}

impl Response {
    /// From all that came.
    ///
    /// # Errors
    /// It is not whole.
    pub fn read(bytes: &[u8]) -> Result<Self> {
        let text = String::from_utf8_lossy(bytes);
        let (head, body) = text.split_once("\r\n\r\n").context("no whole head")?;
        let mut lines = head.lines();
        let status = lines.next().and_then(|line| line.split(' ').nth(1));
        let status = status.context("no status")?.parse()?;
        let header = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_lowercase(), value.trim().to_owned()))
        };
        let headers: Vec<_> = lines.filter_map(header).collect();
        let mut response = Self {
            status,
            headers,
            body: body.to_owned(),
        };
        if response.header("transfer-encoding") == Some("chunked") {
            response.body = unchunked(body)?;
        }
        Ok(response)
    }

    /// A header by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str())
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// It is not, or the status is another one.
    pub fn json(&self, status: u16) -> Result<Value> {
        ensure!(self.status == status, "{}: {}", self.status, self.body);
        serde_json::from_str(&self.body).with_context(|| self.body.clone())
    }

    /// The parts of a stream that ended with `[DONE]`.
    ///
    /// # Errors
    /// It is none, or did not end so.
    pub fn events(&self) -> Result<Vec<Value>> {
        ensure!(self.status == 200, "{}: {}", self.status, self.body);
        let lines = self.body.lines();
        let mut data: Vec<&str> = lines
            .filter_map(|line| line.strip_prefix("data: "))
            .collect();
        ensure!(data.pop() == Some("[DONE]"), "no end: {}", self.body);
        let read = |line: &&str| Ok(serde_json::from_str(line)?);
        data.iter().map(read).collect()
    }
}

/// Asks the demo model for a long answer as a stream, and reads nothing of it yet.
///
/// # Errors
/// The server does not take it.
pub async fn asking(api: &Api, tokens: u32, headers: &[&str]) -> Result<TcpStream> {
    // It may not end by itself.
    let ask = json!({
        "model": "demo", "prompt": "Once upon a time", "max_tokens": tokens, "stream": true, "logit_bias": {"1": -100},
    });
    let json = "Content-Type: application/json";
    let headers: Vec<&str> = headers.iter().copied().chain([json]).collect();
    let body = ask.to_string();
    api.send("POST", "/v1/completions", &headers, body.as_bytes())
        .await
}

/// Asks for long answers one after the other, so many at a time, until the set is dropped.
pub fn keep_asking(api: &Arc<Api>, how_many: usize) -> JoinSet<()> {
    let mut all = JoinSet::new();
    for _ in 0..how_many {
        let api = Arc::clone(api);
        all.spawn(async move {
            while let Ok(mut stream) = asking(&api, 1800, &[]).await {
                let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
            }
        });
    }
    all
}

fn unchunked(mut rest: &str) -> Result<String> {
    let mut whole = String::new();
    loop {
        let (length, after) = rest.split_once("\r\n").context("no chunk")?;
        let length = usize::from_str_radix(length.trim(), 16)?;
        if length == 0 {
            return Ok(whole);
        }
        whole += after.get(..length).context("a short chunk")?;
        rest = after.get(length + 2..).context("no end of a chunk")?;
    }
}
