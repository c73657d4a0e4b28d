//! Programs that people use, unchanged, against `shoal serve`: the official clients of OpenAI and Anthropic, and `llm`.
//! They come from the registry of Python packages into target/, in the versions of tests/clients/requirements.txt.
//!
//! Where they cannot be had (no Python, no network) the test says so on standard error and passes; with CI set it
//! fails (docs/decisions/0094).

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use testnet::client::Client;
use tests::http::Api;
use tests::{PATIENCE, demo_with, repository, serve, until};
use tokio::process::Command;
use tokio::time::timeout;

const KEY: &str = "a-key-for-tests";
const PROMPT: &str = "Once upon a time there was a little";
const QUESTION: &str = "Tell me a story about a fox.";
const SYSTEM: &str = "Be brief.";
/// Installing may have to fetch some ten megabytes.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(300);

/// The folder of the installed clients; nothing where they cannot be had.
async fn installed() -> Result<Option<PathBuf>> {
    let requirements = repository().join("tests/clients/requirements.txt");
    let wanted = std::fs::read_to_string(&requirements)?;
    let program = std::env::current_exe()?;
    let target = program.ancestors().nth(3).context("no target folder")?;
    let venv = target.join("clients");
    let stamp = venv.join("installed.txt");
    if std::fs::read_to_string(&stamp).is_ok_and(|had| had == wanted) {
        return Ok(Some(venv));
    }
    match install(&venv, &requirements).await {
        Ok(()) => {
            std::fs::write(stamp, wanted)?;
            Ok(Some(venv))
        }
        Err(error) if std::env::var_os("SHOAL_REAL_CLIENTS").is_some() => Err(error),
        Err(error) => {
            // The test harness swallows what the macros print, and this must be seen.
            writeln!(
                std::io::stderr(),
                "\nNOT TESTED: the real clients could not be installed ({error:#}); set SHOAL_REAL_CLIENTS to make this a failure\n"
            )?;
            Ok(None)
        }
    }
}

async fn install(venv: &Path, requirements: &Path) -> Result<()> {
    let _ = std::fs::remove_dir_all(venv);
    let mut make = Command::new("python3");
    make.args(["-m", "venv"]).arg(venv);
    output(&mut make, INSTALL_TIMEOUT).await?;
    let mut pip = Command::new(venv.join("bin/pip"));
    pip.args([
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--retries",
        "1",
    ]);
    pip.arg("--requirement").arg(requirements);
    output(&mut pip, INSTALL_TIMEOUT).await?;
    Ok(())
}

async fn output(command: &mut Command, limit: Duration) -> Result<String> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let ran = timeout(limit, command.output())
        .await
        .context("it took too long")?;
    let ran = ran.with_context(|| format!("cannot start {command:?}"))?;
    if !ran.status.success() {
        let said = String::from_utf8_lossy(&ran.stderr);
        let last: Vec<&str> = said.trim_end().lines().rev().take(20).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        bail!("{}: {}", ran.status, last.join("\n"));
    }
    Ok(String::from_utf8_lossy(&ran.stdout).into_owned())
}

/// Runs one of the clients' programs and reads the JSON it prints.
async fn script(venv: &Path, name: &str, args: &[&str]) -> Result<Value> {
    let mut command = Command::new(venv.join("bin/python"));
    command
        .arg(repository().join("tests/clients").join(name))
        .args(args);
    command.env("NO_PROXY", "*");
    let said = output(&mut command, PATIENCE)
        .await
        .context(name.to_owned())?;
    serde_json::from_str(&said).with_context(|| said.clone())
}

/// What `shoal run` says, at temperature 0 and at most 30 tokens.
async fn run(client: &Client, flags: &[&str]) -> Result<Value> {
    let mut args = vec!["run".to_owned()];
    args.extend(client.swarm_args());
    let fixed = ["--model", "demo", "--json", "--temp", "0", "-n", "30"];
    args.extend(fixed.iter().chain(flags).map(|&flag| flag.to_owned()));
    client.json(&args, PATIENCE).await
}

#[tokio::test]
async fn programs_that_people_use_work_unchanged() -> Result<()> {
    let Some(venv) = installed().await? else {
        return Ok(());
    };
    let mut swarm = serve("demo", &["0..4", "4..8"], &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let api = Api::start(&swarm.client("api"), &["--api-key", KEY]).await?;
    let ready = async || {
        let health = api.get("/health").await.ok()?.json(200).ok()?;
        (health["ready"] == true).then_some(())
    };
    until("the server knows a whole model", PATIENCE, ready).await?;
    let chat = run(&client, &["--system", SYSTEM, QUESTION]).await?;
    let text = run(&client, &["--raw", PROMPT]).await?;

    openais(&venv, &api, &chat, &text).await?;
    anthropics(&venv, &api, &chat).await?;
    llm(&venv, &api, swarm.folder(), &chat).await?;
    let left = async || {
        let health = api.get("/health").await.ok()?.json(200).ok()?;
        (health["answering"] == 0).then_some(())
    };
    until("nothing is answered any more", PATIENCE, left).await?;
    swarm.stop().await;
    Ok(())
}

async fn openais(venv: &Path, api: &Api, chat: &Value, text: &Value) -> Result<()> {
    let url = format!("{}/v1", api.url);
    let got = script(venv, "openai_client.py", &[&url, KEY, PROMPT, QUESTION]).await?;
    assert_eq!(got["models"], json!(["demo"]));
    assert_eq!(got["chat"], chat["text"]);
    assert_eq!(got["chat_streamed"], chat["text"]);
    assert_eq!(got["text"], text["text"]);
    for counted in ["chat_tokens", "stream_usage", "logprobs"] {
        assert_eq!(got[counted], chat["generated_tokens"], "{counted}");
    }
    assert_eq!(got["route"], 2);
    let errors = json!({
        "model": [404, "model", "model_not_found"],
        "range": [400, "temperature", null],
        "key": [401, null, "invalid_api_key"],
    });
    assert_eq!(got["errors"], errors);
    Ok(())
}

async fn anthropics(venv: &Path, api: &Api, chat: &Value) -> Result<()> {
    let got = script(venv, "anthropic_client.py", &[&api.url, KEY, QUESTION]).await?;
    assert_eq!(got["text"], chat["text"]);
    assert_eq!(got["streamed"], chat["text"]);
    for counted in ["tokens", "stream_tokens"] {
        assert_eq!(got[counted], chat["generated_tokens"], "{counted}");
    }
    for counted in ["counted", "input_tokens"] {
        assert_eq!(got[counted], chat["prompt_tokens"], "{counted}");
    }
    assert_eq!(got["unknown"], 404);
    Ok(())
}

/// The command-line program `llm`, told of the server by its own configuration file.
async fn llm(venv: &Path, api: &Api, folder: &Path, chat: &Value) -> Result<()> {
    let home = folder.join("llm");
    std::fs::create_dir_all(&home)?;
    let model = json!([{"model_id": "swarm", "model_name": "demo", "api_base": format!("{}/v1", api.url), "api_key_name": "swarm"}]);
    // JSON is YAML.
    std::fs::write(home.join("extra-openai-models.yaml"), model.to_string())?;
    std::fs::write(home.join("keys.json"), json!({"swarm": KEY}).to_string())?;
    for how in ["--no-stream", "--no-log"] {
        let mut command = Command::new(venv.join("bin/llm"));
        command.env("LLM_USER_PATH", &home).env("NO_PROXY", "*");
        command.args(["-m", "swarm", "-s", SYSTEM, "-o", "temperature", "0"]);
        command.args(["-o", "max_tokens", "30", "--no-log", how, QUESTION]);
        let said = output(&mut command, PATIENCE).await.context("llm")?;
        let wanted = chat["text"].as_str().unwrap_or_default();
        ensure!(
            said.trim_end_matches('\n') == wanted.trim_end_matches('\n'),
            "{how}: {said}"
        );
    }
    Ok(())
}

/// `embeddings.create` as OpenAI's own client sends it, which asks for base64 by itself, over two machines.
#[tokio::test]
async fn openais_client_gets_embeddings() -> Result<()> {
    let Some(venv) = installed().await? else {
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("embeds.gguf");
    demo_with(&file, "llama.pooling_type", 1u32)?;
    let model = file.display().to_string();
    let mut swarm = serve(&model, &["0..4", "4..8"], &[]).await?;
    swarm.client("client").until_covered(8, PATIENCE).await?;
    let api = Api::start(&swarm.client("api"), &["--api-key", KEY]).await?;
    let ready = async || {
        let health = api.get("/health").await.ok()?.json(200).ok()?;
        (health["ready"] == true).then_some(())
    };
    until("the server knows a whole model", PATIENCE, ready).await?;
    let url = format!("{}/v1", api.url);
    let got = script(&venv, "openai_embeddings.py", &[&url, KEY]).await?;
    assert_eq!(got["count"], 3);
    assert_eq!(got["width"], 256);
    assert_eq!(got["indices"], json!([0, 1, 2]));
    assert_eq!(got["same"], true, "base64 and numbers are the same vector");
    assert_eq!(
        got["again"], true,
        "so is the vector of the same text later"
    );
    assert_eq!(got["route"], 2);
    assert_eq!(got["dimensions"], json!([400, "dimensions"]));
    let (near, far) = (got["near"].as_f64(), got["far"].as_f64());
    ensure!(near > far, "like texts are not more alike: {got}");
    let length = got["length"].as_f64().context("no length")?;
    ensure!((length - 1.0).abs() < 1e-5, "a vector of length {length}");
    swarm.stop().await;
    Ok(())
}
