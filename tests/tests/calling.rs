//! Tools over `shoal serve`: the model is told of them by its chat template, and a call that is demanded comes as one.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::http::Api;
use tests::{PATIENCE, demo_with, serve, until};

/// The demo model's own, with a place for tools and what they answered.
const TEMPLATE: &str = "{{ bos_token }}{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}\
    {% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>{{ m.content }}\
    {% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|end|>{% endfor %}<|assistant|>";

fn tool() -> Value {
    json!({
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 12}, "days": {"type": "integer"}},
            "required": ["place", "days"],
        },
    })
}

fn fits(arguments: &Value) -> bool {
    let place = arguments["place"].as_str();
    place.is_some_and(|place| place.chars().count() <= 12) && arguments["days"].is_i64()
}

#[tokio::test]
async fn a_demanded_call_comes_as_one() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("caller.gguf");
    demo_with(&file, "tokenizer.chat_template", TEMPLATE)?;
    let mut swarm = serve(&file.display().to_string(), &["0..4", "4..8"], &[]).await?;
    swarm.client("client").until_covered(8, PATIENCE).await?;
    let api = Api::start(&swarm.client("api"), &[]).await?;
    let ready = async || {
        let health = api.get("/health").await.ok()?.json(200).ok()?;
        (health["ready"] == true).then_some(())
    };
    until("the server knows a whole model", PATIENCE, ready).await?;
    openais(&api).await?;
    anthropics(&api).await?;
    swarm.stop().await;
    Ok(())
}

async fn openais(api: &Api) -> Result<()> {
    let path = "/v1/chat/completions";
    let question = json!({"role": "user", "content": "How is the weather?"});
    let mut ask = json!({
        "messages": [question], "temperature": 0, "max_tokens": 100, "tool_choice": "required",
        "tools": [{"type": "function", "function": tool()}],
    });
    let answer = api.post(path, &ask).await?.json(200)?;
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
    assert_eq!(choice["message"]["content"], Value::Null);
    let call = choice["message"]["tool_calls"][0].clone();
    assert_eq!(call["function"]["name"], "weather");
    let text = call["function"]["arguments"]
        .as_str()
        .context("no arguments")?;
    ensure!(fits(&serde_json::from_str(text)?), "{text}");

    ask["stream"] = json!(true);
    let events = api.post(path, &ask).await?.events()?;
    let deltas = events.iter().map(|event| &event["choices"][0]["delta"]);
    let calls: Vec<&Value> = deltas.filter_map(|delta| delta.get("tool_calls")).collect();
    assert_eq!(calls.len(), 1, "{events:?}");
    assert_eq!(calls[0][0]["function"], call["function"]);
    let last = events.last().context("no events")?;
    assert_eq!(last["choices"][0]["finish_reason"], "tool_calls");

    // The caller answers the call, and words are an answer again.
    let said = json!({"role": "assistant", "content": null, "tool_calls": [call]});
    let found = json!({"role": "tool", "tool_call_id": call["id"], "content": "rain"});
    ask["messages"] = json!([question, said, found]);
    ask["tool_choice"] = json!("auto");
    ask["stream"] = json!(false);
    let answer = api.post(path, &ask).await?.json(200)?;
    let content = &answer["choices"][0]["message"]["content"];
    ensure!(
        content.as_str().is_some_and(|text| !text.is_empty()),
        "{answer}"
    );
    // A tool's description takes room in the prompt.
    let with = answer["usage"]["prompt_tokens"].as_u64();
    ask["tool_choice"] = json!("none");
    let answer = api.post(path, &ask).await?.json(200)?;
    ensure!(answer["usage"]["prompt_tokens"].as_u64() < with, "{answer}");
    Ok(())
}

async fn anthropics(api: &Api) -> Result<()> {
    let mut tool = tool();
    let schema = tool["parameters"].take();
    let tool =
        json!({"name": tool["name"], "description": tool["description"], "input_schema": schema});
    let mut ask = json!({
        "messages": [{"role": "user", "content": "How is the weather?"}], "temperature": 0, "max_tokens": 100,
        "tools": [tool], "tool_choice": {"type": "any"},
    });
    let answer = api.post("/v1/messages", &ask).await?.json(200)?;
    assert_eq!(answer["stop_reason"], "tool_use", "{answer}");
    let block = &answer["content"][0];
    assert_eq!(
        (&block["type"], &block["name"]),
        (&json!("tool_use"), &json!("weather"))
    );
    ensure!(fits(&block["input"]), "{block}");
    ask["stream"] = json!(true);
    let stream = api.post("/v1/messages", &ask).await?.body;
    let data = stream
        .lines()
        .filter_map(|line| line.strip_prefix("data: "));
    let events = data
        .map(serde_json::from_str)
        .collect::<Result<Vec<Value>, _>>()?;
    let inputs = events
        .iter()
        .filter_map(|it| it["delta"]["partial_json"].as_str());
    let input: Value = serde_json::from_str(&inputs.collect::<String>())?;
    assert_eq!(input, block["input"]);
    Ok(())
}

#[tokio::test]
async fn a_template_without_a_place_for_tools_is_named() -> Result<()> {
    let mut swarm = serve("demo", &["0..8"], &[]).await?;
    swarm.client("client").until_covered(8, PATIENCE).await?;
    let api = Api::start(&swarm.client("api"), &[]).await?;
    let messages = json!([{"role": "user", "content": "hello"}]);
    let ask = json!({"messages": messages, "tools": [{"type": "function", "function": tool()}]});
    let error = async || {
        let answer = api.post("/v1/chat/completions", &ask).await.ok()?;
        (answer.status != 503).then_some(answer)
    };
    let error = until("the server knows the model", PATIENCE, error)
        .await?
        .json(400)?;
    assert_eq!(error["error"]["param"], "tools");
    swarm.stop().await;
    Ok(())
}
