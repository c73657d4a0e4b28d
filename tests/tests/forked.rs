//! Conversations over `shoal serve` that begin with one system prompt compute it once, also at the same time, and each
//! says what it says alone; with another key nothing is shared.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::http::{Api, Response};
use tests::{PATIENCE, serve, until};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Tokens of the system prompt: whole frames, and a part of one that is computed again.
const SYSTEM: u32 = 650;
const SHARED: u64 = 640;
const KEYS: [&str; 6] = ["one", "two", "three", "four", "five", "six"];

struct Said {
    text: String,
    kept: u64,
    prompt_ms: f64,
}

fn prompt(own: u32) -> Vec<u32> {
    let system = (0..SYSTEM).map(|i| 300 + i * 7 % 900);
    system.chain((0..9).map(|i| 400 + own * 31 + i)).collect()
}

async fn send(api: &Api, key: &str, prompt: &[u32], tokens: u32) -> Result<TcpStream> {
    let body = json!({
        "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": true, "logit_bias": {"1": -100},
    });
    let key = format!("Authorization: Bearer {key}");
    let headers = ["Content-Type: application/json", key.as_str()];
    let body = body.to_string();
    api.send("POST", "/v1/completions", &headers, body.as_bytes())
        .await
}

/// Until the first token is there.
async fn first_token(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while !String::from_utf8_lossy(&bytes).contains("\"text\":\"") {
        let n = timeout(PATIENCE, stream.read_buf(&mut bytes)).await??;
        ensure!(n > 0, "{}", String::from_utf8_lossy(&bytes));
    }
    Ok(bytes)
}

async fn rest(mut stream: TcpStream, mut bytes: Vec<u8>) -> Result<Said> {
    timeout(PATIENCE, stream.read_to_end(&mut bytes)).await??;
    let events = Response::read(&bytes)?.events()?;
    let choices = events.iter().flat_map(|event| event["choices"].as_array());
    let text = choices
        .flatten()
        .filter_map(|choice| choice["text"].as_str());
    let mut places = events.iter().flat_map(|event| {
        let of_choices = event["choices"].as_array().into_iter().flatten();
        of_choices
            .map(|choice| &choice["x_shoal"])
            .chain([&event["x_shoal"]])
    });
    let extra = places.find(|extra| extra.is_object()).context("no extra")?;
    Ok(Said {
        text: text.collect(),
        kept: extra["kept_tokens"].as_u64().context("no kept tokens")?,
        prompt_ms: extra["timings"]["prompt_ms"].as_f64().context("no time")?,
    })
}

async fn ask(api: &Api, key: &str, prompt: &[u32], tokens: u32) -> Result<Said> {
    rest(send(api, key, prompt, tokens).await?, Vec::new()).await
}

#[tokio::test]
async fn one_system_prompt_is_computed_once() -> Result<()> {
    let mut swarm = serve("demo", &["0..4", "4..8"], &[]).await?;
    swarm.client("client").until_covered(8, PATIENCE).await?;
    let flags: Vec<&str> = KEYS.iter().flat_map(|key| ["--api-key", key]).collect();
    let api = Api::start(&swarm.client("api"), &flags).await?;
    let ready = async || {
        let health = api.get("/health").await.ok()?.json(200).ok()?;
        (health["ready"] == Value::Bool(true)).then_some(())
    };
    until("the server knows a whole model", PATIENCE, ready).await?;
    // What each says alone: each with a key of its own.
    let (first, second, third) = (prompt(1), prompt(2), prompt(3));
    let alone = [
        ask(&api, "three", &first, 200).await?,
        ask(&api, "four", &second, 20).await?,
        ask(&api, "five", &third, 20).await?,
    ];
    assert!(alone.iter().all(|said| said.kept == 0));

    // One runs, another one begins with the same.
    let mut running = send(&api, "one", &first, 200).await?;
    let begun = first_token(&mut running).await?;
    let forked = ask(&api, "one", &second, 20).await?;
    assert_eq!(forked.kept, SHARED);
    assert_eq!(forked.text, alone[1].text);
    let ran = rest(running, begun).await?;
    assert_eq!((ran.kept, &ran.text), (0, &alone[0].text));
    println!(
        "first token after {:.0} ms, of the fork after {:.0} ms",
        alone[1].prompt_ms, forked.prompt_ms
    );
    // And when it is only kept: its own next turn still finds it.
    let later = ask(&api, "one", &third, 20).await?;
    assert_eq!((later.kept, &later.text), (SHARED, &alone[2].text));
    let again = ask(&api, "one", &first, 200).await?;
    assert_eq!(
        (again.kept, &again.text),
        (first.len() as u64 - 1, &ran.text)
    );

    // At the same time: one computes it, the others wait for that. Who has another key does not.
    let (one, other, stranger) = tokio::try_join!(
        ask(&api, "two", &second, 20),
        ask(&api, "two", &third, 20),
        ask(&api, "six", &second, 20),
    )?;
    assert_eq!(
        one.kept + other.kept,
        SHARED,
        "{} and {}",
        one.kept,
        other.kept
    );
    assert_eq!((&one.text, &other.text), (&alone[1].text, &alone[2].text));
    assert_eq!((stranger.kept, &stranger.text), (0, &alone[1].text));
    swarm.stop().await;
    Ok(())
}
