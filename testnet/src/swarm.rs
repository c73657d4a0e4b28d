//! The nodes of one run: started a few at a time, watched, always ended.
//!
//! ```text
//! NodeSpec ─▶ start_all ─▶ process per node ─▶ ready lines ─▶ show (the picture)
//!                 first: one at a time, until every layer is held; then `at_once` together
//! ```
//! Nodes choose their layers from the adverts they hear, so the first ones start one after another: two that start
//! together would take the same weakest layers.

use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::binaries::Binaries;
use crate::client::Client;
use crate::plan::{Seeded, span_max};
use crate::process::{NodeProcess, Ready, STOP_TIMEOUT};
use crate::relay::Relay;
use crate::screen::TICK;

/// To how many nodes that already serve a new one is introduced.
const INTRODUCTIONS: usize = 3;

/// What distinguishes one node from the others.
#[derive(Clone, Debug, Default)]
pub struct NodeSpec {
    /// Flags besides those every node gets (swarm, home, listen address, peers).
    pub args: Vec<String>,
}

impl NodeSpec {
    /// A node with these further flags.
    pub fn new<S: Into<String>>(args: impl IntoIterator<Item = S>) -> Self {
        Self {
            args: args.into_iter().map(Into::into).collect(),
        }
    }
}

/// A node and, once it serves, what it said.
#[derive(Debug)]
pub struct Node {
    /// The process.
    pub process: NodeProcess,
    /// Its ready line.
    pub ready: Option<Ready>,
    /// As it was started, to start it again.
    spec: NodeSpec,
    /// The port of its gate.
    gate: Option<u16>,
}

/// How a set of nodes is started.
#[derive(Clone, Debug)]
pub struct StartPlan {
    /// The model's layers: until they are all held, one node starts at a time.
    pub n_layer: u32,
    /// How many nodes start at the same time afterwards.
    pub at_once: usize,
    /// How long one node may take until it serves.
    pub ready_timeout: Duration,
    /// Which nodes introduce a new one.
    pub seed: u64,
}

/// Several nodes that share a swarm id, with a folder that goes when they go.
#[derive(Debug)]
pub struct Swarm {
    binaries: Binaries,
    id: String,
    nodes: Vec<Node>,
    /// Where there are faults between nodes.
    relay: Option<Relay>,
    // Last, so that the processes are gone before the folder they write to.
    folder: TempDir,
}

impl Swarm {
    /// An empty swarm with an id of its own, so that several testnets on one machine do not merge.
    ///
    /// # Errors
    /// When no temporary folder can be made.
    pub fn new(binaries: Binaries) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("shoal-testnet-")
            .tempdir()
            .context("cannot make a temporary folder")?;
        let name = folder
            .path()
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let suffix = name
            .rsplit('-')
            .next()
            .unwrap_or_default()
            .to_ascii_lowercase();
        Ok(Self {
            binaries,
            id: format!("testnet-{suffix}"),
            nodes: Vec::new(),
            relay: None,
            folder,
        })
    }

    /// The same, whose nodes each get a gate of `relay`, with the node's number, and announce that alone.
    #[must_use]
    pub fn behind(mut self, relay: Relay) -> Self {
        self.relay = Some(relay);
        self
    }

    /// The gates, where there are any.
    pub fn relay(&self) -> Option<&Relay> {
        self.relay.as_ref()
    }

    /// The swarm id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where the nodes' homes and logs are.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The home of a node, by its number from 1.
    pub fn home(&self, node: usize) -> PathBuf {
        self.folder.path().join(format!("node-{node:02}"))
    }

    /// The nodes, in the order in which they were started.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The same, to signal them.
    pub fn nodes_mut(&mut self) -> &mut [Node] {
        &mut self.nodes
    }

    /// The spans of the nodes that serve; empty for one that does not.
    pub fn spans(&self) -> Vec<Range<u32>> {
        self.nodes
            .iter()
            .map(|node| node.ready.as_ref().map_or(0..0, Ready::span))
            .collect()
    }

    /// A client of this swarm with a home of its own, introduced to the first nodes.
    pub fn client(&self, name: &str) -> Client {
        let serving = self.nodes.iter().filter_map(|node| node.ready.as_ref());
        let peers = serving
            .take(INTRODUCTIONS)
            .flat_map(Ready::dialable)
            .collect();
        Client::new(
            &self.binaries.shoal,
            &self.id,
            peers,
            &self.folder.path().join(name),
        )
    }

    /// Starts one node and waits until it serves.
    ///
    /// # Errors
    /// When it dies (the end of its log is quoted) or takes longer than `ready_timeout`.
    pub async fn start(&mut self, spec: &NodeSpec, ready_timeout: Duration) -> Result<Ready> {
        let peers = self.introductions(&mut Seeded::new(0));
        let (index, ready) = self.spawn(spec, &peers)?;
        let ready = timeout(ready_timeout, ready)
            .await
            .map_err(|_| Unready::TooSlow(ready_timeout));
        self.settle(
            index,
            ready.and_then(|line| line.map_err(|_| Unready::Died)),
        )
        .await
    }

    /// Ends a node, if it still runs, without a warning, and starts it again with its home, its flags and its gate.
    ///
    /// # Errors
    /// As [`Swarm::start`].
    pub async fn restart(&mut self, index: usize, ready_timeout: Duration) -> Result<Ready> {
        let node = self.nodes.get_mut(index).context("no such node")?;
        node.ready = None;
        // An error means that it has ended, which is what is wanted.
        let _ = node.process.signal(Signal::KILL);
        node.process.ended(STOP_TIMEOUT).await?;
        let (spec, gate) = (node.spec.clone(), node.gate);
        let peers = self.introductions(&mut Seeded::new(index as u64));
        let (process, ready) = self.process(index, &spec, &peers, gate)?;
        if let Some(node) = self.nodes.get_mut(index) {
            node.process = process;
        }
        let ready = timeout(ready_timeout, ready)
            .await
            .map_err(|_| Unready::TooSlow(ready_timeout));
        self.settle(
            index,
            ready.and_then(|line| line.map_err(|_| Unready::Died)),
        )
        .await
    }

    /// Starts a node for each of `specs`; `show` is called after each that serves, and in between for clocks.
    ///
    /// # Errors
    /// When one of them dies or is too slow. Those that run keep running until [`Swarm::stop`].
    pub async fn start_all(
        &mut self,
        specs: &[NodeSpec],
        plan: &StartPlan,
        show: &mut dyn FnMut(&Swarm),
    ) -> Result<()> {
        let mut seeded = Seeded::new(plan.seed);
        let mut starting = JoinSet::new();
        for spec in specs {
            let room = if covered(&self.spans(), plan.n_layer) {
                plan.at_once.max(1)
            } else {
                1
            };
            while starting.len() >= room {
                self.settle_next(&mut starting, show).await?;
            }
            let peers = self.introductions(&mut seeded);
            let (index, ready) = self.spawn(spec, &peers)?;
            let limit = plan.ready_timeout;
            starting.spawn(async move {
                let ready = timeout(limit, ready)
                    .await
                    .map_err(|_| Unready::TooSlow(limit));
                (
                    index,
                    ready.and_then(|line| line.map_err(|_| Unready::Died)),
                )
            });
        }
        while !starting.is_empty() {
            self.settle_next(&mut starting, show).await?;
        }
        Ok(())
    }

    /// Ends every node and waits for it. Returns the names of those that had to be killed.
    pub async fn stop(&mut self) -> Vec<String> {
        let mut stopping = JoinSet::new();
        for mut node in self.nodes.drain(..) {
            stopping.spawn(async move { node.process.stop().await.then_some(node.process.name) });
        }
        stopping.join_all().await.into_iter().flatten().collect()
    }

    /// Leaves the processes and the folder to the user.
    pub fn keep(self) {
        let Self { nodes, folder, .. } = self;
        for node in nodes {
            // Dropping a process would end it.
            std::mem::forget(node);
        }
        let _ = folder.keep();
    }

    fn spawn(
        &mut self,
        spec: &NodeSpec,
        peers: &[String],
    ) -> Result<(usize, oneshot::Receiver<Ready>)> {
        let index = self.nodes.len();
        let gate = self.relay.as_mut().map(|relay| relay.open(0)).transpose()?;
        let (process, ready) = self.process(index, spec, peers, gate)?;
        self.nodes.push(Node {
            process,
            ready: None,
            spec: spec.clone(),
            gate,
        });
        Ok((index, ready))
    }

    fn process(
        &self,
        index: usize,
        spec: &NodeSpec,
        peers: &[String],
        gate: Option<u16>,
    ) -> Result<(NodeProcess, oneshot::Receiver<Ready>)> {
        let name = format!("node {}", index + 1);
        let folder = self.home(index + 1);
        let mut args = self.shared_args(&folder);
        args.extend(self.address_args(index, gate)?);
        for peer in peers {
            args.extend(["--peer".to_owned(), peer.clone()]);
        }
        args.extend(spec.args.iter().cloned());
        NodeProcess::spawn(&name, &self.binaries.node, &args, &folder)
    }

    fn shared_args(&self, folder: &Path) -> Vec<String> {
        let home = folder.display().to_string();
        // One thread a node: ggml's threads wait busily, and there are more nodes than cores.
        [
            "--swarm",
            &self.id,
            "--home",
            &home,
            "--mdns",
            "off",
            "--threads",
            "1",
            "--ready-json",
        ]
        .map(str::to_owned)
        .to_vec()
    }

    /// A node behind a gate gets a port that was free just now: the gate has to know it before the node is there.
    fn address_args(&self, index: usize, gate: Option<u16>) -> Result<Vec<String>> {
        let mut args = Vec::new();
        let mut port = 0;
        if let (Some(relay), Some(gate)) = (&self.relay, gate) {
            port = free_port().context("no free port")?;
            relay.moved(index, port);
            args.extend(["--announce".to_owned(), loopback(gate)]);
        }
        args.extend(["--listen".to_owned(), loopback(port)]);
        Ok(args)
    }

    fn introductions(&self, seeded: &mut Seeded) -> Vec<String> {
        let mut serving: Vec<&Ready> = self
            .nodes
            .iter()
            .filter_map(|node| node.ready.as_ref())
            .collect();
        let mut peers = Vec::new();
        while peers.len() < INTRODUCTIONS && !serving.is_empty() {
            let drawn = usize::try_from(seeded.below(serving.len() as u64)).unwrap_or(0);
            peers.extend(serving.swap_remove(drawn).dialable().into_iter().next());
        }
        peers
    }

    async fn settle_next(
        &mut self,
        starting: &mut Starting,
        show: &mut dyn FnMut(&Swarm),
    ) -> Result<()> {
        let started = loop {
            match timeout(TICK, starting.join_next()).await {
                Ok(Some(started)) => break started,
                Ok(None) => return Ok(()),
                Err(_) => show(self),
            }
        };
        let (index, ready) = started.context("a task that waits for a node failed")?;
        self.settle(index, ready).await?;
        show(self);
        Ok(())
    }

    async fn settle(&mut self, index: usize, ready: Result<Ready, Unready>) -> Result<Ready> {
        let node = self
            .nodes
            .get_mut(index)
            .context("a node was lost from the list")?;
        match ready {
            Ok(ready) => Ok(node.ready.insert(ready).clone()),
            Err(Unready::Died) => Err(node.process.death().await),
            Err(Unready::TooSlow(limit)) => {
                let process = &node.process;
                Err(anyhow!(
                    "{} did not serve within {} s; the end of its log:\n{}",
                    process.name,
                    limit.as_secs(),
                    process.log_tail()
                ))
            }
        }
    }
}

fn loopback(port: u16) -> String {
    format!("/ip4/127.0.0.1/tcp/{port}")
}

fn free_port() -> std::io::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port())
}

type Starting = JoinSet<(usize, Result<Ready, Unready>)>;

/// Why a node does not serve.
#[derive(Debug)]
enum Unready {
    Died,
    TooSlow(Duration),
}

/// Whether the spans together hold every layer.
pub fn covered(spans: &[Range<u32>], n_layer: u32) -> bool {
    gaps(spans, n_layer).is_empty()
}

/// The layers that no span holds.
pub fn gaps(spans: &[Range<u32>], n_layer: u32) -> Vec<u32> {
    (0..n_layer)
        .filter(|layer| !spans.iter().any(|span| span.contains(layer)))
        .collect()
}

/// Fails when a node holds so much that routes may take fewer than three hops.
///
/// # Errors
/// Names the node and its span.
pub fn check_spans(spans: &[Range<u32>], n_layer: u32) -> Result<()> {
    let nodes = u32::try_from(spans.len()).unwrap_or(u32::MAX);
    let max = span_max(n_layer, nodes);
    match spans.iter().position(|span| span.len() > max as usize) {
        Some(index) => bail!(
            "node {} holds {:?}, more than the {max} layers it was given memory for",
            index + 1,
            spans.get(index)
        ),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_the_layers_without_a_holder() {
        assert_eq!(gaps(&[0..3, 5..8, 0..0], 8), [3, 4]);
        assert!(covered(&[0..3, 2..6, 6..8], 8));
    }
}
