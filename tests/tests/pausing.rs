//! What the owner of a node can ask and tell it while it runs: how it is, to pause, to serve again.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testnet::client::{Ask, Client};
use testnet::swarm::Swarm;
use tests::{PATIENCE, join, serve, until};

/// Long enough for a node that wrongly gives to have given.
const MEANWHILE: Duration = Duration::from_secs(4);

fn home(swarm: &Swarm, node: usize) -> PathBuf {
    swarm.folder().join(format!("node-{node:02}"))
}

/// `shoal node …` in the home of a node, counted from 1.
async fn say(swarm: &Swarm, node: usize, words: &str) -> Result<Value> {
    let home = home(swarm, node).display().to_string();
    let args = ["node"].into_iter().chain(words.split(' '));
    let args = args.chain(["--json", "--home", &home]).map(str::to_owned);
    let args: Vec<String> = args.collect();
    swarm.client("owner").json(&args, PATIENCE).await
}

async fn until_holders(client: &Client, wanted: usize) -> Result<()> {
    until("every layer has so many holders", PATIENCE, async || {
        let layers = client.layers(PATIENCE).await.ok()?;
        let held = layers.iter().all(|layer| layer.holders.len() == wanted);
        (held && (wanted == 0 || layers.len() == 8)).then_some(())
    })
    .await
}

/// A swarm of two nodes that hold the demo model, and what it is called.
async fn two() -> Result<(Swarm, String)> {
    let swarm = serve("demo", &["0..8", "0..8"], &[]).await?;
    let ready = swarm.nodes()[0].ready.clone().context("no ready line")?;
    Ok((swarm, ready.model().to_owned()))
}

#[tokio::test]
async fn a_paused_node_is_gone_around_until_its_owner_says_so_or_it_is_started_again() -> Result<()>
{
    let (mut swarm, model) = two().await?;
    let status = say(&swarm, 1, "status").await?;
    let served = &status["models"][0];
    ensure!(
        status["state"] == "serving" && served["model"] == *model,
        "{status}"
    );
    ensure!(
        served["live"] == json!(["0..8"]) && served["layer_tokens_s"].as_f64() > Some(0.0),
        "{status}"
    );

    let client = swarm.client("client");
    until_holders(&client, 2).await?;
    let status = say(&swarm, 1, "pause --for 2h").await?;
    ensure!(
        status["state"] == "paused" && status["paused"]["why"] == "owner",
        "{status}"
    );
    until_holders(&client, 1).await?;
    let ask = Ask::text("demo", "Once upon a time", 16);
    let answer = client.ask(&ask, PATIENCE).await?;
    let other = swarm.nodes()[1].ready.clone().context("no ready line")?;
    ensure!(
        answer.route.len() == 1 && answer.route[0].peer == other.peer,
        "{answer:?}"
    );

    swarm.restart(0, PATIENCE).await?;
    let status = say(&swarm, 1, "status").await?;
    ensure!(
        status["state"] == "paused" && status["models"][0]["live"] == json!(["0..8"]),
        "{status}"
    );
    let status = say(&swarm, 1, "resume").await?;
    ensure!(
        status["state"] == "serving" && status["paused"].is_null(),
        "{status}"
    );
    until_holders(&client, 2).await?;

    let socket = home(&swarm, 1).join("node.sock");
    ensure!(socket.exists());
    swarm.nodes_mut()[0].process.stop().await;
    ensure!(!socket.exists(), "the socket of a node that ended");
    let refused = say(&swarm, 1, "status").await;
    ensure!(refused.is_err_and(|error| error.to_string().contains("no node runs")));
    swarm.stop().await;
    Ok(())
}

#[tokio::test]
async fn a_paused_node_gives_nothing_and_what_it_gives_is_counted() -> Result<()> {
    let (mut swarm, model) = two().await?;
    for node in [1, 2] {
        say(&swarm, node, "pause").await?;
    }
    until_holders(&swarm.client("client"), 0).await?;
    let fresh = join(&mut swarm, &model, &["2..4"], &[]);
    ensure!(
        tokio::time::timeout(MEANWHILE, fresh).await.is_err(),
        "it got its layers from a paused node"
    );
    for node in [1, 2] {
        let status = say(&swarm, node, "status").await?;
        ensure!(status["transfer"]["given_bytes"] == 0, "{status}");
    }
    let status = say(&swarm, 3, "status").await?;
    ensure!(
        status["state"] == "starting" && status["models"] == json!([]),
        "{status}"
    );

    say(&swarm, 1, "resume").await?;
    let status = until("the fresh one has its layers", PATIENCE, async || {
        let status = say(&swarm, 3, "status").await.ok()?;
        (status["models"][0]["live"] == json!(["2..4"])).then_some(status)
    })
    .await?;
    let transfer = &status["transfer"];
    let shards = transfer["shards"].as_array().context("no shards")?;
    ensure!(
        shards.len() == 2 && shards.iter().all(|shard| shard["fetches"] == 1),
        "{status}"
    );
    ensure!(status["disk_bytes"].as_u64() > Some(0), "{status}");
    let giver = say(&swarm, 1, "status").await?;
    ensure!(
        giver["transfer"]["given_bytes"].as_u64() >= transfer["fetched_bytes"].as_u64(),
        "{giver}: {status}"
    );
    swarm.stop().await;
    Ok(())
}

#[tokio::test]
async fn in_quiet_hours_a_node_is_paused_and_its_owner_can_wake_it() -> Result<()> {
    let flags = ["--quiet-hours", "00:00-24:00", "--cpu-share", "50"];
    let mut swarm = serve("demo", &["0..8"], &flags).await?;
    let status = say(&swarm, 1, "status").await?;
    ensure!(
        status["state"] == "paused" && status["paused"]["why"] == "quiet-hours",
        "{status}"
    );
    ensure!(status["paused"]["until"].as_u64() > Some(0), "{status}");
    let status = say(&swarm, 1, "resume").await?;
    ensure!(status["state"] == "serving", "{status}");
    let ask = Ask::text("demo", "Once upon a time", 8);
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let (staged, whole) = (
        client.ask(&ask, PATIENCE).await?,
        client.ask_local(&ask, PATIENCE).await?,
    );
    ensure!(staged.same(&whole), "{staged:?}\n{whole:?}");
    swarm.stop().await;
    Ok(())
}
