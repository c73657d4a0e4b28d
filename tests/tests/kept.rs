//! The next turn of a conversation over `shoal serve` computes only what is new, says what it would have said anyway,
//! and nobody else gets anything of it.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::http::Api;
use tests::{PATIENCE, serve, until};

/// A history that leaves room for an answer in the demo model's 1,024 positions.
const HISTORY: u32 = 900;

struct Said {
    text: String,
    kept: u64,
    prompt_ms: f64,
}

async fn ask(api: &Api, key: &str, prompt: &[u32]) -> Result<Said> {
    let body = json!({"prompt": prompt, "max_tokens": 8, "temperature": 0}).to_string();
    let key = format!("Authorization: Bearer {key}");
    let headers = ["Content-Type: application/json", key.as_str()];
    let answer = api
        .ask("POST", "/v1/completions", &headers, body.as_bytes())
        .await?
        .json(200)?;
    let extra = |name: &str| {
        answer["choices"][0]["x_shoal"]
            .get(name)
            .or(answer["x_shoal"].get(name))
    };
    let kept = extra("kept_tokens")
        .and_then(Value::as_u64)
        .with_context(|| answer.to_string())?;
    let cached = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
    ensure!(*cached == kept, "{answer}");
    Ok(Said {
        text: answer["choices"][0]["text"]
            .as_str()
            .context("no text")?
            .to_owned(),
        kept,
        prompt_ms: extra("timings")
            .and_then(|timings| timings["prompt_ms"].as_f64())
            .context("no time")?,
    })
}

#[tokio::test]
async fn the_next_turn_computes_only_what_is_new() -> Result<()> {
    let mut swarm = serve("demo", &["0..4", "4..8"], &[]).await?;
    swarm.client("client").until_covered(8, PATIENCE).await?;
    let flags = ["--api-key", "one", "--api-key", "two"];
    let api = Api::start(&swarm.client("api"), &flags).await?;
    let ready = async || {
        let health = api.get("/health").await.ok()?.json(200).ok()?;
        (health["ready"] == true).then_some(())
    };
    until("the server knows a whole model", PATIENCE, ready).await?;
    let history: Vec<u32> = (0..HISTORY).map(|i| 300 + i * 7 % 900).collect();
    let turn: Vec<u32> = history.iter().copied().chain([310, 320, 330]).collect();

    let first = ask(&api, "one", &history).await?;
    assert_eq!(first.kept, 0);
    let next = ask(&api, "one", &turn).await?;
    assert_eq!(next.kept, u64::from(HISTORY));
    // A wide bound: the machine runs other tests too. `shoal bench` and the README have the figure.
    ensure!(
        next.prompt_ms < first.prompt_ms * 0.6,
        "{} ms after {} ms",
        next.prompt_ms,
        first.prompt_ms
    );
    println!(
        "first token after {} ms, then {} ms",
        first.prompt_ms, next.prompt_ms
    );

    // Who asks with another key computes it all, and hears the same.
    let other = ask(&api, "two", &turn).await?;
    assert_eq!((other.kept, &other.text), (0, &next.text));
    // The one that was kept for the first key is still its own, whole prompts included.
    let again = ask(&api, "one", &turn).await?;
    assert_eq!(again.kept, u64::from(HISTORY) + 2);
    assert_eq!(again.text, next.text);

    // None is kept where the owner says so.
    let forgetful = Api::start(&swarm.client("forgetful"), &["--keep", "0"]).await?;
    let ready = async || {
        let health = forgetful.get("/health").await.ok()?.json(200).ok()?;
        (health["ready"] == true).then_some(())
    };
    until("the other server knows it, too", PATIENCE, ready).await?;
    for _ in 0..2 {
        assert_eq!(ask(&forgetful, "one", &turn).await?.kept, 0);
    }
    swarm.stop().await;
    Ok(())
}
