//! `shoal route`, with real processes: the route it shows is the one a run takes, and what is missing is named.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test that cannot go on says where

use anyhow::{Result, ensure};
use serde_json::Value;
use testnet::client::{Ask, Client};
use tests::{FOUR_SPANS, PATIENCE, join, serve, until};

fn args(client: &Client, more: &[&str]) -> Vec<String> {
    let mut args: Vec<String> = ["route", "demo"].map(String::from).to_vec();
    args.extend(more.iter().map(ToString::to_string));
    args.extend(client.swarm_args());
    args
}

#[tokio::test]
async fn the_route_that_a_run_takes_and_why_nobody_else() -> Result<()> {
    let mut swarm = serve("demo", &FOUR_SPANS, &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let shown: Value = client.json(&args(&client, &["--json"]), PATIENCE).await?;
    let run = client.ask(&Ask::text("demo", "Once", 2), PATIENCE).await?;
    let hops = shown["hops"].as_array().unwrap();
    ensure!(hops.len() == run.route.len(), "{shown} {:?}", run.route);
    let sum: f64 = ["network_ms", "queue_ms", "overhead_ms", "compute_ms"]
        .iter()
        .flat_map(|part| hops.iter().map(move |hop| hop[part].as_f64().unwrap()))
        .sum();
    let total = shown["token_ms"].as_f64().unwrap();
    let reply = shown["reply_ms"].as_f64().unwrap();
    ensure!(
        (sum + reply - total).abs() < 0.02,
        "the parts add up: {shown}"
    );
    ensure!(
        hops.iter().all(|hop| hop["no_standby"].is_string()),
        "{shown}"
    );
    ensure!(shown["others"].as_array().unwrap().is_empty(), "{shown}");

    // One peer more: it stands by for the span it holds too, or is said to be no better.
    join(&mut swarm, "demo", &["0..3"], &[]).await?;
    let client = swarm.client("other");
    // Each call measures the network anew: now and then the fifth peer is on the route itself.
    let shown = until("the fifth peer stands by", PATIENCE, async || {
        let json = args(&client, &["--json"]);
        let shown: Value = client.json(&json, PATIENCE).await.ok()?;
        let other = shown["others"].as_array()?.first()?;
        let stands_by = |hop: &Value| hop["standby"] == other["peer"];
        shown["hops"]
            .as_array()?
            .iter()
            .any(stands_by)
            .then_some(())
    });
    shown.await?;
    let words = [
        "route:",
        "network",
        "queue",
        "compute",
        "stands by: …",
        "not on it",
        "back to here",
    ];
    let explained = until("it is explained who stands by", PATIENCE, async || {
        let explain = args(&client, &["--explain"]);
        let output = client.output(&explain, PATIENCE).await.ok()?;
        words
            .iter()
            .all(|word| output.stdout.contains(word))
            .then_some(())
    });
    explained.await?;
    swarm.stop().await;
    Ok(())
}

#[tokio::test]
async fn missing_layers_are_named_with_what_to_do() -> Result<()> {
    let mut swarm = serve("demo", &["0..3", "2..5"], &[]).await?;
    let client = swarm.client("client");
    let output = until("both peers are known", PATIENCE, async || {
        let explain = args(&client, &["--explain"]);
        let output = client.output(&explain, PATIENCE).await.ok()?;
        output.stdout.contains("5..8").then_some(output)
    });
    let output = output.await?;
    let (out, err) = (&output.stdout, &output.stderr);
    ensure!(output.status.code() == Some(1), "{out} {err}");
    ensure!(
        out.contains("missing: layers 5..8, and nobody is loading them"),
        "{out}"
    );
    ensure!(
        out.contains("it could be used, others are missing"),
        "{out}"
    );
    ensure!(
        err.contains("shoal node --model demo --layers 5..8"),
        "{err}"
    );
    swarm.stop().await;
    Ok(())
}
