//! What others may see of a request: its trace across all hops, figures, and a line in the log; and never a word of it.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use testnet::swarm::Swarm;
use tests::collector::{Collector, Seen};
use tests::http::Api;
use tests::metrics::{names, scrape, scrape_nodes, sum, values};
use tests::{PATIENCE, join, repository, serve, until};
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

const THREE_SPANS: [&str; 3] = ["0..3", "3..6", "6..8"];
const PATH: &str = "/v1/completions";
/// In the caller's `traceparent`.
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";
/// In no log, no metric and no trace of its own accord.
const MARKER: &str = "zanzibarquux";

async fn ready(api: &Api) -> Result<()> {
    let listed = async || {
        let models = api.get("/v1/models").await.ok()?.json(200).ok()?;
        (!models["data"].as_array()?.is_empty()).then_some(())
    };
    until("the server knows a whole model", PATIENCE, listed).await
}

fn traced() -> [String; 2] {
    let parent = format!("traceparent: 00-{TRACE}-{CALLER}-01");
    ["Content-Type: application/json".into(), parent]
}

fn named<'a>(spans: &'a [Seen], name: &str) -> Vec<&'a Seen> {
    let ours = spans.iter().filter(|span| span.trace == TRACE);
    ours.filter(|span| span.name == name).collect()
}

fn hop<'a>(spans: &'a [Seen], at: &str) -> Vec<&'a Seen> {
    let mut sessions = named(spans, "session");
    sessions.retain(|span| span.attributes.get("at").is_some_and(|it| it == at));
    sessions
}

/// The client waited for what the hops computed, and longer.
fn adds_up(spans: &[Seen], request: &Seen, tokens: u64) -> Result<()> {
    let at_client = |name| {
        let span = named(spans, name)
            .into_iter()
            .find(|span| span.parent == request.id);
        span.and_then(|span| Some((span.number("compute_us")?, span.number("elsewhere_us")?)))
    };
    let (compute, elsewhere) = at_client("decode").context("no decode")?;
    let hops: u64 = named(spans, "decode")
        .iter()
        .filter(|span| span.parent != request.id)
        .filter_map(|span| span.number("compute_us"))
        .sum();
    ensure!(compute > 0 && elsewhere > 0, "{spans:#?}");
    // Each hop rounds down what it adds to a frame.
    ensure!(compute <= hops + tokens * 3, "{compute} {hops}");
    Ok(())
}

#[tokio::test]
async fn one_request_is_one_trace_across_all_hops() -> Result<()> {
    let collector = Collector::start().await?;
    let otlp = collector.url();
    let mut swarm = serve("demo", &THREE_SPANS, &["--otlp", &otlp]).await?;
    // A session that is kept for the next turn is not over.
    let api = Api::start(&swarm.client("api"), &["--otlp", &otlp, "--keep", "0"]).await?;
    ready(&api).await?;
    let ask =
        json!({"prompt": "Once upon a time there was a little", "max_tokens": 8, "temperature": 0});
    let headers = traced();
    let headers = headers.each_ref().map(String::as_str);
    let body = ask.to_string();
    let answer = api.ask("POST", PATH, &headers, body.as_bytes()).await?;
    let tokens = answer.json(200)?["usage"]["completion_tokens"].as_u64();
    let tokens = tokens.context("no usage")?;
    ensure!(tokens == 8, "{answer:?}");

    // Two phases at the client and at each hop, a session for each hop, and the request.
    let all = |spans: &[Seen]| {
        let all = spans.iter().filter(|span| span.trace == TRACE).count();
        (all >= 12).then(|| spans.to_vec())
    };
    let spans = collector.until("the whole trace", all).await?;
    let requests = named(&spans, &format!("POST {PATH}"));
    let [request] = requests[..] else {
        anyhow::bail!("{requests:?}")
    };
    ensure!(
        request.parent == CALLER && request.service == "shoal",
        "{request:?}"
    );
    ensure!(
        request.number("http.response.status_code") == Some(200),
        "{request:?}"
    );
    let id = request.attributes.get("id").map(String::as_str);
    ensure!(
        id == answer.header("x-request-id"),
        "{request:?} {answer:?}"
    );

    let mut parent = request.id.clone();
    for (at, layers) in THREE_SPANS.iter().enumerate() {
        let sessions = hop(&spans, &at.to_string());
        let [session] = sessions[..] else {
            anyhow::bail!("hop {at}: {sessions:?}")
        };
        ensure!(
            session.parent == parent,
            "hop {at} is not a child of the one before: {session:?}"
        );
        ensure!(session.service == "shoal-node", "{session:?}");
        ensure!(
            session
                .attributes
                .get("layers")
                .is_some_and(|it| it == layers),
            "{session:?}"
        );
        phases(&spans, session, tokens)?;
        parent.clone_from(&session.id);
    }
    phases(&spans, request, tokens)?;
    adds_up(&spans, request, tokens)?;
    swarm.stop().await;
    Ok(())
}

/// A prompt and a run of tokens, with their times.
fn phases(spans: &[Seen], parent: &Seen, tokens: u64) -> Result<()> {
    for (name, frames) in [("prompt", 1), ("decode", tokens - 1)] {
        let mut found = named(spans, name);
        found.retain(|span| span.parent == parent.id);
        let [span] = found[..] else {
            anyhow::bail!("{name} of {parent:?}: {found:?}")
        };
        ensure!(span.number("frames") == Some(frames), "{span:?}");
        ensure!(
            span.number("rows").is_some_and(|rows| rows >= frames),
            "{span:?}"
        );
        ensure!(
            span.number("compute_us").is_some_and(|us| us > 0),
            "{span:?}"
        );
        for what in ["wire_in_us", "wire_out_us"] {
            ensure!(span.number(what).is_some(), "no {what}: {span:?}");
        }
        for what in ["queue_us", "elsewhere_us"] {
            let us = span.number(what).context("not there")?;
            ensure!(u128::from(us) <= span.took.as_micros(), "{what}: {span:?}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn spans_end_when_a_hop_is_killed() -> Result<()> {
    let collector = Collector::start().await?;
    let otlp = collector.url();
    let mut swarm = serve("demo", &THREE_SPANS, &["--otlp", &otlp]).await?;
    // A session that is kept for the next turn is not over.
    let api = Api::start(&swarm.client("api"), &["--otlp", &otlp, "--keep", "0"]).await?;
    ready(&api).await?;
    let ask = json!({"prompt": "Once upon a time", "max_tokens": 900, "stream": true, "temperature": 1, "seed": 3});
    let headers = traced();
    let headers = headers.each_ref().map(String::as_str);
    let mut answer = api
        .send("POST", PATH, &headers, ask.to_string().as_bytes())
        .await?;
    let mut text = vec![0; 4096];
    let n = timeout(PATIENCE, answer.read(&mut text)).await??;
    ensure!(n > 0, "no answer");
    swarm.nodes_mut()[1].process.signal(Signal::KILL)?;
    join(&mut swarm, "demo", &["3..6"], &["--otlp", &otlp]).await?;
    let mut rest = String::new();
    timeout(PATIENCE, answer.read_to_string(&mut rest)).await??;
    ensure!(
        rest.contains("[DONE]") && rest.contains("\"lost\""),
        "{rest}"
    );

    // Who was killed says nothing more; whoever took its place is in the same trace.
    let ended = |spans: &[Seen]| {
        let request = named(spans, &format!("POST {PATH}"));
        let hops = ["0", "1", "2"].map(|at| hop(spans, at).len());
        (request.len() == 1 && hops == [1; 3]).then(|| spans.to_vec())
    };
    let spans = collector
        .until("the spans of all that are left", ended)
        .await?;
    let [session] = hop(&spans, "1")[..] else {
        anyhow::bail!("{spans:?}")
    };
    // What was fed before is a prompt to it, and then tokens follow.
    for name in ["prompt", "decode"] {
        let phases = named(&spans, name);
        ensure!(
            phases.iter().any(|phase| phase.parent == session.id),
            "{name}: {spans:#?}"
        );
    }
    swarm.stop().await;
    Ok(())
}

/// All logs of a swarm's processes.
fn logs(folder: &Path, all: &mut String) -> Result<()> {
    for entry in folder.read_dir()? {
        let path = entry?.path();
        if path.is_dir() {
            logs(&path, all)?;
        } else if path.file_name().is_some_and(|name| name == "log") {
            *all += &String::from_utf8_lossy(&std::fs::read(path)?);
        }
    }
    Ok(())
}

/// Mistakes that quote what was asked.
async fn mistakes(api: &Api) -> Result<()> {
    let wrong = json!({"messages": [{"role": MARKER, "content": MARKER}], "model": MARKER});
    ensure!(
        api.post("/v1/chat/completions", &wrong).await?.status == 400,
        "a role that is none"
    );
    let unknown = json!({"prompt": MARKER, "model": MARKER});
    ensure!(
        api.post(PATH, &unknown).await?.status == 404,
        "a model that is none"
    );
    ensure!(
        api.get(&format!("/{MARKER}")).await?.status == 404,
        "a path that is none"
    );
    Ok(())
}

#[tokio::test]
async fn figures_and_lines_tell_of_a_request_and_never_a_word_of_it() -> Result<()> {
    let collector = Collector::start().await?;
    let otlp = collector.url();
    // Everything that our own code ever says.
    let said =
        "trace,libp2p=warn,hickory_proto=warn,yamux=off,h2=warn,hyper=warn,tower=warn,tonic=warn";
    let loud = ["--log", said, "--log-json", "--otlp", &otlp];
    let more = [&loud[..], &["--metrics", "0"]].concat();
    let mut swarm = serve("demo", &THREE_SPANS, &more).await?;
    let quick = [&loud[..], &["--keep", "0"]].concat();
    let api = Api::start(&swarm.client("api"), &quick).await?;
    ready(&api).await?;
    let form =
        json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": MARKER}}});
    let prompt = format!("Once upon a time {MARKER} went");
    let ask = json!({"prompt": prompt, "max_tokens": 60, "response_format": form});
    let answer = api.post(PATH, &ask).await?;
    let id = answer.header("x-request-id").context("no id")?.to_owned();
    let whole = answer.json(200)?;
    ensure!(
        whole["choices"][0]["text"]
            .as_str()
            .is_some_and(|text| text.contains(MARKER)),
        "{whole}"
    );
    let chat = json!({"messages": [{"role": "user", "content": MARKER}], "max_tokens": 4, "stop": [MARKER], "user": MARKER});
    api.post("/v1/chat/completions", &chat).await?.json(200)?;
    mistakes(&api).await?;

    let read =
        async || Ok::<_, anyhow::Error>((scrape(&api.url).await?, scrape_nodes(&swarm).await?));
    // A client may have its answer before that is counted.
    let right = async || {
        let (server, nodes) = read().await.ok()?;
        figures(&server, &nodes, &whole).ok()
    };
    let counted = until("everything is counted", PATIENCE, right).await;
    let (server, nodes) = read().await?;
    if let Err(late) = counted {
        return Err(figures(&server, &nodes, &whole).err().unwrap_or(late));
    }
    dashboard(&server, &nodes)?;

    let traced = |spans: &[Seen]| {
        let sessions = spans.iter().filter(|span| span.name == "session").count();
        (sessions >= 6).then_some(())
    };
    collector.until("both traces", traced).await?;
    let mut log = api.log();
    line(&log, &id, &whole)?;
    swarm.stop().await;
    logs(swarm.folder(), &mut log)?;
    ensure!(
        log.matches("session open").count() >= 6,
        "the nodes' logs are not here"
    );
    let metrics = nodes.concat() + &server;
    for (what, hidden) in [
        ("metrics", metrics.contains(MARKER)),
        ("logs", log.contains(MARKER)),
        ("traces", collector.heard(MARKER)),
    ] {
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(MARKER)).collect();
        ensure!(!hidden, "the prompt or the answer is in {what}: {lines:#?}");
    }
    ensure!(collector.heard("session"), "nothing is heard at all");
    Ok(())
}

/// One line says how the request went.
fn line(log: &str, id: &str, whole: &Value) -> Result<()> {
    let lines = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut ours =
        lines.filter(|line| line["fields"]["message"] == "request" && line["span"]["id"] == id);
    let line = ours
        .next()
        .with_context(|| format!("no line of {id}: {log}"))?;
    ensure!(ours.next().is_none(), "a second line of {id}");
    let fields = &line["fields"];
    ensure!(
        line["level"] == "INFO" && line["span"]["http.route"] == PATH,
        "{line}"
    );
    ensure!(
        fields["outcome"] == "answered" && fields["status"] == 200,
        "{line}"
    );
    ensure!(
        fields["prompt_tokens"] == whole["usage"]["prompt_tokens"],
        "{line}"
    );
    ensure!(
        fields["tokens"] == whole["usage"]["completion_tokens"],
        "{line}"
    );
    ensure!(fields["ms"].is_u64(), "{line}");
    Ok(())
}

/// The counts are those of what was asked.
fn figures(server: &str, nodes: &[String], whole: &Value) -> Result<()> {
    let usage = &whole["usage"];
    let at_least = |of: &Value| of.as_u64().unwrap_or(u64::MAX) as f64;
    ensure!(
        sum(server, "shoal_prompt_tokens_total") >= at_least(&usage["prompt_tokens"]),
        "{server}"
    );
    ensure!(
        sum(server, "shoal_answer_tokens_total") >= at_least(&usage["completion_tokens"]),
        "{server}"
    );
    for (name, labels, value) in [
        ("shoal_answers_total", r#"{outcome="answered"}"#, 2.0),
        (
            "shoal_http_requests_total",
            r#"{path="/v1/completions",status="200"}"#,
            1.0,
        ),
        (
            "shoal_http_requests_total",
            r#"{path="/v1/completions",status="404"}"#,
            1.0,
        ),
        (
            "shoal_http_requests_total",
            r#"{path="/v1/chat/completions",status="400"}"#,
            1.0,
        ),
        (
            "shoal_http_requests_total",
            r#"{path="other",status="404"}"#,
            1.0,
        ),
        ("shoal_first_token_seconds_count", "", 2.0),
        ("shoal_requests_running", "", 0.0),
        ("shoal_client_sessions", "", 0.0),
        ("shoal_peers_connected", "", 3.0),
        ("shoal_adverts_known", "", 3.0),
    ] {
        let found = values(server, name).get(labels).copied();
        ensure!(
            found == Some(value),
            "{name}{labels} is {found:?}, not {value}: {server}"
        );
    }
    for node in nodes {
        ensure!(sum(node, "shoal_sessions_opened_total") >= 2.0, "{node}");
        ensure!(
            sum(node, "shoal_stage_rows_total") >= at_least(&usage["total_tokens"]) - 1.0,
            "{node}"
        );
        let steps = sum(node, "shoal_step_compute_seconds_count");
        ensure!(
            steps > 0.0 && steps == sum(node, "shoal_step_rows_count"),
            "{node}"
        );
        ensure!(sum(node, "shoal_stage_kv_limit_bytes") > 0.0, "{node}");
        ensure!(
            values(node, "shoal_stream_bytes_total")
                .values()
                .all(|bytes| *bytes > 0.0),
            "{node}"
        );
        ensure!(sum(node, "process_start_time_seconds") > 1e9, "{node}");
        ensure!(sum(node, "shoal_build_info") == 1.0, "{node}");
    }
    Ok(())
}

/// Every query of the sample dashboard is of a metric that there is.
fn dashboard(server: &str, nodes: &[String]) -> Result<()> {
    let file = repository().join("deploy/grafana/shoal.json");
    let board: Value = serde_json::from_slice(&std::fs::read(&file)?)?;
    let mut known = names(server);
    known.extend(nodes.iter().flat_map(|node| names(node)));
    // Shown once something of the kind has happened.
    known.extend(["shoal_sessions_refused_total", "shoal_sessions_ended_total"].map(str::to_owned));
    let panels = board["panels"].as_array().context("no panels")?;
    let mut shown = BTreeSet::new();
    for panel in panels {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let query = target["expr"].as_str().context("no query")?;
            let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let metrics = words.filter(|it| it.starts_with("shoal_") || it.starts_with("process_"));
            let metrics: Vec<&str> = metrics.collect();
            ensure!(!metrics.is_empty(), "{query} asks for nothing of ours");
            for metric in metrics {
                ensure!(
                    known.contains(metric),
                    "{} asks for {metric}, which is not there: {known:#?}",
                    panel["title"]
                );
                shown.insert(metric.to_owned());
            }
        }
        ensure!(
            panel["type"] == "row" || panel["gridPos"]["w"].is_u64(),
            "{panel}"
        );
    }
    let ids: BTreeSet<u64> = panels
        .iter()
        .filter_map(|panel| panel["id"].as_u64())
        .collect();
    ensure!(ids.len() == panels.len(), "two panels have one id");
    // And everything that is ours is shown.
    let base = |name: &str| {
        let name = name.trim_end_matches("_bucket").trim_end_matches("_sum");
        name.trim_end_matches("_count").to_owned()
    };
    let shown: BTreeSet<String> = shown.iter().map(|name| base(name)).collect();
    let missing: Vec<String> = known
        .iter()
        .map(|name| base(name))
        .filter(|name| !shown.contains(name))
        .collect();
    ensure!(
        missing.iter().all(|name| name.starts_with("process_")),
        "on no panel: {missing:?}"
    );
    Ok(())
}

#[tokio::test]
async fn metrics_ask_for_the_key_that_everything_asks_for() -> Result<()> {
    let mut swarm: Swarm = serve("demo", &["0..8"], &[]).await?;
    let api = Api::start(&swarm.client("api"), &["--api-key", "right"]).await?;
    for (key, status) in [("right", 200), ("wrong", 401)] {
        let header = format!("Authorization: Bearer {key}");
        let answer = api.ask("GET", "/metrics", &[&header], b"").await?;
        ensure!(answer.status == status, "{answer:?}");
    }
    ensure!(api.get("/metrics").await?.status == 401, "without one");
    ensure!(api.get("/health").await?.status == 200, "as before");
    swarm.stop().await;
    Ok(())
}
