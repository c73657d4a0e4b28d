//! Disks that fill up, or cannot be written, under the real programs: the cause and a remedy are said, what is there
//! stays whole, and it goes on when there is room again.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use swarm_proto::ShardId;
use testnet::binaries::Binaries;
use testnet::client::Client;
use testnet::process::NodeProcess;
use tests::room::{Room, script};
use tests::{PATIENCE, demo_file, serve, until};
use tokio::time::timeout;

fn pull(client: &Client, more: &[&str]) -> Vec<String> {
    let mut args = vec!["pull".to_owned(), "demo".to_owned()];
    args.extend(client.swarm_args());
    args.extend(more.iter().map(|arg| (*arg).to_owned()));
    args
}

/// Runs what must fail, and returns what it says.
async fn refused(client: &Client, args: &[String]) -> Result<String> {
    let output = client.output(args, PATIENCE).await?;
    ensure!(output.status.code() == Some(1), "{args:?}: {output:?}");
    ensure!(output.stdout.is_empty(), "{output:?}");
    Ok(output.stderr)
}

fn says(text: &str, all: &[&str]) -> Result<()> {
    let missing: Vec<_> = all.iter().filter(|part| !text.contains(**part)).collect();
    ensure!(missing.is_empty(), "{missing:?} not in: {text}");
    Ok(())
}

/// The cause and a remedy: in the middle of a shard, or before the next one.
fn is_full(text: &str) -> bool {
    let all = |parts: &[&str]| parts.iter().all(|part| text.contains(part));
    all(&[
        "No space left on device",
        "free some disk",
        "goes on from there",
    ]) || all(&["are needed", "are free", "shoal gc"])
}

/// How many shards are there, each of them whole.
fn whole_shards(store: &Path) -> Result<usize> {
    let blobs = store
        .join("blobs")
        .read_dir()?
        .collect::<Result<Vec<_>, _>>()?;
    for blob in &blobs {
        let id = ShardId::of(&std::fs::read(blob.path())?).to_string();
        ensure!(blob.file_name().to_string_lossy() == id, "{blob:?}");
    }
    Ok(blobs.len())
}

async fn until_logged(node: &NodeProcess, what: &str) -> Result<()> {
    until(what, PATIENCE, async || {
        node.log_tail().contains(what).then_some(())
    })
    .await
    .with_context(|| node.log_tail())
}

#[tokio::test]
async fn a_disk_that_fills_up_is_named_and_it_goes_on_when_there_is_room() -> Result<()> {
    let mut swarm = serve("demo", &["0..8"], &["--upload-limit", "2M"]).await?;
    let Some(room) = Room::open(&swarm.folder().join("room"))? else {
        return Ok(());
    };
    let client = room.client(&swarm, "home")?;
    let fetching = client.start(&pull(&client, &[]))?;
    until("some of it is here", PATIENCE, async || {
        (room.used().ok()? > 2 << 20).then_some(())
    })
    .await?;
    room.fill()?;
    let ended = timeout(PATIENCE, fetching.wait_with_output()).await??;
    ensure!(ended.status.code() == Some(1), "{ended:?}");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    ensure!(is_full(&said), "{said}");
    ensure!(whole_shards(&room.seen("home/store"))? > 0, "none is there");
    // Nothing is begun that cannot be ended; what needs little more says why, too.
    let refusal = refused(&client, &pull(&client, &[])).await?;
    says(&refusal, &["MiB are needed", "stay free", "shoal gc"])?;
    let demo = demo_file().display().to_string();
    let import = refused(&client, &["import".into(), demo]).await?;
    says(&import, &["No space left on device", "free some disk"])?;
    let listed = ["models", "--offline", "--json"].map(str::to_owned);
    let listed: Value = client.json(&listed, PATIENCE).await?;
    ensure!(listed["local"][0]["names"][0] == "demo", "{listed}");

    room.enlarge()?;
    let report: Value = client.json(&pull(&client, &["--json"]), PATIENCE).await?;
    ensure!(report["layers"][0] == "0..8", "{report}");
    let came = report["fetched_bytes"]
        .as_u64()
        .zip(report["bytes"].as_u64());
    let (fetched, bytes) = came.context("no bytes")?;
    ensure!(
        fetched + (1 << 20) < bytes,
        "{fetched} of {bytes} came then"
    );
    ensure!(whole_shards(&room.seen("home/store"))? == 10, "not all");

    // A node that grows: it serves what it has meanwhile.
    let seed = swarm.nodes()[0].ready.clone().context("it serves")?;
    let more = [
        "--model",
        seed.model(),
        "--layers",
        "0..8",
        "--memory",
        "1G",
    ];
    let (mut node, ready) = room.node(&swarm, "growing", &more)?;
    let ready = timeout(PATIENCE, ready).await?;
    ready.with_context(|| node.log_tail())?;
    room.fill()?;
    until("the full disk is named", PATIENCE, async || {
        is_full(&node.log_tail()).then_some(())
    })
    .await?;
    ensure!(node.is_running());
    room.enlarge()?;
    until_logged(&node, "(8 of 8)").await?;
    ensure!(whole_shards(&room.seen("growing/store"))? == 10, "not all");
    node.stop().await;
    swarm.stop().await;
    Ok(())
}

#[tokio::test]
async fn a_store_that_cannot_be_written_gives_what_it_has_and_says_what_to_do() -> Result<()> {
    let mut swarm = serve("demo", &["0..8"], &[]).await?;
    let Some(room) = Room::open(&swarm.folder().join("room"))? else {
        return Ok(());
    };
    let client = room.client(&swarm, "home")?;
    let some = pull(&client, &["--layers", "0..4", "--json"]);
    let report: Value = client.json(&some, PATIENCE).await?;
    ensure!(report["layers"][0] == "0..4", "{report}");
    room.read_only("home/store", true)?;
    let remedies = ["Read-only file system", "must be writable", "--home DIR"];
    says(&refused(&client, &pull(&client, &[])).await?, &remedies)?;
    let demo = demo_file().display().to_string();
    says(
        &refused(&client, &["import".into(), demo]).await?,
        &remedies,
    )?;
    says(
        &refused(&client, &["rm".into(), "demo".into()]).await?,
        &remedies,
    )?;
    // What is all here can be checked, and served.
    let report: Value = client.json(&some, PATIENCE).await?;
    ensure!(report["fetched_bytes"] == 0, "{report}");
    let more = ["--model", "demo", "--layers", "0..8", "--memory", "1G"];
    let (mut node, ready) = room.node(&swarm, "home", &more)?;
    let ready = timeout(PATIENCE, ready).await?;
    ready.with_context(|| node.log_tail())?;
    until_logged(&node, "must be writable").await?;
    until_logged(&node, "(4 of 8)").await?;

    room.read_only("home/store", false)?;
    until_logged(&node, "(8 of 8)").await?;
    let report: Value = client.json(&pull(&client, &["--json"]), PATIENCE).await?;
    ensure!(
        report["fetched_bytes"] == 0,
        "the node fetched it: {report}"
    );
    node.stop().await;
    swarm.stop().await;
    Ok(())
}

/// Another way in which a file cannot grow, where there are no namespaces too.
#[tokio::test]
async fn a_limit_on_the_size_of_files_is_named_and_what_is_there_stays() -> Result<()> {
    let mut swarm = serve("demo", &["0..8"], &[]).await?;
    let binaries = Binaries::beside_this_program()?;
    let limited = swarm.folder().join("limited");
    let shoal = binaries.shoal.display();
    // Units of 512 bytes or 1 KiB: less than a layer either way, and more than what describes the model.
    let lines = format!("trap '' XFSZ\nulimit -f 700\nexec '{shoal}' \"$@\"");
    script(&limited, &lines)?;
    let whole = swarm.client("client");
    let ready = swarm.nodes()[0].ready.clone().context("node 0 serves")?;
    let home = swarm.folder().join("client");
    let client = Client::new(&limited, swarm.id(), ready.dialable(), &home);
    let said = refused(&client, &pull(&client, &[])).await?;
    says(&said, &["File too large", "ulimit -f", "--home DIR"])?;
    ensure!(whole_shards(&home.join("store"))? == 0, "none fits");
    let report: Value = whole.json(&pull(&whole, &["--json"]), PATIENCE).await?;
    ensure!(report["layers"][0] == "0..8", "{report}");
    swarm.stop().await;
    Ok(())
}
