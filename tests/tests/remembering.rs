//! Peers met once are found again without anybody's help, with real processes.

use anyhow::{Context, Result, ensure};
use testnet::client::Client;
use tests::{PATIENCE, serve};

/// An address on this machine where nobody listens: port 1 is reserved.
const NOBODY: &str = "/ip4/127.0.0.1/tcp/1";

async fn sees_the_swarm(client: &Client) -> Result<()> {
    let layers = client.layers(PATIENCE).await?;
    ensure!(!layers.is_empty(), "nobody serves anything");
    Ok(())
}

#[tokio::test]
async fn a_swarm_is_found_again_by_whom_was_met_before() -> Result<()> {
    let mut swarm = serve("demo", &["0..8"], &[]).await?;
    let client = swarm.client("client");
    let lost = client.clone().knowing(Vec::new());
    let misled = client.clone().knowing(vec![NOBODY.to_owned()]);
    ensure!(
        sees_the_swarm(&lost).await.is_err(),
        "nobody was met yet, and mDNS is off"
    );
    client.until_covered(8, PATIENCE).await?;
    sees_the_swarm(&lost).await.context("no peer was given")?;
    sees_the_swarm(&misled)
        .await
        .context("the peer given does not answer")?;

    // Being remembered is not being trusted.
    let stranger = "12D3KooWEjC3dwr1XHdYXRT3JNnRkGZ2jELHoNsjbvZhokPnv2tW";
    let trusting = lost.with(["--allow", stranger]);
    ensure!(
        sees_the_swarm(&trusting).await.is_err(),
        "a peer that is not on the list was dialled"
    );

    let doctor = client.output(&["doctor"], PATIENCE).await?;
    ensure!(
        doctor
            .stdout
            .contains(&format!("1 peer of swarm {}", swarm.id())),
        "{}",
        doctor.stdout
    );
    swarm.stop().await;
    Ok(())
}
