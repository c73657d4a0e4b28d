//! Processes that are killed in the middle of a transfer: the giving one, and a node that fetches what it will serve.
//! Both go on, and what was here is not fetched again.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use testnet::binaries::Binaries;
use testnet::client::Ask;
use testnet::relay::Relay;
use testnet::swarm::Swarm;
use tests::{PATIENCE, join, serve, until, until_held_twice};
use tokio::time::{sleep, timeout};

/// Longer than a few quick tries, shorter than what a fetch waits for its last holder.
const AWAY: Duration = Duration::from_secs(6);

/// The shards in a store, and when each became one.
fn shards(home: &Path) -> Result<BTreeMap<String, SystemTime>> {
    let mut shards = BTreeMap::new();
    for blob in home.join("store/blobs").read_dir()? {
        let blob = blob?;
        let name = blob.file_name().to_string_lossy().into_owned();
        shards.insert(name, blob.metadata()?.modified()?);
    }
    Ok(shards)
}

#[tokio::test]
async fn the_only_giver_is_killed_and_comes_back_and_the_same_pull_ends_well() -> Result<()> {
    // Behind a gate: it comes back at the same address.
    let mut swarm = Swarm::new(Binaries::beside_this_program()?)?.behind(Relay::new(1));
    join(&mut swarm, "demo", &["0..8"], &["--upload-limit", "3M"]).await?;
    let client = swarm.client("fresh");
    let home = swarm.folder().join("fresh");
    let mut args = vec!["pull".to_owned(), "demo".to_owned(), "--json".to_owned()];
    args.extend(client.swarm_args());
    let fetching = client.start(&args)?;
    let some = |home: &Path| shards(home).is_ok_and(|shards| shards.len() > 2);
    until("some of it is here", PATIENCE, async || {
        some(&home).then_some(())
    })
    .await?;
    swarm.nodes_mut()[0].process.signal(Signal::KILL)?;
    let before = shards(&home)?;
    ensure!(before.len() < 9, "{before:?}");
    sleep(AWAY).await;
    swarm.restart(0, PATIENCE).await?;
    let ended = timeout(PATIENCE, fetching.wait_with_output()).await??;
    let said = String::from_utf8_lossy(&ended.stderr);
    ensure!(ended.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&ended.stdout)?;
    ensure!(report["layers"][0] == "0..8", "{report}");
    let after = shards(&home)?;
    ensure!(after.len() == 10, "{after:?}");
    for (shard, at) in &before {
        ensure!(after.get(shard) == Some(at), "{shard} was written again");
    }
    // All of it is right: it is read and hashed.
    let again: Value = client.json(&args, PATIENCE).await?;
    ensure!(again["fetched_bytes"] == 0, "{again}");
    swarm.stop().await;
    Ok(())
}

#[tokio::test]
async fn a_node_killed_while_it_fetches_goes_on_and_serves_the_same() -> Result<()> {
    let mut swarm = serve("demo", &["0..8"], &["--upload-limit", "3M"]).await?;
    let model = swarm.nodes()[0]
        .ready
        .clone()
        .context("it serves")?
        .model()
        .to_owned();
    let ask = Ask::text("demo", "Once upon a time", 24);
    let whole = swarm.client("client").ask_local(&ask, PATIENCE).await?;
    join(&mut swarm, &model, &["0..8"], &[]).await?;
    let home = swarm.folder().join("node-02");
    until("some shards are there", PATIENCE, async || {
        shards(&home)
            .is_ok_and(|shards| shards.len() > 3)
            .then_some(())
    })
    .await?;
    // Killed and started.
    swarm.nodes_mut()[1].process.signal(Signal::KILL)?;
    let before = shards(&home)?;
    ensure!(before.len() < 10, "it was too quick: {before:?}");
    swarm.restart(1, PATIENCE).await?;
    until("all its layers are there", PATIENCE, async || {
        let log = swarm.nodes()[1].process.log_tail();
        log.contains("(8 of 8)").then_some(())
    })
    .await?;
    let after = shards(&home)?;
    ensure!(after.len() == 10, "{after:?}");
    for (shard, at) in &before {
        ensure!(after.get(shard) == Some(at), "{shard} was fetched again");
    }
    let client = swarm.client("another");
    until_held_twice(&client).await?;
    swarm.nodes_mut()[0].process.signal(Signal::KILL)?;
    let alone = client.ask(&ask, PATIENCE).await?;
    ensure!(alone.same(&whole), "alone: {alone:?}\nwhole: {whole:?}");
    swarm.stop().await;
    Ok(())
}
