//! Who belongs to a swarm and whom a client lets see its prompt, with real processes.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use testnet::binaries::Binaries;
use testnet::client::{Ask, Client, Output};
use testnet::swarm::Swarm;
use tests::{PATIENCE, join, serve, until};

const HALVES: [&str; 2] = ["0..4", "4..8"];

fn question() -> Ask {
    Ask::text("demo", "Once upon a time", 4)
}

/// A question that must fail; gives back what was said.
async fn refused(client: &Client) -> Result<String> {
    match client.ask(&question(), PATIENCE).await {
        Ok(answer) => anyhow::bail!("it was answered: {answer:?}"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

#[tokio::test]
async fn swarms_with_different_ids_do_not_merge() -> Result<()> {
    let mut ours = serve("demo", &HALVES, &[]).await?;
    let to_ours = ours.nodes()[0]
        .ready
        .as_ref()
        .map(|ready| ready.dialable())
        .unwrap_or_default();
    let mut theirs = Swarm::new(Binaries::beside_this_program()?)?;
    join(&mut theirs, "demo", &["0..4"], &["--peer", &to_ours[0]]).await?;

    let complete = ours.client("client");
    complete.until_covered(8, PATIENCE).await?;
    complete.ask(&question(), PATIENCE).await?;
    let layers = complete.layers(PATIENCE).await?;
    ensure!(
        layers.iter().all(|layer| layer.holders.len() == 1),
        "a stranger is listed: {layers:?}"
    );

    // Theirs was introduced to ours, and still nobody there holds the other half.
    let incomplete = theirs.client("client");
    until("their own node is listed", PATIENCE, async || {
        incomplete
            .layers(PATIENCE)
            .await
            .ok()
            .filter(|layers| !layers.is_empty())
    })
    .await?;
    let said = refused(&incomplete).await?;
    ensure!(
        said.contains("4..8"),
        "the missing layers are not named: {said}"
    );

    // A client of theirs that only knows an address of ours is told that nobody of its swarm is there, and who is.
    let said = refused(&theirs.client("lost").knowing(to_ours)).await?;
    for part in [
        format!("nobody of swarm {}", theirs.id()),
        format!("speaks swarm {}", ours.id()),
        format!("--swarm {}", ours.id()),
    ] {
        ensure!(said.contains(&part), "not said: {part}\n{said}");
    }
    ours.stop().await;
    theirs.stop().await;
    Ok(())
}

fn key_file(folder: &Path, name: &str, digit: char) -> Result<PathBuf> {
    let path = folder.join(name);
    std::fs::write(&path, digit.to_string().repeat(64) + "\n")?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(path)
}

#[tokio::test]
async fn a_private_swarm_hears_nobody_without_its_key() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let right = key_file(folder.path(), "right", 'a')?.display().to_string();
    let wrong = key_file(folder.path(), "wrong", 'b')?.display().to_string();
    let mut swarm = serve("demo", &HALVES, &["--key-file", &right]).await?;

    let member = swarm.client("member").with(["--key-file", &right]);
    member.until_covered(8, PATIENCE).await?;
    member.ask(&question(), PATIENCE).await?;

    refused(&swarm.client("stranger")).await?;
    refused(&swarm.client("guesser").with(["--key-file", &wrong])).await?;
    // The refusals were not because the swarm had gone.
    member.ask(&question(), PATIENCE).await?;
    swarm.stop().await;
    Ok(())
}

#[tokio::test]
async fn trusted_dials_nobody_else() -> Result<()> {
    let mut swarm = serve("demo", &HALVES, &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let ids: Vec<String> = swarm
        .nodes()
        .iter()
        .filter_map(|node| node.ready.as_ref())
        .map(|ready| ready.peer.clone())
        .collect();

    let first_only = client
        .clone()
        .with(["--privacy", "trusted", "--allow", &ids[0]]);
    let said = refused(&first_only).await?;
    ensure!(
        said.contains("4..8"),
        "the layers that no trusted peer holds are not named: {said}"
    );

    let both = client.clone().with([
        "--privacy",
        "trusted",
        "--allow",
        &ids[0],
        "--allow",
        &ids[1],
    ]);
    both.ask(&question(), PATIENCE).await?;
    let said = run_plainly(&both).await?;
    ensure!(
        said.status.success() && said.stderr.contains("trusted"),
        "the level is not said: {said:?}"
    );
    let said = run_plainly(&client).await?;
    ensure!(
        said.status.success() && said.stderr.contains("open"),
        "the level is not said: {said:?}"
    );
    swarm.stop().await;
    Ok(())
}

/// As a person runs it, without JSON.
async fn run_plainly(client: &Client) -> Result<Output> {
    let mut args = vec!["run".to_owned()];
    args.extend(client.swarm_args());
    args.extend(["--raw", "--temp", "0", "-n", "4", "Once upon a time"].map(str::to_owned));
    client.output(&args, PATIENCE).await
}
