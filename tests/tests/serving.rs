//! `shoal serve` over a real swarm, asked byte by byte: it says what `shoal run` says, names every mistake, and keeps
//! no place for who has left.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use testnet::client::Client;
use testnet::swarm::Swarm;
use tests::http::Api;
use tests::{FOUR_SPANS, PATIENCE, serve, until};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

const STORY: &str = "Once upon a time there was a little";
const QUESTION: &str = "Tell me a story about a fox.";
/// The demo model's token that ends an answer.
const END: &str = "1";

#[derive(Deserialize)]
struct Run {
    text: String,
    generated_tokens: usize,
    prompt_tokens: usize,
}

async fn start(spans: &[&str], more: &[&str], flags: &[&str]) -> Result<(Swarm, Client, Api)> {
    let swarm = serve("demo", spans, more).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let api = Api::start(&swarm.client("api"), flags).await?;
    let listed = async || {
        let models = api.get("/v1/models").await.ok()?.json(200).ok()?;
        (!models["data"].as_array()?.is_empty()).then_some(())
    };
    until("the server knows a whole model", PATIENCE, listed).await?;
    Ok((swarm, client, api))
}

/// What `shoal run` says.
async fn run(client: &Client, flags: &[&str]) -> Result<Run> {
    let mut args = vec!["run".to_owned()];
    args.extend(client.swarm_args());
    args.extend(["--model", "demo", "--json"].map(str::to_owned));
    args.extend(flags.iter().map(|flag| (*flag).to_owned()));
    client.json(&args, PATIENCE).await
}

fn text(choice: &Value) -> &str {
    choice["text"].as_str().unwrap_or_default()
}

/// The text of one answer of a stream, and why it ended.
fn joined(events: &[Value], index: u64) -> (String, String) {
    let choices = events.iter().flat_map(|event| event["choices"].as_array());
    let of_it = choices.flatten().filter(|choice| choice["index"] == index);
    let (mut whole, mut reason) = (String::new(), String::new());
    for choice in of_it {
        whole += choice["delta"]["content"].as_str().unwrap_or(text(choice));
        reason += choice["finish_reason"].as_str().unwrap_or_default();
    }
    (whole, reason)
}

#[tokio::test]
async fn answers_are_those_of_the_command() -> Result<()> {
    let (mut swarm, client, api) = start(&FOUR_SPANS, &[], &[]).await?;
    let raw = run(&client, &["--raw", "--temp", "0", "-n", "40", STORY]).await?;
    let ask = json!({"model": "demo", "prompt": STORY, "temperature": 0, "max_tokens": 40});
    let whole = api.post("/v1/completions", &ask).await?.json(200)?;
    assert_eq!(text(&whole["choices"][0]), raw.text);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["prompt_tokens"], raw.prompt_tokens);
    assert_eq!(whole["usage"]["completion_tokens"], raw.generated_tokens);
    assert_eq!(whole["x_shoal"]["route"].as_array().map(Vec::len), Some(4));
    assert_eq!(whole["x_shoal"]["privacy"], "open");
    assert_eq!(whole["x_shoal"]["peers_can_read_prompt"], true);

    let mut streamed = ask.clone();
    streamed["stream"] = json!(true);
    let events = api.post("/v1/completions", &streamed).await?.events()?;
    assert_eq!(joined(&events, 0), (raw.text.clone(), "length".into()));
    ensure!(events.len() > 10, "it did not stream: {events:?}");

    a_chat_with_dice(&client, &api).await?;
    several_answers(&client, &api).await?;
    stop_texts(&api, &ask, &raw.text).await?;
    probabilities(&api, &ask).await?;
    biases_and_penalties(&api, &ask, &raw.text).await?;
    anthropics_words(&client, &api).await?;
    swarm.stop().await;
    Ok(())
}

async fn a_chat_with_dice(client: &Client, api: &Api) -> Result<()> {
    let said = run(client, &["--seed", "7", "-n", "50", QUESTION]).await?;
    let messages = json!([{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]);
    let ask = json!({
        "model": "demo", "messages": messages, "seed": 7, "max_completion_tokens": 50,
        "stream": true, "stream_options": {"include_usage": true},
    });
    let events = api.post("/v1/chat/completions", &ask).await?.events()?;
    assert_eq!(joined(&events, 0).0, said.text);
    let last = events.last().context("no events")?;
    assert_eq!(last["usage"]["completion_tokens"], said.generated_tokens);
    assert_eq!(last["choices"], json!([]));
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let mut whole = ask.clone();
    whole["stream"] = json!(false);
    whole["stream_options"] = Value::Null;
    let whole = api.post("/v1/chat/completions", &whole).await?.json(200)?;
    assert_eq!(whole["choices"][0]["message"]["content"], said.text);
    assert_eq!(whole["x_shoal"]["seed"], 7);
    Ok(())
}

/// The prompt is computed once; each answer is what a run with that seed says.
async fn several_answers(client: &Client, api: &Api) -> Result<()> {
    let ask =
        json!({"prompt": [STORY, QUESTION], "n": 2, "seed": 3, "max_tokens": 20, "stream": true});
    let events = api.post("/v1/completions", &ask).await?.events()?;
    for (index, (prompt, seed)) in [(STORY, "3"), (STORY, "4"), (QUESTION, "3"), (QUESTION, "4")]
        .into_iter()
        .enumerate()
    {
        let said = run(client, &["--raw", "--seed", seed, "-n", "20", prompt]).await?;
        let (text, _) = joined(&events, index as u64);
        assert_eq!(text, said.text, "answer {index}");
    }
    Ok(())
}

/// Wherever in the text a stop text begins, and however many tokens it covers.
async fn stop_texts(api: &Api, ask: &Value, whole: &str) -> Result<()> {
    let chars: Vec<char> = whole.chars().collect();
    for at in [7, 15, 30] {
        let stop: String = chars.iter().skip(at).take(9).collect();
        let before = whole.split(&stop).next().unwrap_or_default();
        let mut ask = ask.clone();
        ask["stop"] = json!(["never said", stop]);
        let answer = api.post("/v1/completions", &ask).await?.json(200)?;
        assert_eq!(text(&answer["choices"][0]), before, "{stop:?}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        ask["stream"] = json!(true);
        let events = api.post("/v1/completions", &ask).await?.events()?;
        assert_eq!(joined(&events, 0), (before.to_owned(), "stop".into()));
    }
    Ok(())
}

async fn probabilities(api: &Api, ask: &Value) -> Result<()> {
    let mut ask = ask.clone();
    ask["logprobs"] = json!(3);
    let answer = api.post("/v1/completions", &ask).await?.json(200)?;
    let choice = &answer["choices"][0];
    let tokens = choice["logprobs"]["tokens"]
        .as_array()
        .context("no tokens")?;
    let spelt: String = tokens.iter().filter_map(Value::as_str).collect();
    assert_eq!(spelt, text(choice));
    let logprobs = &choice["logprobs"]["token_logprobs"];
    let tops = choice["logprobs"]["top_logprobs"].as_array();
    for ((at, token), top) in tokens.iter().enumerate().zip(tops.context("no tops")?) {
        let top = top.as_object().context("no top")?;
        let best = top
            .values()
            .filter_map(Value::as_f64)
            .fold(f64::MIN, f64::max);
        // Greedy: the chosen one is the likeliest.
        assert_eq!(logprobs[at].as_f64(), Some(best), "{token}");
        ensure!(best <= 0.0 && top.len() == 3, "{top:?}");
    }
    Ok(())
}

async fn biases_and_penalties(api: &Api, ask: &Value, usual: &str) -> Result<()> {
    let said = async |field: &str, value: Value| -> Result<String> {
        let mut ask = ask.clone();
        ask[field] = value;
        let answer = api.post("/v1/completions", &ask).await?.json(200)?;
        Ok(text(&answer["choices"][0]).to_owned())
    };
    assert_eq!(said("logit_bias", json!({"4000": -100})).await?, usual);
    let ids = said("logit_bias", json!({"300": 100})).await?;
    let words: std::collections::HashSet<&str> = ids.split_whitespace().collect();
    ensure!(
        words.len() <= 2,
        "one token was to be said again and again: {ids}"
    );
    let varied = said("frequency_penalty", json!(2)).await?;
    ensure!(varied != usual, "a penalty changed nothing");
    Ok(())
}

async fn anthropics_words(client: &Client, api: &Api) -> Result<()> {
    let said = run(client, &["--temp", "0", "-n", "30", QUESTION]).await?;
    let messages = json!([{"role": "user", "content": QUESTION}]);
    let mut ask =
        json!({"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 30});
    let answer = api.post("/v1/messages", &ask).await?.json(200)?;
    assert_eq!(answer["content"][0]["text"], said.text);
    let input = |what: &str| answer["usage"][what].as_u64().unwrap_or(0);
    let counted = input("input_tokens") + input("cache_read_input_tokens");
    assert_eq!(json!(counted), said.prompt_tokens);
    assert_eq!(answer["stop_reason"], "max_tokens");
    ask["stream"] = json!(true);
    let stream = api.post("/v1/messages", &ask).await?;
    let data = stream
        .body
        .lines()
        .filter_map(|line| line.strip_prefix("data: "));
    let events = data
        .map(serde_json::from_str)
        .collect::<Result<Vec<Value>, _>>()?;
    let kinds: Vec<&str> = events.iter().filter_map(|it| it["type"].as_str()).collect();
    assert_eq!(kinds[..2], ["message_start", "content_block_start"]);
    assert_eq!(
        kinds[kinds.len() - 3..],
        ["content_block_stop", "message_delta", "message_stop"]
    );
    let pieces = events.iter().filter_map(|it| it["delta"]["text"].as_str());
    assert_eq!(pieces.collect::<String>(), said.text);
    let counted = api
        .post("/v1/messages/count_tokens", &ask)
        .await?
        .json(200)?;
    assert_eq!(counted["input_tokens"], said.prompt_tokens);
    Ok(())
}

#[tokio::test]
async fn every_mistake_has_its_status_and_its_name() -> Result<()> {
    let (mut swarm, _, api) = start(&["0..4", "4..8"], &[], &["--body-limit", "64K"]).await?;
    let chat = "/v1/chat/completions";
    let hello = json!([{"role": "user", "content": "hello"}]);
    let long = "a fish ".repeat(2000);
    for (path, body, status, words) in [
        (chat, "{".to_owned(), 400, "not JSON"),
        (chat, "[]".to_owned(), 400, "a list"),
        (chat, "{\"messages\": 7}".to_owned(), 400, "`messages` is 7"),
        (
            chat,
            json!({"messages": hello, "temperature": "hot"}).to_string(),
            400,
            "`temperature`",
        ),
        (
            chat,
            json!({"messages": hello, "model": "gpt-9"}).to_string(),
            404,
            "served are demo",
        ),
        (
            chat,
            json!({"messages": [{"role": "user", "content": long}]}).to_string(),
            400,
            "1024",
        ),
        (
            "/v1/completions",
            json!({"prompt": long}).to_string(),
            400,
            "1024",
        ),
        (
            "/v1/completions",
            json!({"prompt": [9_999_999]}).to_string(),
            400,
            "vocabulary of 4096",
        ),
        (
            "/v1/completions",
            json!({"prompt": ""}).to_string(),
            200,
            "",
        ),
        (
            "/v1/embeddings",
            json!({"input": "a"}).to_string(),
            400,
            "embeddings",
        ),
        ("/v1/nowhere", "{}".to_owned(), 404, "no /v1/nowhere"),
        (chat, "x".repeat(80 << 10), 413, "65536 bytes"),
        (chat, "x".repeat(8 << 20), 413, "65536 bytes"),
    ] {
        let answer = api.post_text(path, &body).await?;
        let start: String = body.chars().take(80).collect();
        ensure!(answer.status == status, "{path} {start}: {answer:?}");
        ensure!(answer.body.contains(words), "{path} {start}: {answer:?}");
        let error = &answer.json(status)?["error"];
        ensure!(status == 200 || error["message"].is_string(), "{answer:?}");
    }
    let too_long = json!({"messages": [{"role": "user", "content": long}]});
    let error = api.post(chat, &too_long).await?.json(400)?;
    assert_eq!(error["error"]["code"], "context_length_exceeded");
    assert_eq!(error["error"]["param"], "messages");
    heads_and_names(&api).await?;
    swarm.stop().await;
    Ok(())
}

async fn heads_and_names(api: &Api) -> Result<()> {
    let chat = "/v1/chat/completions";
    let hello = json!([{"role": "user", "content": "hello"}]);
    let body = json!({"messages": hello, "max_tokens": 2}).to_string();
    let json_type = "Content-Type: application/json";
    for (method, headers, status) in [
        ("GET", vec![json_type], 405),
        ("POST", vec!["Content-Type: text/plain"], 415),
        ("POST", vec![], 415),
        ("POST", vec![json_type, "Host: evil.example"], 403),
        ("POST", vec![json_type], 200),
    ] {
        let answer = api.ask(method, chat, &headers, body.as_bytes()).await?;
        assert_eq!(
            answer.status, status,
            "{method} {headers:?}: {}",
            answer.body
        );
    }
    let model = api.get("/v1/models/demo").await?.json(200)?;
    assert_eq!(model["id"], "demo");
    assert_eq!(api.get("/v1/models/gpt-9").await?.status, 404);
    Ok(())
}

/// Whatever the model would rather say, and even where it would never say it.
#[tokio::test]
async fn answers_keep_to_a_format() -> Result<()> {
    let (mut swarm, _, api) = start(&["0..4", "4..8"], &[], &[]).await?;
    let said = async |format: Value, temperature: f64| -> Result<Value> {
        let ask = json!({
            "messages": [{"role": "user", "content": QUESTION}], "response_format": format,
            "temperature": temperature, "seed": 5, "max_tokens": 400,
        });
        let answer = api.post("/v1/chat/completions", &ask).await?.json(200)?;
        let choice = &answer["choices"][0];
        let content = choice["message"]["content"].as_str().unwrap_or_default();
        ensure!(choice["finish_reason"] == "stop", "{content}");
        serde_json::from_str(content).with_context(|| content.to_owned())
    };
    let schema = json!({
        "type": "object",
        "properties": {
            "title": {"type": "string", "maxLength": 20},
            "animal": {"enum": ["fox", "fish \u{1f41f}"]},
            "age": {"type": ["integer", "null"]},
            "friends": {"type": "array", "items": {"$ref": "#/$defs/friend"}, "minItems": 1, "maxItems": 2},
            "note": {"const": "a \"quoted\" word"},
        },
        "required": ["title", "animal", "age", "friends"],
        "additionalProperties": false,
        "$defs": {"friend": {"type": "object", "properties": {"good": {"type": "boolean"}}, "required": ["good"]}},
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "story", "strict": true, "schema": schema}});
    for temperature in [0.0, 0.7, 1.5] {
        let value = said(format.clone(), temperature).await?;
        let keys: Vec<&String> = value.as_object().context("no object")?.keys().collect();
        assert_eq!(keys[..4], ["title", "animal", "age", "friends"], "{value}");
        let title = value["title"].as_str().context("no title")?;
        ensure!(title.chars().count() <= 20, "{value}");
        ensure!(
            ["fox", "fish \u{1f41f}"]
                .map(Value::from)
                .contains(&value["animal"]),
            "{value}"
        );
        ensure!(value["age"].is_i64() || value["age"].is_null(), "{value}");
        let friends = value["friends"].as_array().context("no friends")?;
        ensure!((1..=2).contains(&friends.len()), "{value}");
        ensure!(
            friends.iter().all(|friend| friend["good"].is_boolean()),
            "{value}"
        );
        ensure!(
            value
                .get("note")
                .is_none_or(|note| note == "a \"quoted\" word"),
            "{value}"
        );
    }
    // Numbers that are far from the likeliest 256 tokens of a story.
    let digits = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [90_210, 31_337]}}});
    ensure!(
        [90_210, 31_337]
            .map(Value::from)
            .contains(&said(digits, 0.0).await?)
    );
    let ask = json!({
        "messages": [{"role": "user", "content": QUESTION}], "response_format": {"type": "json_object"},
        "temperature": 0, "max_tokens": 60, "logit_bias": {END: -100},
    });
    let answer = api.post("/v1/chat/completions", &ask).await?.json(200)?;
    let content = answer["choices"][0]["message"]["content"].as_str();
    ensure!(
        content.is_some_and(|text| text.trim_start().starts_with('{')),
        "{answer}"
    );
    swarm.stop().await;
    Ok(())
}

/// An answer that takes a minute or so by itself.
fn endless() -> String {
    let bias = json!({END: -100});
    let ask =
        json!({"prompt": STORY, "max_tokens": 900, "n": 16, "stream": true, "logit_bias": bias});
    ask.to_string()
}

/// Starts an endless answer and reads its head.
async fn occupy(api: &Api) -> Result<(u16, String, TcpStream)> {
    let json = ["Content-Type: application/json"];
    let mut stream = api
        .send("POST", "/v1/completions", &json, endless().as_bytes())
        .await?;
    let mut head = vec![0; 1024];
    let n = stream.read(&mut head).await?;
    let head = String::from_utf8_lossy(&head[..n]).to_lowercase();
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    Ok((status, head, stream))
}

#[tokio::test]
async fn who_hangs_up_makes_room_at_once() -> Result<()> {
    let narrow = ["--memory", "6M"];
    let (mut swarm, _, api) = start(&["0..4", "4..8"], &narrow, &["--queue", "0"]).await?;
    let mut readers = Vec::new();
    let refused = loop {
        let (status, head, stream) = occupy(&api).await?;
        if status != 200 {
            break (status, head);
        }
        readers.push(stream);
        ensure!(readers.len() < 32, "there is always room");
    };
    assert_eq!(refused.0, 429, "{}", refused.1);
    ensure!(refused.1.contains("retry-after: "), "{}", refused.1);
    let health = api.get("/health").await?.json(200)?;
    assert_eq!(health["answering"], readers.len());
    drop(readers);
    let free = async || {
        let health = api.get("/health").await.ok()?.json(200).ok()?;
        (health["answering"] == 0).then_some(())
    };
    // Each of them would have gone on for much longer.
    until(
        "nothing is answered any more",
        Duration::from_secs(10),
        free,
    )
    .await?;
    let ask = json!({"prompt": STORY, "max_tokens": 200, "logit_bias": {END: -100}});
    let answer = api.post("/v1/completions", &ask).await?.json(200)?;
    assert_eq!(answer["usage"]["completion_tokens"], 200);
    swarm.stop().await;
    Ok(())
}

#[tokio::test]
async fn at_the_end_running_answers_are_told() -> Result<()> {
    let (mut swarm, _, api) = start(&["0..4", "4..8"], &[], &["--drain", "1"]).await?;
    let (status, _, mut stream) = occupy(&api).await?;
    assert_eq!(status, 200);
    let reading = async move {
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.map(|_| rest)
    };
    let (stopped, rest) = tokio::join!(api.stop(Duration::from_secs(20)), reading);
    stopped?;
    let rest = rest?;
    ensure!(rest.contains("this server is stopping"), "{rest}");
    ensure!(!rest.contains("[DONE]"), "{rest}");
    swarm.stop().await;
    Ok(())
}

#[tokio::test]
async fn without_a_swarm_requests_are_told_to_come_back() -> Result<()> {
    let (mut swarm, _, api) = start(&["0..8"], &[], &["--queue", "0", "--wait", "1"]).await?;
    let nobody = swarm
        .client("alone")
        .knowing(vec!["/ip4/127.0.0.1/tcp/1".into()]);
    let alone = Api::start(&nobody, &[]).await?;
    let ask = json!({"prompt": STORY, "max_tokens": 4});
    for path in ["/v1/completions", "/v1/messages"] {
        let mut ask = ask.clone();
        ask["messages"] = json!([{"role": "user", "content": "hello"}]);
        let answer = alone.post(path, &ask).await?;
        assert_eq!(answer.status, 503, "{}", answer.body);
        ensure!(answer.header("retry-after").is_some(), "{answer:?}");
    }
    assert_eq!(alone.get("/health").await?.json(200)?["ready"], false);
    // And a swarm that goes away.
    assert_eq!(api.post("/v1/completions", &ask).await?.status, 200);
    swarm.stop().await;
    let answer = api.post("/v1/completions", &ask).await?;
    assert_eq!(answer.status, 503, "{}", answer.body);
    Ok(())
}

/// The answers stream on while one machine goes and another has taken over.
#[tokio::test]
async fn a_hop_that_dies_changes_no_word() -> Result<()> {
    let (mut swarm, client, api) = start(&["0..4", "4..8"], &[], &[]).await?;
    let said = run(&client, &["--raw", "--temp", "0", "-n", "300", STORY]).await?;
    let ask =
        json!({"prompt": STORY, "max_tokens": 300, "n": 16, "temperature": 0, "stream": true});
    let api = std::sync::Arc::new(api);
    let asking = std::sync::Arc::clone(&api);
    let answers = tokio::spawn(async move { asking.post("/v1/completions", &ask).await });
    let begun = async || {
        let health = api.get("/health").await.ok()?.json(200).ok()?;
        (health["answering"] == 1).then_some(())
    };
    until("the answers begin", PATIENCE, begun).await?;
    tests::join(&mut swarm, "demo", &["4..8"], &[]).await?;
    let second = async || {
        let layers = client.layers(PATIENCE).await.ok()?;
        (layers.get(4)?.holders.len() == 2).then_some(())
    };
    until("a second machine holds the layers", PATIENCE, second).await?;
    ensure!(!answers.is_finished(), "the answers were over too soon");
    swarm.nodes_mut()[1]
        .process
        .signal(rustix::process::Signal::KILL)?;
    let events = answers.await??.events()?;
    for index in 0..16 {
        assert_eq!(joined(&events, index).0, said.text, "answer {index}");
    }
    let mut extras = events
        .iter()
        .filter_map(|event| event["x_shoal"]["recoveries"].as_array());
    ensure!(
        extras.next_back().is_some_and(|list| list.len() == 1),
        "nothing was lost"
    );
    swarm.stop().await;
    Ok(())
}
