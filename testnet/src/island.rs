//! A mixture whose experts are shared out: nodes that hold them, and nodes that hold the trunks.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use testnet::facts::Facts;
use testnet::mixture::{Mixture, Seen};
use testnet::screen::Screen;
use testnet::swarm::{NodeSpec, StartPlan, Swarm};

use crate::Args;

/// A trunk and a holder.
pub const NODES_MIN: u32 = 2;

/// Nodes that start at the same time: they see each other's choices and make others.
const STARTS_AT_ONCE: usize = 4;
/// One of so many nodes holds a trunk.
const NODES_PER_TRUNK: u32 = 4;
/// Holders of each expert, where nobody says how many a node holds.
const COPIES: u32 = 2;
/// Round trips on a busy machine are longer than on a network that has nothing else to do.
const ISLAND_RTT_MS: &str = "1000";
/// How long a node may take to say how it is.
const STATUS_TIMEOUT: Duration = Duration::from_secs(20);

/// How many nodes hold experts. They come first.
pub fn holders(nodes: u32) -> usize {
    (nodes - trunks(nodes)) as usize
}

/// How many hold trunks: two where there are nodes enough, so that one may fail.
fn trunks(nodes: u32) -> u32 {
    let two = if nodes > NODES_PER_TRUNK { 2 } else { 1 };
    (nodes / NODES_PER_TRUNK).max(two).min(nodes - 1)
}

/// How many experts a node holds.
fn per_node(args: &Args, facts: &Facts) -> u32 {
    let (n_expert, _) = facts.experts.unwrap_or_default();
    let all = n_expert.saturating_mul(facts.n_layer);
    let holders = holders(args.nodes()) as u32;
    let twice = all.saturating_mul(COPIES).div_ceil(holders.max(1));
    args.experts_per_node.unwrap_or(twice).min(all).max(1)
}

/// What is said before it begins.
pub fn introduce(args: &Args, facts: &Facts) -> String {
    let (n_expert, used) = facts.experts.unwrap_or_default();
    format!(
        "{} of them hold trunks, the others {} of the {} experts each ({used} of {n_expert} for a token),",
        trunks(args.nodes()),
        per_node(args, facts),
        n_expert * facts.n_layer,
    )
}

/// Starts the holders, then the trunks; returns once all serve.
///
/// # Errors
/// The model is no mixture, the experts do not fit, or a node dies or is too slow.
pub async fn start(
    args: &Args,
    model: &str,
    facts: &Facts,
    swarm: &mut Swarm,
    screen: &mut Screen,
    limit: Duration,
) -> Result<()> {
    let (Some((n_expert, _)), Some(expert_bytes)) = (facts.experts, facts.expert_bytes) else {
        bail!("{} is no mixture of experts: leave --moe out", args.model());
    };
    let (per_node, holders) = (per_node(args, facts), holders(args.nodes()));
    let all = n_expert * facts.n_layer;
    if (per_node as usize).saturating_mul(holders) < all as usize {
        bail!(
            "{holders} nodes of {per_node} experts do not hold all {all}: more --experts-per-node, or more --nodes"
        );
    }
    let memory = (expert_bytes * u64::from(per_node)).to_string();
    let holder = NodeSpec::new([
        "--model",
        model,
        "--hold",
        "experts",
        "--memory",
        &memory,
        "--island-rtt",
        ISLAND_RTT_MS,
    ]);
    // Less than the model has: no node could run it alone.
    let memory = (facts.bytes * 3 / 4).to_string();
    let layers = format!("0..{}", facts.n_layer);
    let trunk = NodeSpec::new([
        "--model",
        model,
        "--hold",
        "trunk",
        "--layers",
        &layers,
        "--memory",
        &memory,
        "--island-rtt",
        ISLAND_RTT_MS,
    ]);
    let plan = StartPlan {
        n_layer: 0,
        at_once: STARTS_AT_ONCE,
        ready_timeout: limit,
        seed: args.seed,
    };
    for (what, spec, count) in [
        ("experts", holder, holders),
        ("trunks", trunk, trunks(args.nodes()) as usize),
    ] {
        let specs = vec![spec; count];
        let waiting = format!("{count} nodes that hold {what} start");
        let mut unseen = |_: &Swarm| ();
        let start = swarm.start_all(&specs, &plan, &mut unseen);
        screen.wait_for(&waiting, start).await?;
        screen.lines(&format!("  {count} nodes hold {what}"));
    }
    Ok(())
}

/// Asks every node where the experts run.
///
/// # Errors
/// A node does not say.
pub async fn look(args: &Args, facts: &Facts, swarm: &Swarm) -> Result<Mixture> {
    let owner = swarm.client("owner");
    let mut seen = Vec::new();
    for (i, node) in swarm.nodes().iter().enumerate() {
        let home = swarm.home(i + 1);
        let status = owner.node_status(&home, STATUS_TIMEOUT);
        let status = status.await.with_context(|| format!("node {}", i + 1))?;
        let model = status.models.into_iter().next().unwrap_or_default();
        let peer = node.ready.as_ref().map(|ready| ready.peer.clone());
        seen.push(Seen {
            peer: peer.unwrap_or_default(),
            tensor_bytes: model.tensor_bytes,
            rss_bytes: node.process.rss_bytes().unwrap_or(0),
            island: model.island,
        });
    }
    let mixture = Mixture::new(&seen, facts.bytes);
    if mixture.trunks.is_empty() {
        bail!("no node of {} holds a trunk", args.nodes());
    }
    Ok(mixture)
}
