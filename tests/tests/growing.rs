//! A node that knows one peer and one id: it fetches what it is to serve, again where that was damaged, and its
//! answers are the whole model's.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use testnet::client::Ask;
use tests::{PATIENCE, join, serve, until, until_held_twice};

#[tokio::test]
async fn a_node_that_has_nothing_fetches_its_layers_and_serves_them() -> Result<()> {
    let mut swarm = serve("demo", &["0..8"], &[]).await?;
    let ready = swarm.nodes()[0].ready.clone().context("node 0 serves")?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let ask = Ask::text("demo", "Once upon a time", 24);
    let whole = client.ask_local(&ask, PATIENCE).await?;

    join(&mut swarm, ready.model(), &["0..4", "4..8"], &[]).await?;
    // Ready with the first layer; the others follow.
    let blobs = ["node-02", "node-03"].map(|home| swarm.folder().join(home).join("store/blobs"));
    until("all its layers are there", PATIENCE, async || {
        let logs = [1, 2].map(|node: usize| swarm.nodes()[node].process.log_tail());
        logs.iter()
            .all(|log| log.contains("(4 of 4)"))
            .then_some(())
    })
    .await?;
    for folder in &blobs {
        let shards = folder.read_dir()?.count();
        ensure!(shards == 5, "four layers and an end: {shards}");
    }
    // A bit flips on the disk of one of them while it is down.
    let blob = blobs[0].read_dir()?.next().context("no shard")??.path();
    let good = std::fs::read(&blob)?;
    let mut bad = good.clone();
    bad[1000] ^= 4;
    std::fs::write(&blob, &bad)?;
    swarm.restart(1, PATIENCE).await?;
    until("it is fetched again", PATIENCE, async || {
        (std::fs::read(&blob).ok()? == good).then_some(())
    })
    .await?;
    let client = swarm.client("another");
    until_held_twice(&client).await?;
    swarm.nodes_mut()[0].process.signal(Signal::KILL)?;
    let staged = client.ask(&ask, PATIENCE).await?;
    ensure!(staged.same(&whole), "staged: {staged:?}\nwhole: {whole:?}");
    swarm.stop().await;
    Ok(())
}
