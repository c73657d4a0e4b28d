//! What processes count, as a collector reads it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use testnet::swarm::Swarm;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::PATIENCE;

/// `GET /metrics` of a server or a node.
///
/// # Errors
/// It does not give them.
pub async fn scrape(url: &str) -> Result<String> {
    let addr = url.trim_start_matches("http://");
    let addr = addr.trim_end_matches("/metrics");
    let mut stream = TcpStream::connect(addr).await?;
    let head = format!("GET /metrics HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut text = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut text)).await??;
    ensure!(text.starts_with("HTTP/1.1 200"), "{text}");
    Ok(text)
}

/// The same of every node of a swarm that was started with `--metrics`.
///
/// # Errors
/// One does not serve, or gives none.
pub async fn scrape_nodes(swarm: &Swarm) -> Result<Vec<String>> {
    let mut nodes = Vec::new();
    for node in swarm.nodes() {
        let ready = node.ready.as_ref().context("it serves")?;
        let url = ready.metrics.as_deref().context("no metrics")?;
        nodes.push(scrape(url).await?);
    }
    Ok(nodes)
}

/// The names of metrics in a text, with the suffixes of histograms.
pub fn names(text: &str) -> BTreeSet<String> {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let name = |line: &str| {
        let end = line.find(['{', ' '])?;
        let name = &line[..end];
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        name.chars().all(plain).then(|| name.to_owned())
    };
    samples.filter_map(name).collect()
}

/// The values of a metric by its labels.
pub fn values(text: &str, name: &str) -> BTreeMap<String, f64> {
    let of = |line: &str| {
        let rest = line.strip_prefix(name)?;
        if !rest.starts_with(['{', ' ']) {
            return None;
        }
        let (labels, value) = rest.rsplit_once(' ')?;
        Some((labels.to_owned(), value.parse().ok()?))
    };
    text.lines().filter_map(of).collect()
}

/// All of them together.
pub fn sum(text: &str, name: &str) -> f64 {
    values(text, name).values().fold(0.0, |all, one| all + one)
}
