//! `shoal-node --api`: a node answers HTTP itself, through its own layers and others' alike, says what `shoal run`
//! says, and stops only when running answers have had their moment.

use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;
use serde_json::{Value, json};
use testnet::binaries::Binaries;
use testnet::swarm::{NodeSpec, Swarm};
use tests::http::Api;
use tests::{PATIENCE, join, until};

const STORY: &str = "Once upon a time there was a little";

/// A swarm whose first node has the API; the others hold `spans`.
async fn start(own: &str, spans: &[&str], flags: &[&str]) -> Result<(Swarm, Api)> {
    let mut swarm = Swarm::new(Binaries::beside_this_program()?)?;
    let mut args = vec!["--model", "demo", "--layers", own, "--api", "127.0.0.1:0"];
    args.extend(flags);
    let ready = swarm.start(&NodeSpec::new(args), PATIENCE).await?;
    let api = Api::at(&ready.api.context("no address of the API")?)?;
    join(&mut swarm, "demo", spans, &[]).await?;
    let listed = async || {
        let models = api.get("/v1/models").await.ok()?.json(200).ok()?;
        (!models["data"].as_array()?.is_empty()).then_some(())
    };
    until("the node knows a whole model", PATIENCE, listed).await?;
    Ok((swarm, api))
}

async fn run(swarm: &Swarm, n: &str) -> Result<Value> {
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let mut args = vec!["run".to_owned()];
    args.extend(client.swarm_args());
    let fixed = ["--model", "demo", "--json", "--raw", "--temp", "0", "-n"];
    args.extend(fixed.iter().chain(&[n, STORY]).map(|&arg| arg.to_owned()));
    client.json(&args, PATIENCE).await
}

#[tokio::test]
async fn a_node_alone_answers_through_itself() -> Result<()> {
    let (mut swarm, api) = start("0..8", &[], &[]).await?;
    // No model named: the one that this node serves.
    let ask = json!({"prompt": STORY, "temperature": 0, "max_tokens": 30});
    let whole = api.post("/v1/completions", &ask).await?.json(200)?;
    assert_eq!(
        whole["choices"][0]["text"],
        run(&swarm, "30").await?["text"]
    );
    let me = &swarm.nodes()[0].ready.as_ref().context("not ready")?.peer;
    assert_eq!(whole["x_shoal"]["route"][0]["peer"], json!(me));
    assert_eq!(whole["x_shoal"]["route"].as_array().map(Vec::len), Some(1));
    let left = swarm.stop().await;
    assert!(left.is_empty(), "{left:?}");
    Ok(())
}

#[tokio::test]
async fn its_own_layers_and_others_make_one_route() -> Result<()> {
    for (own, other) in [("0..4", "4..8"), ("4..8", "0..4"), ("3..5", "0..3")] {
        let others: &[&str] = match own {
            "3..5" => &[other, "5..8"],
            _ => &[other],
        };
        let (mut swarm, api) = start(own, others, &[]).await?;
        let ask = json!({"model": "demo", "prompt": STORY, "temperature": 0, "max_tokens": 30});
        let whole = api.post("/v1/completions", &ask).await?.json(200)?;
        assert_eq!(
            whole["choices"][0]["text"],
            run(&swarm, "30").await?["text"]
        );
        let hops = whole["x_shoal"]["route"].as_array().map(Vec::len);
        assert_eq!(hops, Some(1 + others.len()), "{own}: {whole}");
        swarm.stop().await;
    }
    Ok(())
}

#[tokio::test]
async fn told_to_stop_it_lets_answers_end_first() -> Result<()> {
    let (mut swarm, api) = start("0..8", &[], &["--drain", "60", "--cpu-share", "20"]).await?;
    let ask = json!({"prompt": STORY, "temperature": 0, "max_tokens": 60, "stream": true});
    let body = ask.to_string();
    let answer = api.ask(
        "POST",
        "/v1/completions",
        &["Content-Type: application/json"],
        body.as_bytes(),
    );
    let stopped = async {
        let busy = async || {
            let health = api.get("/health").await.ok()?.json(200).ok()?;
            (health["answering"] == 1).then_some(())
        };
        until("it answers", PATIENCE, busy).await?;
        let node = &mut swarm.nodes_mut()[0].process;
        node.signal(Signal::TERM)?;
        node.ended(PATIENCE).await
    };
    let (answer, ended) = tokio::try_join!(answer, stopped)?;
    assert!(ended.success(), "{ended}");
    let events = answer.events()?;
    let last = events.last().context("no events")?;
    assert_eq!(last["choices"][0]["finish_reason"], "length", "{last}");
    Ok(())
}

#[tokio::test]
async fn what_is_wrong_with_the_address_ends_the_node() -> Result<()> {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = taken.local_addr()?.to_string();
    for (api, says, code) in [
        (address.as_str(), "cannot listen on", 1),
        ("0.0.0.0:0", "no key", 2),
    ] {
        let mut swarm = Swarm::new(Binaries::beside_this_program()?)?;
        let args = ["--model", "demo", "--layers", "0..1", "--api", api];
        let error = swarm.start(&NodeSpec::new(args), PATIENCE).await;
        let error = error.err().context("it started")?.to_string();
        assert!(error.contains(says), "{error}");
        let ended = swarm.nodes_mut()[0]
            .process
            .ended(Duration::from_secs(5))
            .await?;
        assert_eq!(ended.code(), Some(code), "{error}");
    }
    Ok(())
}
