//! `shoal bench serve`: what clients of the HTTP server get. A real server over real nodes, asked over HTTP with
//! streaming, by more and more clients at once; beside a long prompt; and in the second turn of a chat.

mod arrival;
mod ask;
mod chat;
mod load;
mod report;
mod words;

use std::time::{Duration, Instant};

use self::ask::{Prompt, Reply, Server};
use self::report::{Report, ratio};
use self::words::Words;
use super::nodes::Nodes;
use super::{Measured, share_out, temporary};
use crate::failure::Failure;
use crate::local_models;
use crate::model_facts::ModelFacts;
use crate::terminal;

/// Measure the HTTP server: tokens/s, time to first token and gaps with 1 to 16 clients at once.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal bench serve                                the demo model over 4 nodes
  shoal bench serve --one-billion --json           a random model of 1.1 billion weights in Q4_K_M
  shoal bench serve --concurrency 1,8 --part load  only that
  shoal bench serve --url http://127.0.0.1:8080    a server that runs already

Each client asks again as soon as it was answered, always with words that were not asked before. Then a prompt
of --long tokens arrives beside a running answer, whose tokens should not wait for it; and the second turn of a
chat of --history tokens is compared with the first. Where a model has room for less, prompts are shorter.")]
pub struct Args {
    #[command(flatten)]
    model: Measured,
    /// Measure the server at this address instead of starting one; --model names one of its models.
    #[arg(long, value_name = "URL", conflicts_with = "one_billion")]
    url: Option<String>,
    /// Its key.
    #[arg(
        long,
        env = "SHOAL_API_KEY",
        value_name = "KEY",
        hide_env_values = true,
        requires = "url"
    )]
    api_key: Option<String>,
    /// Nodes that share the layers.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    hops: u32,
    /// What to measure: load, arrival (of a long prompt), chat (its second turn).
    #[arg(
        long,
        value_enum,
        value_name = "PART",
        value_delimiter = ',',
        hide_possible_values = true,
        default_values_t = [Part::Load, Part::Arrival, Part::Chat]
    )]
    part: Vec<Part>,
    /// Clients at once.
    #[arg(
        long,
        value_name = "N,…",
        value_delimiter = ',',
        default_values_t = [1, 2, 4, 8, 16],
        value_parser = clap::value_parser!(u32).range(1..=1024)
    )]
    concurrency: Vec<u32>,
    /// How long each number of clients is measured.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Tokens of a prompt.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    prompt: u32,
    /// Tokens of an answer at most.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// Tokens of the long prompt.
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..))]
    long: u32,
    /// Tokens of a chat's first turn.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    history: u32,
    /// Chats measured.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    chats: u32,
    /// What prompts are drawn from; the server must not have seen those of another run.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Load,
    Arrival,
    Chat,
}

/// What is asked of whom.
pub struct Plan {
    server: Server,
    lasting: Duration,
    prompt_tokens: u32,
    answer_tokens: u32,
    running_tokens: u32,
    long_tokens: u32,
    history_tokens: u32,
    chats: u32,
}

/// The nodes' adverts reach a server that has just started within this time.
const COVERED_TIMEOUT: Duration = Duration::from_secs(60);
/// Of the answer beside which a long prompt arrives: it should last.
const RUNNING_TOKENS: u32 = 1024;
/// What a template, a question and an answer add to a history, or a long prompt's last words to it.
const ROOM: u32 = 96;
/// Words by which a tokenizer is known.
const SAMPLE_WORDS: usize = 64;

/// Starts nodes and a server unless one runs, measures, prints.
pub fn main(args: Args) -> anyhow::Result<()> {
    let json = args.json;
    let report = match &args.url {
        Some(url) => {
            let server = Server::new(url, args.api_key.clone())?;
            let report = measure(&args, server)?;
            Report {
                url: Some(url.clone()),
                ..report
            }
        }
        None => {
            let temp = temporary()?;
            let file = args.model.file(temp.path())?;
            let facts = ModelFacts::new(&local_models::header_of_file(&file)?)?;
            let spans = share_out(facts.n_layer, args.hops);
            let mut nodes = Nodes::start(&file, &spans, 1)?;
            let server = Server::new(&nodes.serve()?, None)?;
            let report = measure(&args, server)?;
            Report {
                nodes: Some(spans.len() as u32),
                ..report
            }
        }
    };
    if json {
        terminal::say_json(&report)
    } else {
        report::print(&report)
    }
}

fn measure(args: &Args, server: Server) -> anyhow::Result<Report> {
    let (server, n_ctx) = with_model(args, server)?;
    let mut words = Words::new(args.seed.unwrap_or_else(rand::random));
    // The first request also warms up: sessions, tokenizer, memory.
    let tokens = sample(&server, &mut words)?;
    words.learn(SAMPLE_WORDS, tokens);
    let fits = |tokens: u32, more: u32| tokens.min(n_ctx.saturating_sub(more)).max(1);
    let plan = Plan {
        lasting: Duration::from_secs(args.seconds.into()),
        prompt_tokens: fits(args.prompt, args.tokens),
        answer_tokens: args.tokens,
        running_tokens: fits(RUNNING_TOKENS, args.prompt.saturating_add(ROOM)),
        long_tokens: fits(args.long, ROOM),
        history_tokens: fits(args.history, ROOM),
        chats: args.chats,
        server,
    };
    let mut report = Report {
        model: plan.server.model.clone(),
        answer_tokens: plan.answer_tokens,
        seconds: args.seconds,
        ..Report::default()
    };
    if args.part.contains(&Part::Load) {
        let bar = terminal::bar_of(args.concurrency.len() as u64, "numbers of clients");
        for clients in &args.concurrency {
            let (mut level, prompt_tokens) = load::measure(&plan, &mut words, *clients)?;
            if let Some(first) = report.load.first() {
                level.ratio = ratio(level.tokens_per_s, first.tokens_per_s);
            }
            report.prompt_tokens = report.prompt_tokens.max(prompt_tokens);
            report.load.push(level);
            bar.inc(1);
        }
        bar.finish_and_clear();
    }
    if args.part.contains(&Part::Arrival) {
        let _wheel = terminal::wheel("a long prompt beside a running answer");
        report.arrival = Some(arrival::measure(&plan, &mut words)?);
    }
    if args.part.contains(&Part::Chat) {
        let _wheel = terminal::wheel("the second turn of a chat");
        report.chat = Some(chat::measure(&plan, &mut words)?);
    }
    Ok(report)
}

/// The server, for the model that is meant, and how long a context may be.
fn with_model(args: &Args, mut server: Server) -> anyhow::Result<(Server, u32)> {
    let named = &args.model.named.model;
    let until = Instant::now() + COVERED_TIMEOUT;
    let listed = loop {
        let listed = server.models()?;
        if !listed.is_empty() || Instant::now() > until {
            break listed;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let meant = listed.iter().find(|(id, _)| id == named);
    // Nodes that were started here serve one model; the name of another server's is the user's business.
    let meant = meant.or_else(|| match args.url {
        Some(_) if named != local_models::DEMO => None,
        _ => listed.first(),
    });
    let Some((model, n_ctx)) = meant.cloned() else {
        let ids: Vec<&str> = listed.iter().map(|(id, _)| &**id).collect();
        let why = match ids.is_empty() {
            true => "the server has no model that is whole".to_owned(),
            false => format!("the server has no model {named}"),
        };
        return Err(Failure::new(why)
            .try_this(match ids.first() {
                Some(id) => format!("--model {id}"),
                None => "`shoal status`: which layers have no holder".into(),
            })
            .into());
    };
    server.model = model;
    Ok((server, n_ctx.unwrap_or(u32::MAX)))
}

/// Tokens of some words, as the server counts them.
fn sample(server: &Server, words: &mut Words) -> anyhow::Result<u64> {
    let prompt = Prompt::Text(words.words(SAMPLE_WORDS));
    let until = Instant::now() + COVERED_TIMEOUT;
    loop {
        match server.ask(&prompt, 2, |_| true)? {
            Reply::Answer(answer) => {
                return Ok(answer.prompt_tokens.unwrap_or(SAMPLE_WORDS as u64));
            }
            Reply::Refused(_) if Instant::now() > until => {
                return Err(Failure::new("the server is full all the time")
                    .try_this("--url of another one, or end what asks this one")
                    .into());
            }
            Reply::Refused(after) => std::thread::sleep(after),
        }
    }
}
