//! `/v1/embeddings` over real machines: the vector is what llama.cpp makes of the whole model, along any route and
//! after a lost hop; models that only continue text refuse by name.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::http::Api;
use tests::{PATIENCE, demo_file, demo_with, serve, until};

const TEXT: &str = "Once upon a time there was a little fox who lived in the wood.";
/// Of the text, whatever its words: every model with the demo's vocabulary takes them.
const IDS: [u32; 9] = [5, 90, 700, 12, 33, 4000, 2, 81, 900];

fn numbers(vector: &Value) -> Result<Vec<f32>> {
    let list = vector.as_array().context("no list")?;
    let number = |value: &Value| value.as_f64().map(|x| x as f32).context("no number");
    list.iter().map(number).collect()
}

async fn vectors(api: &Api, input: Value) -> Result<Vec<Vec<f32>>> {
    let answer = api.post("/v1/embeddings", &json!({"input": input})).await?;
    let data = &answer.json(200)?["data"];
    let data = data.as_array().context("no data")?;
    data.iter()
        .map(|item| numbers(&item["embedding"]))
        .collect()
}

/// llama.cpp's own, brought to length 1.
fn reference(file: &std::path::Path, ids: &[u32]) -> Result<Vec<f32>> {
    let row = engine::whole_embedding(file, ids)?;
    let length = row
        .iter()
        .map(|x| f64::from(*x).powi(2))
        .sum::<f64>()
        .sqrt();
    Ok(row
        .iter()
        .map(|x| (f64::from(*x) / length) as f32)
        .collect())
}

fn near(got: &[f32], wanted: &[f32], what: &str) -> Result<()> {
    let off = got.iter().zip(wanted).map(|(a, b)| (a - b).abs());
    let off = off.fold(0f32, f32::max);
    ensure!(
        got.len() == wanted.len() && off < 1e-6,
        "{what}: off by {off}"
    );
    Ok(())
}

#[tokio::test]
async fn vectors_are_llama_cpps_along_any_route() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for (pooling, key) in [("mean", 1u32), ("last", 3)] {
        let file = folder.path().join(format!("{pooling}.gguf"));
        demo_with(&file, "llama.pooling_type", key)?;
        let wanted = reference(&file, &IDS)?;
        let model = file.display().to_string();
        for spans in [&["0..8"][..], &["0..3", "3..6", "6..8"]] {
            let mut swarm = serve(&model, spans, &[]).await?;
            swarm.client("client").until_covered(8, PATIENCE).await?;
            let api = Api::start(&swarm.client("api"), &[]).await?;
            let ready = async || {
                let health = api.get("/health").await.ok()?.json(200).ok()?;
                (health["ready"] == true).then_some(())
            };
            until("the server knows a whole model", PATIENCE, ready).await?;
            let got = vectors(&api, json!([IDS, &IDS[..4], IDS])).await?;
            near(&got[0], &wanted, pooling)?;
            ensure!(got[0] == got[2], "the same ids gave another vector");
            near(&got[1], &reference(&file, &IDS[..4])?, pooling)?;
            // A text of several frames, and the usage that goes with it.
            let long = [TEXT; 6].join(" ");
            let ask = json!({"input": long, "encoding_format": "base64"});
            let whole = api.post("/v1/embeddings", &ask).await?.json(200)?;
            let tokens = whole["usage"]["prompt_tokens"].as_u64();
            ensure!(tokens > Some(64), "{}", whole["usage"]);
            ensure!(whole["data"][0]["embedding"].is_string());
            let route = whole["x_shoal"]["route"].as_array().map(Vec::len);
            ensure!(route == Some(spans.len()), "{}", whole["x_shoal"]);
            // It still continues text, in the same contexts.
            let ask = json!({"prompt": TEXT, "max_tokens": 5, "temperature": 0});
            let said = api.post("/v1/completions", &ask).await?.json(200)?;
            ensure!(said["usage"]["completion_tokens"] == 5, "{said}");
            swarm.stop().await;
        }
    }
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_embedded_is_refused_by_name() -> Result<()> {
    let model = demo_file().display().to_string();
    let mut swarm = serve(&model, &["0..8"], &[]).await?;
    swarm.client("client").until_covered(8, PATIENCE).await?;
    let api = Api::start(&swarm.client("api"), &[]).await?;
    let refused = async || {
        let ask = json!({"input": TEXT});
        let answer = api.post("/v1/embeddings", &ask).await.ok()?;
        (answer.status == 400).then_some(answer)
    };
    let answer = until("the model is known", PATIENCE, refused).await?;
    let error = answer.json(400)?["error"].clone();
    assert_eq!(error["param"], "model");
    let message = error["message"].as_str().unwrap_or_default();
    ensure!(message.contains("no llama.pooling_type"), "{message}");
    swarm.stop().await;
    Ok(())
}
