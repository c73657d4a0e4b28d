//! A model from a node to a machine that has nothing, with real processes: killed in the middle, gone on with, and run
//! from what came.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use testnet::client::{Ask, Client};
use tests::{PATIENCE, serve, until};

/// Of the demo's 8 MB some are here by then, and some are not.
const SOME_BYTES: u64 = 2 << 20;

fn pull(client: &Client, more: &[&str]) -> Vec<String> {
    let mut args = vec!["pull".to_owned(), "demo".to_owned()];
    args.extend(client.swarm_args());
    args.extend(more.iter().map(|arg| (*arg).to_owned()));
    args
}

/// Bytes of what was fetched so far: whole shards, and those on their way as far as they take disk.
fn here(store: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let folders = ["blobs", "partial"].map(|folder| store.join(folder));
    let entries = folders
        .iter()
        .filter_map(|folder| std::fs::read_dir(folder).ok());
    let files = entries
        .flatten()
        .flatten()
        .filter_map(|entry| entry.metadata().ok());
    files.map(|meta| meta.blocks() * 512).sum()
}

#[tokio::test]
async fn a_pull_that_is_killed_goes_on_and_the_model_runs_from_what_came() -> Result<()> {
    let mut swarm = serve("demo", &["0..8"], &["--upload-limit", "3M"]).await?;
    let client = swarm.client("fresh");
    client.until_covered(8, PATIENCE).await?;
    let store = swarm.folder().join("fresh").join("store");
    let mut first = client.start(&pull(&client, &[]))?;
    until("some of it is here", PATIENCE, async || {
        (here(&store) > SOME_BYTES).then_some(())
    })
    .await?;
    first.start_kill()?;
    first.wait().await?;
    ensure!(here(&store) > SOME_BYTES, "what came is kept");

    let report: Value = client.json(&pull(&client, &["--json"]), PATIENCE).await?;
    ensure!(report["layers"] == serde_json::json!(["0..8"]), "{report}");
    let (bytes, fetched) = (report["bytes"].as_u64(), report["fetched_bytes"].as_u64());
    let (bytes, fetched) = bytes.zip(fetched).context("no bytes")?;
    ensure!(
        fetched > 0 && fetched < bytes,
        "{fetched} of {bytes} came after the kill"
    );
    let again: Value = client.json(&pull(&client, &["--json"]), PATIENCE).await?;
    ensure!(again["fetched_bytes"] == 0, "{again}");

    let listed: Value = client
        .json(
            &["models", "--offline", "--json"].map(str::to_owned),
            PATIENCE,
        )
        .await?;
    ensure!(
        listed["local"][0]["layers"] == serde_json::json!(["0..8"]),
        "{listed}"
    );
    ensure!(
        listed["local"][0]["files"] == serde_json::json!([]),
        "{listed}"
    );
    let ask = Ask::text("demo", "Once upon a time", 16);
    let staged = client.ask(&ask, PATIENCE).await?;
    let whole = client.ask_local(&ask, PATIENCE).await?;
    ensure!(
        staged.same(&whole),
        "staged: {staged:?}\nfrom shards: {whole:?}"
    );
    swarm.stop().await;
    Ok(())
}

#[tokio::test]
async fn a_model_that_is_removed_while_it_is_pulled_is_said_to_be() -> Result<()> {
    let mut swarm = serve("demo", &["0..8"], &["--upload-limit", "3M"]).await?;
    let client = swarm.client("fresh");
    client.until_covered(8, PATIENCE).await?;
    let store = swarm.folder().join("fresh").join("store");
    let pulling = client.start(&pull(&client, &[]))?;
    until("some of it is here", PATIENCE, async || {
        (here(&store) > SOME_BYTES).then_some(())
    })
    .await?;
    let removed: Value = client
        .json(&["rm", "demo", "--json"].map(str::to_owned), PATIENCE)
        .await?;
    ensure!(removed["model"].is_string(), "{removed}");
    let ended = pulling.wait_with_output().await?;
    let said = String::from_utf8_lossy(&ended.stderr);
    ensure!(ended.status.code() == Some(1), "{said}");
    for words in ["was removed from this machine", "try:", "shoal gc"] {
        ensure!(said.contains(words), "no {words:?} in: {said}");
    }
    swarm.stop().await;
    Ok(())
}

#[tokio::test]
async fn a_pull_that_is_broken_off_by_hand_says_so_by_its_code() -> Result<()> {
    let mut swarm = serve("demo", &["0..8"], &["--upload-limit", "1M"]).await?;
    let client = swarm.client("fresh");
    client.until_covered(8, PATIENCE).await?;
    let store = swarm.folder().join("fresh").join("store");
    for signal in [Signal::INT, Signal::TERM] {
        let before = here(&store);
        let mut pulling = client.start(&pull(&client, &[]))?;
        until("some more of it is here", PATIENCE, async || {
            (here(&store) > before).then_some(())
        })
        .await?;
        let pid = i32::try_from(pulling.id().context("it has ended")?)?;
        kill_process(Pid::from_raw(pid).context("no process")?, signal)?;
        let ended = pulling.wait().await?;
        ensure!(ended.code() == Some(130), "{signal:?}: {ended}");
    }
    swarm.stop().await;
    Ok(())
}
