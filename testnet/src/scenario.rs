//! What one run does: look at the model, start the nodes, ask, compare, report.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use testnet::client::{Answer, Ask, Hop};
use testnet::cold::ColdStart;
use testnet::facts::Facts;
use testnet::picture::Scene;
use testnet::plan::{copies, spans};
use testnet::report::{Report, seconds};
use testnet::screen::Screen;
use testnet::swarm::{Node, NodeSpec, StartPlan, Swarm, check_spans};
use testnet::tally::Tally;

use crate::{Args, chaos, cold_start, island};

/// Nodes that start at the same time once every layer is held: more wait for each other on few cores.
const STARTS_AT_ONCE: usize = 4;

/// How long a client may take to see what all nodes said: adverts travel within seconds.
const COVERED_TIMEOUT: Duration = Duration::from_secs(60);

/// What a node, a prompt and a token may take on a slow machine, for each GB of model.
const BASE_TIMEOUT: Duration = Duration::from_secs(120);
const TIMEOUT_PER_GB: Duration = Duration::from_secs(60);

/// Plays the whole scenario; says whether the swarm's text is that of the whole model, and stayed so when nodes failed.
///
/// # Errors
/// When anything but the comparison fails.
pub async fn play(args: &Args, swarm: &mut Swarm, screen: &mut Screen) -> Result<bool> {
    let began = Instant::now();
    let model = resolve(args.model())?;
    let client = swarm.client("client");
    let facts = client.inspect(&model, BASE_TIMEOUT).await?;
    let limit = time_limit(facts.bytes);
    introduce(args, &facts, swarm, screen);

    let start = Instant::now();
    let cold = begin(args, &model, &facts, swarm, screen, limit).await?;
    let client = swarm.client("client");
    let covered = client.until_covered(facts.n_layer, COVERED_TIMEOUT);
    let layers = screen
        .wait_for("a client looks for all layers", covered)
        .await?;
    let start_s = seconds(start.elapsed());

    let ask = Ask {
        model,
        prompt: args.prompt().to_owned(),
        tokens: args.tokens,
        n: args.n_predict(),
    };
    screen.lines(&format!(
        "\nasking for {} tokens, always the likeliest one, after: {}\n",
        ask.n, ask.prompt
    ));
    let Answers {
        answer,
        whole,
        rss_bytes,
    } = ask_both(&ask, swarm, screen, limit).await?;
    let mut report = Report {
        nodes: swarm.nodes().len(),
        covered: true,
        model: args.model().to_owned(),
        n_layer: facts.n_layer,
        copies: layers.iter().map(|layer| layer.holders.len()).collect(),
        seed: args.seed,
        layers: swarm.spans().iter().map(layers_text).collect(),
        same_as_whole: answer.same(&whole),
        hops: answer.route.len(),
        route_nodes: numbers(swarm, &answer.route),
        route: answer.route.clone(),
        prompt: args.prompt().to_owned(),
        text: answer.text.clone(),
        ttft_ms: answer.ttft_ms,
        tokens_per_s: answer.tokens_per_s,
        start_s,
        total_s: 0.0,
        rss_bytes,
        cold,
        mixture: None,
        chaos: None,
    };
    if args.moe {
        report.mixture = Some(island::look(args, &facts, swarm).await?);
    }
    screen.lines(&report.lines().join("\n"));
    if !report.same_as_whole {
        screen.lines(&format!("\nthe whole model says:\n{}", indent(&whole.text)));
    }
    report.chaos = disturb(args, &ask, &answer, limit, swarm, screen).await?;
    if args.moe && args.chaos.is_some() {
        report.mixture = Some(island::look(args, &facts, swarm).await?);
    }
    report.total_s = seconds(began.elapsed());
    finish(args, &report, screen)?;
    Ok(report.held())
}

/// Starts the nodes, in the way that is asked for.
async fn begin(
    args: &Args,
    model: &str,
    facts: &Facts,
    swarm: &mut Swarm,
    screen: &mut Screen,
    limit: Duration,
) -> Result<Option<ColdStart>> {
    if args.cold {
        let cold = cold_start::play(args, model, facts, swarm, screen);
        return cold.await.map(Some);
    }
    match args.moe {
        true => island::start(args, model, facts, swarm, screen, limit).await?,
        false => start_nodes(args, model, facts, swarm, screen, limit).await?,
    }
    Ok(None)
}

/// Writes the figures, where that is wanted.
fn finish(args: &Args, report: &Report, screen: &mut Screen) -> Result<()> {
    if let Some(path) = &args.report {
        write(report, path)?;
        screen.lines(&format!("  figures           {}", path.display()));
    }
    if !args.keep && args.chaos.is_none() && !args.cold {
        screen.lines("  to talk to such a swarm yourself: --keep leaves it running");
    }
    Ok(())
}

/// Asks again while hops fail, where that is wanted.
async fn disturb(
    args: &Args,
    ask: &Ask,
    calm: &Answer,
    limit: Duration,
    swarm: &mut Swarm,
    screen: &mut Screen,
) -> Result<Option<Tally>> {
    let Some(kinds) = &args.chaos else {
        return Ok(None);
    };
    let plan = chaos::Plan {
        kinds: &kinds.0,
        faults: args.faults,
        seed: args.seed,
        limit,
        holders: args.moe.then(|| island::holders(args.nodes())),
    };
    let tally = chaos::play(&plan, ask, calm, swarm, screen).await?;
    screen.lines(&tally.lines().join("\n"));
    Ok(Some(tally))
}

fn layers_text(span: &Range<u32>) -> String {
    format!("{}..{}", span.start, span.end)
}

/// What the swarm said, and what the whole model says.
struct Answers {
    answer: Answer,
    whole: Answer,
    /// Of each node, after its answer.
    rss_bytes: Vec<u64>,
}

async fn ask_both(
    ask: &Ask,
    swarm: &Swarm,
    screen: &mut Screen,
    limit: Duration,
) -> Result<Answers> {
    let client = swarm.client("client");
    let answer = client.ask(ask, limit);
    let answer = screen.wait_for("the swarm answers", answer).await?;
    screen.lines(&format!("{}\n", indent(&answer.text)));
    let nodes = swarm.nodes().iter();
    let rss_bytes = nodes.filter_map(|node| node.process.rss_bytes()).collect();
    let whole = client.ask_local(ask, limit);
    let whole = screen
        .wait_for("the same question to the whole model in one process", whole)
        .await
        .context("the whole model in one process")?;
    Ok(Answers {
        answer,
        whole,
        rss_bytes,
    })
}

fn introduce(args: &Args, facts: &Facts, swarm: &Swarm, screen: &mut Screen) {
    let how = if args.cold {
        format!(
            "one has it and uploads {} a second, the others know its address and the model's id, and memory they drew",
            args.upload_limit
        )
    } else if args.moe {
        island::introduce(args, facts)
    } else if args.chaos.is_some() {
        format!(
            "each layer on {} of them or more, everything towards a node passes a relay,",
            args.nodes() / 3
        )
    } else {
        "each takes layers that few hold, as many as fit the memory it drew".to_owned()
    };
    screen.lines(&format!(
        "{} nodes on this machine, swarm {}, model {} ({} layers, {:.1} MB)\n\
         {how} with --seed {}\n",
        args.nodes(),
        swarm.id(),
        args.model(),
        facts.n_layer,
        facts.bytes as f64 / 1e6,
        args.seed
    ));
}

/// The nodes of a route by number, from 1.
fn numbers(swarm: &Swarm, route: &[Hop]) -> Vec<Option<usize>> {
    let is = |node: &Node, hop: &Hop| {
        node.ready
            .as_ref()
            .is_some_and(|ready| ready.peer == hop.peer)
    };
    let number = |hop: &Hop| Some(swarm.nodes().iter().position(|node| is(node, hop))? + 1);
    route.iter().map(number).collect()
}

fn write(report: &Report, path: &Path) -> Result<()> {
    let json = serde_json::to_string_pretty(report)?;
    fs::write(path, json + "\n").with_context(|| format!("cannot write {}", path.display()))
}

/// What to type to talk to a swarm that was left running, and to stop it.
///
/// # Errors
/// When the list of processes cannot be written.
pub fn farewell(args: &Args, swarm: Swarm) -> Result<String> {
    let client = swarm.client("client");
    let model = resolve(args.model())?;
    let folder = swarm.folder().to_owned();
    let pids: Vec<String> = swarm
        .nodes()
        .iter()
        .map(|node| node.process.pid().to_string())
        .collect();
    fs::write(folder.join("pids"), pids.join("\n") + "\n")
        .context("cannot write the list of processes")?;
    let count = pids.len();
    swarm.keep();
    let folder = folder.display();
    Ok(format!(
        "\n{count} nodes keep running. Talk to them:\n  {} --model {model} \"Once upon a time\"\n  {}\n\
         Their homes and logs are under {folder}. Stop them:\n  kill $(cat {folder}/pids) && rm -r {folder}",
        client.command_line("run"),
        client.command_line("status"),
    ))
}

async fn start_nodes(
    args: &Args,
    model: &str,
    facts: &Facts,
    swarm: &mut Swarm,
    screen: &mut Screen,
    limit: Duration,
) -> Result<()> {
    let specs = specs(args, model, facts);
    let plan = StartPlan {
        // Nodes that are told their layers need not wait for each other's choice.
        n_layer: if args.chaos.is_some() {
            0
        } else {
            facts.n_layer
        },
        at_once: STARTS_AT_ONCE,
        ready_timeout: limit,
        seed: args.seed,
    };
    let start = Instant::now();
    let mut covered = false;
    let mut shown = 0;
    let mut show = |swarm: &Swarm| {
        let live = live(swarm);
        let scene = Scene {
            live: &live,
            intended: &[],
            nodes: specs.len(),
            n_layer: facts.n_layer,
            elapsed: start.elapsed(),
        };
        let first_covered = !covered && scene.covered();
        covered |= first_covered;
        let few = specs.len() <= 8;
        let news = scene.serving() > shown
            && (few
                || first_covered
                || scene.serving().is_multiple_of(4)
                || scene.serving() == specs.len());
        shown = scene.serving();
        if screen.is_live() || news {
            screen.picture(&scene.draw(screen.width()));
        }
    };
    swarm.start_all(&specs, &plan, &mut show).await?;
    let spans = swarm.spans();
    if !screen.is_live() {
        let live = live(swarm);
        let scene = Scene {
            live: &live,
            intended: &[],
            nodes: specs.len(),
            n_layer: facts.n_layer,
            elapsed: start.elapsed(),
        };
        screen.lines(&scene.draw(screen.width())[1..].join("\n"));
    }
    if args.chaos.is_some() {
        return Ok(());
    }
    check_spans(&spans, facts.n_layer)
}

/// The layers of each node that serves.
fn live(swarm: &Swarm) -> Vec<Vec<Range<u32>>> {
    let spans = swarm.spans().into_iter();
    let some = |span: Range<u32>| {
        if span.is_empty() {
            Vec::new()
        } else {
            vec![span]
        }
    };
    spans.map(some).collect()
}

/// A node for each. Where some are going to fail they are told their layers, and have memory for the sessions that
/// are kept for a client that does not come back; else they choose, within their memory.
fn specs(args: &Args, model: &str, facts: &Facts) -> Vec<NodeSpec> {
    let spec = |flag: &str, value: String| NodeSpec::new(["--model", model, flag, &value]);
    let (n_layer, nodes) = (facts.n_layer, args.nodes());
    if args.chaos.is_some() {
        let copies = copies(n_layer, nodes, args.seed).into_iter();
        return copies
            .map(|span| spec("--layers", layers_text(&span)))
            .collect();
    }
    spans(n_layer, nodes, args.seed)
        .into_iter()
        .map(|span| spec("--memory", facts.budget(span).to_string()))
        .collect()
}

/// A file's path from the root, as processes with other working folders need it; a name stays a name.
fn resolve(model: &str) -> Result<String> {
    let looks_like_a_file = model.contains('/') || model.ends_with(".gguf");
    if !looks_like_a_file {
        return Ok(model.to_owned());
    }
    let path = fs::canonicalize(model).with_context(|| format!("no model file at {model}"))?;
    Ok(path.display().to_string())
}

fn time_limit(bytes: u64) -> Duration {
    let gigabytes = u32::try_from(bytes / 1_000_000_000)
        .unwrap_or(u32::MAX)
        .min(1000);
    BASE_TIMEOUT + TIMEOUT_PER_GB * gigabytes
}

fn indent(text: &str) -> String {
    text.lines()
        .map(|line| format!("    {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}
