//! Nodes that die or freeze while an answer streams in: the answer is the one that an undisturbed run
//! gives, token by token, and it goes on soon.
//!
//! `SHOAL_FAULTS=200,200,50` in the environment sets how many kills and freezes while decoding, and
//! kills while the prompt is computed; `SHOAL_FAULT_SEED` what they are drawn from.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde::Deserialize;
use testnet::client::Client;
use testnet::swarm::Swarm;
use tests::{PATIENCE, join, serve};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

/// One that is never harmed, so that clients find the swarm; then each layer on two more, so that one
/// may go.
const SPANS: [&str; 7] = ["0..1", "0..3", "0..3", "3..6", "3..6", "6..8", "6..8"];
/// Half a second or more of answer, for a fault to fall into.
const TOKENS: &str = "300";
/// Far above what is aimed at: a machine that is busy with other tests is slow, not wrong.
const STALL_MAX_MS: f64 = 15_000.0;

#[derive(Deserialize)]
struct Answer {
    text: String,
    tokens: Vec<u32>,
    recoveries: Vec<Recovery>,
}

#[derive(Deserialize)]
struct Recovery {
    lost: String,
    took_ms: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Kill,
    Freeze,
}

/// What to do, when, to which hop.
#[derive(Clone, Copy, Debug)]
struct Plan {
    fault: Fault,
    hop: usize,
    after: Duration,
}

/// SplitMix64: the same seed, the same faults.
struct Seed(u64);

impl Seed {
    fn draw(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % below
    }
}

/// How long sessions were without a route, in milliseconds, in which round, after what.
#[derive(Default)]
struct Stalls(Vec<(f64, u32, Plan)>);

impl Stalls {
    fn of(&self, wanted: impl Fn(&Plan) -> bool) -> String {
        let wanted = self.0.iter().filter(|(_, _, plan)| wanted(plan));
        let mut stalls: Vec<f64> = wanted.map(|(took_ms, ..)| *took_ms).collect();
        stalls.sort_by(f64::total_cmp);
        let at = |q: f64| {
            stalls
                .get((stalls.len() as f64 * q) as usize)
                .unwrap_or(&0.0)
        };
        format!("p50 {:.1} p99 {:.1} ms", at(0.5), at(0.99))
    }

    fn longest(&mut self, n: usize) -> &[(f64, u32, Plan)] {
        self.0.sort_by(|a, b| b.0.total_cmp(&a.0));
        &self.0[..n.min(self.0.len())]
    }
}

#[tokio::test]
async fn no_token_is_lost_changed_or_doubled_when_hops_die_or_freeze() -> Result<()> {
    let [kills, freezes, early] = fault_counts()?;
    let seed = std::env::var("SHOAL_FAULT_SEED").map_or(Ok(1), |text| text.parse())?;
    let mut seed = Seed(seed);

    let mut swarm = serve("demo", &SPANS, &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let short = "Once upon a time there was a king";
    let long = "There was once a little girl who lived in a house by the wood. ".repeat(40);
    let calm_short = run(&client, short).await?;
    let calm_long = run(&client, &long).await?;

    let mut stalls = Stalls::default();
    let mut unseen = 0;
    for round in 0..kills + freezes + early {
        let (fault, prompt, calm, after) = match round {
            r if r < kills => (Fault::Kill, short, &calm_short, seed.draw(400)),
            r if r < kills + freezes => (Fault::Freeze, short, &calm_short, seed.draw(400)),
            _ => (Fault::Kill, long.as_str(), &calm_long, seed.draw(100)),
        };
        let plan = Plan {
            fault,
            hop: seed.draw(3) as usize,
            after: Duration::from_millis(after),
        };
        let (answer, said) = disturbed(&mut swarm, &client, prompt, plan)
            .await
            .with_context(|| format!("round {round}, {plan:?}"))?;
        ensure!(
            answer.tokens == calm.tokens && answer.text == calm.text,
            "round {round}, {plan:?}: the text is another:\n{}\n{}",
            calm.text,
            answer.text
        );
        if answer.recoveries.is_empty() {
            unseen += 1;
        }
        for recovery in &answer.recoveries {
            ensure!(
                recovery.took_ms < STALL_MAX_MS,
                "round {round}, {plan:?}: {} ms for {}",
                recovery.took_ms,
                recovery.lost
            );
            stalls.0.push((recovery.took_ms, round, plan));
            if recovery.took_ms > 1000.0 {
                eprintln!(
                    "round {round}, {plan:?}: {} ms; the client said:\n{said}",
                    recovery.took_ms
                );
            }
        }
    }
    eprintln!(
        "{} faults, {unseen} after the answer; from failure to a new route: {}; kills {}; freezes {}",
        kills + freezes + early,
        stalls.of(|_| true),
        stalls.of(|plan| plan.fault == Fault::Kill),
        stalls.of(|plan| plan.fault == Fault::Freeze),
    );
    for (took_ms, round, plan) in stalls.longest(8) {
        eprintln!("  {took_ms:.0} ms in round {round}, {plan:?}");
    }
    // A fault that comes after the answer tests nothing.
    ensure!(
        unseen * 2 <= kills + freezes + early,
        "{unseen} of the faults came too late"
    );
    swarm.stop().await;
    Ok(())
}

/// Kills and freezes while decoding, and kills while the prompt is computed.
fn fault_counts() -> Result<[u32; 3]> {
    let counts = std::env::var("SHOAL_FAULTS").unwrap_or_else(|_| "20,20,5".into());
    let counts: Vec<u32> = counts
        .split(',')
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    let counts = <[u32; 3]>::try_from(counts);
    counts.map_err(|_| {
        anyhow::anyhow!("SHOAL_FAULTS is three numbers: kills,freezes,kills in the prompt")
    })
}

fn arguments(client: &Client, prompt: &str) -> Vec<String> {
    let mut args = vec!["run".to_owned()];
    args.extend(client.swarm_args());
    let fixed = [
        "--json", "--raw", "--temp", "0", "-n", TOKENS, "--model", "demo", "--", prompt,
    ];
    args.extend(fixed.map(str::to_owned));
    args
}

async fn run(client: &Client, prompt: &str) -> Result<Answer> {
    client.json(&arguments(client, prompt), PATIENCE).await
}

/// Runs a prompt and lets the fault happen after the route is known; the answer, and what the client
/// said meanwhile.
async fn disturbed(
    swarm: &mut Swarm,
    client: &Client,
    prompt: &str,
    plan: Plan,
) -> Result<(Answer, String)> {
    let mut child = client.start(&arguments(client, prompt))?;
    let mut notes = BufReader::new(child.stderr.take().context("no stderr")?).lines();
    let mut printed = child.stdout.take().context("no stdout")?;
    let reading = tokio::spawn(async move {
        let mut json = String::new();
        printed.read_to_string(&mut json).await.map(|_| json)
    });
    let mut said = String::new();
    let route = loop {
        let line = tokio::time::timeout(PATIENCE, notes.next_line()).await??;
        let Some(line) = line else {
            anyhow::bail!("the client ended without a route:\n{said}");
        };
        said.push_str(&line);
        said.push('\n');
        if let Some(route) = line.strip_prefix("route: ") {
            break route.to_owned();
        }
    };
    let rest = tokio::spawn(async move {
        while let Ok(Some(line)) = notes.next_line().await {
            said.push_str(&line);
            said.push('\n');
        }
        said
    });
    let on_route: Vec<usize> = (1..swarm.nodes().len())
        .filter(|at| {
            let ready = swarm.nodes()[*at].ready.as_ref();
            ready.is_some_and(|ready| route.contains(&ready.peer[ready.peer.len() - 6..]))
        })
        .collect();
    ensure!(!on_route.is_empty(), "none of our nodes in: {route}");
    let index = on_route[plan.hop % on_route.len()];
    let span = swarm.spans()[index].clone();
    tokio::time::sleep(plan.after).await;
    let signal = match plan.fault {
        Fault::Kill => Signal::KILL,
        Fault::Freeze => Signal::STOP,
    };
    swarm.nodes_mut()[index].process.signal(signal)?;
    let status = tokio::time::timeout(PATIENCE, child.wait()).await;
    // The frozen one thaws, whatever came of it; the dead one is replaced.
    match plan.fault {
        Fault::Freeze => swarm.nodes_mut()[index].process.signal(Signal::CONT)?,
        Fault::Kill => {
            let span = format!("{}..{}", span.start, span.end);
            let known = swarm.nodes()[0].ready.as_ref().context("node 0 serves")?;
            // Introduced by one that lives: the launcher may pick dead ones.
            let peers: Vec<String> = known
                .dialable()
                .into_iter()
                .flat_map(|addr| ["--peer".to_owned(), addr])
                .collect();
            let peers: Vec<&str> = peers.iter().map(String::as_str).collect();
            join(swarm, "demo", &[&span], &peers).await?;
        }
    }
    let (status, said) = (status.context("the client hangs")??, rest.await?);
    ensure!(status.success(), "the client ended with {status}:\n{said}");
    let answer = serde_json::from_str(&reading.await??).with_context(|| said.clone())?;
    Ok((answer, said))
}
