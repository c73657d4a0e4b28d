//! What is left when somebody leaves: nodes say so, clients that die free what they held.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use testnet::swarm::Swarm;
use tests::{FOUR_SPANS, PATIENCE, serve, until};
use tokio::io::AsyncWriteExt;

/// A node says that it leaves; others need not wait for its advert to expire (30 s or more).
const WITHDRAWN_WITHIN: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_node_that_is_told_to_end_withdraws_its_advert() -> Result<()> {
    let mut swarm = serve("demo", &FOUR_SPANS, &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let last = &mut swarm.nodes_mut()[3].process;
    last.signal(Signal::TERM)?;
    let asked = Instant::now();
    let status = last.ended(PATIENCE).await?;
    ensure!(
        status.success(),
        "it ended with {status}:\n{}",
        last.log_tail()
    );
    ensure!(
        asked.elapsed() < Duration::from_secs(8),
        "it took {:?}",
        asked.elapsed()
    );
    until(
        "the others know that nobody holds layer 7",
        WITHDRAWN_WITHIN,
        async || {
            let layers = client.layers(PATIENCE).await.ok()?;
            let gaps: Vec<u32> = layers
                .iter()
                .filter(|l| l.holders.is_empty())
                .map(|l| l.layer)
                .collect();
            (gaps == [7]).then_some(())
        },
    )
    .await?;
    swarm.stop().await;
    Ok(())
}

#[tokio::test]
async fn a_client_that_is_killed_frees_its_cells_on_every_node() -> Result<()> {
    let mut swarm = serve("demo", &FOUR_SPANS, &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let before = free_cells(&swarm).await?;

    // A chat keeps its session while it waits for the next line, which never comes.
    let mut args = vec!["chat".to_owned()];
    args.extend(client.swarm_args());
    args.extend(["--model", "demo", "--ctx", "512", "-n", "4"].map(str::to_owned));
    let mut talking = swarm.client("talking").start(&args)?;
    let mut line = talking.stdin.take().context("no input")?;
    line.write_all(b"Once upon a time\n").await?;
    until(
        "every node gives cells to the session",
        PATIENCE,
        async || {
            let now = free_cells(&swarm).await.ok()?;
            now.iter()
                .zip(&before)
                .all(|(now, before)| now < before)
                .then_some(())
        },
    )
    .await?;
    talking
        .start_kill()
        .context("the client had ended already")?;
    talking.wait().await?;
    until("every node has its cells back", PATIENCE, async || {
        (free_cells(&swarm).await.ok()? == before).then_some(())
    })
    .await?;
    swarm.stop().await;
    Ok(())
}

/// The free KV cells of each node, in the order of the nodes.
async fn free_cells(swarm: &Swarm) -> Result<Vec<u64>> {
    let client = swarm.client("watching");
    let mut args = vec!["status".to_owned(), "--json".to_owned()];
    args.extend(client.swarm_args());
    let status: serde_json::Value = client.json(&args, PATIENCE).await?;
    let holders = status["models"][0]["holders"]
        .as_array()
        .context("nobody holds anything")?;
    let cells =
        |id: &str| holders.iter().find(|holder| holder["peer"] == id)?["free_cells"].as_u64();
    let nodes = swarm.nodes().iter().filter_map(|node| node.ready.as_ref());
    nodes
        .map(|ready| cells(&ready.peer).context("a node is not listed"))
        .collect()
}
