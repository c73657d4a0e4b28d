//! The main promise, with real processes: a swarm that holds the model in pieces says what the whole model says.

use anyhow::{Result, ensure};
use testnet::client::Ask;
use tests::{FOUR_SPANS, PATIENCE, demo_file, serve};

const PROMPT: &str = "Once upon a time there was a little";

/// Asks a swarm of four and the whole model in one process.
async fn staged_equals_whole(model: &str, n: u32) -> Result<()> {
    let mut swarm = serve(model, &FOUR_SPANS, &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let ask = Ask::text(model, PROMPT, n);
    let staged = client.ask(&ask, PATIENCE).await?;
    let whole = client.ask_local(&ask, PATIENCE).await?;
    ensure!(
        staged.route.len() == 4,
        "the route has {} hops: {:?}",
        staged.route.len(),
        staged.route
    );
    ensure!(!whole.text.is_empty(), "the whole model says nothing");
    ensure!(
        staged.text == whole.text,
        "staged: {:?}\nwhole: {:?}",
        staged.text,
        whole.text
    );
    ensure!(
        staged.ttft_ms > 0.0 && staged.tokens_per_s > 0.0,
        "no timings: {staged:?}"
    );
    let killed = swarm.stop().await;
    ensure!(killed.is_empty(), "had to be killed: {killed:?}");
    Ok(())
}

#[tokio::test]
async fn the_demo_model_by_name() -> Result<()> {
    staged_equals_whole("demo", 64).await
}

/// The same model in another type, 64 greedy tokens.
async fn quantised(kind: engine::QuantType) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("quantised.gguf");
    engine::quantize(&demo_file(), &file, kind)?;
    staged_equals_whole(&file.display().to_string(), 64).await
}

#[tokio::test]
async fn the_demo_model_in_f32() -> Result<()> {
    quantised(engine::QuantType::F32).await
}

#[tokio::test]
async fn the_demo_model_in_q8_0() -> Result<()> {
    quantised(engine::QuantType::Q8_0).await
}

#[tokio::test]
async fn the_demo_model_in_q4_k_m() -> Result<()> {
    quantised(engine::QuantType::Q4KM).await
}

#[tokio::test]
async fn two_clients_at_once_are_both_right() -> Result<()> {
    let mut swarm = serve("demo", &FOUR_SPANS, &[]).await?;
    let (one, two) = (swarm.client("one"), swarm.client("two"));
    one.until_covered(8, PATIENCE).await?;
    let first = Ask::text("demo", PROMPT, 48);
    let second = Ask::text("demo", "The old man went down to the sea and", 48);
    let (first_staged, second_staged) =
        tokio::try_join!(one.ask(&first, PATIENCE), two.ask(&second, PATIENCE))?;
    let first_whole = one.ask_local(&first, PATIENCE).await?;
    let second_whole = two.ask_local(&second, PATIENCE).await?;
    assert_eq!(first_staged.text, first_whole.text);
    assert_eq!(second_staged.text, second_whole.text);
    assert_ne!(first_whole.text, second_whole.text);
    swarm.stop().await;
    Ok(())
}
