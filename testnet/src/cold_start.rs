//! A cold start: one node has the model, the others know its address and the model's id, and start together.
//!
//! ```text
//! seed serves ─▶ all others at once ─▶ look at each until all have their layers ─▶ the seed is paused ─▶ the question
//! ```

use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use testnet::client::Client;
use testnet::cold::{ColdStart, Milestones, NodeStatus};
use testnet::facts::Facts;
use testnet::picture::Scene;
use testnet::plan::spans;
use testnet::screen::Screen;
use testnet::swarm::{NodeSpec, StartPlan, Swarm, check_spans};
use tokio::time::{MissedTickBehavior, interval};

use crate::Args;

/// How often every node is asked: a process each.
const LOOK: Duration = Duration::from_millis(500);
/// Nodes that are asked at the same time.
const ASKED_AT_ONCE: usize = 4;
/// How long one may take to say how it is, on a machine that is busy with all of them.
const STATUS_TIMEOUT: Duration = Duration::from_secs(20);
/// Copies of the model that the seed may take the time for.
const COPIES: f64 = 4.0;
/// What any run may take beside that.
const BASE_TIMEOUT: Duration = Duration::from_secs(180);
/// Bytes a second that this machine moves, verifies and loads at least, over all nodes.
const MACHINE_BYTES_S: f64 = 20e6;

/// Starts the swarm and waits until every node has its layers; the seed is paused then. Says what it cost.
///
/// # Errors
/// A node dies, or it takes longer than the seed's uplink allows for.
pub async fn play(
    args: &Args,
    model: &str,
    facts: &Facts,
    swarm: &mut Swarm,
    screen: &mut Screen,
) -> Result<ColdStart> {
    let all = format!("0..{}", facts.n_layer);
    let seed = NodeSpec::new([
        "--model",
        model,
        "--layers",
        &all,
        "--upload-limit",
        &args.upload_limit,
    ]);
    let ready = swarm.start(&seed, BASE_TIMEOUT);
    let ready = screen.wait_for("the seed starts", ready).await?;
    let wanted = spans(facts.n_layer, args.nodes() - 1, args.seed);
    let spec = |span: &u32| {
        let budget = facts.budget(*span).to_string();
        NodeSpec::new(["--model", ready.model(), "--memory", &budget])
    };
    let specs: Vec<NodeSpec> = wanted.iter().map(spec).collect();
    let watch = Watch {
        homes: (1..=args.nodes() as usize)
            .map(|node| swarm.home(node))
            .collect(),
        owner: swarm.client("owner"),
        facts,
        began: Instant::now(),
    };
    let limit = watch.limit(&wanted).await?;
    let plan = StartPlan {
        n_layer: 0,
        at_once: specs.len(),
        ready_timeout: limit,
        seed: args.seed,
    };
    let mut unseen = |_: &Swarm| ();
    let start = swarm.start_all(&specs, &plan, &mut unseen);
    let (_, reached) = tokio::try_join!(start, watch.until_complete(limit, screen))?;
    check_spans(&swarm.spans()[1..], facts.n_layer)?;
    let statuses = watch.statuses().await?;
    let cold = ColdStart::new(&statuses, facts.bytes, &reached);
    // From here on the others are alone with the model.
    watch
        .owner
        .pause_node(&watch.homes[0], STATUS_TIMEOUT)
        .await?;
    Ok(cold)
}

/// Looks at all nodes of a swarm from outside.
struct Watch<'a> {
    /// The seed's first.
    homes: Vec<PathBuf>,
    owner: Client,
    facts: &'a Facts,
    began: Instant,
}

impl Watch<'_> {
    /// What a cold start may take: the seed's uplink is the narrowest place, then this machine.
    async fn limit(&self, wanted: &[u32]) -> Result<Duration> {
        let seed = self.homes.first().context("no seed")?;
        let seed = self.owner.node_status(seed, STATUS_TIMEOUT).await?;
        let upload = seed.transfer.upload_bytes_s_max.unwrap_or(u64::MAX);
        let copies_s = COPIES * self.facts.bytes as f64 / upload.max(1) as f64;
        let share = wanted.iter().sum::<u32>() as f64 / f64::from(self.facts.n_layer.max(1));
        let machine_s = self.facts.bytes as f64 * share / MACHINE_BYTES_S;
        Ok(BASE_TIMEOUT + Duration::from_secs_f64((copies_s + machine_s).min(1e6)))
    }

    async fn until_complete(&self, limit: Duration, screen: &mut Screen) -> Result<Milestones> {
        let mut reached = Milestones::default();
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut shown = 0;
        while !reached.reached() {
            looks.tick().await;
            // One that has just been started does not answer yet.
            let statuses: Vec<NodeStatus> = self
                .look()
                .await
                .into_iter()
                .map(Result::unwrap_or_default)
                .collect();
            let others = statuses.get(1..).unwrap_or_default();
            let elapsed = self.began.elapsed();
            reached.see(others, self.facts.n_layer, elapsed);
            let live: Vec<Vec<Range<u32>>> = statuses.iter().map(NodeStatus::live).collect();
            let intended: Vec<Range<u32>> = statuses.iter().map(NodeStatus::intended).collect();
            let scene = Scene {
                live: &live,
                intended: &intended,
                nodes: self.homes.len(),
                n_layer: self.facts.n_layer,
                elapsed,
            };
            let loaded: usize = live.iter().flatten().map(ExactSizeIterator::len).sum();
            let tenth: usize = intended
                .iter()
                .map(ExactSizeIterator::len)
                .sum::<usize>()
                .div_ceil(10);
            if screen.is_live() || loaded >= shown + tenth.max(1) || reached.reached() {
                shown = loaded;
                screen.picture(&scene.draw(screen.width()));
            }
            if elapsed > limit && !reached.reached() {
                screen.lines(&scene.draw(screen.width()).join("\n"));
                bail!("after {} s not every node has its layers", limit.as_secs());
            }
        }
        Ok(reached)
    }

    async fn statuses(&self) -> Result<Vec<NodeStatus>> {
        self.look().await.into_iter().collect()
    }

    async fn look(&self) -> Vec<Result<NodeStatus>> {
        let mut found = Vec::new();
        for homes in self.homes.chunks(ASKED_AT_ONCE) {
            let mut asked = tokio::task::JoinSet::new();
            for (at, home) in homes.iter().cloned().enumerate() {
                let owner = self.owner.clone();
                asked.spawn(async move { (at, owner.node_status(&home, STATUS_TIMEOUT).await) });
            }
            let mut answers = asked.join_all().await;
            answers.sort_by_key(|(at, _)| *at);
            found.extend(answers.into_iter().map(|(_, status)| status));
        }
        found
    }
}
