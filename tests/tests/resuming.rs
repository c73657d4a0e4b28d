//! Answers that outlive the swarm and the client, with real processes: a client that is killed is resumed from
//! its journal, and one whose swarm is gone goes on with the whole model. The text is that of an undisturbed run.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde::Deserialize;
use testnet::client::Client;
use testnet::swarm::Swarm;
use tests::{PATIENCE, demo_file, serve};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::Child;
use tokio::time::timeout;

const PROMPT: &str = "There was once a little girl who lived in a house by the wood, and one day";
/// Half a second or more of answer, and how many tokens that is.
const TOKENS: usize = 300;
/// The swarm is given up after so many seconds.
const WAIT: &str = "1";

#[derive(Deserialize)]
struct Answer {
    text: String,
    tokens: Vec<u32>,
    route: Vec<serde_json::Value>,
    privacy: String,
    peers_can_read_prompt: bool,
    resumed: Option<Resumed>,
    fell_back: Option<FellBack>,
}

#[derive(Deserialize)]
struct Resumed {
    id: String,
    tokens: usize,
}

#[derive(Deserialize)]
struct FellBack {
    at_token: usize,
    why: String,
}

#[derive(Deserialize)]
struct List {
    interrupted: Vec<Interrupted>,
}

#[derive(Deserialize)]
struct Interrupted {
    id: String,
    tokens: usize,
    max_tokens: usize,
    title: String,
}

fn args(client: &Client, verb: &str, more: &[&str]) -> Vec<String> {
    let mut args = vec![verb.to_owned()];
    args.extend(client.swarm_args());
    args.extend(more.iter().map(|arg| (*arg).to_owned()));
    args
}

/// A question with these flags.
fn question(client: &Client, more: &[&str]) -> Vec<String> {
    let n = TOKENS.to_string();
    let fixed = ["--raw", "-n", &n, PROMPT];
    args(client, "run", &[more, &fixed].concat())
}

async fn list(client: &Client) -> Result<Vec<Interrupted>> {
    let args = args(client, "run", &["--resume", "--list", "--json"]);
    let list: List = client.json(&args, PATIENCE).await?;
    Ok(list.interrupted)
}

/// Reads until so many bytes of an answer came.
async fn read_some(child: &mut Child, bytes: usize) -> Result<String> {
    let mut text = vec![0; bytes];
    let stdout = child.stdout.as_mut().context("no stdout")?;
    timeout(PATIENCE, stdout.read_exact(&mut text)).await??;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Starts a client and kills it when it has printed so many bytes.
async fn killed(client: &Client, args: &[String], bytes: usize) -> Result<String> {
    let mut child = client.start(args)?;
    let printed = read_some(&mut child, bytes).await?;
    child.kill().await?;
    Ok(printed)
}

/// Waits for the end; gives all that was printed on both.
async fn end(mut child: Child) -> Result<(String, String)> {
    let (mut out, mut err) = (String::new(), String::new());
    let mut stdout = child.stdout.take().context("no stdout")?;
    let mut stderr = child.stderr.take().context("no stderr")?;
    let ended = async {
        tokio::try_join!(
            stdout.read_to_string(&mut out),
            stderr.read_to_string(&mut err)
        )?;
        child.wait().await
    };
    let status = timeout(PATIENCE, ended).await??;
    ensure!(status.success(), "it ended with {status}: {err}");
    Ok((out, err))
}

/// Kills a client twice in mid-answer and resumes it each time.
async fn resumed_equals_undisturbed(model: &str, choice: &[&str]) -> Result<()> {
    let mut swarm = serve(model, &["0..4", "4..8"], &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let json = [choice, &["--json"]].concat();
    let calm: Answer = client.json(&question(&client, &json), PATIENCE).await?;
    ensure!(
        list(&client).await?.is_empty(),
        "an answer that ended left a journal"
    );

    let begun = killed(&client, &question(&client, choice), 200).await?;
    ensure!(calm.text.starts_with(&begun), "{begun}");
    let first = list(&client).await?;
    let [left] = &first[..] else {
        anyhow::bail!("{} journals", first.len());
    };
    ensure!(
        PROMPT.starts_with(left.title.trim_end_matches('…')),
        "{}",
        left.title
    );
    ensure!(0 < left.tokens && left.tokens < TOKENS && left.max_tokens == TOKENS);

    let again = killed(&client, &args(&client, "run", &["--resume"]), 600).await?;
    ensure!(calm.text.starts_with(&again), "{again}");
    let second = list(&client).await?;
    ensure!(second.len() == 1 && second[0].id == left.id && second[0].tokens > left.tokens);

    let named = args(&client, "run", &["--resume", &left.id, "--json"]);
    let whole: Answer = client.json(&named, PATIENCE).await?;
    let resumed = whole
        .resumed
        .context("it does not say that it was resumed")?;
    ensure!(resumed.id == left.id && resumed.tokens == second[0].tokens);
    ensure!(
        whole.tokens == calm.tokens && whole.text == calm.text,
        "the text is another:\n{}\n{}",
        calm.text,
        whole.text
    );
    ensure!(list(&client).await?.is_empty(), "the journal stays");
    swarm.stop().await;
    Ok(())
}

#[tokio::test]
async fn a_killed_client_resumes_to_the_same_text() -> Result<()> {
    resumed_equals_undisturbed("demo", &["--temp", "0"]).await
}

#[tokio::test]
async fn a_killed_client_resumes_with_the_same_dice() -> Result<()> {
    resumed_equals_undisturbed("demo", &["--temp", "0.9", "--seed", "7"]).await
}

/// Of a type whose batches have other bits, so that tokens go one by one.
#[tokio::test]
async fn a_killed_client_resumes_a_model_in_q4_k_m() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("quantised.gguf");
    engine::quantize(&demo_file(), &file, engine::QuantType::Q4KM)?;
    resumed_equals_undisturbed(&file.display().to_string(), &["--temp", "0"]).await
}

#[tokio::test]
async fn a_journal_is_kept_for_whom_it_is_meant_and_goes_nowhere_else() -> Result<()> {
    let mut swarm = serve("demo", &["0..8"], &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    killed(&client, &question(&client, &["--no-journal"]), 50).await?;
    ensure!(
        list(&client).await?.is_empty(),
        "a journal that was not wanted"
    );

    killed(&client, &question(&client, &[]), 50).await?;
    let elsewhere = ["run", "--resume", "--swarm", "another", "--mdns", "off"];
    let refused = client.output(&elsewhere, PATIENCE).await?;
    ensure!(!refused.status.success() && refused.stdout.is_empty());
    ensure!(
        refused.stderr.contains("that was asked in swarm"),
        "{}",
        refused.stderr
    );
    let refused = client
        .output(&["run", "--resume", "--temp", "0"], PATIENCE)
        .await?;
    ensure!(refused.status.code() == Some(2), "{}", refused.stderr);
    ensure!(
        list(&client).await?.len() == 1,
        "a refusal costs the journal"
    );
    swarm.stop().await;
    Ok(())
}

fn kill(swarm: &mut Swarm, index: usize) -> Result<()> {
    swarm.nodes_mut()[index].process.signal(Signal::KILL)
}

#[tokio::test]
async fn the_whole_model_goes_on_when_no_holder_is_left() -> Result<()> {
    let mut swarm = serve("demo", &["0..4", "4..8"], &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let greedy = ["--temp", "0", "--json"];
    let calm: Answer = client.json(&question(&client, &greedy), PATIENCE).await?;
    ensure!(calm.fell_back.is_none());
    let falling = ["--temp", "0", "--wait", WAIT, "--local-fallback", "demo"];

    let mut child = client.start(&question(&client, &falling))?;
    let begun = read_some(&mut child, 200).await?;
    kill(&mut swarm, 1)?;
    let (rest, said) = end(child).await?;
    ensure!(
        format!("{begun}{rest}") == calm.text.clone() + "\n",
        "{begun}{rest}"
    );
    ensure!(
        said.contains("the answer goes on in this process with `demo`"),
        "{said}"
    );
    ensure!(
        list(&client).await?.is_empty(),
        "an answer that ended left a journal"
    );

    // Nobody opens a session any more.
    let falling = [&falling[..], &["--json"]].concat();
    let alone: Answer = client.json(&question(&client, &falling), PATIENCE).await?;
    ensure!(alone.tokens == calm.tokens && alone.text == calm.text);
    let why = alone.fell_back.context("it does not say who answered")?;
    ensure!(why.at_token == 0 && !why.why.is_empty());
    ensure!(alone.route.is_empty() && alone.privacy == "local" && !alone.peers_can_read_prompt);
    swarm.stop().await;
    Ok(())
}

#[tokio::test]
async fn what_fell_back_says_who_saw_the_prompt_and_another_model_is_refused() -> Result<()> {
    let mut swarm = serve("demo", &["0..4", "4..8"], &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let folder = tempfile::tempdir()?;
    let other = folder.path().join("other.gguf");
    engine::quantize(&demo_file(), &other, engine::QuantType::F32)?;
    let other = other.display().to_string();
    let refused = client
        .output(&question(&client, &["--local-fallback", &other]), PATIENCE)
        .await?;
    ensure!(!refused.status.success() && refused.stdout.is_empty());
    ensure!(
        refused.stderr.contains("the fallback `"),
        "{}",
        refused.stderr
    );
    ensure!(
        !refused.stderr.contains("route: "),
        "it began: {}",
        refused.stderr
    );

    let greedy = ["--temp", "0", "--json"];
    let calm: Answer = client.json(&question(&client, &greedy), PATIENCE).await?;
    let falling = [&greedy[..], &["--wait", WAIT, "--local-fallback", "demo"]].concat();
    let mut child = client.start(&question(&client, &falling))?;
    let mut notes = BufReader::new(child.stderr.take().context("no stderr")?).lines();
    while let Some(line) = timeout(PATIENCE, notes.next_line()).await?? {
        if line.starts_with("route: ") {
            break;
        }
    }
    kill(&mut swarm, 0)?;
    let mut json = String::new();
    let mut stdout = child.stdout.take().context("no stdout")?;
    timeout(PATIENCE, stdout.read_to_string(&mut json)).await??;
    let fallen: Answer = serde_json::from_str(&json)?;
    ensure!(fallen.tokens == calm.tokens && fallen.text == calm.text);
    let how = fallen
        .fell_back
        .context("it does not say that it fell back")?;
    ensure!(
        how.at_token < TOKENS && how.why.contains("routes were tried"),
        "{}",
        how.why
    );
    ensure!(fallen.route.len() == 2 && fallen.privacy == "open" && fallen.peers_can_read_prompt);
    swarm.stop().await;
    Ok(())
}

#[tokio::test]
async fn a_chat_goes_on_in_this_process() -> Result<()> {
    let mut swarm = serve("demo", &["0..4", "4..8"], &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let flags = [
        "--temp",
        "0",
        "-n",
        "40",
        "--wait",
        WAIT,
        "--local-fallback",
        "demo",
    ];
    let chat = args(&client, "chat", &flags);
    let lines = [&b"Once upon a time\n"[..], b"Then the king said\n"];
    let mut calm = Vec::new();
    for n in 1..=2 {
        let mut child = client.start(&chat)?;
        let mut stdin = child.stdin.take().context("no stdin")?;
        stdin.write_all(&lines[..n].concat()).await?;
        drop(stdin);
        calm.push(end(child).await?.0);
    }
    ensure!(calm[1].starts_with(&calm[0]) && calm[1].len() > calm[0].len() + 1);

    let mut child = client.start(&chat)?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    stdin.write_all(lines[0]).await?;
    let first = read_some(&mut child, calm[0].len()).await?;
    kill(&mut swarm, 1)?;
    stdin.write_all(lines[1]).await?;
    drop(stdin);
    let (second, said) = end(child).await?;
    ensure!(first + &second == calm[1], "{second}\n{said}");
    ensure!(said.contains("in this process"), "{said}");
    swarm.stop().await;
    Ok(())
}
