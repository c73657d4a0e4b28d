//! A mixture whose experts are shared out over nodes: the same text as the whole model, where each expert ran, and
//! what happens when a holder goes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use testnet::binaries::Binaries;
use testnet::client::Ask;
use testnet::swarm::{NodeSpec, StartPlan, Swarm};
use tests::{PATIENCE, launch};
use tokio::time::timeout;

const MODEL: &str = "demo-moe";
/// An expert of it has 208,896 bytes, and it has 40.
const EXPERT_BYTES: u64 = 208_896;

async fn testnet(args: &str) -> Result<Value> {
    let folder = tempfile::tempdir()?;
    let args: Vec<&str> = args.split(' ').chain(["--report", "report.json"]).collect();
    let output = launch(folder.path(), &args)?.wait_with_output();
    let output = timeout(PATIENCE, output).await??;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{}: {said}{error}", output.status);
    ensure!(said.contains("the nodes that hold them"), "{said}");
    Ok(serde_json::from_slice(&std::fs::read(
        folder.path().join("report.json"),
    )?)?)
}

#[tokio::test]
async fn experts_on_six_nodes_give_the_text_of_the_whole_model() -> Result<()> {
    let report = testnet("--moe --nodes 8 --experts-per-node 14 -n 24").await?;
    ensure!(report["same_as_whole"] == true, "{report}");
    let experts = report["experts"].as_array().context("no experts")?;
    ensure!(experts.len() == 40, "{report}");
    let rows = |expert: &Value| expert["rows"].as_u64().unwrap_or(0);
    // Two picks a row in each of five layers; the last layer computes only rows that are looked at.
    let picked: u64 = experts.iter().map(rows).sum();
    ensure!(
        picked >= 24 * 10 && picked.is_multiple_of(2),
        "{picked}: {report}"
    );
    let trunks = report["trunks"].as_array().context("no trunks")?;
    let holders = 8 - trunks.len();
    for expert in experts {
        let nodes = expert["nodes"].as_array().context("no nodes")?;
        let holds = |node: &Value| node.as_u64().is_some_and(|node| node as usize <= holders);
        ensure!(!nodes.is_empty() && nodes.iter().all(holds), "{report}");
    }
    let whole = report["model_bytes"].as_u64().context("no bytes")?;
    for trunk in trunks {
        let held = trunk["tensor_bytes"].as_u64().context("no bytes")?;
        ensure!(held > 0 && held < whole / 2, "{held} of {whole}");
    }
    Ok(())
}

#[tokio::test]
async fn holders_and_trunks_may_be_killed_and_frozen_and_no_token_changes() -> Result<()> {
    let args =
        "--moe --nodes 8 --experts-per-node 20 --chaos kill,freeze --faults 3 -n 64 --seed 3";
    let report = testnet(args).await?;
    for count in [
        "tokens_lost",
        "tokens_changed",
        "tokens_doubled",
        "runs_failed",
    ] {
        ensure!(report[count] == 0, "{count}: {report}");
    }
    Ok(())
}

/// A holder of everything, a trunk, and the memory that the trunk may have.
async fn one_holder(trunk_memory: &str) -> Result<(Swarm, Ask)> {
    let mut swarm = Swarm::new(Binaries::beside_this_program()?)?;
    let all = (40 * EXPERT_BYTES).to_string();
    let node = |hold: &str, memory: &str| {
        let near = ["--model", MODEL, "--island-rtt", "1000"];
        NodeSpec::new(near.into_iter().chain(["--hold", hold, "--memory", memory]))
    };
    let specs = [node("experts", &all), node("trunk", trunk_memory)];
    let plan = StartPlan {
        n_layer: 0,
        at_once: 1,
        ready_timeout: PATIENCE,
        seed: 1,
    };
    swarm.start_all(&specs, &plan, &mut |_: &Swarm| ()).await?;
    let ask = Ask::text(MODEL, "Once upon a time there was a little", 24);
    Ok((swarm, ask))
}

#[tokio::test]
async fn a_trunk_whose_only_holder_dies_fetches_the_experts_and_goes_on() -> Result<()> {
    let (mut swarm, ask) = one_holder("64M").await?;
    let client = swarm.client("client");
    let with_holder = client.ask(&ask, PATIENCE).await?;
    swarm.nodes_mut()[0].process.signal(Signal::KILL)?;
    // It has the model's file, so that the shards are here.
    let alone = client.ask(&ask, PATIENCE).await?;
    ensure!(
        alone.tokens == with_holder.tokens,
        "{alone:?} {with_holder:?}"
    );
    let whole = client.ask_local(&ask, PATIENCE).await?;
    ensure!(alone.same(&whole), "{alone:?} {whole:?}");
    let status = swarm.client("owner");
    let status = status.node_status(&swarm.home(2), PATIENCE).await?;
    let island = status.models[0].island.clone().context("no island")?;
    let here =
        |expert: &testnet::mixture::Placed| expert.holders.first().is_some_and(|h| h == "here");
    ensure!(
        island.experts.iter().filter(|e| e.rows > 0).all(here),
        "{island:?}"
    );
    swarm.stop().await;
    Ok(())
}

#[tokio::test]
async fn a_trunk_without_room_says_which_expert_is_missing() -> Result<()> {
    let (mut swarm, ask) = one_holder("5M").await?;
    let client = swarm.client("client");
    client.ask(&ask, PATIENCE).await?;
    swarm.nodes_mut()[0].process.signal(Signal::KILL)?;
    // Its advert takes the layers back once the holder is missed; who asks before hears what is missing.
    let failed = client.ask(&ask, PATIENCE).await;
    let why = format!("{:#}", failed.err().context("an answer without experts")?);
    let says = why.contains("expert") || why.contains("no peer serves") || why.contains("layers");
    ensure!(says, "{why}");
    swarm.stop().await;
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_held_is_refused_by_name() -> Result<()> {
    let swarm = Swarm::new(Binaries::beside_this_program()?)?;
    let client = swarm.client("client");
    for (args, says) in [
        (
            "--model demo --hold experts",
            "demo is no mixture of experts",
        ),
        ("--model demo --hold trunk", "leave --hold out"),
        (
            "--model demo-moe --hold experts --memory 100K",
            "too small for even one expert",
        ),
        ("--model demo-moe --hold expert", "possible values"),
        ("--model demo-moe --island-rtt near", "milliseconds"),
    ] {
        let args: Vec<String> = std::iter::once("node")
            .chain(args.split(' '))
            .map(str::to_owned)
            .collect();
        let output = client.output(&args, Duration::from_secs(60)).await?;
        ensure!(!output.status.success(), "{args:?}");
        ensure!(output.stderr.contains(says), "{args:?}: {}", output.stderr);
    }
    Ok(())
}
